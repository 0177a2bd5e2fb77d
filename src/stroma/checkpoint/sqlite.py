"""SQLiteStore: runs in one file, for one machine. The embedded default."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel

from stroma.checkpoint._sqlite_file import Connect, DatabaseFile, connect
from stroma.checkpoint._sqlite_session import PICO, SqliteSession, intact, save, verify
from stroma.checkpoint._sqlite_writer import Writer, generation
from stroma.checkpoint.journal import (
    AttemptRecord,
    CheckpointNotFound,
    CorruptCheckpoint,
    RunRecord,
    RunRequest,
    StoreError,
)
from stroma.checkpoint.manager import resolve_schema, schema_ref
from stroma.checkpoint.memory import coerce
from stroma.contracts import check_id
from stroma.schemas import Schema, schema_of

__all__ = ["SQLiteStore"]

T = TypeVar("T")

_LOAD: Final = """SELECT s.position, s.schema_ref, s.output, s.sha256 FROM runs r JOIN steps s
    ON s.run = r.run AND (s.execution = r.execution OR s.position = -1) WHERE r.run_id = ? AND s.node_id = ?
    ORDER BY s.id DESC LIMIT 1"""
_DELETE: Final = (
    "DELETE FROM steps WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM inputs WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM attempts WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM runs WHERE run_id = ?",
)
# Execution 0 has only what save() kept: no run of a pipeline.
_RUNS: Final = """SELECT run_id, pipeline, status, execution, started_ms, updated_ms, tokens, cost_pico,
    (SELECT count(*) FROM steps s WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0
     AND s.branch = ''), error FROM runs r WHERE execution > 0"""
_INPUT: Final = "SELECT input, sha256 FROM runs JOIN inputs USING (run, execution) WHERE run_id = ?"
_NEWEST: Final = "ORDER BY started_ms DESC, run DESC LIMIT ?"
_ATTEMPTS: Final = """SELECT a.position, a.branch, a.node_id, a.attempt, a.started_ns, a.duration_ns, a.outcome,
    a.failure_class, a.message, a.reason, a.tokens, a.output_tokens, a.cost_pico, a.model, s.output, s.sha256
    FROM runs r JOIN attempts a ON a.run = r.run AND a.execution = coalesce(?, r.execution)
    LEFT JOIN steps s ON s.run = a.run AND s.execution = a.execution AND s.position = a.position
    AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt AND s.started_ns = a.started_ns
    WHERE r.run_id = ? ORDER BY a.execution, a.epoch, a.position, a.started_ns, a.branch, a.attempt"""
# Ids that begin with a text: a range of the index, and no LIKE, which knows wildcards and ignores case.
_BY_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0 AND run_id >= ? AND run_id < ?
    AND substr(run_id, 1, ?) = ? ORDER BY run_id = ? DESC, started_ms DESC, run DESC LIMIT ?"""
_LAST_CHARACTERS: Final = "\U0010ffff" * 16


