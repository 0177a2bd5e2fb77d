"""Protocols between the engine and the stores.

The simple protocol (``save``, ``load``, ``delete``) stores the last state of each node. A *journal* store also stores
runs: committed positions, the usage of each attempt, the owner. Resume, history and the command line need a journal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
from stroma.checkpoint.errors import CheckpointNotFound
from stroma.contracts.schema import Schema, Snapshot
from stroma.trace.events import FAILED_ITEM, AttemptRow

__all__ = [
    "INSIDE",
    "NOT_DONE",
    "OF_FLOW",
    "OF_MAP",
    "AsyncCheckpointStore",
    "Charge",
    "CheckpointKey",
    "CheckpointStore",
    "Committed",
    "Finished",
    "IfExists",
    "IfRunning",
    "JournalStore",
    "PriorUsage",
    "RunRequest",
    "Session",
    "StepCall",
    "Tried",
    "UnknownCall",
    "Waiting",
    "count_items",
    "effect_note",
    "inside_of",
    "is_effect_note",
    "is_of_pipeline",
    "map_not_found",
]

IfExists = Literal["restart", "resume", "return", "error", "attach"]
IfRunning = Literal["error", "attach", "take_over"]


@runtime_checkable
class CheckpointStore(Protocol):
    """Store of the last state of each node of each run."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    def delete(self, run_id: str) -> None: ...


