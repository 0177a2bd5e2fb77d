"""PostgresStore: runs in a PostgreSQL database, for any number of machines."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from stroma._utils.distributions import missing
from stroma.checkpoint.durable.news import Listener
from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads

if TYPE_CHECKING:
    from stroma.checkpoint.postgres.connection import PostgresConnection

T = TypeVar("T")

_SCHEMA: Final = re.compile(r"(?!pg_)[A-Za-z_][A-Za-z0-9_]{0,62}")


class PostgresStore(AsyncStates):
    """A journal store in a separate schema of a PostgreSQL database (14 or newer, encoding UTF8).

    Any number of machines, processes, threads and event loops may use it; leases use the server's clock.
    ``dsn`` is a connection string of libpq: ``postgresql://user:password@host:5432/dbname``, several hosts,
    ``key=value`` pairs; PGHOST and similar variables apply. The schema and its tables are created by the
    first write; reading creates nothing.

    Acknowledged data is on the server's disk: ``synchronous_commit=off`` is overruled, and ``stroma doctor``
    warns of a server with ``fsync=off``. If a connection breaks, the store connects again and repeats the
    operations in progress that were not executed, for 15 s; then the call ends
    with a transient StoreError.

    Every call ends: connecting takes at most 5 s for each host, waiting for a lock 5 s, a query 30 s; an
    unresponsive network is detected after 19 s, an unresponsive server after 35 s; a transaction of a stopped
    process ends after 30 s. ``connect_timeout``, ``keepalives_*`` and ``tcp_user_timeout`` in the dsn take
    precedence. The store relies on session settings: behind PgBouncer use session pooling.

    Args:
        dsn: connection string of libpq.
        schema: name of the schema with the tables.
        codec: codec that encodes every payload, see Codec. Payloads that no codec wrote are refused.
        blobs: where large payloads are stored: a directory, a URL that fsspec supports, or a BlobStore.
        blob_bytes: size of a payload from which on it is stored in ``blobs``.
        plain_until_migrated: read payloads that no codec wrote, until all are migrated.

    Writing uses one connection, in one thread that commits queued operations together; cancelling a caller
    does not undo its operation. Reading uses another connection. A forked child opens its own.

    Raises ImportError, with the install command, without the driver; ValueError for an invalid dsn or schema
    name.
    """

    _thread_name = "stroma-postgres"

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "stroma",
        codec: Codec | None = None,
        blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000,
        plain_until_migrated: bool = False,
    ) -> None:
        _require_driver()
        from stroma.checkpoint.postgres.connection import PostgresReader
        from stroma.checkpoint.postgres.server import PostgresEndpoint

        if not isinstance(schema, str) or not _SCHEMA.fullmatch(schema):
            raise ValueError(
                "schema must be at most 63 letters, digits and underscores, and must not begin with a "
                f"digit or pg_, got {schema!r}"
            )
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self.schema = schema
        self._server = PostgresEndpoint.at(dsn, schema, self._patience_seconds)
        self.address = f"{self._server.name}#{schema}"
        self._reader = PostgresReader(self._server)
        weakref.finalize(self, self._reader.close).atexit = False

    def __repr__(self) -> str:
        return f"PostgresStore({self._display_name()!r}, schema={self.schema!r})"

    def _display_name(self) -> str:
        return self._server.name

    def _connect(self) -> PostgresConnection:
        from stroma.checkpoint.postgres.connection import PostgresConnection

        return PostgresConnection(self._server)

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        return self._reader.read(query, nothing)

    def listen(self, on_news: Callable[[], None]) -> Listener | None:
        return Listener(self._server.receive_news, on_news)

    def close(self) -> None:
        """Write queued operations, then disconnect, for good. Blocks until that is done."""
        super().close()
        self._reader.close()


def _require_driver() -> None:
    try:
        import psycopg as psycopg
    except Exception as error:  # Any error: a broken installation is like a missing one.
        raise missing("psycopg", "PostgresStore", "postgres") from error
