"""Ways to damage what a durable store holds, behind its back: rows that go, and a moment that comes back."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import redis

from stroma.checkpoint.durable.integrity import seal
from stroma.checkpoint.durable.rows import Step

#: The stores, each with what loses the first output, the first attempt or the input of run "run".
SQL = {
    "output": "DELETE FROM {}steps WHERE position = 0 AND execution = 1 AND branch IN ('', '1')",
    "attempt": "DELETE FROM {}attempts WHERE position = 0",
    "input": "DELETE FROM {}inputs",
}
PREFIX = "stroma:{run}:"


def _redis(where: str) -> Any:
    return redis.Redis.from_url(where)


def lose(kind: str, where: str, what: str) -> None:
    """Delete a row of a run."""
    if kind == "sqlite":
        with contextlib.closing(sqlite3.connect(where, isolation_level=None)) as db:
            assert db.execute(SQL[what].format("")).rowcount == 1
    elif kind == "postgres":
        dsn, _, schema = where.partition("|")
        with psycopg.connect(dsn, autocommit=True) as db:
            assert db.execute(SQL[what].format(f"{schema}.").encode()).rowcount == 1
    else:
        with _redis(where) as client:
            if what == "input":
                assert client.delete(f"{PREFIX}inputs") == 1
                return
            key = f"{PREFIX}{'steps' if what == 'output' else 'attempts'}:1"
            field = min(client.hkeys(key))
            assert client.hdel(key, field) == 1


class Moment:
    """What a store holds now. ``restore()`` brings it back, under whoever is using the store meanwhile."""

    def __init__(self, kind: str, where: str) -> None:
        self._kind, self._where = kind, where
        if kind == "sqlite":
            with contextlib.closing(sqlite3.connect(where)) as db:
                self._rows: Any = {
                    name: db.execute(f"SELECT * FROM {name}").fetchall() for name in _tables(db)
                }
        elif kind == "postgres":
            dsn, _, schema = where.partition("|")
            with psycopg.connect(dsn, autocommit=True) as db:
                names = db.execute(
                    "SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)
                ).fetchall()
                for (name,) in names:
                    db.execute(f"CREATE TABLE {schema}_then_{name} AS TABLE {schema}.{name}".encode())
                self._rows = [name for (name,) in names]
        else:
            with _redis(where) as client:
                self._rows = {key: client.dump(key) for key in client.keys("*")}

    def restore(self) -> None:
        if self._kind == "sqlite":
            with contextlib.closing(sqlite3.connect(self._where, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                for name, rows in self._rows.items():
                    db.execute(f"DELETE FROM {name}")
                    for row in rows:
                        db.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)
                db.execute("COMMIT")
        elif self._kind == "postgres":
            dsn, _, schema = self._where.partition("|")
            with psycopg.connect(dsn) as db:
                for name in self._rows:
                    db.execute(f"DELETE FROM {schema}.{name}".encode())
                    entry = f"OVERRIDING SYSTEM VALUE SELECT * FROM {schema}_then_{name}"
                    db.execute(f"INSERT INTO {schema}.{name} {entry}".encode())
                    db.execute(f"DROP TABLE {schema}_then_{name}".encode())
        else:
            with _redis(self._where) as client:
                client.flushall()
                for key, data in self._rows.items():
                    client.restore(key, 0, data)


def _tables(db: sqlite3.Connection) -> list[str]:
    result = db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    ).fetchall()
    return [name for (name,) in result]


@contextlib.contextmanager
def loose(path: Path | str) -> Iterator[sqlite3.Connection]:
    """A connection to a SQLite store that takes any value in any column; its tables are STRICT again
    afterwards."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        strict = db.execute("SELECT name, sql FROM sqlite_master WHERE sql LIKE '%STRICT'").fetchall()
        db.execute("PRAGMA writable_schema = ON")
        for name, sql in strict:
            plain = sql.removesuffix("STRICT").rstrip().removesuffix(",")
            db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (plain, name))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db
        db.execute("PRAGMA writable_schema = ON")
        for name, sql in strict:
            db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, name))


def reseal(db: sqlite3.Connection) -> None:
    """Give each step of a SQLite store the checksum of what it holds now, as somebody who can write to it
    would."""
    columns = "id, position, branch, node_id, contract, schema_ref, output, sha256, number, input_key"
    for number, position, branch, node_id, *step in db.execute(f"SELECT {columns} FROM steps").fetchall():
        sha256 = seal(position, branch, node_id, Step(*step)).sha256
        db.execute("UPDATE steps SET sha256 = ? WHERE id = ?", (sha256, number))


__all__ = ["Moment", "loose", "lose", "reseal"]
