"""State of a run as plain JSON data, and the driver protocol of its interpreter."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, NotRequired, Protocol, TypedDict

from stroma.cost.tracker import CostTracker
from stroma.drivers.remote.wire import (
    ROOM,
    ActivityRequest,
    Answer,
    EffectCall,
    Event,
    FailureData,
    NodeSpec,
    Reply,
    Spent,
    Value,
    json_size,
    size_of,
)
from stroma.failures.classes import FailureClass
from stroma.trace.events import BoundedRows, LeftOut

__all__ = [
    "NO_FAILURE",
    "ROW",
    "Broken",
    "Continue",
    "Driver",
    "FlowRecords",
    "MapState",
    "NodePlace",
    "RunState",
    "StoppedExecution",
    "charge_row",
    "decode_inside",
    "encode_inside",
    "forget_position",
    "new_state",
    "next_segment",
    "nothing",
    "number_states",
    "row_size",
    "shortened",
    "total_spent",
    "tracker_of",
]

ROW: Final = 400  # bytes of a row, its states and what a failure says apart
#: Bytes of a run's room that are not for what failures say: beyond that, their first words must do.
_FOR_STATES: Final = ROOM // 2
_FIRST_WORDS: Final = 200


class Driver(Protocol):
    """Access of an interpreter to the outside: it uses nothing else."""

    async def ask(self, request: ActivityRequest) -> tuple[Reply, bool]:
        """Let a worker perform a request; return the reply, and whether the run was cancelled meanwhile.

        A request with "effect" goes to one worker only, or is performed as ``redelivered``. If that worker is lost, the reply
        has "lost".

        Raises CancelledError if it was cancelled before a worker took it up.
        """
        ...

    async def sleep(self, seconds: float) -> None: ...

    def draw(self) -> float:
        """Return a random number from 0 to 1, the same one in each replay."""
        ...

    def full(self) -> bool:
        """Return True if the driver wants to continue with a fresh history."""
        ...


class Continue(Exception):
    """Signals that the driver wants a new interpreter, which continues with the state as it is."""


class Broken(Exception):
    """A programming error that ends the run."""


class MapState(TypedDict):
    """Progress of a map. ``next``: the first item that was not requested. Items in ``packs`` are in no other field."""

    next: int
    outputs: dict[str, Value]
    rows: list[Event]
    packs: list[Value]
    old_packs: list[Value]
    packed: list[int]
    failures: list[dict[str, Any]]
    busy: list[list[int]]
    attempt: int
    opened_ns: int
    traceparent: str | None


class FlowRecords(TypedDict):
    """Records of the flow at a position of a run, besides the outputs of its steps, which are in ``done``.

    Attributes:
        notes: see :mod:`stroma.runner.flows.journal`.
        steps: node id, kind, fingerprint of the output and input of each step, by its place.
        questions: of ``flow.wait_for``, answered ones included.
    """

    notes: dict[str, str]
    steps: dict[str, list[Any]]
    questions: dict[str, Answer]


class RunState(TypedDict):
    """State of a run. All of it is plain JSON data."""

    position: int
    value: Value
    initial: Value
    begun: bool
    continued: bool
    segment: int
    spent: Spent
    prior: Spent
    rows: list[Event]
    committed: list[Value]
    done: dict[str, Value]
    maps: dict[str, MapState]
    context: dict[str, Any]
    gone: list[str]
    warned: list[str]
    unpriced: list[str]
    hook_errors: list[list[Any]]
    traceparent: str | None
    waiting: dict[str, Answer]
    answers: dict[str, Answer]
    effects: dict[str, EffectCall]
    failed_items: int
    room: int
    resumed_from: NotRequired[str]
    flow: NotRequired[FlowRecords]


def row_size(row: Event) -> int:
    """Return the bytes that a row takes of a run's own state, without its states."""
    inside = len(json.dumps(row["inside"])) if "inside" in row else 0
    return ROW + inside + (0 if row["failure"] is None else json_size(row["failure"][1]))


