"""Renew the leases of reservations from a thread, so that a blocked event loop loses none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stroma._utils.logs import get_logger

__all__ = ["RENEWER"]

logger = get_logger()

_RENEWALS_PER_LEASE: Final = 3  # Two may be late or lost.
_IDLE_SECONDS: Final = 10.0  # The thread ends so long after the last call.

#: Renews the leases of these tokens without waiting.
Renew = Callable[[list[str]], None]


@dataclass(slots=True)
class _Hold:
    seconds: float
    renew: Renew
    due: float


class ReservationRenewer:
    """Renews the reservations of the calls of this process."""

    def __init__(self) -> None:
        self._holds: dict[str, _Hold] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._running = False
        self._sleeps_until = 0.0

    def add(self, token: str, lease_seconds: float, renew: Renew) -> None:
        seconds = lease_seconds / _RENEWALS_PER_LEASE
        due = time.monotonic() + seconds
        with self._lock:
            self._holds[token] = _Hold(seconds, renew, due)
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="stroma-holds", daemon=True).start()
            elif due < self._sleeps_until:
                self._wake.set()

    def remove(self, token: str) -> None:
        with self._lock:
            self._holds.pop(token, None)

    def _work(self) -> None:
        while True:
            idle = self._renew_due()  # A call of its own, so that the waiting thread references no gate.
            woken = self._wake.wait(max(0.0, self._sleeps_until - time.monotonic()))
            if idle and not woken:
                with self._lock:
                    if not self._holds:
                        self._running = False
                        return

    def _renew_due(self) -> bool:
        """Renew the leases that are due, and set the time of the next look. Returns True if there are no leases."""
        now = time.monotonic()
        due: dict[Renew, list[str]] = {}
        with self._lock:
            self._wake.clear()
            for token, hold in self._holds.items():
                if hold.due <= now:
                    hold.due = now + hold.seconds
                    due.setdefault(hold.renew, []).append(token)
            self._sleeps_until = min((hold.due for hold in self._holds.values()), default=now + _IDLE_SECONDS)
            idle = not self._holds
        for renew, tokens in due.items():
            try:
                renew(tokens)
            except Exception as error:  # The thread must survive: it renews all leases of this process.
                logger.warning("leases of calls in flight could not be renewed: %s", error)
        return idle


RENEWER = ReservationRenewer()


def _after_fork() -> None:
    RENEWER.__init__()  # type: ignore[misc]  # The leases belong to the parent.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)
