"""The plain rows that a durable store reads and writes, and the operations on them: all of one operation in one transaction.

What is decided about them is decided in ``_session``, once for all stores.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, get_type_hints

from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.owner import Owner, is_gone
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint, Fenced, StoreError
from stroma.checkpoint.records import Attempt, RunQuery, StoreFacts, Tally

__all__ = [
    "CANCEL",
    "DAMAGED",
    "DEATHS",
    "DUE",
    "PARENT",
    "SAVED",
    "TRACE",
    "TROUBLE",
    "WAITING",
    "RunExtras",
    "CellChange",
    "Commit",
    "Transaction",
    "Fence",
    "Opening",
    "Rows",
    "RunRow",
    "Step",
    "StepRow",
    "Submit",
    "AttemptSummary",
    "apply_changes",
    "checksum",
    "fenced_error",
    "is_intact",
    "lost_error",
    "parse_attempt",
    "parse_run",
    "fence_error",
    "require_undamaged",
    "storable_text",
    "verify_step",
]


# What is kept of a run beside its commits stands at positions of its own.
SAVED: Final = -1  # what save() keeps; branch: the node id
WAITING: Final = -2  # what nodes wait for; branch: "position:branch"
CANCEL: Final = -3  # somebody wants the run to end
PARENT: Final = -4  # node id: the run that this one was forked from
TRACE: Final = -5  # node id: the trace context of the process that began the execution
DEATHS: Final = -8  # number: how often the process of the run died; contract, schema_ref: see DurableSession
TROUBLE: Final = -7  # where the last failed attempt at a place failed; branch: "position:branch"
DUE: Final = (
    -6
)  # attempts whose end hooks may not have been told yet; branch: what tells an attempt from others


#: The status of a run, and the outcome of an attempt, whose row holds what no store writes.
DAMAGED: Final = "DAMAGED"
_LARGEST: Final = 2**63 - 1


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


class Commit(NamedTuple):
    """The operation that happens most; a store may do many of them in a way of its own."""

    run_id: str
    fence: Fence
    attempt: Attempt
    step: Step | None

    def __call__(self, rows: Rows) -> None:
        if not rows.commit(self.fence, self.attempt, self.step):
            raise fence_error(rows, self.fence, self.run_id)


@dataclass(frozen=True, slots=True)
class CellChange:
    """A change of a cell. A store may do many of one cell together, see :func:`apply_changes`."""

    name: str
    change: Change[Any]

    @property
    def run_id(self) -> str:
        """What keeps its order among the changes of this cell; NUL is in no run id, so that no run waits for it."""
        return f"\0{self.name}"

    def __call__(self, rows: Rows) -> Any:
        return apply_changes(rows, [self])[0]


def apply_changes(rows: Rows, changes: Sequence[CellChange]) -> list[Any]:
    """Changes of one cell, each on what the one before made: read once, written once. If one raises, none is done."""
    data, now = rows.read_cell(changes[0].name, lock=True)
    made: bytes | None = None
    told: list[Any] = []
    for asked in changes:
        fresh, said = asked.change(data if made is None else made, now)
        made = made if fresh is None else fresh
        told.append(said)
    if made is not None:
        rows.write_cell(changes[0].name, made)
    return told


@dataclass(frozen=True, slots=True)
class Transaction:
    """Any other operation.

    Attributes:
        run_id: the only run that it concerns; None if there are others.
        opening: of one that opens a run, which must not be done twice: its owner's name is given once, so a run that
            has it was opened by an earlier try whose answer was lost. That has come to ``result``.
    """

    run_id: str | None
    do: Callable[[Rows], Any]
    opening: Opening | None = None
    result: Any = None

    def __call__(self, rows: Rows) -> Any:
        return self.do(rows)


class Submit(Protocol):
    """Has an operation done in a transaction; what it returns ends when it is kept."""

    def __call__(self, operation: Any, /) -> asyncio.Future[Any]: ...


def fence_error(rows: Rows, fence: Fence, run_id: str) -> StoreError:
    """Return the reason why a session may not write any more."""
    found = rows.find(run_id)
    if found is None:
        if rows.was_deleted(fence.run):
            return fenced_error(None, run_id)
        return lost_error(run_id, "it is not in the store any more, and nobody deleted it")
    if found.run == fence.run and (
        found.epoch < fence.epoch
        or (
            (found.epoch, found.owner) == (fence.epoch, fence.owner)
            and found.attempt_count < fence.acknowledged
        )
    ):
        return lost_error(run_id, "the store is older than what it acknowledged")
    return fenced_error(found, run_id)


def fenced_error(found: RunRow | None, run_id: str) -> Fenced:
    """Return the error for a session whose run was deleted (None) or taken over."""
    owner = None if found is None else Owner.read(found.owner)
    if found is None:
        what = f"run {run_id!r} is no longer in the store: it was deleted"
    else:
        what = f"run {run_id!r} was taken over meanwhile, by {owner.place if owner else 'another process'}"
    return Fenced(f"{what}; nothing more of this execution is kept, see what the other one makes of it")


def lost_error(run_id: str, why: str) -> CheckpointLost:
    """Return the error for a run of which the store has lost what it acknowledged."""
    return CheckpointLost(
        f"run {run_id!r} has lost acknowledged commits: {why}; restore the store from a newer copy and resume, or begin "
        'the run anew (if_exists="restart")'
    )


def parse_run(values: Sequence[Any], run_id: str | None = None) -> RunRow:
    """Return the row of a run; if a value is of a kind that no store writes, one that says so and is DAMAGED.

    ``run_id``: where it is known from elsewhere.
    """
    row = RunRow._make(values)
    fields = zip(row._fields, row, _RUN_KINDS, strict=True)
    wrong = {name: value for name, value, kinds in fields if not _is_one(value, kinds)}
    if not wrong:
        return row
    sane = {name: _SANE.get(name, 0) for name in wrong}
    started = wrong.get("started_ms")
    if isinstance(started, float) and started < _LARGEST:
        sane["started_ms"] = int(started)
    if run_id is not None:
        sane["run_id"] = run_id
    what = ", ".join(f"{name} is {value!a:.60}" for name, value in wrong.items())
    error = f"its row in the store is damaged: {what}; delete the run"
    return row._replace(**{**sane, "status": DAMAGED, "error": error, "owner": None})


def parse_attempt(values: Sequence[Any]) -> Attempt:
    """Return an attempt; if a value is of a kind that no store writes, one that says so and is DAMAGED."""
    row = Attempt._make(values)
    fields = zip(row._fields, row, _ATTEMPT_KINDS, strict=True)
    wrong = {name: kinds for name, value, kinds in fields if not _is_one(value, kinds)}
    if not wrong:
        return row
    sane: dict[str, Any] = {
        name: 0 if kinds is _NUMBER else "" if kinds is _TEXT else None for name, kinds in wrong.items()
    }
    message = f"its row in the store is damaged: {', '.join(wrong)}"
    return row._replace(**{**sane, "outcome": DAMAGED, "failure_class": None, "message": message})


def require_undamaged(found: RunRow | None) -> RunRow | None:
    """Return the row that was found to be changed. Raises CorruptCheckpoint for a damaged one."""
    if found is not None and found.is_damaged:
        raise CorruptCheckpoint(
            f"run {found.run_id!r} cannot be used: {found.error}, then run it from the beginning"
        )
    return found


_TEXT: Final = (str,)
_TEXT_OR_NONE: Final = (str, type(None))
_NUMBER: Final = (int,)
_KINDS: Final[dict[Any, tuple[type, ...]]] = {
    Any: (object,), str: _TEXT, str | None: _TEXT_OR_NONE, int: _NUMBER, float: (int, float),
}  # fmt: skip
_RUN_KINDS: Final = tuple(_KINDS[kind] for kind in get_type_hints(RunRow).values())
_ATTEMPT_KINDS: Final = tuple(_KINDS[kind] for kind in get_type_hints(Attempt).values())
#: What stands in place of values that cannot be read. SQLite sorts texts above all numbers, so that lists, which begin
#: with the newest run, have a start that is a text before this one.
_SANE: Final[dict[str, Any]] = {
    "run_id": "?", "pipeline": "", "started_ms": _LARGEST, "updated_ms": _LARGEST, "left_seconds": -1.0,
}  # fmt: skip


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (
        not isinstance(value, int) or kinds is not _NUMBER or 0 <= value <= _LARGEST
    )


def checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def storable_text(value: str | None) -> str | None:
    """Text that every store can keep: an exception's message may hold a lone surrogate or a NUL."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def is_intact(data: Any, sha: Any) -> bool:
    """Whether data has its checksum. In a store from elsewhere, either may be anything."""
    return isinstance(data, bytes) and checksum(data) == sha


def verify_step(step: Step, run_id: str, position: int, node_id: str, branch: str = "") -> None:
    """Raise CorruptCheckpoint, with the way out, if an output is not what was committed."""
    if is_intact(step.output, step.sha256):
        return
    if position == SAVED:
        raise CorruptCheckpoint(
            f"the saved state of node {node_id!r} in run {run_id!r} is damaged; save it again"
        )
    target = f"that node (resume_from={node_id!r})"
    if branch:  # Children of groups are no targets of a resume.
        group = step.contract.partition(":")[2]
        named = repr(group) if group and "." not in branch else ""
        target = f"the outermost group around it (resume_from={named})"
    raise CorruptCheckpoint(
        f"the output of node {node_id!r} at position {position} of run {run_id!r} is damaged; resume from {target} "
        "to make it anew"
    )
