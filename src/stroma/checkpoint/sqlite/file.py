"""The file of a SQLiteStore: made, opened, recognised as ours, and its errors put in words."""

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

from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.errors import StoreError

__all__ = ["SCHEMA_VERSION", "Connect", "DatabaseFile", "connect", "is_fatal"]

T = TypeVar("T")

#: Opens a connection for an URI that ends in ``?mode=rw`` or ``?mode=ro``.
Connect = Callable[[str], sqlite3.Connection]

_APPLICATION_ID: Final = 0x5374726D  # "Strm", in the header of the file
SCHEMA_VERSION: Final = 4  # what this release writes
_MIN_READER: Final = 4  # the oldest version that can read what this release writes
_NEEDED_SQLITE: Final = (3, 37, 0)  # the first one with STRICT tables

# STRICT: a column holds what it is declared to hold, or a write is refused.
# ``run`` is never used twice, so that a session of a deleted run cannot meet another one's rows.
# attempt_count and commit_count: rows that the last execution must have, counted in the transaction of each.
# Inputs stand apart from runs: every commit writes the row of its run, and an input can be large.
# Attempts: what tells an attempt from a repeated call for the same one is its start; a resumed run, and a group that
# is tried again, count attempts from 1. The order of the key is the order in which history is told.
# Steps: one committed output per position and branch. What else is kept of a run stands at positions below 0, of
# execution 0: what save() keeps at -1 (branch = node id), and what _rows.py names.
# Ids grow with each commit: the newest output of a node is the one with the highest.
# Cells: what is shared beside all runs. Deleted: runs that were deleted within the last day, and so did not get lost.
# The lease columns: every open_run bumps the epoch and writes its own owner and until when the run is its own.
# The indexes of runs go by columns that no commit changes, and `failed` by rows that few commits make.
_SCHEMA: Final = (
    "CREATE TABLE meta (k TEXT PRIMARY KEY, v TEXT NOT NULL) WITHOUT ROWID, STRICT",
    """CREATE TABLE runs (
        run INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL UNIQUE, pipeline TEXT NOT NULL,
        execution INTEGER NOT NULL, status TEXT NOT NULL, error TEXT,
        started_ms INTEGER NOT NULL CHECK (started_ms >= 0), updated_ms INTEGER NOT NULL,
        tokens INTEGER NOT NULL, cost_pico INTEGER NOT NULL, latency_ns INTEGER NOT NULL,
        lease_owner TEXT, lease_epoch INTEGER NOT NULL, lease_until_ms INTEGER,
        attempt_count INTEGER NOT NULL DEFAULT 0, commit_count INTEGER NOT NULL DEFAULT 0) STRICT""",
    "CREATE TABLE deleted (run INTEGER PRIMARY KEY, deleted_ms INTEGER NOT NULL) STRICT",
    "CREATE INDEX runs_by_start ON runs (started_ms, run)",
    """CREATE TABLE inputs (
        run INTEGER NOT NULL, execution INTEGER NOT NULL, contract TEXT NOT NULL, input BLOB NOT NULL,
        sha256 BLOB NOT NULL, PRIMARY KEY (run, execution)) STRICT""",
    """CREATE TABLE steps (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, execution INTEGER NOT NULL, position INTEGER NOT NULL,
        branch TEXT NOT NULL, node_id TEXT NOT NULL, epoch INTEGER NOT NULL, attempt INTEGER NOT NULL,
        started_ns INTEGER NOT NULL, contract TEXT NOT NULL, schema_ref TEXT NOT NULL,
        output BLOB NOT NULL, sha256 BLOB NOT NULL, call INTEGER, given BLOB, UNIQUE (run, execution, position, branch))
        STRICT""",
    """CREATE TABLE attempts (
        run INTEGER, execution INTEGER, epoch INTEGER, position INTEGER, started_ns INTEGER, branch TEXT, attempt INTEGER,
        node_id TEXT NOT NULL, duration_ns INTEGER NOT NULL, outcome TEXT NOT NULL, failure_class TEXT, message TEXT,
        reason TEXT, tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost_pico INTEGER NOT NULL, model TEXT,
        function_ns INTEGER NOT NULL, group_id TEXT, identity TEXT, error_type TEXT,
        PRIMARY KEY (run, execution, epoch, position, started_ns, branch, attempt)) WITHOUT ROWID, STRICT""",
    "CREATE INDEX wanted ON steps (run) WHERE position = -3",
    "CREATE TABLE cells (name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT",
    """CREATE TABLE tags (run INTEGER NOT NULL, tag TEXT NOT NULL, started_ms INTEGER NOT NULL,
        PRIMARY KEY (run, tag)) WITHOUT ROWID, STRICT""",
    "CREATE INDEX tags_by_start ON tags (tag, started_ms, run)",
    "CREATE INDEX runs_by_pipeline ON runs (pipeline, started_ms, run)",
    "CREATE INDEX runs_by_status ON runs (status, started_ms, run)",
    """CREATE INDEX failed ON attempts (run, execution, started_ns + duration_ns)
        WHERE failure_class IS NOT NULL""",
    "CREATE INDEX called ON attempts (run, execution, identity, position) WHERE identity IS NOT NULL",
    f"INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}'), ('min_reader', '{_MIN_READER}')",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)  # fmt: skip

