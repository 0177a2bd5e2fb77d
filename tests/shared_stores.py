"""Every store that can be shared, each empty: for tests of what runs share through one."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from stroma import AsyncInMemoryStore, InMemoryStore, SQLiteStore
from stroma.checkpoint import PostgresStore, RedisStore, SyncRedisStore

Store = TypeVar("Store")

#: In memory where there is such a place.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_NUMBERS = itertools.count()

#: A new kind of store is added here, in `place` and in `opened`; docs/architecture.md has all places.
ON_SERVERS = ("redis", "postgres")
LOCAL = ("memory", "async-memory")
#: The stores that processes can share. The plain calls of SyncRedisStore are not another store.
SHARED = ("sqlite", *ON_SERVERS)
DURABLE = (*SHARED, "sync-redis")
STORES = (*LOCAL, *DURABLE)
#: One store of each family, and those of them that need no other process.
FAMILIES = ("memory", *SHARED)
IN_PROCESS = ("memory", "sqlite")


@contextmanager
def place(kind: str) -> Iterator[str]:
    """Where a store of a durable kind may be; for opening it once or more, in any process."""
    if kind == "sqlite":
        folder = Path(tempfile.mkdtemp(prefix="stroma-cells-", dir=FAST))
        try:
            yield str(folder / "runs.db")
        finally:
            shutil.rmtree(folder)
    elif kind in ("redis", "sync-redis"):
        from tests.servers import shared_redis

        server = shared_redis()
        server.execute("FLUSHALL")
        yield server.url
    else:
        assert kind == "postgres", kind
        from tests.servers_postgres import shared_postgres

        server = shared_postgres()
        schema = f"cells_{os.getpid()}_{next(_NUMBERS)}"
        yield f"{server.dsn}|{schema}"
        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


def opened(kind: str, where: str = "", **options: Any) -> Any:
    """The store of a kind at a place."""
    if kind == "memory":
        return InMemoryStore()
    if kind == "async-memory":
        return AsyncInMemoryStore()
    if kind == "sqlite":
        return SQLiteStore(where, **options)
    if kind == "redis":
        return RedisStore(where, **options)
    if kind == "sync-redis":
        return SyncRedisStore(where, **options)
    assert kind == "postgres", kind
    dsn, _, schema = where.partition("|")
    return PostgresStore(dsn, schema=schema, **options)


@contextmanager
def store_of(kind: str) -> Iterator[Any]:
    """A new store of a kind, empty."""
    if kind in LOCAL:
        yield opened(kind)
        return
    with place(kind) as where, opened(kind, where) as store:
        yield store


def subclass_of(kind: type[Store], **internals: Any) -> type[Store]:
    """Return a subclass of a store with other internals, such as ``_patience_seconds``."""
    return type(kind.__name__, (kind,), internals)
