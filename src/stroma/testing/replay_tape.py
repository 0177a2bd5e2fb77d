"""Tape: the recorded outputs of a run, returned by place instead of calls of nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Literal, NoReturn

from pydantic import BaseModel

from stroma._utils.text import pluralize
from stroma.checkpoint import Session, Waiting
from stroma.checkpoint.identity import is_called, with_outer
from stroma.contracts.codec import decode_raw
from stroma.contracts.contract import ContractRegistry, ContractViolation, as_violation
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.cost.budget import BudgetExceeded
from stroma.cost.usage import UsageError
from stroma.engine.context import Call, Interceptor, ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.restore import output_schema, read_output, schema_difference
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed, Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose
from stroma.runner.flows.suspension import TIME_SHIFT_MS, now_ms
from stroma.testing.recording import RecordedAttempt, RecordedRun, is_failed_item
from stroma.trace.events import AttemptUsage, place_text
from stroma.trace.result import RunStatus
from stroma.trace.story import violated_side

Kind = Literal["input", "missing", "new", "contract", "schema", "decision", "output", "upcast", "status"]
#: Longer than any wait that ends.
_FOR_EVER: Final = 1e9
#: The same beside a flow, which looks for messages four times a second.
_IN_FLOW: Final = 1800.0
#: Message of a server with a retry delay; the journal does not store the delay.
_MAY_SAY_WHEN: Final = ("rate_limit", "overloaded", "server_error", "timeout", "connection")
ENDED: Final = ("COMPLETED", "RESUMED", "FAILED", "PARTIAL", "SUSPENDED")


class _NoAnswer(Exception):
    """No recorded output exists for a call."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference in behaviour between the recording and the current code.

    Attributes:
        kind: "input" (rejected now), "missing" and "new" (nodes), "contract" (an output or input breaks it
            now, or no longer does), "schema" (it has changed, and the output still fits), "decision"
            (attempts, stops, budgets), "output" (changed by a group or a validator), "upcast" (an output that
            only its upcast changed, which is not another behaviour), "status".
        at: position and place in groups: "2", "2.0"; "" for the whole run.
    """

    kind: Kind
    at: str
    node_id: str
    message: str

    def __str__(self) -> str:
        where = f"{self.at} {self.node_id}: " if self.at else ""
        return f"{self.kind}: {where}{self.message}"


def settled_status(status: str) -> str:
    """Return a status as replays compare it: RESUMED counts as COMPLETED."""
    return "COMPLETED" if status == "RESUMED" else str(status)


@dataclass
class Tape(Interceptor):
    """Interceptor that returns recorded outputs instead of calling nodes."""

    recorded: RecordedRun
    nodes: Sequence[Node | Group]
    registry: ContractRegistry
    #: Recorded position by current position; None for a new node.
    then: dict[int, int | None] = field(default_factory=dict)
    places: dict[tuple[int, str], list[RecordedAttempt]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    #: First attempt without a recorded answer, by place.
    unanswered: dict[tuple[int, str], int] = field(default_factory=dict)
    #: Calls of flows whose ends are recorded events, by place, and the branch of the output that each got.
    events: dict[tuple[int, str], str] = field(default_factory=dict)
    #: Branch of the last recorded call by position and plain branch.
    last_branches: dict[tuple[int, str], str] = field(default_factory=dict)
    #: Places whose output an upcast has read, and those of the groups around them.
    upcasts: set[tuple[int, str]] = field(default_factory=set)
    #: Branches that are about to fail, by the place of their group, and an event that lets them.
    failing: dict[tuple[int, str], tuple[set[str], asyncio.Event]] = field(default_factory=dict)
    stopped: str | None = None

    def __post_init__(self) -> None:
        for one in self.recorded.attempts:
            if not is_failed_item(one):
                self.places.setdefault((one.position, one.branch), []).append(one)
                self.last_branches[one.position, _plain(one.branch)] = one.branch
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
        self._find_unfinished()

    def _find_unfinished(self) -> None:
        """Find the group or flow in which the recorded run stopped: only its parts have attempts."""
        last = max((position for position, _ in self.places), default=-1)
        events = [int(key.partition(":")[0]) for key in self.recorded.events]
        last = max([last, *events])
        if last < 0 or (last, "") in self.places:
            return
        before = max((now for now, then in self.then.items() if then is not None), default=-1)
        for position in range(before + 1, len(self.nodes)):
            if not isinstance(self.nodes[position], Node) or isinstance(self.nodes[position], FlowNode):
                self.then[position] = last
                return

    # ------------------------------------------------------------------ flows

    def opened(self, ctx: ReliabilityContext, session: Session) -> Session:
        """Give flows their recorded events: a resume repeats them, and takes the outputs from the tape."""
        position_of = {str(then): position for position, then in self.then.items() if then is not None}
        notes: dict[str, bytes] = {}
        for key, value in self.recorded.events.items():
            at, _, rest = key.partition(":")
            if at in position_of:
                kind, _, key = rest.partition(":")
                if kind == "e":
                    branch, time_ms, source = value
                    self.events[position_of[at], _plain(branch)] = source or branch
                    value = [_plain(branch), time_ms, ""]
                elif kind == "n":
                    value = [value[0], sorted(map(_plain, value[1]))]
                data = bytes.fromhex(str(value)) if kind == "seed" else json.dumps(value).encode()
                notes[f"{position_of[at]}:{kind}:{_plain(key)}"] = data
        answers: dict[tuple[int, str], Waiting] = {}
        for key, payload in self.recorded.answers.items():
            at, _, branch = key.partition(":")
            if at in position_of:
                place = position_of[at], _plain(branch)
                answers[place] = Waiting(*place, "", "", "", payload)
        session.notes, session.waiting = notes, answers
        return session

    @contextlib.contextmanager
    def recorded_time(self) -> Iterator[None]:
        """Let flows run at the time of their last event, so that what was asleep stays asleep."""
        times = [
            value if key.partition(":")[2].startswith("v:") else value[1]
            for key, value in self.recorded.events.items()
            if key.partition(":")[2].startswith(("e:", "v:"))
        ]
        token = TIME_SHIFT_MS.set(max(times, default=now_ms()) - now_ms())
        try:
            yield
        finally:
            TIME_SHIFT_MS.reset(token)

    def _at(self, run: RunningNode) -> list[RecordedAttempt] | None:
        """Return the attempts at a place; None if the recorded run has no such node."""
        then = self.then[run.position]
        if then is None:
            return None if self._is_new(run.position) else []
        attempts = self.places.get((then, self.source_of(run.position, run.branch)), [])
        return None if attempts and attempts[0].node_id != run.node_id else attempts

    def source_of(self, position: int, branch: str) -> str:
        """Return the branch of the recorded attempts of a call, which may have got the output of another."""
        for outer in with_outer(branch):
            source = self.events.get((position, outer))
            if source is not None:
                return source + branch[len(outer) :]
        then = self.then[position]
        return branch if then is None else self.last_branches.get((then, branch), branch)

    def _is_new(self, position: int) -> bool:
        """Return True if a node that the recorded run did not reach was probably not in its pipeline."""
        matched = {then for then in self.then.values() if then is not None}
        came_to = {at for at, branch in self.places if not branch}
        later = any(then is not None for at, then in self.then.items() if at > position)
        return later or came_to != matched or settled_status(self.recorded.status) == "COMPLETED"

    # ------------------------------------------------------------------ as an interceptor

    async def call(self, run: RunningNode, node: Node | Group, call: Call, state: BaseModel) -> Any:
        attempts = self._at(run)
        if isinstance(node, Group) and not (
            node.is_map and (node.has_external_items or not node.output_field)
        ):
            # Its children are compared one by one.
            try:
                output = await call(state)
            except Exception:
                await self._outlast_siblings(run, attempts or ())
                raise
            if _is_cancelled(run, attempts or ()):
                await self._wait(run)
            self._add_latency(run, attempts)
            return output
        one = await self._answer(run, attempts)
        self._add_latency(run, attempts)
        usage = AttemptUsage(one.tokens, one.output_tokens, one.cost_usd, one.model)
        if usage != AttemptUsage():
            run.counted = usage
        if one.output is None:
            await self._outlast_siblings(run, attempts or ())
            raise _failure_of(one)
        return self._read(run, node, one, state)

    async def _answer(self, run: RunningNode, attempts: list[RecordedAttempt] | None) -> RecordedAttempt:
        """Return the recorded result of an attempt. Raises _NoAnswer."""
        if attempts is None:
            self._stop(run, "new", "the run had no such node, so nothing can be handed on")
        is_live = self._is_live(run)
        is_cancelled = _is_cancelled(run, attempts)
        if is_cancelled or (run.attempt > len(attempts) and (is_live or self._is_in_stopped_group(run))):
            # The cause of the cancellation cancels it again, or there is no recorded output.
            await self._wait(run)
        elif is_live:  # Its siblings end before it if they did.
            await asyncio.sleep(attempts[run.attempt - 1].duration_ms / 1000)
        if run.attempt > len(attempts):
            if attempts:
                count = pluralize(len(attempts), "attempt")
                self._stop(run, "decision", f"it is tried again, where the run made {count}")
            elif self.recorded.status in ENDED:
                if _reached(self.recorded, self.then[run.position]):
                    self._stop(run, "decision", "it is called, where the run had not called it")
                why = f": {self.recorded.error}" if self.recorded.error else ""
                self._stop(
                    run, "decision", f"it is called, where the run had stopped as {self.recorded.status}{why}"
                )
            self._stop(run, None, "the run came no further")
        one = attempts[run.attempt - 1]
        if is_cancelled and self._is_cut_off(run):
            self._stop(run, None, "the run came no further")
        if is_cancelled:
            self._stop(run, "decision", "nothing cancels it now, and the run has no answer of it")
        if one.reason == "contract" and one.output is None and violated_side(one.message or "") == "input":
            self._stop(run, "contract", "its input broke its contract, and is taken now")
        return one

    async def _wait(self, run: RunningNode) -> None:
        """Wait longer than anything else that ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.sleep(_IN_FLOW if self._is_live(run) else _FOR_EVER)

    def _is_in_stopped_group(self, run: RunningNode) -> bool:
        """Return True if the innermost recorded group around a call has no output."""
        for around in islice(run.with_outer(), 1, None):
            if group := self._at(around):
                return group[-1].output is None
        return False

    def _is_cut_off(self, run: RunningNode) -> bool:
        """Return True if no group around a cancelled call has ended: the end of the run cancelled it."""
        around = [self._at(outer) for outer in islice(run.with_outer(), 1, None)]
        return self.recorded.status not in ENDED and all(
            group[-1].outcome == "cancelled" for group in around if group
        )

    async def _outlast_siblings(self, run: RunningNode, attempts: Sequence[RecordedAttempt]) -> None:
        """Wait until the siblings end that ended before this failure, or with it, stopped their group."""
        if _is_cancelled(run, attempts):  # They stopped the group before this failure did.
            await self._wait(run)
        if not self._is_in_stopped_group(run) or run.attempt != len(attempts):
            return
        then, prefix = self.then[run.position], run.branch.rpartition(".")[0]
        source = self.source_of(run.position, prefix)
        branches: dict[str, list[str]] = {"success": [], "failure": []}
        for (position, branch), recorded in self.places.items():
            before, _, index = branch.rpartition(".")
            if position == then and before == source and recorded[-1].outcome in branches:
                branches[recorded[-1].outcome].append(f"{prefix}.{index}" if prefix else index)
        failing, all_ended = self.failing.setdefault((run.position, prefix), (set(), asyncio.Event()))
        failing.add(run.branch)
        for exponent in range(20):  # 17 minutes, which pass only if nothing else can run.
            pending: Any = run.ctx.session.committed(run.position, branches["success"])
            committed = await pending
            if failing.issuperset(branches["failure"]) and committed.keys() >= set(branches["success"]):
                all_ended.set()
                await asyncio.sleep(0)  # The others fail first, as they waited first.
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001 * 2**exponent):
                    await all_ended.wait()
                    return

    def _is_live(self, run: RunningNode) -> bool:
        """Return True for a call of a flow whose end is not a recorded event, and for the nodes inside it."""
        if not is_called(run.branch):
            return False
        return all((run.position, branch) not in self.events for branch in with_outer(run.branch))

    def _stop(self, run: RunningNode, kind: Kind | None, why: str) -> NoReturn:
        place = place_text(run.position, run.branch)
        if kind is not None:
            self.differences.append(Difference(kind, place, run.node_id, why))
        self.stopped = self.stopped or f"at {place} {run.node_id}: {why}"
        for around in run.with_outer():
            self.unanswered[around.position, around.branch] = run.attempt if around is run else 1
        raise _NoAnswer(why)

    def _add_latency(self, run: RunningNode, attempts: list[RecordedAttempt] | None) -> None:
        """Add the recorded duration, for latency budgets."""
        if attempts and not run.branch and run.attempt <= len(attempts):
            run.ctx.cost_tracker.latency_ns += int(attempts[run.attempt - 1].duration_ms * 1e6)

    def _read(self, run: RunningNode, node: Node | Group, one: RecordedAttempt, state: BaseModel) -> Any:
        """Decode an output by the current schema. Raises ContractViolation if it does not fit."""
        contract = contract_of_node(node, self.registry)
        schema = output_schema(run.ctx, node, state)
        upcast = None if contract is None or one.contract == schema.fingerprint else contract.upcast
        try:
            model = read_output(schema, one.committed(), upcast)
        except Exception as error:
            assert one.output is not None
            raise as_violation(run.node_id, "output", decode_raw(one.output), error, schema.model) from error
        if upcast is not None:
            self._note_upcast(run.position, run.branch)
        if isinstance(model, UntypedState):
            return model.root
        return schema.values(model) if isinstance(node, Group) else model

    def _note_upcast(self, position: int, branch: str) -> None:
        self.upcasts.add((position, branch))
        outer, _, index = branch.rpartition(".")
        if index.isdecimal():  # A group has no code that could change more than its children did.
            self._note_upcast(position, outer)

    def diagnosed(self, run: RunningNode, failure: Failure) -> Failure:
        error = failure.exception
        if isinstance(error, _NoAnswer):
            return replace(failure, failure_class=FailureClass.TERMINAL)
        attempts = self._at(run)
        if not isinstance(error, RunFailed) or not attempts or run.attempt > len(attempts):
            return failure
        one = attempts[run.attempt - 1]
        failure = replace(failure, message=str(error))  # Without its cause.
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
                contract = contract_of_node(inner, self.registry)
                if contract is not None and contract.upcast is not None:
                    continue
                schema = schema_of(UntypedState if contract is None else contract.output_schema)
                if schema.fingerprint != one_.contract:
                    at = place_text(position, branch)
                    why = schema_difference(schema, one_.committed())
                    message = f"it was recorded with another {schema.model.__name__} ({why})"
                    differences.append(Difference("schema", at, inner.node_id, message))
        return differences

    def _out_of_order(self) -> Iterable[Difference]:
        """Return nodes that preceded another one in the recording and follow it now."""
        furthest: int | None = None  # Current position of the node recorded last, among those so far.
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


def _plain(branch: str) -> str:
    """Return a branch without the numbers of calls whose place had the output of another path."""
    return ".".join(identity.partition("@")[0] for identity in branch.split("."))


def _is_cancelled(run: RunningNode, attempts: Sequence[RecordedAttempt]) -> bool:
    return run.attempt <= len(attempts) and attempts[run.attempt - 1].outcome == "cancelled"


def _reached(recorded: RecordedRun, position: int | None) -> bool:
    return position is not None and any(one.position > position for one in recorded.attempts)


def _failure_of(one: RecordedAttempt) -> Exception:
    """Return an exception that the current code classifies like the recorded failure."""
    message = one.message or one.outcome
    if one.outcome == "suspended":
        return Suspend(message)
    if one.reason == "contract":
        violation = ContractViolation(one.node_id, "output", {}, [""])
        return ContractViolation(one.node_id, "output", {}, [message.removeprefix(str(violation))])
    if one.reason == "budget":
        return BudgetExceeded("latency", 0, one.duration_ms, one.node_id)
    if one.reason == "usage":
        return UsageError(message)
    error = RunFailed.recorded(message, one.error_type)
    # An effect with a recorded failure did not happen: nobody is asked again.
    error.__cause__ = ConnectionRefusedError()
    return error
