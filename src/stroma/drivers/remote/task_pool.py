"""Tasks, so many at once, in an order that is the same whenever the code is replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["Crew"]


class Crew:
    """The first exception cancels and awaits the rest, and comes out as itself.

    Not a TaskGroup, and no set of tasks anywhere: what is cancelled first must be the same in every replay.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._running: dict[asyncio.Task[None], None] = {}
        self._queue: list[Coroutine[Any, Any, None]] = []
        self._failed: BaseException | None = None
        self._aborted = False
        self._changed: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something as soon as there is room."""
        if self._aborted:
            work.close()
        elif self._limit is not None and len(self._running) >= self._limit:
            self._queue.append(work)
        else:
            task = asyncio.get_running_loop().create_task(work)
            self._running[task] = None
            task.add_done_callback(self._ended)

    async def room(self) -> None:
        """Wait until something could start at once, or nothing is to start any more."""
        while not self._aborted and self._limit is not None and len(self._running) >= self._limit:
            await self._change()

    async def all(self) -> None:
        """Wait for all of them. A cancellation cancels them, and comes out at their end."""
        cancelled = False
        while self._running:
            try:
                await self._change()
            except asyncio.CancelledError:
                cancelled = True
                self.abort()
        if cancelled:
            raise asyncio.CancelledError
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def abort(self) -> None:
        """Cancel what runs, and let nothing begin any more."""
        self._aborted = True
        for work in self._queue:
            work.close()
        self._queue.clear()
        for task in list(self._running):
            task.cancel()

    async def _change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._failed is None:
            self._failed = error
            self.abort()
        while self._queue and (self._limit is None or len(self._running) < self._limit):
            self.start(self._queue.pop(0))
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
