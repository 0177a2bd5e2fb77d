"""A run as an async iterator of its events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from stroma._utils.logs import get_logger
from stroma.engine.execution import NodeExecution, current_node_or_none
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.events import TraceEvent
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult

__all__ = ["RunStream", "StreamEvent"]

logger = get_logger()

EventKind = Literal[
    "run_start",
    "node_start",
    "node_success",
    "node_failure",
    "node_retry",
    "node_skipped",
    "node_cancelled",
    "node_suspended",
    "budget_warning",
    "map_progress",
    "run_end",
]
OnLeave = Literal["cancel", "detach"]
#: Tasks of runs without a reader: a task that nothing references may be garbage collected.
_detached: set[asyncio.Task[ExecutionResult]] = set()


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event of a run.

    Attributes:
        number: 1-based, in the order of the events.
        attempt: 1-based; None for an event that belongs to no attempt.
        state: the run's input with "run_start", a node's input with "node_start", the output with "node_skipped".
        event: the attempt's event in the trace, at its end; without the events inside a group, which came before.
        progress: with "map_progress".
        details: further data of this kind of event, as JSON data.
        result: the return value of ``run()``, with "run_end".
    """

    number: int
    kind: EventKind
    run_id: str
    node_id: str | None = None
    position: int | None = None
    branch: str = ""
    attempt: int | None = None
    state: dict[str, Any] | None = None
    event: TraceEvent | None = None
    progress: MapProgress | None = None
    details: dict[str, Any] = field(default_factory=dict)
    result: ExecutionResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON data, without fields that are None. ``details`` describes the ``result``."""
        names = (
            "number",
            "kind",
            "run_id",
            "node_id",
            "position",
            "branch",
            "attempt",
            "state",
            "event",
            "progress",
        )
        data = {name: getattr(self, name) for name in names}
        shown = {name: jsonable(value) for name, value in data.items() if value is not None}
        return {**shown, **({"details": jsonable(self.details)} if self.details else {})}

    def to_sse(self) -> str:
        """Return a message of a ``text/event-stream``; its event is the kind, its id the number."""
        return (
            f"id: {self.number}\nevent: {self.kind}\ndata: {json.dumps(self.to_dict(), allow_nan=False)}\n\n"
        )


class RunStream:
    """The events of one run, in order, for one reader. Use it with ``async with``.

    The last event is "run_end", with the result. No event is lost: if ``buffer`` events are pending for the reader, the run
    waits before its next step; of the progress of a map only the newest event is pending. Reading may be cancelled (by a
    timeout around ``anext``, for example) and continue afterwards. :meth:`tee` returns a stream for another reader; reading
    one stream twice at the same time raises RuntimeError.

    A reader leaves before the end by the end of ``async with``, by ``aclose()``, or when the stream is garbage collected.
    Then ``on_leave`` applies: "cancel" ends the run as CANCELLED, committed and resumable; "detach" lets it continue.
    """

    def __init__(
        self,
        begin: Callable[[NodeHooks], Coroutine[Any, Any, ExecutionResult]],
        on_leave: OnLeave,
        buffer: int,
    ) -> None:
        if on_leave not in ("cancel", "detach"):
            raise ValueError(f'on_leave must be "cancel" or "detach", got {on_leave!r}')
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer must be a whole number of at least 1, got {buffer!r}")
        self._run = _WatchedRun(begin, on_leave, buffer)
        self._queue = _Queue()
        self._run.queues.append(self._queue)
        self._reading = False
        self._closed = False

    # ------------------------------------------------------------------ reading

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._reading:
            raise RuntimeError(
                "this stream is already being read; create one for each reader with stream.tee()"
            )
        if self._closed:
            raise StopAsyncIteration
        self._run.start()
        self._reading = True
        try:
            event = await self._queue.get(self._run)
        finally:
            self._reading = False
        if event is None:
            self._closed = True
            self._run.leave(self._queue)
            self._run.raise_if_failed()
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Self:
        self._run.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def tee(self) -> RunStream:
        """Return a stream of the same run for another reader: of all events before the run starts, else of later ones.

        The run waits for the slowest reader; ``on_leave`` applies when the last one leaves.
        """
        twin = RunStream.__new__(RunStream)
        twin._run, twin._queue = self._run, _Queue()
        twin._reading = twin._closed = False
        self._run.queues.append(twin._queue)
        return twin

    # ------------------------------------------------------------------ the end

    @property
    def result(self) -> ExecutionResult:
        """The return value of ``run()``. Raises RuntimeError before the end, and the exception that ``run()`` raised."""
        self._run.raise_if_failed()
        if self._run.result is None:
            raise RuntimeError("the run has not ended; read the stream to its end first")
        return self._run.result

    async def aclose(self) -> None:
        """Leave the run. With "cancel", its end is committed when this returns. Never raises an exception of the run."""
        self._closed = True
        task = self._run.leave(self._queue)
        if task is not None and self._run.on_leave == "cancel":
            # Not `await task`: a cancellation of the caller must not cancel the run a second time.
            await asyncio.wait([task])

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._run.abandon(self._queue)


class _Queue:
    """The pending events of one reader."""

    def __init__(self) -> None:
        self.events: deque[StreamEvent] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def put(self, event: StreamEvent) -> None:
        last = self.events[-1] if self.events else None
        if last is not None and last.kind == event.kind == "map_progress" and _place(last) == _place(event):
            self.events.pop()
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self, run: _WatchedRun) -> StreamEvent | None:
        """Return the next event; None after the last."""
        while not self.events:
            if run.ended:
                return None
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        event = self.events.popleft()
        run.make_room()
        return event


def _place(event: StreamEvent) -> tuple[int | None, str]:
    return event.position, event.branch


class _WatchedRun:
    """The run behind the streams. It references no stream, so that an unused stream is garbage collected."""

    def __init__(
        self,
        begin: Callable[[NodeHooks], Coroutine[Any, Any, ExecutionResult]],
        on_leave: OnLeave,
        buffer: int,
    ) -> None:
        self.on_leave = on_leave
        self.queues: list[_Queue] = []
        self.result: ExecutionResult | None = None
        self.ended = False
        self._begin = begin
        self._buffer = buffer
        self._task: asyncio.Task[ExecutionResult] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._room: asyncio.Future[None] | None = None
        self._number = 0
        self._run_id = ""
        self._end_details: dict[str, Any] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._loop = loop
            self._task = asyncio.create_task(self._begin(_EventHooks(self).hooks()))
            self._task.add_done_callback(self._end)
        elif self._loop is not loop:
            raise RuntimeError("the run of this stream belongs to another event loop; read it there")

    def publish(self, kind: EventKind, run_id: str, node_id: str | None = None, **fields: Any) -> None:
        """Put an event into every queue. Awaits nothing, so that a cancellation loses no event."""
        self._number += 1
        self._run_id = run_id
        event = StreamEvent(self._number, kind, run_id, node_id, **fields)
        for queue in self.queues:
            queue.put(event)

    async def wait_for_room(self) -> None:
        """Wait while a reader has more than ``buffer`` pending events."""
        while any(len(queue.events) > self._buffer for queue in self.queues):
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            # Shielded: several nodes wait for one future, and a cancelled one must not cancel it.
            await asyncio.shield(self._room)

    def make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def describe_end(self, result: ExecutionResult) -> None:
        """Store the details of the last event."""
        failure = result.failure
        self._end_details = {
            "status": str(result.status),
            "final_state": None if result.final_state is None else jsonable(result.final_state),
            "total_tokens": result.total_tokens,
            "total_cost_usd": result.total_cost_usd,
            "failed_items": result.failed_items,
            "suspended": list(result.suspended),
        }
        if failure is not None:
            self._end_details["failure"] = {"class": str(failure.failure_class), "message": failure.message}

    def _end(self, task: asyncio.Task[ExecutionResult]) -> None:
        _detached.discard(task)
        self.ended = True
        if not task.cancelled():
            self._error = task.exception()
            if self._error is None:
                self.result = task.result()
        elif self.queues:  # Not by a reader that left: readers must see an exception.
            self._error = asyncio.CancelledError("the run was cancelled")
        if not self.queues and self._error is not None:
            logger.warning("the run of a stream without a reader raised: %r", self._error)
        if self.result is not None and self._end_details is None:
            self.describe_end(self.result)  # Cancelled while it was opened, without a call of a hook.
        if self._end_details is not None:
            self.publish(
                "run_end",
                self._run_id or self._run_id_of_result(),
                result=self.result,
                details=self._end_details,
            )
        for queue in self.queues:
            queue.wake()

    def _run_id_of_result(self) -> str:
        return "" if self.result is None else self.result.run_id

    def raise_if_failed(self) -> None:
        if isinstance(self._error, asyncio.CancelledError):
            raise RuntimeError(
                "the run was cancelled from outside the stream; resume it to continue after its committed nodes"
            ) from None
        if self._error is not None:
            raise self._error

    def leave(self, queue: _Queue) -> asyncio.Task[ExecutionResult] | None:
        """Remove a reader. Without another one, apply ``on_leave`` and return the task of a run that has not ended."""
        if queue not in self.queues:
            return None
        self.queues.remove(queue)
        queue.events.clear()
        self.make_room()
        task = self._task
        if self.queues or task is None or task.done():
            return None
        if self.on_leave == "cancel":
            task.cancel()
        _detached.add(task)
        return task

    def abandon(self, queue: _Queue) -> None:
        """Remove the reader of a stream that was garbage collected, in any thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self.leave, queue)
        except RuntimeError:
            pass  # The loop was closed just now, and the run has ended with it.


