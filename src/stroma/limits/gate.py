"""What an attempt passes before its function is called: what budgets and limits that runs share have in common."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, TypeVar

from stroma.checkpoint.cells import CellStore, Change, MemoryCells
from stroma.checkpoint.errors import StoreError
from stroma.contracts.contract import check_id
from stroma.cost.budget import LARGEST
from stroma.cost.usage import shown
from stroma.failures.errors import Wait
from stroma.limits.budget_state import Place
from stroma.limits.lease_renewal import RENEWALS
from stroma.limits.reservations import readable

if TYPE_CHECKING:
    from stroma.trace.events import AttemptUsage

__all__ = ["Caller", "Gate", "OnStoreError", "a_count", "an_amount", "seconds_or_none"]

T = TypeVar("T")
logger = logging.getLogger("stroma")

OnStoreError = Literal["refuse", "allow"]

#: What gates without a store share: by name, as those with one do.
_PROCESS: Final = MemoryCells()
if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_PROCESS.forget)  # What is in flight is the parent's.


class Line:
    """Those who wait at one gate in one event loop, first come first served."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0
        #: Somebody of this loop has left: there may be room.
        self.moved = asyncio.Event()


class Caller(NamedTuple):
    """The attempt that asks.

    Attributes:
        place: where its journal records it; None if that is in no store that another process can read.
        journal: the store that it is recorded in.
    """

    place: Place | None
    journal: Any


class Gate(ABC):
    """Lets an attempt pass, has it wait, or refuses it; and is told what became of it."""

    #: What the gate is, in words and in the name of its cell.
    kind: ClassVar[str]
    max_wait_seconds: float | None

    def __init__(
        self,
        name: str,
        store: CellStore | str | os.PathLike[str] | None,
        terms: tuple[Any, ...],
        lease_seconds: float,
        on_store_error: OnStoreError,
    ) -> None:
        self.name = check_id(name, f"name of a {self.kind}")
        self.cell = f"{self.kind}:{name}"
        self.store = _store_of(store, self)
        self.lease_seconds = lease_seconds
        if on_store_error not in ("refuse", "allow"):
            raise ValueError(f'on_store_error is {shown(on_store_error)}; give "refuse" or "allow"')
        self.on_store_error = on_store_error
        self._terms = terms
        self._lines: dict[asyncio.AbstractEventLoop, Line] = {}
        _declare(self)

    def __copy__(self) -> Any:
        return self  # It is what runs share: copies of a config have the same.

    def __deepcopy__(self, memo: object) -> Any:
        return self

    @property
    def label(self) -> str:
        """What messages and reasons call it."""
        return f"{self.kind} {self.name!r}"

    @property
    def lease_ms(self) -> int | None:
        """How long a hold is good for; None where holder and store live and die together."""
        return None if isinstance(self.store, MemoryCells) else int(self.lease_seconds * 1000)

    @property
    def line(self) -> Line:
        """Those who wait in the running event loop."""
        loop = asyncio.get_running_loop()
        found = self._lines.get(loop)
        if found is None:
            # A line that was waited in keeps its loop: those of loops that are over go here.
            for over in [known for known in list(self._lines) if known.is_closed()]:
                self._lines.pop(over, None)
            found = self._lines[loop] = Line()
        return found

    def change(self, change: Change[T]) -> Awaitable[T]:
        return self.store.change_cell(self.cell, readable(self.label, change))

    def post(self, change: Change[Any]) -> None:
        """Have it done where nothing can be awaited."""
        try:
            self.store.post_cell(self.cell, readable(self.label, change))
        except Exception as error:
            logger.warning("%s could not be told of the end of a call: %s", self.label, error)

    def keep_up(self, token: str) -> None:
        """From now on the hold of a call is renewed, until drop()."""
        if self.lease_ms is not None:
            RENEWALS.add(token, self.lease_seconds, self._renew)

    def drop(self, token: str) -> None:
        RENEWALS.drop(token)
        try:
            line = self._lines.get(asyncio.get_running_loop())
        except RuntimeError:  # A coroutine that was thrown away is closed where no loop runs.
            return
        if line is not None:
            line.moved.set()

    def allows(self, error: StoreError) -> bool:
        """Whether calls go on while the store is down."""
        if self.on_store_error == "allow" and error.transient:
            logger.warning("%s is not enforced for a call, since its store is down: %s", self.label, error)
            return True
        return False

    @abstractmethod
    async def ask(self, node_id: str, token: str, caller: Caller | None) -> Wait | Exception | None:
        """Whether a call may begin: None if so, and then it holds what it may take under the token.

        Raises nothing but what ends the task.
        """

    @abstractmethod
    async def left(self, node_id: str, token: str, used: AttemptUsage, *, began: bool, learns: bool) -> Any:
        """A call that passed has ended. Raises StoreError."""

    def charge(self, node_id: str, token: str, took: tuple[int, int], *, learns: bool) -> Change[Any] | None:
        """The change of its cell that ends a call, for the transaction that records its attempt; None if it has none.

        ``took``: pico-dollars and tokens. Making it twice must be making it once.
        """
        return None

    def charged(self, token: str, answer: Any) -> Any:
        """Return the same as :meth:`left`, for a call that a charge has ended. Raises StoreError."""
        raise NotImplementedError

    @abstractmethod
    def abandon(self, node_id: str, token: str, used: AttemptUsage | None) -> None:
        """The same where nothing can be awaited; None: it never began, and may not even have passed."""

    @abstractmethod
    def too_long(self, wait: Wait, node_id: str) -> Exception:
        """Why a call is refused that has waited as long as it may."""

    @abstractmethod
    def _renew(self, tokens: list[str]) -> None:
        """Post that the leases of these tokens go on. From any thread."""


