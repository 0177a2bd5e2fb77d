"""Entries of the journal: requests to open a run, and the records of a run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from stroma.checkpoint.decoding import RecordName, decode_json
from stroma.checkpoint.errors import CheckpointNotFound
from stroma.checkpoint.identity import is_called, place_before, with_outer
from stroma.contracts.codec import is_same_data
from stroma.contracts.copying import Snapshot
from stroma.contracts.schema import Schema
from stroma.failures.classes import FailureClass
from stroma.trace.events import FAILED_ITEM
from stroma.trace.result import Question

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput

IfExists = Literal["new", "restart", "resume", "return", "error", "attach", "read", "continue"]
IfRunning = Literal["error", "attach", "take_over"]


class RunRequest(NamedTuple):
    """Request to open a run.

    Attributes:
        initial_state, schema: the input of the run and its Schema; a durable store encodes it.
        if_exists: "resume" continues the last execution. "return" does too, unless it is finished: then it
            returns it unchanged. "restart" starts a new execution; "new" too, unless the last one has not
            ended, or any one has called an effect. "error" refuses, "attach" returns the result of the owner
            that was waited for, "read" returns the outcome of a run that has ended, and refuses any other.
            "continue" is "resume" of a run that the caller has found: CheckpointNotFound if it is gone.
        if_running: what to do with a run that has another owner: "take_over" fences it off, anything else is
            RunBusy.
        lease_seconds: how long the run stays with an owner that does not renew its lease.
        ends: the caller will call end(). Otherwise another request of the same process takes the run over at
            once.
        deliver: store with each attempt that its end hooks are due, until delivered() is called.
        tags: stored with the execution, added to those of a continued one.
        discard_from: discard the commits of the continued execution from this position on.
        accept: called for each commit to restore, before anything is changed; what it raises refuses the
            request.
        lazily_loaded: (position, prefix of branches) of commits that are not restored at the start, since
            there may be very many; committed() returns them in portions.
        retry_failed: discard the failed items of maps and what was computed from them, see ItemFailure. A
            later request that continues the execution finds them discarded.
        max_recoveries: end a run as FAILED once its process died so often; None: never.
        force: continue it in spite of that, and count deaths from 0.
        due_ms: raise RunExists for a run that is not due at this time, see
            :func:`stroma.checkpoint.durable.session_open.is_due`.
        claim: token of the claim of the worker that opens it; see
            :class:`stroma.checkpoint.queue.ClaimRequest`.
        any_input: continue the run even if its input differs: the caller's own checkpoint has the first
            input.
        version: that of the pipeline, for a run that begins; "" without one.
        versions: the versions of runs that the code can continue, besides runs without one. None: it
            continues any run.
    """

    run_id: str
    pipeline: str
    initial_state: BaseModel
    schema: Schema
    if_exists: IfExists = "new"
    discard_from: int | None = None
    accept: Callable[[int, str, Committed], None] | None = None
    if_running: IfRunning = "error"
    lease_seconds: float = 30.0
    ends: bool = True
    deliver: bool = False
    lazily_loaded: tuple[tuple[int, str], ...] = ()
    retry_failed: bool = False
    tags: tuple[str, ...] = ()
    max_recoveries: int | None = None
    force: bool = False
    due_ms: int | None = None
    any_input: bool = False
    claim: str | None = None
    version: str = ""
    versions: tuple[str, ...] | None = None

    @property
    def is_automatic(self) -> bool:
        """True if no person asked to continue the run: a worker, recover(), or a wait for its result."""
        return self.due_ms is not None or self.if_exists == "attach"

    def resolve_discard(self, commits: Mapping[tuple[int, str], Committed]) -> RunRequest:
        """Return the request with ``discard_from`` after the first map that ``retry_failed`` retries."""
        if not self.retry_failed:
            return self
        failed = _maps_with_failures(commits)
        return self._replace(discard_from=min(failed)[0] + 1) if failed else self

    def discard_of(
        self, commits: Mapping[tuple[int, str], Committed], restored: Container[tuple[int, str]]
    ) -> Discard:
        """Return the commits to discard: the ones not restored, and failed items that are not loaded."""
        first = self.discard_from
        if not self.retry_failed:
            return Discard(first)
        gone = [at for at in commits if at not in restored and (first is None or at[0] < first)]
        failed = {at[0] for at in gone if commits[at].is_failed_item}
        return Discard(
            first,
            tuple(at for at in gone if not commits[at].is_failed_item),
            tuple(failed.union(position for position, _ in self.lazily_loaded)),
        )

    def accept_commits(
        self, commits: Mapping[tuple[int, str], Committed]
    ) -> Mapping[tuple[int, str], Committed]:
        """Return the commits to restore. Raises what ``accept`` raises."""
        first = self.discard_from
        restored = {at: commit for at, commit in commits.items() if first is None or at[0] < first}
        if self.retry_failed:
            restored = _without_failed(restored)
        if self.accept is not None:
            for (position, branch), commit in restored.items():
                self.accept(position, branch, commit)
        return restored


def count_failed_items(commits: Mapping[tuple[int, str], Committed]) -> dict[tuple[int, str], int]:
    """Return how many items of each map failed; of those whose items are not loaded, by their own commit."""
    loaded = Counter(
        (position, branch.rpartition(".")[0])
        for (position, branch), commit in commits.items()
        if commit.is_failed_item
    )
    return {**loaded, **{at: commit.failed_items for at, commit in commits.items() if commit.failed_items}}


def _maps_with_failures(commits: Mapping[tuple[int, str], Committed]) -> set[tuple[int, str]]:
    """Return the places of the maps with failed items. Those in flows are recorded events."""
    return {at for at in count_failed_items(commits) if not is_called(at[1])}


def _without_failed(commits: Mapping[tuple[int, str], Committed]) -> dict[tuple[int, str], Committed]:
    """Return the commits without failed items, groups around them, and what follows these in a sequence."""
    retried = _maps_with_failures(commits)
    later = {place for at in retried for place in _later_in_sequences(commits, *at)}

    def is_valid(position: int, branch: str, commit: Committed) -> bool:
        if commit.is_failed_item:
            return is_called(branch)  # Those in flows are recorded events.
        inside = f"{branch}." if branch else ""
        if any(at == position and (of == branch or of.startswith(inside)) for at, of in retried):
            return False
        return not any((position, place) in later for place in with_outer(branch))

    return {at: commit for at, commit in commits.items() if is_valid(*at, commit)}


def _later_in_sequences(
    commits: Mapping[tuple[int, str], Committed], position: int, branch: str
) -> Iterator[tuple[int, str]]:
    """Yield the places after a commit in the sequences around it."""
    followers = {
        (position, before): at
        for at, commit in commits.items()
        if at[0] == position and (before := place_before(at[1], commit.group_id)) is not None
    }
    for around in with_outer(branch):
        place = (position, around)
        while place in followers:
            place = followers[place]
            yield place


class Discard(NamedTuple):
    """Commits of an execution to discard.

    Attributes:
        first: those from this position on; None: none of these.
        places: those at these places.
        failed_at: those of failed items at these positions.
    """

    first: int | None = None
    places: tuple[tuple[int, str], ...] = ()
    failed_at: tuple[int, ...] = ()


class StepCall(NamedTuple):
    """Identity of a step of plain code in a resumed run. For a map: failed items, the input of each item.

    Attributes:
        number: 0-based number of the call of its step id; for a map, the number of failed items; for a step
            of a flow see :data:`OF_FLOW`.
        input_key: identifies the input: its stored form, or a digest if it has secrets; None if it has
            neither and so cannot be compared. For a node inside a group that is a step: a checksum of the
            group's input.
        identity: see ``stroma.checkpoint.identity``; stored with the attempts of the step.
    """

    number: int
    input_key: bytes | None
    identity: str | None = None


#: ``StepCall.number`` of a step of a flow, less the number of the event that its end is to the body, once
#: that has one.
OF_FLOW: Final = -1


def inside_of(call: StepCall | None) -> StepCall | None:
    """Return the StepCall of nodes inside a group that is a step: a checksum of the input of the step."""
    key = None if call is None else call.input_key
    if key is None:
        return None
    if key.startswith(INSIDE):
        return call
    if key.startswith(b"item"):  # A map: its items are compared one by one.
        return None
    return StepCall(0, INSIDE + hashlib.sha256(key).hexdigest().encode())


class Committed(NamedTuple):
    """One committed output.

    Attributes:
        contract: see :func:`stroma.trace.events.contract_of`.
        step: set for steps outside any pipeline, and for maps and their items.
        schema: the schema of the snapshot ``output``; None if ``output`` is in stored form.
    """

    node_id: str
    output: Snapshot
    contract: str
    step: StepCall | None = None
    schema: Schema | None = None

    @property
    def group_id(self) -> str | None:
        """The id of the group around it."""
        return self.contract.partition(":")[2] or None

    @property
    def is_failed_item(self) -> bool:
        """True for an item that failed permanently: there is no output."""
        return is_failed_item(self.contract)

    @property
    def failed_items(self) -> int:
        """Number of failed items of a map; 0 for anything else."""
        step = self.step
        if step is None or step.input_key is None or not step.input_key.startswith(OF_MAP):
            return 0
        return step.number


def is_failed_item(contract: str) -> bool:
    """Return True if the contract of a commit says that it is a failed item of a map."""
    return contract.partition(":")[0] == FAILED_ITEM


#: Prefix of a checksum in ``StepCall.input_key`` of a node inside a group that is a step.
INSIDE: Final = b"item of step "
#: Prefix of the number of items in ``StepCall.input_key`` of a committed map.
OF_MAP: Final = b"items "


def is_of_pipeline(input_key: bytes | None, number: int | None) -> bool:
    """Return True if the fields of a StepCall are of a node of a pipeline: empty, of a map or its items."""
    return number is None or (input_key is not None and input_key.startswith((b"item ", OF_MAP)))


def count_items(input_key: bytes) -> int:
    """Return the number of items of a committed map, from its ``StepCall.input_key``; 0 for anything else."""
    number = input_key.removeprefix(OF_MAP)
    return int(number) if input_key.startswith(OF_MAP) and number.isdigit() else 0


def map_not_found(run_id: str, node_id: str) -> CheckpointNotFound:
    """Return the error for items of a map that are not in the journal."""
    return CheckpointNotFound(
        f"run {run_id!r} has no completed map {node_id!r} with outputs in the journal; use into=Journal() or "
        "JsonLines(path), and let the map complete"
    )


class PriorUsage(NamedTuple):
    """Usage of this execution by earlier processes."""

    tokens: int = 0
    cost_usd: float = 0.0
    latency_ms: float = 0.0

    @classmethod
    def of_no_attempt(cls, notes: Mapping[str, bytes], run_id: str) -> PriorUsage:
        """Return the usage that no attempt has, from the notes of a session. Raises CorruptCheckpoint."""
        data = notes.get(USAGE_NOTE)
        name = RecordName(run_id, "note", USAGE_NOTE)
        return cls() if data is None else cls(*decode_json(data, tuple[int, float], name))

    def as_note(self) -> bytes:
        """Return the data of :data:`USAGE_NOTE`."""
        return json.dumps([self.tokens, self.cost_usd]).encode()


class UnknownCall(NamedTuple):
    """A call of an effect whose outcome is unknown.

    Attributes:
        key: its idempotency key.
        number: 1-based number of the call at its place.
        cause: why it is unknown.
    """

    key: str
    number: int
    cause: str


class Waiting(NamedTuple):
    """A question of a node or a flow.

    Attributes:
        reason: the text of the question; "effect" if it is how a call of an effect ended.
        schema_ref: "module:qualname" of the class of the answer; "" for any JSON value. Only to find the
            class again.
        payload: the answer in stored form, or NOT_DONE; None while the question is open, WITHDRAWN after it
            was closed without an answer.
        effect: the call that the question is about; None for any other question.
        number: which question it is among those at its place; later ones have a higher number.
        schema: JSON schema of the answer, as text; "" without one.
        answered_ms: when the answer was accepted, since the epoch by the store's clock; 0 without one.
    """

    position: int
    branch: str
    node_id: str
    reason: str
    schema_ref: str
    payload: bytes | None = None
    effect: UnknownCall | None = None
    number: int = 0
    schema: str = ""
    answered_ms: int = 0

    @property
    def is_answered(self) -> bool:
        """True once an answer is accepted."""
        return self.payload not in (None, WITHDRAWN)

    @property
    def id(self) -> str:
        """Identity of the question in its run: the call that asks, and the number of the question there."""
        return f"{self.position}{self.branch and f'.{self.branch}'}:{self.number}"

    @property
    def question(self) -> Question:
        """The question as users see it."""
        kind: Literal["approval", "effect"] = "approval" if self.effect is None else "effect"
        return Question(self.id, self.reason, kind, self.node_id, self.answer_schema(), self.text)

    @property
    def text(self) -> str:
        """The question for people; of an effect the call that it is about, with its idempotency key."""
        if self.effect is None:
            return self.reason
        key, number, cause = self.effect
        return (
            f"{self.reason}: nobody knows if call {number} happened ({cause}); its idempotency key is {key}"
        )

    def answer_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer; None without a readable one."""
        try:
            schema = json.loads(self.schema) if self.schema else None
        except (ValueError, RecursionError):
            return None
        return schema if isinstance(schema, dict) else None

    @property
    def call_number(self) -> int:
        """Number of the call that the question is about; 0 for any other question."""
        return 0 if self.effect is None else self.effect.number


