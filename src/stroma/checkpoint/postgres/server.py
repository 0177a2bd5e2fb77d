"""The server of a PostgresStore: connected to, and its errors put in words."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import quote

import psycopg
from psycopg import conninfo
from psycopg.types.numeric import Int8BinaryDumper, Int8Dumper

from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.postgres import schema as tables

__all__ = ["PostgresEndpoint", "is_lost", "is_misled", "may_pass", "pause"]

T = TypeVar("T")

logger = logging.getLogger("stroma")

# No call hangs for ever. What the connection string says of these goes before.
_CONNECTING: Final = {
    "connect_timeout": "5",
    # A server that went away without a word is noticed after 10 + 3 * 3 s; sooner where something was sent to it.
    "keepalives_idle": "10",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "stroma",
    "client_encoding": "UTF8",
}
_SESSION: Final = {
    "lock_timeout": "5s",
    "statement_timeout": "30s",
    # A process that is stopped in the midst of a transaction keeps its locks no longer than this.
    "idle_in_transaction_session_timeout": "30s",
    "default_transaction_isolation": "read committed",
    # Nothing is looked up by anything but a key: a plan made once will do.
    "plan_cache_mode": "force_generic_plan",
}

_ANSWER_SECONDS = 35.0  # Longer than the server's own timeout: it is the one that tells why.
_LOCKED: Final = "55P03"
# What another try may mend: the server is starting, stopping or full, or two got into each other's way.
_PASSING: Final = ("08", "40", "53", "57P", "58")
# The schema or a table is gone, and made again with the next connection; or the server has become a replica.
_MISLED: Final = ("3F000", "42P01", "25006")
# A server that refuses a connection gives no code, only words.
_REFUSED: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|does not exist|permission denied|"
    r"is not permitted|does not support SSL|certificate|not currently accepting|invalid .* option|"
    r"unsupported|SCRAM|root crt",
    re.IGNORECASE,
)
_warned: set[str] = set()


def is_lost(db: psycopg.Connection[Any]) -> bool:
    """Return True if the connection is lost; the operation in progress may or may not have been executed."""
    return bool(db.closed or db.broken)


def _code(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or ""


def is_misled(error: psycopg.Error) -> bool:
    """Return True if the connection leads to a server that is not the store now; a new connection may be right."""
    return _code(error).startswith(_MISLED)


def may_pass(error: psycopg.Error) -> bool:
    """Return True if an immediate retry may help. A lock that is held for long is left to the caller."""
    code = _code(error)
    if not code:
        return isinstance(error, psycopg.OperationalError) and not _REFUSED.search(str(error))
    return code.startswith((*_PASSING, *_MISLED))


def pause(attempt: int) -> None:
    """Before another try, a little longer each time; of many who wait, each for a time of its own."""
    time.sleep(random.uniform(0.3, 1.0) * min(0.02 * 2 ** min(attempt, 6), 1.0))


class _Connection(psycopg.Connection[Any]):
    """One that is given up when no answer comes, though the network is well: a server that stands still."""

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._within(gen, time.monotonic() + _ANSWER_SECONDS), *args, **kwargs)

    def _within(self, gen: Generator[Any, Any, T], deadline: float) -> Generator[Any, Any, T]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted  # 0 comes ten times a second, if nothing else does
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer within {_ANSWER_SECONDS:g} s")
                wanted = gen.send(ready)
        except StopIteration as done:
            value: T = done.value
            return value


@dataclass(frozen=True, slots=True)
class PostgresEndpoint:
    """Which database a store keeps its runs in, and how it connects to that.

    Attributes:
        name: the address without the password.
        patience_seconds: how long to try again what may pass.
        safe: see :func:`stroma.checkpoint.postgres.schema.is_ours`.
    """

    conninfo: str = field(repr=False)  # with the password
    schema: str
    name: str
    patience_seconds: float
    safe: set[int] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def at(cls, dsn: str, schema: str, patience_seconds: float) -> PostgresEndpoint:
        """Raises ValueError for what is no address; never with what it says, which may be a part of a password."""
        try:
            given = {k: str(v) for k, v in conninfo.conninfo_to_dict(dsn).items() if v is not None}
            at = {**_defaults(), **given}
            odd = at.get("host", "")[1:] + at.get("port", "").replace(",", "")
            if "@" in odd or not at.get("port", "0").replace(",", "").isdecimal() or "\0" in dsn:
                raise ValueError
        except (psycopg.Error, ValueError):
            raise ValueError(
                "the dsn is not a PostgreSQL connection string; use postgresql://user:password@host:5432/dbname, "
                "with percent signs for the special characters of a password (@ is %40, / is %2F)"
            ) from None
        full = conninfo.make_conninfo("", **{**_CONNECTING, **given})
        return cls(full, schema, _name(at), patience_seconds)

    def connect(self) -> psycopg.Connection[Any]:
        """A connection to write with; the tables are made if need be.

        Raises StoreError for a store that is not for us, else what psycopg raises.
        """
        db = self._connect()
        try:
            tables.prepare(db, self.schema, self.name, self.safe)
        except BaseException:
            db.close()
            raise
        return db

    def connect_to_read(self) -> psycopg.Connection[Any] | None:
        """A connection to read with; None where there are no tables. Raises as connect() does."""
        db = self._connect()
        try:
            if not tables.is_ours(db, self.schema, self.name, self.safe):
                db.close()
                return None
            if not tables.is_current(db, self.schema):
                tables.prepare(db, self.schema, self.name, self.safe)
        except BaseException:
            db.close()
            raise
        return db

    def _connect(self) -> psycopg.Connection[Any]:
        db = _Connection.connect(self.conninfo, autocommit=True)
        try:
            # Each size of number would be a statement of its own to the server.
            db.adapters.register_dumper(int, Int8Dumper)
            db.adapters.register_dumper(int, Int8BinaryDumper)
            self._set_up(db)
        except BaseException:
            db.close()
            raise
        return db

    def _set_up(self, db: psycopg.Connection[Any]) -> None:
        risks: Any = db.execute(
            "SELECT current_setting('fsync'), current_setting('full_page_writes'), "
            "current_setting('synchronous_commit')"
        ).fetchone()
        settings = {**_SESSION, "search_path": f'"{self.schema}"'}
        if risks[2] == "off":
            settings["synchronous_commit"] = "on"  # What is acknowledged is kept.
        query = b"SELECT " + b", ".join([b"set_config(%s, %s, false)"] * len(settings))
        db.execute(query, [part for setting in settings.items() for part in setting])
        off = " and ".join(
            name for name, value in zip(("fsync", "full_page_writes"), risks, strict=False) if value == "off"
        )
        if off and self.name not in _warned:
            _warned.add(self.name)
            logger.warning(
                "%s runs with %s off: a crash of its machine may take what was committed; turn that on",
                self.name,
                off,
            )

    def explain(self, error: Exception) -> StoreError:
        """An error of the server, or of the way to it, as a StoreError that says what to do."""
        if isinstance(error, StoreError):
            return error
        told = self._explain(error)
        told.__cause__ = error
        return told

    def _explain(self, error: Exception) -> StoreError:
        name, code, words = self.name, _code(error), " ".join(str(error).split())
        if not isinstance(error, psycopg.Error):
            return permanent_error(f"{name} cannot keep this: {type(error).__name__}: {words}")
        if code == _LOCKED:
            return StoreError(
                f"another session has held a lock on the run in {name} for 5 s; "
                "end it (see pg_stat_activity), then resume"
            )
        if code == "57014":
            return StoreError(
                f"{name} did not answer a query within 30 s; see what it is busy with, then resume"
            )
        if code.startswith("40"):
            return StoreError(
                f"{name} gave up a transaction that others were in the way of ({words}); resume"
            )
        if code == "53100":
            return StoreError(f"the disk of {name} is full; free some space, then resume")
        if code == "25006":
            return StoreError(
                f"{name} may not be written to: it is a replica, or read-only; "
                "give the address of the primary, then resume"
            )
        if code == "42501":
            return permanent_error(
                f"{name} does not let us ({words}); have the schema {self.schema} made for this user: "
                f'CREATE SCHEMA "{self.schema}" AUTHORIZATION ...'
            )
        if code.startswith("28") or code == "3D000" or (not code and _REFUSED.search(words)):
            return permanent_error(
                f"{name} refuses the connection ({words}); check the user, the password and the database"
            )
        if may_pass(error) or not code:
            return StoreError(
                f"{name} cannot be reached, or broke off ({words}); see whether it is up and lets us in, then resume"
            )
        if code.startswith(("22", "54")):
            return permanent_error(f"{name} cannot keep this: {words}")
        return permanent_error(f"{name} failed: {words}; if that is no fault of the server, report it")


def _defaults() -> dict[str, str]:
    """Return the settings of the environment (PGHOST and so on), else the client library's defaults."""
    found = {o.keyword.decode(): o.val.decode() for o in psycopg.pq.Conninfo.get_defaults() if o.val}
    return {k: found[k] for k in ("user", "host", "port", "dbname") if k in found}


def _name(at: dict[str, str]) -> str:
    host, user = at.get("host") or at.get("hostaddr") or "localhost", at.get("user", "")
    port, dbname = at.get("port", "5432"), at.get("dbname") or user
    who = f"{quote(user)}@" if user else ""
    if host.startswith(("/", "@")):  # a socket in the file system
        return f"postgresql://{who}/{quote(dbname, safe='')}?host={quote(host)}"
    return f"postgresql://{who}{host}:{port}/{quote(dbname, safe='')}"
