"""The writing connection of a Postgres store.

One round trip and one transaction for all queued commits, and one transaction for all changes of a cell.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

from stroma.checkpoint.durable.operations import CellChange, Commit, EventAppend, Transaction, apply_changes
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.postgres.rows import PostgresRows, commit_query, commit_reply
from stroma.checkpoint.postgres.server import PostgresEndpoint, is_lost, is_misdirected, is_temporary, pause

__all__ = ["PostgresConnection", "stages"]

T = TypeVar("T")
Database = psycopg.Connection[Any]

_MAX_LOSSES = 3  # lost connections during the same operations: one of them may crash the server


class _PostgresUnreachable(Exception):
    """There is no connection, so the other operations would fail as well."""

    def __init__(self, reason: psycopg.Error | StoreError) -> None:
        super().__init__(reason)
        self.reason = reason


class PostgresConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`.

    If a connection breaks, it is unknown if the operation in progress was executed. It is repeated on the
    next connection: every operation finds in the rows what an earlier try has stored.
    """

    def __init__(self, server: PostgresEndpoint) -> None:
        self.name = server.name
        self._server = server
        self._db: Database | None = None
        #: The pending jobs of the batch, by identity.
        self._pending: dict[int, Job] = {}

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Perform consecutive commits together, changes of one cell together, and anything else in its own transaction."""
        more()
        self._pending = {id(job): job for job in batch}
        size = len(batch)
        try:
            for stage in stages(batch):
                if len(stage) > 1 and isinstance(stage[0].operation, CellChange):
                    self._change_cell(stage)
                elif len(stage) > 1 and isinstance(stage[0].operation, EventAppend):
                    self._append_events(stage)
                elif len(stage) > 1:
                    self._commit_all(stage)
                for job in stage:
                    if id(job) in self._pending:
                        self._perform(job)
        except _PostgresUnreachable as error:
            more()  # Queued operations would fail for the same reason, one after another.
            for job in [*self._pending.values(), *batch[size:]]:
                job.error = self._explain(error.reason)
        self._pending = {}

    def handle(self) -> object:
        return self._db

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    # ------------------------------------------------------------------ operations

    def _commit_all(self, jobs: list[Job]) -> None:
        """Perform all commits, or none: then they stay pending. Commits that the fence refuses stay pending, too."""
        commits = [(job, job.operation) for job in jobs if isinstance(job.operation, Commit)]
        # The same order in all processes prevents deadlocks.
        commits.sort(key=lambda pair: pair[1].fence.run)

        def send(db: Database, _: bool) -> list[tuple[bool, int]]:
            with db.pipeline():  # A pipeline is one transaction.
                cursors = [_send(db, commit) for _, commit in commits]
            return [commit_reply(cursor) for cursor in cursors]

        try:
            replies = self._retry(send, lambda _: False)
        except _PostgresUnreachable:
            raise
        except Exception:
            return  # One of them fails: performed one by one, it does not affect the others.
        for (job, commit), (is_recorded, attempts) in zip(commits, replies, strict=True):
            if is_recorded:
                commit.fence.acknowledge(attempts)
                self._settle(job)

    def _change_cell(self, jobs: list[Job]) -> None:
        """Perform all changes of one cell, or none: then they stay pending."""
        changes = [job.operation for job in jobs if isinstance(job.operation, CellChange)]
        self._perform_together(jobs, lambda rows: apply_changes(rows, changes))

    def _append_events(self, jobs: list[Job]) -> None:
        """Append all batches of events, or none: then they stay pending."""
        batches = [job.operation.batch for job in jobs if isinstance(job.operation, EventAppend)]

        def append(rows: PostgresRows) -> list[None]:
            rows.append_events(batches)
            return [None] * len(jobs)

        self._perform_together(jobs, append)

    def _perform_together(self, jobs: list[Job], do: Callable[[PostgresRows], list[Any]]) -> None:
        """Perform jobs in one transaction. If it fails, they stay pending."""

        def transact(db: Database, _: bool) -> list[Any]:
            with db.transaction():
                return do(PostgresRows(db))

        try:
            answers = self._retry(transact)
        except _PostgresUnreachable:
            raise
        except Exception:
            return  # One of them fails: performed one by one, it does not affect the others.
        for job, answer in zip(jobs, answers, strict=True):
            self._settle(job, answer)

    def _perform(self, job: Job) -> None:
        operation = job.operation
        try:
            if isinstance(operation, Commit) and self._retry(lambda db, _: _commit(db, operation)):
                self._settle(job)
            else:  # Also for a commit that the fence refuses: this raises the reason.
                self._settle(job, self._retry(lambda db, is_repeated: _transact(db, operation, is_repeated)))
        except _PostgresUnreachable:
            raise
        except Exception as error:
            self._settle(job, error=self._explain(error))

    def _settle(self, job: Job, value: Any = None, error: Exception | None = None) -> None:
        job.value, job.error = value, error
        del self._pending[id(job)]

    def _explain(self, error: Exception) -> StoreError:
        explained = self._server.explain(error)
        return copy.copy(explained) if explained is error else explained  # Each task needs its own exception.

    # ------------------------------------------------------------------ the connection

    def _retry(
        self,
        do: Callable[[Database, bool], T],
        should_retry: Callable[[psycopg.Error], bool] = is_temporary,
    ) -> T:
        """Repeat an operation until it succeeds, fails permanently, or ``patience_seconds`` are over.

        The second argument of ``do`` is True if an earlier try may have been executed although its reply was
        lost.
        """
        deadline = time.monotonic() + self._server.patience_seconds
        tries = losses = 0
        while True:
            db = self._open(deadline)
            try:
                return do(db, losses > 0)
            except psycopg.Error as error:
                lost = is_lost(db)
                losses += lost
                if lost or is_misdirected(error):
                    self._drop()
                if not (lost and losses < _MAX_LOSSES) and not should_retry(error):
                    raise
                if time.monotonic() > deadline:
                    raise
            tries += 1
            pause(tries)

    def _open(self, deadline: float) -> Database:
        tries = 0
        while self._db is None or is_lost(self._db):
            self._drop()
            try:
                self._db = self._server.connect()
            except StoreError as error:
                raise _PostgresUnreachable(error) from error
            except psycopg.Error as error:
                if not is_temporary(error) or time.monotonic() > deadline:
                    raise _PostgresUnreachable(error) from error
                tries += 1
                pause(tries)
        return self._db

    def _drop(self) -> None:
        try:
            self.close()
        except psycopg.Error:
            pass


def stages(batch: list[Job]) -> list[list[Job]]:
    """Group operations that can be performed together. The order of operations of one run, and of one cell, stays.

    A commit may overtake operations of other runs, a change of a cell anything but changes of the same cell,
    and events may overtake everything.
    """
    events: list[Job] = []
    cells: dict[str, list[Job]] = {}
    groups: list[list[Job]] = []
    commits: list[Job] | None = None
    runs_since: set[str] = set()  # runs of the other operations after the first of these commits
    for job in batch:
        run_id = _run_of(job.operation)
        if isinstance(job.operation, Commit):
            if commits is None or run_id in runs_since:
                commits = []
                groups.append(commits)
                runs_since.clear()
            commits.append(job)
        elif isinstance(job.operation, CellChange):
            changes = cells.get(job.operation.name)
            if changes is None:
                changes = cells[job.operation.name] = []
                groups.append(changes)
            changes.append(job)
        elif isinstance(job.operation, EventAppend):
            if not events:
                groups.append(events)
            events.append(job)
        else:
            groups.append([job])
            if run_id is None:
                commits = None
            else:
                runs_since.add(run_id)
    return groups


def _run_of(operation: Any) -> str | None:
    """Return the only run that an operation uses; None if it may use several."""
    return operation.run_id if isinstance(operation, (Commit, Transaction)) else None


def _send(db: Database, commit: Commit) -> psycopg.Cursor[Any]:
    return db.execute(*commit_query(commit.fence, commit.attempt, commit.step), binary=True)


def _commit(db: Database, commit: Commit) -> bool:
    is_recorded, attempts = commit_reply(_send(db, commit))
    if is_recorded:
        commit.fence.acknowledge(attempts)
    return is_recorded


def _transact(db: Database, operation: Any, is_repeated: bool) -> Any:
    rows = PostgresRows(db)
    with db.transaction():
        opening = operation.opening if isinstance(operation, Transaction) else None
        if is_repeated and opening is not None:
            # The name of an owner is unique. A run that has it was opened by the try whose reply was lost,
            # and the session has its result; opening again would be refused, or begin another execution.
            run = rows.find(opening.run_id, lock=True)
            if run is not None and run.owner == opening.owner:
                return operation.result
        value = operation(rows)
    for fence, attempts in rows.attempt_counts:
        fence.acknowledge(attempts)
    return value
