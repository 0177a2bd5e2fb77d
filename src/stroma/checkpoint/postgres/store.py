"""PostgresStore: runs in a PostgreSQL database, for any number of machines."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads

if TYPE_CHECKING:
    from stroma.checkpoint.postgres.connection import PostgresConnection

__all__ = ["PostgresStore"]

T = TypeVar("T")

_SCHEMA: Final = re.compile(r"(?!pg_)[A-Za-z_][A-Za-z0-9_]{0,62}")


class PostgresStore(AsyncStates):
    """A journal store in a schema of its own in a PostgreSQL database (14 or newer, encoding UTF8).

    Any number of machines, processes, threads and event loops may use it; leases go by the server's clock. ``dsn`` is
    whatever libpq understands: ``postgresql://user:password@host:5432/dbname``, several hosts, ``key=value`` pairs,
    PGHOST and the like. The schema and its tables are made when they are first written to; reading makes nothing.

    What is acknowledged is on the server's disk: ``synchronous_commit=off`` is overruled, and a server that runs with
    ``fsync=off`` is warned about, once, on the logger ``stroma``. A connection that breaks is made again, and what was
    under way on it done again where it was not done, for 15 s; then the call ends with a transient StoreError.

    No call hangs for ever: connecting takes at most 5 s for each host, a lock is waited for 5 s, a query 30 s; a
    network that is silent is given up after 19 s, a server that is after 35 s; a transaction that a stopped process
    left open ends after 30 s. ``connect_timeout``, ``keepalives_*`` and ``tcp_user_timeout`` in the dsn go before.
    Session settings are relied on: behind PgBouncer use session pooling.

    ``codec`` goes around every payload (see Codec), and what no codec wrote is
    refused, unless ``plain_until_migrated`` is set; payloads of ``blob_bytes`` or more go to ``blobs``: a directory, a
    URL that fsspec knows, or a BlobStore.

    Writing holds one connection, in one thread that commits together what waits together; cancelling a caller does
    not undo what it asked for. Reading keeps another one. A forked child connects anew.

    Raises ImportError, with the install line, without the driver; ValueError for a dsn or schema name that is none.
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
        _patience_seconds: float = 15.0,
    ) -> None:
        _require_driver()
        from stroma.checkpoint.postgres.reader import PostgresReader
        from stroma.checkpoint.postgres.server import PostgresEndpoint

        if not isinstance(schema, str) or not _SCHEMA.fullmatch(schema):
            raise ValueError(
                f"schema is {schema!r}; give letters, digits and underscores, at most 63, that begin with no digit "
                "and not with pg_"
            )
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self.schema = schema
        self._server = PostgresEndpoint.at(dsn, schema, _patience_seconds)
        self.address = f"{self._server.name}#{schema}"
        self._reader = PostgresReader(self._server)
        weakref.finalize(self, self._reader.close).atexit = False

    def __repr__(self) -> str:
        return f"PostgresStore({self._named()!r}, schema={self.schema!r})"

    def _named(self) -> str:
        return self._server.name

    def _connect(self) -> PostgresConnection:
        from stroma.checkpoint.postgres.connection import PostgresConnection

        return PostgresConnection(self._server)

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        return self._reader.read(query, nothing)

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks until that is done; the store cannot write afterwards."""
        super().close()
        self._reader.close()


def _require_driver() -> None:
    try:
        import psycopg as psycopg
    except Exception as error:  # Any failure to import it: a broken install is no better than none.
        raise ImportError(
            "psycopg is required for PostgresStore; install it with: pip install 'stroma[postgres]'"
        ) from error
