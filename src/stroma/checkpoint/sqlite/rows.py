"""The rows of an SQLite store, read and written on one connection."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from typing import Any, Final

from stroma.checkpoint.durable.owner import Owner, boot_id
from stroma.checkpoint.durable.rows import Fence, RunRow, Step, is_free
from stroma.checkpoint.records import AttemptRecord, StoreFacts
from stroma.checkpoint.sql import statements as sql
from stroma.checkpoint.sql.rows import SqlRows, commit_values

__all__ = ["SqliteRows"]


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
        return self.db.execute(sql.for_sqlite(statement), {**values, **lists, **_clocks()})

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
        (version,) = self.db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchone()
        return StoreFacts(f"SQLite {sqlite3.sqlite_version}", int(version))

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
    holder = Owner.read(owner) if isinstance(owner, str) else None
    return holder is not None and holder.boot == _BOOT


def _clocks() -> dict[str, int]:
    return {"now_ms": _now_ms(), "clock_ms": _clock_ms()}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _clock_ms() -> int:
    return (time.clock_gettime_ns(_CLOCK) if _BOOT and _CLOCK is not None else time.time_ns()) // 1_000_000
