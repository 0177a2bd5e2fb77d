"""Tasks with bounded concurrency, in an order that is the same in every replay."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["OrderedTaskPool"]


class OrderedTaskPool:
    """Tasks of which the first that raises cancels the rest and is raised by :meth:`join`.

    Uses no set of tasks, unlike ``asyncio.TaskGroup``: the order of cancellations must be the same in every replay.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._running: dict[asyncio.Task[None], None] = {}
        self._queue: list[Coroutine[Any, Any, None]] = []
        self._error: BaseException | None = None
        self._was_aborted = False
        self._changed: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start work as soon as there is room."""
        if self._was_aborted:
            work.close()
        elif self._limit is not None and len(self._running) >= self._limit:
            self._queue.append(work)
        else:
            task = asyncio.get_running_loop().create_task(work)
            self._running[task] = None
            task.add_done_callback(self._finish)

    async def wait_for_room(self) -> None:
        """Wait until work could start at once, or the pool is aborted."""
        while not self._was_aborted and self._limit is not None and len(self._running) >= self._limit:
            await self._wait_for_change()

    async def join(self) -> None:
        """Await all tasks. A cancellation of the caller cancels them, and is raised when they have ended."""
        cancelled = False
        while self._running:
            try:
                await self._wait_for_change()
            except asyncio.CancelledError:
                cancelled = True
                self.abort()
        if cancelled:
            raise asyncio.CancelledError
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abort(self) -> None:
        """Cancel all tasks and start no others."""
        self._was_aborted = True
        for work in self._queue:
            work.close()
        self._queue.clear()
        for task in list(self._running):
            task.cancel()

    async def _wait_for_change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._error is None:
            self._error = error
            self.abort()
        while self._queue and (self._limit is None or len(self._running) < self._limit):
            self.start(self._queue.pop(0))
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
