"""The writing connection of a store on a server: operations that wait together are performed together."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from stroma.checkpoint.durable.operations import CellChange, Commit, EventAppend, Transaction, apply_changes
from stroma.checkpoint.durable.rows import Rows
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

    Args:
        name: address of the server without the password.
        explain: returns the StoreError for an error of an operation.
    """

    def __init__(self, name: str, explain: Callable[[Exception], StoreError]) -> None:
        self.name = name
        self._explain = explain
        #: The pending jobs of the batch, by identity.
        self._pending: dict[int, Job] = {}

    @abstractmethod
    def _commit_all(self, jobs: list[tuple[Job, Commit]]) -> None:
        """Perform commits in one round trip. Those that fail may stay pending. Raises Unreachable."""

    @abstractmethod
    def _transact(self, operation: Callable[[Rows], Any]) -> Any:
        """Perform an operation as one transaction. Raises Unreachable, and what the operation raises."""

    @abstractmethod
    def handle(self) -> object: ...

    @abstractmethod
    def close(self) -> None: ...

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Perform commits, changes of one cell and events together; anything else in a transaction."""
        more()
        self._pending = {id(job): job for job in batch}
        try:
            for stage in stages(batch):
                operations: list[Any] = [job.operation for job in stage]
                if isinstance(operations[0], Commit):
                    self._commit_all(list(zip(stage, operations, strict=True)))
                elif len(stage) > 1:  # Changes of one cell, or events.
                    self._perform_together(stage, operations)
                for job in stage:
                    if id(job) in self._pending:
                        self._perform(job)
        except Unreachable as error:
            size = len(batch)
            more()  # Queued operations would fail for the same reason, one after another.
            for job in [*self._pending.values(), *batch[size:]]:
                job.error = self._explained(error.reason)
        self._pending = {}

    def _perform_together(self, jobs: list[Job], operations: list[Any]) -> None:
        """Perform jobs in one transaction, or none: then they stay pending, and do not affect each other."""

        def do(rows: Rows) -> list[Any]:
            if isinstance(operations[0], CellChange):
                return apply_changes(rows, operations)
            rows.append_events([one.batch for one in operations])
            return [None] * len(operations)

        try:
            answers = self._transact(do)
        except Unreachable:
            raise
        except Exception:
            return
        for job, answer in zip(jobs, answers, strict=True):
            self._settle(job, answer)

    def _perform(self, job: Job) -> None:
        try:
            self._settle(job, self._transact(job.operation))
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


def stages(batch: list[Job]) -> list[list[Job]]:
    """Group operations that can be performed together, in the order of each run and of each cell.

    A commit may overtake operations of other runs, a change of a cell anything but changes of the same cell,
    and events may overtake everything.
    """
    together: dict[str, list[Job]] = {}  # Events, and the changes of each cell.
    groups: list[list[Job]] = []
    commits: list[Job] | None = None
    runs_since: set[str] = set()  # runs of the other operations after the first of these commits
    for job in batch:
        operation = job.operation
        if isinstance(operation, Commit):
            if commits is None or operation.run_id in runs_since:
                commits = []
                groups.append(commits)
                runs_since.clear()
            commits.append(job)
        elif isinstance(operation, CellChange | EventAppend):
            name = operation.run_id if isinstance(operation, CellChange) else ""
            if name not in together:
                groups.append(together.setdefault(name, []))
            together[name].append(job)
        else:
            groups.append([job])
            if isinstance(operation, Transaction) and operation.run_id is not None:
                runs_since.add(operation.run_id)
            else:
                commits = None
    return groups
