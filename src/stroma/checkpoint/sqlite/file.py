"""The database file of an SQLiteStore: creation, opening, validation, forks, and error messages."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, TypeVar
from weakref import WeakSet

from stroma._utils.forks import process_lock
from stroma.checkpoint.durable.worker import permanent_error, retry
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sql.tables import SCHEMA_VERSION, Types, tables


class _Forks:
    """Lets a process fork only while no thread uses SQLite."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Depth of use by thread.
        self._users: dict[int, int] = {}
        #: Connections that are open while nobody uses them.
        self.idle: WeakSet[Any] = WeakSet()

    @contextmanager
    def prevent(self) -> Iterator[None]:
        """Delay forks of this process until the end of the block."""
        thread = threading.get_ident()
        with self._changed:
            self._users[thread] = self._users.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                depth = self._users.pop(thread, 1) - 1  # A child that was forked inside has no users.
                if depth:
                    self._users[thread] = depth
                else:
                    self._changed.notify_all()

    def before(self) -> None:
        thread = threading.get_ident()
        self._changed.acquire()
        while self._users.keys() - {thread}:
            self._changed.wait()
        for connection in list(self.idle):
            connection.close()  # The next operation opens the file again.

    def after_in_parent(self) -> None:
        self._changed.release()

    def after_in_child(self) -> None:
        self.__init__()  # type: ignore[misc]


FORKS: Final = _Forks()
if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(
        before=FORKS.before, after_in_parent=FORKS.after_in_parent, after_in_child=FORKS.after_in_child
    )


T = TypeVar("T")

#: Opens a connection for a URI that ends in ``?mode=rw`` or ``?mode=ro``.
Connect = Callable[[str], sqlite3.Connection]

_APPLICATION_ID: Final = 0x5374726D  # "Strm", in the header of the file
_NEEDED_SQLITE: Final = (3, 37, 0)  # the first one with STRICT tables

