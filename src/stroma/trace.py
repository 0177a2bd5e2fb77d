"""The history of a run in memory: one event per attempt, and the result that carries it.

The engine appends flat rows (see :data:`Row`); a :class:`TraceEvent` is built when somebody looks. States in a row
are snapshots, so nothing that nodes or hooks do to their objects afterwards can rewrite history.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_jsonable_python

from stroma._showing import Redact, Shown, hidden_values, hide_state, hide_words
from stroma._words import typed
from stroma.failures import Failure, FailureClass, ItemFailure, kind_of
from stroma.schemas import Schema, Snapshot

if TYPE_CHECKING:
    from stroma.page import Bar, Story

__all__ = [
    "AttemptUsage",
    "ExecutionResult",
    "ExecutionTrace",
    "Failed",
    "HookFailure",
    "MarkKind",
    "Outcome",
    "RunStatus",
    "TraceEvent",
    "TraceMark",
]

Outcome = Literal["success", "failure", "cancelled", "suspended"]


class Failed(NamedTuple):
    """The failure of an attempt. ``error_type``: the name of the exception's type; None for a suspension."""

    failure_class: FailureClass
    message: str
    reason: str | None
    error_type: str | None = None


#: What reads a row's input, and its output; what else there is, is of no concern here.
Schemas = tuple[Schema, Schema, object]
#: One attempt, as atoms, in this order. What most attempts lack (a failure, usage, children) is None.
Row = tuple[
    str,  # node id
    int,  # attempt, 1-based
    int,  # start, ns since the epoch; of a group that of the first function inside it
    int,  # duration, ns; of a group until the last function inside it ended
    Snapshot,  # input
    Snapshot | None,  # output
    Outcome,
    Failed | None,
    "AttemptUsage | None",
    int,  # position
    str,  # branch
    str | None,  # the id of the group around it
    Schemas | None,  # what reads its snapshots; of plain dicts nothing need
    "list[Row | TraceEvent] | None",  # the events of a group's children
    int,  # ns for which its function ran; of a group any function inside it
]
NODE: Final = 0
ATTEMPT: Final = 1
STARTED: Final = 2
DURATION: Final = 3
INPUT: Final = 4
OUTPUT: Final = 5
OUTCOME: Final = 6
FAILURE: Final = 7
USAGE: Final = 8
POSITION: Final = 9
BRANCH: Final = 10
GROUP: Final = 11
SCHEMAS: Final = 12
CHILDREN: Final = 13
FUNCTION: Final = 14
#: What an item that failed for good is filed under, in place of its output, where the other items go on.
FAILED_ITEM: Final = "failed item"


@dataclass(frozen=True, slots=True)
class AttemptUsage:
    """What one attempt used: tokens, US dollars, and the model that the node reported.

    Attributes:
        cached_input_tokens: the part of the input that was read from the provider's cache.
        cache_write_tokens: the part of the input that was written to it. Stores keep neither of the two, but the price.
    """

    tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    model: str | None = None
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def input_tokens(self) -> int:
        return self.tokens - self.output_tokens


NO_USAGE: Final = AttemptUsage()

