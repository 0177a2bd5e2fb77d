"""Reading from a Postgres store, in the calling thread, on a reused connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.worker import generation
from stroma.checkpoint.postgres.rows import PostgresRows
from stroma.checkpoint.postgres.server import PostgresEndpoint, is_temporary, pause

__all__ = ["PostgresReader"]

T = TypeVar("T")


class PostgresReader:
    """Reads in any thread. At most one connection stays open between calls."""

    def __init__(self, server: PostgresEndpoint) -> None:
        self._server = server
        #: By generation: a forked child does not use the connections of its parent.
        self._idle: dict[int, list[psycopg.Connection[Any]]] = {}
        self._closed = False

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Return the result of a query, or ``nothing`` if there are no tables. Raises StoreError."""
        deadline = time.monotonic() + self._server.patience_seconds
        tries = 0
        while True:
            idle = self._take_idle()
            try:
                db = self._server.connect_to_read() if idle is None else idle
                return nothing if db is None else self._read_once(db, query)
            except psycopg.Error as error:
                if idle is not None:
                    continue  # An idle connection may be broken or lead to an earlier server: use a new one.
                if not is_temporary(error) or time.monotonic() > deadline:
                    raise self._server.explain(error) from error
            tries += 1
            pause(tries)

    def close(self) -> None:
        """Close the idle connection, and keep none from now on. Reading stays possible."""
        self._closed = True
        while (db := self._take_idle()) is not None:
            db.close()

    def _read_once(self, db: psycopg.Connection[Any], query: Callable[[Rows], T]) -> T:
        try:
            # A query reads one snapshot.
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            value = query(PostgresRows(db))
            db.execute("ROLLBACK")
        except BaseException:
            db.close()
            raise
        idle = self._idle.setdefault(generation(), [])
        if idle or self._closed:
            db.close()
        else:
            idle.append(db)
        return value

    def _take_idle(self) -> psycopg.Connection[Any] | None:
        try:
            return self._idle.setdefault(generation(), []).pop()
        except IndexError:
            return None
