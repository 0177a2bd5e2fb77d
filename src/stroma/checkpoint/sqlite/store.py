"""SQLiteStore: runs in one file, for one machine. The embedded default."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Literal, TypeVar

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads
from stroma.checkpoint.sqlite.connection import SqliteConnection
from stroma.checkpoint.sqlite.file import Connect, DatabaseFile, connect
from stroma.checkpoint.sqlite.rows import SqliteRows

__all__ = ["SQLiteStore"]

T = TypeVar("T")


class SQLiteStore(AsyncStates):
    """A journal store in one SQLite file on a local disk.

    Any number of processes, threads and event loops may use the file. What is acknowledged is on the disk: with
    ``synchronous="full"`` it survives a power cut; ``"normal"`` is faster and survives the death of the process, but
    a power cut may take the last commits. The file is made when it is first written to, readable by its owner only;
    its directory must exist.

    Async calls write through one thread that commits together what waits together; cancelling a caller does not undo
    what it asked for. Whatever the store cannot do is a StoreError that says how to mend it. A forked child opens the
    file anew. ``codec`` goes around every payload (see Codec), and what no codec wrote is
    refused, unless ``plain_until_migrated`` is set; payloads of ``blob_bytes`` or more go to ``blobs``: a
    directory, a URL that fsspec knows, or a BlobStore. Close it, or use it as a context manager, to fold the ``-wal`` file beside it into the database.
    """

    _thread_name = "stroma-sqlite"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["full", "normal"] = "full",
        codec: Codec | None = None,
        blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000,
        plain_until_migrated: bool = False,
        _connect: Connect = connect,
        _patience_seconds: float = 15.0,
    ) -> None:
        if synchronous not in ("full", "normal"):
            raise ValueError(f'synchronous is {synchronous!r}; give "full" or "normal"')
        name = os.fsdecode(path)
        if not name or name == ":memory:" or "\0" in name:
            raise ValueError(
                f"{name!r} names no file; give a path, or use AsyncInMemoryStore to keep nothing on disk"
            )
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self.path = os.path.abspath(name)
        self.address = f"sqlite:{os.path.realpath(name)}"
        self.synchronous = synchronous
        self._file = DatabaseFile(self.path, synchronous, _connect, _patience_seconds)

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r}, synchronous={self.synchronous!r})"

    def _named(self) -> str:
        return self.path

    def _connect(self) -> SqliteConnection:
        return SqliteConnection(self._file)

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        with self._file.reading() as db:
            if db is None:
                return nothing

            def once() -> T:
                db.execute("BEGIN")  # All that a query reads is of one moment.
                try:
                    return query(SqliteRows(db))
                finally:
                    db.execute("ROLLBACK")

            try:
                return self._file.patiently(once)
            except sqlite3.OperationalError as error:
                if "decode to UTF-8" not in str(error):
                    raise
                # A damaged text harms no other row. Not from the start: it takes three times as long.
                db.text_factory = lambda data: data.decode("utf-8", "replace")
                return self._file.patiently(once)

    def exists(self) -> bool:
        return self._file.identity() is not None
