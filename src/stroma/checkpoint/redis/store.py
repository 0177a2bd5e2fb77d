"""RedisStore and SyncRedisStore: runs in a Redis server, for any number of machines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from stroma._utils.distributions import missing
from stroma.checkpoint.durable.news import Listener
from stroma.checkpoint.durable.operations import (
    Commit,
    ServerConnection,
    Unreachable,
    fence_error,
    perform_all,
)
from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates, SyncCalls
from stroma.checkpoint.durable.store import DurableStore
from stroma.checkpoint.durable.worker import Job, generation, retry
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads
from stroma.checkpoint.redis.rows import RedisRows, RunChanged, commit_command, is_recorded
from stroma.checkpoint.redis.server import RedisEndpoint, RedisLink

T = TypeVar("T")

#: Bytes of outputs in one round trip, so that the reply arrives within the timeout of the socket.
_MAX_PORTION_BYTES = 16 * 1024 * 1024


def perform(link: RedisLink, ttl_ms: int | None, operation: Callable[[Rows], T]) -> T:
    """Perform an operation as one transaction. Repeats it if another process was faster.

    Raises what the operation raises, StoreError, or the driver's error.
    """

    def once() -> T:
        rows = RedisRows(link, ttl_ms)
        value = operation(rows)
        rows.flush()
        return value

    try:
        return retry(
            once, lambda error: isinstance(error, RunChanged), link.server.patience_seconds, (0.001, 0.1)
        )
    except RunChanged as error:
        raise StoreError(
            f"other processes keep changing the same run in {link.server.name}; use one process "
            "for each run, then try again"
        ) from error


class RedisConnection(ServerConnection):
    """See :class:`stroma.checkpoint.durable.worker.Connection`."""

    can_roll_back = False

    def __init__(self, server: RedisEndpoint, ttl_ms: int | None) -> None:
        super().__init__(server.name, server.explain)
        self._server = server
        self._ttl_ms = ttl_ms
        self._link: RedisLink | None = None

    def handle(self) -> object:
        return self._link

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _open(self) -> RedisLink:
        if self._link is None:
            self._link = self._server.link()
        return self._link

    def _commit_all(self, jobs: list[tuple[Job, Commit]]) -> None:
        """Perform commits, each a transaction. One that the fence refuses fails at once."""
        link = self._open()
        for portion in _portions(jobs):
            commands = [commit_command(one.fence, one.attempt, one.step) for _, one in portion]
            try:
                replies = link.send(commands, atomic=len(commands) > 1)
            except Exception as error:
                raise Unreachable(error) from error
            for (job, commit), reply in zip(portion, replies, strict=True):
                try:
                    if isinstance(reply, Exception):
                        raise reply
                    if not is_recorded(commit.fence.run, reply, self.name):
                        raise fence_error(RedisRows(link, None), commit.fence, commit.run_id)
                except Exception as error:
                    self._settle(job, error=error)
                else:
                    self._settle(job)

    def _transact(self, operations: list[Any]) -> list[Any]:
        try:
            return perform(self._open(), self._ttl_ms, partial(perform_all, operations))
        except Exception as error:
            if self._server.is_temporary(error):
                raise Unreachable(error) from error
            raise


def _portions(jobs: list[tuple[Job, Commit]]) -> list[list[tuple[Job, Commit]]]:
    """Return commits in portions of one round trip."""
    portions: list[list[tuple[Job, Commit]]] = []
    size = _MAX_PORTION_BYTES
    for job, commit in jobs:
        size += 0 if commit.step is None else len(commit.step.output)
        if size >= _MAX_PORTION_BYTES:
            portions.append([])
            size = 0
        portions[-1].append((job, commit))
    return portions


class _RedisJournal(DurableStore):
    """Base class of both Redis stores."""

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
    ) -> None:
        driver = _driver(type(self).__name__)
        if ttl_seconds is not None and not ttl_seconds > 0:
            raise ValueError(f"ttl_seconds must be positive, or None for no expiry, got {ttl_seconds!r}")
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self._server = RedisEndpoint(driver, redis_url, self._patience_seconds)
        self.address = self._server.name
        self._ttl_ms = None if ttl_seconds is None else int(ttl_seconds * 1000)
        #: Connections for reading in the threads of callers. By generation: a forked child has its own.
        self._links: dict[int, RedisLink] = {}

    def __repr__(self) -> str:
        ttl = None if self._ttl_ms is None else self._ttl_ms / 1000
        return f"{type(self).__name__}({self._server.name!r}, ttl_seconds={ttl!r})"

    def _display_name(self) -> str:
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

    def listen(self, on_news: Callable[[], None]) -> Listener | None:
        return Listener(self._server.receive_news, on_news)

    def close(self) -> None:
        """Write queued operations, then disconnect, for good. Blocks until that is done."""
        super().close()
        link = self._links.pop(generation(), None)
        if link is not None:
            link.close()


class RedisStore(_RedisJournal, AsyncStates):
    """A journal store in a Redis server (6.2 or newer); its calls are async.

    Any number of machines, processes, threads and event loops may use it; leases use the server's clock.
    Every commit is one atomic step in the server, which refuses it once another process has taken the run
    over. ``redis_url`` is ``redis://user:password@host:6379/0``, ``rediss://`` for TLS, or
    ``unix:///path?db=0``. Failover by Sentinel is supported if the name leads to the master; Redis Cluster is
    not.

    **Acknowledged data is as durable as the server's settings make it.** With ``appendonly yes`` and
    ``appendfsync always`` it is on the server's disk. With other settings the server may lose acknowledged
    data, and so may a failover, since replication is asynchronous; risky settings are logged once, on the
    logger ``stroma``. Loss is detected: a session whose run is missing or older than acknowledged, and a
    session that opens an incomplete run, get CheckpointLost. A new process cannot distinguish a server that
    has lost *all* data from a new one: a run then starts from the beginning.

    A run has no expiry until it is finished (COMPLETED or RESUMED); ``ttl_seconds`` later it expires. A state
    from ``save()`` expires ``ttl_seconds`` after it was saved. None: no expiry.

    If a connection breaks, the store connects again and repeats the operations in progress, which are
    idempotent, for 15 s; then the call ends with a transient StoreError. Every call ends: connecting takes at
    most 5 s, a reply 5 s (``?socket_connect_timeout=`` and ``?socket_timeout=`` in the URL take precedence),
    so a call ends within about 25 s. Writing uses one connection, in one thread that sends queued operations
    together; cancelling a caller does not undo its operation. A forked child connects again.

    Args:
        redis_url: address of the server.
        ttl_seconds: time after which a finished run expires; None: no expiry.
        codec: codec that encodes every payload, see Codec. Payloads that no codec wrote are refused.
        blobs: where large payloads are stored: a directory, a URL that fsspec supports, or a BlobStore.
            ``gc()`` deletes those of expired runs.
        blob_bytes: size of a payload from which on it is stored in ``blobs``.
        plain_until_migrated: read payloads that no codec wrote, until all are migrated.

    Raises ImportError, with the install command, without the driver; ValueError for an invalid URL.
    """


class SyncRedisStore(_RedisJournal, SyncCalls):
    """A RedisStore whose ``save``, ``load``, ``save_typed``, ``load_typed`` and ``delete`` are sync.

    They may be called with or without a running event loop. It has the same journal, in the same keys.

    Args:
        redis_url: address of the server.
        ttl_seconds: time after which a finished run expires; None: no expiry.
        options: further parameters of RedisStore.
    """

    def __init__(self, redis_url: str, ttl_seconds: int | None = 3600, **options: Any) -> None:
        super().__init__(redis_url, ttl_seconds, **options)

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call in a separate thread: this one may have a running event loop."""
        with ThreadPoolExecutor(1, "stroma-redis-calls") as thread:
            return thread.submit(asyncio.run, call).result()


def _driver(store: str) -> Any:
    try:
        import redis
        import redis.backoff
        import redis.connection
        import redis.exceptions
        import redis.retry
    except Exception as error:  # Any error: a broken installation is like a missing one.
        raise missing("redis", store, "redis") from error
    return redis
