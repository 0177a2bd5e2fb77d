"""The rows of a Postgres store, read and written on one connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from stroma.checkpoint.durable.integrity import require_undamaged
from stroma.checkpoint.durable.owner import machine_prefix
from stroma.checkpoint.durable.rows import Annotation, Fence, RunRow, Step, StepRow
from stroma.checkpoint.records import AttemptRecord, StoreFacts
from stroma.checkpoint.sql import statements as sql
from stroma.checkpoint.sql.rows import SqlRows, commit_values, step_row
from stroma.checkpoint.sql.tables import key

__all__ = ["PostgresRows", "read_commit", "send_commit"]

# Wakes workers that listen; identical notifications of a transaction are sent once.
_NOTIFY = b"SELECT pg_notify('stroma_' || current_schema(), '')"
_FACTS = """SELECT current_setting('server_version'), (SELECT v FROM meta WHERE k = 'schema_version'),
    now_ms(), current_setting('fsync'), current_setting('full_page_writes')"""


class PostgresRows(SqlRows):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.db = db
        #: The runs that find() has created in this transaction to lock them, by id.
        self._created: dict[str, int] = {}
        #: What read_ahead() has read, until it is asked for.
        self._runs: dict[str, RunRow] = {}
        self._inputs: dict[tuple[int, int], tuple[str, bytes, bytes]] = {}
        self._annotations: dict[int, list[StepRow]] = {}

    def _execute(self, statement: str, values: dict[str, Any]) -> psycopg.Cursor[Any]:
        # Text would double the size of outputs.
        return self.db.execute(sql.for_postgres(statement), values, binary=True)

    def _execute_each(self, statement: str, values: Sequence[dict[str, Any]]) -> list[list[Any]]:
        if not values:
            return []
        cursor = self.db.cursor(binary=True)
        cursor.executemany(sql.for_postgres(statement), values, returning=True)  # One round trip.
        replies = [cursor.fetchall()]
        while cursor.nextset():
            replies.append(cursor.fetchall())
        return replies

    def _machine(self) -> str:
        return machine_prefix()

    def _notify(self) -> None:
        self.db.execute(_NOTIFY)

    def read_ahead(self, run_ids: Sequence[str]) -> None:
        """Lock and read runs whose operations begin with that: three statements, and not three for each."""
        if len(run_ids) < 2:
            return
        runs = list(map(self._run_row, self._all(sql.LOCK_MANY, run_keys=list(map(key, run_ids)))))
        numbers = [run.run for run in runs]
        inputs = {number: stored for number, *stored in self._all(sql.INPUTS, runs=numbers)}
        annotations: dict[int, list[StepRow]] = {number: [] for number in numbers}
        for number, *row in self._all(
            sql.ANNOTATIONS_OF_MANY, runs=numbers, kinds=list(map(int, Annotation))
        ):
            annotations[number].append(step_row(row))
        for run in runs:
            self._runs[run.run_id] = run
            self._annotations[run.run] = annotations[run.run]
            if run.run in inputs:
                data, sha256, contract = inputs[run.run]
                self._inputs[run.run, run.execution] = contract, data, sha256

    def input(self, run: int, execution: int) -> tuple[str, bytes, bytes] | None:
        return self._inputs.pop((run, execution), None) or super().input(run, execution)

    def annotations(self, run: int, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        known = self._annotations.pop(run, None)
        if known is None or branch is not None:
            return super().annotations(run, *kinds, branch=branch)
        return [row for row in known if row.position in kinds]

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        if lock and run_id in self._runs:
            return require_undamaged(self._runs.pop(run_id))
        run = super().find(run_id, lock=lock)
        if run is not None or not lock:
            return run
        # Without a row, there is nothing to lock: two sessions that open a new run wait for the same row.
        created = self._one(sql.NEW_RUN, run_key=key(run_id), run_id=run_id)
        if created is None:
            return self.find(run_id, lock=True)
        self._created[run_id] = created[0]
        return None

    def _new_run(self, run_id: str) -> int:
        if run_id not in self._created and (run := self.find(run_id, lock=True)) is not None:
            return int(run.run)
        return self._created.pop(run_id)

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        is_recorded, attempts = read_commit(send_commit(self.db, fence, attempt, step))
        if is_recorded:
            self.attempt_counts.append((fence, attempts))
        return is_recorded

    def facts(self) -> StoreFacts:
        version, schema_version, clock_ms, fsync, pages = self._one(_FACTS)
        off = [name for name, value in (("fsync", fsync), ("full_page_writes", pages)) if value == "off"]
        warnings = tuple(
            f"{name} is off: a crash of its machine may lose committed data; turn it on" for name in off
        )
        return StoreFacts(f"PostgreSQL {version}", int(schema_version), clock_ms, warnings)


def send_commit(
    db: psycopg.Connection[Any], fence: Fence, attempt: AttemptRecord, step: Step | None
) -> psycopg.Cursor[Any]:
    """Send the statement of a commit. For its result see :func:`read_commit`."""
    statement = sql.COMMIT_ATTEMPT if step is None else sql.COMMIT_OUTPUT
    return db.execute(sql.for_postgres(statement), commit_values(fence, attempt, step), binary=True)


def read_commit(cursor: psycopg.Cursor[Any]) -> tuple[bool, int]:
    """Return True if an attempt is recorded, and the number of attempts of its execution; 0 if unknown."""
    is_recorded, attempts = cursor.fetchone() or (False, 0)
    return bool(is_recorded), attempts
