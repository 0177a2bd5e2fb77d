"""A run as an async iterator of what happens in it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from stroma.engine.execution import NodeExecution, current_node
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.events import TraceEvent
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult

__all__ = ["RunStream", "StreamEvent"]

logger = logging.getLogger("stroma")

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
#: Runs whose readers have left them to themselves: a task that nobody holds may be collected.
_detached: set[asyncio.Task[ExecutionResult]] = set()


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Something that happened in a run.

    Attributes:
        number: 1-based, in the order in which things happened.
        attempt: 1-based; None for what is no attempt.
        state: the run's input with "run_start", a node's input with "node_start", the output with "node_skipped".
        event: the attempt's event in the trace, with its end; without the events inside of a group, which came before.
        progress: with "map_progress".
        details: what else there is to say, as JSON data.
        result: what ``run()`` would have returned, with "run_end".
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
        """Plain JSON data, without what is None. ``result`` is told in ``details``."""
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
        """One message of a ``text/event-stream``; its event is the kind, its id the number."""
        return (
            f"id: {self.number}\nevent: {self.kind}\ndata: {json.dumps(self.to_dict(), allow_nan=False)}\n\n"
        )


class RunStream:
    """The events of one run, in order, for one reader. ``async with`` it: leaving that ends what is to be ended.

    The last event is "run_end", with the result. Nothing is lost: if ``buffer`` events wait for the reader, the run waits
    too, before its next step; only of the progress of a map the newest is kept. Reading may be cancelled (a timeout around
    ``anext``, say) and go on afterwards. Another reader gets a stream of its own from :meth:`tee`; two that read one
    stream at the same time are a RuntimeError.

    A reader that leaves before the end (the end of ``async with``, ``aclose()``, or nobody holding the stream any more)
    leaves the run to ``on_leave``: "cancel" ends it as CANCELLED, committed and resumable; "detach" lets it go on.
    """

    def __init__(
        self,
        begin: Callable[[NodeHooks], Coroutine[Any, Any, ExecutionResult]],
        on_leave: OnLeave,
        buffer: int,
    ) -> None:
        if on_leave not in ("cancel", "detach"):
            raise ValueError(f'on_leave is {on_leave!r}; give "cancel" or "detach"')
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer is {buffer!r}; give a whole number of events from 1 up")
        self._run = _Watched(begin, on_leave, buffer)
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
                "somebody else is reading this stream; give each reader one of its own: stream.tee()"
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
        """Another reader of the same run: of all events if the run has not begun, else of those from now on.

        The run waits for the slower one, and is left when the last of them leaves.
        """
        twin = RunStream.__new__(RunStream)
        twin._run, twin._queue = self._run, _Queue()
        twin._reading = twin._closed = False
        self._run.queues.append(twin._queue)
        return twin

    # ------------------------------------------------------------------ the end

    @property
    def result(self) -> ExecutionResult:
        """What ``run()`` would have returned. Raises RuntimeError before the end, and what ``run()`` raised."""
        self._run.raise_if_failed()
        if self._run.result is None:
            raise RuntimeError("the run has not ended; read the stream to its end first")
        return self._run.result

    async def aclose(self) -> None:
        """Leave. With "cancel", the run's end is committed when this returns; it never raises what the run raised."""
        self._closed = True
        task = self._run.leave(self._queue)
        if task is not None and self._run.on_leave == "cancel":
            # Not awaited itself: a cancellation of ours must not end the run half-way a second time.
            await asyncio.wait([task])

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._run.abandoned(self._queue)


class _Queue:
    """What waits for one reader."""

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

    async def get(self, run: _Watched) -> StreamEvent | None:
        """The next event; None after the last."""
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


