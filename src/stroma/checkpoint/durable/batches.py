"""The writing connection of a store on a server: operations that wait together are performed together."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from stroma.checkpoint.durable.operations import CellChange, Commit, EventAppend, Transaction
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.errors import StoreError

__all__ = ["ServerConnection", "Unreachable", "stages"]


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
