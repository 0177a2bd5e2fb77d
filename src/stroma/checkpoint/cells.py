"""Cells: small named records of a store that runs and processes share.

Shared budgets and rate limits store their state in them. A store changes one cell in one atomic step and
provides its clock; the change itself is a function of the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

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
