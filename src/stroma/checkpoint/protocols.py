"""Protocols between the engine and the stores.

The simple protocol (``save``, ``load``, ``delete``) stores the last state of each node. A *journal* store
also stores runs: committed positions, the usage of each attempt, the owner. Resume, history and the command
line need a journal.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.sessions import Session

__all__ = ["AsyncCheckpointStore", "CheckpointKey", "CheckpointStore", "JournalStore"]


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


@runtime_checkable
class JournalStore(Protocol):
    """Store of runs. Awaitable results are awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...
