"""Protocols between the engine and the stores.

The simple protocol (``save``, ``load``, ``delete``) stores the last state of each node. A *journal* store
also stores
runs: committed positions, the usage of each attempt, the owner. Resume, history and the command line need a
    journal.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
from stroma.checkpoint.entries import RunRequest

if TYPE_CHECKING:
    from stroma.checkpoint.sessions import Session

__all__ = ["AsyncCheckpointStore", "Charge", "CheckpointKey", "CheckpointStore", "JournalStore"]


@runtime_checkable
class CheckpointStore(Protocol):
    """Store of the last state of each node of each run."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    def delete(self, run_id: str) -> None: ...


@runtime_checkable
class AsyncCheckpointStore(Protocol):
    """Store of the last state of each node of each run, with async calls."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    async def delete(self, run_id: str) -> None: ...


class CheckpointKey(NamedTuple):
    """Key of a checkpoint."""

    run_id: str
    node_id: str


class Charge(Protocol):
    """Changes of cells that a session makes in the transaction that records an attempt."""

    def changes(self, tokens: int, cost_pico: int, *, committed: bool) -> list[tuple[str, Change[Any]]]:
        """Return (cell, change) of each cell, in the order in which they are to be locked.

        ``committed``: the attempt has an output. The changes are idempotent.
        """
        ...

    def settled(self, answers: list[Any]) -> None:
        """Receive the answers of the changes, in their order, in the event loop after they are stored."""


@runtime_checkable
class JournalStore(Protocol):
    """Store of runs. Awaitable results are awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...
