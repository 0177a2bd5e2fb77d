"""Stores: the session protocol, and memory, SQLite, PostgreSQL and Redis behind it."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.cells import CellStore as CellStore
    from stroma.checkpoint.entries import Committed as Committed
    from stroma.checkpoint.entries import Finished as Finished
    from stroma.checkpoint.entries import PriorUsage as PriorUsage
    from stroma.checkpoint.entries import RunRequest as RunRequest
    from stroma.checkpoint.entries import StepCall as StepCall
    from stroma.checkpoint.entries import Waiting as Waiting
    from stroma.checkpoint.entries import inside_of as inside_of
    from stroma.checkpoint.errors import CheckpointLost as CheckpointLost
    from stroma.checkpoint.errors import CheckpointNotFound as CheckpointNotFound
    from stroma.checkpoint.errors import CorruptCheckpoint as CorruptCheckpoint
    from stroma.checkpoint.errors import Fenced as Fenced
    from stroma.checkpoint.errors import PipelineChanged as PipelineChanged
    from stroma.checkpoint.errors import RequestRefused as RequestRefused
    from stroma.checkpoint.errors import RunBusy as RunBusy
    from stroma.checkpoint.errors import RunExists as RunExists
    from stroma.checkpoint.errors import StoreError as StoreError
    from stroma.checkpoint.manager import AsyncCheckpointStore as AsyncCheckpointStore
    from stroma.checkpoint.manager import CheckpointKey as CheckpointKey
    from stroma.checkpoint.manager import CheckpointManager as CheckpointManager
    from stroma.checkpoint.manager import CheckpointStore as CheckpointStore
    from stroma.checkpoint.manager import JournalStore as JournalStore
    from stroma.checkpoint.manager import _resolve_schema as _resolve_schema
    from stroma.checkpoint.manager import _schema_ref as _schema_ref
    from stroma.checkpoint.manager import resolve_schema as resolve_schema
    from stroma.checkpoint.manager import schema_ref as schema_ref
    from stroma.checkpoint.memory.store import AsyncInMemoryStore as AsyncInMemoryStore
    from stroma.checkpoint.memory.store import InMemoryStore as InMemoryStore
    from stroma.checkpoint.postgres.store import PostgresStore as PostgresStore
    from stroma.checkpoint.records import AttemptPage as AttemptPage
    from stroma.checkpoint.records import AttemptRecord as AttemptRecord
    from stroma.checkpoint.records import RunPage as RunPage
    from stroma.checkpoint.records import RunQuery as RunQuery
    from stroma.checkpoint.records import RunRecord as RunRecord
    from stroma.checkpoint.redis.store import RedisStore as RedisStore
    from stroma.checkpoint.redis.store import SyncRedisStore as SyncRedisStore
    from stroma.checkpoint.sessions import Session as Session
    from stroma.checkpoint.sqlite.store import SQLiteStore as SQLiteStore
    from stroma.checkpoint.urls import open_store as open_store

#: Loaded on first use: not every Python has sqlite3, and few runs need more than one store.
_HOMES = {
    "cells": ("CellStore",),
    "entries": ("Committed", "Finished", "PriorUsage", "RunRequest", "StepCall", "Waiting", "inside_of"),
    "errors": (
        "CheckpointLost",
        "CheckpointNotFound",
        "CorruptCheckpoint",
        "Fenced",
        "PipelineChanged",
        "RequestRefused",
        "RunBusy",
        "RunExists",
        "StoreError",
    ),
    "manager": (
        "AsyncCheckpointStore",
        "CheckpointKey",
        "CheckpointManager",
        "CheckpointStore",
        "JournalStore",
        "_resolve_schema",
        "_schema_ref",
        "resolve_schema",
        "schema_ref",
    ),
    "memory.store": ("AsyncInMemoryStore", "InMemoryStore"),
    "postgres.store": ("PostgresStore",),
    "records": ("AttemptPage", "AttemptRecord", "RunPage", "RunQuery", "RunRecord"),
    "redis.store": ("RedisStore", "SyncRedisStore"),
    "sessions": ("Session",),
    "sqlite.store": ("SQLiteStore",),
    "urls": ("open_store",),
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
