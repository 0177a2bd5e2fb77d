"""Stores that somebody else has prepared: nothing of theirs runs in our name or reads without end."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

psycopg = pytest.importorskip("psycopg")

from psycopg import conninfo  # noqa: E402
from tests.servers_postgres import PostgresServer, shared_postgres  # noqa: E402
from tests.store_suite.journal import State, begin, commit, finish  # noqa: E402

from stroma.checkpoint import PostgresStore, SQLiteStore, StoreError  # noqa: E402


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server with a database in which two roles may make schemas."""
    server = shared_postgres()
    server.execute("CREATE DATABASE app")
    for role in ("mallory", "victim", "crew", "boss"):
        server.execute(f"CREATE ROLE {role} LOGIN {'SUPERUSER' if role == 'boss' else ''}")
    server.execute("GRANT CREATE ON DATABASE app TO mallory, victim, crew")
    yield server
    server.execute("DROP DATABASE app WITH (FORCE)")
    for role in ("mallory", "victim", "crew", "boss"):
        server.execute(f"DROP ROLE {role}")


def _dsn(server: PostgresServer, role: str) -> str:
    at = {**conninfo.conninfo_to_dict(server.dsn), "user": role, "dbname": "app"}
    return conninfo.make_conninfo("", **at)


def _execute(server: PostgresServer, role: str, *statements: str) -> None:
    with psycopg.connect(_dsn(server, role), autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


async def _use(server: PostgresServer, role: str, schema: str = "stroma") -> None:
    async with PostgresStore(_dsn(server, role), schema=schema) as store:
        session = await begin(store, f"by {role}")
        await commit(session, 0, State())
        await finish(session)


async def _refused(server: PostgresServer, role: str, why: str, schema: str = "stroma") -> None:
    """Neither written nor read, and the message says how to make a clean one."""
    async with PostgresStore(_dsn(server, role), schema=schema) as store:
        with pytest.raises(StoreError, match=why) as refused:
            await begin(store)
        assert not refused.value.transient
        assert "CREATE SCHEMA ... AUTHORIZATION CURRENT_USER" in str(refused.value)
        with pytest.raises(StoreError, match=why):
            store.list_runs()


OPEN = (
    "GRANT ALL ON SCHEMA stroma TO PUBLIC",
    "GRANT ALL ON ALL TABLES IN SCHEMA stroma TO PUBLIC",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA stroma TO PUBLIC",
)
TRIGGER = (
    "CREATE TABLE stroma.stolen (who text)",
    """CREATE FUNCTION stroma.evil() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO stroma.stolen VALUES (current_user); RETURN new; END $$""",
    "CREATE TRIGGER t AFTER INSERT ON stroma.runs FOR EACH ROW EXECUTE FUNCTION stroma.evil()",
)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["victim", "boss"])
async def test_a_schema_of_another_role_is_refused(server: PostgresServer, role: str) -> None:
    """Its owner may add a trigger that runs as its writers: for a superuser, on the whole server."""
    await _use(server, "mallory")
    _execute(server, "mallory", *TRIGGER, "GRANT ALL ON stroma.stolen TO PUBLIC", *OPEN)
    await _refused(server, role, f"belongs to mallory, a role that {role} is not a member of")
    with psycopg.connect(_dsn(server, "mallory"), autocommit=True) as db:
        assert db.execute("SELECT who FROM stroma.stolen").fetchall() == []


@pytest.mark.slow
@pytest.mark.parametrize(("role", "why"), [("mallory", "lets mallory"), ("PUBLIC", "lets every role")])
async def test_a_schema_in_which_another_role_may_create_is_refused(
    server: PostgresServer, role: str, why: str
) -> None:
    """A role that may create objects in a schema of ours could put a function in place of the server's."""
    await _use(server, "victim")
    _execute(server, "victim", f"GRANT USAGE, CREATE ON SCHEMA stroma TO {role}")
    await _refused(server, "victim", f"{why} create objects in it")
    _execute(server, "victim", f"REVOKE CREATE ON SCHEMA stroma FROM {role}")
    await _use(server, "victim")


@pytest.mark.slow
async def test_who_may_share_a_schema(server: PostgresServer) -> None:
    """Members of the role that owns it and whoever a superuser made it for; a clean one can be made."""
    await _use(server, "crew")
    _execute(
        server,
        "crew",
        *(s.replace("PUBLIC", "victim").replace("ALL ON SCHEMA", "USAGE ON SCHEMA") for s in OPEN),
    )
    await _refused(server, "victim", "belongs to crew, a role that victim is not a member of")
    server.execute("GRANT crew TO victim")
    await _use(server, "victim")
    _execute(server, "boss", "CREATE SCHEMA made AUTHORIZATION victim", "CREATE SCHEMA lent")
    _execute(server, "boss", "GRANT USAGE, CREATE ON SCHEMA lent TO victim")
    await _use(server, "victim", "made")
    await _use(server, "victim", "lent")
    server.execute("REVOKE crew FROM victim")


def _change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        (
            ("DROP TABLE cells", f"CREATE VIEW cells AS {ENDLESS} SELECT '' AS cell_key, i AS data FROM n"),
            "has a view 'cells' that is not one of",
        ),
        (
            ("CREATE TRIGGER t AFTER INSERT ON attempts BEGIN DELETE FROM steps; END",),
            "has a trigger 't' that",
        ),
        (
            ("DROP TABLE cells", "CREATE TABLE cells (name TEXT PRIMARY KEY, data BLOB)"),
            "table 'cells' that is not one of",
        ),
        (
            ("DROP TABLE cells", "CREATE VIRTUAL TABLE cells USING fts5(name, data)"),
            "has a table 'cells.*' that is not one of",
        ),
        (
            (
                "DROP TABLE cells",
                "CREATE TABLE cells (name TEXT PRIMARY KEY, data BLOB AS (zeroblob(900000000))) STRICT",
            ),
            "table 'cells' that is not one of",
        ),
    ],
    ids=["endless view", "trigger", "types", "virtual", "computed"],
)
async def test_a_file_with_programs_is_refused(tmp_path: Path, statements: tuple[str, ...], why: str) -> None:
    """A file that runs something when it is read or written is neither, and nothing in it is changed."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        await commit(await begin(store), 0, State())
    _change(path, *statements)
    async with SQLiteStore(path) as store:
        with pytest.raises(StoreError, match=why) as refused:
            store.list_runs()
        assert not refused.value.transient
        assert str(refused.value).endswith("; drop it if it is yours, or use another path")
        with pytest.raises(StoreError, match=why):
            await begin(store, "other")


async def test_columns_hold_what_they_are_declared_to_hold(tmp_path: Path) -> None:
    """Another program cannot put a text where a number is, nor bytes where a text is."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        await finish(await begin(store))
    for statement in (
        "UPDATE runs SET tokens = 'x'",
        "UPDATE runs SET status = x'78'",
        "UPDATE steps SET output = 'x'",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="cannot store"):
            _change(path, statement)