@runtime_checkable
class AsyncCheckpointStore(Protocol):
    """Store of the last state of each node of each run, with async calls."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    async def delete(self, run_id: str) -> None: ...


class CheckpointKey(NamedTuple):
    """Key of a checkpoint."""

    run_id: str
    node_id: str


class RunRequest(NamedTuple):
    """Request to open a run.

    Attributes:
        initial_state, schema: the input of the run and its Schema; a durable store encodes it.
        if_exists: "resume" continues the last execution. "return" does too, unless it is finished: then it returns it
            unchanged. "restart" starts a new execution, "error" refuses, "attach" returns the result of the owner that
            was waited for.
        if_running: what to do with a run that has another owner: "take_over" fences it off, anything else is RunBusy.
        lease_seconds: how long the run stays with an owner that does not renew its lease.
        ends: the caller will call end(). Otherwise another request of the same process takes the run over at once.
        deliver: store with each attempt that its end hooks are due, until delivered() is called.
        tags: stored with the execution, added to those of a continued one.
        discard_from: discard the commits of the continued execution from this position on.
        accept: called for each commit to restore, before anything is changed; what it raises refuses the request.
        lazily_loaded: (position, prefix of branches) of commits that are not restored at the start, since there may be
            very many; committed() returns them in portions.
        retry_failed: discard the failed items of maps and what was computed from them, see ItemFailure.
        max_recoveries: end a run as FAILED once its process died so often; None: never.
        force: continue it all the same, and count deaths from 0.
        only_unfinished: raise RunExists for a run that ended or is suspended.
        due_ms: raise RunExists for a run that is not due at this time, see :func:`stroma.checkpoint.decisions.is_due`.
        any_input: continue the run although its input is another one: the caller's own checkpoint has what it began with.
    """

    run_id: str
    pipeline: str
    initial_state: BaseModel
    schema: Schema
    if_exists: IfExists = "restart"
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
    only_unfinished: bool = False
    due_ms: int | None = None
    any_input: bool = False

    @property
    def is_automatic(self) -> bool:
        """True if no person asked for this run to go on: a worker, recover(), or one that waits for its result."""
        return self.only_unfinished or self.due_ms is not None or self.if_exists == "attach"

    def is_lazily_loaded(self, position: int, branch: str) -> bool:
        """Return True if a commit is not restored at the start."""
        return bool(branch) and any(
            position == at and branch.startswith(prefix) for at, prefix in self.lazily_loaded
        )

    def resolve_discard(self, commits: Mapping[tuple[int, str], Committed]) -> RunRequest:
        """Return the request with ``discard_from`` set to the position after the first map that ``retry_failed`` retries."""
        if not self.retry_failed or self.discard_from is not None:
            return self
        failed = [at for (at, _), commit in commits.items() if commit.failed_items]
        return self._replace(discard_from=min(failed) + 1) if failed else self

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


def _without_failed(commits: Mapping[tuple[int, str], Committed]) -> dict[tuple[int, str], Committed]:
    """Return the commits without failed items and without the groups around them."""
    retried = [at for at, commit in commits.items() if commit.failed_items]

    def is_valid(position: int, branch: str, commit: Committed) -> bool:
        if commit.is_failed_item:
            return False
        inside = f"{branch}." if branch else ""
        return not any(at == position and (of == branch or of.startswith(inside)) for at, of in retried)

    return {at: commit for at, commit in commits.items() if is_valid(*at, commit)}


class StepCall(NamedTuple):
    """Identifies a step of plain code in a resumed run. For a map: its failed items, and the input of each item.

    Attributes:
        number: 0-based number of the call of its step id; for a map, the number of failed items.
        input_key: identifies the input: its stored form; None if it has none and so cannot be compared. For a node inside
            a group that is a step: a checksum of the group's input.
        identity: see ``stroma.checkpoint.identity``; stored with the attempts of the step.
    """

    number: int
    input_key: bytes | None
    identity: str | None = None


#: ``StepCall.number`` of a step of a flow.
OF_FLOW: Final = -1


def inside_of(call: StepCall | None) -> StepCall | None:
    """Return the StepCall of the nodes inside a group that is a step: a checksum of the input of that step."""
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
    def is_failed_item(self) -> bool:
        """True for an item that failed permanently: there is no output."""
        return self.contract.partition(":")[0] == FAILED_ITEM

    @property
    def failed_items(self) -> int:
        """Number of failed items of a map; 0 for anything else."""
        step = self.step
        if step is None or step.input_key is None or not step.input_key.startswith(OF_MAP):
            return 0
        return step.number


#: Prefix of a checksum in ``StepCall.input_key`` of a node inside a group that is a step.
INSIDE: Final = b"item of step "
#: Prefix of the number of items in ``StepCall.input_key`` of a committed map.
OF_MAP: Final = b"items "


def is_of_pipeline(input_key: bytes | None, number: int | None) -> bool:
    """Return True if the fields of a StepCall belong to a node of a pipeline: they are empty, or of a map or its items."""
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
    """A node that waits for an approval.

    Attributes:
        reason: the question; "effect" if it is how a call of an effect ended.
        schema_ref: "module:qualname" of the schema of the answer; "" for any JSON value.
        payload: the answer in stored form, or NOT_DONE; None while there is none.
        effect: the call that the question is about; None for any other question.
    """

    position: int
    branch: str
    node_id: str
    reason: str
    schema_ref: str
    payload: bytes | None = None
    effect: UnknownCall | None = None

    @property
    def call_number(self) -> int:
        """Number of the call that the question is about; 0 for any other question."""
        return 0 if self.effect is None else self.effect.number


#: ``Waiting.payload`` of a call of an effect that did not happen; no output has this form.
NOT_DONE: Final = b"not done"


def effect_note(position: int, branch: str) -> str:
    """Return the key of the note about the calls of an effect. It outlives the discarding of its position."""
    return f"{position}:effect:{branch}"


def is_effect_note(key: str) -> bool:
    """Return True for a key that :func:`effect_note` made."""
    return key.split(":", 2)[1:2] == ["effect"]


class Finished(NamedTuple):
    """The end of an execution: its status and, unless it completed, the error; ``reason``: a one-word code, or None."""

    status: str
    error: str | None
    reason: str | None = None


class Tried(NamedTuple):
    """Failed attempts of one node at one place, by processes that died before the next attempt.

    Attributes:
        attempts: their number; the other fields are of the last one.
    """

    attempts: int
    node_id: str
    failure_class: str
    message: str
    reason: str | None
    error_type: str | None


class RunControl(NamedTuple):
    """Requests about a run that hold, from any process.

    Attributes:
        cancel: it is to end as CANCELLED.
        pause: no further attempt begins, until somebody resumes the run.
        budget: limits in place of those of its config, by field of ExecutionBudget.
    """

    cancel: bool = False
    pause: bool = False
    budget: Mapping[str, float] = {}


NO_CONTROL: Final = RunControl()


class Charge(Protocol):
    """Changes of cells that a session makes in the transaction that records an attempt."""

    def changes(self, tokens: int, cost_pico: int, *, committed: bool) -> list[tuple[str, Change[Any]]]:
        """Return (cell, change) of each cell, in the order in which they are to be locked.

        ``committed``: the attempt has an output. The changes are idempotent.
        """
        ...

    def settled(self, answers: list[Any]) -> None:
        """Receive the answers of the changes, in their order. Called in the event loop after they are stored."""


class Session(Protocol):
    """One execution of a run, held by this process.

    Attributes:
        address: identifies the store among all stores: cells of a store with this address change in the transactions of
            the session's commits. "" without such transactions.
        stores_inputs: it stores the inputs of calls (``StepCall.given``), so that they must be encoded.
        epoch: incremented by each session that opens the run; 0 if that is not recorded.
        charges: what to settle when the attempt in progress at a (position, branch) is recorded; removed by the code that
            added it. Not read if ``address`` is "".
        execution: 1 for the first execution of the run id, 2 after a restart, and so on.
        continued: the session continues an execution that an earlier call started.
        restored: the committed outputs by (position, branch).
        places: the position of each step of plain code with a recorded attempt, by its identity.
        finished: the end of an execution that is returned unchanged, or that must end before a node is called; otherwise
            None.
        waiting: approvals that its nodes wait for, or waited for, by (position, branch).
        notes: what :meth:`note` stored in this execution before, by key.
        traceparent: trace context recorded by the process that started the execution; None before.
        attribution: ids of what the run belongs to, by "conversation", "user" and "session": those that were noted before, in
            a fork those of its origin. "session": the first of the runs that were forked from each other.
        undelivered: attempts of earlier processes whose end hooks may not have been called, the oldest first; without
            states. Always empty if all attempts are of this process.
        tried: failed attempts without a later commit, by (position, branch), if the previous process died.
        control: the requests that hold when it is opened.
        on_control: called, from any thread, with all requests that hold, before a new one is acknowledged.
    """

    address: str
    stores_inputs: bool
    epoch: int
    charges: dict[tuple[int, str], Charge]
    execution: int
    continued: bool
    finished: Finished | None
    restored: Mapping[tuple[int, str], Committed]
    tried: Mapping[tuple[int, str], Tried]
    places: Mapping[str, int]
    prior: PriorUsage
    waiting: Mapping[tuple[int, str], Waiting]
    notes: Mapping[str, bytes]
    traceparent: str | None
    attribution: Mapping[str, str]
    undelivered: Sequence[AttemptRow]
    control: RunControl
    on_control: Callable[[RunControl], None] | None

    def committed(
        self, position: int, branches: Sequence[str]
    ) -> Mapping[str, Committed] | Awaitable[Mapping[str, Committed]]:
        """Return the commits in some branches of a position, including those of this process. Raises StoreError."""
        ...

    def delivered(self, row: AttemptRow) -> None:
        """Record, without waiting, that the end hooks of an attempt were called. Only called if the request has ``deliver``."""

    def note_call(self, position: int, identity: str) -> None:
        """Store an identity with each attempt that is recorded at a position, or inside it."""

    def note_traceparent(self, traceparent: str) -> None:
        """Store, without waiting, the W3C trace context of this execution for processes that resume it."""

    def note_attribution(self, ids: Mapping[str, str]) -> None:
        """Store, without waiting, ids of what this execution belongs to, for processes that resume it."""

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        """Store one attempt and, with ``output``, its commit: both or nothing.

        Returns None if it is done, otherwise an awaitable. The engine always awaits it to its end, even if the run is
        cancelled: it must end by itself. Raises NotSerialisable at once for an output without a stored form.
        """

    def with_references(self, row: AttemptRow) -> AttemptRow:
        """Return a row for the trace, with references in place of the states that the store holds in blobs."""
        ...

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """Store where an attempt failed together with the attempt. ``write``: see :func:`failure_site_writer`."""

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        """Store an output that broke its contract together with the attempt. ``data``: see :class:`RejectedOutput`."""

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        """Store an attempt that waits for an approval, and its question: both or nothing. Raises StoreError."""

    def note(self, key: str, data: bytes | None) -> None:
        """Store data of the driver under a key, "position:..."; None deletes it.

        It is stored together with the next attempt, question or end of the run that is recorded, or by :meth:`flush`.
        Discarding a position discards its notes, except those of effects (:func:`effect_note`).
        """

    def flush(self) -> Awaitable[None] | None:
        """Store the notes now. Awaited: raises Fenced, or another StoreError."""

    def ask(self, waiting: Waiting) -> Awaitable[None] | None:
        """Store a question of no node, together with the notes. Raises StoreError."""

    def answers(self) -> Mapping[tuple[int, str], Waiting] | Awaitable[Mapping[tuple[int, str], Waiting]]:
        """Return what ``waiting`` is by now. Raises StoreError."""
        ...

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> Awaitable[None] | None:
        """Record that the run stopped with a status (see RunStatus) and, unless it completed, an error text.

        ``wake_ms``: when a suspended run is due without an answer, in ms since the epoch. An answer makes it due at once,
        also one that was stored since the run was opened. An interrupted run is due at once.
        """

    def abandon(self) -> None:
        """Release the run when nothing can be awaited any more. Nothing is recorded."""


@runtime_checkable
class JournalStore(Protocol):
    """Store of runs. Awaitable results are awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...
