"""The file of a SQLite store: how it is made and opened, what is refused, waits, and errors in words."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit import words
from tests.shared_stores import subclass_of

from stroma.checkpoint import SQLiteStore, StoreError
from stroma.checkpoint.sql.tables import SCHEMA_VERSION
from stroma.checkpoint.sqlite.file import Connect, DatabaseFile, connect, is_fatal

#: The format of files, and that of the next release.
NOW = SCHEMA_VERSION
NEXT = NOW + 1


def database(
    path: Path, synchronous: Any = "full", opens: Connect = connect, patience: float = 0.0
) -> DatabaseFile:
    return DatabaseFile(str(path), synchronous, opens, patience)


def error_of(code: int | None, text: str = "said", kind: type[Exception] = sqlite3.OperationalError) -> Any:
    error = kind(text)
    if code is not None:
        error.sqlite_errorcode = code
    return error


def pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def fails(call: Callable[[], Any]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call()
    return caught.value


def read(file: DatabaseFile) -> bool:
    """Whether there is anything to read in it."""
    with file.open_to_read() as db:
        return db is not None


FOREIGN = "{} is an SQLite database of another program, not a stroma store; use another path"


@pytest.mark.parametrize(
    ("names", "text", "transient"),
    [
        (
            "BUSY BUSY_SNAPSHOT LOCKED LOCKED_SHAREDCACHE",
            "database is locked: another process has held {} ",
            True,
        ),
        ("FULL", "the disk is full: {} cannot grow; free some space, then resume", True),
        (
            "IOERR_WRITE IOERR_SHMOPEN IOERR_SHMSIZE IOERR_SHMMAP IOERR_NOMEM",
            "the disk refused a write to {}: it is full, ",
            True,
        ),
        (
            "TOOBIG",
            "a payload is larger than a row of {} can hold (10**9 bytes); pass blobs= to the store",
            False,
        ),
        ("NOTADB", "{} is not an SQLite database; use another path, or move that file away", False),
        (
            "CORRUPT",
            "{} is damaged (said); restore it from a backup, or recover it with the `.recover`",
            False,
        ),
        ("READONLY READONLY_DIRECTORY PERM CANTOPEN", "cannot open {} to write (said); check its ", False),
        (
            "IOERR IOERR_FSYNC IOERR_READ",
            "the disk of {} failed (said): acknowledged commits are stored",
            False,
        ),
        ("CONSTRAINT", "{}: said", True),
    ],
)
def test_each_error_says_what_to_do(tmp_path: Path, names: str, text: str, transient: bool) -> None:
    """An error of SQLite names the path and the fix, and says if a retry may help."""
    path = tmp_path / "runs.db"
    for name in names.split():
        error = database(path, patience=1.5).explain(error_of(getattr(sqlite3, f"SQLITE_{name}")))
        assert str(error).startswith(text.format(path))
        assert (type(error), error.transient) == (StoreError, transient)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError("said"), "cannot open {} to write (said); check its directory"),
        (FileNotFoundError("said"), "cannot open {} to write (said); check its directory"),
        (OSError("said"), "{}: said"),
    ],
)
def test_each_error_of_the_system_says_what_to_do(tmp_path: Path, error: Exception, text: str) -> None:
    """An error of the file system names the path and the fix."""
    path = tmp_path / "runs.db"
    assert str(database(path).explain(error)).startswith(text.format(path))


@pytest.mark.parametrize(
    ("code", "fatal"),
    [
        (sqlite3.SQLITE_IOERR, True),
        (sqlite3.SQLITE_IOERR_FSYNC, True),
        (sqlite3.SQLITE_IOERR_DIR_FSYNC, True),
        (sqlite3.SQLITE_IOERR_READ, True),
        (sqlite3.SQLITE_IOERR_TRUNCATE, True),
        (sqlite3.SQLITE_IOERR_WRITE, False),
        (sqlite3.SQLITE_IOERR_SHMOPEN, False),
        (sqlite3.SQLITE_IOERR_SHMSIZE, False),
        (sqlite3.SQLITE_IOERR_SHMMAP, False),
        (sqlite3.SQLITE_IOERR_NOMEM, False),
        (sqlite3.SQLITE_FULL, False),
        (sqlite3.SQLITE_BUSY, False),
        (None, False),
        (0, False),
    ],
)
def test_after_which_errors_nothing_may_be_written(code: int | None, fatal: bool) -> None:
    """After all errors of input and output but those for which a rollback is all that is needed."""
    assert is_fatal(error_of(code)) is fatal


@pytest.mark.parametrize(("synchronous", "number", "fullfsync"), [("full", 2, 1), ("normal", 1, 0)])
def test_the_settings_of_the_writer(tmp_path: Path, synchronous: str, number: int, fullfsync: int) -> None:
    db = database(tmp_path / "runs.db", synchronous).open()
    names = words("journal_mode synchronous fullfsync journal_size_limit trusted_schema busy_timeout")
    events = [pragma(db, name) for name in names]
    assert events == ["wal", number, fullfsync, 64 * 1024 * 1024, 0, 0]
    assert db.isolation_level is None
    db.close()


def test_a_reader_is_closed_at_the_end(tmp_path: Path) -> None:
    """After an error, too."""
    file = database(tmp_path / "runs.db")
    file.open().close()
    with file.open_to_read() as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        db.execute("SELECT 1")
    with pytest.raises(ZeroDivisionError), file.open_to_read() as other:
        raise ZeroDivisionError
    assert other is not None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        other.execute("SELECT 1")


def test_what_the_system_refuses_has_its_cause(tmp_path: Path) -> None:
    """Of a reader, too."""

    def opens(_: str) -> sqlite3.Connection:
        raise OSError(errno.EMFILE, "Too many open files")

    file = database(tmp_path / "runs.db", opens=opens)
    for call in (file.open, lambda: read(file)):
        error = fails(call)
        assert str(error) == f"{file.path}: [Errno 24] Too many open files"
        assert isinstance(error.__cause__, OSError)


def other_program(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE theirs (x)")


def other_mark(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA application_id = 7")


def newer(db: sqlite3.Connection) -> None:
    _ours(db, NEXT)


def older(db: sqlite3.Connection) -> None:
    _ours(db, 3)


def without_a_number(db: sqlite3.Connection) -> None:
    """Up to format 10 a store had its number elsewhere."""
    _ours(db, 0)


def _ours(db: sqlite3.Connection, version: int) -> None:
    db.execute("PRAGMA application_id = 0x5374726D")
    db.execute(f"PRAGMA user_version = {version}")


OTHER = (
    f"{{}} has format %s, and this release has format {NOW}; use the release that wrote it, or another path"
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_program, FOREIGN),
        (other_mark, FOREIGN),
        (newer, OTHER % NEXT),
        (older, OTHER % 3),
        (without_a_number, OTHER % "10 or older"),
    ],
)
def test_a_file_that_is_no_store_of_ours(tmp_path: Path, make: Callable[[Any], None], message: str) -> None:
    """It is refused by readers and writers, and stays as it was, to the byte; no connection is left open."""
    path, opened = tmp_path / "runs.db", list[sqlite3.Connection]()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        make(db)
    before = path.read_bytes()

    def opens(uri: str) -> sqlite3.Connection:
        opened.append(connect(uri))
        return opened[-1]

    file = database(path, opens=opens)
    for call in (file.open, lambda: read(file)):
        error = fails(call)
        assert str(error) == message.format(path)
        assert not error.transient
    assert path.read_bytes() == before
    assert len(opened) == 2
    for one in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            one.execute("SELECT 1")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(b"no database, but a text that is longer than the header of one" * 20)
    for call in (database(path).open, lambda: read(database(path))):
        error = fails(call)
        assert str(error) == f"{path} is not an SQLite database; use another path, or move that file away"
        assert isinstance(error.__cause__, sqlite3.DatabaseError)


class Meanwhile(sqlite3.Connection):
    """A connection before which something happens, once, when it begins a transaction."""

    happens: Callable[[], None] | None = None

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "BEGIN IMMEDIATE" and Meanwhile.happens is not None:
            happens, Meanwhile.happens = Meanwhile.happens, None
            happens()
        return super().execute(sql, *values)


def meanwhile(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None, factory=Meanwhile)


def test_two_that_make_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds what the faster one made, and leaves it as it is."""
    path = tmp_path / "runs.db"

    def faster() -> None:
        db = database(path).open()
        db.execute("INSERT INTO cells VALUES ('c', 'c', x'01')")
        db.close()

    monkeypatch.setattr(Meanwhile, "happens", staticmethod(faster))
    db = database(path, opens=meanwhile).open()
    assert not db.in_transaction
    assert db.execute("SELECT name FROM cells").fetchall() == [("c",)]
    db.close()