#: (node id, tokens, output tokens, USD, ns, model) of an attempt, or of several.
Figures = tuple[str, int, int, float, int, str | None]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The events inside a group that were too many to be kept: they are counted.

    Attributes:
        events: how many attempts, those inside groups too.
        failures: how many of them failed.
        lost_tokens, lost_cost_usd: of those that committed nothing.
        figures: the sums of all, for each node id and model.
    """

    events: int
    failures: int
    lost_tokens: int
    lost_cost_usd: float
    figures: tuple[Figures, ...]


class FewRows(list["Row | TraceEvent"]):
    """The rows of the items of a map that are too many to be kept: the first ones, and the first failures after those.

    The others are summed up.
    """

    __slots__ = ("_events", "_failures", "_lost_cost_usd", "_lost_tokens", "_most", "_sums")

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._events = self._failures = self._lost_tokens = 0
        self._lost_cost_usd = 0.0
        # By node id and model: tokens, output tokens, USD, ns.
        self._sums: dict[tuple[str, str | None], tuple[int, int, float, int]] = {}

    def append(self, row: Row | TraceEvent, /) -> None:
        failed = not isinstance(row, TraceEvent) and row[FAILURE] is not None
        if len(self) < (2 * self._most if failed else self._most):
            super().append(row)
            return
        stack = [row]
        while stack:
            one = stack.pop()
            assert not isinstance(one, TraceEvent)  # The engine's own: nobody has looked at them.
            used = one[USAGE] or NO_USAGE
            tokens, made, cost, ns = self._sums.get((one[NODE], used.model), (0, 0, 0.0, 0))
            self._sums[one[NODE], used.model] = (
                tokens + used.tokens, made + used.output_tokens, cost + used.cost_usd, ns + one[FUNCTION],
            )  # fmt: skip
            self._events += 1
            self._failures += one[FAILURE] is not None
            if one[OUTPUT] is None:
                self._lost_tokens += used.tokens
                self._lost_cost_usd += used.cost_usd
            stack.extend(one[CHILDREN] or ())

    @property
    def left_out(self) -> LeftOut | None:
        """What is not kept; None if all is."""
        if not self._events:
            return None
        figures = tuple((node, *sums, model) for (node, model), sums in self._sums.items())
        return LeftOut(self._events, self._failures, self._lost_tokens, self._lost_cost_usd, figures)

    def like(self, rows: list[Row | TraceEvent]) -> FewRows:
        """The same with other rows in it: copies of these."""
        twin = FewRows(self._most)
        twin.extend(rows)
        twin._events, twin._failures, twin._sums = self._events, self._failures, dict(self._sums)
        twin._lost_tokens, twin._lost_cost_usd = self._lost_tokens, self._lost_cost_usd
        return twin


def figures_of(rows: list[Row | TraceEvent]) -> Iterator[Figures]:
    """The figures of every attempt in these rows, in groups too; those of what was left out are sums."""
    stack: list[Row | TraceEvent] = list(reversed(rows))
    while stack:
        row = stack.pop()
        if isinstance(row, TraceEvent):
            took = row.duration_ms if row.function_ms is None else row.function_ms
            node_id, used, ns = row.node_id, row.usage, took * 1_000_000
            inside: list[Any] = list(row.children)
            left_out = row.left_out
        else:
            node_id, used, ns = row[NODE], row[USAGE] or NO_USAGE, row[FUNCTION]
            inside = row[CHILDREN] or []
            left_out = inside.left_out if isinstance(inside, FewRows) else None
        stack.extend(reversed(inside))
        yield node_id, used.tokens, used.output_tokens, used.cost_usd, ns, used.model
        if left_out is not None:
            yield from left_out.figures


@dataclass
class TraceEvent:
    """One attempt of a node.

    Attributes:
        attempt: 1-based.
        timestamp_utc: the attempt's start, aware.
        output_state: None on failure; kept for an attempt that took the run over its budget.
        duration_ms: wall time of the node's function alone; of a group from the first start of a function inside it to the
            last end of one.
        failure: its class, or None.
        outcome: "success", "failure", "cancelled" or "suspended".
        reason: a stable word for the failure, such as "rate_limit"; None if unknown.
        error_type: the name of the exception's type; None if nothing was raised.
        children: the events inside a group, in the order in which they ended.
        usage: what the attempt used.
        position: where in the run the node stands, 0-based.
        branch: "" at the top level; "0", "1", "0.1" for children of groups and items of a map.
        function_ms: for how long its function ran, waits between attempts apart; of a group any function inside it. None of
            an event that somebody else made.
        left_out: of a map whose items or outputs are not in the state, the events that are counted, not kept.
    """

    node_id: str
    run_id: str
    attempt: int
    timestamp_utc: datetime
    input_state: dict[str, Any]
    output_state: dict[str, Any] | None
    duration_ms: int
    failure: FailureClass | None = None
    failure_message: str | None = None
    outcome: Outcome = "success"
    reason: str | None = None
    children: list[TraceEvent] = field(default_factory=list)
    usage: AttemptUsage = NO_USAGE
    position: int = 0
    branch: str = ""
    left_out: LeftOut | None = None
    function_ms: int | None = None
    error_type: str | None = None

    def __post_init__(self) -> None:
        if self.failure is not None and self.outcome == "success":
            self.outcome = "failure"

    @property
    def step_id(self) -> str:
        """The node id, under the name used outside pipelines."""
        return self.node_id


MarkKind = Literal["wait", "refused", "circuit_open", "circuit_half_open", "circuit_closed"]


@dataclass(frozen=True, slots=True)
class TraceMark:
    """What happened to an attempt before or after its call.

    Attributes:
        kind: "wait" for its turn, "refused" by a shared budget, a limit or an open circuit, or what a circuit came to.
        reason: what for, in words; of a circuit the host or limit.
        waited_ms: how long it waited; 0 for all else.
        at_utc: when it was noted: a wait at its end.
    """

    node_id: str
    attempt: int
    position: int
    branch: str
    kind: MarkKind
    reason: str
    waited_ms: float
    at_utc: datetime


class ExecutionTrace(Shown):
    """The events of one run, in the order in which attempts ended. ``len`` and iteration see the top level.

    ``marks``: what is no attempt: waits, refusals, changes of circuits.
    """

    __slots__ = ("marks", "rows", "run_id")

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id
        #: The rows as the engine keeps them, and events in place of those that somebody has looked at.
        self.rows: list[Row | TraceEvent] = []
        self.marks: list[TraceMark] = []

    def __getstate__(self) -> tuple[str, list[TraceEvent], list[TraceMark]]:
        # Events are plain data; rows need schemas, and those cannot leave the process.
        return self.run_id, self._events, self.marks

    def __setstate__(self, state: tuple[str, list[TraceEvent], list[TraceMark]]) -> None:
        self.run_id, events, self.marks = state
        self.rows = list(events)

    def append(self, event: TraceEvent) -> None:
        """Add an event; the very object is kept."""
        self.rows.append(event)

    def copy(self) -> ExecutionTrace:
        """A trace of its own with the same events: what is appended to or built in one is not seen in the other."""
        twin = ExecutionTrace(self.run_id)
        twin.rows, twin.marks = _copy_rows(self.rows), list(self.marks)
        return twin

    def figures(self) -> Iterator[Figures]:
        """The figures of every attempt that the engine recorded, in groups too; sums of those that were left out."""
        return figures_of(self.rows)

    def _event(self, row: Row) -> TraceEvent:
        schemas = row[SCHEMAS]
        seconds, ns = divmod(row[STARTED], 1_000_000_000)
        failure, message, reason, error_type = row[FAILURE] or (None, None, None, None)
        children = row[CHILDREN]
        return TraceEvent(
            node_id=row[NODE],
            run_id=self.run_id,
            attempt=row[ATTEMPT],
            timestamp_utc=datetime.fromtimestamp(seconds, UTC).replace(microsecond=ns // 1000),
            input_state=_thaw(schemas and schemas[0], row[INPUT]) or {},
            output_state=_thaw(schemas and schemas[1], row[OUTPUT]),
            duration_ms=row[DURATION] // 1_000_000,
            failure=failure,
            failure_message=message,
            outcome=row[OUTCOME],
            reason=reason,
            children=self._build(children or []),
            usage=row[USAGE] or NO_USAGE,
            position=row[POSITION],
            branch=row[BRANCH],
            left_out=children.left_out if isinstance(children, FewRows) else None,
            function_ms=row[FUNCTION] // 1_000_000,
            error_type=error_type,
        )

    def _build(self, rows: list[Row | TraceEvent]) -> list[TraceEvent]:
        # An event once built takes its row's place, so that everybody is given the same object.
        for i, row in enumerate(rows):
            if not isinstance(row, TraceEvent):
                rows[i] = self._event(row)
        return cast("list[TraceEvent]", rows)

    def event_of(self, row: Row) -> TraceEvent:
        """The event of one row, without those inside it."""
        return self._event((*row[:CHILDREN], None, row[FUNCTION]))

    @property
    def _events(self) -> list[TraceEvent]:
        return self._build(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TraceEvent]:
        return iter(self._events)

    def replay(self) -> Iterator[TraceEvent]:
        """The top-level events in recorded order."""
        return iter(self._events)

    def walk(self) -> Iterator[TraceEvent]:
        """Every event, those inside groups too; a group before its children."""
        stack = list(reversed(self._events))
        while stack:
            event = stack.pop()
            yield event
            stack.extend(reversed(event.children))

    def events_for(self, node_id: str) -> list[TraceEvent]:
        """The top-level events of one node."""
        return [event for event in self._events if event.node_id == node_id]

    def failures(self) -> list[TraceEvent]:
        """The top-level events that carry a failure class."""
        return [event for event in self._events if event.failure is not None]

    def to_json(self) -> str:
        """Strict JSON (NaN and infinities as strings): a list of events with everything that they hold."""
        return json.dumps([jsonable(event) for event in self._events], allow_nan=False)

    def _story(self, redact: Redact | None = None) -> Story:
        """All of it as plain data. What stands in rows is timed to the nanosecond."""
        from stroma.page import Story

        found: list[tuple[int, int, TraceEvent]] = []
        stack: list[Row | TraceEvent] = list(self.rows)
        while stack:
            row = stack.pop()
            if isinstance(row, TraceEvent):
                ms = int(row.timestamp_utc.timestamp() * 1_000_000) * 1000
                found.append((ms, row.duration_ms * 1_000_000, row))
                stack.extend(row.children)
            else:
                alone = self._event((*row[:CHILDREN], None, row[FUNCTION]))
                found.append((row[STARTED], row[DURATION], alone))
                stack.extend(row[CHILDREN] or ())
        found.sort(key=lambda one: one[0])
        first = found[0][0] if found else 0
        hidden = self._hidden(redact)
        bars = [
            _bar(event, (began - first) / 1e6, took / 1e6, redact, hidden) for began, took, event in found
        ]
        failed = [bar for bar in bars if bar.failure_class is not None]
        end = max((began + took for began, took, _ in found), default=first)
        tokens, cost = sum(bar.tokens for bar in bars), math.fsum(bar.cost_usd for bar in bars)
        status = "FAILED" if failed and failed[-1] is bars[-1] else "trace"
        return Story(self.run_id, "", status, bars, tokens, cost, first // 1_000_000, (end - first) / 1e9)

    def _hidden(self, redact: Redact | None) -> frozenset[str]:
        """What ``redact`` takes out of the states."""
        if redact is None:
            return frozenset()
        return _hidden_in(redact, self.walk())

    def said(self, message: str, row: Row, redact: Redact) -> str:
        """The message of a failed attempt without what ``redact`` takes out of the attempt's states."""
        return hide_words(
            redact, message, _hidden_in(redact, [self._event((*row[:CHILDREN], None, row[FUNCTION]))])
        )

    def diff(self, other: ExecutionTrace) -> list[str]:
        """What tells two traces apart: order, repeats, attempts, states, failures; not ids of runs nor times."""
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


