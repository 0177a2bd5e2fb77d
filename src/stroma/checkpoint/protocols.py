"""What a store must be able to do, and what the engine tells it.

Two protocols. The simple one (``save``, ``load``, ``delete``) keeps the last state of each node. A *journal* store
also knows runs: which positions are committed, what every attempt used, who is at work; it gives resume, history and
the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
from stroma.checkpoint.errors import CheckpointNotFound, PipelineChanged, RunBusy, RunExists, StoreError
from stroma.contracts.schema import Schema, Snapshot
from stroma.trace.events import FAILED_ITEM, AttemptRow

__all__ = [
    "COMPLETE",
    "ENDED",
    "INSIDE",
    "OF_MAP",
    "AsyncCheckpointStore",
    "Charge",
    "CheckpointKey",
    "CheckpointStore",
    "Committed",
    "Finished",
    "Held",
    "IfExists",
    "IfRunning",
    "JournalStore",
    "PriorUsage",
    "RunRequest",
    "Session",
    "StepCall",
    "Tried",
    "Waiting",
    "decide",
    "inside_of",
    "is_answered_meanwhile",
    "items_in",
    "no_map",
    "of_pipeline",
    "waits_no_longer",
]

IfExists = Literal["restart", "resume", "return", "error", "attach"]
IfRunning = Literal["error", "attach", "take_over"]


@runtime_checkable
class CheckpointStore(Protocol):
    """Keeps the last state of each node of each run."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    def delete(self, run_id: str) -> None: ...


@runtime_checkable
class AsyncCheckpointStore(Protocol):
    """The same, async."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    async def delete(self, run_id: str) -> None: ...


class CheckpointKey(NamedTuple):
    """What a checkpoint is filed under."""

    run_id: str
    node_id: str


class RunRequest(NamedTuple):
    """What a driver asks a journal for when a run begins.

    Attributes:
        initial_state, schema: the run's input and its Schema; a durable store encodes it.
        if_exists: "resume" continues the last execution, "return" too but for one that has finished, which stays as it
            is; "restart" begins a new one, "error" refuses; "attach" gives what a holder that was waited for came to.
        if_running: what becomes of a run that somebody else holds: "take_over" fences them off, all else is RunBusy.
        lease_seconds: how long a holder that is not heard of keeps the run.
        ends: whether the caller will say that the run has ended. From plain code that does not, another request of the
            same process takes the run over at once.
        deliver: keep with each attempt that its end hooks are due, until delivered() is called.
        tags: kept with the execution; of one that goes on, added to those it has.
        discard_from: forget the commits from this position on (of the execution that is continued).
        accept: asked, before anything is changed, about each commit that would be restored; what it raises refuses
            the request.
        apart: (position, beginning of branches) of commits that are not restored at once: there may be very many, and
            committed() gives them a few at a time.
        retry_failed: forget what was made of the items of a map while some of them had failed, see ItemFailure.
        max_recoveries: a run whose process died so often is given up as FAILED; None: never. ``force``: it goes on all the
            same, and deaths are counted anew.
        only_unfinished: RunExists for a run that has ended, or waits; go on only with one that was interrupted or died.
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
    apart: tuple[tuple[int, str], ...] = ()
    retry_failed: bool = False

    def is_apart(self, position: int, branch: str) -> bool:
        """Whether a commit is not restored at once."""
        return bool(branch) and any(
            position == at and branch.startswith(beginning) for at, beginning in self.apart
        )

    def going_on(self, commits: Mapping[tuple[int, str], Committed]) -> RunRequest:
        """The request as it stands once the commits are known: ``retry_failed`` discards what came after the items."""
        if not self.retry_failed or self.discard_from is not None:
            return self
        failed = [at for (at, _), commit in commits.items() if commit.failed_items]
        return self._replace(discard_from=min(failed) + 1) if failed else self

    tags: tuple[str, ...] = ()
    max_recoveries: int | None = None
    force: bool = False
    only_unfinished: bool = False

    def accepted(self, commits: Mapping[tuple[int, str], Committed]) -> Mapping[tuple[int, str], Committed]:
        """The commits that stay; raises what ``accept`` raises."""
        first = self.discard_from
        kept = {at: commit for at, commit in commits.items() if first is None or at[0] < first}
        if self.retry_failed:
            kept = _without_failed(kept)
        if self.accept is not None:
            for (position, branch), commit in kept.items():
                self.accept(position, branch, commit)
        return kept


def _without_failed(commits: Mapping[tuple[int, str], Committed]) -> dict[tuple[int, str], Committed]:
    """The commits but for items that failed, and for the groups around them."""
    anew = [at for at, commit in commits.items() if commit.failed_items]

    def stays(position: int, branch: str, commit: Committed) -> bool:
        if commit.is_failed_item:
            return False
        around = f"{branch}." if branch else ""
        return not any(at == position and (of == branch or of.startswith(around)) for at, of in anew)

    return {at: commit for at, commit in commits.items() if stays(*at, commit)}


