"""Reservations with leases, and the usage of recent calls: shared by budgets and rate limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Self, TypeVar

from pydantic_core import from_json, to_json

from stroma._utils.forks import call_in_child
from stroma._utils.logs import get_logger
from stroma.checkpoint.errors import StoreError

T = TypeVar("T")
StateT = TypeVar("StateT", bound="CellState")

_FORMAT: Final = 1
#: Calls of a node whose usage is stored.
RECENT_CALLS: Final = 16
#: Retention of a reservation that is not renewed: a process that was stopped so long may still count its
#: call.
_HOLD_RETENTION_MS: Final = 7 * 24 * 3600 * 1000


@dataclass(kw_only=True)
class CellState:
    """The state in a cell, as plain data."""

    #: By token: [until, node, figures ...]. A reservation without ``until`` has no lease: its process is this
    #: one.
    holds: dict[str, list[Any]] = field(default_factory=dict)

    #: Sums of the reservations that count, until one of them expires: no call adds up those of all others.
    _sums: dict[Hashable, int] | None = field(default=None, init=False)
    _sums_until: float = field(default=0.0, init=False)

    @classmethod
    def unpack(cls, data: bytes | None, label: str) -> Self | None:
        """Return the state in a cell's data, or None. Raises StoreError for a later format."""
        if data is None:
            return None
        fields: dict[str, Any] = from_json(data)
        if int(fields.pop("format")) > _FORMAT:
            error = StoreError(f"{label} was written by a newer stroma; upgrade stroma, or use another name")
            error.transient = False
            raise error
        return cls(**fields)

    def pack(self) -> bytes:
        """Return the data of the cell."""
        fields = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return to_json({"format": _FORMAT, **fields})

    def figures(self, hold: list[Any]) -> Iterable[tuple[Hashable, int]]:
        """Return what a reservation adds to which sums."""
        raise NotImplementedError

    def reserved(self, key: Hashable, now: int) -> int:
        """Return the sum of the reservations that count."""
        if self._sums is None or now >= self._sums_until:
            self._sums, self._sums_until = {}, float("inf")
            for hold in self.holds.values():
                if is_live(hold, now):
                    self._add(hold, 1)
        return self._sums.get(key, 0)

    def put_hold(self, token: str, hold: list[Any]) -> None:
        """Add a reservation."""
        self.holds[token] = hold
        self._add(hold, 1)

    def pop_hold(self, token: str, now: int) -> list[Any] | None:
        """Remove a reservation, and return it."""
        hold = self.holds.pop(token, None)
        if hold is not None and is_live(hold, now) and now < self._sums_until:
            self._add(hold, -1)
        return hold

    def _add(self, hold: list[Any], sign: int) -> None:
        if self._sums is not None:
            for key, amount in self.figures(hold):
                self._sums[key] = self._sums.get(key, 0) + sign * amount
            if hold[0] is not None:
                self._sums_until = min(self._sums_until, hold[0])

    def changed_holds(self) -> None:
        """Add all reservations up again: some have changed."""
        self._sums = None

    def prune_holds(self, now: int) -> None:
        """Delete reservations that expired longer ago than the retention."""
        if self._sums is not None and now < self._sums_until:
            return  # None has expired.
        expired = [
            token
            for token, hold in self.holds.items()
            if hold[0] is not None and hold[0] + _HOLD_RETENTION_MS <= now
        ]
        for token in expired:
            del self.holds[token]


class StateChange(Generic[StateT, T]):
    """A change of a cell (see stroma.checkpoint.cells), which a store calls with the data of the cell.

    ``apply`` receives the state and the clock, and returns the changed state, or None, with an answer.
    """

    def __init__(
        self, kind: type[StateT], label: str, apply: Callable[[StateT | None, int], tuple[StateT | None, T]]
    ) -> None:
        self.kind = kind
        self.label = label
        self.apply = apply

    def __call__(self, data: bytes | None, now: int) -> tuple[bytes | None, T]:
        """Apply the change to data. Raises StoreError for data that cannot be read."""
        try:
            state, answer = self.apply(self.kind.unpack(data, self.label), now)
            return None if state is None else state.pack(), answer
        except StoreError:
            raise
        except Exception as error:
            damaged = StoreError(
                f"the data of {self.label} in the store is damaged; restore the store, or use another name"
            )
            damaged.transient = False
            raise damaged from error


