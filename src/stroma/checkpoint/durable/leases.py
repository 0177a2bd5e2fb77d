"""Renew the leases of running runs, and look for requests of other processes: to cancel one, to pause it."""

from __future__ import annotations

import queue
import threading
import weakref
from functools import partial
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Fence, Rows, lease_clock
from stroma.checkpoint.durable.session import DurableSession

__all__ = ["LeaseRenewer"]

logger = get_logger()

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
