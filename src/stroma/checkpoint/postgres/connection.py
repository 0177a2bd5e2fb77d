"""The connection that a Postgres store writes with: one round trip and one transaction for all commits that wait, and one
transaction for all changes of a cell."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

from stroma.checkpoint.durable.operations import CellChange, Commit, Transaction, apply_changes
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.postgres.rows import PostgresRows, commit_query, commit_reply
from stroma.checkpoint.postgres.server import PostgresEndpoint, is_lost, is_misled, may_pass, pause

__all__ = ["PostgresConnection", "stages"]

T = TypeVar("T")
Database = psycopg.Connection[Any]

_LOSSES = 3  # of connections, with the same operations under way: one of them may be what the server dies of


class _PostgresUnreachable(Exception):
    """There is no connection, and so no use in trying the other operations."""

    def __init__(self, why: psycopg.Error | StoreError) -> None:
        super().__init__(why)
        self.why = why


class PostgresConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`.

    A connection that breaks leaves open whether what was under way was done. It is done again on the next one: every
    operation finds out by itself, from the rows, what is there already.
    """

    def __init__(self, server: PostgresEndpoint) -> None:
        self.name = server.name
        self._server = server
        self._db: Database | None = None
        #: What of a batch is still to be done, by identity.
        self._left: dict[int, Job] = {}

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        """Commits together, changes of a cell too, everything else in a transaction of its own."""
        more()
        self._left = {id(job): job for job in batch}
        known = len(batch)
        try:
            for stage in stages(batch):
                if len(stage) > 1 and isinstance(stage[0].operation, CellChange):
                    self._one_cell(stage)
                elif len(stage) > 1:
                    self._together(stage)
                for job in stage:
                    if id(job) in self._left:
                        self._alone(job)
        except _PostgresUnreachable as gone:
            more()  # They would fail for the same reason, one after another.
            for job in [*self._left.values(), *batch[known:]]:
                job.error = self._explain(gone.why)
        self._left = {}

    def handle(self) -> object:
        return self._db

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    # ------------------------------------------------------------------ operations

    def _together(self, jobs: list[Job]) -> None:
        """Commits, all or none of them; those that are not done by this are left."""
        commits = [(job, job.operation) for job in jobs if isinstance(job.operation, Commit)]
        # In one order for everybody: two processes never wait for each other's runs.
        commits.sort(key=lambda pair: pair[1].fence.run)

        def commit(db: Database, _: bool) -> list[tuple[bool, int]]:
            with db.pipeline():  # What is sent before the end of a pipeline is one transaction.
                sent = [_send(db, it) for _, it in commits]
            return [commit_reply(cursor) for cursor in sent]

        try:
            kept = self._try(commit, lambda _: False)
        except _PostgresUnreachable:
            raise
        except Exception:
            return  # One of them is at fault: alone, it spoils no other.
        for (job, it), (is_kept, attempts) in zip(commits, kept, strict=True):
            if is_kept:
                it.fence.acknowledge(attempts)
                self._settle(job)

    def _one_cell(self, jobs: list[Job]) -> None:
        """Changes of one cell, all or none of them; those that are not done by this are left."""
        changes = [job.operation for job in jobs if isinstance(job.operation, CellChange)]

        def change(db: Database, _: bool) -> list[Any]:
            with db.transaction():
                return apply_changes(PostgresRows(db), changes)

        try:
            told = self._try(change)
        except _PostgresUnreachable:
            raise
        except Exception:
            return  # One of them is at fault: alone, it spoils no other.
        for job, value in zip(jobs, told, strict=True):
            self._settle(job, value)

    def _alone(self, job: Job) -> None:
        operation = job.operation
        try:
            if isinstance(operation, Commit) and self._try(lambda db, _: _commit(db, operation)):
                self._settle(job)
            else:  # Also for a commit that is fenced off, to say why.
                self._settle(job, self._try(lambda db, doubt: _transact(db, operation, doubt)))
        except _PostgresUnreachable:
            raise
        except Exception as error:
            self._settle(job, error=self._explain(error))

    def _settle(self, job: Job, value: Any = None, error: Exception | None = None) -> None:
        job.value, job.error = value, error
        del self._left[id(job)]

    def _explain(self, error: Exception) -> StoreError:
        told = self._server.explain(error)
        return copy.copy(told) if told is error else told  # Each task raises one of its own.

    # ------------------------------------------------------------------ the connection

    def _try(
        self, do: Callable[[Database, bool], T], passes: Callable[[psycopg.Error], bool] = may_pass
    ) -> T:
        """Do something until it is done, or is known to fail, or patience is at its end.

        ``do`` is told whether an earlier try may have been done without our knowing.
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
                if lost or is_misled(error):
                    self._drop()
                if not (lost and losses < _LOSSES) and not passes(error):
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
                if not may_pass(error) or time.monotonic() > deadline:
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
    """Operations that may be done together, in an order that keeps that of each run.

    A commit may pass what is known to concern other runs only, and a change of a cell all but the others of that cell.
    """
    cells: dict[str, list[Job]] = {}
    found: list[list[Job]] = []
    together: list[Job] | None = None
    passed: set[str] = set()
    for job in batch:
        run_id = _run_of(job.operation)
        if isinstance(job.operation, Commit):
            if together is None or run_id in passed:
                together = []
                found.append(together)
                passed.clear()
            together.append(job)
        elif isinstance(job.operation, CellChange):
            changes = cells.get(job.operation.name)
            if changes is None:
                changes = cells[job.operation.name] = []
                found.append(changes)
            changes.append(job)
        else:
            found.append([job])
            if run_id is None:
                together = None
            else:
                passed.add(run_id)
    return found


def _run_of(operation: Any) -> str | None:
    """The run that an operation concerns, if it is known to concern no other."""
    return operation.run_id if isinstance(operation, (Commit, Transaction)) else None


def _send(db: Database, commit: Commit) -> psycopg.Cursor[Any]:
    return db.execute(*commit_query(commit.fence, commit.attempt, commit.step), binary=True)


def _commit(db: Database, commit: Commit) -> bool:
    is_kept, attempts = commit_reply(_send(db, commit))
    if is_kept:
        commit.fence.acknowledge(attempts)
    return is_kept


def _transact(db: Database, operation: Any, doubt: bool) -> Any:
    rows = PostgresRows(db)
    with db.transaction():
        opening = operation.opening if isinstance(operation, Transaction) else None
        if doubt and opening is not None:
            # An owner's name is given once. A run that has it was opened by the try whose answer was lost, and the
            # session knows what that came to; opening again would be refused, or begin one more execution.
            found = rows.find(opening.run_id, lock=True)
            if found is not None and found.owner == opening.owner:
                return operation.result
        value = operation(rows)
    for fence, attempts in rows.counted:
        fence.acknowledge(attempts)
    return value
