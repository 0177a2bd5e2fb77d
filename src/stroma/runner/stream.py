"""A run as an async iterator of its events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Self

from stroma._utils.logs import get_logger
from stroma.hooks.sets import NodeHooks
from stroma.runner.events import EventHooks, EventHub, StreamEvent, describe_result
from stroma.trace.result import ExecutionResult

logger = get_logger()

#: Tasks of runs whose reader has left: a task that nothing references may be garbage collected.
_ending: set[asyncio.Task[ExecutionResult]] = set()


class RunStream:
    """The events of one run, in order, for one reader. Use it with ``async with``.

    The last event is "run_end", with the result. No event is lost: if ``buffer`` events are pending for the
    reader, the run waits before its next step. Reading may be cancelled (by a timeout around ``anext``, for
    example) and continue afterwards; reading a stream twice at the same time raises RuntimeError.

    A reader leaves before the end by the end of ``async with``, by ``aclose()``, or when the stream is
    garbage collected. Then the run is CANCELLED, committed and resumable.
    """

    def __init__(
        self, begin: Callable[[NodeHooks], Coroutine[Any, Any, ExecutionResult]], buffer: int
    ) -> None:
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer must be a whole number of at least 1, got {buffer!r}")
        self._run = _WatchedRun(begin, EventHub(buffer))
        self._reading = False
        self._closed = False

    # ------------------------------------------------------------------ reading

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._reading:
            raise RuntimeError("this stream is already being read; read it once, and send the events to all")
        if self._closed:
            raise StopAsyncIteration
        self._run.start()
        self._reading = True
        try:
            event = await self._run.hub.get()
        finally:
            self._reading = False
        if event is None:
            self._closed = True
            self._run.leave()
            self._run.raise_if_failed()
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Self:
        self._run.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------------ the end

    @property
    def result(self) -> ExecutionResult:
        """The return value of ``run()``. Raises RuntimeError before the end, and what ``run()`` raised."""
        self._run.raise_if_failed()
        if self._run.result is None:
            raise RuntimeError("the stream has no result before its end; read it to its end")
        return self._run.result

    async def aclose(self) -> None:
        """Leave the run; its end is committed when this returns. Raises nothing of the run."""
        self._closed = True
        task = self._run.leave()
        if task is not None:
            # Not `await task`: a cancellation of the caller must not cancel the run a second time.
            await asyncio.wait([task])

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._run.abandon()


class _WatchedRun:
    """The run behind a stream. It does not reference the stream, so that an unused one is collected."""

    def __init__(
        self, begin: Callable[[NodeHooks], Coroutine[Any, Any, ExecutionResult]], hub: EventHub
    ) -> None:
        self.hub = hub
        self.result: ExecutionResult | None = None
        self._begin = begin
        self._task: asyncio.Task[ExecutionResult] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        #: The last event, once the hooks of the end were called.
        self._end: tuple[str, dict[str, Any]] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._loop = loop
            self._task = asyncio.create_task(self._begin(EventHooks(hub=self.hub, on_end=self._note_end)))
            self._task.add_done_callback(self._close)
        elif self._loop is not loop:
            raise RuntimeError("the run of this stream belongs to another event loop; read it there")

    def _note_end(self, result: ExecutionResult) -> None:
        self._end = result.run_id, describe_result(result)

    def _close(self, task: asyncio.Task[ExecutionResult]) -> None:
        """Publish the end of the run. An exception of the run is raised after it."""
        _ending.discard(task)
        if not task.cancelled():
            self._error = task.exception()
            if self._error is None:
                self.result = task.result()
        elif not self.hub.is_left:  # Not by a reader that left: readers must see an exception.
            self._error = asyncio.CancelledError("the run was cancelled")
        if self.hub.is_left and self._error is not None:
            logger.warning("the run of a stream without a reader raised: %r", self._error)
        if self.result is not None and self._end is None:
            # Cancelled while it was opened, without a call of a hook: nothing has redacted its input.
            self._note_end(replace(self.result, final_state=None))
        if self._end is not None:
            run_id, details = self._end
            self.hub.publish("run_end", run_id, result=self.result, details=details)
        self.hub.close()

    def raise_if_failed(self) -> None:
        if isinstance(self._error, asyncio.CancelledError):
            raise RuntimeError(
                "the run was cancelled from outside the stream; resume it to continue it"
            ) from None
        if self._error is not None:
            raise self._error

    def leave(self) -> asyncio.Task[ExecutionResult] | None:
        """End a run whose reader leaves. Return its task if it has not ended."""
        if self.hub.is_left:
            return None
        self.hub.leave()
        task = self._task
        if task is None or task.done():
            return None
        task.cancel()
        _ending.add(task)
        return task

    def abandon(self) -> None:
        """End the run of a stream that was garbage collected, in any thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self.leave)
        except RuntimeError:
            pass  # The loop was closed just now, and the run has ended with it.
