"""The writing connection of an SQLite store: its rows, one transaction for all queued operations."""

from __future__ import annotations

import copy
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from stroma.checkpoint.durable.owner import Owner, boot_id
from stroma.checkpoint.durable.rows import Fence, RunRow, Step, is_free
from stroma.checkpoint.durable.worker import Job, permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.records import AttemptRecord, StoreFacts
from stroma.checkpoint.sql import statements as sql
from stroma.checkpoint.sql.rows import SqlRows, commit_values
from stroma.checkpoint.sql.tables import SCHEMA_VERSION
from stroma.checkpoint.sqlite.file import FORKS, DatabaseFile, is_fatal


class SqliteRows(SqlRows):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        super().__init__()
        self.db = db
        #: The WAL is to be merged into the file after the commit.
        self.merges_log = False

    def merge_log(self) -> None:
        """Merge the WAL into the database file once the transaction is committed."""
        self.merges_log = True

    def _execute(self, statement: str, values: dict[str, Any]) -> sqlite3.Cursor:
        lists = {name: json.dumps(value) for name, value in values.items() if type(value) is list}
        clocks = {"now_ms": _now_ms(), "clock_ms": _clock_ms()}
        return self.db.execute(sql.for_sqlite(statement), {**values, **lists, **clocks})

    def _execute_each(self, statement: str, values: Sequence[dict[str, Any]]) -> list[list[Any]]:
        return [self._execute(statement, one).fetchall() for one in values]

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        values = commit_values(fence, attempt, step)
        # Otherwise an earlier call recorded it, with its output and usage, and its acknowledgement was lost.
        is_new = self._run(sql.ATTEMPT, **values) == 1
        counted = self._one(sql.COUNT, **values) if is_new else self._one(sql.ATTEMPT_COUNT, run=fence.run)
        if counted is None:
            return False
        if is_new and step is not None:
            self._run(sql.STEP, **values)
        self.attempt_counts.append((fence, counted[0]))
        return True

    def facts(self) -> StoreFacts:
        return StoreFacts(f"SQLite {sqlite3.sqlite_version}", SCHEMA_VERSION)

    # ------------------------------------------------------------------ leases
    #
    # All processes that use the file are on one machine. If the system has a clock that counts from its start
    # and cannot be set, leases use that; leases from before the last start have expired.

    def _run_row(self, values: Sequence[Any]) -> RunRow:
        row = super()._run_row(values)
        is_current = row.left_seconds < 0 or _is_of_this_start(row.owner)
        return row if is_current else row._replace(left_seconds=-1.0)

    def _is_lost(self, owner: str | None, left_seconds: float) -> bool:
        return not _is_of_this_start(owner) or is_free(owner, left_seconds)


_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)
_BOOT: Final = boot_id() if _CLOCK is not None else ""


def _is_of_this_start(owner: str | None) -> bool:
    """Return True if the lease of an owner goes by the present clock of the machine."""
    holder = Owner.read(owner)
    return holder is not None and holder.boot == _BOOT


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _clock_ms() -> int:
    return (time.clock_gettime_ns(_CLOCK) if _BOOT and _CLOCK is not None else time.time_ns()) // 1_000_000


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
