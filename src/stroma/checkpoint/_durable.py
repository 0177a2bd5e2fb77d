"""What all durable stores have in common: the journal, the simple protocol, reading, and leases that are kept up."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeVar

from pydantic import BaseModel

from stroma.checkpoint._owner import new_owner
from stroma.checkpoint._session import (
    CANCEL,
    PARENT,
    PICO,
    SAVED,
    WAITING,
    Attempt,
    DurableSession,
    Fence,
    Opening,
    Rows,
    RunRow,
    Step,
    StepRow,
    checksum,
    fork,
    intact,
    keep_waiting,
    read_waiting,
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
    Waiting,
)
from stroma.checkpoint.manager import resolve_schema, schema_ref
from stroma.checkpoint.memory import coerce
from stroma.checkpoint.payloads import BLOB, Payloads
from stroma.contracts import check_id
from stroma.schemas import Schema, schema_of

__all__ = ["DurableStore"]

T = TypeVar("T")
logger = logging.getLogger("stroma")

_RENEWALS: Final = 3  # in the time of a lease: two may be late or lost
_LOOK_SECONDS: Final = 1.0  # between looks whether somebody wants a run to end
_AT_ONCE: Final = 500  # runs that one look for old ones gives
_IDLE_SECONDS: Final = 10.0  # for which the thread outlives the last run


class Collected(NamedTuple):
    """What a gc() deleted: how many runs, and how many blobs."""

    runs: int
    blobs: int


class DurableStore(ABC):
    """A journal store whose data outlives the process. Safe to share between tasks, threads and event loops.

    Async calls are done by a thread of ours, which does together what waits together; cancelling a caller does not
    undo what it asked for. Whatever the store cannot do is a StoreError that says how to mend it. A forked child
    connects anew.
    """

    _thread_name = "stroma-store"

    def __init__(self, payloads: Payloads | None = None) -> None:
        self._payloads = Payloads() if payloads is None else payloads
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

    def _post(self, operation: Callable[[Any], None]) -> None:
        """Have an operation done that nobody waits for. From any thread."""
        self._worker().post(operation)

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
        return self._open(request, self._encode(request.schema, request.initial_state))

    def _encode(self, schema: Schema, state: BaseModel) -> bytes:
        return schema.encode(state, secrets=self._payloads.codec is not None)

    async def _step(self, schema: Schema, data: bytes) -> Step:
        sealed = await self._payloads.seal(data)
        return Step(schema.fingerprint, schema_ref(schema.model), sealed, checksum(sealed))

    async def _open(self, request: RunRequest, data: bytes) -> DurableSession:
        session = DurableSession(request.run_id, self._submit, self._payloads)
        sealed = await self._payloads.seal(data)
        opening = Opening(
            request.run_id,
            request.pipeline,
            str(new_owner(session, ends=request.ends)),
            request.lease_seconds,
            request.schema.fingerprint,
            sealed,
            checksum(sealed),
            request.discard_from,
        )
        await self._submit(partial(session.open, request, opening, data))
        if session.finished is None:
            keeper = self._keepers.get(generation())
            if keeper is None:
                keeper = self._keepers.setdefault(generation(), _Keeper(self))
            keeper.watch(session)
        return session

    async def cancel(self, run_id: str) -> bool:
        """Ask whoever is at work on a run to end it; a run that nobody holds is CANCELLED at once.

        False if it had ended already. Raises CheckpointNotFound, StoreError.
        """
        check_id(run_id, "run id")

        def operation(rows: Rows) -> bool:
            found = rows.find(run_id, lock=True)
            if found is None or not found.execution:
                raise self._no_run(run_id)
            if found.holder is not None:
                rows.keep(run_id, CANCEL, "", "cancel", Step("", "", b"", checksum(b"")))
            elif found.status in ("COMPLETED", "RESUMED", "FAILED", "CANCELLED"):
                return False
            else:
                last = Fence(found.run, found.execution, found.epoch, found.owner or "", 0.0)
                rows.finish(last, "CANCELLED", None)
            return True

        return await self._submit(operation)

    async def signal(self, run_id: str, waiting: Waiting) -> None:
        """Keep the answer that a node waits for; ``waiting`` with its payload. Raises CheckpointNotFound, StoreError."""
        check_id(run_id, "run id")
        if waiting.payload is not None:
            waiting = waiting._replace(payload=await self._payloads.seal(waiting.payload))

        def operation(rows: Rows) -> None:
            if rows.find(run_id, lock=True) is None:
                raise self._no_run(run_id)
            keep_waiting(rows, run_id, waiting)

        await self._submit(operation)

    async def fork(
        self,
        run_id: str,
        new_run_id: str,
        before: int,
        *,
        edited: tuple[Schema, BaseModel] | None = None,
        state: tuple[Schema, BaseModel] | None = None,
    ) -> None:
        """Make a new run of what a run committed before a position: ``edited`` in place of the last of that,
        ``state`` in place of its input. Raises CheckpointNotFound, RunExists, StoreError, NotSerialisable."""
        check_id(run_id, "run id")
        check_id(new_run_id, "run id")
        step = None if edited is None else await self._step(edited[0], self._encode(*edited))
        contract, given, sha = "", b"", b""
        if state is not None:
            contract, given = state[0].fingerprint, await self._payloads.seal(self._encode(*state))
            sha = checksum(given)
        opening = Opening(new_run_id, "", str(new_owner(self, ends=False)), 0.0, contract, given, sha, None)
        await self._submit(lambda rows: fork(rows, run_id, opening, before, step))

    # ------------------------------------------------------------------ the simple protocol

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Keep a state as the last one of a node. Raises NotSerialisable, ValueError for an id, StoreError."""
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        schema = schema_of(type(state))
        step = await self._step(schema, self._encode(schema, state))
        await self._submit(lambda rows: rows.keep(run_id, SAVED, node_id, node_id, step))

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
        what = f"the checkpoint of node {node_id!r} in run {run_id!r}"
        output = await asyncio.to_thread(self._payloads.open, found.step.output, what)
        return found.step._replace(output=output)

    # ------------------------------------------------------------------ reading

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first.

        Blocking, like all of this section; none of it makes a store. Raises StoreError.
        """
        wanted = None if status is None else str(status)

        def query(rows: Rows) -> list[RunRecord]:
            found = rows.runs(limit=limit, pipeline=pipeline, status=wanted)
            return [_run_record(rows, row) for row in found]

        return self._read(query, [])

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> RunRecord | None:
            found = rows.find(run_id)
            return None if found is None or not found.execution else _run_record(rows, found)

        return self._read(query, None)

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

        A group stands before its children. Raises StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            if found is None:
                return []
            kept = rows.attempts(found.run, found.execution if execution is None else execution)
            return [self._attempt_record(run_id, attempt, step) for attempt, step in kept]

        return self._read(query, [])

    def _attempt_record(self, run_id: str, attempt: Attempt, step: Step | None) -> AttemptRecord:
        output, damaged = None, False
        if step is not None:
            what = f"the output of node {attempt.node_id!r} at position {attempt.position} of run {run_id!r}"
            try:
                verify(step, run_id, attempt.position, attempt.node_id, attempt.branch)
                output = self._payloads.open(step.output, what)
            except CorruptCheckpoint:
                damaged = True  # The rest of the history can be told all the same.
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
            output=output,
            damaged=damaged,
        )

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
            raise self._no_run(run_id)
        if not intact(kept[1], kept[2]):
            raise CorruptCheckpoint(
                f"the input of run {run_id!r} is damaged; begin a new run with the input it had"
            )
        return self._payloads.open(kept[1], f"the input of run {run_id!r}")

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[Waiting]:
            found = rows.find(run_id)
            kept = (
                []
                if found is None
                else [read_waiting(row, self._payloads) for row in rows.kept(found.run, WAITING)]
            )
            return [waiting for waiting in kept if waiting is not None]

        return self._read(query, [])

    def _no_run(self, run_id: str) -> CheckpointNotFound:
        return CheckpointNotFound(
            f"there is no run {run_id!r} in {self._named()}; check the id and the store"
        )

    # ------------------------------------------------------------------ retention

    async def gc(self, *, keep_for: timedelta, unfinished: bool = False) -> Collected:
        """Delete the runs that ended longer ago than ``keep_for``, and then the blobs that nobody names.

        ``unfinished``: also those that could be resumed. A run that somebody is at work on is never touched, nor is a
        blob younger than an hour. Raises StoreError.
        """
        before = time.time_ns() // 1_000_000 - int(keep_for.total_seconds() * 1000)
        deleted = 0
        while found := await asyncio.to_thread(
            self._read,
            lambda rows: rows.expired(before, unfinished=unfinished, limit=_AT_ONCE),
            list[str](),
        ):
            # One by one: each is looked at again in the transaction that deletes it.
            gone = [await self._submit(partial(_delete_if_free, run_id, before)) for run_id in found]
            deleted += sum(gone)
            if not any(gone):
                break  # What is left is somebody's.
        blobs = 0
        if self._payloads.blobs is not None:
            start = len(BLOB)
            named: Callable[[Rows], set[str]] = lambda rows: {kept[start:].hex() for kept in rows.blobs()}  # noqa: E731
            in_use = await asyncio.to_thread(self._read, named, set[str]())
            blobs = await asyncio.to_thread(self._payloads.collect, in_use)
        return Collected(deleted, blobs)

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

    It also looks whether somebody wants a run to end. A process that is stopped renews nothing, nor does one whose
    sessions were all forgotten.
    """

    def __init__(self, store: DurableStore) -> None:
        self._store = weakref.ref(store)
        self._sessions: weakref.WeakSet[DurableSession] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._running = False
        self._stopped = False

    def watch(self, session: DurableSession) -> None:
        with self._lock:
            if session.fence.lease_seconds / _RENEWALS < self._interval():
                self._wake.set()
            self._sessions.add(session)
            if not self._running and not self._stopped:
                self._running = True
                threading.Thread(target=self._work, name="stroma-leases", daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _interval(self) -> float:
        leases = [session.fence.lease_seconds for session in self._sessions if not session.ended]
        return min(leases, default=_IDLE_SECONDS * _RENEWALS) / _RENEWALS

    def _work(self) -> None:
        renewed = time.monotonic()
        while True:
            with self._lock:
                seconds = self._interval()
            self._wake.wait(min(seconds, _LOOK_SECONDS))
            store = self._store()
            with self._lock:
                self._wake.clear()
                sessions = [session for session in self._sessions if not session.ended]
                if self._stopped or store is None or not sessions:
                    self._running = False
                    return
            if time.monotonic() - renewed >= min(seconds, self._interval()) * 0.9:
                renewed = time.monotonic()
                store._post(partial(_renew, [session.fence for session in sessions]))
            self._look(store, {session.fence.run: session for session in sessions if session.on_cancel})
            del store, sessions  # A thread that waits keeps nobody's state alive.

    @staticmethod
    def _look(store: DurableStore, sessions: dict[Any, DurableSession]) -> None:
        if not sessions:
            return
        try:
            wanted = store._read(lambda rows: rows.wanted(list(sessions)), list[Any]())
        except StoreError as error:
            logger.debug("could not look for cancelled runs: %s", error)
            return
        for run in wanted:
            on_cancel = sessions[run].on_cancel
            if on_cancel is not None:
                on_cancel()


def _renew(fences: list[Fence], rows: Rows) -> None:
    rows.renew(fences)


def _delete_if_free(run_id: str, before_ms: int, rows: Rows) -> bool:
    found = rows.find(run_id, lock=True)
    if found is None or found.holder is not None or found.updated_ms >= before_ms:
        return False
    rows.delete(run_id)
    return True


def _decode(schema: Schema, data: bytes, where: str) -> BaseModel:
    try:
        return schema.decode(data)
    except Exception as error:
        raise CorruptCheckpoint(
            f"{where} is not a {schema.model.__name__}: {error}; restore the schema, or run the node again"
        ) from error


def _run_record(rows: Rows, row: RunRow) -> RunRecord:
    holder = row.holder
    parent = next(iter(rows.kept(row.run, PARENT)), None)
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
        None if parent is None else parent.node_id,
    )
