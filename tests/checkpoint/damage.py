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
from stroma.checkpoint.durable.rows import Annotation, Step
from stroma.checkpoint.redis.format import annotations_key

#: The stores, each with what loses the first output, the first attempt or the input of run "run".
SQL = {
    "output": "DELETE FROM steps WHERE position = 0 AND execution = 1 AND branch IN ('', '1')",
    "attempt": "DELETE FROM attempts WHERE position = 0",
    "input": f"DELETE FROM steps WHERE position = {Annotation.INPUT}",
}
PREFIX = "stroma:{run}:"


def _redis(where: str) -> Any:
    return redis.Redis.from_url(where)


class Database:
    """A connection to a store in SQL, behind its back. Parameters are written ``?``."""

    def __init__(self, kind: str, where: str) -> None:
        self._is_sqlite = kind == "sqlite"
        if self._is_sqlite:
            self._db: Any = sqlite3.connect(where, isolation_level=None)
        else:
            assert kind == "postgres", kind
            dsn, _, schema = where.partition("|")
            self._db = psycopg.connect(dsn, autocommit=True, options=f"-c search_path={schema}")

    def execute(self, statement: str, *values: Any) -> Any:
        """Return the cursor of a statement."""
        return self._db.execute(statement if self._is_sqlite else statement.replace("?", "%s"), values)

    def select(self, statement: str) -> tuple[list[str], list[Any]]:
        """Return names of columns, and rows."""
        cursor = self.execute(statement)
        return [column[0] for column in cursor.description], cursor.fetchall()

    def tables(self) -> list[str]:
        """Return the names of all tables."""
        found = self.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            if self._is_sqlite
            else "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        )
        return [name for (name,) in found.fetchall()]

    def close(self) -> None:
        """Close the connection."""
        self._db.close()


def database(kind: str, where: str) -> contextlib.closing[Database]:
    """Return a connection that a ``with`` statement closes."""
    return contextlib.closing(Database(kind, where))


def lose(kind: str, where: str, what: str) -> None:
    """Delete a row of a run."""
    if kind != "redis":
        with database(kind, where) as db:
            assert db.execute(SQL[what]).rowcount == 1
        return
    with _redis(where) as client:
        if what == "input":
            assert client.delete(f"{PREFIX}{annotations_key(Annotation.INPUT)}") == 1
            return
        key = f"{PREFIX}{'steps' if what == 'output' else 'attempts'}:1"
        field = min(client.hkeys(key))
        assert client.hdel(key, field) == 1


class Moment:
    """What a store holds now. ``restore()`` brings it back, under whoever is using the store meanwhile."""

    def __init__(self, kind: str, where: str) -> None:
        self._kind, self._where = kind, where
        if kind == "redis":
            with _redis(where) as client:
                self._rows: Any = {key: client.dump(key) for key in client.keys("*")}
        else:
            with database(kind, where) as db:
                self._rows = {name: db.select(f"SELECT * FROM {name}") for name in db.tables()}

    def restore(self) -> None:
        """Bring it back."""
        if self._kind == "redis":
            with _redis(self._where) as client:
                client.flushall()
                for key, data in self._rows.items():
                    client.restore(key, 0, data)
            return
        always = "OVERRIDING SYSTEM VALUE" if self._kind == "postgres" else ""
        with database(self._kind, self._where) as db:
            db.execute("BEGIN" if always else "BEGIN IMMEDIATE")
            for name, (columns, rows) in self._rows.items():
                db.execute(f"DELETE FROM {name}")
                for row in rows:
                    marks = ", ".join("?" * len(columns))
                    db.execute(f"INSERT INTO {name} ({', '.join(columns)}) {always} VALUES ({marks})", *row)
            db.execute("COMMIT")


@contextlib.contextmanager
def loose(path: Path | str) -> Iterator[sqlite3.Connection]:
    """A connection to a SQLite store that accepts any value; its tables are STRICT again afterwards."""
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
    """Give each step of a SQLite store the checksum of what it holds now, as anybody with access can."""
    columns = "id, position, branch, node_id, contract, schema_ref, output, sha256, number, input_key"
    for number, position, branch, node_id, *step in db.execute(f"SELECT {columns} FROM steps").fetchall():
        sha256 = seal(position, branch, node_id, Step(*step)).sha256
        db.execute("UPDATE steps SET sha256 = ? WHERE id = ?", (sha256, number))
