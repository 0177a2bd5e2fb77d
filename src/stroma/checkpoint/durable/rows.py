"""The plain rows that a durable store reads and writes, and the operations on them: all of one operation in one transaction.

What is decided about them is decided in ``_session``, once for all stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

from stroma.checkpoint.durable.owner import Owner, is_gone
from stroma.checkpoint.records import Attempt, RunQuery, StoreFacts, Tally

__all__ = [
    "DAMAGED",
    "Annotation",
    "AttemptSummary",
    "Fence",
    "Opening",
    "Rows",
    "RunExtras",
    "RunRow",
    "Step",
    "StepRow",
]


class Annotation(IntEnum):
    """Positions, below those of commits, of what a store records of a run besides its commits."""

    SAVED = -1  #: a state from ``save()``; branch: the node id
    WAITING = -2  #: an approval that a node waits for, and its answer; branch: "position:branch"
    CANCEL = -3  #: cancel() was called for a running run
    PARENT = -4  #: the run that this one was forked from, as node id
    TRACE = -5  #: the trace context of the process that started the execution, as node id
    DUE_HOOKS = -6  #: an attempt whose end hooks may not have been called; branch: :func:`due_hooks_key`
    FAILURE_SITE = -7  #: where the last failed attempt at a place failed; branch: "position:branch"
    DEATHS = -8  #: number of deaths of the owner; see :meth:`DurableSession._recover`


#: The status of a run, and the outcome of an attempt, whose row holds what no store writes.
DAMAGED: Final = "DAMAGED"


@dataclass(slots=True)
class Fence:
    """The right of a session to write: rows change only while these are the last epoch and owner of the run.

    Attributes:
        run: the store's own key of the run, never used again for another one.
        acknowledged: attempts of the execution that the store has acknowledged; a run that counts fewer has lost some.
            Written by the thread that writes to the store, after each transaction.
    """

    run: Any
    execution: int
    epoch: int
    owner: str
    lease_seconds: float
    acknowledged: int = field(default=0, compare=False)

    def acknowledge(self, attempts: int) -> None:
        """Note that the store has committed a transaction after which the execution has so many attempts."""
        self.acknowledged = max(self.acknowledged, attempts)


class RunRow(NamedTuple):
    """A run as its store has it.

    Attributes:
        execution: 0 while it has only what ``save()`` kept.
        left_seconds: how long its lease is good for, by the clock that the store goes by; below 0 it has expired.
        nodes: positions with a commit in the last execution, those inside groups not counted.
        attempt_count, commit_count: rows that the last execution must have, counted in the transaction of each.
    """

    run: Any
    run_id: str
    pipeline: str
    execution: int
    status: str
    error: str | None
    started_ms: int
    updated_ms: int
    tokens: int
    cost_pico: int
    latency_ns: int
    owner: str | None
    epoch: int
    left_seconds: float
    nodes: int
    attempt_count: int = 0
    commit_count: int = 0

    @property
    def holder(self) -> Owner | None:
        """Who is at work on the run, as far as anybody can tell."""
        owner = Owner.read(self.owner) if self.status == "RUNNING" else None
        return None if owner is None or self.left_seconds < 0 or is_gone(owner) else owner

    @property
    def is_damaged(self) -> bool:
        """Whether the row holds what no store writes, see :func:`parse_run`."""
        return self.status == DAMAGED


class Step(NamedTuple):
    """One committed output, as it is kept. ``number`` and ``given``: see StepCall."""

    contract: str
    schema_ref: str
    output: bytes
    sha256: bytes
    number: int | None = None
    given: bytes | None = None


class StepRow(NamedTuple):
    """A Step and the place it has in its execution."""

    position: int
    branch: str
    node_id: str
    step: Step


class Opening(NamedTuple):
    """What a session writes when it begins. ``discard_from``: see RunRequest. ``execution``: the one that ``input`` is
    sealed for."""

    run_id: str
    pipeline: str
    owner: str
    lease_seconds: float
    contract: str
    input: bytes
    sha256: bytes
    discard_from: int | None
    tags: tuple[str, ...] = ()
    execution: int = 1


class AttemptSummary(NamedTuple):
    """An attempt without its output. ``size``: of that as it is stored; None if nothing was committed. ``epoch``: see Fence."""

    attempt: Attempt
    size: int | None
    epoch: int


class RunExtras(NamedTuple):
    """What is told of a run beside its row. ``failed``: its last failed attempts, the one that ended last first."""

    parent: str | None
    tags: tuple[str, ...]
    failed: list[Attempt]


class Rows(Protocol):
    """The rows of a store inside one transaction. Whoever raises in it undoes it."""

    # ---- runs
    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        """The row of a run; with ``lock`` nobody else changes it before the transaction ends."""
        ...

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        """Begin an execution: number 1, or the next one of a run that was found. Raises the epoch."""
        ...

    def take_over(self, found: RunRow, opening: Opening) -> Fence:
        """Take over the last execution, without its commits from ``discard_from`` on. Raises the epoch."""
        ...

    def input(self, run: Any, execution: int) -> tuple[str, bytes, bytes] | None:
        """(contract, input, sha256) of an execution."""
        ...

    def steps(self, run: Any, execution: int, apart: Sequence[tuple[int, str]] = ()) -> Iterable[StepRow]:
        """The commits of an execution; not what ``save()`` kept, nor what is ``apart`` (see RunRequest)."""
        ...

    def steps_at(self, run: Any, execution: int, position: int, branches: Sequence[str]) -> Iterable[StepRow]:
        """The commits in these branches of a position."""
        ...

    def is_whole(self, found: RunRow) -> bool:
        """Return whether the last execution has its input and all the attempts and commits that its run counts."""
        ...

    def identities(self, run: Any, execution: int) -> Iterable[tuple[str, int]]:
        """(identity, position) of each step of plain code that has an attempt in an execution, or one inside it."""
        ...

    def was_deleted(self, run: Any) -> bool:
        """Return whether a run that is not there was deleted, within the last day at least."""
        ...

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        """Record an attempt, its usage and its output, count them, and renew the lease.

        False if the fence refuses it, also for a run that counts fewer attempts than were acknowledged. An attempt that
        is recorded already is left as it is, with its usage, and so is its output.
        """
        ...

    def finish(self, fence: Fence, status: str, error: str | None, updated_ms: int | None = None) -> bool:
        """Note how an execution stopped, and when (None: now), and give up the lease. False if the fence is in the way."""
        ...

    def renew(self, fences: list[Fence]) -> None:
        """Renew leases; those of runs that somebody else has taken over stay as they are."""

    # ---- beside the commits
    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        """Keep something at a position below 0, in place of what was there, outside of any session.

        Makes the run, without an execution, if there is none.
        """

    def annotations(self, run: Any, position: int, branch: str | None = None) -> Iterable[StepRow]:
        """What is kept at a position below 0; None: in all branches."""
        ...

    def delete_annotations(self, run: Any, position: int, branch: str | None = None) -> None:
        """Forget what is kept at a position below 0; None: in all branches."""

    def cancel_requests(self, runs: list[Any]) -> list[Any]:
        """Which of these runs somebody wants to end: those with something kept at position CANCEL."""
        ...

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        """The newest output of a node in the last execution, or what was saved since."""
        ...

    def delete(self, run_id: str) -> None: ...

    # ---- beside all runs
    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        """A cell's data, None if there is none, and the clock in ms since the epoch; with ``lock`` nobody else changes
        the cell before the transaction ends."""
        ...

    def write_cell(self, name: str, data: bytes) -> None:
        """Put data into a cell that this transaction has locked."""

    # ---- retention
    def now_ms(self) -> int:
        """Return the time by the clock that rows are dated by, in milliseconds since the epoch."""
        ...

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        """Runs that have ended (with ``unfinished``: any, also what only ``save()`` kept) and were last written before."""
        ...

    def blobs(self) -> Iterable[bytes]:
        """All payloads that stand in blobs, of all runs: what begins with BLOB."""
        ...

    # ---- reading
    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, look_at: int | None
    ) -> tuple[list[RunRow], str | None]:
        """The runs that have an execution, the one begun last first, and what ``after`` is of those that follow.

        ``look_at``: how many may be looked at one by one, at least about; None for all. Raises ValueError for an ``after`` that is
        none.
        """
        ...

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        """What is kept beside each of these runs, with so many failed attempts at the most."""
        ...

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        """Ids of runs that have an execution and begin with a text: that very one first, then the newest."""
        ...

    def attempts(self, run: Any, execution: int) -> Iterable[tuple[Attempt, Step | None]]:
        """By process, position and time; a group before its children. With what each one committed."""
        ...

    def attempt_page(
        self, run: Any, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptSummary], str | None]:
        """The same page by page, with the stored size of what each one committed, which is not read."""
        ...

    def attempts_at(self, run: Any, execution: int, position: int, branch: str) -> list[AttemptSummary]:
        """The same of one place."""
        ...

    def failed_since(self, run: Any, execution: int, epoch: int) -> list[Attempt]:
        """The last attempts of an execution that failed under this epoch or a later one, the one that ended first first."""
        ...

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        """The attempts of the runs begun since, of so many runs and attempts at the most, the newest runs first."""
        ...

    def facts(self) -> StoreFacts:
        """What the store says of itself."""
        ...

    def step_at(self, run: Any, execution: int, position: int, branch: str) -> StepRow | None:
        """The commit at one place."""
        ...
