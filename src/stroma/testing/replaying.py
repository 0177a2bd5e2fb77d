"""replay: run a recorded run again by the current code, with the recorded outputs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from stroma.checkpoint import AsyncInMemoryStore, CheckpointManager
from stroma.checkpoint.history import Change, History, NodeDiff, Payload, compare
from stroma.checkpoint.records import AttemptRecord
from stroma.contracts.contract import ContractRegistry, ContractViolation, as_violation
from stroma.contracts.node import Group, Node, find_node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import Kept
from stroma.cost.budget import BudgetExceeded
from stroma.cost.usage import UsageError
from stroma.engine.config import new_run_id
from stroma.engine.execution import NodeExecution
from stroma.engine.interceptors import PROBES, Call, Probe
from stroma.engine.restore import read_output
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose
from stroma.hooks.sets import NodeHooks
from stroma.runner.runner import Pipeline, StromaRunner
from stroma.testing.clock import FakeClock
from stroma.testing.recording import RecordedAttempt, RecordedRun, is_failed_item
from stroma.trace.events import AttemptUsage
from stroma.trace.html import without_values
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["Difference", "Replay", "replay", "replay_sync"]

Kind = Literal["input", "missing", "new", "contract", "schema", "decision", "output", "status"]
#: Longer than anything waits that has something to wait for.
_FOR_EVER: Final = 1e9
#: Message of a server with a retry delay; the journal does not store the delay.
_MAY_SAY_WHEN: Final = ("rate_limit", "overloaded", "server_error", "timeout", "connection")
#: Fields of one output that are told.
_MAX_CHANGES: Final = 5
_ENDED: Final = ("COMPLETED", "RESUMED", "FAILED", "PARTIAL", "SUSPENDED")


class _Open(BaseModel):
    """Input model for a pipeline whose first node has none."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class _AsRecorded(Exception):
    """A failure that is known by its recorded message and class."""


class _NoAnswer(Exception):
    """No recorded output exists for a call."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference in behaviour between the recording and the current code.

    Attributes:
        kind: "input" (it is no input any more), "missing" and "new" (nodes), "contract" (an output or input breaks it now, or
            does so no more), "schema" (it has changed; the output fits all the same), "decision" (attempts, stops, budgets),
            "output" (what a group, a validator or a called node makes of it), "status".
        at: the position, and the place in groups: "2", "2.0"; "" for the whole run.
    """

    kind: Kind
    at: str
    node_id: str
    message: str

    def __str__(self) -> str:
        where = f"{self.at} {self.node_id}: " if self.at else ""
        return f"{self.kind}: {where}{self.message}"


@dataclass(frozen=True, slots=True)
class Replay:
    """Result of a replay.

    Attributes:
        recorded: the run as it was.
        result: the run as it is by the code of today; of all attempts that were handed on or made.
        differences: empty if nothing has changed.
        stopped: why it could not be followed to its end, in words; None if it was.
        called: the nodes that were called, with ``start_at``.
    """

    recorded: RecordedRun
    result: ExecutionResult
    differences: tuple[Difference, ...]
    stopped: str | None = None
    called: tuple[str, ...] = ()

    @property
    def status(self) -> RunStatus:
        """Status of the run by the current code."""
        return self.result.status

    def assert_same(self) -> None:
        """Raise AssertionError that lists every difference, if there is one."""
        if self.differences:
            lines = "\n".join(f"  {difference}" for difference in self.differences)
            raise AssertionError(f"run {self.recorded.run_id!r} behaves differently now:\n{lines}")