# STRICT: SQLite refuses values of another type than the column's.
_TYPES: Final = Types(
    names={"bigint": "INTEGER", "text": "TEXT", "bytea": "BLOB"},
    run="run INTEGER PRIMARY KEY AUTOINCREMENT",
    id="id INTEGER PRIMARY KEY",
    options=" STRICT",
    by_key=" WITHOUT ROWID, STRICT",
    rewritten=" STRICT",
)
_SCHEMA: Final = (
    *tables(_TYPES),
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_OBJECTS: Final = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"


@functools.cache
def _own_objects() -> set[tuple[str, str, str]]:
    """Return type, name and definition of each table and index of a store."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for statement in _SCHEMA:
            db.execute(statement)
        return {*db.execute(_OBJECTS)}


_WAL_HEADER_BYTES: Final = 32
_LOCK_ERRORS: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# I/O errors that a rollback repairs: there was no space or memory.
_NO_SPACE: Final = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_NOMEM,
)
# The last writer died during a write: only a connection with write access can recover the file.
_NEEDS_RECOVERY: Final = (sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY)
# A process loses its fcntl locks when it closes *any* descriptor of the file: the descriptor that creates the
# file must be closed before another thread opens a connection to it.
_creating = process_lock()


def _size(path: str) -> int:
    """Return the size of a file in bytes; 0 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def connect(uri: str) -> sqlite3.Connection:
    """Open a connection without implicit transactions."""
    # timeout=0: SQLite's own waiting starves writers; DatabaseFile.retry_while_locked() is fair.
    # check_same_thread: a thread that forks closes it, while no other uses it.
    db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
    # A damaged text is another text, which fails the checksum of its row if that has one.
    db.text_factory = partial(str, encoding="utf-8", errors="backslashreplace")
    db.execute("PRAGMA trusted_schema=0")
    return db


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", 0)


def is_fatal(error: BaseException) -> bool:
    """Return True if later writes to the file cannot be trusted, such as after a failed fsync.

    The kernel may have dropped data that it could not write, and the next fsync would succeed nevertheless.
    """
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR and _code(error) not in _NO_SPACE


@dataclass(frozen=True, slots=True)
class DatabaseFile:
    """The database file of a store.

    Attributes:
        path: absolute path.
        patience_seconds: maximum wait for a lock of another process.
        checked: (identity of the file, number of its schema) of files with the tables of a store only.
    """

    path: str
    synchronous: Literal["full", "normal"]
    connect: Connect
    patience_seconds: float
    checked: set[tuple[tuple[int, int] | None, int]] = field(default_factory=set, repr=False, compare=False)

    def open(self) -> sqlite3.Connection:
        """Open a connection to write. Creates the file (mode 0600) if it is missing. Raises StoreError."""
        if sqlite3.sqlite_version_info < _NEEDED_SQLITE:
            raise permanent_error(
                f"SQLite {sqlite3.sqlite_version} is too old for {self.path}; use a Python with SQLite "
                "3.37 or newer"
            )
        self._refuse_orphan()
        try:
            self._create()
            db = self.connect(self._uri("rw"))
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise self.explain(error) from error
        return db

    @contextlib.contextmanager
    def open_to_read(self) -> Iterator[sqlite3.Connection | None]:
        """Open a connection to read; None for an empty file. Never creates the file. Raises StoreError."""
        with FORKS.prevent():
            yield from self._open_to_read()

    def _open_to_read(self) -> Iterator[sqlite3.Connection | None]:
        self._refuse_orphan()
        try:
            if not os.path.exists(self.path):
                raise permanent_error(
                    f"no such database: {self.path}; check the path, or run a pipeline with this store first"
                )
            db = self.connect(self._uri("ro"))
            try:
                try:
                    ready = self.retry_while_locked(lambda: self._is_ours(db))
                except sqlite3.OperationalError as error:
                    if _code(error) not in _NEEDS_RECOVERY:
                        raise
                    self.open().close()
                    ready = self.retry_while_locked(lambda: self._is_ours(db))
                yield db if ready else None
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise self.explain(error) from error

    def identity(self) -> tuple[int, int] | None:
        """Return the identity of the file, unlike that of a later file of this name; None without one."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def retry_while_locked(self, call: Callable[[], T]) -> T:
        """Repeat a call until no lock prevents it. Raises the sqlite3 error after ``patience_seconds``."""
        return retry(
            call, lambda error: _code(error) & 0xFF in _LOCK_ERRORS, self.patience_seconds, (0.002, 0.002)
        )

    def explain(self, error: Exception) -> StoreError:
        """Return an error of SQLite or of the file system as a StoreError that says how to fix it."""
        path, code = self.path, _code(error)
        kind = code & 0xFF
        if isinstance(error, StoreError):
            return error
        if kind in _LOCK_ERRORS:
            return StoreError(
                f"database is locked: another process has held {path} for {self.patience_seconds:g} s; "
                "end that process (a stopped one keeps its lock), then resume"
            )
        if kind == sqlite3.SQLITE_FULL:
            return StoreError(f"the disk is full: {path} cannot grow; free some space, then resume")
        if code in _NO_SPACE:
            return StoreError(
                f"the disk refused a write to {path}: it is full, over a quota or a size limit, or failing; "
                "free some space or replace the disk, then resume"
            )
        if kind == sqlite3.SQLITE_TOOBIG:
            return permanent_error(
                f"a payload is larger than a row of {path} can hold (10**9 bytes); pass blobs= to the "
                "store, then resume"
            )
        if kind == sqlite3.SQLITE_NOTADB:
            return permanent_error(
                f"{path} is not an SQLite database; use another path, or move that file away"
            )
        if kind == sqlite3.SQLITE_CORRUPT:
            return permanent_error(
                f"{path} is damaged ({error}); restore it from a backup, or recover it with "
                "the `.recover` command of the sqlite3 shell"
            )
        refused = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN)
        if kind in refused or isinstance(error, (PermissionError, FileNotFoundError)):
            return permanent_error(
                f"cannot open {path} to write ({error}); check its directory, and the permissions of both"
            )
        if is_fatal(error):
            return permanent_error(
                f"the disk of {path} failed ({error}): acknowledged commits are stored, no more are written; "
                "check the disk, then resume in a new process"
            )
        return StoreError(f"{path}: {error}")

    def _uri(self, mode: str) -> str:
        return f"{pathlib.Path(self.path).as_uri()}?mode={mode}"

    def _refuse_orphan(self) -> None:
        """Raise StoreError if the file is empty and its WAL is not: SQLite would delete the WAL."""
        wal = f"{self.path}-wal"
        # The WAL first: a process that creates this store writes the file before its WAL.
        if _size(wal) > _WAL_HEADER_BYTES and not _size(self.path):
            raise permanent_error(
                f"{self.path} is damaged: it is missing or empty, and {wal} holds commits; restore the file "
                "from a copy, or delete both to start with an empty store"
            )

    def _create(self) -> None:
        with _creating:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return
            os.close(descriptor)  # An empty file is an empty database; its WAL inherits the mode.

    def _prepare(self, db: sqlite3.Connection) -> None:
        # Check before anything is changed: it may be the file of another program.
        ready = self.retry_while_locked(lambda: self._is_ours(db))
        # This can be "locked" when processes open a new file together.
        (mode,) = self.retry_while_locked(lambda: db.execute("PRAGMA journal_mode=WAL").fetchone())
        if mode != "wal":
            raise permanent_error(
                f"{self.path} is on a file system without shared memory; use a path on a local disk"
            )
        db.execute(f"PRAGMA synchronous={self.synchronous}")
        if self.synchronous == "full":
            db.execute("PRAGMA fullfsync=1")  # On macOS an fsync alone leaves data in the drive's cache.
        db.execute("PRAGMA journal_size_limit=67108864")
        if not ready:
            self.retry_while_locked(lambda: db.execute("BEGIN IMMEDIATE"))
            if not self._is_ours(db):  # Another process may have been faster.
                for statement in _SCHEMA:
                    db.execute(statement)
            self.retry_while_locked(lambda: db.execute("COMMIT"))

    def _is_ours(self, db: sqlite3.Connection) -> bool:
        """Return True for a store, False for an empty database. Raises StoreError for any other one."""
        # In this order: a file that is created between the two checks must not look like one of another
        # program.
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application == _APPLICATION_ID:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA_VERSION:
                raise permanent_error(
                    f"{self.path} has format {version or '10 or older'}, and this release has format "
                    f"{SCHEMA_VERSION}; use the release that wrote it, or another path"
                )
            (cookie,) = db.execute("PRAGMA schema_version").fetchone()
            key = (self.identity(), cookie)
            if key not in self.checked:  # The check takes 0.2 ms, too long for each read.
                self._refuse_others(db)
                self.checked.add(key)
            return True
        if application or tables:
            raise permanent_error(
                f"{self.path} is an SQLite database of another program, not a stroma store; use another path"
            )
        return False

    def _refuse_others(self, db: sqlite3.Connection) -> None:
        """Raise StoreError for a file in which reading or writing a row can run code from another source."""
        for kind, name, _ in {*db.execute(_OBJECTS)} - _own_objects():
            raise permanent_error(
                f"{self.path} has a {kind} {name!r} that is not one of a stroma store; drop it if it is "
                "yours, or use another path"
            )
