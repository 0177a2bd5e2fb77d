"""The server of a PostgresStore: connections, the schema, error messages."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import quote

import psycopg
from psycopg import conninfo, pq, sql
from psycopg.types.numeric import Int8BinaryDumper, Int8Dumper

from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sql.tables import SCHEMA_VERSION, Types, tables

T = TypeVar("T")

# Every call ends in time. Parameters in the connection string take precedence.
_CONNECTING: Final = {
    "connect_timeout": "5",
    # Detects a disconnected server after 10 + 3 * 3 s, or earlier if data was sent to it.
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
    # Limits how long a stopped process holds its locks.
    "idle_in_transaction_session_timeout": "30s",
    "default_transaction_isolation": "read committed",
    # Every query uses a key, so generic plans are as good.
    "plan_cache_mode": "force_generic_plan",
}

_NEWS_SECONDS = 5.0  # between looks whether anybody still listens
_REPLY_SECONDS = 35.0  # Longer than the server's own timeout, whose error has the reason.
_LOCKED: Final = "55P03"
# Errors that a retry may resolve: the server starts, stops or is overloaded, or transactions conflict.
_TEMPORARY: Final = ("08", "40", "53", "57P", "58")
# The schema or a table is missing, and the next connection creates it; or the server has become a replica.
_MISDIRECTED: Final = ("3F000", "42P01", "25006")
# Errors of a refused connection have no code, only a message.
_REFUSED: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|does not exist|permission denied|"
    r"is not permitted|does not support SSL|certificate|not currently accepting|invalid .* option|"
    r"unsupported|SCRAM|root crt",
    re.IGNORECASE,
)


def is_lost(db: psycopg.Connection[Any]) -> bool:
    """Return True unless the connection is ready for the next operation.

    Also an error in the middle of a pipeline can leave one that accepts no query. The operation in progress
    may or may not have been executed.
    """
    is_idle = db.pgconn.transaction_status == pq.TransactionStatus.IDLE
    return not is_idle or db.pgconn.pipeline_status != pq.PipelineStatus.OFF


def _code(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or ""


def is_misdirected(error: psycopg.Error) -> bool:
    """Return True if the connection leads to a server that is not the store now; a new one may be right."""
    return _code(error).startswith(_MISDIRECTED)


def is_temporary(error: Exception) -> bool:
    """Return True if an immediate retry may help. A lock that is held for long is left to the caller."""
    code = _code(error)
    if not code:
        return isinstance(error, psycopg.OperationalError) and not _REFUSED.search(str(error))
    return code.startswith((*_TEMPORARY, *_MISDIRECTED))


class _Connection(psycopg.Connection[Any]):
    """A connection that fails if the server does not reply in time, such as a stopped process."""

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._with_deadline(gen, time.monotonic() + _REPLY_SECONDS), *args, **kwargs)

    def _with_deadline(self, gen: Generator[Any, Any, T], deadline: float) -> Generator[Any, Any, T]:
        try:
            event = next(gen)
            while True:
                ready = yield event  # psycopg sends 0 ten times a second while nothing is ready.
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no reply within {_REPLY_SECONDS:g} s")
                event = gen.send(ready)
        except StopIteration as done:
            value: T = done.value
            return value


@dataclass(frozen=True, slots=True)
class PostgresEndpoint:
    """The database of a store.

    Attributes:
        name: the address without the password.
        patience_seconds: how long to retry after a temporary error.
        safe: see :func:`stroma.checkpoint.postgres.server.is_ours`.
    """

    conninfo: str = field(repr=False)  # with the password
    schema: str
    name: str
    patience_seconds: float
    safe: set[int] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def at(cls, dsn: str, schema: str, patience_seconds: float) -> PostgresEndpoint:
        """Return the endpoint for a connection string. Raises ValueError, without its password."""
        try:
            parameters = {k: str(v) for k, v in conninfo.conninfo_to_dict(dsn).items() if v is not None}
            at = {**_defaults(), **parameters}
            ports = at.get("port", "0").replace(",", "")
            if "@" in at.get("host", "")[1:] or not ports.isdecimal() or "\0" in dsn:
                raise ValueError
        except (psycopg.Error, ValueError):
            raise ValueError(
                "the dsn is not a PostgreSQL connection string; use "
                "postgresql://user:password@host:5432/dbname, "
                "and percent-encode special characters of a password (@ is %40, / is %2F)"
            ) from None
        full = conninfo.make_conninfo("", **{**_CONNECTING, **parameters})
        return cls(full, schema, _name(at), patience_seconds)

    def connect(self) -> psycopg.Connection[Any]:
        """Open a connection to write. Creates the tables if they are missing.

        Raises StoreError for a schema that is not a store for this role, otherwise psycopg.Error.
        """
        db = self._connect()
        try:
            prepare(db, self.schema, self.name, self.safe)
        except BaseException:
            db.close()
            raise
        return db

    def connect_to_read(self) -> psycopg.Connection[Any] | None:
        """Open a connection to read; None if there are no tables. Raises as connect() does."""
        db = self._connect()
        try:
            if not is_ours(db, self.schema, self.name, self.safe):
                db.close()
                return None
        except BaseException:
            db.close()
            raise
        return db

    def receive_news(self) -> Iterator[bool]:
        """Yield True for each message that a run may be due, False now and then. Raises psycopg.Error."""
        db = self._connect()
        try:
            db.execute(sql.SQL("LISTEN {}").format(sql.Identifier(f"stroma_{self.schema}")))
            while True:
                news = list(db.notifies(timeout=_NEWS_SECONDS, stop_after=1))
                yield bool(news)
        finally:
            db.close()

    def _connect(self) -> psycopg.Connection[Any]:
        db = _Connection.connect(self.conninfo, autocommit=True)
        try:
            # Otherwise the server would prepare a statement for each size of integer.
            db.adapters.register_dumper(int, Int8Dumper)
            db.adapters.register_dumper(int, Int8BinaryDumper)
            self._configure(db)
        except BaseException:
            db.close()
            raise
        return db

    def _configure(self, db: psycopg.Connection[Any]) -> None:
        settings = {**_SESSION, "search_path": f'"{self.schema}"'}
        ((durability,),) = db.execute("SELECT current_setting('synchronous_commit')").fetchall()
        if durability == "off":
            settings["synchronous_commit"] = "on"  # Acknowledged data must be durable.
        query = b"SELECT " + b", ".join([b"set_config(%s, %s, false)"] * len(settings))
        db.execute(query, [part for setting in settings.items() for part in setting])

    def explain(self, error: Exception) -> StoreError:
        """Return an error of the server or of the connection as a StoreError that says how to fix it."""
        if isinstance(error, StoreError):
            return error
        explained = self._explain(error)
        explained.__cause__ = error
        return explained

    def _explain(self, error: Exception) -> StoreError:
        name, code, text = self.name, _code(error), " ".join(str(error).split())
        if not isinstance(error, psycopg.Error):
            return permanent_error(f"{name} cannot store the data: {type(error).__name__}: {text}")
        if code == _LOCKED:
            return StoreError(
                f"another session has held a lock on the run in {name} for 5 s; "
                "end it (see pg_stat_activity), then resume"
            )
        if code == "57014":
            return StoreError(f"{name} did not answer a query within 30 s; check its load, then resume")
        if code.startswith("40"):
            return StoreError(f"{name} aborted a transaction that conflicted with others ({text}); resume")
        if code == "53100":
            return StoreError(f"the disk of {name} is full; free some space, then resume")
        if code == "25006":
            return StoreError(
                f"{name} is read-only or a replica; use the address of the primary, then resume"
            )
        if code == "42501":
            return permanent_error(
                f"{name} denies permission ({text}); let an administrator create the schema {self.schema} "
                f'for this user: CREATE SCHEMA "{self.schema}" AUTHORIZATION ...'
            )
        if code.startswith("28") or code == "3D000" or (not code and _REFUSED.search(text)):
            return permanent_error(
                f"{name} refuses the connection ({text}); check the user, the password and the database"
            )
        if is_temporary(error) or not code:
            return StoreError(
                f"{name} cannot be reached, or closed the connection ({text}); check that it is running "
                "and accepts connections, then resume"
            )
        if code.startswith(("22", "54")):
            return permanent_error(f"{name} cannot store the data: {text}")
        return permanent_error(f"{name} failed: {text}; report this if the server works correctly")


def _defaults() -> dict[str, str]:
    """Return the settings of the environment (PGHOST and so on), or the defaults of the client library."""
    options = {o.keyword.decode(): o.val.decode() for o in psycopg.pq.Conninfo.get_defaults() if o.val}
    return {k: options[k] for k in ("user", "host", "port", "dbname") if k in options}


def _name(at: dict[str, str]) -> str:
    host, user = at.get("host") or at.get("hostaddr") or "localhost", at.get("user", "")
    port, dbname = at.get("port", "5432"), at.get("dbname") or user
    user_part = f"{quote(user)}@" if user else ""
    if host.startswith(("/", "@")):  # a socket in the file system
        return f"postgresql://{user_part}/{quote(dbname, safe='')}?host={quote(host)}"
    return f"postgresql://{user_part}{host}:{port}/{quote(dbname, safe='')}"


# The pages of runs and cells have free space, so that a commit rewrites a row in its page, and no index.
_TYPES: Final = Types(
    # Text is compared by its bytes, independent of the collation of the database and its versions.
    names={"bigint": "bigint", "text": 'text COLLATE "C"', "bytea": "bytea"},
    run="run bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    id="id bigint GENERATED BY DEFAULT AS IDENTITY",
    options="",
    by_key="",
    rewritten=" WITH (fillfactor = 70)",
)

_META: Final = (
    "CREATE TABLE meta (k text PRIMARY KEY, v text NOT NULL)",
    f"INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}')",
)

# Whoever can create objects in the schema can make our statements run code: its triggers, rules and functions
# run as our role. So that must be our role, a role that ours is a member of, or a superuser, who may do all
# that anyway. Only granted memberships count: a superuser is a member of every role. "public" belongs to the
# owner of the database.
_UNTRUSTED: Final = """WITH RECURSIVE ours(role) AS (SELECT oid FROM pg_roles WHERE rolname = current_user
    UNION SELECT m.roleid FROM pg_auth_members m JOIN ours ON m.member = ours.role),
    trusted(role) AS (SELECT role FROM ours UNION SELECT oid FROM pg_roles WHERE rolsuper),
    place AS (SELECT CASE WHEN r.rolname = 'pg_database_owner' THEN d.datdba ELSE n.nspowner END AS owner,
    n.nspowner, n.nspacl FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner, pg_database d
    WHERE n.nspname = %s AND d.datname = current_database())
    SELECT 'belongs to ' || quote_ident(pg_get_userbyid(owner)) || ', a role that ' ||
    quote_ident(current_user) || ' is not a member of' FROM place
    WHERE owner NOT IN (SELECT role FROM trusted)
    UNION ALL SELECT 'lets ' || CASE grantee WHEN 0 THEN 'every role' ELSE
    quote_ident(pg_get_userbyid(grantee)) END || ' create objects in it' FROM place, aclexplode(nspacl)
    WHERE privilege_type = 'CREATE' AND grantee <> nspowner AND grantee NOT IN (SELECT role FROM trusted)"""
# Read from a table: to_regclass() may not see objects that others created while this waited for a lock.
_OBJECTS: Final = """SELECT coalesce(bool_or(c.relname = 'meta'), false),
    coalesce(bool_or(c.relname IN ('runs', 'steps', 'attempts')), false),
    (SELECT oid::bigint FROM pg_namespace WHERE nspname = %s)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s"""
_SERVER_FACTS: Final = (
    """SELECT current_setting('server_encoding'), NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)"""
)


def prepare(db: psycopg.Connection[Any], schema: str, where: str, safe: set[int]) -> None:
    """Create the tables, if necessary. The schema is the only one on the search path."""
    if is_ours(db, schema, where, safe):
        return
    with db.transaction():
        # The lock serialises processes that open a new database at the same time.
        db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"stroma:{schema}",))
        if not is_ours(db, schema, where, safe):
            _create(db, schema, where)


def _create(db: psycopg.Connection[Any], schema: str, where: str) -> None:
    facts: Any = db.execute(_SERVER_FACTS, (schema,)).fetchone()
    encoding, is_missing = facts
    if encoding != "UTF8":
        raise permanent_error(
            f"{where} has the encoding {encoding}, which cannot store every character; create a database "
            "WITH ENCODING 'UTF8' TEMPLATE template0, and use that"
        )
    if is_missing:  # An existing schema may have been created for a role that cannot create schemas.
        db.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    for statement in (*tables(_TYPES), *_META):
        db.execute(statement.encode())


def is_ours(db: psycopg.Connection[Any], schema: str, where: str, safe: set[int]) -> bool:
    """Return True if the schema has our tables, False if it has none.

    Raises StoreError for tables of another program, or of a newer format. ``safe``: oids of schemas that no
    other role controls. Only a trusted role can change that, so it is checked once.
    """
    objects: Any = db.execute(_OBJECTS, (schema, schema)).fetchone()
    has_meta, has_others, oid = objects
    if oid is not None and oid not in safe:
        _refuse_untrusted(db, schema, where)
        safe.add(oid)
    if not has_meta and not has_others:
        return False
    version = _version(db, schema) if has_meta else None
    if version is None:
        raise permanent_error(
            f'schema "{schema}" of {where} has tables of another program, or is damaged; use another schema='
        )
    if version != SCHEMA_VERSION:
        raise permanent_error(
            f'schema "{schema}" of {where} has format {version}, and this release has format '
            f"{SCHEMA_VERSION}; use the release that wrote it, or another schema="
        )
    return True


def _refuse_untrusted(db: psycopg.Connection[Any], schema: str, where: str) -> None:
    """Raise StoreError for a schema in which another role can put code."""
    for (what,) in db.execute(_UNTRUSTED, (schema,)).fetchall():
        raise permanent_error(
            f'schema "{schema}" of {where} {what}; its code would run as the role of the store. Create a new '
            "schema with CREATE SCHEMA ... AUTHORIZATION CURRENT_USER, and pass its name as schema="
        )


def _version(db: psycopg.Connection[Any], schema: str) -> int | None:
    # The qualified name makes a schema without USAGE permission an error; the search path would skip it.
    query = sql.SQL("SELECT v FROM {}.meta WHERE k = 'schema_version'").format(sql.Identifier(schema))
    try:
        row = db.execute(query).fetchone()
    except psycopg.errors.UndefinedColumn:
        return None
    return int(row[0]) if row is not None and str(row[0]).isdecimal() else None
