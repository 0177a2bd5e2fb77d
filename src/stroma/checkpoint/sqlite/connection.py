"""The connection that a SQLite store writes with: one transaction for all operations that wait."""

from __future__ import annotations

import copy
import itertools
import sqlite3
from collections.abc import Callable

from stroma.checkpoint.durable.operations import Commit
from stroma.checkpoint.durable.worker import Job, permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sqlite.file import DatabaseFile, is_fatal
from stroma.checkpoint.sqlite.rows import SqliteRows

__all__ = ["SqliteConnection"]


class SqliteConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    def __init__(self, file: DatabaseFile) -> None:
        self.name = file.path
        self._file = file
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> Callable[[], StoreError] | None:
        """One transaction. Only if an operation fails, which few do, is it done again with a savepoint for each."""
        file = self._file
        failed: Exception
        try:
            db = self._open()
            rows = SqliteRows(db)
            if not self._all_go_well(rows, batch, more):
                file.patiently(lambda: db.execute("BEGIN IMMEDIATE"))
                for job in batch:
                    self._do(rows, job)
            counted = rows.counted()
            file.patiently(lambda: db.execute("COMMIT"))
        except (sqlite3.Error, StoreError) as error:
            failed = error
        else:
            for fence, attempts in counted:
                fence.acknowledge(attempts)
            return None
        more()  # They would fail for the same reason, one after another.
        for job in batch:
            if job.error is None:  # What failed by itself keeps its reason.
                told = self._explain(failed)
                job.error = copy.copy(told) if told is failed else told  # Each task raises one of its own.
        if is_fatal(failed):
            return lambda: file.explain(failed)
        self._undo()
        return None

    def handle(self) -> object:
        return self._db

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error:
                pass  # What was acknowledged is in the WAL; the next one to open the file finds it.

    def _all_go_well(self, rows: SqliteRows, batch: list[Job], more: Callable[[], bool]) -> bool:
        """Do all operations in a transaction that is left open; or, if one fails, in none."""
        db = rows.db
        self._file.patiently(lambda: db.execute("BEGIN IMMEDIATE"))
        done = 0
        while done < len(batch) or more():
            try:
                commits = _commits(batch, done)
                if len(commits) > 1:
                    go = rows.commit_all(commits)
                    done += len(commits)
                else:
                    go = True
                    batch[done].value = batch[done].operation(rows)
                    done += 1
            except Exception as error:
                if is_fatal(error):
                    raise
                go = False
            if not go:
                if db.in_transaction:  # Some errors make SQLite roll back everything.
                    db.execute("ROLLBACK")
                return False
        return True

    def _do(self, rows: SqliteRows, job: Job) -> None:
        db = rows.db
        db.execute("SAVEPOINT one")
        try:
            job.value = job.operation(rows)
        except Exception as error:
            if is_fatal(error) or not db.in_transaction:  # Some errors make SQLite roll back everything.
                raise
            db.execute("ROLLBACK TO one")
            job.error = self._explain(error)
        db.execute("RELEASE one")

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, StoreError):
            return error
        if isinstance(error, sqlite3.Error):
            told = self._file.explain(error)
        else:
            told = permanent_error(f"{self.name} cannot keep this: {type(error).__name__}: {error}")
        told.__cause__ = error
        return told

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and self._identity != self._file.identity():
            self.close()  # Deleted or replaced: what went into the old file would be lost.
        if self._db is None:
            self._db = self._file.open()
            self._identity = self._file.identity()
        return self._db

    def _undo(self) -> None:
        """After a transaction that failed: back to where the next one can begin."""
        db = self._db
        try:
            if db is not None and db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()  # The next operation opens the file anew.


def _commits(batch: list[Job], first: int) -> list[Commit]:
    """The commits that follow one another from there on."""
    found: list[Commit] = []
    for job in itertools.islice(batch, first, None):
        if not isinstance(job.operation, Commit):
            break
        found.append(job.operation)
    return found
