"""The database file of an SQLiteStore: creation, opening, validation, and error messages."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from stroma.checkpoint.durable.rows import Annotation
from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sqlite.forks import FORKS

__all__ = ["SCHEMA_VERSION", "Connect", "DatabaseFile", "connect", "is_fatal"]

T = TypeVar("T")

#: Opens a connection for a URI that ends in ``?mode=rw`` or ``?mode=ro``.
Connect = Callable[[str], sqlite3.Connection]

_APPLICATION_ID: Final = 0x5374726D  # "Strm", in the header of the file
SCHEMA_VERSION: Final = 7  # what this release writes
_MIN_READER: Final = 7  # the oldest version that can read what this release writes
_NEEDED_SQLITE: Final = (3, 37, 0)  # the first one with STRICT tables

# STRICT: SQLite refuses values of another type than the column's. ``run`` is never reused, so that a session
# of a deleted run cannot reach the rows of another one. attempt_count and commit_count: rows that the last
# execution must have, counted in the transaction of each. Inputs are separate from runs: every commit writes
# the row of its run, and an input can be large. Attempts: the start distinguishes attempts of one number; a
# resumed run, and a retried group, count from 1. The order of the key is the order of the history. Steps: one
# committed output per position and branch. Annotations of a run have positions below 0 and execution 0, see
# durable/rows.py. Ids grow with each commit: the newest output of a node has the highest. Cells: shared by
# all runs. Deleted: runs that were deleted within the last day, to distinguish them from lost runs. The lease
# columns: every open_run increments the epoch and writes its owner and the end of its lease.
# wake_ms: from when on a worker continues a run that stopped or is queued; every opening deletes it.
# claim: the worker that is about to open the run, until claim_until_ms by the clock of leases.
# blocked and the columns after it: the mark of a blocked run; every opening and every end deletes it.
# Events: batches of events of sessions, in the order of their key; ids grow with time.
# The indexes of runs use columns that no commit changes, and `failed` contains rows that few commits write.
_SCHEMA: Final = (
    "CREATE TABLE meta (k TEXT PRIMARY KEY, v TEXT NOT NULL) WITHOUT ROWID, STRICT",
    """CREATE TABLE runs (
        run INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL UNIQUE, pipeline TEXT NOT NULL,
        execution INTEGER NOT NULL, status TEXT NOT NULL, error TEXT,
        started_ms INTEGER NOT NULL CHECK (started_ms >= 0), updated_ms INTEGER NOT NULL,
        tokens INTEGER NOT NULL, cost_pico INTEGER NOT NULL, latency_ns INTEGER NOT NULL,
        lease_owner TEXT, lease_epoch INTEGER NOT NULL, lease_until_ms INTEGER,
        attempt_count INTEGER NOT NULL DEFAULT 0, commit_count INTEGER NOT NULL DEFAULT 0, wake_ms INTEGER,
        priority INTEGER NOT NULL DEFAULT 0, queue_key TEXT, expires_ms INTEGER, claim TEXT, claim_until_ms INTEGER,
        version TEXT NOT NULL DEFAULT '', blocked TEXT, blocked_since_ms INTEGER, blocked_until_ms INTEGER,
        blocked_codes TEXT) STRICT""",
    "CREATE TABLE deleted (run INTEGER PRIMARY KEY, deleted_ms INTEGER NOT NULL) STRICT",
    "CREATE INDEX runs_by_start ON runs (started_ms, run)",
    """CREATE TABLE inputs (
        run INTEGER NOT NULL, execution INTEGER NOT NULL, contract TEXT NOT NULL, input BLOB NOT NULL,
        sha256 BLOB NOT NULL, PRIMARY KEY (run, execution)) STRICT""",
    """CREATE TABLE steps (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, execution INTEGER NOT NULL, position INTEGER NOT NULL,
        branch TEXT NOT NULL, node_id TEXT NOT NULL, epoch INTEGER NOT NULL, attempt INTEGER NOT NULL,
        started_ns INTEGER NOT NULL, contract TEXT NOT NULL, schema_ref TEXT NOT NULL,
        output BLOB NOT NULL, sha256 BLOB NOT NULL, number INTEGER, input_key BLOB, UNIQUE (run, execution, position, branch))
        STRICT""",
    """CREATE TABLE attempts (
        run INTEGER, execution INTEGER, epoch INTEGER, position INTEGER, started_ns INTEGER, branch TEXT, attempt INTEGER,
        node_id TEXT NOT NULL, duration_ns INTEGER NOT NULL, outcome TEXT NOT NULL, failure_class TEXT, message TEXT,
        reason TEXT, tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost_pico INTEGER NOT NULL, model TEXT,
        function_ns INTEGER NOT NULL, group_id TEXT, identity TEXT, error_type TEXT,
        PRIMARY KEY (run, execution, epoch, position, started_ns, branch, attempt)) WITHOUT ROWID, STRICT""",
    f"CREATE INDEX requests ON steps (run) WHERE position = {Annotation.REQUEST}",
    "CREATE TABLE cells (name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, execution INTEGER NOT NULL, epoch INTEGER NOT NULL,
        last INTEGER NOT NULL, written_ms INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE (run, epoch, last)) STRICT""",
    """CREATE TABLE tags (run INTEGER NOT NULL, tag TEXT NOT NULL, started_ms INTEGER NOT NULL,
        PRIMARY KEY (run, tag)) WITHOUT ROWID, STRICT""",
    "CREATE INDEX tags_by_start ON tags (tag, started_ms, run)",
    "CREATE INDEX runs_by_pipeline ON runs (pipeline, started_ms, run)",
    "CREATE INDEX runs_by_status ON runs (status, started_ms, run)",
    """CREATE INDEX runs_by_wake ON runs (pipeline, wake_ms, version)
        WHERE status IN ('SUSPENDED', 'INTERRUPTED') AND blocked_since_ms IS NULL""",
    """CREATE INDEX runs_by_queue ON runs (pipeline, priority, wake_ms, run, version)
        WHERE status = 'QUEUED' AND queue_key IS NULL AND blocked_since_ms IS NULL""",
    """CREATE INDEX runs_by_key ON runs (pipeline, queue_key, priority, wake_ms, run, version)
        WHERE status = 'QUEUED' AND queue_key IS NOT NULL AND blocked_since_ms IS NULL""",
    """CREATE INDEX runs_by_block ON runs (pipeline, blocked_since_ms, version)
        WHERE blocked_since_ms IS NOT NULL""",
    "CREATE INDEX runs_by_claim ON runs (pipeline, claim_until_ms) WHERE claim_until_ms IS NOT NULL",
    """CREATE INDEX failed ON attempts (run, execution, started_ns + duration_ns)
        WHERE failure_class IS NOT NULL""",
    "CREATE INDEX called ON attempts (run, execution, identity, position) WHERE identity IS NOT NULL",
    f"INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}'), ('min_reader', '{_MIN_READER}')",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)

