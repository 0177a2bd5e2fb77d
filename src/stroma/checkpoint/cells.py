"""Cells: small named records of a store that runs and processes share.

Shared budgets and rate limits store their state in them. A store changes one cell in one atomic step and
provides its clock; the change itself is a function of the caller.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from stroma.contracts.contract import check_id

T = TypeVar("T")

#: A change of a cell. Called with its data (None for a new cell) and the store's clock in milliseconds since
#: the epoch; returns the new data, or None to leave it unchanged, and an answer for the caller. It may be
#: called several times, in any thread, before one of its results is stored: it must not have side effects.
Change = Callable[[bytes | None, int], tuple[bytes | None, T]]


@runtime_checkable
class CellStore(Protocol):
    """A store that has cells. A name is any legal id; the data of a cell stays until it is changed."""

    def change_cell(self, name: str, change: Change[T]) -> Awaitable[T]:
        """Change a cell in one atomic step: no other change comes between its read and its write.

        Awaited: returns the answer of the change. Cancelling the caller does not undo it. Raises ValueError
        for an illegal name, what the change raises (then nothing is changed), StoreError.
        """
        ...

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """Change a cell without waiting, from any thread; changes of one caller are applied in order."""

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """Return the data of a cell, or None, and the store's clock in milliseconds.

        Blocking. Does not create the store. Raises ValueError for an illegal name, StoreError.
        """
        ...


# One lock for all stores in memory: it is held for microseconds.
_lock = threading.RLock()


def memory_lock() -> threading.RLock:
    """Return the lock under which stores in memory change: their runs may be shared by threads."""
    return _lock


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # The parent may have held it.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


class MemoryCells:
    """Cells in the memory of this process. Thread-safe."""

    def __init__(self) -> None:
        self._cells: dict[str, bytes] = {}

    async def change_cell(self, name: str, change: Change[T]) -> T:
        """See CellStore. Does not suspend."""
        return self._change(name, change)

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """See CellStore."""
        self._change(name, change)

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """See CellStore."""
        return self._cells.get(check_id(name, "cell name")), time.time_ns() // 1_000_000

    def forget(self) -> None:
        """Delete all cells."""
        self._cells = {}

    def _change(self, name: str, change: Change[T]) -> T:
        check_id(name, "cell name")
        with memory_lock():
            data, answer = change(self._cells.get(name), time.time_ns() // 1_000_000)
            if data is not None:
                self._cells[name] = data
        return answer
