"""RedisStore and SyncRedisStore: runs in a Redis server, for any number of machines."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.durable.store import DurableStore
from stroma.checkpoint.durable.worker import generation
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads
from stroma.checkpoint.redis.connection import RedisConnection, perform
from stroma.checkpoint.redis.server import RedisEndpoint, RedisLink

__all__ = ["RedisStore", "SyncRedisStore"]

T = TypeVar("T")


class _Journal(DurableStore):
    """Base of both Redis stores."""

    _thread_name = "stroma-redis"

    def __init__(
        self,
        redis_url: str,
        ttl_seconds: int | None = 3600,
        *,
        codec: Codec | None = None,
        blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000,
        plain_until_migrated: bool = False,
        _patience_seconds: float = 15.0,
    ) -> None:
        driver = _driver(type(self).__name__)
        if ttl_seconds is not None and not ttl_seconds > 0:
            raise ValueError(
                f"ttl_seconds is {ttl_seconds!r}; give a number of seconds, or None to keep everything until it is deleted"
            )
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self._server = RedisEndpoint(driver, redis_url, _patience_seconds)
        self.address = self._server.name
        self._ttl_ms = None if ttl_seconds is None else int(ttl_seconds * 1000)
        #: What the threads of callers read on. By generation: a forked child has its own.
        self._links: dict[int, RedisLink] = {}

    def __repr__(self) -> str:
        ttl = None if self._ttl_ms is None else self._ttl_ms / 1000
        return f"{type(self).__name__}({self._server.name!r}, ttl_seconds={ttl!r})"

    def _named(self) -> str:
        return self._server.name

    def _connect(self) -> RedisConnection:
        return RedisConnection(self._server, self._ttl_ms)

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        link = self._links.get(generation())
        if link is None:
            link = self._links.setdefault(generation(), self._server.link())
        try:
            return perform(link, self._ttl_ms, query)
        except Exception as error:
            if self._server.is_driver_error(error):
                raise self._server.explain(error) from error
            raise

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks until that is done; the store cannot write afterwards."""
        super().close()
        link = self._links.pop(generation(), None)
        if link is not None:
            link.close()


class RedisStore(_Journal, AsyncStates):
    """A journal store in a Redis server (6.2 or newer); its calls are async.

    Any number of machines, processes, threads and event loops may use it; leases go by the server's clock. Every
    commit is one atomic step in the server, refused once somebody else has taken the run over. ``redis_url`` is
    ``redis://user:password@host:6379/0``, ``rediss://`` for TLS, or ``unix:///path?db=0``. The server may be one that
    Sentinel fails over, if the name leads to the master; Redis Cluster is not supported.

    **What is acknowledged is as safe as the server makes it.** With ``appendonly yes`` and ``appendfsync always`` it is
    on the server's disk. With anything less the server may lose what it acknowledged, and a failover may, since
    replication is asynchronous; what the server's settings put at risk is said once, on the logger ``stroma``. Loss
    is noticed: a session whose run is gone or older than what it was told, and whoever opens a run of which a part is
    missing, get CheckpointLost. A server that comes back *empty* cannot be told from a new one by a process that
    is new as well: a run then begins from the beginning.

    A run has no expiry until it is finished (COMPLETED or RESUMED); ``ttl_seconds`` after that all of it goes. So does
    what ``save()`` keeps, ``ttl_seconds`` after it was saved. None keeps everything until it is deleted.

    A connection that breaks is made again, and what was under way is sent again, which changes nothing if it was done,
    for 15 s; then the call ends with a transient StoreError. Nothing hangs for ever: connecting takes at most 5 s, a
    reply 5 s (``?socket_connect_timeout=`` and ``?socket_timeout=`` in the URL go before), so that a call ends within
    some 25 s. Writing holds one connection, in one thread that sends together what waits together; cancelling a
    caller does not undo what it asked for. A forked child connects anew. ``codec`` goes around every payload (see Codec), and what no codec wrote is
    refused, unless ``plain_until_migrated`` is set;
    payloads of ``blob_bytes`` or more go to ``blobs``: a directory, a URL that fsspec knows, or a BlobStore; ``gc()``
    deletes those of runs that expired.

    Raises ImportError, with the install line, without the driver; ValueError for a URL that is none.
    """


class SyncRedisStore(_Journal):
    """The same with ``save``, ``load``, ``save_typed``, ``load_typed`` and ``delete`` as plain calls, with or without an
    event loop around. Runs on it resume too: it is the same journal, in the same keys."""

    def __init__(self, redis_url: str, ttl_seconds: int | None = 3600, **options: Any) -> None:
        super().__init__(redis_url, ttl_seconds, **options)
        self._calls = _Calls(self)
        #: Where the plain calls are done. By generation: a forked child has its own.
        self._loops: dict[int, asyncio.AbstractEventLoop] = {}

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Keep a state as the last one of a node. Raises NotSerialisable, ValueError for an id, StoreError."""
        self._wait(self._calls.save(run_id, node_id, state))

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        """The newest output or saved state of a node, or None; see :meth:`RedisStore.load`."""
        return self._wait(self._calls.load(run_id, node_id))

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._wait(self._calls.save_typed(run_id, node_id, state, schema))

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``, or None. Raises CorruptCheckpoint if it is damaged or not one."""
        return self._wait(self._calls.load_typed(run_id, node_id, schema))

    def delete(self, run_id: str) -> None:
        """Delete everything kept of one run, of all its executions. Whoever is at work on it is fenced off."""
        self._wait(self._calls.delete(run_id))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        loop = self._loops.get(generation())
        if loop is None:
            fresh = asyncio.new_event_loop()
            loop = self._loops.setdefault(generation(), fresh)
            if loop is fresh:
                threading.Thread(target=_run, args=(loop,), name="stroma-redis-calls", daemon=True).start()
                weakref.finalize(self, _stop, loop).atexit = False
            else:
                fresh.close()
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks until that is done; the store cannot write afterwards."""
        super().close()
        loop = self._loops.pop(generation(), None)
        if loop is not None:
            _stop(loop)


class _Calls(_Journal, AsyncStates):
    """The calls of another store, async, on that one's connections."""

    def __init__(self, store: _Journal) -> None:
        # They share workers and connections, and neither keeps the other alive.
        vars(self).update(vars(store))


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


def _driver(store: str) -> Any:
    try:
        import redis
        import redis.backoff
        import redis.connection
        import redis.exceptions
        import redis.retry
    except Exception as error:  # Any failure to import it: a broken install is no better than none.
        raise ImportError(
            f"redis is required for {store}; install it with: pip install 'stroma[redis]'"
        ) from error
    return redis