class SentMessage(NamedTuple):
    """A message to a run.

    Attributes:
        number: 1-based, in the order in which the messages to the run were stored; 0 before that.
        id: of two messages with one id, the second is the first one sent again.
        payload: JSON, or a model in stored form.
    """

    number: int
    topic: str
    id: str
    payload: bytes

    def is_same_as(self, other: SentMessage) -> bool:
        """Return True for the same topic and the same data, however it is written."""
        return self.topic == other.topic and is_same_data(self.payload, other.payload)


#: ``Waiting.payload`` of a call of an effect that did not happen; no output has this form.
NOT_DONE: Final = b"not done"
#: ``Waiting.payload`` of a closed question, which takes no answer. Answers are JSON, and this is not.
WITHDRAWN: Final = b"withdrawn"


class Statement(NamedTuple):
    """A statement of a person or of ``reconcile`` about a call of an effect.

    Attributes:
        number, started_ms, epoch: of the call.
    """

    number: int
    happened: bool
    source: Literal["reconcile", "person"]
    started_ms: int = 0
    epoch: int = 0


class Intent(NamedTuple):
    """The last call of an effect with one input at one place.

    Attributes:
        node_id: the node; a pipeline may have another one at this place by now.
        number: 1-based number of the call among all calls at this place.
        is_open: there is no statement that it did not happen.
        has_output: it happened, and its output is committed, unless that was discarded.
        position, branch: of the attempt that made the call, or whose output is that of the call.
        digest: of its input; see ``_digest`` of stroma.engine.effects.
        others: digests of the other inputs at this place, if this was the first.
        key: its idempotency key.
        started_ms: when it began, since the epoch.
        epoch: that of the session which made it.
        statement: the last one about a call with this input at this place.
        event: the last event that the body of the flow had noticed: one that notices it makes the call too;
            None if that event is discarded.
    """

    node_id: str
    number: int
    is_open: bool
    position: int
    branch: str
    digest: str
    has_output: bool = False
    others: tuple[str, ...] = ()
    key: str = ""
    started_ms: int = 0
    epoch: int = 0
    statement: Statement | None = None
    event: int | None = 0

    def state(self, happened: bool, source: Literal["reconcile", "person"]) -> Statement:
        """Return the statement that the call happened, or that it did not."""
        return Statement(self.number, happened, source, self.started_ms, self.epoch)

    @property
    def is_unknown(self) -> bool:
        """True while the call is in flight, and after that until its outcome is known."""
        return self.is_open and not self.has_output

    @property
    def described(self) -> str:
        """Say that the outcome is unknown, in a message."""
        return f"nobody knows if call {self.number} of effect {self.node_id!r} with key {self.key} happened"