def encode_inside(rows: BoundedRows, tracker: CostTracker) -> list[Any] | None:
    """Return the sums of the steps inside an attempt as plain data; None if there are none.

    ``tracker``: that of the attempt alone, for usage outside of steps.
    """
    counted = rows.left_out or LeftOut(0, 0, 0, 0.0, ())
    figures = [*counted.figures, *tracker._added()]
    if not figures:
        return None
    return [counted.events, counted.failures, counted.lost_tokens, counted.lost_cost_usd, figures]


def decode_inside(inside: list[Any] | None) -> LeftOut | None:
    """Return the sums of the steps inside an attempt; None if there are none, or for a row of an old history."""
    if inside is None:
        return None
    events, failures, lost_tokens, lost_cost_usd, figures = inside
    return LeftOut(events, failures, lost_tokens, lost_cost_usd, tuple(tuple(one) for one in figures))


def shortened(message: str, room: int) -> str:
    """Return the message of a failure, shortened if the run has no room for it."""
    if len(message) <= _FIRST_WORDS or room - json_size(message) >= _FOR_STATES:
        return message
    return f"{message[:_FIRST_WORDS]} ... (the run has no room for the rest; see the log of the worker)"


def charge_row(state: RunState, tracker: CostTracker, place: NodePlace, value: Value, reply: Reply) -> None:
    """Charge a run with the row of an attempt in a reply: its room, its usage and its time. ``value``: its input."""
    row, room = reply["row"], state["room"]
    if row["input"] is not None or place.kind == "item":
        state["room"] -= size_of(row["input"] or value)
    row["input"] = row["input"] or value
    if row["failure"] is not None:
        row["failure"][1] = shortened(row["failure"][1], state["room"])
    if "failure" in reply:
        reply["failure"]["message"] = shortened(reply["failure"]["message"], state["room"])
    state["room"] -= size_of(reply.get("output")) + row_size(row)
    if place.groups:
        row["charged"] = room - state["room"]
    used = row["usage"]
    if used is not None:
        tracker.spend(used[0], used[2])
    inside = decode_inside(row.get("inside"))
    for _, tokens, _, cost_usd, *_ in () if inside is None else inside.figures:
        tracker.spend(tokens, cost_usd)
    if not place.branch:
        tracker.latency_ns += row.get("function_ns", row["duration_ns"])
    state["spent"] = {
        "tokens": tracker.total_tokens,
        "cost_usd": tracker.total_cost_usd,
        "latency_ms": tracker.latency_ns / 1e6,
    }


def nothing() -> Spent:
    """Return a usage of zero."""
    return {"tokens": 0, "cost_usd": 0.0, "latency_ms": 0.0}


def new_state(value: Value, *, context: dict[str, Any], traceparent: str | None = None) -> RunState:
    """Return the state of a new run."""
    return {
        "position": 0,
        "value": value,
        "initial": value,
        "begun": False,
        "continued": False,
        "segment": 0,
        "spent": nothing(),
        "prior": nothing(),
        "rows": [],
        "committed": [],
        "done": {},
        "maps": {},
        "context": context,
        "gone": [],
        "warned": [],
        "unpriced": [],
        "hook_errors": [],
        "traceparent": traceparent,
        "waiting": {},
        "answers": {},
        "effects": {},
        "failed_items": 0,
        "room": ROOM - size_of(value),
    }


def next_segment(state: RunState) -> RunState:
    """Make a state ready to go on after a suspension, or where an earlier run has stopped."""
    spent, prior = state["spent"], state["prior"]
    state["prior"] = {
        "tokens": prior["tokens"] + spent["tokens"],
        "cost_usd": prior["cost_usd"] + spent["cost_usd"],
        "latency_ms": prior["latency_ms"] + spent["latency_ms"],
    }
    state["spent"] = nothing()
    state["rows"] = []
    state["hook_errors"], state["unpriced"], state["warned"] = [], [], []
    state["waiting"] = {}
    state["failed_items"] = 0
    state["begun"], state["continued"] = False, True
    state["segment"] += 1
    for progress in state["maps"].values():
        progress["old_packs"] += progress["packs"]
        progress["rows"], progress["packs"] = [], []
        progress["opened_ns"] = 0
    state["room"] = ROOM - _state_bytes(state)
    return state


