"""What all durable stores have in common: the journal, the simple protocol, reading, and leases that are kept up."""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel

from stroma.checkpoint._owner import new_owner
from stroma.checkpoint._session import (
    PICO,
    Attempt,
    DurableSession,
    Fence,
    Opening,
    Rows,
    RunRow,
    Step,
    StepRow,
    checksum,
    intact,
    verify,
)
from stroma.checkpoint._worker import Connection, Worker, generation
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

__all__ = ["DurableStore"]

T = TypeVar("T")

_RENEWALS: Final = 3  # in the time of a lease: two may be late or lost


class DurableStore(ABC):
    """A journal store whose data outlives the process. Safe to share between tasks, threads and event loops.

    Async calls are done by a thread of ours, which does together what waits together; cancelling a caller does not
    undo what it asked for. Whatever the store cannot do is a StoreError that says how to mend it. A forked child
    connects anew.
    """

    _thread_name = "stroma-store"

    def __init__(self) -> None:
        #: By generation: a forked child finds its parent's worker here, whose thread it does not have.
        self._workers: dict[int, Worker] = {}
        self._keepers: dict[int, _Keeper] = {}

    @abstractmethod
    def _connect(self) -> Connection:
        """What the worker thread does its operations on."""

    @abstractmethod
    def _read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Read in the calling thread; ``nothing`` while the store is empty. Raises StoreError."""

    def _exists(self) -> bool:
        """Whether there is anything to read from."""
        return True

    @abstractmethod
    def _named(self) -> str:
        """What messages call the store."""

    def _worker(self) -> Worker:
        worker = self._workers.get(generation())
        if worker is None:
            fresh = Worker(self._connect(), self._thread_name)
            worker = self._workers.setdefault(generation(), fresh)
            # Not a lock, which a forked child might find held by nobody.
            if worker is fresh:
                weakref.finalize(self, fresh.stop).atexit = False
                fresh.start()
        return worker

    def _submit(self, operation: Callable[[Any], T]) -> asyncio.Future[T]:
        return self._worker().submit(operation)

    # ------------------------------------------------------------------ the journal

    def open_run(self, request: RunRequest) -> Awaitable[DurableSession]:
        """Begin an execution of a run, or continue its last one. Earlier sessions of the run are fenced off.

        Raises ValueError for an illegal run id and NotSerialisable for an input that cannot be kept, both at once;
        awaited: RunBusy, RunExists, PipelineChanged if the run to continue was begun with another input,
        CorruptCheckpoint, StoreError.
        """
        check_id(request.run_id, "run id")
        data = request.schema.encode(request.initial_state)
        return self._open(request, data)

    async def _open(self, request: RunRequest, data: bytes) -> DurableSession:
        session = DurableSession(request.run_id, self._submit)
        opening = Opening(
            request.run_id,
            request.pipeline,
            str(new_owner(session, ends=request.ends)),
            request.lease_seconds,
            request.schema.fingerprint,
            data,
            checksum(data),
            request.discard_from,
        )
        await self._submit(partial(session.open, request, opening))
        if session.finished is None:
            keeper = self._keepers.get(generation())
            if keeper is None:
                keeper = self._keepers.setdefault(generation(), _Keeper(self._worker()))
            keeper.watch(session)
        return session

    # ------------------------------------------------------------------ the simple protocol

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Keep a state as the last one of a node. Raises NotSerialisable, ValueError for an id, StoreError."""
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        schema = schema_of(type(state))
        data = schema.encode(state)
        step = Step(schema.fingerprint, schema_ref(schema.model), data, checksum(data))
        await self._submit(lambda rows: rows.save(run_id, node_id, step))

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
        where = f"the checkpoint of node {node_id!r} in run {run_id!r}"
        try:
            model = resolve_schema(found.schema_ref)
        except (LookupError, TypeError) as error:
            raise StoreError(
                f"{where} is a {found.schema_ref}: {error}; or read it with load_typed(run_id, node_id, schema)"
            ) from error
        return _decode(schema_of(model), found.output, where)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """The newest output or saved state of a node as an instance of ``schema``, or None.

        Raises CorruptCheckpoint if it is damaged or not one, TypeError("schema must be a BaseModel type").
        """
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise TypeError("schema must be a BaseModel type")
        found = await self._newest(run_id, node_id)
        if found is None:
            return None
        return _decode(
            schema_of(schema), found.output, f"the checkpoint of node {node_id!r} in run {run_id!r}"
        )

    async def delete(self, run_id: str) -> None:
        """Delete everything kept of one run, of all its executions. Whoever is at work on it is fenced off."""
        check_id(run_id, "run id")
        await self._submit(lambda rows: rows.delete(run_id))

    async def _newest(self, run_id: str, node_id: str) -> Step | None:
        check_id(run_id, "run id")
        check_id(node_id, "node id")

        if not self._exists():
            return None

        def query(rows: Rows) -> StepRow | None:
            return rows.newest(run_id, node_id)

        found = await asyncio.to_thread(self._read, query, None)
        if found is None:
            return None
        verify(found.step, run_id, found.position, node_id, found.branch)
        return found.step

    # ------------------------------------------------------------------ reading

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first.

        Blocking, like all of this section; none of it makes a store. Raises StoreError.
        """
        wanted = None if status is None else str(status)
        found = self._read(
            lambda rows: rows.runs(limit=limit, pipeline=pipeline, status=wanted), list[RunRow]()
        )
        return [_run_record(row) for row in found]

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""
        check_id(run_id, "run id")
        found = self._read(lambda rows: rows.find(run_id), None)
        return None if found is None or not found.execution else _run_record(found)

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id of all for "last". A whole id stands alone.

        Raises StoreError.
        """
        if prefix_or_last == "last":
            return [row.run_id for row in self.list_runs(limit=1)]
        prefix = check_id(prefix_or_last, "run id")
        found = self._read(lambda rows: rows.ids(prefix, limit), list[str]())
        return found[:1] if found[:1] == [prefix] else found

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of an execution (1-based; None is the last), by process, position and time. [] if unknown.

        A group stands before its children. Raises CorruptCheckpoint for a damaged output, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            if found is None:
                return []
            kept = rows.attempts(found.run, found.execution if execution is None else execution)
            return [_attempt_record(run_id, attempt, step) for attempt, step in kept]

        return self._read(query, [])

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form (see Schema.decode).

        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> tuple[str, bytes, bytes] | None:
            found = rows.find(run_id)
            return None if found is None else rows.input(found.run, found.execution)

        kept = self._read(query, None)
        if kept is None:
            raise CheckpointNotFound(
                f"there is no run {run_id!r} in {self._named()}; check the id and the store"
            )
        if not intact(kept[1], kept[2]):
            raise CorruptCheckpoint(
                f"the input of run {run_id!r} is damaged; begin a new run with the input it had"
            )
        return kept[1]

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks until that is done; the store cannot write afterwards."""
        keeper = self._keepers.get(generation())
        if keeper is not None:
            keeper.stop()
        worker = self._worker()
        worker.stop()
        worker.join()

    async def aclose(self) -> None:
        """The same without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Keeper:
    """Keeps up the leases of this process's runs, from a thread: an event loop that is blocked loses none.

    A process that is stopped renews nothing, nor does one whose sessions were all forgotten.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._sessions: weakref.WeakSet[DurableSession] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._running = False
        self._stopped = False

    def watch(self, session: DurableSession) -> None:
        with self._lock:
            self._sessions.add(session)
            if session.fence.lease_seconds < self._interval():
                self._wake.set()
            if not self._running and not self._stopped:
                self._running = True
                threading.Thread(target=self._work, name="stroma-leases", daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _interval(self) -> float:
        return min((s.fence.lease_seconds for s in self._sessions), default=30.0) / _RENEWALS

    def _work(self) -> None:
        while True:
            with self._lock:
                seconds = self._interval()
            self._wake.wait(seconds)
            with self._lock:
                self._wake.clear()
                fences = [session.fence for session in self._sessions if not session.ended]
                if self._stopped or not fences:
                    self._running = False
                    return
            self._worker.post(partial(_renew, fences))


def _renew(fences: list[Fence], rows: Rows) -> None:
    rows.renew(fences)


def _decode(schema: Schema, data: bytes, where: str) -> BaseModel:
    try:
        return schema.decode(data)
    except Exception as error:
        raise CorruptCheckpoint(
            f"{where} is not a {schema.model.__name__}: {error}; restore the schema, or run the node again"
        ) from error


def _run_record(row: RunRow) -> RunRecord:
    holder = row.holder
    return RunRecord(
        row.run_id,
        row.pipeline,
        row.status,
        row.execution,
        row.started_ms,
        row.updated_ms,
        row.tokens,
        row.cost_pico / PICO,
        row.nodes,
        row.error,
        None if holder is None else holder.place,
    )


def _attempt_record(run_id: str, attempt: Attempt, step: Step | None) -> AttemptRecord:
    if step is not None:
        verify(step, run_id, attempt.position, attempt.node_id, attempt.branch)
    return AttemptRecord(
        position=attempt.position,
        branch=attempt.branch,
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ms=attempt.started_ns // 1_000_000,
        duration_ms=attempt.duration_ns / 1e6,
        outcome=attempt.outcome,
        failure_class=attempt.failure_class,
        message=attempt.message,
        reason=attempt.reason,
        tokens=attempt.tokens,
        output_tokens=attempt.output_tokens,
        cost_usd=attempt.cost_pico / PICO,
        model=attempt.model,
        output=None if step is None else step.output,
    )