async def replay(
    recorded: RecordedRun,
    pipeline: Pipeline | Iterable[Any],
    *,
    runner: StromaRunner | None = None,
    start_at: str | None = None,
    state: Any = None,
) -> Replay:
    """Run a recorded run again by the current code, with the recorded outputs instead of calls.

    Contracts, validators, classification, decisions to retry or to stop, repairs, the arithmetic of budgets, groups and the
    order of nodes are those of today; the usage and the cost of each attempt are those of then. Nothing waits, no hook is
    told, and nothing is kept. Maps whose items or outputs are outside of the state are handed on as a whole.

    ``runner``: whose contracts and config count; that of the pipeline otherwise. ``start_at``: from this node on, nodes are
    called. ``state``: what this node is given in place of what it was given then, or what the whole run is, as a model or
    plain data.

    A journal keeps the message and the class of a failure, not the exception: classifiers of today are asked about one with
    that message, and where none answers it is of the class it was. Nor does it keep for how long a server asked to wait: a
    run that stopped after a failure of that kind stops here, too.

    Raises ValueError for an unknown ``start_at``, TypeError for a ``state`` where a group made it.
    """
    nodes = list(pipeline.nodes if isinstance(pipeline, Pipeline) else pipeline)
    records = [find_node(node) for node in nodes]
    runner = runner or StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()))
    first = _position(records, start_at)
    redact = runner._config_of(pipeline).redact
    error_text = recorded.error if redact is None else recorded.redacted(redact).error
    tape = _Tape(recorded, records, runner.registry, first, error_text)
    if state is not None and first != 0 and start_at is not None:
        tape.edit(first - 1, state)
    initial = state if state is not None and (start_at is None or first == 0) else None
    initial_input, wrong = _input(records, runner.registry, recorded, initial)
    if wrong is not None and redact is not None:
        wrong = without_values(wrong)
    differences = [] if wrong is None else [Difference("input", "", "", wrong)]
    name = pipeline.name if isinstance(pipeline, Pipeline) else recorded.pipeline
    result, store = await _run(
        Pipeline(name, nodes), runner, pipeline, tape, initial_input, calls=start_at is not None
    )
    attempts = [
        one for one in store.attempts(result.run_id) if (one.position, one.branch) not in tape.unanswered
    ]
    differences += tape.changed()
    differences += _compare_attempts(tape, attempts, edited=state is not None, redact=redact)
    differences += tape.differences
    if tape.stopped is None and recorded.status in _ENDED and _ends(recorded.status) != _ends(result.status):
        differences.append(Difference("status", "", "", f"{recorded.status} -> {result.status}"))
    return Replay(recorded, result, tuple(dict.fromkeys(differences)), tape.stopped, tuple(tape.called))


