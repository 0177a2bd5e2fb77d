"""Messages between interpreter and workers as plain JSON data, and their conversion. No I/O."""

from __future__ import annotations

import json
from typing import Any, Final, Literal, NotRequired, TypedDict

__all__ = [
    "ActivityRequest",
    "Answer",
    "EffectCall",
    "Event",
    "FailureData",
    "NodeSpec",
    "Plan",
    "Reply",
    "SegmentReport",
    "Spent",
    "Value",
    "clip",
    "fit_context",
    "fold",
    "json_size",
    "size_of",
    "unfold",
]


#: Bytes from which a state goes to the payload store. All sizes are those of a JSON string, in which much text grows.
LARGE: Final = 256 * 1024
#: Bytes of states that one run may hold beside that: half of what a Temporal payload may be, for all else that is in it.
ROOM: Final = 1024 * 1024
#: Characters of a message, and bytes of the parts of a contract violation and of one value of the context dict.
MAX_TEXT: Final = 16 * 1024
CONTEXT: Final = 64 * 1024
#: Bytes of the whole context dict, which goes with every request.
_CONTEXTS: Final = 256 * 1024

Operation = Literal["begin", "attempt", "open", "items", "close", "pack", "end"]


#: Names the class that a state is of, where it is not said by the node that takes it: ``["class", "module:qualname"]``,
#: ``["in", node id, hash of its contract]``, ``["out", node id, hash]``, ``["group", spec, the class of its input]``,
#: ``["raw"]`` for what no class has seen. Old histories have no hashes.
ClassName = list[Any]


class Value(TypedDict):
    """A state in stored form: itself, or the name of the blob that it stands in. ``size``: bytes of the text as JSON."""

    text: NotRequired[str]
    blob: NotRequired[str]
    size: int
    cls: ClassName


class NodeSpec(TypedDict):
    """A node as it was when the run began: fingerprints of its schemas, or what stands in it."""

    id: str
    kind: Literal["node", "parallel", "sequence", "map", "flow"]
    input: NotRequired[str]
    output: NotRequired[str]
    effect: NotRequired[bool]
    children: NotRequired[list[NodeSpec]]
    limit: NotRequired[int | None]
    over: NotRequired[str]
    into: NotRequired[str]
    collect: NotRequired[bool]


class Plan(TypedDict):
    """Pipeline and settings of a run, frozen at its start: later edits do not change the run.

    Attributes:
        policies: by class; node_policies: by node id and class. As FailurePolicy has them.
        settings: further fields of RunConfig by which attempts go, as JSON.
        options: what only the driver knows.
    """

    run_id: str
    execution: int
    pipeline: str
    nodes: list[NodeSpec]
    policies: dict[str, dict[str, Any]]
    node_policies: dict[str, dict[str, dict[str, Any]]]
    settings: dict[str, Any]
    options: dict[str, Any]


class Spent(TypedDict):
    """Usage of an attempt, a node or a run."""

    tokens: int
    cost_usd: float
    latency_ms: float


class FailureData(TypedDict):
    """A failure.

    Attributes:
        data: what makes one of our own exceptions again.
        inner: of a group, id and attempt of the node inside that stopped it.
    """

    failure_class: str
    message: str
    reason: str | None
    retry_after: float | None
    node_id: str
    attempt: int
    type: str
    full_name: NotRequired[str]
    data: list[Any] | None
    inner: NotRequired[list[Any]]


class Event(TypedDict):
    """A row of the trace. An input of None is the value that the attempt was given.

    Attributes:
        charged: the bytes that it took of the run's room, if it is inside a group.
        function_ns: for how long functions ran, where that is not ``duration_ns``: of a group.
        inside: the sums of the steps inside the attempt, as LeftOut has them. Old histories have none.
    """

    id: str
    attempt: int
    started_ns: int
    duration_ns: int
    outcome: str
    failure: list[Any] | None
    usage: list[Any] | None
    position: int
    branch: str
    input: Value | None
    output: Value | None
    children: list[Event] | None
    packs: NotRequired[list[Value]]
    charged: NotRequired[int]
    function_ns: NotRequired[int]
    inside: NotRequired[list[Any]]


class Answer(TypedDict):
    """Request of a suspended node, and its answer; see ``stroma.checkpoint.Waiting``. ``effect``: an UnknownCall."""

    position: int
    branch: str
    node_id: str
    reason: str
    schema_ref: str
    payload: str | None
    effect: NotRequired[list[Any]]


class EffectCall(TypedDict):
    """The last call of an effect at one place of a run.

    Attributes:
        number: 1-based; 0 before the first call.
        is_open: nobody has stated how it ended. The commit of its output does not change this.
        cause: why that is not known; "" for a call that is under way.
    """

    node_id: str
    number: int
    is_open: bool
    cause: str


