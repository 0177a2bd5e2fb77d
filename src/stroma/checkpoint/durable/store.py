"""Base class of the durable stores: their worker thread, lease renewal, cells."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Self, TypeVar

from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.owner import new_owner
from stroma.checkpoint.durable.rows import Fence, Rows, lease_clock
from stroma.checkpoint.durable.run_store import RunStore, changing
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.durable.worker import Connection, Operation, Worker, generation
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.payloads import Payloads, Stored
from stroma.contracts.contract import check_id

_RENEWALS: Final = 3  # per lease: two may be late or lost
_LOOK_SECONDS: Final = 0.5  # between looks for requests, which apply within a second
_IDLE_SECONDS: Final = 10.0  # The thread ends so long after the last run.


class LeaseRenewer:
    """Renews the leases of the runs of this process in a thread, so that a blocked event loop loses none.

    It also looks for requests, and calls the listeners of the store. A stopped process renews nothing, and
    leases of collected sessions are not renewed.

    Args:
        store: the DurableStore.
    """

    def __init__(self, store: Any) -> None:
        self._store = weakref.ref(store)
        self._sessions: weakref.WeakSet[DurableSession] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        #: Fences whose leases the store has renewed, for the listeners.
        self._renewed: queue.SimpleQueue[list[Fence]] = queue.SimpleQueue()
        #: Between two renewals, as the thread waits: a shorter lease wakes it.
        self._seconds = 0.0
        self._running = False
        self._stopped = False

    def watch(self, session: DurableSession) -> None:
        with self._lock:
            if session.fence.lease_seconds / _RENEWALS < self._seconds:
                self._wake.set()
            self._sessions.add(session)
            if not self._running and not self._stopped:
                self._running = True
                threading.Thread(target=self._work, name="stroma-leases", daemon=True).start()

    def look(self) -> None:
        """Look for requests now: one was made in this process."""
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _interval(self) -> float:
        leases = [session.fence.lease_seconds for session in self._sessions if not session.ended]
        return min(leases, default=_IDLE_SECONDS * _RENEWALS) / _RENEWALS

    def _work(self) -> None:
        renewed = lease_clock()
        while True:
            with self._lock:
                seconds = self._seconds = self._interval()
            self._wake.wait(min(seconds, _LOOK_SECONDS))
            store = self._store()
            with self._lock:
                self._wake.clear()
                sessions = [session for session in self._sessions if not session.ended]
                if self._stopped or store is None or not sessions:
                    self._running = False
                    return
            try:
                if lease_clock() - renewed >= min(seconds, self._interval()) * 0.9:
                    renewed = lease_clock()
                    then = partial(self._note_renewed, renewed, has_listeners=bool(store.lease_listeners))
                    store.post(partial(_renew, [session.fence for session in sessions]), then)
                self._call_listeners(store, sessions)
                self._read_requests(store, [session for session in sessions if session.on_control])
            except Exception:  # The thread must survive: it renews all leases of this process.
                logger.exception("leases could not be renewed; retrying")
            del store, sessions  # The waiting thread must not keep sessions alive.

    def _note_renewed(self, asked_at: float, fences: list[Fence], *, has_listeners: bool) -> None:
        """Have the listeners called. Called in the thread of the store, which must not wait for them."""
        for fence in fences:
            fence.leased_at = asked_at
        if has_listeners:
            self._renewed.put(fences)
            self._wake.set()

    def _call_listeners(self, store: Any, sessions: list[DurableSession]) -> None:
        run_ids = {id(session.fence): session.run_id for session in sessions}
        while not self._renewed.empty():
            for fence in self._renewed.get():
                run_id = run_ids.get(id(fence))
                if run_id is not None:
                    for call in list(store.lease_listeners):
                        call(run_id)

    @staticmethod
    def _read_requests(store: Any, sessions: list[DurableSession]) -> None:
        if not sessions:
            return
        keys = list({session.fence.run for session in sessions})
        try:
            runs = store.read(lambda rows: rows.with_requests(keys), list[Any]())
        except Exception as error:  # The thread must survive: it renews all leases of this process.
            logger.debug("could not look for requests: %s", error)
            return
        for session in sessions:  # Of several that this process had of one run, the last one accepts them.
            if session.fence.run in runs:
                store.post(Transaction(session.run_id, session.read_requests))


def _renew(fences: list[Fence], rows: Rows) -> list[Fence]:
    return rows.renew(fences)


T = TypeVar("T")
logger = get_logger()


class DurableStore(RunStore):
    """A journal store whose data outlives the process. Safe to share between tasks, threads and event loops.

    A worker thread performs async calls, and batches those that wait; cancelling a caller does not undo its
    operation. Errors are StoreErrors that say how to fix them. A forked child opens its own connection.
    """

    _thread_name = "stroma-store"
    #: For how long an operation is tried again while the server is away, or the file is locked.
    _patience_seconds = 15.0
    #: Identifies the store, without a password: stores of one address have the same rows.
    address: str

    def __init__(self, payloads: Payloads | None = None) -> None:
        self._payloads = Payloads() if payloads is None else payloads
        #: By generation: a forked child sees its parent's worker here, but does not have its thread.
        self._workers: dict[int, Worker] = {}
        self._lease_renewers: dict[int, LeaseRenewer] = {}
        #: Called with the id of a run of this process whenever its lease was renewed, in the thread that
        #: renews leases.
        self.lease_listeners: list[Callable[[str], None]] = []

    @abstractmethod
    def _connect(self) -> Connection:
        """Return the connection of the worker thread."""

    def _worker(self) -> Worker:
        worker = self._workers.get(generation())
        if worker is None:
            fresh = Worker(self._connect(), self._thread_name)
            worker = self._workers.setdefault(generation(), fresh)
            # No lock: a forked child might inherit it locked.
            if worker is fresh:
                weakref.finalize(self, fresh.stop).atexit = False
                fresh.start()
        return worker

    def post(self, operation: Callable[[Any], T], then: Callable[[T], None] | None = None) -> None:
        """Submit an operation without waiting; see :meth:`Worker.post`. May be called from any thread."""
        self._worker().post(operation, then)

    def _submit(self, operation: Operation) -> asyncio.Future[Any]:
        return self._worker().submit(operation)

    def _notify_owner(self, run_id: str) -> None:
        renewer = self._lease_renewers.get(generation())
        if renewer is not None:
            renewer.look()

    # ------------------------------------------------------------------ journal

    def open_run(self, request: RunRequest) -> Awaitable[DurableSession]:
        """Begin an execution of a run, or continue its last one. Earlier sessions of the run are fenced off.

        Raises ValueError for an illegal run id and NotSerialisable for an input without a stored form, both
        at once;
        awaited: RunBusy, RunExists, PipelineChanged if the run to continue has another input,
        CorruptCheckpoint, StoreError.
        """
        check_id(request.run_id, "run id")
        return self._open(request, self._encode_input(request))

    async def _open(self, request: RunRequest, data: Stored) -> DurableSession:
        session = DurableSession(request.run_id, self._submit, self._payloads, self.address)
        sealed = await self._seal_input(request, data)
        opening = self._opening(request, sealed, new_owner(session if request.ends else None))
        open_session = partial(session.open, request, opening, data)
        asked_at = lease_clock()
        await self._claim(session, Transaction(request.run_id, open_session, opening, session))
        if session.fence.owner:  # A run that is returned unchanged has no lease.
            session.fence.leased_at = asked_at
            renewer = self._lease_renewers.get(generation())
            if renewer is None:
                renewer = self._lease_renewers.setdefault(generation(), LeaseRenewer(self))
            renewer.watch(session)
        return session

    async def _claim(self, session: DurableSession, claim: Transaction) -> None:
        """Finish the claim of a run; if the task is cancelled meanwhile, release the run."""
        release = Transaction(session.run_id, session.release)
        claimed = self._submit(claim)
        try:
            cancelled = await _see_through(claimed)
        except BaseException:  # The coroutine is being closed, or interrupted: nothing can be awaited.
            self.post(release)
            raise
        if cancelled is not None:
            if claimed.exception() is None:
                released = self._submit(release)
                await _see_through(released)
                released.exception()  # Fenced, if another process has taken the run over meanwhile.
            raise cancelled
        claimed.result()

    # ------------------------------------------------------------------ cells

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """Change a cell without waiting. May be called from any thread."""
        self.post(changing(name, change))

    # ------------------------------------------------------------------ closing

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks; the store cannot write afterwards."""
        renewer = self._lease_renewers.get(generation())
        if renewer is not None:
            renewer.stop()
        worker = self._worker()
        worker.stop()
        worker.join()

    async def aclose(self) -> None:
        """Close the store without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _see_through(pending: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Await an operation to its end. Return the cancellation of the task that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not pending.done():
        try:
            await asyncio.wait([pending])
        except asyncio.CancelledError as came:
            cancelled = cancelled or came.with_traceback(None)
    return cancelled