def test_a_file_that_is_up_to_date_is_opened_while_somebody_writes(tmp_path: Path) -> None:
    """By writers and readers, without waiting: nothing needs to be done to it."""
    file = database(tmp_path / "runs.db")
    writer = file.open()
    writer.execute("BEGIN IMMEDIATE")
    file.open().close()
    assert read(file)
    writer.execute("ROLLBACK")
    writer.close()


@pytest.mark.parametrize("name", ["", ":memory:", "a\0b", b""])
def test_what_names_no_file(name: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SQLiteStore(name)
    path = os.fsdecode(name)
    assert str(caught.value) == (
        f"path must name a file, got {path!r}; use AsyncInMemoryStore to store nothing on disk"
    )


@pytest.mark.parametrize("synchronous", ["FULL", "off", None])
def test_how_sure_a_commit_may_be(tmp_path: Path, synchronous: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SQLiteStore(tmp_path / "runs.db", synchronous=synchronous)
    assert str(caught.value) == f'synchronous must be "full" or "normal", got {synchronous!r}'


class Watched(sqlite3.Connection):
    """A connection of which each statement is kept; ``fail``: what a query raises."""

    executed: list[str] = []  # noqa: RUF012

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        Watched.executed.append(sql)
        return super().execute(sql, *values)


def watched(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None, factory=Watched)


def test_a_query_reads_within_one_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun before it and ended after it, also if it raises; an empty store gives its given answer."""
    SQLiteStore(tmp_path / "runs.db")._file.open().close()
    monkeypatch.setattr(Watched, "executed", [])
    store = subclass_of(SQLiteStore, _open_file=staticmethod(watched))(tmp_path / "runs.db")
    assert store.exists()

    def counted(rows: Any) -> Any:
        return rows.db.execute("SELECT count(*) FROM runs").fetchone()

    def broken(rows: Any) -> None:
        raise ZeroDivisionError

    assert store.read(counted, "nothing") == (0,)
    assert Watched.executed[-3:] == ["BEGIN", "SELECT count(*) FROM runs", "ROLLBACK"]
    with pytest.raises(ZeroDivisionError):
        store.read(broken, None)
    assert Watched.executed[-2:] == ["BEGIN", "ROLLBACK"]
    (tmp_path / "empty.db").touch()
    assert SQLiteStore(tmp_path / "empty.db").read(counted, "nothing") == "nothing"
    assert not SQLiteStore(tmp_path / "none.db").exists()


def test_a_damaged_text_is_read_as_far_as_it_can(tmp_path: Path) -> None:
    """Text that is not UTF-8 is read with escapes; another error of a query is raised."""
    store = SQLiteStore(tmp_path / "runs.db")
    db = store._file.open()
    db.execute("INSERT INTO cells VALUES ('k', CAST(x'61ff62' AS TEXT), x''), ('l', 'é', x'')")
    db.close()

    def texts(rows: Any) -> Any:
        return rows.db.execute("SELECT name FROM cells ORDER BY cell_key").fetchall()

    assert store.read(texts, None) == [("a\\xffb",), ("é",)]
    tries = list[int]()

    def wrong(rows: Any) -> None:
        tries.append(1)
        rows.db.execute("SELECT no_such FROM cells")

    text = fails(lambda: store.read(wrong, None))
    assert str(text) == f"{store.path}: no such column: no_such"
    assert tries == [1]


def test_a_reader_waits_for_a_lock(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "runs.db")
    store._file.open().close()
    tries = list[int]()

    def locked(rows: Any) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise error_of(sqlite3.SQLITE_BUSY)
        return len(tries)

    assert store.read(locked, 0) == 3