class ActivityRequest(TypedDict):
    """An operation to perform on a worker.

    Attributes:
        path: the index of each child on the way from the pipeline to the node.
        groups: the ids of the groups around it, the outermost first.
        spent: by the run so far, earlier segments included; ``busy_ns``: by the groups around it.
        span_ns: of "close": when the first function inside the group began, and when the last one ended.
        room: bytes of states that may still come back in the reply itself.
        after: seconds that were waited since the last attempt.
        inside: answers to steps inside the node.
        effect: number of the last call of an effect, and True if nobody knows how that ended.
        gone: what nodes have taken out of the context dict; a worker's own config may have it, too.
    """

    op: Operation
    run_id: str
    execution: int
    pipeline: str
    settings: dict[str, Any]
    traceparent: str | None
    context: dict[str, Any]
    gone: list[str]
    spent: Spent
    warned: list[str]
    room: int
    value: Value
    spec: NotRequired[NodeSpec]
    path: NotRequired[list[int]]
    groups: NotRequired[list[str]]
    position: NotRequired[int]
    branch: NotRequired[str]
    kind: NotRequired[str]
    attempt: NotRequired[int]
    repairs: NotRequired[int]
    after: NotRequired[float | None]
    last: NotRequired[FailureData | None]
    answer: NotRequired[Answer | None]
    inside: NotRequired[list[Answer]]
    effect: NotRequired[list[Any]]
    first: NotRequired[int]
    count: NotRequired[int]
    #: Of "close": how the group's children ended.
    outputs: NotRequired[list[Value]]
    indexes: NotRequired[list[int]]
    packs: NotRequired[list[Value]]
    failures: NotRequired[list[dict[str, Any]]]
    stopped: NotRequired[dict[str, Any] | None]
    cancelled: NotRequired[bool]
    busy_ns: NotRequired[int]
    span_ns: NotRequired[list[int]]
    opened_ns: NotRequired[int]
    #: Of "begin": the plan, to be looked at as a whole, and what is committed already.
    nodes: NotRequired[list[NodeSpec]]
    skipped: NotRequired[list[dict[str, Any]]]
    #: Of "pack": what is to be kept out of the run's own state.
    rows: NotRequired[list[Event]]
    #: Of "end".
    report: NotRequired[SegmentReport]


class Reply(TypedDict, total=False):
    """Reply to a request.

    Attributes:
        row: the attempt's row; absent for one that was not begun.
        output: what was committed.
        failure: of an attempt that failed; ``halt`` if it is final, with what Halt says of it.
        repairing: another attempt follows to repair the output.
        cancelled: the attempt ended because the run is to end.
        broken: [type, message] of a programming error that ends the run: a hook that is not async.
        context: [what was set, what was deleted] in the context dict.
        effect: as in the request, after the attempt.
        lost: why nobody knows what became of an attempt of an effect.
        not_begun: no worker has begun it, and another one may.
    """

    row: Event
    output: Value
    failure: FailureData
    halt: dict[str, bool]
    repairing: bool
    cancelled: bool
    waiting: Answer
    broken: list[str]
    context: list[Any]
    warned: list[str]
    unpriced: list[str]
    hook_errors: list[list[Any]]
    traceparent: str | None
    items: list[Value]
    total: int
    packed: Value
    at_ns: int
    effect: list[Any]
    lost: str
    not_begun: bool


class SegmentReport(TypedDict):
    """Result of a run, or of a segment of it up to a suspension. Rows refer to states by number in ``values``."""

    run_id: str
    execution: int
    pipeline: str
    segment: int
    status: str
    values: list[Value]
    rows: list[dict[str, Any]]
    final: Value
    committed: bool
    tokens: int
    cost_usd: float
    failure: FailureData | None
    suspended: list[str]
    waiting: list[Answer]
    failed_items: int
    unpriced: list[str]
    hook_errors: list[list[Any]]
    broken: list[str] | None


def json_size(text: str) -> int:
    """Return the bytes of a text in JSON."""
    return len(json.dumps(text))


def clip(text: str) -> str:
    """Return a message of limited length."""
    omitted = len(text) - MAX_TEXT
    return text if omitted <= 0 else f"{text[:MAX_TEXT]} ... ({omitted} characters omitted)"


def fit_context(context: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the new values of a context dict for which there is room in it."""
    if not changes:
        return {}
    free = _CONTEXTS - sum(
        json_size(key) + len(json.dumps(context[key])) for key in context if key not in changes
    )
    fits: dict[str, Any] = {}
    for key, value in changes.items():
        size = json_size(key) + len(json.dumps(value))
        if size <= free:
            free -= size
            fits[key] = value
    return fits


def fold(tree: Any) -> dict[str, Any]:
    """Return a tree of plain data in which each state occurs once; see :func:`unfold`."""
    values: list[Any] = []
    seen: dict[str, int] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "cls" in node and "size" in node:
            key = json.dumps([node.get("text"), node.get("blob"), node["cls"]])
            if key not in seen:
                seen[key] = len(values)
                values.append(node)
            return {"$": seen[key]}
        return {name: walk(one) for name, one in node.items()}

    return {"tree": walk(tree), "values": values}


def unfold(folded: dict[str, Any]) -> Any:
    """Return the tree that was passed to :func:`fold`."""
    values = folded["values"]

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(one) for one in node]
        if not isinstance(node, dict):
            return node
        if node.keys() == {"$"}:
            return dict(values[node["$"]])
        return {name: walk(one) for name, one in node.items()}

    return walk(folded["tree"])


def size_of(value: Value | None) -> int:
    """Return the bytes that a value takes of a run's own state."""
    return 0 if value is None else value["size"] if "text" in value else 100
