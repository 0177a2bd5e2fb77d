"""replay: run a recorded run again by the current code, with the recorded outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from stroma.checkpoint import AsyncInMemoryStore, CheckpointManager
from stroma.checkpoint.history.bars import place_of
from stroma.checkpoint.history.comparison import Change, NodeDiff, compare
from stroma.checkpoint.history.redaction import Payload, redact_value
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.records import AttemptRecord
from stroma.contracts.codec import decode_raw
from stroma.contracts.contract import ContractRegistry, as_violation
from stroma.contracts.node import Group, Node, contract_of_node, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.context import INTERCEPTORS
from stroma.engine.restore import node_at
from stroma.hooks.sets import NodeHooks
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.testing.blocking import blocking_form_of
from stroma.testing.clock import FakeClock
from stroma.testing.recording import RecordedRun
from stroma.testing.replay_tape import ENDED, Difference, Kind, Tape, settled_status
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact
from stroma.trace.result import ExecutionResult, RunStatus
from stroma.trace.story import without_values

#: Changed fields of one output that a message lists.
_MAX_CHANGES: Final = 5


class _Open(BaseModel):
    """Input model for a pipeline whose first node has none."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


@dataclass(frozen=True, slots=True)
class Replay:
    """Result of a replay.

    Attributes:
        recorded: the recorded run.
        result: result of the current code, of all attempts that were replayed.
        differences: differences between the two, also those that only an upcast made.
        stopped: reason why the replay stopped early; None if it did not.
    """

    recorded: RecordedRun
    result: ExecutionResult
    differences: tuple[Difference, ...]
    stopped: str | None = None

    @property
    def status(self) -> RunStatus:
        """Status of the run by the current code."""
        return self.result.status

    @property
    def is_same(self) -> bool:
        """True if the code behaves as it did: every difference is an upcast's."""
        return all(one.kind == "upcast" for one in self.differences)

    def assert_same(self) -> None:
        """Raise AssertionError that lists every difference, if the code behaves differently."""
        if not self.is_same:
            lines = "\n".join(f"  {difference}" for difference in self.differences)
            raise AssertionError(f"run {self.recorded.run_id!r} behaves differently now:\n{lines}")


async def replay(
    recorded: RecordedRun, pipeline: Pipeline | Iterable[Any], *, runner: StromaRunner[Any] | None = None
) -> Replay:
    """Run a recorded run again by the current code, with the recorded outputs instead of calls.

    Contracts, validators, classification, decisions to retry or to stop, repairs, the arithmetic of budgets,
    groups and the order of nodes are those of the current code; the usage and the cost of each attempt are
    the recorded ones. Nothing waits, no hook is called, and nothing is stored. Maps whose items or outputs
    are outside of the state are replayed as a whole.

    ``runner``: source of contracts and config; that of the pipeline by default.

    A journal has the message and the class of a failure, not the exception: the current classifiers get one
    with that message, and where none returns a class the recorded one is used. The retry delay of a server is
    not recorded: a run that stopped after a failure of that kind stops here, too.
    """
    nodes = list(pipeline.nodes if isinstance(pipeline, Pipeline) else pipeline)
    records = [find_node(node) for node in nodes]
    runner = runner or StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()))
    redact = runner._config_of(pipeline).redact
    tape = Tape(recorded, records, runner.registry)
    initial_input, wrong = _input(records, runner.registry, recorded)
    if wrong is not None and redact is not None:
        wrong = without_values(wrong)
    differences = [] if wrong is None else [Difference("input", "", "", wrong)]
    name = pipeline.name if isinstance(pipeline, Pipeline) else recorded.pipeline
    result, store = await _run(
        Pipeline(name, nodes, version=recorded.version), runner, pipeline, tape, initial_input
    )
    if result.failure is not None and result.failure.reason == "changed":
        tape.stopped = result.failure.message
        tape.differences.append(Difference("decision", "", "", tape.stopped))
    attempts = [
        one
        for one in store.attempts(result.run_id)
        if one.attempt < tape.unanswered.get((one.position, one.branch), one.attempt + 1)
    ]
    differences += tape.changed()
    differences += _compare_attempts(tape, attempts, redact)
    differences += tape.differences
    if (
        tape.stopped is None
        and recorded.status in ENDED
        and settled_status(recorded.status) != settled_status(result.status)
    ):
        differences.append(Difference("status", "", "", f"{recorded.status} -> {result.status}"))
    return Replay(recorded, result, tuple(dict.fromkeys(differences)), tape.stopped)


@blocking_form_of(replay)
def replay_sync() -> None:
    """Call :func:`replay`, with its arguments, without an event loop.

    Raises RuntimeError if one is running.
    """


