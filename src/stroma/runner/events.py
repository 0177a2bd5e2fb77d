"""Events of a run: the hub that numbers them for a reader, and the hooks that publish them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal, Self

from stroma.engine.execution import RunningNode, current_node
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.events import TraceEvent
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult

EventKind = Literal[
    "run_start",
    "node_start",
    "node_event",
    "node_success",
    "node_failure",
    "node_retry",
    "node_skipped",
    "node_cancelled",
    "node_suspended",
    "budget_warning",
    "map_progress",
    "events_dropped",
    "run_suspended",
    "run_end",
]
_ENDS: Final = frozenset({"node_success", "node_failure", "node_cancelled", "node_suspended"})
#: Emitted events that may be pending.
MAX_EMITTED: Final = 1000


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event of a run.

    Attributes:
        number: 1-based, in the order of the events.
        attempt: 1-based; None for an event that belongs to no attempt.
        attempt_id: id of the attempt, unique in the run over attempts, groups and takeovers; with the start
            and the end of an attempt, and what it emits.
        state: the run's input with "run_start", a node's input with "node_start", the output with
            "node_success" and "node_skipped".
        name: name of the emitted event, with "node_event".
        data: JSON data, with "node_event".
        event: the attempt's event in the trace, at its end; without the events inside a group, which came
            before.
        progress: with "map_progress".
        details: further data of this kind of event, as JSON data.
        result: the return value of ``run()``, with "run_end".
        cursor: place of the event among the stored ones of its run, for ``follow(after=)``; None of an event
            of ``stream()``.
    """

    number: int
    kind: EventKind
    run_id: str
    node_id: str | None = None
    position: int | None = None
    branch: str = ""
    attempt: int | None = None
    attempt_id: str | None = None
    state: dict[str, Any] | None = None
    name: str | None = None
    data: Any = None
    event: TraceEvent | None = None
    progress: MapProgress | None = None
    details: dict[str, Any] = field(default_factory=dict)
    result: ExecutionResult | None = None
    cursor: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON data, without ``event``, ``result`` and what is None or empty details."""
        data = {name: getattr(self, name) for name in _JSON_FIELDS}
        return {
            name: jsonable(value)
            for name, value in data.items()
            if value is not None and (value or name != "details")
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the event of a :meth:`to_dict`, without ``event`` and ``result``. Ignores unknown keys."""
        known = {name: data[name] for name in _JSON_FIELDS if name in data}
        if "progress" in known:
            known["progress"] = MapProgress(**known["progress"])
        return cls(**known)

    def to_sse(self) -> str:
        """Return a message of a ``text/event-stream``: its id is the cursor, or the number without one."""
        data = json.dumps(self.to_dict(), allow_nan=False)
        return f"id: {self.cursor or self.number}\nevent: {self.kind}\ndata: {data}\n\n"


_JSON_FIELDS: Final = tuple(one.name for one in fields(StreamEvent) if one.name not in ("event", "result"))


