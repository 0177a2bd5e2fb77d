"""Records of attempts: rows, and the events and marks that a trace shows of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from stroma.contracts.contract import NodeContract
from stroma.contracts.copying import Snapshot
from stroma.contracts.schema import Schema
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure

Outcome = Literal["success", "failure", "cancelled", "suspended"]
#: Outcome of the row that commits the failure of an item of a map. It is not an attempt: no store lists it.
COLLECTED: Final = "collected"


class Failed(NamedTuple):
    """The failure of an attempt. ``error_type``: the name of the exception's type; None for a suspension."""

    failure_class: FailureClass
    message: str
    reason: str | None
    error_type: str | None = None


#: What reads a row's input, and its output; and the contract of the node, if it has one. As a string, because
#: NodeContract[Any, Any] builds a validator, which an import must not.
Schemas: TypeAlias = "tuple[Schema, Schema, NodeContract[Any, Any] | None]"


#: One attempt, as atoms, in this order. What most attempts lack (a failure, usage, children) is None.
class AttemptRow(NamedTuple):
    """One attempt, as the engine records it: plain fields and snapshots, which no user code can change.

    Attributes:
        attempt: 1-based.
        started_ns: since the epoch; of a group that of the first function inside it.
        duration_ns: of a group until the last function inside it ended.
        group: the id of the group around it.
        schemas: the schemas that read its snapshots; plain dicts need none.
        children: the events of a group's children.
        function_ns: for which its function ran; of a group any function inside it.
    """

    node_id: str
    attempt: int
    started_ns: int
    duration_ns: int
    input: Snapshot
    output: Snapshot | None
    outcome: Outcome
    failure: Failed | None
    usage: AttemptUsage | None
    position: int
    branch: str
    group: str | None
    schemas: Schemas | None
    children: list[AttemptRow | TraceEvent] | None
    function_ns: int


#: What an item that failed for good is filed under, in place of its output, where the other items go on.
FAILED_ITEM: Final = "failed item"


@dataclass(frozen=True, slots=True)
class AttemptUsage:
    """The usage of one attempt: tokens, US dollars, and the model that the node reported.

    Attributes:
        cached_input_tokens: the part of the input that was read from the provider's cache.
        cache_write_tokens: the part of the input that was written to it. Stores save the price, and neither
            of these two.
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
    """The events inside a group or node that are only counted.

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