#: What makes a file of a format into one of the next.
_MIGRATIONS: Final[dict[int, tuple[str, ...]]] = {}

# What a file that somebody else made can run or hold: a trigger, a view (which may never end) or a computed column.
_PROGRAMS: Final = "SELECT type, name FROM sqlite_master WHERE type IN ('view', 'trigger') LIMIT 1"
_NOT_PLAIN: Final = """SELECT t.name FROM pragma_table_list t JOIN sqlite_master m ON m.name = t.name
    WHERE t.schema = 'main' AND m.type = 'table' AND m.name NOT LIKE 'sqlite!_%' ESCAPE '!' AND (t.type <> 'table'
    OR NOT t.strict OR EXISTS (SELECT 1 FROM pragma_table_xinfo(t.name) c WHERE c.hidden <> 0)) LIMIT 1"""

_WAL_HEADER_BYTES: Final = 32
_WAITING: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# Errors of input and output after which a rollback is all that is needed: something found no room.
_NO_ROOM: Final = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_NOMEM,
)
# Whoever made the file, or wrote to it last, died on the way: only a connection that may write can put that right.
_HALF_DONE: Final = (sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY)
# fcntl locks of a process go when it closes *any* descriptor of the file: the one that makes the file must be closed
# before another thread has a connection to it.
_creating = threading.Lock()


def _after_fork() -> None:
    global _creating
    _creating = threading.Lock()  # The parent may have held it.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