def _hidden_in(redact: Redact | None, events: Iterable[TraceEvent]) -> frozenset[str]:
    states = [s for event in events for s in (event.input_state, event.output_state) if s is not None]
    return hidden_values((jsonable(s), jsonable(hide_state(redact, s))) for s in states)


def _bar(
    event: TraceEvent,
    began_ms: float,
    took_ms: float,
    redact: Redact | None,
    hidden: frozenset[str],
) -> Bar:
    from stroma.page import Bar

    def shown(state: dict[str, Any] | None) -> Any:
        return None if state is None else jsonable(hide_state(redact, state))

    at = f"{event.position}.{event.branch}" if event.branch else str(event.position)
    kind = None if event.failure is None else event.failure.value
    message = event.failure_message
    if message is not None:
        message = typed(event.error_type, hide_words(redact, message, hidden))
    used = event.usage
    waited = event.function_ms is not None and took_ms - event.function_ms >= 1
    return Bar(
        event.node_id, at, event.attempt, began_ms, took_ms, event.outcome, kind, event.reason, message, used.tokens,
        used.output_tokens, used.cost_usd, used.model, event.output_state is not None, shown(event.input_state),
        shown(event.output_state), event.function_ms if waited else None,
    )  # fmt: skip


def contract_of(row: Row, schema: Schema) -> str:
    """What an output is filed under: the fingerprint of its schema, and the group that asked for it."""
    kind = FAILED_ITEM if schema.model is ItemFailure else schema.fingerprint
    return kind if row[GROUP] is None else f"{kind}:{row[GROUP]}"