class BoundedRows(list["AttemptRow | TraceEvent"]):
    """The rows of the items of a large map: the first ones, and the first failures after those.

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

    def append(self, row: AttemptRow | TraceEvent, /) -> None:
        failed = not isinstance(row, TraceEvent) and row.failure is not None
        if len(self) < (2 * self._most if failed else self._most):
            super().append(row)
            return
        stack = [row]
        while stack:
            one = stack.pop()
            assert not isinstance(one, TraceEvent)  # The engine's own: nobody has looked at them.
            used = one.usage or NO_USAGE
            tokens, output_tokens, cost, ns = self._sums.get((one.node_id, used.model), (0, 0, 0.0, 0))
            self._sums[one.node_id, used.model] = (
                tokens + used.tokens,
                output_tokens + used.output_tokens,
                cost + used.cost_usd,
                ns + one.function_ns,
            )
            self._events += 1
            self._failures += one.failure is not None
            if one.output is None:
                self._lost_tokens += used.tokens
                self._lost_cost_usd += used.cost_usd
            inside = one.children or ()
            if isinstance(inside, BoundedRows) and inside.left_out is not None:
                self._add(inside.left_out)
            stack.extend(inside)

    def _add(self, left_out: LeftOut) -> None:
        """Add the sums of a map inside that has omitted rows itself."""
        for node_id, tokens, output_tokens, cost, ns, model in left_out.figures:
            sums = self._sums.get((node_id, model), (0, 0, 0.0, 0))
            self._sums[node_id, model] = (
                sums[0] + tokens,
                sums[1] + output_tokens,
                sums[2] + cost,
                sums[3] + ns,
            )
        self._events += left_out.events
        self._failures += left_out.failures
        self._lost_tokens += left_out.lost_tokens
        self._lost_cost_usd += left_out.lost_cost_usd

    @property
    def left_out(self) -> LeftOut | None:
        """Return the sums of the rows that were omitted; None if there are none."""
        if not self._events:
            return None
        figures = tuple((node, *sums, model) for (node, model), sums in self._sums.items())
        return LeftOut(self._events, self._failures, self._lost_tokens, self._lost_cost_usd, figures)

    def like(self, rows: list[AttemptRow | TraceEvent]) -> BoundedRows:
        """Return the same list with other rows in it: copies of these."""
        twin = BoundedRows(self._most)
        twin.extend(rows)
        twin._events, twin._failures, twin._sums = self._events, self._failures, dict(self._sums)
        twin._lost_tokens, twin._lost_cost_usd = self._lost_tokens, self._lost_cost_usd
        return twin


def left_out_of(row: AttemptRow | TraceEvent) -> LeftOut | None:
    """Return the sums of the rows inside a row that were omitted; None if there are none."""
    if isinstance(row, TraceEvent):
        return row.left_out
    return row.children.left_out if isinstance(row.children, BoundedRows) else None


def figures_of(rows: list[AttemptRow | TraceEvent]) -> Iterator[Figures]:
    """Yield the figures of every attempt in these rows, groups included; those of omitted rows as sums."""
    stack: list[AttemptRow | TraceEvent] = list(reversed(rows))
    while stack:
        row = stack.pop()
        if isinstance(row, TraceEvent):
            took = row.duration_ms if row.function_ms is None else row.function_ms
            node_id, used, ns = row.node_id, row.usage, took * 1_000_000
            inside: list[Any] = list(row.children)
        else:
            node_id, used, ns = row.node_id, row.usage or NO_USAGE, row.function_ns
            inside = row.children or []
        left_out = left_out_of(row)
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
        duration_ms: wall time of the node's function alone; of a group from the first start of a function
            inside it to the last end of one.
        failure: its class, or None.
        outcome: "success", "failure", "cancelled" or "suspended".
        reason: a stable word for the failure, such as "rate_limit"; None if unknown.
        error_type: the name of the exception's type; None if nothing was raised.
        children: the events inside a group, in the order in which they ended.
        usage: what the attempt used.
        position: where in the run the node stands, 0-based.
        branch: "" at the top level; "0", "1", "0.1" for children of groups and items of a map.
        function_ms: time for which its function ran, without waits between attempts; for a group, any
            function inside it. None if the event was not made by the engine.
        left_out: events that are only counted: of a map whose items or outputs are not in the state.
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
        """Return the node id, under the name used outside pipelines."""
        return self.node_id


MarkKind = Literal[
    "wait",
    "refused",
    "cooldown",
    "circuit_open",
    "circuit_half_open",
    "circuit_closed",
    "slept",
    "sleeping",
    "answered",
    "open",
    "expired",
    "received",
    "receiving",
    "missed",
]
#: Kinds of a sleep, of a question and of a wait for a message, of a flow: they belong to no attempt.
SLEEPS: Final = ("slept", "sleeping")
QUESTIONS: Final = ("answered", "open", "expired")
RECEIVES: Final = ("received", "receiving", "missed")


@dataclass(frozen=True, slots=True)
class TraceMark:
    """An event of an attempt before or after its call, or a wait of a flow, whose id it has.

    Attributes:
        kind: "wait" for its turn, "refused" by a shared budget, a limit or an open circuit, the "cooldown" of
            a limit that it has begun, or what a circuit came to; of a sleep "slept" or "sleeping", of a
            question "answered", "expired" or "open", of a wait for a message "received", "receiving" or
            "missed".
        reason: what for, in words; of a circuit the host or limit, of a cooldown the limit.
        waited_ms: how long it waited in this process; 0 for all else.
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


def contract_of(row: AttemptRow, schema: Schema) -> str:
    """Return the contract of a stored output: fingerprint of its schema, and the group that requested it."""
    kind = FAILED_ITEM if schema.model is ItemFailure else schema.fingerprint
    return kind if row.group is None else f"{kind}:{row.group}"


def place_text(position: int | None, branch: str) -> str:
    """Return the place of an attempt in its run: "2", or "2.0" for a child of a group."""
    return f"{position}.{branch}" if branch else str(position)
