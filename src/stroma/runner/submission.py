"""Submitted runs: handles of runs in a store, and one poll for all that wait for their ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from stroma.checkpoint import RunBusy, RunExists
from stroma.checkpoint.decisions import GIVEN_UP, OPEN
from stroma.checkpoint.queue import QUEUED
from stroma.runner.events import StreamEvent
from stroma.runner.flows.suspension import now_ms
from stroma.runner.stored_runs import StoredRuns, no_run
from stroma.trace.result import ExecutionResult, RunStatus

Out = TypeVar("Out", bound=BaseModel)

#: Between looks at the runs that somebody waits for, in seconds: at first, and at most.
_POLL_SECONDS: Final = (0.02, 0.5)


class HandleCalls(NamedTuple):
    """Calls of a handle; ``read`` returns the result of a run that has ended or is suspended."""

    read: Callable[[str], Awaitable[ExecutionResult[Any]]]
    follow: Callable[[str, str | None], AsyncIterator[StreamEvent]]
    send: Callable[..., Awaitable[None]]
    cancel: Callable[[str], Awaitable[bool]]


class RunHandle(Generic[Out]):
    """A run in a store, seen from any process. ``run_id`` is its id."""

    def __init__(
        self, run_id: str, stored: StoredRuns, waits: Callable[[], EndWaits], calls: HandleCalls
    ) -> None:
        self.run_id = run_id
        self._stored = stored
        self._waits = waits
        self._calls = calls

    def __repr__(self) -> str:
        return f"RunHandle({self.run_id!r})"

    async def status(self) -> str:
        """Return the status: QUEUED, RUNNING, or that of a result. Raises CheckpointNotFound, StoreError."""
        return (await self._stored.get(self.run_id)).status

    async def cancel(self) -> bool:
        """End the run as CANCELLED; see :meth:`StromaRunner.cancel`."""
        return await self._calls.cancel(self.run_id)

    def follow(self, after: str | None = None) -> AsyncIterator[StreamEvent]:
        """Yield the events of the run, over suspensions to its end; see :meth:`StromaRunner.follow`."""
        return self._calls.follow(self.run_id, after)

    async def send(self, message: Any, *, topic: str = "", id: str | None = None) -> None:
        """Store a message to the run; see :meth:`StromaRunner.send`."""
        await self._calls.send(self.run_id, message, topic=topic, id=id)

    async def result(self, timeout: float | None = None) -> ExecutionResult[Out]:
        """Wait for the end of the run, over suspensions, and return its result, whatever the end is.

        All waits of a runner share one query of the store, soon after a wait starts, and then twice a
        second. Giving up a wait changes nothing. ``timeout``: seconds; after them the run is looked at once
        more, so 0 asks if it has ended. Raises TimeoutError, CheckpointNotFound, StoreError; PipelineChanged
        if this code does not fit the run.
        """
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                while True:
                    await self._waits().until_ended(self.run_id)
                    if (result := await self._end()) is not None:
                        return result
        except TimeoutError:
            if not scope.expired():
                raise
        if await self.status() in GIVEN_UP and (result := await self._end()) is not None:
            return result
        raise TimeoutError(f"run {self.run_id!r} has not ended within {timeout:g} s")

    async def _end(self) -> ExecutionResult[Out] | None:
        """Return the result of a run that had ended; None if somebody has continued it meanwhile."""
        with contextlib.suppress(RunBusy, RunExists):
            result = await self._calls.read(self.run_id)
            return None if result.status is RunStatus.SUSPENDED else result
        return None

    async def until_stopped(self) -> ExecutionResult[Out]:
        """Wait until the run has ended or is suspended, and return its result, as ``run()`` does.

        A suspended run that is due is waited for. Raises as :meth:`result`.
        """
        delay = _POLL_SECONDS[0]
        while True:
            record = await self._stored.get(self.run_id)
            is_due = record.due_ms is not None and record.due_ms <= now_ms()
            if record.status not in ("RUNNING", RunStatus.INTERRUPTED, QUEUED) and not is_due:
                with contextlib.suppress(RunBusy, RunExists):  # Somebody has continued it meanwhile.
                    return await self._calls.read(self.run_id)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _POLL_SECONDS[1])


class EndWaits:
    """Waits for the ends of runs in one event loop: one query of the store for all of them."""

    def __init__(self, stored: Callable[[], StoredRuns]) -> None:
        self._stored = stored
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._delay = _POLL_SECONDS[0]
        self._has_begun = asyncio.Event()  # A wait has begun since the last query.
        self._polling: asyncio.Task[None] | None = None

    async def until_ended(self, run_id: str) -> None:
        """Return once a run has ended. Raises CheckpointNotFound, StoreError."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run_id, set()).add(future)
        self._delay = _POLL_SECONDS[0]
        self._has_begun.set()
        if self._polling is None or self._polling.done():
            self._polling = asyncio.ensure_future(self._poll())
        try:
            await future
        finally:
            futures = self._waiting.get(run_id, set())
            futures.discard(future)
            if not futures:
                self._waiting.pop(run_id, None)

    async def _poll(self) -> None:
        stored = self._stored()
        while self._waiting:
            self._has_begun.clear()
            run_ids = list(self._waiting)
            try:
                read = stored.journal("statuses").statuses
                statuses: dict[str, str] = await asyncio.to_thread(read, run_ids)
            except Exception as error:
                for run_id in run_ids:  # Waits that began since are for the next query.
                    self._settle(run_id, error)
            else:
                for run_id in run_ids:
                    status = statuses.get(run_id)
                    if status is None:
                        self._settle(run_id, no_run(run_id))
                    elif status not in OPEN:
                        self._settle(run_id, None)
            await asyncio.sleep(_POLL_SECONDS[0])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._delay - _POLL_SECONDS[0]):
                    await self._has_begun.wait()
            self._delay = min(2 * self._delay, _POLL_SECONDS[1])

    def _settle(self, run_id: str, error: Exception | None) -> None:
        for future in self._waiting.pop(run_id, set()):
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)