def replay_sync(recorded: RecordedRun, pipeline: Pipeline | Iterable[Any], **options: Any) -> Replay:
    """Call :func:`replay` without an event loop. Raises RuntimeError if one is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(replay(recorded, pipeline, **options))
    raise RuntimeError("an event loop is running here; use `await replay(...)` instead of replay_sync(...)")


async def _run(
    named: Pipeline, runner: StromaRunner, initial_input: Any, tape: _Tape, state: BaseModel, *, calls: bool
) -> tuple[ExecutionResult, AsyncInMemoryStore]:
    config = runner._config_of(initial_input)
    context = config.context
    with contextlib.suppress(Exception):  # It holds a client, say.
        context = copy.deepcopy(context)
    changed: dict[str, Any] = {
        "run_id": new_run_id(), "resume": False, "resume_from": None, "if_exists": "restart", "hooks": NodeHooks(),
        "hook_delivery": "at_most_once", "shared_budgets": (), "check": False, "context": context,
    }  # fmt: skip
    if not calls:
        changed |= {"limits": {}, "node_limits": {}, "breaker": None, "node_timeouts": {}}
    config = config.model_copy(update=changed)
    store = AsyncInMemoryStore()
    twin = StromaRunner(runner.registry, CheckpointManager(store), config)
    clock = contextlib.nullcontext() if calls or FakeClock._active is not None else FakeClock()
    PROBES.append(tape)
    try:
        with clock:
            return await twin.run(named, state), store
    finally:
        PROBES.remove(tape)


def _ends(status: str) -> str:
    return "COMPLETED" if status == "RESUMED" else str(status)


def _position(records: Sequence[Node | Group], start_at: str | None) -> int:
    if start_at is None:
        return len(records)
    for position, node in enumerate(records):
        if node.node_id == start_at:
            return position
    known = ", ".join(repr(node.node_id) for node in records) or "none"
    raise ValueError(f"start_at={start_at!r} is not a node of this pipeline; its nodes are {known}")


def _input(
    records: Sequence[Node | Group], registry: ContractRegistry, recorded: RecordedRun, state: Any
) -> tuple[BaseModel, str | None]:
    """Return the input of the run, and its problem if the first node rejects it."""
    if isinstance(state, BaseModel):
        return state, None
    first = records[0] if records else None
    contract = registry.find(first.node_id) or first.contract if isinstance(first, Node) else None
    raw = Schema.decode_raw(recorded.input) if state is None else state
    wrong = None
    if contract is not None:
        schema = schema_of(contract.input_schema)
        try:
            return (schema.decode(recorded.input) if state is None else schema.validate(state)), None
        except Exception as error:
            wrong = str(as_violation(contract.node_id, "input", raw, error, schema.model))
    return schema_of(_Open).construct(raw) if isinstance(raw, dict) else Kept(raw), wrong


# ---------------------------------------------------------------------- what was recorded


@dataclass
class _Tape(Probe):
    """Interceptor that returns recorded outputs instead of calling nodes."""

    recorded: RecordedRun
    nodes: Sequence[Node | Group]
    registry: ContractRegistry
    first_called: int
    #: Why the run stopped, as it may be told.
    error: str | None
    #: By position today, the position then; None for a node that is new.
    then: dict[int, int | None] = field(default_factory=dict)
    places: dict[tuple[int, str], list[RecordedAttempt]] = field(default_factory=dict)
    edited: dict[int, Any] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    unanswered: set[tuple[int, str]] = field(default_factory=set)
    called: list[str] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        for one in self.recorded.attempts:
            if not is_failed_item(one):
                self.places.setdefault((one.position, one.branch), []).append(one)
        at: dict[tuple[str, int], int] = {}
        counts: Counter[str] = Counter()
        for position, branch in sorted(self.places):
            node_id = self.places[position, branch][0].node_id
            if not branch:
                at[node_id, counts[node_id]] = position
                counts[node_id] += 1
        occurrences: Counter[str] = Counter()
        for position, node in enumerate(self.nodes):
            self.then[position] = at.get((node.node_id, occurrences[node.node_id]))
            occurrences[node.node_id] += 1

    def edit(self, position: int, state: Any) -> None:
        node = self.nodes[position]
        if isinstance(node, Group):
            raise TypeError(
                f"state= cannot replace the output of {node.node_id!r}: a group's output is built from its children's; "
                "start at the group, or at a later node"
            )
        self.edited[position] = state

    def _calls(self, run: NodeExecution) -> bool:
        return run.position >= self.first_called

    def _at(self, run: NodeExecution) -> list[RecordedAttempt] | None:
        """Return the attempts at a place; None if the recorded run has no such node."""
        then = self.then[run.position]
        if then is None:
            return None if self._is_new(run.position) else []
        differences = self.places.get((then, run.branch), [])
        return None if differences and differences[0].node_id != run.node_id else differences

    def _is_new(self, position: int) -> bool:
        """Return True if a node that the recorded run did not reach was probably not in its pipeline."""
        matched = {then for then in self.then.values() if then is not None}
        came_to = {at for at, branch in self.places if not branch}
        later = any(then is not None for at, then in self.then.items() if at > position)
        return later or came_to != matched or _ends(self.recorded.status) == "COMPLETED"

    # ------------------------------------------------------------------ as a probe

    async def call(self, run: NodeExecution, node: Node | Group, call: Call, state: BaseModel) -> Any:
        if self._calls(run):
            if type(node) is Node:
                self.called.append(run.node_id)
            return await call(state)
        attempts = self._at(run)
        if isinstance(node, Group) and not (
            node.is_map and (node.has_external_items or not node.output_field)
        ):
            # Its children are compared one by one.
            output = await call(state)
            self._add_latency(run, attempts)
            return output
        one = await self._answer(run, attempts)
        self._add_latency(run, attempts)
        usage = AttemptUsage(one.tokens, one.output_tokens, one.cost_usd, one.model)
        if usage != AttemptUsage():
            run.counted = usage
        if run.position in self.edited and not run.branch:
            return self.edited[run.position]
        if one.output is None:
            raise _failure_of(one)
        return Schema.decode_raw(one.output) if isinstance(node, Group) else self._read(run, node, one)

    async def _answer(self, run: NodeExecution, attempts: list[RecordedAttempt] | None) -> RecordedAttempt:
        """Return the recorded result of an attempt. Raises _NoAnswer."""
        if attempts is None:
            self._stop(run, "new", "the run had no such node, so nothing can be handed on")
        if run.attempt > len(attempts):
            if attempts:
                self._stop(
                    run,
                    "decision",
                    f"it is tried again (attempt {run.attempt}), where the run stopped trying",
                )
            elif self.recorded.status in _ENDED:
                if _reached(self.recorded, self.then[run.position]):
                    self._stop(run, "decision", "it is called, where the run had not called it")
                why = f": {self.error}" if self.error else ""
                self._stop(
                    run, "decision", f"it is called, where the run had stopped as {self.recorded.status}{why}"
                )
            self._stop(run, None, "the run came no further")
        one = attempts[run.attempt - 1]
        if one.outcome == "cancelled":
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(
                    _FOR_EVER
                )  # Whatever cancelled it then does so now, or there is no answer.
            self._stop(run, "decision", "nothing cancels it now, and the run has no answer of it")
        if one.reason == "contract" and one.output is None and "(input)" in (one.message or ""):
            self._stop(run, "contract", "its input broke its contract, and is taken now")
        return one

    def _stop(self, run: NodeExecution, kind: Kind | None, why: str) -> NoReturn:
        place = f"{run.position}.{run.branch}" if run.branch else str(run.position)
        if kind is not None:
            self.differences.append(Difference(kind, place, run.node_id, why))
        self.stopped = self.stopped or f"at {place} {run.node_id}: {why}"
        around: NodeExecution | None = run
        while around is not None:
            self.unanswered.add((around.position, around.branch))
            around = around.parent
        raise _NoAnswer(why)

    def _add_latency(self, run: NodeExecution, attempts: list[RecordedAttempt] | None) -> None:
        """Return the recorded duration, for latency budgets."""
        if attempts and not run.branch and run.attempt <= len(attempts):
            run.ctx.cost_tracker.latency_ns += int(attempts[run.attempt - 1].duration_ms * 1e6)

    def _read(self, run: NodeExecution, node: Node | Group, one: RecordedAttempt) -> Any:
        """Decode an output by the current schema. Raises ContractViolation if it does not fit."""
        contract = self.registry.find(node.node_id) or (node.contract if isinstance(node, Node) else None)
        schema = schema_of(Kept if contract is None else contract.output_schema)
        upcast = None if contract is None or one.contract == schema.fingerprint else contract.upcast
        try:
            model = read_output(schema, one.committed(), upcast)
        except Exception as error:
            assert one.output is not None
            raise as_violation(
                run.node_id, "output", Schema.decode_raw(one.output), error, schema.model
            ) from error
        return model.root if isinstance(model, Kept) else model

    def diagnosed(self, run: NodeExecution, failure: Failure) -> Failure:
        error = failure.exception
        if isinstance(error, _NoAnswer):
            return replace(failure, failure_class=FailureClass.TERMINAL)
        attempts = None if self._calls(run) else self._at(run)
        if not isinstance(error, _AsRecorded) or not attempts or run.attempt > len(attempts):
            return failure
        one = attempts[run.attempt - 1]
        # Ask the current classifiers first.
        plain = diagnose(error, NodeContext(run.node_id, run.attempt, run.run_id))
        if failure.failure_class is not plain.failure_class:
            return failure
        retry_after = None
        if (
            run.attempt == len(attempts)
            and one.reason in _MAY_SAY_WHEN
            and self.recorded.status == RunStatus.PARTIAL
        ):
            retry_after = math.inf
        kind = FailureClass(one.failure_class) if one.failure_class else failure.failure_class
        return replace(failure, failure_class=kind, reason=one.reason, retry_after_seconds=retry_after)

    # ------------------------------------------------------------------ what has changed by itself

    def changed(self) -> list[Difference]:
        """Return differences for removed nodes and changed schemas."""
        differences: list[Difference] = []
        known = {then for then in self.then.values() if then is not None}
        for (position, branch), attempts in sorted(self.places.items()):
            one = attempts[-1]
            if not branch and position not in known:
                differences.append(
                    Difference("missing", str(position), one.node_id, "the pipeline has it no more")
                )
        differences += self._out_of_order()
        for position, node in enumerate(self.nodes):
            then = self.then[position]
            for branch, inner in _nodes_in(node):
                recorded_attempts = self.places.get((then, branch), []) if then is not None else []
                one_ = recorded_attempts[-1] if recorded_attempts else None
                if one_ is None or one_.output is None or one_.node_id != inner.node_id or not one_.contract:
                    continue
                contract = self.registry.find(inner.node_id) or inner.contract
                if contract is not None and contract.upcast is not None:
                    continue
                schema = schema_of(Kept if contract is None else contract.output_schema)
                if schema.fingerprint != one_.contract:
                    at = f"{position}.{branch}" if branch else str(position)
                    differences.append(
                        Difference("schema", at, inner.node_id, f"{schema.model.__name__} is another one now")
                    )
        return differences

    def _out_of_order(self) -> Iterable[Difference]:
        """Return nodes that preceded another one in the recording and follow it now."""
        furthest: int | None = None  # Of the nodes so far, the position today of the one that came last then.
        for position, node in enumerate(self.nodes):
            then = self.then[position]
            if then is None:
                continue
            last = None if furthest is None else self.then[furthest]
            if furthest is None or last is None or then > last:
                furthest = position
                continue
            other = self.nodes[furthest].node_id
            yield Difference(
                "decision", str(position), node.node_id, f"it comes after {other!r} now, and came before it"
            )


def _nodes_in(node: Node | Group, branch: str = "") -> Iterable[tuple[str, Node]]:
    """Return the nodes at one position with their places; of a map, its first item."""
    if isinstance(node, Node):
        yield branch, node
        return
    for index, child in enumerate(node.children):
        inside = f"{branch}.{index}" if branch else str(index)
        yield from _nodes_in(child, inside)


def _reached(recorded: RecordedRun, position: int | None) -> bool:
    return position is not None and any(one.position > position for one in recorded.attempts)


def _failure_of(one: RecordedAttempt) -> Exception:
    """Return an exception that the current code classifies like the recorded failure."""
    message = one.message or one.outcome
    if one.outcome == "suspended":
        return Suspend(message)
    if one.reason == "contract":
        return ContractViolation(one.node_id, "output", {}, [])
    if one.reason == "budget":
        return BudgetExceeded("latency", 0, one.duration_ms, one.node_id)
    return UsageError(message) if one.reason == "usage" else _AsRecorded(message)


# ---------------------------------------------------------------------- differences


def _compare_attempts(
    tape: _Tape, attempts: list[AttemptRecord], *, edited: bool, redact: Redact | None
) -> list[Difference]:
    """Return the differences at places that both runs have."""
    history = History(None, redact)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def payload(one: AttemptRecord) -> Payload:
        return Payload(history.redact_state(_payload(one).value))

    def text(pair: NodeDiff) -> str:
        if redact is None:
            return _describe(pair)
        occurrences = compare(pair.a or (), pair.b or (), payload)[0]
        return _describe(occurrences) if not occurrences.same else "it differs in what is redacted"

    now = {then: position for position, then in tape.then.items() if then is not None}
    places = {(one.position, one.branch) for one in attempts}
    then = [
        one.as_record(now[one.position])
        for one in tape.recorded.attempts
        if one.position in now and (now[one.position], one.branch) in places
    ]
    differences: list[Difference] = []
    for pair in compare(then, attempts, _payload):
        if pair.same or pair.a is None or pair.b is None:
            continue
        last = pair.b[-1]
        at = f"{last.position}.{last.branch}" if last.branch else str(last.position)
        if edited and last.position in tape.edited:
            continue
        differences.append(_difference(pair, at, text(pair), hidden=redact is not None))
    return differences


def _payload(one: AttemptRecord) -> Payload:
    return Payload(None if one.output is None else jsonable(Schema.decode_raw(one.output)))


def _describe(pair: NodeDiff) -> str:
    """Describe a difference as text."""
    differences = [change._replace(path=f"output.{change.path}".rstrip(".")) for change in pair.output]
    text = [_change(change) for change in [*pair.facts, *differences[:_MAX_CHANGES]]]
    return "; ".join(text) + (
        f"; and {len(differences) - _MAX_CHANGES} more" if len(differences) > _MAX_CHANGES else ""
    )


def _change(change: Change) -> str:
    a, b = (json.dumps(value, ensure_ascii=False) for value in (change.a, change.b))
    if change.kind == "added":
        return f"{change.path} is new: {b}"
    return f"{change.path} is gone: {a}" if change.kind == "removed" else f"{change.path}: {a} -> {b}"


def _difference(pair: NodeDiff, at: str, text: str, *, hidden: bool) -> Difference:
    assert pair.a is not None
    assert pair.b is not None
    then, last = pair.a[-1], pair.b[-1]
    kind: Kind = "decision" if pair.facts else "output"
    if "contract" in (then.reason, last.reason) and then.reason != last.reason:
        kind = "contract"
        broken = without_values(last.message or "") if hidden else last.message
        text = f"{broken}" if last.reason == "contract" else f"it breaks its contract no more; {text}"
    return Difference(kind, at, last.node_id, text)