class RunFacts(NamedTuple):
    """Facts about a run beside its record.

    Attributes:
        owner: name of its last owner for messages; None if it is not known.
        is_lost: the run is recorded as running, and its owner has died or lost it.
        lease_until_ms: when the owner's lease ends unless it is renewed, since the epoch; None without one.
        deaths: how often a process died under the run, a lost owner included.
        effects: the last calls of its effects, by position and branch; without damaged ones.
        failed_items: how many items of its maps failed while the others continued, when it ended last.
        live_runs: of a queued run: how many runs of its pipeline have an owner, or a claim, by key.
    """

    owner: str | None = None
    is_lost: bool = False
    lease_until_ms: int | None = None
    deaths: int = 0
    effects: Mapping[tuple[int, str], Intent] = {}
    failed_items: int = 0
    live_runs: Mapping[str | None, int] = {}


def effect_note(position: int, branch: str) -> str:
    """Return the key of the note about the calls of an effect. It outlives the discarding of its position."""
    return f"{position}:effect:{branch}"


#: Key of the note about the failed items of a whole execution, which its end stores.
ALL_FAILED_ITEMS: Final = "0:all_failed:"
#: Key of the note about the usage of an execution that no attempt has.
USAGE_NOTE: Final = "0:u:"


#: Key of the note about how often in succession a dispatcher could not get on with a run.
SETBACKS_NOTE: Final = "0:setbacks:"
#: Seconds after the first setback, doubled with each further one; and at most.
_FIRST_DELAY_SECONDS: Final = 5.0
MAX_DELAY_SECONDS: Final = 300.0


