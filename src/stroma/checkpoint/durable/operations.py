"""Operations on the rows of a durable store. Each is done in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.integrity import lost_error
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Fence, Opening, Rows, RunRow, Step
from stroma.checkpoint.errors import Fenced, StoreError
from stroma.checkpoint.records import Attempt

__all__ = [
    "CellChange",
    "Commit",
    "Submit",
    "Transaction",
    "apply_changes",
    "fence_error",
    "fenced_error",
]


class Commit(NamedTuple):
    """The operation that happens most; a store may do many of them in a way of its own."""

    run_id: str
    fence: Fence
    attempt: Attempt
    step: Step | None

    def __call__(self, rows: Rows) -> None:
        if not rows.commit(self.fence, self.attempt, self.step):
            raise fence_error(rows, self.fence, self.run_id)


@dataclass(frozen=True, slots=True)
class CellChange:
    """A change of a cell. A store may do many of one cell together, see :func:`apply_changes`."""

    name: str
    change: Change[Any]

    @property
    def run_id(self) -> str:
        """What keeps its order among the changes of this cell; NUL is in no run id, so that no run waits for it."""
        return f"\0{self.name}"

    def __call__(self, rows: Rows) -> Any:
        return apply_changes(rows, [self])[0]


def apply_changes(rows: Rows, changes: Sequence[CellChange]) -> list[Any]:
    """Changes of one cell, each on what the one before made: read once, written once. If one raises, none is done."""
    data, now = rows.read_cell(changes[0].name, lock=True)
    made: bytes | None = None
    told: list[Any] = []
    for asked in changes:
        fresh, said = asked.change(data if made is None else made, now)
        made = made if fresh is None else fresh
        told.append(said)
    if made is not None:
        rows.write_cell(changes[0].name, made)
    return told


@dataclass(frozen=True, slots=True)
class Transaction:
    """Any other operation.

    Attributes:
        run_id: the only run that it concerns; None if there are others.
        opening: of one that opens a run, which must not be done twice: its owner's name is given once, so a run that
            has it was opened by an earlier try whose answer was lost. That has come to ``result``.
    """

    run_id: str | None
    do: Callable[[Rows], Any]
    opening: Opening | None = None
    result: Any = None

    def __call__(self, rows: Rows) -> Any:
        return self.do(rows)


class Submit(Protocol):
    """Has an operation done in a transaction; what it returns ends when it is kept."""

    def __call__(self, operation: Any, /) -> asyncio.Future[Any]: ...


def fence_error(rows: Rows, fence: Fence, run_id: str) -> StoreError:
    """Return the reason why a session may not write any more."""
    found = rows.find(run_id)
    if found is None:
        if rows.was_deleted(fence.run):
            return fenced_error(None, run_id)
        return lost_error(run_id, "it is not in the store any more, and nobody deleted it")
    if found.run == fence.run and (
        found.epoch < fence.epoch
        or (
            (found.epoch, found.owner) == (fence.epoch, fence.owner)
            and found.attempt_count < fence.acknowledged
        )
    ):
        return lost_error(run_id, "the store is older than what it acknowledged")
    return fenced_error(found, run_id)


def fenced_error(found: RunRow | None, run_id: str) -> Fenced:
    """Return the error for a session whose run was deleted (None) or taken over."""
    owner = None if found is None else Owner.read(found.owner)
    if found is None:
        what = f"run {run_id!r} is no longer in the store: it was deleted"
    else:
        what = f"run {run_id!r} was taken over meanwhile, by {owner.place if owner else 'another process'}"
    return Fenced(f"{what}; nothing more of this execution is kept, see what the other one makes of it")