def _copy_rows(rows: list[Row | TraceEvent]) -> list[Row | TraceEvent]:
    # A row is immutable but for the list of its children.
    copies: list[Row | TraceEvent] = []
    for row in rows:
        if isinstance(row, TraceEvent):
            copies.append(_copy_event(row))
        else:
            children = row[CHILDREN]
            copies.append(row if children is None else (*row[:CHILDREN], _copy_rows(children), row[FUNCTION]))
    return rows.like(copies) if isinstance(rows, FewRows) else copies


def _copy_event(event: TraceEvent) -> TraceEvent:
    given, made = event.input_state, event.output_state
    return replace(
        event,
        input_state=Schema.thaw_dict(given),
        output_state=None if made is None else Schema.thaw_dict(made),
        children=[_copy_event(child) for child in event.children],
    )


def _thaw(schema: Schema | None, snapshot: Snapshot | None) -> dict[str, Any] | None:
    if snapshot is None:
        return None
    if isinstance(snapshot, dict):
        return Schema.thaw_dict(snapshot)
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
    # As text, since 1, 1.0 and True are equal to Python and not to whoever reads the states.
    return json.dumps(jsonable(value), sort_keys=True)


def _child_text(event: TraceEvent) -> str:
    said = (event.failure, event.failure_message, event.outcome)
    parts = (event.branch, event.node_id, event.attempt, event.input_state, event.output_state, *said)
    return _text(parts) + str(sorted(map(_child_text, event.children)))