class EventHub:
    """Numbers the events of one run, and holds those that its reader has not taken yet.

    :meth:`emit` is safe to call in any thread; everything else belongs to the thread of the run's event loop.
    Events that an attempt emits lie between its start and its end: :meth:`emit` drops others, such as those
    of a thread that outlived its attempt. Of emitted events the newest 1,000 are pending; one
    "events_dropped" stands in the place of the others. ``buffer``: see :meth:`wait_for_room`.
    """

    def __init__(self, buffer: int | None = None) -> None:
        self.is_closed = False
        self.is_left = False  # The reader has left: events are only numbered.
        # Reentrant: a finalizer that emits may run while it is held.
        self.lock = threading.RLock()
        self._buffer = buffer
        self._number = 0
        #: Ids of the attempts that have started and not ended.
        self._attempts: set[str] = set()
        self._room: asyncio.Future[None] | None = None
        # Two queues in the order of their numbers, so that a full one drops its oldest event at once.
        self._events: deque[StreamEvent] = deque()
        self._emitted: deque[StreamEvent] = deque()
        #: The first event that was dropped since the last one was reported, and their number.
        self._first_dropped: StreamEvent | None = None
        self._dropped = 0
        self._waiter: tuple[asyncio.Future[None], int] | None = None

    # ------------------------------------------------------------------ for the run

    def publish(self, kind: EventKind, run_id: str, node_id: str | None = None, **fields: Any) -> None:
        """Add an event that must not be lost. It awaits nothing that could be cancelled."""
        with self.lock:
            if kind == "node_start":
                self._attempts.add(fields["attempt_id"])
            elif kind in _ENDS:
                self._attempts.discard(fields.get("attempt_id", ""))
            self._number += 1
            event = StreamEvent(self._number, kind, run_id, node_id, **fields)
            if not self.is_left:
                self._events.append(event)
                self._wake_reader()

    def emit(self, node: RunningNode, attempt_id: str, name: str, data: Any) -> None:
        """Add an event of an attempt, and drop the oldest one if there are too many. Never waits."""
        with self.lock:
            if attempt_id not in self._attempts:
                return
            self._number = number = self._number + 1
            event = StreamEvent(
                number,
                "node_event",
                node.run_id,
                node.node_id,
                position=node.position,
                branch=node.branch,
                attempt=node.attempt,
                attempt_id=attempt_id,
                name=name,
                data=data,
            )
            if self.is_left:
                return
            if len(self._emitted) == MAX_EMITTED:
                dropped = self._emitted.popleft()
                self._first_dropped = self._first_dropped or dropped
                self._dropped += 1
            self._emitted.append(event)
            if self._waiter is not None:
                self._wake_reader()

    def flush(self) -> None:
        """Do nothing: the reader takes what is pending."""

    def close(self) -> None:
        """End the iteration of the reader after the pending events."""
        with self.lock:
            self.is_closed = True
            self._wake_reader()

    async def wait_for_room(self) -> None:
        """Wait while more than ``buffer`` events are pending, without those that nodes emitted."""
        while self._buffer is not None and len(self._events) > self._buffer:
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            # Shielded: several nodes wait for one future, and a cancelled one must not cancel it.
            await asyncio.shield(self._room)

    def _wake_reader(self) -> None:
        """End the wait of :meth:`get`. The caller holds the lock."""
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        future, thread = waiter
        if thread == threading.get_ident():
            _resolve(future)
        else:
            with suppress(RuntimeError):  # The loop was closed, and its reader with it.
                future.get_loop().call_soon_threadsafe(_resolve, future)

    # ------------------------------------------------------------------ for the reader

    @property
    def pending(self) -> int:
        """Number of pending events."""
        return len(self._events) + len(self._emitted)

    def take(self) -> StreamEvent | None:
        """Return the next pending event; None if there is none."""
        with self.lock:
            event = self._next()
        self._make_room()
        return event

    async def get(self) -> StreamEvent | None:
        """Return the next event, once there is one; None after the last. A cancellation loses no event."""
        while True:
            with self.lock:
                event = self._next()
                if event is not None or self.is_closed:
                    break
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiter = future, threading.get_ident()
            await future
        self._make_room()
        return event

    def leave(self) -> None:
        """Forget the pending events and those to come: nobody reads them. Safe to call twice."""
        with self.lock:
            self.is_left = True
            self._events.clear()
            self._emitted.clear()
            self._first_dropped, self._dropped = None, 0
        self._make_room()

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _next(self) -> StreamEvent | None:
        events, emitted, dropped = self._events, self._emitted, self._first_dropped
        if dropped is not None and not (events and events[0].number < dropped.number):
            count, self._first_dropped, self._dropped = self._dropped, None, 0
            return StreamEvent(dropped.number, "events_dropped", dropped.run_id, details={"dropped": count})
        if emitted and not (events and events[0].number < emitted[0].number):
            return emitted.popleft()
        return events.popleft() if events else None


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def describe_result(result: ExecutionResult) -> dict[str, Any]:
    """Return the details of a "run_end": a result as JSON data."""
    details = {
        "status": str(result.status),
        "final_state": None if result.final_state is None else jsonable(result.final_state),
        "total_tokens": result.total_tokens,
        "total_cost_usd": result.total_cost_usd,
        "failed_items": result.failed_items,
        "suspended": list(result.suspended),
        "questions": [jsonable(asdict(question)) for question in result.questions],
    }
    failure = result.failure
    if failure is not None:
        details["failure"] = describe_failure(failure.failure_class, failure.message, failure.reason)
    return details


