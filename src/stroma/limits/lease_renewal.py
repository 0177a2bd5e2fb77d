"""Keeping up the leases of calls in flight, from a thread: an event loop that a node blocks loses none."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["RENEWALS"]

logger = logging.getLogger("stroma")

_PARTS: Final = 3  # Renewals in the time of a lease: two may be late or lost.
_IDLE_SECONDS: Final = 10.0  # for which the thread outlives the last call

#: Posts, without waiting, that the leases of these tokens go on.
Renew = Callable[[list[str]], None]


@dataclass(slots=True)
class _Hold:
    seconds: float
    renew: Renew
    due: float


class Renewals:
    """The calls of this process that hold something in a store."""

    def __init__(self) -> None:
        self._held: dict[str, _Hold] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._running = False
        self._sleeps_until = 0.0

    def add(self, token: str, lease_seconds: float, renew: Renew) -> None:
        seconds = lease_seconds / _PARTS
        due = time.monotonic() + seconds
        with self._lock:
            self._held[token] = _Hold(seconds, renew, due)
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="stroma-holds", daemon=True).start()
            elif due < self._sleeps_until:
                self._wake.set()

    def drop(self, token: str) -> None:
        with self._lock:
            self._held.pop(token, None)

    def _work(self) -> None:
        while True:
            idle = self._look()  # In a call: a thread that waits keeps nobody's state alive.
            woken = self._wake.wait(max(0.0, self._sleeps_until - time.monotonic()))
            if idle and not woken:
                with self._lock:
                    if not self._held:
                        self._running = False
                        return

    def _look(self) -> bool:
        """Renew what is due, and note when to look again. Returns whether there is nothing to look after."""
        now = time.monotonic()
        due: dict[Renew, list[str]] = {}
        with self._lock:
            self._wake.clear()
            for token, hold in self._held.items():
                if hold.due <= now:
                    hold.due = now + hold.seconds
                    due.setdefault(hold.renew, []).append(token)
            self._sleeps_until = min((hold.due for hold in self._held.values()), default=now + _IDLE_SECONDS)
            idle = not self._held
        for renew, tokens in due.items():
            try:
                renew(tokens)
            except Exception as error:  # All calls of this process would lose their holds with the thread.
                logger.warning("leases of calls in flight could not be kept up: %s", error)
        return idle


RENEWALS = Renewals()


def _after_fork() -> None:
    RENEWALS.__init__()  # type: ignore[misc]  # They are the parent's.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)