class SQLiteStore:
    """A journal store in one SQLite file on a local disk.

    Any number of processes, threads and event loops may use the file. What is acknowledged is on the disk: with
    ``synchronous="full"`` it survives a power cut; ``"normal"`` is faster and survives the death of the process, but
    a power cut may take the last commits. The file is made when it is first written to, readable by its owner only;
    its directory must exist.

    Async calls write through one thread that commits together what waits together; cancelling a caller does not undo
    what it asked for. Whatever the store cannot do is a StoreError that says how to mend it. A forked child opens the
    file anew. Close it, or use it as a context manager, to fold the ``-wal`` file beside it into the database.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["full", "normal"] = "full",
        _connect: Connect = connect,
        _patience_seconds: float = 15.0,
    ) -> None:
        if synchronous not in ("full", "normal"):
            raise ValueError(f'synchronous is {synchronous!r}; give "full" or "normal"')
        name = os.fsdecode(path)
        if not name or name == ":memory:" or "\0" in name:
            raise ValueError(
                f"{name!r} names no file; give a path, or use AsyncInMemoryStore to keep nothing on disk"
            )
        self.path = os.path.abspath(name)
        self.synchronous = synchronous
        self._file = DatabaseFile(self.path, synchronous, _connect, _patience_seconds)
        #: By generation: a forked child finds its parent's writer here, whose thread it does not have.
        self._writers: dict[int, Writer] = {}

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r}, synchronous={self.synchronous!r})"

    def _submit(self, operation: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        writer = self._writers.get(generation())
        return (writer or self._new_writer()).submit(operation)

    def _new_writer(self) -> Writer:
        fresh = Writer(self._file)
        writer = self._writers.setdefault(generation(), fresh)
        # Not a lock, which a forked child might find held by nobody.
        if writer is fresh:
            weakref.finalize(self, fresh.stop).atexit = False
            fresh.start()
        return writer

    # ------------------------------------------------------------------ the journal

    def open_run(self, request: RunRequest) -> Awaitable[SqliteSession]:
        """Begin an execution of a run, or continue its last one. Earlier sessions of the run are fenced off.

        Raises ValueError for an illegal run id and NotSerialisable for an input that cannot be kept, both at once;
        awaited: PipelineChanged if the run to continue was begun with another input, CorruptCheckpoint, StoreError.
        """
        check_id(request.run_id, "run id")
        data = request.schema.encode(request.initial_state)
        owner = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(8).hex()}"
        contract = request.schema.fingerprint
        return self._submit(partial(SqliteSession, self._submit, self.path, request, data, contract, owner))

    # ------------------------------------------------------------------ the simple protocol

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Keep a state as the last one of a node. Raises NotSerialisable, ValueError for an id, StoreError."""
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        schema = schema_of(type(state))
        kept = (schema.fingerprint, schema_ref(schema.model), schema.encode(state))
        await self._submit(lambda db: save(db, run_id, node_id, *kept))

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        await self.save(run_id, node_id, coerce(state, schema))

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        """The newest output or saved state of a node, or None.

        Its class is looked up among the modules that are imported, nothing is imported for it: StoreError if it is
        not there. :meth:`load_typed` needs no such luck. Raises CorruptCheckpoint for a damaged one.
        """
        found = await self._newest(run_id, node_id)
        if found is None:
            return None
        ref, data, where = found
        try:
            model = resolve_schema(ref)
        except (LookupError, TypeError) as error:
            raise StoreError(
                f"{where} is a {ref}: {error}; or read it with load_typed(run_id, node_id, schema)"
            ) from error
        return _decode(schema_of(model), data, where)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """The newest output or saved state of a node as an instance of ``schema``, or None.

        Raises CorruptCheckpoint if it is damaged or not one, TypeError("schema must be a BaseModel type").
        """
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise TypeError("schema must be a BaseModel type")
        found = await self._newest(run_id, node_id)
        return None if found is None else _decode(schema_of(schema), found[1], found[2])

    async def delete(self, run_id: str) -> None:
        """Delete everything kept of one run, of all its executions. Whoever is at work on it is fenced off."""
        check_id(run_id, "run id")

        def operation(db: sqlite3.Connection) -> None:
            for statement in _DELETE:
                db.execute(statement, (run_id,))

        await self._submit(operation)

    async def _newest(self, run_id: str, node_id: str) -> tuple[str, bytes, str] | None:
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        if self._file.identity() is None:
            return None
        rows = await asyncio.to_thread(self._query, _LOAD, (run_id, node_id))
        if not rows:
            return None
        position, ref, output, sha = rows[0]
        verify(output, sha, run_id, position, node_id)
        return ref, output, f"the checkpoint of node {node_id!r} in run {run_id!r}"

    # ------------------------------------------------------------------ reading

    def _query(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        with self._file.reading() as db:
            return [] if db is None else self._file.patiently(lambda: db.execute(sql, parameters).fetchall())

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first.

        Blocking, like all of this section; none of it makes a file. Raises StoreError ("no such database ...").
        """
        sql, parameters = _RUNS, []
        for column, value in (("pipeline", pipeline), ("status", status)):
            if value is not None:
                sql += f" AND {column} = ?"
                parameters.append(str(value))
        return [_run_record(row) for row in self._query(f"{sql} {_NEWEST}", (*parameters, limit))]

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""
        rows = self._query(f"{_RUNS} AND run_id = ?", (check_id(run_id, "run id"),))
        return _run_record(rows[0]) if rows else None

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id of all for "last". A whole id stands alone.

        Raises StoreError.
        """
        if prefix_or_last == "last":
            return [row.run_id for row in self.list_runs(limit=1)]
        prefix = check_id(prefix_or_last, "run id")
        bounds = (prefix, prefix + _LAST_CHARACTERS, len(prefix), prefix, prefix, limit)
        found = [run_id for (run_id,) in self._query(_BY_PREFIX, bounds)]
        return found[:1] if found[:1] == [prefix] else found

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of an execution (1-based; None is the last), by process, position and time. [] if unknown.

        A group stands before its children. Raises CorruptCheckpoint for a damaged output, StoreError.
        """
        rows = self._query(_ATTEMPTS, (execution, check_id(run_id, "run id")))
        return [_attempt_record(run_id, row) for row in rows]

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form (see Schema.decode).

        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint, StoreError.
        """
        rows = self._query(_INPUT, (check_id(run_id, "run id"),))
        if not rows:
            raise CheckpointNotFound(f"there is no run {run_id!r} in {self.path}; check the id and the store")
        data, sha = rows[0]
        if not intact(data, sha):
            raise CorruptCheckpoint(
                f"the input of run {run_id!r} is damaged; begin a new run with the input it had"
            )
        return bytes(data)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Write what is queued, then close the file. Blocks until that is done; the store cannot write afterwards."""
        writer = self._writers.get(generation()) or self._new_writer()
        writer.stop()
        writer.join()

    async def aclose(self) -> None:
        """The same without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> SQLiteStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _decode(schema: Schema, data: bytes, where: str) -> BaseModel:
    try:
        return schema.decode(data)
    except Exception as error:
        raise CorruptCheckpoint(
            f"{where} is not a {schema.model.__name__}: {error}; restore the schema, or run the node again"
        ) from error


def _run_record(row: Any) -> RunRecord:
    run_id, pipeline, status, execution, started, updated, tokens, cost, nodes, error = row
    return RunRecord(run_id, pipeline, status, execution, started, updated, tokens, cost / PICO, nodes, error)


def _attempt_record(run_id: str, row: Any) -> AttemptRecord:
    *facts, output, sha = row
    position, branch, node_id, attempt, started, duration, outcome, failure, message, reason = facts[:10]
    tokens, output_tokens, cost, model = facts[10:]
    if output is not None:
        verify(output, sha, run_id, position, node_id, branch)
    return AttemptRecord(
        position=position,
        branch=branch,
        node_id=node_id,
        attempt=attempt,
        started_ms=started // 1_000_000,
        duration_ms=duration / 1e6,
        outcome=outcome,
        failure_class=failure,
        message=message,
        reason=reason,
        tokens=tokens,
        output_tokens=output_tokens,
        cost_usd=cost / PICO,
        model=model,
        output=output,
    )
