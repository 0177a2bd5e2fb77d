"""Operations on the rows of a durable store, each in one transaction, and the batches of a server."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.integrity import lost_error
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import EventRow, Fence, Opening, Rows, RunRow, Step
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.errors import CheckpointLost, Fenced, StoreError
from stroma.checkpoint.records import AttemptRecord


class Commit(NamedTuple):
    """The most frequent operation. A store may commit many of them together."""

    run_id: str
    fence: Fence
    attempt: AttemptRecord
    step: Step | None

    def __call__(self, rows: Rows) -> None:
        if not rows.commit(self.fence, self.attempt, self.step):
            raise fence_error(rows, self.fence, self.run_id)


@dataclass(frozen=True, slots=True)
class CellChange:
    """A change of a cell. A store may apply many of one cell together, see :func:`apply_changes`."""

    name: str
    change: Change[Any]

    @property
    def run_id(self) -> str:
        """Key that orders the changes of this cell. NUL is in no run id, so no run waits for it."""
        return f"\0{self.name}"

    def __call__(self, rows: Rows) -> Any:
        return apply_changes(rows, [self])[0]


def apply_changes(rows: Rows, changes: Sequence[CellChange]) -> list[Any]:
    """Apply changes of one cell, one after another: one read, one write. If one raises, none is applied."""
    data, now = rows.read_cell(changes[0].name, lock=True)
    new_data: bytes | None = None
    answers: list[Any] = []
    for cell_change in changes:
        changed, answer = cell_change.change(data if new_data is None else new_data, now)
        new_data = new_data if changed is None else changed
        answers.append(answer)
    if new_data is not None:
        rows.write_cell(changes[0].name, new_data)
    return answers


@dataclass(frozen=True, slots=True)
class EventAppend:
    """A batch of events. A store may append those of many runs together."""

    run_id: str
    batch: EventRow

    def __call__(self, rows: Rows) -> None:
        rows.append_events([self.batch])


@dataclass(slots=True)
class Transaction:
    """Any other operation.

    Attributes:
        run_id: the only run that it uses; None for several.
        opening: set if it opens a run, which must not be done twice. The name of an owner is unique, so a run
            that has it was opened by an earlier try whose answer was lost; its result is ``result``.
        changes_cells: it locks cells, for which other runs wait, and is performed alone.
    """

    run_id: str | None
    do: Callable[[Rows], Any]
    opening: Opening | None = None
    result: Any = None
    changes_cells: bool = False

    def __call__(self, rows: Rows) -> Any:
        return self.do(rows)


def perform_all(operations: Sequence[Any], rows: Rows) -> list[Any]:
    """Perform operations in a transaction, and return their results. Changes of cells are of one cell."""
    if isinstance(operations[0], CellChange):
        return apply_changes(rows, operations)
    return [operation(rows) for operation in operations]


def fence_error(rows: Rows, fence: Fence, run_id: str) -> StoreError:
    """Return the reason why a session may no longer write."""
    run = rows.find(run_id)
    if run is None:
        return CheckpointLost(
            f"run {run_id!r} is no longer in the store: it was deleted, or the store has lost it; restore "
            "the store from a newer copy and resume, or run it from the start"
        )
    if run.run == fence.run and (
        run.epoch < fence.epoch
        or ((run.epoch, run.owner) == (fence.epoch, fence.owner) and run.attempt_count < fence.acknowledged)
    ):
        return lost_error(run_id, "the store is older than what it acknowledged")
    return fenced_error(run, run_id, fence)


def fenced_error(run: RunRow, run_id: str, fence: Fence) -> Fenced:
    """Return the error for a session that was fenced off. ``run``: the present row."""
    owner = Owner.read(run.owner)
    place = owner.place if owner else "another process"
    if run.run != fence.run:
        return Fenced(
            f"run {run_id!r} was deleted, and started again by {place}; this execution records nothing more"
        )
    if run.status == "CANCELLED":
        return Fenced(f"run {run_id!r} was cancelled by {place}; this execution records nothing more")
    if run.epoch != fence.epoch:
        return Fenced(
            f"run {run_id!r} was taken over by {place}; this execution records nothing more, see the "
            "result of the other one"
        )
    # No process has taken it over: a request has replaced the owner.
    return Fenced(
        f"run {run_id!r} was paused, or got another budget, while this process did not renew its lease; this "
        "execution records nothing more, resume the run"
    )


class Unreachable(Exception):
    """The server does not answer, so the other operations would fail as well."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class ServerConnection(ABC):
    """See :class:`stroma.checkpoint.durable.worker.Connection`.

    Attributes:
        can_roll_back: an operation that fails undoes all others of its transaction.

    Args:
        name: address of the server without the password.
        explain: returns the StoreError for an error of an operation.
    """

    can_roll_back: ClassVar[bool]

    def __init__(self, name: str, explain: Callable[[Exception], StoreError]) -> None:
        self.name = name
        self._explain = explain
        #: The pending jobs of the batch, by identity.
        self._pending: dict[int, Job] = {}

    @abstractmethod
    def _commit_all(self, jobs: list[tuple[Job, Commit]]) -> None:
        """Perform commits in one round trip. Those that fail may stay pending. Raises Unreachable."""

    @abstractmethod
    def _transact(self, operations: list[Any]) -> list[Any]:
        """Perform operations as one transaction. Raises Unreachable, and what an operation raises."""

    @abstractmethod
    def handle(self) -> object: ...

    @abstractmethod
    def close(self) -> None: ...

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Perform operations together where the store can; see :func:`stages`."""
        more()
        self._pending = {id(job): job for job in batch}
        try:
            for stage in stages(batch, can_roll_back=self.can_roll_back):
                operations: list[Any] = [job.operation for job in stage]
                if isinstance(operations[0], Commit):
                    self._commit_all(list(zip(stage, operations, strict=True)))
                elif len(stage) > 1:
                    self._perform_together(stage)
                for job in stage:
                    if id(job) in self._pending:
                        self._perform(job)
        except Unreachable as error:
            size = len(batch)
            more()  # Queued operations would fail for the same reason, one after another.
            for job in [*self._pending.values(), *batch[size:]]:
                job.error = self._explained(error.reason)
        self._pending = {}

    def _perform_together(self, jobs: list[Job]) -> None:
        """Perform jobs in one transaction, or none: then they stay pending, and do not affect each other."""
        # The same order in all processes prevents deadlocks.
        jobs = sorted(jobs, key=_run_of)
        try:
            answers = self._transact([job.operation for job in jobs])
        except Unreachable:
            raise
        except Exception:
            return
        for job, answer in zip(jobs, answers, strict=True):
            self._settle(job, answer)

    def _perform(self, job: Job) -> None:
        try:
            self._settle(job, self._transact([job.operation])[0])
        except Unreachable:
            raise
        except Exception as error:
            self._settle(job, error=error)

    def _settle(self, job: Job, value: Any = None, error: Exception | None = None) -> None:
        job.value, job.error = value, None if error is None else self._explained(error)
        del self._pending[id(job)]

    def _explained(self, error: Exception) -> StoreError:
        explained = self._explain(error)
        return copy.copy(explained) if explained is error else explained  # Each task needs its own exception.


def stages(batch: list[Job], *, can_roll_back: bool) -> list[list[Job]]:
    """Group operations that can be performed together, in the order of each run and of each cell.

    An operation joins an earlier group of its kind, unless one on its run follows that. Only a store that can
    roll back performs operations on several runs together that read before they write. Events may overtake
    everything.
    """
    groups: list[list[Job]] = []
    joinable: dict[str, int] = {}  # The last group of each kind.
    last: dict[str, int] = {}  # The last group with each run.
    last_of_all = -1
    for job in batch:
        run_id, kind = _run_of(job), _kind(job.operation, can_roll_back)
        at = joinable.get(kind, -1)
        if at < 0 or (kind != "events" and at < max(last_of_all, last.get(run_id, -1))):
            at = len(groups)
            groups.append([])
        groups[at].append(job)
        if kind:
            joinable[kind] = at
        last[run_id] = max(at, last.get(run_id, -1))
        if not run_id:
            last_of_all = at
    return groups


def _run_of(job: Job) -> str:
    """Return the run that an operation is about, or the cell; "" for several runs."""
    return getattr(job.operation, "run_id", None) or ""


def _kind(operation: Any, can_roll_back: bool) -> str:
    """Return the kind of operations with which an operation is performed; "" if it is performed alone."""
    if isinstance(operation, Commit):
        return "commits"
    if isinstance(operation, EventAppend):
        return "events"
    if isinstance(operation, CellChange):
        return operation.run_id
    is_of_run = isinstance(operation, Transaction) and operation.run_id is not None
    return "transactions" if is_of_run and can_roll_back and not operation.changes_cells else ""