_DEEPEST: Final = 100


def jsonable(value: Any, depth: int = 0) -> Any:
    """Plain JSON data for any state: what JSON cannot say becomes text, never an error; what lies deeper than 100 levels is named."""
    if depth > _DEEPEST:
        return f"<{type(value).__name__}>"
    if value is None or isinstance(value, (bool, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {
            k if isinstance(k, str) else str(jsonable(k, depth + 1)): jsonable(v, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [jsonable(v, depth + 1) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v, depth + 1) for v in value), key=lambda v: (type(v).__name__, str(v)))
    if isinstance(value, Enum):
        return jsonable(value.value, depth + 1)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return {name: jsonable(getattr(value, name, None), depth + 1) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    try:
        return to_jsonable_python(value)
    except Exception:
        try:
            return repr(value)
        except Exception:
            return f"<{type(value).__name__}>"


def secrets_in(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts that pydantic's secret types hide in any state, as deep as jsonable() goes."""
    if isinstance(value, (SecretStr, SecretBytes, Secret)):
        yield from _texts(value.get_secret_value(), depth)
    elif depth > _DEEPEST:
        return
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from secrets_in(inner, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from secrets_in(inner, depth + 1)
    elif isinstance(value, BaseModel):
        for inner in (value.__dict__, value.__pydantic_extra__ or {}):
            yield from secrets_in(inner, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from secrets_in(getattr(value, "__dict__", {}), depth + 1)
        for one in dataclasses.fields(value):  # Those with slots have no __dict__.
            yield from secrets_in(getattr(value, one.name, None), depth + 1)


def _texts(secret: Any, depth: int) -> Iterator[str]:
    """What a Secret hides may be a structure: every text in it."""
    if isinstance(secret, bytes):  # As a message has it after decode(), and after repr().
        yield from filter(None, (secret.decode("utf-8", "ignore"), repr(secret)[2:-1]))
    elif isinstance(secret, (Mapping, list, tuple)) and depth <= _DEEPEST:
        for inner in secret.values() if isinstance(secret, Mapping) else secret:
            yield from _texts(inner, depth + 1)
    elif secret is not None and not isinstance(secret, bool) and str(secret):
        yield str(secret)


class RunStatus(StrEnum):
    """How a run ended."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"  # a terminal failure: trying the same again will not help
    PARTIAL = "PARTIAL"  # gave up for now: what was finished is kept, a later resume may work
    RESUMED = "RESUMED"  # completed, continuing an earlier run
    CANCELLED = "CANCELLED"  # the run's task was cancelled; resumable
    SUSPENDED = "SUSPENDED"  # a node waits for a person; resumable
    INTERRUPTED = "INTERRUPTED"  # the process was told to stop, or run() raised; resumable


@dataclass(frozen=True, slots=True)
class HookFailure:
    """One exception that a hook raised. It changed nothing of the run."""

    hook: str
    node_id: str | None
    exception: BaseException


@dataclass
class ExecutionResult(Shown):
    """What a run came to.

    Attributes:
        final_state: the last committed state, else the initial one.
        total_cost_usd: US dollars, failed attempts included.
        total_tokens: input + output, failed attempts included.
        failure: what stopped the run, or None.
        suspended: why a SUSPENDED run waits; one line per node.
        failed_items: how many items of its maps failed while the others went on, see ``on_item_failure``.
        hook_errors: exceptions of hooks, which changed nothing.
        unpriced_models: models that nobody knows a price for; they count as 0.
    """

    run_id: str
    status: RunStatus
    final_state: BaseModel | None
    trace: ExecutionTrace
    total_cost_usd: float
    total_tokens: int
    failure: Failure | None = None
    hook_errors: list[HookFailure] = field(default_factory=list)
    unpriced_models: list[str] = field(default_factory=list)
    suspended: list[str] = field(default_factory=list)
    failed_items: int = 0

    def _story(self, redact: Redact | None = None) -> Story:
        from stroma.page import Box

        story, failure, box = self.trace._story(redact), self.failure, None
        if failure is not None:
            hidden = self.trace._hidden(redact)
            message = typed(kind_of(failure.exception), hide_words(redact, failure.message, hidden))
            # Of a group, the child whose failure became its own is the one that stands deepest.
            said = [bar for bar in story.bars if bar.message == message and bar.outcome == "failure"]
            at = max(said, key=lambda bar: (bar.began_ms, len(bar.at)), default=None)
            box = Box(
                failure.node_id if at is None else at.node_id, "?" if at is None else at.at, failure.attempt,
                failure.failure_class.value, message, failure.reason,
            )  # fmt: skip
        facts = [("unpriced", ", ".join(self.unpriced_models))] if self.unpriced_models else []
        facts += [
            ("waits for", hide_words(redact, reason, self.trace._hidden(redact))) for reason in self.suspended
        ]
        return dataclasses.replace(
            story, run_id=self.run_id, status=self.status.value, tokens=self.total_tokens, cost_usd=self.total_cost_usd,
            box=box, facts=tuple(facts),
        )  # fmt: skip

    def raise_for_status(self) -> None:
        """Raise the exception that stopped the run, if one did."""
        if self.failure is not None:
            raise self.failure.exception