def tracker_of(state: RunState) -> CostTracker:
    """Return a tracker with what a run has spent, in this and in earlier executions."""
    tracker = CostTracker()
    spent, prior = state["spent"], state["prior"]
    tracker.spend(spent["tokens"], spent["cost_usd"])
    tracker.latency_ns = round(spent["latency_ms"] * 1e6)
    tracker.prior_tokens = prior["tokens"]
    tracker.prior_cost_usd = prior["cost_usd"]
    tracker.prior_latency_ms = prior["latency_ms"]
    return tracker


def total_spent(state: RunState) -> Spent:
    """Return what this and earlier executions of a run have spent."""
    spent, prior = state["spent"], state["prior"]
    return {
        "tokens": spent["tokens"] + prior["tokens"],
        "cost_usd": spent["cost_usd"] + prior["cost_usd"],
        "latency_ms": spent["latency_ms"] + prior["latency_ms"],
    }


def forget_position(state: RunState, position: int) -> None:
    """Delete what a state holds of the groups and effects at a position."""
    prefix = f"{position}|"
    for states in (state["done"], state["maps"], state["answers"], state["effects"]):
        for key in [key for key in states if key.startswith(prefix)]:
            del states[key]
    state.pop("flow", None)


def number_states(rows: list[Event]) -> tuple[list[dict[str, Any]], list[Value]]:
    """Return rows that refer to their states by number, and those states, each once."""
    values: list[Value] = []
    seen: dict[tuple[str, str], int] = {}

    def number(value: Value | None) -> int | None:
        if value is None:
            return None
        key = (value.get("text") or value.get("blob") or "", str(value["cls"]))
        if key not in seen:
            seen[key] = len(values)
            values.append(value)
        return seen[key]

    def numbered(some: list[Event]) -> list[dict[str, Any]]:
        return [
            {
                **row,
                "input": number(row["input"]),
                "output": number(row["output"]),
                "children": None if row["children"] is None else numbered(row["children"]),
            }
            for row in some
        ]

    return numbered(rows), values


def _state_bytes(state: RunState) -> int:
    """Return the bytes of a state between two segments, without the rows of each."""
    values = [state["initial"], *state["committed"], *state["done"].values()]
    size = sum(len(answer["payload"] or "") for answer in state["answers"].values())
    for progress in state["maps"].values():
        values += [*progress["outputs"].values(), *progress["old_packs"]]
        size += sum(ROW + json_size(failed["message"]) for failed in progress["failures"])
    if "flow" in state:
        size += json_size(json.dumps(state["flow"]))
    size += len(json.dumps(state["effects"]))
    return size + sum(map(size_of, values))


@dataclass(frozen=True, slots=True)
class StoppedExecution:
    """An execution that stopped for good; the plain form of the engine's Halt."""

    failure: FailureData
    output: Value | None = None
    partial: bool = False
    spent: bool = False
    suspended: bool = False


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Position of a node."""

    spec: NodeSpec
    path: tuple[int, ...]
    position: int
    branch: str
    groups: tuple[str, ...]
    rows: list[Event]
    kind: str = "node"
    traceparent: str | None = None  # Of the group around it, if whoever watches has one.

    @property
    def key(self) -> str:
        return f"{self.position}|{self.branch}"

    def child(
        self, index: int, spec: NodeSpec, number: int, rows: list[Event], kind: str, traceparent: str | None
    ) -> NodePlace:
        branch = f"{self.branch}.{index}" if self.branch else str(index)
        groups = (*self.groups, self.spec["id"])
        return NodePlace(spec, (*self.path, number), self.position, branch, groups, rows, kind, traceparent)


NO_FAILURE: Final[FailureData] = {
    "failure_class": FailureClass.TERMINAL.value, "message": "", "reason": None, "retry_after": None, "node_id": "",
    "attempt": 0, "type": "", "data": None,
}  # fmt: skip
