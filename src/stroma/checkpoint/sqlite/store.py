"""SQLiteStore: runs in one file, for one machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Literal, TypeVar

from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.payloads import BlobStore, Codec, Payloads
from stroma.checkpoint.sqlite.connection import SqliteConnection, SqliteRows
from stroma.checkpoint.sqlite.file import Connect, DatabaseFile, connect

T = TypeVar("T")


class SQLiteStore(AsyncStates):
    """A journal store in one SQLite file on a local disk.

    Any number of processes, threads and event loops may use the file. Acknowledged data is on the disk: with
    ``synchronous="full"`` it survives a power failure; ``"normal"`` is faster and survives the death of the
    process, but a power failure may lose the last commits. The file is created by the first write, readable
    by its owner only; its directory must exist, else making the store raises StoreError.

    Async calls write through one thread that commits queued operations together; cancelling a caller does not
    undo its operation. Errors are StoreErrors that say how to fix them. A forked child opens the file again;
    a fork waits for the end of the present operation. ``run_sync``, ``close`` and ``merge_log`` merge the
    ``-wal`` file into the database.

    Args:
        path: path of the file.
        synchronous: "full" survives a power failure; "normal" is faster and may lose the last commits in one.
        codec: codec that encodes every payload, see Codec. Payloads that no codec wrote are refused.
        blobs: where large payloads are stored: a directory, a URL that fsspec supports, or a BlobStore.
        blob_bytes: size of a payload from which on it is stored in ``blobs``.
        plain_until_migrated: read payloads that no codec wrote, until all are migrated.
    """

    _thread_name = "stroma-sqlite"
    _needs_directory = True
    #: Tests put faults here.
    _open_file: Connect = staticmethod(connect)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["full", "normal"] = "full",
        codec: Codec | None = None,
        blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000,
        plain_until_migrated: bool = False,
    ) -> None:
        if synchronous not in ("full", "normal"):
            raise ValueError(f'synchronous must be "full" or "normal", got {synchronous!r}')
        name = os.fsdecode(path)
        if not name or name == ":memory:" or "\0" in name:
            raise ValueError(
                f"path must name a file, got {name!r}; use AsyncInMemoryStore to store nothing on disk"
            )
        super().__init__(Payloads(codec, blobs, blob_bytes, plain_until_migrated))
        self.path = os.path.abspath(name)
        if self._needs_directory:
            _require_directory(self.path)
        self.address = f"sqlite:{os.path.realpath(name)}"
        self.synchronous = synchronous
        self._file = DatabaseFile(self.path, synchronous, self._open_file, self._patience_seconds)

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r}, synchronous={self.synchronous!r})"

    def _display_name(self) -> str:
        return self.path

    def _connect(self) -> SqliteConnection:
        return SqliteConnection(self._file)

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        with self._file.open_to_read() as db:
            if db is None:
                return nothing

            def once() -> T:
                db.execute("BEGIN")  # A query reads one snapshot.
                try:
                    return query(SqliteRows(db))
                finally:
                    db.execute("ROLLBACK")

            return self._file.retry_while_locked(once)

    async def merge_log(self) -> None:
        """Merge the ``-wal`` file into the database: a copy of that alone has every run. Raises StoreError.

        Pages that a reader still needs stay in the ``-wal`` file.
        """
        if self.exists():
            await self._submit(lambda rows: rows.merge_log())

    def exists(self) -> bool:
        return self._file.identity() is not None


def _require_directory(path: str) -> None:
    """Raise StoreError if the directory of a file is missing."""
    directory = os.path.dirname(path)
    try:
        is_missing = not stat.S_ISDIR(os.stat(directory).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_missing = True
    except OSError:  # It may exist.
        is_missing = False
    if is_missing:
        raise permanent_error(f"there is no directory {directory}; create it, or use another path")