class _StreamHooks(NodeHooks):
    _has_time_limit = False


class _EventHooks:
    """Hooks that publish the events of a run."""

    def __init__(self, run: _WatchedRun) -> None:
        self._run = run

    @staticmethod
    def _where(node: NodeExecution | None) -> dict[str, Any]:
        if node is None:
            return {}
        return {"position": node.position, "branch": node.branch, "attempt": node.attempt or None}

    def _ended(self) -> dict[str, Any]:
        node = current_node_or_none()
        fields = self._where(node)
        if node is not None and node.ended is not None:
            event, shown = node.ctx.trace.event_of(node.ended), node.ctx.redactor.redact_state
            output = event.output_state
            fields["event"] = replace(
                event,
                input_state=shown(event.input_state),
                output_state=None if output is None else shown(output),
            )
        return fields

    async def run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self._run.publish("run_start", run_id, state=state, details={"pipeline": pipeline})
        await self._run.wait_for_room()

    async def run_end(self, run_id: str, result: ExecutionResult) -> None:
        self._run.describe_end(result)

    async def start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        self._run.publish("node_start", run_id, node_id, state=state, **self._where(current_node_or_none()))
        await self._run.wait_for_room()

    async def success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        self._run.publish("node_success", run_id, node_id, **self._ended())
        await self._run.wait_for_room()

    async def failure(self, run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
        self._run.publish("node_failure", run_id, node_id, **self._ended())
        await self._run.wait_for_room()

    async def retry(self, run_id: str, node_id: str, attempt: int, delay: float, kind: FailureClass) -> None:
        fields = {**self._where(current_node_or_none()), "attempt": attempt}
        self._run.publish(
            "node_retry", run_id, node_id, details={"delay_seconds": delay, "failure_class": kind}, **fields
        )
        await self._run.wait_for_room()

    async def skipped(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        self._run.publish("node_skipped", run_id, node_id, state=state, **self._where(current_node_or_none()))
        await self._run.wait_for_room()

    async def cancelled(self, run_id: str, node_id: str) -> None:
        self._run.publish("node_cancelled", run_id, node_id, **self._ended())

    async def suspended(self, run_id: str, node_id: str, reason: str) -> None:
        node = current_node_or_none()
        question = None if node is None or node.question is None else asdict(node.question)
        details = {"reason": reason, "question": question}
        self._run.publish("node_suspended", run_id, node_id, details=details, **self._ended())
        await self._run.wait_for_room()

    async def budget(self, run_id: str, dimension: str, used: float, limit: float) -> None:
        details = {"dimension": dimension, "used": used, "limit": limit}
        self._run.publish("budget_warning", run_id, details=details)

    async def progress(self, run_id: str, node_id: str, progress: MapProgress) -> None:
        self._run.publish(
            "map_progress",
            run_id,
            node_id,
            progress=progress,
            **{**self._where(current_node_or_none()), "attempt": None},
        )

    def hooks(self) -> NodeHooks:
        """Return the set of these hooks."""
        return _StreamHooks(
            on_run_start=self.run_start,
            on_run_end=self.run_end,
            on_node_start=self.start,
            on_node_success=self.success,
            on_node_failure=self.failure,
            on_node_retry=self.retry,
            on_node_skipped=self.skipped,
            on_node_cancelled=self.cancelled,
            on_node_suspended=self.suspended,
            on_budget_warning=self.budget,
            on_map_progress=self.progress,
        )
