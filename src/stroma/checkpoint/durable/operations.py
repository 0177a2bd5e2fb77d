"""Operations on the rows of a durable store. Each is done in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.integrity import lost_error
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import EventRow, Fence, Opening, Rows, RunRow, Step
from stroma.checkpoint.errors import CheckpointLost, Fenced, StoreError
from stroma.checkpoint.records import AttemptRecord

__all__ = [
    "CellChange",
    "Commit",
    "EventAppend",
    "Transaction",
    "apply_changes",
    "fence_error",
    "fenced_error",
    "perform_all",
]


class Commit(NamedTuple):
    """The most frequent operation. A store may commit many of them together."""

    run_id: str
    fence: Fence
    attempt: AttemptRecord
    step: Step | None

    def __call__(self, rows: Rows) -> None:
        if not rows.commit(self.fence, self.attempt, self.step):
            raise fence_error(rows, self.fence, self.run_id)


@dataclass(frozen=True, slots=True)
class CellChange:
    """A change of a cell. A store may apply many of one cell together, see :func:`apply_changes`."""

    name: str
    change: Change[Any]

    @property
    def run_id(self) -> str:
        """Key that orders the changes of this cell. NUL is in no run id, so no run waits for it."""
        return f"\0{self.name}"

    def __call__(self, rows: Rows) -> Any:
        return apply_changes(rows, [self])[0]


def apply_changes(rows: Rows, changes: Sequence[CellChange]) -> list[Any]:
    """Apply changes of one cell, one after another: one read, one write. If one raises, none is applied."""
    data, now = rows.read_cell(changes[0].name, lock=True)
    new_data: bytes | None = None
    answers: list[Any] = []
    for cell_change in changes:
        changed, answer = cell_change.change(data if new_data is None else new_data, now)
        new_data = new_data if changed is None else changed
        answers.append(answer)
    if new_data is not None:
        rows.write_cell(changes[0].name, new_data)
    return answers


@dataclass(frozen=True, slots=True)
class EventAppend:
    """A batch of events. A store may append those of many runs together."""

    run_id: str
    batch: EventRow

    def __call__(self, rows: Rows) -> None:
        rows.append_events([self.batch])


@dataclass(slots=True)
class Transaction:
    """Any other operation.

    Attributes:
        run_id: the only run that it uses; None for several.
        opening: set if it opens a run, which must not be done twice. The name of an owner is unique, so a run
            that has it was opened by an earlier try whose answer was lost; its result is ``result``.
        changes_cells: it locks cells, for which other runs wait, and is performed alone.
        continues: it probably continues the run, and begins with reading it, its input and its annotations.
    """

    run_id: str | None
    do: Callable[[Rows], Any]
    opening: Opening | None = None
    result: Any = None
    changes_cells: bool = False
    continues: bool = False

    def __call__(self, rows: Rows) -> Any:
        return self.do(rows)


def perform_all(operations: Sequence[Any], rows: Rows) -> list[Any]:
    """Perform operations in a transaction, and return their results. Changes of cells are of one cell."""
    if isinstance(operations[0], CellChange):
        return apply_changes(rows, operations)
    return [operation(rows) for operation in operations]


def fence_error(rows: Rows, fence: Fence, run_id: str) -> StoreError:
    """Return the reason why a session may no longer write."""
    run = rows.find(run_id)
    if run is None:
        return CheckpointLost(
            f"run {run_id!r} is no longer in the store: it was deleted, or the store has lost it; restore "
            "the store from a newer copy and resume, or run it from the start"
        )
    if run.run == fence.run and (
        run.epoch < fence.epoch
        or ((run.epoch, run.owner) == (fence.epoch, fence.owner) and run.attempt_count < fence.acknowledged)
    ):
        return lost_error(run_id, "the store is older than what it acknowledged")
    return fenced_error(run, run_id, fence)


def fenced_error(run: RunRow, run_id: str, fence: Fence) -> Fenced:
    """Return the error for a session that was fenced off. ``run``: the present row."""
    owner = Owner.read(run.owner)
    place = owner.place if owner else "another process"
    if run.run != fence.run:
        return Fenced(
            f"run {run_id!r} was deleted, and started again by {place}; this execution records nothing more"
        )
    if run.status == "CANCELLED":
        return Fenced(f"run {run_id!r} was cancelled by {place}; this execution records nothing more")
    if run.epoch != fence.epoch:
        return Fenced(
            f"run {run_id!r} was taken over by {place}; this execution records nothing more, see the "
            "result of the other one"
        )
    # No process has taken it over: a request has replaced the owner.
    if run.status == "SUSPENDED":
        return Fenced(
            f"run {run_id!r} was paused by {place} while this process did not renew its lease; this "
            "execution records nothing more, resume or unpause the run"
        )
    return Fenced(
        f"the budget of run {run_id!r} was changed while this process did not renew its lease; this "
        "execution records nothing more, resume the run"
    )