class ProcessCells:
    """The cells of this process, as states. Thread-safe."""

    address: Final = ""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Delete all cells."""
        self._states: dict[str, CellState] = {}
        self._lock = threading.Lock()

    async def change_cell(self, name: str, change: StateChange[Any, T]) -> T:
        """Change a state. Does not suspend."""
        return self.post_cell(name, change)

    def post_cell(self, name: str, change: StateChange[Any, T]) -> T:
        """Change a state, and return the answer."""
        with self._lock:
            state, answer = change.apply(self._states.get(name), time.time_ns() // 1_000_000)
            if state is not None:
                self._states[name] = state
        return answer

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """Return a state as the data of a cell, and the clock."""
        with self._lock:
            state = self._states.get(name)
            return None if state is None else state.pack(), time.time_ns() // 1_000_000


def renew_leases(
    kind: type[StateT], label: str, tokens: Iterable[str], lease_ms: int
) -> StateChange[StateT, None]:
    """Return a change that renews the leases of calls in flight."""
    tokens = list(tokens)

    def apply(state: StateT | None, now: int) -> tuple[StateT | None, None]:
        if state is not None:
            for token in tokens:
                if token in state.holds:
                    state.holds[token][0] = now + lease_ms
            state.changed_holds()
        return state, None

    return StateChange(kind, label, apply)


def is_live(hold: list[Any], now: int) -> bool:
    """Return True if a reservation counts: its lease is valid, or its process is this one."""
    until = hold[0]
    return until is None or until > now


def estimate_usage(
    usages: Mapping[str, list[int]], node: str, declared: int | None, limit: int
) -> int | None:
    """Return what a call may use: the maximum of declared and recent usage; None if unknown.

    One recent call above the limit does not block all later ones: they reserve the limit, unless every recent
    call was above it.
    """
    recent = usages.get(node)
    if not recent:
        return declared
    highest = max(recent)
    if highest > limit >= min(recent) and limit:
        highest = limit
    return highest if declared is None else max(declared, highest)


def remember_usage(usages: dict[str, list[int]], node: str, took: int) -> None:
    """Add the usage of a call to the recent ones of its node."""
    usages[node] = [*usages.get(node, ())[-RECENT_CALLS + 1 :], took]


logger = get_logger()

_RENEWALS_PER_LEASE: Final = 3  # Two may be late or lost.

#: Renews the leases of these tokens without waiting.
Renew = Callable[[list[str]], None]


class ReservationRenewer:
    """Renews the reservations of the calls of this process, all as often as the shortest lease needs."""

    def __init__(self) -> None:
        #: Seconds between two renewals, and the function that renews, by token.
        self._holds: dict[str, tuple[float, Renew]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._running = False
        self._seconds = 0.0  # for which the thread waits

    def add(self, token: str, lease_seconds: float, renew: Renew) -> None:
        seconds = lease_seconds / _RENEWALS_PER_LEASE
        with self._lock:
            self._holds[token] = seconds, renew
            if not self._running:
                self._running, self._seconds = True, seconds
                threading.Thread(target=self._work, name="stroma-holds", daemon=True).start()
            elif seconds < self._seconds:
                self._wake.set()

    def remove(self, token: str) -> None:
        with self._lock:
            self._holds.pop(token, None)

    def _work(self) -> None:
        while True:
            self._wake.wait(min(self._seconds, threading.TIMEOUT_MAX))
            if not self._renew_all():  # A call of its own, so that the waiting thread references no gate.
                return

    def _renew_all(self) -> bool:
        """Renew all leases. Return False if there are none: the thread ends."""
        tokens: dict[Renew, list[str]] = {}
        with self._lock:
            self._wake.clear()
            for token, (_, renew) in self._holds.items():
                tokens.setdefault(renew, []).append(token)
            self._running = bool(tokens)
            self._seconds = min((seconds for seconds, _ in self._holds.values()), default=0.0)
        for renew, of_gate in tokens.items():
            try:
                renew(of_gate)
            except Exception as error:  # The thread must survive: it renews all leases of this process.
                logger.warning("leases of calls in flight could not be renewed: %s", error)
        return bool(tokens)


RENEWER = ReservationRenewer()


@call_in_child
def _forget_leases() -> None:
    RENEWER.__init__()  # type: ignore[misc]  # The leases belong to the parent.