def _store_of(store: Any, gate: Gate) -> CellStore:
    if store is None:
        return _PROCESS
    if isinstance(store, (str, os.PathLike)):
        from stroma.checkpoint.urls import open_store

        store = open_store(store)
    if not isinstance(store, CellStore):
        raise TypeError(
            f"{shown(store)} cannot keep {gate.label}; give SQLiteStore, PostgresStore, RedisStore, an in-memory store, or "
            "the URL of one"
        )
    return store


# ---------------------------------------------------------------------- names

_DECLARED: Final[weakref.WeakValueDictionary[tuple[str, str], Gate]] = weakref.WeakValueDictionary()


def _declare(gate: Gate) -> None:
    """Note what a name stands for. Raises ValueError if something else in use here has the same one."""
    at = (gate.cell, f"{id(gate.store)}" if isinstance(gate.store, MemoryCells) else repr(gate.store))
    if (found := _DECLARED.get(at)) is not None and found._terms != gate._terms:
        del found
        gc.collect()  # What only a cycle of references keeps is in use no more.
    other = _DECLARED.get(at)
    if other is not None and other._terms != gate._terms:
        raise ValueError(
            f"{gate.label} is already in use in this process with other limits ({_said(other)}; here: {_said(gate)}); give "
            "both the same, or one of them another name"
        )
    if other is None:
        _DECLARED[at] = gate


def _said(gate: Gate) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in gate._terms if value not in (None, {}))


# ---------------------------------------------------------------------- figures


def an_amount(name: str, value: object, unit: str, *, zero: bool = False) -> float:
    """A finite number above 0 (with ``zero``: or 0). Raises ValueError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value > 1e12
        or value < 0
        or (value == 0 and not zero)
    ):
        least = "0 or more" if zero else "more than 0"
        raise ValueError(f"{name} is {shown(value)}; give {unit}, {least} and finite")
    return float(value)


def a_count(name: str, value: object, *, zero: bool = False) -> int:
    """A whole number from 1 (with ``zero``: from 0). Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not (0 if zero else 1) <= value <= LARGEST:
        raise ValueError(f"{name} is {shown(value)}; give a whole number, {0 if zero else 1} or more")
    return value


def seconds_or_none(name: str, value: float | None, *, zero: bool = True) -> float | None:
    return None if value is None else an_amount(name, value, "seconds", zero=zero)
