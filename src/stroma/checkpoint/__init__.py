"""Checkpoints: the protocols of stores, one way to talk to all of them, and a file per store."""

from stroma.checkpoint.journal import (
    AsyncCheckpointStore,
    AttemptRecord,
    CheckpointKey,
    CheckpointNotFound,
    CheckpointStore,
    Committed,
    CorruptCheckpoint,
    Fenced,
    JournalStore,
    PipelineChanged,
    PriorUsage,
    RunBusy,
    RunRecord,
    RunRequest,
    Session,
    StoreError,
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

__all__ = [
    "AsyncCheckpointStore",
    "AsyncInMemoryStore",
    "AttemptRecord",
    "CheckpointKey",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointStore",
    "Committed",
    "CorruptCheckpoint",
    "Fenced",
    "InMemoryStore",
    "JournalStore",
    "PipelineChanged",
    "PriorUsage",
    "RedisStore",
    "RunBusy",
    "RunRecord",
    "RunRequest",
    "Session",
    "StoreError",
    "SyncRedisStore",
    "_resolve_schema",
    "_schema_ref",
    "resolve_schema",
    "schema_ref",
]