class StepCall(NamedTuple):
    """What a resumed run knows a step of plain code by; and of a map, how many items failed, and what each was made of.

    Attributes:
        number: which call of its step id it is, 0-based.
        given: its input in stored form; None if that has none, and so cannot be compared. Inside of a group that is such a
            step, a checksum of that of the group.
        identity: what the step is known by in plain code; see ``stroma.checkpoint.identity``. It is kept with its attempts.
    """

    number: int
    given: bytes | None
    identity: str | None = None


def inside_of(call: StepCall | None) -> StepCall | None:
    """What the nodes inside of a group are recorded with if it is a step: a checksum of what the step was called with."""
    given = None if call is None else call.given
    if given is None:
        return None
    if given.startswith(INSIDE):
        return call
    if given.startswith(b"item"):  # Of a map, whose items are compared one by one.
        return None
    return StepCall(0, INSIDE + hashlib.sha256(given).hexdigest().encode())


class Committed(NamedTuple):
    """One committed output, as it was kept.

    Attributes:
        contract: see :func:`stroma.trace.events.contract_of`.
        step: of a step outside of any pipeline, and of maps and their items; None for other nodes.
        schema: what ``output`` was made with, in the process that made it; elsewhere ``output`` is in stored form.
    """

    node_id: str
    output: Snapshot
    contract: str
    step: StepCall | None = None
    schema: Schema | None = None

    @property
    def is_failed_item(self) -> bool:
        """Whether it is an item that failed for good, and not an output."""
        return self.contract.partition(":")[0] == FAILED_ITEM

    @property
    def failed_items(self) -> int:
        """Of a group that goes over items: how many of them failed."""
        of_map = self.step is not None and self.step.given is not None and self.step.given.startswith(OF_MAP)
        return self.step.number if of_map and self.step is not None else 0


#: What stands in ``StepCall.given`` inside of a group that is a step, before a checksum.
INSIDE: Final = b"item of step "
#: What stands in ``StepCall.given`` of a map that is committed, before the number of its items.
OF_MAP: Final = b"items "


def of_pipeline(given: bytes | None, number: int | None) -> bool:
    """Whether what is kept as a StepCall is of a pipeline: of nothing at all, or of a map and its items."""
    return number is None or (given is not None and given.startswith((b"item ", OF_MAP)))


def items_in(given: bytes) -> int:
    """How many items a map had, by what stands in its ``StepCall.given``; 0 for anything else."""
    number = given.removeprefix(OF_MAP)
    return int(number) if given.startswith(OF_MAP) and number.isdigit() else 0


def no_map(run_id: str, node_id: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"run {run_id!r} has no {node_id!r} that is done and whose outputs are in the journal; give it into=Journal() or "
        "JsonLines(path), and let it end"
    )


#: Statuses of executions that have nothing left to do, and of those that a cancel() finds over.
COMPLETE: Final = ("COMPLETED", "RESUMED")
ENDED: Final = (*COMPLETE, "FAILED", "CANCELLED")


class Held(NamedTuple):
    """What a store knows of the last execution of a run. ``holder``: who is at work on it, in words, or None."""

    execution: int
    status: str
    holder: str | None = None
    left_seconds: float = 0.0


def decide(
    request: RunRequest, held: Held | None, same_input: bool
) -> Literal["begin", "continue", "return"]:
    """What a request comes to, given the last execution, if there is one. Raises RunBusy, RunExists, PipelineChanged."""
    if held is None:
        return "begin"
    if held.holder is not None and request.if_running != "take_over":
        what = "" if same_input else " with another input"
        error = RunBusy(
            f"run {request.run_id!r} is being run{what} by {held.holder}, whose lease is good for another "
            f'{max(held.left_seconds, 0.0):.1f} s; wait for its result with if_running="attach", or use another run id'
        )
        error.holder, error.left_seconds, error.same_input = held.holder, held.left_seconds, same_input
        raise error
    if request.only_unfinished and held.status not in ("RUNNING", "INTERRUPTED"):
        raise RunExists(
            f"run {request.run_id!r} has ended meanwhile: {held.status}; there is nothing to recover"
        )
    if request.if_exists == "error":
        raise RunExists(
            f"run {request.run_id!r} exists already (execution {held.execution}, {held.status}); use another run id, or "
            'say what is to become of it: if_exists="resume", "return" or "restart"'
        )
    if request.if_exists == "restart":
        return "begin"
    if request.discard_from is None and not same_input:
        raise PipelineChanged(
            f"run {request.run_id!r} was started with another input (or {request.schema.model.__name__} has changed); "
            "give it the same one, or another run id"
        )
    finished = held.status in COMPLETE
    if request.if_exists == "attach":  # Whatever the holder came to; if it died on the way, we go on.
        finished = held.status != "RUNNING"
    return "return" if finished and request.if_exists in ("return", "attach") else "continue"


class PriorUsage(NamedTuple):
    """What earlier processes used on this execution."""

    tokens: int = 0
    cost_usd: float = 0.0
    latency_ms: float = 0.0


