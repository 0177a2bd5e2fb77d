"""Stores: the session protocol, and memory, SQLite, PostgreSQL and Redis behind it."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy
from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.entries import (
    Committed,
    Finished,
    PriorUsage,
    RunRequest,
    StepCall,
    Waiting,
    inside_of,
)
from stroma.checkpoint.errors import (
    CheckpointLost,
    CheckpointNotFound,
    CorruptCheckpoint,
    Fenced,
    PipelineChanged,
    RequestRefused,
    RunBusy,
    RunExists,
    StoreError,
)
from stroma.checkpoint.manager import (
    AsyncCheckpointStore,
    CheckpointKey,
    CheckpointManager,
    CheckpointStore,
    JournalStore,
    _resolve_schema,
    _schema_ref,
    resolve_schema,
    schema_ref,
)
from stroma.checkpoint.sessions import Session

if TYPE_CHECKING:
    from stroma.checkpoint.memory.store import AsyncInMemoryStore, InMemoryStore
    from stroma.checkpoint.postgres.store import PostgresStore
    from stroma.checkpoint.records import AttemptPage, AttemptRecord, RunPage, RunQuery, RunRecord
    from stroma.checkpoint.redis.store import RedisStore, SyncRedisStore
    from stroma.checkpoint.sqlite.store import SQLiteStore
    from stroma.checkpoint.urls import open_store

__all__ = [
    "AsyncCheckpointStore",
    "AsyncInMemoryStore",
    "AttemptPage",
    "AttemptRecord",
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
    "RequestRefused",
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
    "inside_of",
    "open_store",
    "resolve_schema",
    "schema_ref",
]


#: Loaded on first use: not every Python has sqlite3, and few runs need more than one store.
_HOMES = {
    "memory.store": ("AsyncInMemoryStore", "InMemoryStore"),
    "postgres.store": ("PostgresStore",),
    "records": ("AttemptPage", "AttemptRecord", "RunPage", "RunQuery", "RunRecord"),
    "redis.store": ("RedisStore", "SyncRedisStore"),
    "sqlite.store": ("SQLiteStore",),
    "urls": ("open_store",),
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
