"""Checkpoints: the protocols of stores, one way to talk to all of them, and a file per store."""

from typing import TYPE_CHECKING, Any

from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.journal import (
    AsyncCheckpointStore,
    AttemptPage,
    AttemptRecord,
    Cause,
    CheckpointKey,
    CheckpointLost,
    CheckpointNotFound,
    CheckpointStore,
    Committed,
    CorruptCheckpoint,
    Fenced,
    Finished,
    JournalStore,
    PipelineChanged,
    PriorUsage,
    RunBusy,
    RunExists,
    RunPage,
    RunQuery,
    RunRecord,
    RunRequest,
    Session,
    StepCall,
    StoreError,
    Waiting,
)
from stroma.checkpoint.manager import (
    CheckpointManager,
    _resolve_schema,
    _schema_ref,
    resolve_schema,
    schema_ref,
)
from stroma.checkpoint.memory import AsyncInMemoryStore, InMemoryStore
from stroma.checkpoint.redis import RedisStore, SyncRedisStore

if TYPE_CHECKING:
    from stroma.checkpoint.postgres import PostgresStore
    from stroma.checkpoint.sqlite import SQLiteStore
    from stroma.checkpoint.urls import open_store

__all__ = [
    "AsyncCheckpointStore",
    "AsyncInMemoryStore",
    "AttemptPage",
    "AttemptRecord",
    "Cause",
    "CellStore",
    "CheckpointKey",
    "CheckpointLost",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointStore",
    "Committed",
    "CorruptCheckpoint",
    "Fenced",
    "Finished",
    "InMemoryStore",
    "JournalStore",
    "PipelineChanged",
    "PostgresStore",
    "PriorUsage",
    "RedisStore",
    "RunBusy",
    "RunExists",
    "RunPage",
    "RunQuery",
    "RunRecord",
    "RunRequest",
    "SQLiteStore",
    "Session",
    "StepCall",
    "StoreError",
    "SyncRedisStore",
    "Waiting",
    "_resolve_schema",
    "_schema_ref",
    "open_store",
    "resolve_schema",
    "schema_ref",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: not every Python is built with sqlite3, and not every run needs it.
    if name == "SQLiteStore":
        from stroma.checkpoint.sqlite import SQLiteStore

        return SQLiteStore
    if name == "PostgresStore":
        from stroma.checkpoint.postgres import PostgresStore

        return PostgresStore
    if name == "open_store":
        from stroma.checkpoint.urls import open_store

        return open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
