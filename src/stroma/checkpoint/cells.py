"""Cells: small named records that runs and processes share through a store, beside its runs.

Budgets that several runs spend from, and rate limits, are kept in them. A store only has to change one cell as one
atomic step, by its own clock; what a change means is decided by whoever asks for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from stroma.contracts.contract import check_id

__all__ = ["CellStore", "Change", "MemoryCells"]

T = TypeVar("T")

#: What is to become of a cell. Called with its data (None if there is none yet) and the milliseconds since the epoch by
#: the store's clock; returns the new data, or None to leave it as it is, and what the caller is told. It may be called
#: several times before one of its answers counts, in any thread: it must do nothing but answer.
Change = Callable[[bytes | None, int], tuple[bytes | None, T]]


@runtime_checkable
class CellStore(Protocol):
    """A store that has cells. Names are any legal ids; what is in a cell stays until it is changed."""

    def change_cell(self, name: str, change: Change[T]) -> Awaitable[T]:
        """Change a cell as one atomic step: nobody else changes it between what is read and what is written.

        Awaited: what the change told. Cancelling the caller does not undo it. Raises ValueError for an illegal name,
        what the change raises (then nothing is changed), StoreError.
        """
        ...

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """The same where nobody waits for it; from any thread, after what the same caller asked for before."""

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """A cell's data, None if there is none, and the store's clock in milliseconds. Blocking; makes no
        store. Raises ValueError for an illegal name, StoreError."""
        ...


# One for all: what is done under it takes microseconds.
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # The parent may have held it.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


class MemoryCells:
    """The cells of stores that live in the process; safe between threads."""

    def __init__(self) -> None:
        self._cells: dict[str, bytes] = {}

    async def change_cell(self, name: str, change: Change[T]) -> T:
        """See CellStore. Done at once: nothing here awaits."""
        return self._change(name, change)

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """See CellStore."""
        self._change(name, change)

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """See CellStore."""
        return self._cells.get(check_id(name, "cell name")), time.time_ns() // 1_000_000

    def forget(self) -> None:
        """Begin anew, without any cell."""
        self._cells = {}

    def _change(self, name: str, change: Change[T]) -> T:
        check_id(name, "cell name")
        with _lock:
            data, told = change(self._cells.get(name), time.time_ns() // 1_000_000)
            if data is not None:
                self._cells[name] = data
        return told