def delay_after(setbacks: int) -> float:
    """Return the seconds until a run is tried again that has had so many setbacks in succession."""
    return min(_FIRST_DELAY_SECONDS * 2.0 ** min(setbacks - 1, 10), MAX_DELAY_SECONDS)


def is_effect_note(key: str) -> bool:
    """Return True for a key that :func:`effect_note` made."""
    return key.split(":", 2)[1:2] == ["effect"]


class Finished(NamedTuple):
    """The end of an execution: its status and, unless it completed, the error."""

    status: str
    error: str | None

    @property
    def reason(self) -> str | None:
        """The reason of a run that ended without a failure of a node: "poison" or "expired"; else None.

        The error of a failed node begins with the type of an exception.
        """
        word = (self.error or "").partition(": ")[0]
        return word if self.status == "FAILED" and word in ("poison", "expired") else None


class Tried(NamedTuple):
    """Failed attempts of one node at one place, by processes that died before the next attempt.

    Attributes:
        attempts: their number.
        repairs: how many of them were followed by a repair of their output (``contract_retries``).
        node_id: of the last one, as all that follows.
        mark: see AttemptRecord.
        broken_ns: when the newest attempt began whose output broke its contract; None without one.
        rejected: that output, if it is stored.
    """

    attempts: int
    repairs: int
    node_id: str
    failure_class: str
    message: str
    reason: str | None
    error_type: str | None
    mark: str
    broken_ns: int | None = None
    rejected: RejectedOutput | None = None

    @property
    def is_repaired(self) -> bool:
        """True if the attempt after it is to repair its output."""
        return self.failure_class == FailureClass.RECOVERABLE and self.reason == "contract"


class RunControl(NamedTuple):
    """Requests that apply to a run, from any process.

    Attributes:
        cancel: it is to end as CANCELLED.
        pause: no further attempt starts until the run is resumed.
        budget: limits in place of those of its config, by field of ExecutionBudget.
    """

    cancel: bool = False
    pause: bool = False
    budget: Mapping[str, float] = {}


NO_CONTROL: Final = RunControl()