#: Statements that upgrade a file from each format to the next one.
_MIGRATIONS: Final[dict[int, tuple[str, ...]]] = {}

# Code that a file from another source may contain: a trigger, a view (which may never end) or a computed
# column.
_CODE: Final = "SELECT type, name FROM sqlite_master WHERE type IN ('view', 'trigger') LIMIT 1"
_NOT_PLAIN: Final = """SELECT t.name FROM pragma_table_list t JOIN sqlite_master m ON m.name = t.name
    WHERE t.schema = 'main' AND m.type = 'table' AND m.name NOT LIKE 'sqlite!_%' ESCAPE '!' AND (t.type <> 'table'
    OR NOT t.strict OR EXISTS (SELECT 1 FROM pragma_table_xinfo(t.name) c WHERE c.hidden <> 0)) LIMIT 1"""

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
_creating = threading.Lock()


def _after_fork() -> None:
    global _creating
    _creating = threading.Lock()  # The parent may have held it.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


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
    db.text_factory = _decode_text
    db.execute("PRAGMA trusted_schema=0")
    return db


def _decode_text(data: bytes) -> str | bytes:
    """Return a text; a damaged one as bytes, so that only its row is damaged, and not the list that has it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", None) or 0


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
        checked: (identity of the file, number of its schema) of files that contain no code.
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
                f"SQLite {sqlite3.sqlite_version} is too old for {self.path}; use a Python with SQLite 3.37 or newer"
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
        """Open a connection to read; None while the file is empty. Never creates the file. Raises StoreError."""
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
                if ready and self._version(db) < SCHEMA_VERSION:
                    self.open().close()
                yield db if ready else None
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise self.explain(error) from error

    def identity(self) -> tuple[int, int] | None:
        """Return the identity of the file, which differs from a later file of the same name; None if it does not exist."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def retry_while_locked(self, call: Callable[[], T]) -> T:
        """Repeat a call until no lock prevents it. Raises the sqlite3 error after ``patience_seconds``."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                return call()
            except sqlite3.OperationalError as error:
                if _code(error) & 0xFF not in _LOCK_ERRORS or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.0001, 0.002))

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
                f"a payload is larger than a row of {path} can hold (10**9 bytes); pass blobs= to the store, then resume"
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
        if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM) or isinstance(error, PermissionError):
            return permanent_error(
                f"cannot write to {path} ({error}); check its permissions and those of its directory"
            )
        if isinstance(error, FileNotFoundError):
            return permanent_error(
                f"there is no directory {os.path.dirname(path)}; create it, or use another path"
            )
        if kind == sqlite3.SQLITE_CANTOPEN:
            return permanent_error(
                f"cannot open {path} ({error}); check its permissions and those of its directory"
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
        """Raise StoreError if the file is missing or empty and its WAL is not: SQLite would delete the WAL."""
        wal = f"{self.path}-wal"
        if _size(self.path) or _size(wal) <= _WAL_HEADER_BYTES:
            return
        # The file is written before its WAL, so no other process is creating this store. But one may have
        # finished between the two checks, so check again.
        if not _size(self.path) and _size(wal) > _WAL_HEADER_BYTES:
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
        elif self._version(db) < SCHEMA_VERSION:
            self._migrate(db)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Upgrade an older file in one transaction, without loss of data."""
        self.retry_while_locked(lambda: db.execute("BEGIN IMMEDIATE"))
        for version in range(self._version(db), SCHEMA_VERSION):  # Another process may have been faster.
            if version not in _MIGRATIONS:
                raise permanent_error(
                    f"{self.path} has format {version}, which this release cannot read; use another path"
                )
            for statement in _MIGRATIONS[version]:
                db.execute(statement)
        numbers = (("schema_version", str(SCHEMA_VERSION)), ("min_reader", str(_MIN_READER)))
        values = [(number, key, number) for key, number in numbers]
        db.executemany(
            "UPDATE meta SET v = ? WHERE k = ? AND CAST(v AS INTEGER) < CAST(? AS INTEGER)", values
        )
        self.retry_while_locked(lambda: db.execute("COMMIT"))

    @staticmethod
    def _version(db: sqlite3.Connection) -> int:
        rows = db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchall()
        return int(rows[0][0]) if rows and str(rows[0][0]).isdecimal() else 1

    def _is_ours(self, db: sqlite3.Connection) -> bool:
        """Return True for a store, False for an empty database. Raises StoreError for any other one, or a newer format."""
        # In this order: a file that is created between the two checks must not look like one of another
        # program.
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application == _APPLICATION_ID:
            (cookie,) = db.execute("PRAGMA schema_version").fetchone()
            version = (self.identity(), cookie)
            if version not in self.checked:  # The check takes 0.2 ms, too long for each read.
                self._refuse_code(db)
                self.checked.add(version)
            rows = db.execute("SELECT v FROM meta WHERE k = 'min_reader'").fetchall()
            if not rows or not str(rows[0][0]).isdecimal():
                raise permanent_error(
                    f"{self.path} is damaged: its format is missing; restore it from a backup"
                )
            needed = int(rows[0][0])
            if needed > SCHEMA_VERSION:
                raise permanent_error(
                    f"{self.path} was written by a newer stroma (its format is {needed}, this one reads up to "
                    f"{SCHEMA_VERSION}); upgrade stroma, or use another path"
                )
            return True
        if application or tables:
            raise permanent_error(
                f"{self.path} is an SQLite database of another program, not a stroma store; use another path"
            )
        return False

    def _refuse_code(self, db: sqlite3.Connection) -> None:
        """Raise StoreError for a file in which reading or writing a row can run code from another source."""
        for kind, name in db.execute(_CODE):
            raise permanent_error(
                f"{self.path} has a {kind} {name!r}, which a stroma store never has; drop it if it is yours, or use "
                "another path"
            )
        for (name,) in db.execute(_NOT_PLAIN):
            raise permanent_error(
                f"{self.path} has a table {name!r} that is not a plain STRICT table, unlike those of a stroma store; drop it "
                "if it is yours, or use another path"
            )
