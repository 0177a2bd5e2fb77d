"""The history of a run in memory: one event per attempt, and the result that carries it.

The engine appends flat rows (see :class:`AttemptRow`); a :class:`TraceEvent` is built when it is read.
States in a row are snapshots, so later changes to the objects of nodes or hooks do not change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from stroma._utils.text import typed
from stroma.contracts.copying import Snapshot, isolate
from stroma.contracts.schema import Schema
from stroma.trace.redaction import (
    Redact,
    Shown,
    forms_to_hide,
    hide_rejected,
    hide_state,
    hide_words,
    removed_values,
)

if TYPE_CHECKING:
    from stroma.trace.rejected import RecentOutputs, RejectedOutput
    from stroma.trace.story import Bar, Story
from stroma.trace.events import (
    NO_USAGE,
    QUESTIONS,
    RECEIVES,
    SLEEPS,
    AttemptRow,
    BoundedRows,
    Figures,
    LeftOut,
    TraceEvent,
    TraceMark,
    figures_of,
    left_out_of,
    place_text,
)
from stroma.trace.plain import jsonable


class ExecutionTrace(Shown):
    """The events of one run in the order in which attempts ended, in a flow of their start.

    ``len`` and iteration see the top level.
    ``marks``: events beside attempts: waits, refusals, changes of circuits.
    """

    __slots__ = ("_rejected", "marks", "rows", "run_id")

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id
        #: The rows as the engine keeps them, and events in place of those that somebody has looked at.
        self.rows: list[AttemptRow | TraceEvent] = []
        self.marks: list[TraceMark] = []
        #: Outputs that broke their contract. Nobody reads them but what draws the trace; copies, which hooks
        #: get, have none.
        self._rejected: RecentOutputs | None = None

    def __getstate__(self) -> tuple[str, list[TraceEvent], list[TraceMark]]:
        # Events are plain data; rows need schemas, and those cannot leave the process.
        return self.run_id, self._events, self.marks

    def __setstate__(self, state: tuple[str, list[TraceEvent], list[TraceMark]]) -> None:
        self.run_id, events, self.marks = state
        self.rows = list(events)
        self._rejected = None

    def append(self, event: TraceEvent) -> None:
        """Add an event; the very object is kept."""
        self.rows.append(event)

    def sort(self, first: int) -> None:
        """Put the attempts from index ``first`` on in the order of their start."""
        self.rows[first:] = sorted(self.rows[first:], key=_started_ns)

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        """Record an output that broke its contract, to draw it."""
        from stroma.trace.rejected import RecentOutputs

        if self._rejected is None:
            self._rejected = RecentOutputs()
        self._rejected.add(position, branch, started_ns, data)

    def copy(self, *, with_states: bool = True) -> ExecutionTrace:
        """Return a trace with the same events; appending to one does not change the other."""
        twin = ExecutionTrace(self.run_id)
        twin.rows, twin.marks = _copy_rows(self.rows, with_states), list(self.marks)
        return twin

    def figures(self) -> Iterator[Figures]:
        """Return the figures of every recorded attempt, groups included; sums of those that were omitted."""
        return figures_of(self.rows)

    def _event(self, row: AttemptRow) -> TraceEvent:
        schemas = row.schemas
        seconds, ns = divmod(row.started_ns, 1_000_000_000)
        failure, message, reason, error_type = row.failure or (None, None, None, None)
        return TraceEvent(
            node_id=row.node_id,
            run_id=self.run_id,
            attempt=row.attempt,
            timestamp_utc=datetime.fromtimestamp(seconds, UTC).replace(microsecond=ns // 1000),
            input_state=thaw(schemas and schemas[0], row.input) or {},
            output_state=thaw(schemas and schemas[1], row.output),
            duration_ms=row.duration_ns // 1_000_000,
            failure=failure,
            failure_message=message,
            outcome=row.outcome,
            reason=reason,
            children=self._build(row.children or []),
            usage=row.usage or NO_USAGE,
            position=row.position,
            branch=row.branch,
            left_out=left_out_of(row),
            function_ms=row.function_ns // 1_000_000,
            error_type=error_type,
        )

    def _build(self, rows: list[AttemptRow | TraceEvent]) -> list[TraceEvent]:
        # An event once built takes its row's place, so that everybody is given the same object.
        for i, row in enumerate(rows):
            if not isinstance(row, TraceEvent):
                rows[i] = self._event(row)
        return cast("list[TraceEvent]", rows)

    def event_of(self, row: AttemptRow) -> TraceEvent:
        """Return the event of one row, without those inside it."""
        return self._event(row._replace(children=None))

    @property
    def _events(self) -> list[TraceEvent]:
        return self._build(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TraceEvent]:
        return iter(self._events)

    def replay(self) -> Iterator[TraceEvent]:
        """Return the top-level events in recorded order."""
        return iter(self._events)

    def walk(self) -> Iterator[TraceEvent]:
        """Yield every event, groups included; a group before its children."""
        stack = list(reversed(self._events))
        while stack:
            event = stack.pop()
            yield event
            stack.extend(reversed(event.children))

    def left_out(self) -> list[LeftOut]:
        """Return the sums of the rows that maps have omitted."""
        stack, sums = list(self.rows), list[LeftOut]()
        while stack:
            row = stack.pop()
            left_out = left_out_of(row)
            sums += [] if left_out is None else [left_out]
            stack.extend(row.children or ())
        return sums

    def events_for(self, node_id: str) -> list[TraceEvent]:
        """Return the top-level events of one node."""
        return [event for event in self._events if event.node_id == node_id]

    def failures(self) -> list[TraceEvent]:
        """Return the top-level events that carry a failure class."""
        return [event for event in self._events if event.failure is not None]

    def to_json(self) -> str:
        """Strict JSON (NaN and infinities as strings): a list of events with everything that they hold."""
        return json.dumps([jsonable(event) for event in self._events], allow_nan=False)

    def _story(self, redact: Redact | None = None) -> Story:
        """Return the trace as plain data. Times in rows have nanosecond resolution."""
        from stroma.trace.story import Story

        marks: list[tuple[int, int, TraceEvent]] = []
        stack: list[AttemptRow | TraceEvent] = list(self.rows)
        while stack:
            row = stack.pop()
            if isinstance(row, TraceEvent):
                marks.append((_started_ns(row), row.duration_ms * 1_000_000, row))
                stack.extend(row.children)
            else:
                alone = self._event(row._replace(children=None))
                marks.append((row.started_ns, row.duration_ns, alone))
                stack.extend(row.children or ())
        marks.sort(key=lambda one: one[0])
        first = marks[0][0] if marks else 0
        hidden = self._hidden(redact)
        bars = [
            _bar(
                event,
                (began - first) / 1e6,
                took / 1e6,
                redact,
                hidden,
                self._rejected_at(event, began, redact),
            )
            for began, took, event in marks
        ]
        failed = [bar for bar in bars if bar.failure_class is not None]
        end = max((began + took for began, took, _ in marks), default=first)
        figures = list(self.figures())
        tokens, cost = sum(one[1] for one in figures), math.fsum(one[3] for one in figures)
        status = "FAILED" if failed and failed[-1] is bars[-1] else "trace"
        seconds = (end - first) / 1e9
        omitted = self.left_out()
        return Story(
            self.run_id,
            "",
            status,
            bars,
            tokens,
            cost,
            first // 1_000_000,
            seconds,
            left_out=sum(one.events for one in omitted),
            lost=(sum(one.lost_tokens for one in omitted), math.fsum(one.lost_cost_usd for one in omitted)),
            waits=self._wait_bars(first),
        )

    def _rejected_at(
        self, event: TraceEvent, started_ns: int, redact: Redact | None
    ) -> RejectedOutput | None:
        """Return the output that broke its contract in an attempt, or None."""
        if self._rejected is None or event.output_state is not None:
            return None
        rejected = self._rejected.find(event.position, event.branch, started_ns)
        return None if rejected is None else hide_rejected(redact, rejected)

    def _wait_bars(self, first_ns: int) -> tuple[Bar, ...]:
        from stroma.trace.story import Bar

        bars: list[Bar] = []
        for mark in self.marks:
            if mark.kind in (*SLEEPS, *QUESTIONS, *RECEIVES):
                began_ms = mark.at_utc.timestamp() * 1000 - mark.waited_ms - first_ns / 1e6
                label = f"question: {mark.reason}" if mark.kind in QUESTIONS else mark.reason
                at = place_text(mark.position, mark.branch)
                bars.append(Bar(label, at, 1, max(0.0, began_ms), mark.waited_ms, mark.kind))
        return tuple(bars)

    def _hidden(self, redact: Redact | None) -> frozenset[str]:
        return frozenset() if redact is None else forms_to_hide(removed_values(redact, states_of(self.rows)))

    def diff(self, other: ExecutionTrace) -> list[str]:
        """Return the differences of two traces: order, repeats, attempts, states and failures."""
        mine, theirs = _occurrences(self._events), _occurrences(other._events)
        lines = [f"Missing event in other trace: {_name(key)}" for key in mine if key not in theirs]
        lines += [f"Extra event in other trace: {_name(key)}" for key in theirs if key not in mine]
        for key, event in mine.items():
            if key in theirs and (what := _differences(event, theirs[key])):
                lines.append(f"Difference for {_name(key)}: {'; '.join(what)}")
        order = [key for key in mine if key in theirs]
        other_order = [key for key in theirs if key in mine]
        if order != other_order:
            here, there = next((a, b) for a, b in zip(order, other_order, strict=True) if a != b)
            lines.append(f"Difference for order: {_name(here)} here, {_name(there)} in other trace")
        return lines


def states_of(rows: Iterable[AttemptRow | TraceEvent]) -> Iterator[dict[str, Any]]:
    """Yield the inputs and outputs of attempts, and of those inside them."""
    stack = list(rows)
    while stack:
        row = stack.pop()
        if isinstance(row, TraceEvent):
            states = (row.input_state, row.output_state)
        else:
            schemas = row.schemas
            states = (thaw(schemas and schemas[0], row.input) or {}, thaw(schemas and schemas[1], row.output))
        yield from (state for state in states if state is not None)
        stack.extend(row.children or ())


def _started_ns(row: AttemptRow | TraceEvent) -> int:
    if isinstance(row, TraceEvent):
        return int(row.timestamp_utc.timestamp() * 1_000_000) * 1000
    return row.started_ns


def _bar(
    event: TraceEvent,
    began_ms: float,
    took_ms: float,
    redact: Redact | None,
    hidden: frozenset[str],
    rejected: RejectedOutput | None,
) -> Bar:
    from stroma.trace.story import Bar

    def shown(state: dict[str, Any] | None) -> Any:
        return None if state is None else jsonable(hide_state(redact, state))

    at = place_text(event.position, event.branch)
    message = event.failure_message
    if message is not None:
        message = typed(event.error_type, hide_words(redact, message, hidden))
    used = event.usage
    waited = event.function_ms is not None and took_ms - event.function_ms >= 1
    return Bar(
        node_id=event.node_id,
        at=at,
        attempt=event.attempt,
        began_ms=began_ms,
        took_ms=took_ms,
        outcome=event.outcome,
        failure_class=None if event.failure is None else event.failure.value,
        reason=event.reason,
        message=message,
        tokens=used.tokens,
        output_tokens=used.output_tokens,
        cost_usd=used.cost_usd,
        model=used.model,
        is_committed=event.output_state is not None,
        input_state=shown(event.input_state),
        output_state=shown(event.output_state),
        function_ms=event.function_ms if waited else None,
        rejected=rejected,
    )


def _copy_rows(
    rows: list[AttemptRow | TraceEvent], with_states: bool = True
) -> list[AttemptRow | TraceEvent]:
    # A row is immutable but for the list of its children.
    copies: list[AttemptRow | TraceEvent] = []
    for row in rows:
        if isinstance(row, TraceEvent):
            copies.append(_copy_event(row, with_states))
        else:
            children = row.children
            copied = None if children is None else _copy_rows(children, with_states)
            if not with_states:
                row = row._replace(input={}, output=None if row.output is None else {}, children=copied)
            elif copied is not None:
                row = row._replace(children=copied)
            copies.append(row)
    return rows.like(copies) if isinstance(rows, BoundedRows) else copies


def _copy_event(event: TraceEvent, with_states: bool) -> TraceEvent:
    input_state, output_state = event.input_state, event.output_state
    return replace(
        event,
        input_state=isolate(input_state) if with_states else {},
        output_state=None if output_state is None else isolate(output_state) if with_states else {},
        children=[_copy_event(child, with_states) for child in event.children],
    )


def thaw(schema: Schema | None, snapshot: Snapshot | None) -> dict[str, Any] | None:
    """Return the state in a snapshot as a new dict."""
    if snapshot is None:
        return None
    if isinstance(snapshot, dict):
        copied: dict[str, Any] = isolate(snapshot)
        return copied
    assert schema is not None  # A row that has none holds plain dicts.
    return schema.thaw(snapshot)


_Key = tuple[str, int, int]


def _occurrences(events: list[TraceEvent]) -> dict[_Key, TraceEvent]:
    counts: dict[tuple[str, int], int] = {}
    out: dict[_Key, TraceEvent] = {}
    for event in events:
        n = counts[event.node_id, event.attempt] = counts.get((event.node_id, event.attempt), 0) + 1
        out[event.node_id, event.attempt, n] = event
    return out


def _name(key: _Key) -> str:
    node_id, attempt, n = key
    return f"{node_id} attempt {attempt}" + (f" (occurrence {n})" if n > 1 else "")


def _differences(a: TraceEvent, b: TraceEvent) -> list[str]:
    lines = [
        f"{what} {getattr(a, what)!r} != {getattr(b, what)!r}"
        for what in ("input_state", "output_state", "failure", "failure_message", "outcome")
        if _text(getattr(a, what)) != _text(getattr(b, what))
    ]
    left, right = (sorted(map(_child_text, e.children)) for e in (a, b))  # Children end in any order.
    return [*lines, f"children {left} != {right}"] if left != right else lines


def _text(value: Any) -> str:
    # As text, since 1, 1.0 and True are equal to Python and not to readers of the states.
    return json.dumps(jsonable(value), sort_keys=True)


def _child_text(event: TraceEvent) -> str:
    outcome = (event.failure, event.failure_message, event.outcome)
    parts = (event.branch, event.node_id, event.attempt, event.input_state, event.output_state, *outcome)
    return _text(parts) + str(sorted(map(_child_text, event.children)))