class _Watched:
    """The run behind the streams. It holds no stream, so that one that nobody holds is seen to be gone."""

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
        self._last: dict[str, Any] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._loop = loop
            self._task = asyncio.create_task(self._begin(_hooks(self)))
            self._task.add_done_callback(self._end)
        elif self._loop is not loop:
            raise RuntimeError("the run of this stream belongs to another event loop; read it there")

    def tell(self, kind: EventKind, run_id: str, node_id: str | None = None, **about: Any) -> None:
        """Put an event into every queue. Nothing is awaited: whatever happens to the teller, it is there."""
        self._number += 1
        self._run_id = run_id
        event = StreamEvent(self._number, kind, run_id, node_id, **about)
        for queue in self.queues:
            queue.put(event)

    async def wait(self) -> None:
        """Wait while a reader has too much before it."""
        while any(len(queue.events) > self._buffer for queue in self.queues):
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            # Nodes side by side wait for the same; one that is cancelled ends nobody else's waiting.
            await asyncio.shield(self._room)

    def make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def ending(self, result: ExecutionResult) -> None:
        """Note how the run ends, as somebody outside may see it."""
        failure = result.failure
        self._last = {
            "status": str(result.status),
            "final_state": None if result.final_state is None else jsonable(result.final_state),
            "total_tokens": result.total_tokens,
            "total_cost_usd": result.total_cost_usd,
            "failed_items": result.failed_items,
            "suspended": list(result.suspended),
        }
        if failure is not None:
            self._last["failure"] = {"class": str(failure.failure_class), "message": failure.message}

    def _end(self, task: asyncio.Task[ExecutionResult]) -> None:
        _detached.discard(task)
        self.ended = True
        if not task.cancelled():
            self._error = task.exception()
            if self._error is None:
                self.result = task.result()
        elif self.queues:  # Not by us: a reader must not take it for a good end.
            self._error = asyncio.CancelledError("the run was cancelled")
        if not self.queues and self._error is not None:
            logger.warning("the run of a stream that nobody reads any more raised: %r", self._error)
        if self.result is not None and self._last is None:
            self.ending(self.result)  # No hook was told: it was ended while it was opened.
        if self._last is not None:
            self.tell(
                "run_end", self._run_id or self._run_id_of_result(), result=self.result, details=self._last
            )
        for queue in self.queues:
            queue.wake()

    def _run_id_of_result(self) -> str:
        return "" if self.result is None else self.result.run_id

    def raise_if_failed(self) -> None:
        if isinstance(self._error, asyncio.CancelledError):
            raise RuntimeError(
                "the run was cancelled by somebody else; what it committed is kept: resume it"
            ) from None
        if self._error is not None:
            raise self._error

    def leave(self, queue: _Queue) -> asyncio.Task[ExecutionResult] | None:
        """One reader less. The last one leaves the run; returns what is still going on then."""
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

    def abandoned(self, queue: _Queue) -> None:
        """A stream was thrown away, in whatever thread that is noticed."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self.leave, queue)
        except RuntimeError:
            pass  # It was closed just now: the run has ended with it.


class _Watch(NodeHooks):
    _has_time_limit = False


def _hooks(run: _Watched) -> NodeHooks:
    """Hooks that tell a stream everything."""

    def where(node: NodeExecution | None) -> dict[str, Any]:
        if node is None:
            return {}
        return {"position": node.position, "branch": node.branch, "attempt": node.attempt or None}

    def ended(node_id: str) -> dict[str, Any]:
        node = current_node()
        about = where(node)
        if node is not None and node.ended is not None:
            event, shown = node.ctx.trace.event_of(node.ended), node.ctx.redactor.redact_state
            output = event.output_state
            about["event"] = replace(
                event,
                input_state=shown(event.input_state),
                output_state=None if output is None else shown(output),
            )
        return about

    async def run_start(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        run.tell("run_start", run_id, state=state, details={"pipeline": pipeline})
        await run.wait()

    async def run_end(run_id: str, result: ExecutionResult) -> None:
        run.ending(result)

    async def start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        run.tell("node_start", run_id, node_id, state=state, **where(current_node()))
        await run.wait()

    async def success(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        run.tell("node_success", run_id, node_id, **ended(node_id))
        await run.wait()

    async def failure(run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
        run.tell("node_failure", run_id, node_id, **ended(node_id))
        await run.wait()

    async def retry(run_id: str, node_id: str, attempt: int, delay: float, kind: FailureClass) -> None:
        about = {**where(current_node()), "attempt": attempt}
        run.tell(
            "node_retry", run_id, node_id, details={"delay_seconds": delay, "failure_class": kind}, **about
        )
        await run.wait()

    async def skipped(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        run.tell("node_skipped", run_id, node_id, state=state, **where(current_node()))
        await run.wait()

    async def cancelled(run_id: str, node_id: str) -> None:
        run.tell("node_cancelled", run_id, node_id, **ended(node_id))

    async def suspended(run_id: str, node_id: str, reason: str) -> None:
        run.tell("node_suspended", run_id, node_id, details={"reason": reason}, **ended(node_id))
        await run.wait()

    async def budget(run_id: str, dimension: str, used: float, limit: float) -> None:
        details = {"dimension": dimension, "used": used, "limit": limit}
        run.tell("budget_warning", run_id, details=details)

    async def progress(run_id: str, node_id: str, progress: MapProgress) -> None:
        run.tell(
            "map_progress", run_id, node_id, progress=progress, **{**where(current_node()), "attempt": None}
        )

    return _Watch(
        on_run_start=run_start,
        on_run_end=run_end,
        on_node_start=start,
        on_node_success=success,
        on_node_failure=failure,
        on_node_retry=retry,
        on_node_skipped=skipped,
        on_node_cancelled=cancelled,
        on_node_suspended=suspended,
        on_budget_warning=budget,
        on_map_progress=progress,
    )