def _size(path: str) -> int:
    """Return how many bytes a file has; 0 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def connect(uri: str) -> sqlite3.Connection:
    """The connection that stores use. Transactions are begun and ended by hand."""
    # timeout=0: SQLite's own waiting starves writers; DatabaseFile.patiently() is fair.
    db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
    db.execute("PRAGMA trusted_schema=0")
    return db


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", None) or 0


def is_fatal(error: BaseException) -> bool:
    """Return True if no write to the file can be trusted any more, such as after a failed fsync.

    The kernel may have dropped what it could not write, and the next fsync would succeed all the same.
    """
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR and _code(error) not in _NO_ROOM


@dataclass(frozen=True, slots=True)
class DatabaseFile:
    """The database file of a store, and its opening.

    Attributes:
        path: absolute.
        patience_seconds: how long to wait for a lock that others hold.
        plain: files, with the number of their schema, that hold no programs.
    """

    path: str
    synchronous: Literal["full", "normal"]
    connect: Connect
    patience_seconds: float
    plain: set[tuple[tuple[int, int] | None, int]] = field(default_factory=set, repr=False, compare=False)

    def open(self) -> sqlite3.Connection:
        """A connection to write with; the file is made (mode 0600) if need be. Raises StoreError."""
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
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection to read with, None while the file is empty. Never makes a file. Raises StoreError."""
        self._refuse_orphan()
        try:
            if not os.path.exists(self.path):
                raise permanent_error(
                    f"no such database: {self.path}; check the path, or run a pipeline with this store first"
                )
            db = self.connect(self._uri("ro"))
            try:
                try:
                    ready = self.patiently(lambda: self._is_ours(db))
                except sqlite3.OperationalError as error:
                    if _code(error) not in _HALF_DONE:
                        raise
                    self.open().close()
                    ready = self.patiently(lambda: self._is_ours(db))
                if ready and self._version(db) < SCHEMA_VERSION:
                    self.open().close()
                yield db if ready else None
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise self.explain(error) from error

    def identity(self) -> tuple[int, int] | None:
        """Return the identity of the file, to tell it from another file of the same name; None if it does not exist."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def patiently(self, call: Callable[[], T]) -> T:
        """Call until no lock is in the way. Raises the sqlite3 error once the patience is at its end."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                return call()
            except sqlite3.OperationalError as error:
                if _code(error) & 0xFF not in _WAITING or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.0001, 0.002))

    def explain(self, error: Exception) -> StoreError:
        """An error of SQLite or of the file system as a StoreError that says what to do."""
        path, code = self.path, _code(error)
        kind = code & 0xFF
        if isinstance(error, StoreError):
            return error
        if kind in _WAITING:
            return StoreError(
                f"database is locked: another process has held {path} for {self.patience_seconds:g} s; "
                "end that process (a stopped one keeps its lock), then resume"
            )
        if kind == sqlite3.SQLITE_FULL:
            return StoreError(f"the disk is full: {path} cannot grow; free some space, then resume")
        if code in _NO_ROOM:
            return StoreError(
                f"the disk refused a write to {path}: it is full, over a quota or a size limit, or failing; "
                "make room or mend it, then resume"
            )
        if kind == sqlite3.SQLITE_TOOBIG:
            return permanent_error(
                f"a payload is larger than {path} can hold in a row (a thousand million bytes); give the store blobs=, then "
                "resume"
            )
        if kind == sqlite3.SQLITE_NOTADB:
            return permanent_error(
                f"{path} is not a SQLite database; give another path, or move that file away"
            )
        if kind == sqlite3.SQLITE_CORRUPT:
            return permanent_error(
                f"{path} is damaged ({error}); restore it from a backup, or save what can be saved with "
                "the `.recover` command of the sqlite3 shell"
            )
        if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM) or isinstance(error, PermissionError):
            return permanent_error(
                f"{path} may not be written ({error}); check its permissions and those of its directory"
            )
        if isinstance(error, FileNotFoundError):
            return permanent_error(
                f"there is no directory {os.path.dirname(path)}; create it, or give another path"
            )
        if kind == sqlite3.SQLITE_CANTOPEN:
            return permanent_error(
                f"cannot open {path} ({error}); check its permissions and those of its directory"
            )
        if is_fatal(error):
            return permanent_error(
                f"the disk failed under {path} ({error}): what was acknowledged before is kept, nothing more is written; "
                "check the disk, then resume in a new process"
            )
        return StoreError(f"{path}: {error}")

    def _uri(self, mode: str) -> str:
        return f"{pathlib.Path(self.path).as_uri()}?mode={mode}"

    def _refuse_orphan(self) -> None:
        """Raise StoreError if the file is missing or empty and its WAL is not: SQLite would delete that, and begin anew."""
        wal = f"{self.path}-wal"
        if _size(self.path) or _size(wal) <= _WAL_HEADER_BYTES:
            return
        # The file is written before its WAL, so this is no store that another process is making. But that process may
        # have been faster than the two looks.
        if not _size(self.path) and _size(wal) > _WAL_HEADER_BYTES:
            raise permanent_error(
                f"{self.path} is damaged: it is missing or empty, and {wal} beside it holds commits; restore the file "
                "from a copy, or delete both to begin anew"
            )

    def _create(self) -> None:
        with _creating:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return
            os.close(descriptor)  # An empty file is an empty database; the files beside it inherit its mode.

    def _prepare(self, db: sqlite3.Connection) -> None:
        # Look before anything is changed: it may be somebody else's file.
        ready = self.patiently(lambda: self._is_ours(db))
        # This can be "locked" when processes open a new file together.
        (mode,) = self.patiently(lambda: db.execute("PRAGMA journal_mode=WAL").fetchone())
        if mode != "wal":
            raise permanent_error(
                f"{self.path} is on a file system without shared memory; put it on a local disk"
            )
        db.execute(f"PRAGMA synchronous={self.synchronous}")
        if self.synchronous == "full":
            db.execute("PRAGMA fullfsync=1")  # On macOS an fsync alone leaves data in the drive's cache.
        db.execute("PRAGMA journal_size_limit=67108864")
        if not ready:
            self.patiently(lambda: db.execute("BEGIN IMMEDIATE"))
            if not self._is_ours(db):  # Another process may have been faster.
                for statement in _SCHEMA:
                    db.execute(statement)
            self.patiently(lambda: db.execute("COMMIT"))
        elif self._version(db) < SCHEMA_VERSION:
            self._migrate(db)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring an older file up to date, in one transaction; what is in it stays."""
        self.patiently(lambda: db.execute("BEGIN IMMEDIATE"))
        for version in range(self._version(db), SCHEMA_VERSION):  # Another process may have been faster.
            if version not in _MIGRATIONS:
                raise permanent_error(
                    f"{self.path} has format {version}, which no release wrote and this one does not read; give another path"
                )
            for statement in _MIGRATIONS[version]:
                db.execute(statement)
        numbers = (("schema_version", str(SCHEMA_VERSION)), ("min_reader", str(_MIN_READER)))
        values = [(number, key, number) for key, number in numbers]
        db.executemany(
            "UPDATE meta SET v = ? WHERE k = ? AND CAST(v AS INTEGER) < CAST(? AS INTEGER)", values
        )
        self.patiently(lambda: db.execute("COMMIT"))

    @staticmethod
    def _version(db: sqlite3.Connection) -> int:
        rows = db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchall()
        return int(rows[0][0]) if rows and str(rows[0][0]).isdecimal() else 1

    def _is_ours(self, db: sqlite3.Connection) -> bool:
        """False for an empty database. Raises StoreError for one that is not a store, or is too new for us."""
        # In this order: were the file made between the two looks, it must not seem to be somebody else's.
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application == _APPLICATION_ID:
            (cookie,) = db.execute("PRAGMA schema_version").fetchone()
            seen = (self.identity(), cookie)
            if seen not in self.plain:  # 0.2 ms, for each reading call.
                self._refuse_programs(db)
                self.plain.add(seen)
            rows = db.execute("SELECT v FROM meta WHERE k = 'min_reader'").fetchall()
            if not rows or not str(rows[0][0]).isdecimal():
                raise permanent_error(
                    f"{self.path} is damaged: it does not say its format; restore it from a backup"
                )
            needed = int(rows[0][0])
            if needed > SCHEMA_VERSION:
                raise permanent_error(
                    f"{self.path} was written by a newer stroma (its format is {needed}, this one reads up to "
                    f"{SCHEMA_VERSION}); upgrade stroma, or give another path"
                )
            return True
        if application or tables:
            raise permanent_error(
                f"{self.path} is a SQLite database of another program, not a stroma store; give another path"
            )
        return False

    def _refuse_programs(self, db: sqlite3.Connection) -> None:
        """Raise StoreError for a file in which reading or writing a row can run what somebody else put there."""
        for kind, name in db.execute(_PROGRAMS):
            raise permanent_error(
                f"{self.path} has a {kind} {name!r}, which a stroma store never has; drop it if it is yours, or give "
                "another path"
            )
        for (name,) in db.execute(_NOT_PLAIN):
            raise permanent_error(
                f"{self.path} has a table {name!r} that is not a plain STRICT table, as all of a stroma store are; drop it "
                "if it is yours, or give another path"
            )
