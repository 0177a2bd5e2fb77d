"""The writing connection of an SQLite store: one transaction for all queued operations."""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Callable

from stroma.checkpoint.durable.worker import Job, permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sqlite.file import DatabaseFile, is_fatal
from stroma.checkpoint.sqlite.forks import FORKS
from stroma.checkpoint.sqlite.rows import SqliteRows

__all__ = ["SqliteConnection"]


class SqliteConnection:
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    def __init__(self, file: DatabaseFile) -> None:
        self.name = file.path
        self._file = file
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        FORKS.idle.add(self)

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> Callable[[], StoreError] | None:
        """Perform the batch in one transaction, each operation in a savepoint: one that fails is undone."""
        with FORKS.prevent():
            return self._apply(batch, more)

    def _apply(self, batch: list[Job], more: Callable[[], bool]) -> Callable[[], StoreError] | None:
        file = self._file
        failed: Exception
        try:
            db = self._open()
            rows = SqliteRows(db)
            file.retry_while_locked(lambda: db.execute("BEGIN IMMEDIATE"))
            done = 0
            while done < len(batch) or more():
                self._perform(rows, batch[done])
                done += 1
            file.retry_while_locked(lambda: db.execute("COMMIT"))
            if rows.merges_log:
                _merge_log(db)
        except (sqlite3.Error, StoreError) as error:
            failed = error
        else:
            for fence, attempts in rows.attempt_counts:
                fence.acknowledge(attempts)
            return None
        more()  # Queued operations would fail for the same reason, one after another.
        for job in batch:
            if job.error is None:  # An operation with an error of its own keeps that.
                explained = self._explain(failed)
                # Each task needs its own exception.
                job.error = copy.copy(explained) if explained is failed else explained
        if is_fatal(failed):
            return lambda: file.explain(failed)
        self._roll_back()
        return None

    def handle(self) -> object:
        return self._db

    def close(self) -> None:
        with FORKS.prevent():
            db, self._db = self._db, None
            if db is not None:
                try:
                    _merge_log(db)  # SQLite does so only where no other process has the file open.
                    db.close()
                except sqlite3.Error:
                    pass  # Acknowledged data is in the WAL, which the next connection reads.

    def _perform(self, rows: SqliteRows, job: Job) -> None:
        db, recorded = rows.db, len(rows.attempt_counts)
        db.execute("SAVEPOINT one")
        try:
            job.value = job.operation(rows)
        except Exception as error:
            if is_fatal(error) or not db.in_transaction:  # After some errors SQLite has rolled back already.
                raise
            db.execute("ROLLBACK TO one")
            del rows.attempt_counts[recorded:]
            job.error = self._explain(error)
        db.execute("RELEASE one")

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, StoreError):
            return error
        if isinstance(error, sqlite3.Error):
            explained = self._file.explain(error)
        else:
            explained = permanent_error(f"{self.name} cannot store the data: {type(error).__name__}: {error}")
        explained.__cause__ = error
        return explained

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and self._identity != self._file.identity():
            self.close()  # Deleted or replaced: data written to the old file would be lost.
        if self._db is None:
            self._db = self._file.open()
            self._identity = self._file.identity()
        return self._db

    def _roll_back(self) -> None:
        """Roll back a failed transaction, so that the next one can begin."""
        db = self._db
        try:
            if db is not None and db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()  # The next operation opens the file again.


def _merge_log(db: sqlite3.Connection) -> None:
    """Copy the WAL into the database file, as far as no reader needs the old pages. Never waits."""
    try:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error:
        pass  # It stays in the WAL, where every connection finds it.
