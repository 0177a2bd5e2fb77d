"""The connections of a Postgres store: one writes, in the thread of the store; others read, in any thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import psycopg

from stroma.checkpoint.durable.operations import (
    Commit,
    ServerConnection,
    Transaction,
    Unreachable,
    perform_all,
)
from stroma.checkpoint.durable.owner import machine_prefix
from stroma.checkpoint.durable.rows import Fence, Rows, Step
from stroma.checkpoint.durable.worker import Job, generation, retry
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.postgres.server import PostgresEndpoint, is_lost, is_misdirected, is_temporary
from stroma.checkpoint.records import AttemptRecord, StoreFacts
from stroma.checkpoint.sql import statements as sql
from stroma.checkpoint.sql.rows import SqlRows, commit_values
from stroma.checkpoint.sql.tables import key

# Wakes workers that listen; identical notifications of a transaction are sent once.
_NOTIFY = b"SELECT pg_notify('stroma_' || current_schema(), '')"
_FACTS = """SELECT current_setting('server_version'), (SELECT v FROM meta WHERE k = 'schema_version'),
    now_ms(), current_setting('fsync'), current_setting('full_page_writes')"""


class PostgresRows(SqlRows):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.db = db

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

    def _new_run(self, run_id: str) -> int:
        # Without a row, find() has locked nothing. This waits for a session that creates the run, too.
        created = self._one(sql.NEW_RUN, run_key=key(run_id), run_id=run_id)
        if created is None:  # It was faster: this transaction begins again, and finds the run.
            raise psycopg.errors.SerializationFailure(f"run {run_id!r} was created meanwhile")
        return int(created[0])

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


T = TypeVar("T")
Database = psycopg.Connection[Any]

_PAUSES_SECONDS = (0.04, 1.0)
_MAX_LOSSES = 3  # lost connections during the same operations: one of them may crash the server


class PostgresConnection(ServerConnection):
    """See :class:`stroma.checkpoint.durable.worker.Connection`.

    If a connection breaks, it is unknown if the operation in progress was executed. It is repeated on the
    next connection: every operation finds in the rows what an earlier try has stored.
    """

    can_roll_back = True

    def __init__(self, server: PostgresEndpoint) -> None:
        super().__init__(server.name, server.explain)
        self._server = server
        self._db: Database | None = None
        #: False once an operation of the batch has failed for as long as the server was to be waited for.
        self._is_patient = True

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> None:
        self._is_patient = True
        super().apply(batch, more)

    def handle(self) -> object:
        return self._db

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    # ------------------------------------------------------------------ operations

    def _commit_all(self, jobs: list[tuple[Job, Commit]]) -> None:
        """Perform all commits, or none. Those that the fence refuses stay pending, too."""
        # The same order in all processes prevents deadlocks.
        jobs.sort(key=lambda pair: pair[1].fence.run)

        def send(db: Database, _: bool) -> list[tuple[bool, int]]:
            if len(jobs) == 1:
                return [read_commit(_send(db, jobs[0][1]))]
            with db.pipeline():  # A pipeline is one transaction.
                cursors = [_send(db, commit) for _, commit in jobs]
            return [read_commit(cursor) for cursor in cursors]

        try:
            replies = self._retry(send, is_temporary if len(jobs) == 1 else lambda _: False)
        except Unreachable:
            raise
        except Exception:
            return  # One of them fails: performed one by one, it does not affect the others.
        for (job, commit), (is_recorded, attempts) in zip(jobs, replies, strict=True):
            if is_recorded:
                commit.fence.acknowledge(attempts)
                self._settle(job)

    def _transact(self, operations: list[Any]) -> list[Any]:
        return self._retry(lambda db, is_repeated: _transact(db, operations, is_repeated))

    # ------------------------------------------------------------------ the connection

    def _retry(
        self, do: Callable[[Database, bool], T], should_retry: Callable[[Exception], bool] = is_temporary
    ) -> T:
        """Repeat an operation until it succeeds, fails permanently, or ``patience_seconds`` are over.

        They are those of the whole batch: leases are renewed faster than a server that refuses everything
        would let many operations fail one after another, and the queue would grow.

        The second argument of ``do`` is True if an earlier try may have been executed although its reply was
        lost.
        """
        losses, is_new_loss = 0, False

        def once() -> T:
            nonlocal losses, is_new_loss
            db = self._open()
            try:
                return do(db, losses > 0)
            except psycopg.Error as error:
                is_new_loss = is_lost(db)
                losses += is_new_loss
                if is_new_loss or is_misdirected(error):
                    self._drop()
                raise

        def may_succeed(error: Exception) -> bool:
            if not isinstance(error, psycopg.Error):
                return False
            return (is_new_loss and losses < _MAX_LOSSES) or should_retry(error)

        patience_seconds = self._server.patience_seconds if self._is_patient else 0.0
        try:
            return retry(once, may_succeed, patience_seconds, _PAUSES_SECONDS)
        except psycopg.Error as error:
            self._is_patient = self._is_patient and not may_succeed(error)
            raise

    def _open(self) -> Database:
        if self._db is None or is_lost(self._db):
            self._drop()
            try:
                self._db = retry(
                    self._server.connect, is_temporary, self._server.patience_seconds, _PAUSES_SECONDS
                )
            except (StoreError, psycopg.Error) as error:
                raise Unreachable(error) from error
        return self._db

    def _drop(self) -> None:
        try:
            self.close()
        except psycopg.Error:
            pass


def _send(db: Database, commit: Commit) -> psycopg.Cursor[Any]:
    return send_commit(db, commit.fence, commit.attempt, commit.step)


def _transact(db: Database, operations: list[Any], is_repeated: bool) -> list[Any]:
    rows = PostgresRows(db)
    with db.transaction():
        if is_repeated:
            operations = [partial(_perform_once, operation) for operation in operations]
        values = perform_all(operations, rows)
    for fence, attempts in rows.attempt_counts:
        fence.acknowledge(attempts)
    return values


def _perform_once(operation: Any, rows: Rows) -> Any:
    """Perform an operation, unless it opens a run which the try whose reply was lost has opened.

    The name of an owner is unique. Opening the run again would be refused, or begin another execution.
    """
    opening = operation.opening if isinstance(operation, Transaction) else None
    if opening is not None:
        run = rows.find(opening.run_id, lock=True)
        if run is not None and run.owner == opening.owner:
            return operation.result
    return operation(rows)


class PostgresReader:
    """Reads in any thread. At most one connection stays open between calls."""

    def __init__(self, server: PostgresEndpoint) -> None:
        self._server = server
        #: By generation: a forked child does not use the connections of its parent.
        self._idle: dict[int, list[Database]] = {}
        self._closed = False

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Return the result of a query, or ``nothing`` if there are no tables. Raises StoreError."""

        def once() -> T:
            # An idle connection may be broken or lead to an earlier server: then use a new one.
            while (idle := self._take_idle()) is not None:
                with contextlib.suppress(psycopg.Error):
                    return self._read_once(idle, query)
            db = self._server.connect_to_read()
            return nothing if db is None else self._read_once(db, query)

        try:
            return retry(once, is_temporary, self._server.patience_seconds, _PAUSES_SECONDS)
        except psycopg.Error as error:
            raise self._server.explain(error) from error

    def close(self) -> None:
        """Close the idle connection, and keep none from now on. Reading stays possible."""
        self._closed = True
        while (db := self._take_idle()) is not None:
            db.close()

    def _read_once(self, db: Database, query: Callable[[Rows], T]) -> T:
        try:
            # A query reads one snapshot.
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            value = query(PostgresRows(db))
            db.execute("ROLLBACK")
        except BaseException:
            db.close()
            raise
        idle = self._idle.setdefault(generation(), [])
        if idle or self._closed:
            db.close()
        else:
            idle.append(db)
        return value

    def _take_idle(self) -> Database | None:
        try:
            return self._idle.setdefault(generation(), []).pop()
        except IndexError:
            return None
