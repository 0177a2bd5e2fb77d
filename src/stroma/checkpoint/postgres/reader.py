"""Reads of a Postgres store: in the calling thread, on a reused connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.worker import generation
from stroma.checkpoint.postgres.rows import PostgresRows
from stroma.checkpoint.postgres.server import PostgresEndpoint, may_pass, pause

__all__ = ["PostgresReader"]

T = TypeVar("T")


class PostgresReader:
    """Reads, from any thread. Between calls it keeps one connection at most."""

    def __init__(self, server: PostgresEndpoint) -> None:
        self._server = server
        #: By generation: a forked child leaves its parent's connections alone.
        self._idle: dict[int, list[psycopg.Connection[Any]]] = {}
        self._closed = False

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Return the result of a query, or ``nothing`` if there are no tables. Raises StoreError."""
        deadline = time.monotonic() + self._server.patience_seconds
        tries = 0
        while True:
            kept = self._take()
            try:
                db = self._server.connect_to_read() if kept is None else kept
                return nothing if db is None else self._once(db, query)
            except psycopg.Error as error:
                if kept is not None:
                    continue  # It may have been broken for long, or lead to what was there once: now a new one.
                if not may_pass(error) or time.monotonic() > deadline:
                    raise self._server.explain(error) from error
            tries += 1
            pause(tries)

    def close(self) -> None:
        """Keep no connection from now on. Reading is possible all the same."""
        self._closed = True
        while (db := self._take()) is not None:
            db.close()

    def _once(self, db: psycopg.Connection[Any], query: Callable[[Rows], T]) -> T:
        try:
            # All that a query reads is of one moment.
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            found = query(PostgresRows(db))
            db.execute("ROLLBACK")
        except BaseException:
            db.close()
            raise
        idle = self._idle.setdefault(generation(), [])
        if idle or self._closed:
            db.close()
        else:
            idle.append(db)
        return found

    def _take(self) -> psycopg.Connection[Any] | None:
        try:
            return self._idle.setdefault(generation(), []).pop()
        except IndexError:
            return None