class Waiting(NamedTuple):
    """A node that waits for a person.

    Attributes:
        reason: what for, in words.
        schema_ref: "module:qualname" of what the answer must satisfy; "" if any JSON value will do.
        payload: the answer in stored form; None as long as there is none.
    """

    position: int
    branch: str
    node_id: str
    reason: str
    schema_ref: str
    payload: bytes | None = None


def is_answered_meanwhile(asked: Waiting | None, seen: Waiting | None, question: Waiting) -> bool:
    """Return whether the store has an answer to a question that its session, which asks it now, has not seen.

    Such an answer was acknowledged while the session was running, and stays. One that it has seen was used or did not
    fit, and the question is a new one.
    """
    return (
        asked is not None
        and asked.payload is not None
        and (asked.node_id, asked.schema_ref) == (question.node_id, question.schema_ref)
        and (seen is None or seen.payload is None)
    )


def waits_no_longer(run_id: str, waiting: Waiting) -> StoreError:
    """Why an answer is refused: somebody else was faster, or the run has gone another way."""
    error = StoreError(
        f"node {waiting.node_id!r} of run {run_id!r} waits for no answer any more: it has one, or the run was begun again; "
        "see its status, then resume it"
    )
    error.transient = False
    return error


class Finished(NamedTuple):
    """How an execution ended: its status and, unless it completed, why; ``reason``: that in one word, if there is one."""

    status: str
    error: str | None
    reason: str | None = None


class Tried(NamedTuple):
    """Failed attempts of one node at one place, made by processes that died before they could decide what follows.

    Attributes:
        attempts: how many; the other fields are of the last one.
    """

    attempts: int
    node_id: str
    failure_class: str
    message: str
    reason: str | None
    error_type: str | None


class Charge(Protocol):
    """Changes of cells that a session makes in the transaction that records an attempt."""

    def changes(self, tokens: int, cost_pico: int, *, committed: bool) -> list[tuple[str, Change[Any]]]:
        """Return (cell, change) of each cell, in the order in which they are to be locked.

        ``committed``: whether the attempt has an output. Making the same changes twice must be making them once.
        """
        ...

    def settled(self, answers: list[Any]) -> None:
        """Take what the changes answered, in their order. Called in the event loop, once they are stored."""


class Session(Protocol):
    """One execution of a run, held by this process.

    Attributes:
        address: names the store among all stores: cells of a store with this address change in the transactions of the
            session's commits. "" where there are no such transactions.
        epoch: raised by each session that opens the run; 0 where that is not recorded.
        charges: what the attempt in progress at a (position, branch) is to settle when it is recorded; whoever puts it
            there takes it out again. Not read where ``address`` is "".
        execution: 1 for the first execution of the run id, 2 after a restart, and so on.
        continued: whether it goes on with an execution that an earlier call began.
        restored: the committed outputs by (position, branch).
        places: the position of each step of plain code that an attempt was recorded for, by its identity.
        finished: how the execution ended that is returned as it is, or is to end before anything of it is called; None for
            one that goes on.
        waiting: what nodes of it wait or waited for, by (position, branch).
        traceparent: what note_traceparent() was told by the process that began the execution; None before.
        undelivered: attempts of earlier processes whose end hooks may not have been told, the oldest first; without
            states. Always empty where the process that made them is this one.
        tried: attempts that were made of what is not committed, by (position, branch), if the process before died.
        on_cancel: called, from any thread, when somebody asks for the end of this run.
    """

    address: str
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
    traceparent: str | None
    undelivered: Sequence[AttemptRow]
    on_cancel: Callable[[], None] | None

    def committed(
        self, position: int, branches: Sequence[str]
    ) -> Mapping[str, Committed] | Awaitable[Mapping[str, Committed]]:
        """What is committed in some branches of a position, this process's own commits too. Raises StoreError."""
        ...

    def delivered(self, row: AttemptRow) -> None:
        """The end hooks of an attempt were told. Only called if the request asked for it; nobody waits for it."""

    def note_call(self, position: int, identity: str) -> None:
        """Keep with each attempt that is recorded at a position, or inside it, which step of plain code it is of."""

    def note_traceparent(self, traceparent: str) -> None:
        """Keep the W3C trace context of this execution, for those who go on with it. Nobody waits for that."""

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        """Keep one attempt and, with ``output``, its commit: together or not at all.

        Returns None if it is done, else what to await. The engine never abandons that half-way, not even when the
        run is cancelled: it must come to an end by itself. Raises NotSerialisable at once for an output that cannot
        be kept.
        """

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        """Keep an attempt that waits for a person, and what for: together or not at all. Raises StoreError."""

    def end(self, status: str, error: str | None) -> Awaitable[None] | None:
        """The run has stopped with a status (see RunStatus) and, unless it completed, the reason in words."""

    def abandon(self) -> None:
        """The run has stopped, and nothing may be awaited any more: the run is free for others."""


@runtime_checkable
class JournalStore(Protocol):
    """A store that keeps runs. Any awaitable result is awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...
