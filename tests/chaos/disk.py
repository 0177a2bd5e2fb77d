"""A disk whose power can fail: SQLite over a VFS that remembers every write and what was synced when.

The files themselves are real, and other connections see them as ever. Afterwards :func:`survives` tells what
a disk may hold that lost its power at any moment of the record:

* what was synced is there;
* of what was written since, each sector of 512 bytes has any of the contents it had since, or, if the file
  grew by it, nothing or garbage: so writes are lost, torn, and done in another order;
* a file has any of the lengths it had since;
* names appear and vanish with a sync of the directory, or before.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw

SECTOR: Final = 512
_NAME: Final = "stroma-recorded"


@dataclass(frozen=True, slots=True)
class Write:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    file: int
    directory: bool  # SQLite syncs the directory with a journal or WAL that is new


@dataclass(frozen=True, slots=True)
class FailedSync:
    """The kernel says so once, and may drop what it could not write. ``final``: it was that of a commit."""

    file: int
    final: bool


@dataclass(frozen=True, slots=True)
class Name:
    """From now on this name is that file, or none."""

    name: str
    file: int | None
    directory: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """What the test wants to find in the record."""

    what: Any


Event = Write | Truncate | Sync | FailedSync | Name | Mark


@dataclass
class Disk:
    """The record of one folder. Its connections are made by :meth:`connect`, which fits SQLiteStore's
    ``_open_file``.

    Attributes:
        pragmas: said to each connection before anything else.
        fail_sync: asked at each sync, with the name of the file; True makes it fail.
    """

    folder: Path
    pragmas: Sequence[str] = ()
    fail_sync: Callable[[str], bool] = lambda _: False
    events: list[Event] = field(default_factory=list)
    #: Whether the last sync that failed was part of a checkpoint: SQLite makes that again, and does not
    #: mention it.
    unmentioned: bool = False
    #: Whether the store is opening its file: what fails then may be tried again.
    making: bool = False
    #: The file that each name stands for now, and the number of files so far.
    names: dict[str, int] = field(default_factory=dict)
    files: int = 0

    def connect(self, uri: str) -> Any:
        _vfs()
        mode = apsw.SQLITE_OPEN_READONLY if uri.endswith("mode=ro") else apsw.SQLITE_OPEN_READWRITE
        with _raising():
            db = apsw.Connection(uri, flags=mode | apsw.SQLITE_OPEN_URI, vfs=_NAME)
        adapted = Adapted(db, self)
        for pragma in ("PRAGMA trusted_schema=0", *self.pragmas):
            adapted.execute(pragma)
        return adapted

    def mark(self, what: Any) -> None:
        self.events.append(Mark(what))

    def opened(self, path: str) -> tuple[int, bool]:
        """The number of a file, and whether it is new."""
        name = os.path.basename(path)
        if name in self.names:
            return self.names[name], False
        self.files += 1
        self.names[name] = self.files
        self.events.append(Name(name, self.files))
        return self.files, True

    def deleted(self, path: str, directory: bool) -> None:
        name = os.path.basename(path)
        self.names.pop(name, None)
        self.events.append(Name(name, None, directory))

    def __enter__(self) -> Disk:
        with _lock:
            _disks[str(self.folder)] = self
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            del _disks[str(self.folder)]


_disks: dict[str, Disk] = {}
_lock = threading.Lock()
_made: list[apsw.VFS] = []


def _disk_of(path: str) -> Disk | None:
    return _disks.get(os.path.dirname(path))


def _vfs() -> None:
    with _lock:
        if not _made:
            _made.append(_RecordingVFS())


class _RecordingVFS(apsw.VFS):
    def __init__(self) -> None:
        self.base = ""
        super().__init__(_NAME, self.base)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        disk = None if path is None else _disk_of(path)
        if disk is None:
            return super().xOpen(name, flags)
        return _RecordingFile(disk, path, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        disk = _disk_of(filename)
        if disk is not None:
            disk.deleted(filename, syncdir)


class _RecordingFile(apsw.VFSFile):
    def __init__(self, disk: Disk, path: str, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        journal = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL
        self.disk = disk
        self.name = os.path.basename(path)
        self.number, new = disk.opened(path)
        self.syncs_directory = new and bool(flags[0] & journal)
        self.is_wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        self.dirty = False

    def xWrite(self, data: Any, offset: int) -> None:
        self.disk.events.append(Write(self.number, offset, bytes(data)))
        self.dirty = True
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        self.disk.events.append(Truncate(self.number, newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        if self.disk.fail_sync(self.name):
            # A checkpoint syncs the WAL, which a commit has synced already, and then the database.
            commit = self.is_wal and self.dirty
            self.disk.unmentioned = not commit
            self.disk.events.append(FailedSync(self.number, commit and not self.disk.making))
            raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)
        super().xSync(flags)
        self.disk.events.append(Sync(self.number, self.syncs_directory))
        self.syncs_directory = self.dirty = False


class _File:
    def __init__(self) -> None:
        self.synced = bytearray()  # what is on the disk for sure
        self.seen = bytearray()  # what a process would read
        self.since: dict[int, list[bytes]] = defaultdict(list)  # by sector
        self.sizes: list[int] = []

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if len(self.seen) < end:
            self.seen.extend(bytes(end - len(self.seen)))
            self.sizes.append(end)
        self.seen[offset:end] = data
        for sector in range(offset // SECTOR, (end - 1) // SECTOR + 1):
            self.since[sector].append(bytes(self.seen[sector * SECTOR : (sector + 1) * SECTOR]))

    def truncate(self, size: int) -> None:
        if size < len(self.seen):
            del self.seen[size:]
        else:
            self.seen.extend(bytes(size - len(self.seen)))
        self.sizes.append(size)

    def sync(self) -> None:
        # What an earlier sync failed to write, and nobody has written since, is not written by this one.
        del self.synced[min(self.sizes, default=len(self.synced)) :]
        self.synced.extend(bytes(len(self.seen) - len(self.synced)))
        for sector in self.since:
            start, end = sector * SECTOR, (sector + 1) * SECTOR
            self.synced[start:end] = self.seen[start:end]
        self.since.clear()
        self.sizes.clear()

    def fail(self, draw: random.Random) -> None:
        """What could not be written is dropped, or some of it; what is read stays as it was."""
        if draw.random() < 0.7:
            self.synced = self.survives(draw)
            self.since.clear()
            self.sizes.clear()

    def survives(self, draw: random.Random) -> bytearray:
        entries = bytearray(self.synced)
        # All, nothing, or each by itself: a coin for each would seldom lose a whole write.
        share = draw.choice((0.0, 1.0, draw.random(), draw.random()))
        size = draw.choice([len(self.synced), *self.sizes[-20:]])
        for sector, contents in self.since.items():
            start = sector * SECTOR
            if draw.random() >= share:
                continue
            data = contents[-1] if draw.random() < 0.7 else draw.choice(contents)
            if start >= len(self.synced) and draw.random() < 0.1:
                data = draw.randbytes(SECTOR)
            if len(entries) < start + len(data):
                entries.extend(bytes(start + len(data) - len(entries)))
            entries[start : start + len(data)] = data
        if size < len(entries):
            del entries[size:]
        else:
            entries.extend(bytes(size - len(entries)))
        return entries


def survives(
    events: Sequence[Event], cuts: Sequence[int], draw: random.Random
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """What a disk may hold after the power failed before the event of each number, by file name, in order."""
    files: dict[int, _File] = defaultdict(_File)
    names: dict[str, list[int | None]] = defaultdict(lambda: [None])  # as synced, then since
    wanted = sorted(cuts)
    at = 0
    for number, event in enumerate((*events, Mark(None))):
        while at < len(wanted) and wanted[at] == number:
            image = {}
            for name, numbers in names.items():
                file = draw.choice(numbers)
                if file is not None:
                    image[name] = bytes(files[file].survives(draw))
            yield number, image
            at += 1
        if isinstance(event, Write):
            files[event.file].write(event.offset, event.data)
        elif isinstance(event, Truncate):
            files[event.file].truncate(event.size)
        elif isinstance(event, FailedSync):
            files[event.file].fail(draw)
        elif isinstance(event, Name):
            names[event.name].append(event.file)
        elif isinstance(event, Sync):
            files[event.file].sync()
        if isinstance(event, (Sync, Name)) and event.directory:
            for name, numbers in names.items():
                names[name] = numbers[-1:]


class _Rows:
    """What sqlite3 calls a cursor: everything is read at once."""

    def __init__(self, rows: list[Any], rowcount: int, lastrowid: int) -> None:
        self.rowcount = rowcount
        self.lastrowid = lastrowid
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


class _raising:
    """apsw's errors as those of sqlite3, with their codes."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, apsw.Error):
            code = getattr(error, "extendedresult", None) or getattr(error, "result", None) or 1
            kind: type[sqlite3.Error] = sqlite3.OperationalError
            if isinstance(error, apsw.ConstraintError):
                kind = sqlite3.IntegrityError
            elif isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
                kind = sqlite3.DatabaseError
            report = kind(str(error))
            report.sqlite_errorcode = code
            report.sqlite_errorname = apsw.mapping_extended_result_codes.get(code, "")
            raise report from error


class Adapted:
    """As much of sqlite3.Connection as the store uses."""

    def __init__(self, db: apsw.Connection, disk: Disk) -> None:
        self.db = db
        self.disk = disk

    @property
    def in_transaction(self) -> bool:
        return self.db.in_transaction

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> _Rows:
        with _raising():
            try:
                rows = list(self.db.execute(sql, parameters))
            except apsw.IOError:
                if sql != "COMMIT" or not self.disk.unmentioned:
                    raise
                # apsw raises what a VFS raised even where SQLite goes on: this was the checkpoint after the
                # commit.
                self.disk.unmentioned, rows = False, []
        return _Rows(rows, self.db.changes(), self.db.last_insert_rowid())

    def executemany(self, sql: str, parameters: Sequence[Sequence[Any]]) -> _Rows:
        changed = sum(self.execute(sql, some).rowcount for some in parameters)
        return _Rows([], changed, self.db.last_insert_rowid())

    def close(self) -> None:
        with _raising():
            self.db.close()
