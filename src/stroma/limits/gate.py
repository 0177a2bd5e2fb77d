"""Base class of shared budgets and rate limits: gates before the call of a function."""

from __future__ import annotations

import asyncio
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar

from stroma._utils.forks import call_in_child
from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import CellStore, Change
from stroma.contracts.contract import check_id
from stroma.cost.budget import LARGEST
from stroma.cost.usage import shown
from stroma.failures.errors import COOLDOWN, Wait
from stroma.limits.reservations import RENEWER, ProcessCells, StateChange

if TYPE_CHECKING:
    from stroma.failures.failure import Failure
    from stroma.trace.events import AttemptUsage

T = TypeVar("T")
logger = get_logger()

#: The store of gates without a store: they share state by name.
_PROCESS: Final = ProcessCells()
call_in_child(_PROCESS.forget)  # Calls in flight belong to the parent.


class WaitQueue:
    """Attempts that wait at one gate in one event loop, in the order of their arrival."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0
        #: Set when a call of this loop has ended, so that there may be room.
        self.moved = asyncio.Event()
        #: The last answer to the first in line, and its time.
        self._answer: Wait | None = None
        self._answered = 0.0

    def note(self, answer: object, now: float) -> None:
        """Note an answer to the first in line. ``now``: seconds of any clock."""
        self._answer, self._answered = answer if isinstance(answer, Wait) else None, now

    def wait_of_last(self, now: float) -> Wait:
        """Return the wait of an attempt that joins the line, or that waits with it for a cooldown."""
        wait = self._answer
        if wait is None or wait.reason != COOLDOWN:
            return Wait("in line", None)
        passed = int((now - self._answered) * 1000)
        return wait if wait.ms is None else Wait(COOLDOWN, max(0, wait.ms - passed))


class DueHook(NamedTuple):
    """A hook that is to be called after a call: its name, and its arguments after the run id."""

    hook: str
    arguments: tuple[Any, ...]


class Gate(ABC):
    """Admits an attempt, makes it wait, or refuses it; and counts what it used."""

    #: The kind of gate, in messages and in the name of its cell.
    kind: ClassVar[str]
    max_wait_seconds: float | None

    def __init__(
        self,
        name: str,
        store: CellStore | str | os.PathLike[str] | None,
        terms: tuple[tuple[str, Any], ...],
        lease_seconds: float,
    ) -> None:
        self.name = check_id(name, f"name of a {self.kind}")
        self.cell = f"{self.kind}:{name}"
        self.store = _store_of(store, self)
        self.lease_seconds = lease_seconds
        #: Its limits by name, for messages.
        self._terms = terms
        self._queues: dict[asyncio.AbstractEventLoop, WaitQueue] = {}

    def __copy__(self) -> Any:
        return self  # Runs share it, so copies of a config do too.

    def __deepcopy__(self, memo: object) -> Any:
        return self

    @property
    def label(self) -> str:
        """Name in messages and reasons."""
        return f"{self.kind} {self.name!r}"

    @property
    def lease_ms(self) -> int | None:
        """Lease of a reservation in milliseconds; None for a store in memory, which ends with its process."""
        return None if getattr(self.store, "address", None) == "" else int(self.lease_seconds * 1000)

    @property
    def line(self) -> WaitQueue:
        """Queue of the running event loop."""
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            # A used queue references its loop: remove those of closed loops here.
            for other in list(self._queues):
                if other.is_closed():
                    self._queues.pop(other, None)
            queue = self._queues[loop] = WaitQueue()
        return queue

    def change(self, change: StateChange[Any, T]) -> Awaitable[T]:
        """Change the cell, and return the answer. Raises StoreError."""
        changed: Awaitable[T] = self.store.change_cell(self.cell, change)
        return changed

    def post(self, change: StateChange[Any, Any]) -> None:
        """Change the cell without waiting."""
        try:
            self.store.post_cell(self.cell, change)
        except Exception as error:
            logger.warning("the end of a call could not be recorded in %s: %s", self.label, error)

    def renew_lease(self, token: str) -> None:
        """Start to renew the reservation of a call, until release()."""
        if self.lease_ms is not None:
            RENEWER.add(token, self.lease_seconds, self._renew)

    def release(self, token: str) -> None:
        """Stop to renew a reservation, and wake the attempts that wait in this event loop."""
        RENEWER.remove(token)
        self.wake()

    def wake(self) -> None:
        """Wake the attempts that wait in this event loop."""
        try:
            queue = self._queues.get(asyncio.get_running_loop())
        except RuntimeError:  # A coroutine that was never awaited is closed outside a loop.
            return
        if queue is not None:
            queue.moved.set()

    @abstractmethod
    async def ask(self, node_id: str, token: str) -> Wait | Exception | None:
        """Reserve what a call may use, under a token. Returns None if it may begin, otherwise why not.

        Raises only what ends the task.
        """

    @abstractmethod
    async def count_call(
        self, node_id: str, token: str, used: AttemptUsage, failure: Failure | None, *, has_output: bool
    ) -> Sequence[DueHook]:
        """Count a call that was made, and return what is to be announced. Raises StoreError.

        ``failure`` is None for a call that succeeded or was cancelled. A call over a budget has an output and
        a failure.
        """

    def charge(self, node_id: str, token: str, took: tuple[int, int], *, learns: bool) -> Change[Any] | None:
        """Return the change that counts a call, for the transaction that records its attempt; or None.

        ``took``: pico-dollars and tokens. The change is idempotent.
        """
        return None

    def finish_charge(self, token: str, answer: Any) -> Sequence[DueHook]:
        """Return the same as :meth:`count_call`, for a call that a charge has counted. Raises StoreError."""
        raise NotImplementedError

    @abstractmethod
    def abandon(self, node_id: str, token: str, used: AttemptUsage | None) -> None:
        """Count a call without waiting. ``used``: None for a call that never began."""

    @abstractmethod
    async def give_back(self, token: str) -> None:
        """Give back what a call in flight has reserved; its end still counts it. Raises StoreError."""

    @abstractmethod
    def too_long(self, wait: Wait, node_id: str) -> Exception:
        """Return the error for a call that waited for ``max_wait_seconds``."""

    @abstractmethod
    def _renew(self, tokens: list[str]) -> None:
        """Renew the leases of these tokens without waiting. Called from any thread."""


def _store_of(store: Any, gate: Gate) -> Any:
    if store is None:
        return _PROCESS
    if isinstance(store, (str, os.PathLike)):
        from stroma.checkpoint.urls import open_store

        store = open_store(store)
    if not isinstance(store, CellStore):
        raise TypeError(
            f"{shown(store)} cannot store {gate.label}; pass SQLiteStore, PostgresStore, RedisStore, an "
            "in-memory store, or the URL of one"
        )
    return store


# ---------------------------------------------------------------------- figures


def positive_number(name: str, value: object, unit: str, *, zero: bool = False) -> float:
    """Return a finite number above 0 (with ``zero``: or 0). Raises ValueError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value > 1e12
        or value < 0
        or (value == 0 and not zero)
    ):
        least = "0 or more" if zero else "more than 0"
        raise ValueError(f"{name} must be {unit}, {least} and finite, got {shown(value)}")
    return float(value)


def positive_int(name: str, value: object, *, zero: bool = False) -> int:
    """Return an integer from 1 (with ``zero``: from 0). Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not (0 if zero else 1) <= value <= LARGEST:
        raise ValueError(f"{name} must be an integer of at least {0 if zero else 1}, got {shown(value)}")
    return value


def check_max_wait(value: float | None) -> float | None:
    """Return a number of seconds, or None. Raises ValueError."""
    return None if value is None else positive_number("max_wait_seconds", value, "seconds", zero=True)
