"""Places for the plain ``def`` nodes of a runner: at most ``max_threads`` of them run at once in one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["ThreadPlaces", "enter_scope", "thread_places"]


class ThreadPlaces:
    """Places that attempts take in the order of their arrival, in one event loop."""

    def __init__(self) -> None:
        self._used = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take(self, limit: int) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if self._queue or self._used >= limit:
            return False
        self._used += 1
        return True

    async def wait(self, limit: int) -> None:
        """Wait for a place, and take it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = limit, future
        self._queue.append(entry)
        try:
            await future
        except BaseException:
            if future.done() and not future.cancelled():  # It was handed over at the same moment.
                self._used -= 1
            else:
                self._queue.remove(entry)
            self._hand_over()
            raise

    def release(self) -> None:
        """Return a place, and hand it to the first that waits."""
        self._used -= 1
        self._hand_over()

    def _hand_over(self) -> None:
        while self._queue and self._used < self._queue[0][0]:
            _, future = self._queue.popleft()
            if not future.done():
                self._used += 1
                with suppress(RuntimeError):  # The loop was closed under it.
                    future.set_result(None)


class _Scope:
    """The places outside of all plain nodes, or inside one of them."""

    def __init__(self) -> None:
        self._places: WeakKeyDictionary[Any, WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPlaces]]
        self._places = WeakKeyDictionary()

    def places(self, owner: object) -> ThreadPlaces:
        loops = self._places.setdefault(owner, WeakKeyDictionary())
        return loops.setdefault(asyncio.get_running_loop(), ThreadPlaces())


_SCOPE: ContextVar[_Scope] = ContextVar("stroma_thread_scope", default=_Scope())  # noqa: B039


def thread_places(owner: object) -> ThreadPlaces:
    """Return the places of a runner's plain nodes in the running event loop. ``owner``: its registry."""
    return _SCOPE.get().places(owner)


def enter_scope() -> None:
    """Give the code of a plain node places of its own, in its context: it must not wait for the place that it takes."""
    _SCOPE.set(_Scope())