async def _run(
    pipeline: Pipeline, runner: StromaRunner[Any], configured: Any, tape: Tape, state: BaseModel
) -> tuple[ExecutionResult, AsyncInMemoryStore]:
    """Run a pipeline with the tape; ``configured``: the pipeline or nodes whose config counts."""
    changed: dict[str, Any] = {"hooks": NodeHooks(), "hook_delivery": "at_most_once", "check": False}
    changed |= {"limits": {}, "node_limits": {}, "breaker": None, "node_timeouts": {}}
    changed["inline_wait_seconds"] = 0  # A wait without a recorded end stays open.
    store = AsyncInMemoryStore()
    twin = runner._twin(configured, store, run_id=tape.recorded.run_id, resume=False, **changed)
    clock = contextlib.nullcontext() if FakeClock._active is not None else FakeClock()
    INTERCEPTORS.append(tape)
    try:
        with clock, tape.recorded_time():
            return await twin.run(pipeline, state), store
    finally:
        INTERCEPTORS.remove(tape)


def _input(
    records: Sequence[Node | Group], registry: ContractRegistry, recorded: RecordedRun
) -> tuple[BaseModel, str | None]:
    """Return the input of the run, and its problem if the first node rejects it."""
    first = records[0] if records else None
    contract = contract_of_node(first, registry)
    raw = decode_raw(recorded.input)
    wrong = None
    if contract is not None:
        schema = schema_of(contract.input_schema)
        try:
            return schema.decode(recorded.input), None
        except Exception as error:
            wrong = str(as_violation(contract.node_id, "input", raw, error, schema.model))
    return schema_of(_Open).construct(raw) if isinstance(raw, dict) else UntypedState(raw), wrong


# ---------------------------------------------------------------------- differences


def _compare_attempts(tape: Tape, attempts: list[AttemptRecord], redact: Redact | None) -> list[Difference]:
    """Return the differences at places that both runs have."""

    def payload(one: AttemptRecord) -> Payload:
        return Payload(redact_value(redact, _payload(one).value))

    def text(pair: NodeDiff) -> str:
        if redact is None:
            return _describe(pair)
        occurrences = compare(pair.a or (), pair.b or (), payload)[0]
        return _describe(occurrences) if not occurrences.same else "it differs in what is redacted"

    # Places now by those of then.
    places = {
        (tape.then[one.position], tape.source_of(one.position, one.branch)): (one.position, one.branch)
        for one in attempts
    }
    then = [
        one.as_record(*places[one.position, one.branch])
        for one in tape.recorded.attempts
        if (one.position, one.branch) in places
    ]
    then, attempts = _begun_in_both(then, attempts), _begun_in_both(attempts, then)
    differences: list[Difference] = []
    for pair in compare(then, attempts, _payload):
        if pair.same or pair.a is None or pair.b is None:
            continue
        last = pair.b[-1]
        at = place_of(last)
        if is_called(last.branch) and "cancelled" in (last.outcome, pair.a[-1].outcome):
            continue  # The order of the last calls of a flow that failed is not recorded.
        node = None if is_called(last.branch) else node_at(tape.nodes, last.position, last.branch)[0]
        if isinstance(node, Group) and (last.position - 1, "") in tape.upcasts:
            tape.upcasts.add((last.position, last.branch))  # It hands its input on.
        is_upcast = (last.position, last.branch) in tape.upcasts
        differences.append(_difference(pair, at, text(pair), is_upcast=is_upcast))
    return differences


def _begun_in_both(attempts: list[AttemptRecord], others: list[AttemptRecord]) -> list[AttemptRecord]:
    """Return attempts without those that were cancelled at once, before the other run began them."""
    places = {(one.position, one.branch, one.attempt) for one in others}
    return [
        one
        for one in attempts
        if one.outcome != "cancelled" or (one.position, one.branch, one.attempt) in places
    ]


def _payload(one: AttemptRecord) -> Payload:
    return Payload(None if one.output is None else jsonable(decode_raw(one.output)))


def _describe(pair: NodeDiff) -> str:
    differences = [change._replace(path=f"output.{change.path}".rstrip(".")) for change in pair.output]
    text = [_change(change) for change in [*pair.facts, *differences[:_MAX_CHANGES]]]
    return "; ".join(text) + (
        f"; and {len(differences) - _MAX_CHANGES} more" if len(differences) > _MAX_CHANGES else ""
    )


def _change(change: Change) -> str:
    a, b = change.texts()
    if change.kind == "added":
        return f"{change.path} is new: {b}"
    return f"{change.path} is gone: {a}" if change.kind == "removed" else f"{change.path}: {a} -> {b}"


def _difference(pair: NodeDiff, at: str, text: str, *, is_upcast: bool) -> Difference:
    assert pair.a is not None
    assert pair.b is not None
    then, last = pair.a[-1], pair.b[-1]
    kind: Kind = "decision" if pair.facts else "upcast" if is_upcast else "output"
    if "contract" in (then.reason, last.reason) and then.reason != last.reason:
        kind = "contract"
        text = f"{last.message}" if last.reason == "contract" else f"it breaks its contract no more; {text}"
    return Difference(kind, at, last.node_id, text)