def describe_failure(failure_class: str | None, message: str | None, reason: str | None) -> dict[str, Any]:
    """Return a failure as JSON data."""
    return {"class": str(failure_class), "message": message, "reason": reason}


@dataclass
class EventHooks(NodeHooks):
    """Hooks that publish the events of one run in a hub, and have what its nodes emit put there.

    They publish no "run_end": ``on_end`` is called with the result as readers may see it. ``with_trace``:
    ends of attempts have their event in the trace.
    """

    hub: EventHub = field(kw_only=True)
    on_end: Callable[[ExecutionResult], None] | None = field(default=None, kw_only=True)
    with_trace: bool = field(default=True, kw_only=True)

    _has_time_limit = False

    def is_empty(self) -> bool:
        return False

    def _event_receiver(self) -> EventHub:
        return self.hub

    def _hook_of(self, event: str) -> Any:
        return getattr(self, event.removeprefix("on"), None)

    async def _publish(self, kind: EventKind, run_id: str, node_id: str, **fields: Any) -> None:
        """Publish an event of the current node, and wait until the reader has room."""
        self.hub.publish(kind, run_id, node_id, **{**_place(), **fields})
        await self.hub.wait_for_room()

    def _end(self) -> dict[str, Any]:
        """Return what an event says about the end of an attempt; nothing where no attempt has ended."""
        node = current_node()._own
        row, redactor = node.ended, node.ctx.redactor
        if row is None:  # A question of a flow.
            return {}
        usage = node.usage
        details: dict[str, Any] = {"tokens": usage.tokens, "cost_usd": usage.cost_usd}
        details["duration_ms"] = node.duration_ms
        if row.failure is not None and row.outcome == "failure":
            failure_class, message, reason = row.failure[:3]
            details["failure"] = describe_failure(failure_class, message, reason)
        end: dict[str, Any] = {"details": details}
        end["attempt_id"] = None if node.redelivered else node.identify_attempt()
        if self.with_trace:
            event = node.ctx.trace.event_of(row)
            output = event.output_state
            end["event"] = replace(
                event,
                input_state=redactor.redact_state(event.input_state),
                output_state=None if output is None else redactor.redact_state(output),
            )
        return end

    async def _run_end(self, run_id: str, result: ExecutionResult) -> None:
        if self.on_end is not None:
            self.on_end(result)

    async def _run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self.hub.publish("run_start", run_id, state=state, details={"pipeline": pipeline})
        await self.hub.wait_for_room()

    async def _node_start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        attempt_id = current_node()._own.identify_attempt()
        await self._publish("node_start", run_id, node_id, state=state, attempt_id=attempt_id)

    async def _node_success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        await self._publish("node_success", run_id, node_id, state=state, **self._end())

    async def _node_failure(self, run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
        await self._publish("node_failure", run_id, node_id, **self._end())

    async def _node_retry(
        self, run_id: str, node_id: str, attempt: int, delay: float, kind: FailureClass
    ) -> None:
        details = {"delay_seconds": delay, "failure_class": kind}
        await self._publish("node_retry", run_id, node_id, attempt=attempt, details=details)

    async def _node_skipped(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await self._publish("node_skipped", run_id, node_id, state=state)

    async def _node_cancelled(self, run_id: str, node_id: str) -> None:
        await self._publish("node_cancelled", run_id, node_id, **self._end())

    async def _node_suspended(self, run_id: str, node_id: str, reason: str) -> None:
        end, question = self._end(), current_node().question
        details = {"reason": reason, "question": None if question is None else asdict(question)}
        end["details"] = {**end.get("details", {}), **details}
        await self._publish("node_suspended", run_id, node_id, **end)

    async def _budget_warning(self, run_id: str, dimension: str, used: float, limit: float) -> None:
        details = {"dimension": dimension, "used": used, "limit": limit}
        self.hub.publish("budget_warning", run_id, details=details)

    async def _map_progress(self, run_id: str, node_id: str, progress: MapProgress) -> None:
        place = {**_place(), "attempt": None}
        self.hub.publish("map_progress", run_id, node_id, progress=progress, **place)


def _place() -> dict[str, Any]:
    node = current_node()
    return {"position": node.position, "branch": node.branch, "attempt": node.attempt or None}
