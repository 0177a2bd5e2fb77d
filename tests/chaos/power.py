"""The faults of a disk, for the store in one file: the power fails, or an fsync does.

One history is written by the ordinary store, with its own SQL, and recorded; then the power fails at many
instants of it. What survives is opened by the ordinary store. A *batch* is what one transaction of the store
holds; what the whole file says after each one was noted meanwhile, so that nothing in it can be wrong
unnoticed.
"""

import asyncio
import hashlib
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.chaos.check import Figures
from tests.chaos.disk import Disk, FailedSync, Mark, Sync, Write, survives
from tests.chaos.rounds import MOST_BROKEN, apart

from stroma import FailureClass, SQLiteStore, StoreError
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.sqlite.connection import SqliteConnection

CUTS = 50  # of one history
BATCHES = 40  # of one history, more or less
#: Everything that the store keeps.
TABLES = ("steps", "attempts", "runs")


class State(BaseModel):
    text: str = ""


class _Noting:
    """A connection that notes what the file says after each batch, as soon as the batch is kept."""

    def __init__(self, inner: SqliteConnection, disk: Disk) -> None:
        self.name = inner.name
        self.inner = inner
        self.disk = disk

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> Any:
        self.disk.mark("begin")
        self.disk.making = self.inner._db is None
        poisoned = self.inner.apply(batch, more)
        entry = poisoned is None and any(job.error is None for job in batch)
        self.disk.mark(
            ("kept", *read_database(self.inner._db)) if entry else ("refused", poisoned is not None)
        )
        return poisoned

    def handle(self) -> object:
        return self.inner.handle()

    def close(self) -> None:
        self.inner.close()


class RecordedStore(SQLiteStore):
    def __init__(self, path: Path, disk: Disk, **options: Any) -> None:
        self._open_file = disk.connect
        super().__init__(path, **options)
        self.disk = disk

    def _connect(self) -> Any:
        return _Noting(super()._connect(), self.disk)


def read_database(db: Any) -> tuple[str, frozenset[int]]:
    """All that a file says, in short; and its attempts and commits, which only ever become more."""
    whole = hashlib.sha256()
    entries: set[int] = set()
    for table in TABLES:
        rows = db.execute(f"SELECT * FROM {table}").fetchall()
        for row in sorted(map(repr, rows)):
            whole.update(row.encode())
        if table == "attempts" or table == "steps":
            entries.update(hash(row) for row in rows if table == "attempts" or row[3] >= 0)
    return whole.hexdigest() if len(rows) else "", frozenset(entries)


async def history(store: SQLiteStore, draw: random.Random, batches: int, *, delete: bool = True) -> None:
    """Runs that begin, commit, fail, end, restart, side by side or alone. Ends if the store gives up."""
    from tests.store_suite.journal import begin, commit, fail, finish

    async def one(run_id: str, steps: int) -> None:
        session = await begin(store, run_id, State(), if_exists=draw.choice(("restart", "resume")))
        first = len(session.restored)
        for position in range(first, first + steps):
            if draw.random() < 0.2:
                await fail(session, position, tokens=2, cost=0.5, failure=FailureClass.RECOVERABLE)
            # Rows of a few bytes, and such as spread over many pages.
            text = "x" * draw.choice((0, 20, 300, 3000, 9000))
            await commit(session, position, State(text=text), tokens=3, cost=0.25, attempt=2)
        if draw.random() < 0.8:
            await finish(session, draw.choice(("COMPLETED", "PARTIAL")))
        else:
            session.abandon()

    done = 0
    while done < batches:
        many = draw.choice((1, 1, 3, 8))
        steps = draw.randint(1, 5)
        done += steps + 2
        ids = draw.sample([f"run {i}" for i in range(12)], many)
        await asyncio.gather(*(one(run_id, steps) for run_id in ids))
        if draw.random() < 0.3:
            await store.save(f"run {draw.randrange(12)}", "by hand", State(text="y" * 50))
        if delete and draw.random() < 0.1:
            await store.delete(f"run {draw.randrange(12)}")


def recorded(folder: Path, draw: random.Random, synchronous: Any, pragmas: tuple[str, ...]) -> Disk:
    """The record of a history, written by one store object after another."""
    disk = Disk(folder, pragmas)

    async def write() -> None:
        for _ in range(draw.randint(1, 3)):
            async with RecordedStore(folder / "runs.db", disk, synchronous=synchronous) as store:
                await history(store, draw, BATCHES // 2)

    with disk:
        asyncio.run(write())
    return disk


class Left:
    """What a file says that has survived, opened by the ordinary store. Raises what that raises."""

    def __init__(self, folder: Path, image: dict[str, bytes], *, on: bool) -> None:
        folder.mkdir()
        for name, data in image.items():
            if not name.endswith("-shm"):  # It is memory: nobody has it after a power cut.
                (folder / name).write_bytes(data)
        path = folder / "runs.db"
        self.nothing = not path.exists()
        self.unsound = ""
        self.read_database = ""
        self.committed: frozenset[int] = frozenset()
        self.runs = 0
        try:
            with SQLiteStore(path) as store:
                self.went_on = asyncio.run(self._go_on(store)) if on else 0
                if not on:
                    with store._file.open_to_read() as db:
                        if db is not None:
                            self._look(db)
        except StoreError as error:
            if not self.nothing:
                self.unsound = str(error)
        if on and not self.unsound:
            with sqlite3.connect(path) as db:
                self._look(db)
            db.close()

    def _look(self, db: Any) -> None:
        (sound,) = db.execute("PRAGMA integrity_check").fetchone()
        if sound != "ok":
            self.unsound = str(sound)
        self.read_database, self.committed = read_database(db)
        (self.runs,) = db.execute("SELECT count(*) FROM runs").fetchone()

    @staticmethod
    async def _go_on(store: SQLiteStore) -> int:
        """The first run can be continued; what was committed before is restored and checked."""
        from tests.store_suite.journal import begin, commit, finish

        session: DurableSession = await begin(store, "run 0", State(), if_exists="resume")
        before = len(session.restored)
        await commit(session, before, State(text="after the cut"))
        await finish(session)
        again: DurableSession = await begin(store, "run 0", State(), if_exists="resume")
        assert len(again.restored) == before + 1
        return before


def powercut(name: str, draw: random.Random, cuts: int) -> Figures:
    """The power fails at instants of a history. FULL: all acknowledged commits. NORMAL: a prefix of them."""
    figures = Figures(rounds=cuts)
    # NORMAL every fourth time; checkpoints often, so that they are struck too, or as they come.
    synchronous = "normal" if draw.random() < 0.25 else "full"
    every = draw.choice((None, 4, 12, 50))
    pragmas = () if every is None else (f"PRAGMA wal_autocheckpoint={every}",)
    folder = _folder(name)
    try:
        (folder / "written").mkdir()
        disk = recorded(folder / "written", draw, synchronous, pragmas)
        _cut(figures, folder, disk, draw, cuts, full=synchronous == "full")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures.more[f"cuts at {synchronous.upper()}"] += cuts
    return figures


def _cut(figures: Figures, folder: Path, disk: Disk, draw: random.Random, cuts: int, *, full: bool) -> None:
    events = disk.events
    # What was said after each batch; and of each event, how many batches were acknowledged and begun before
    # it.
    states: list[str] = []
    before: list[tuple[int, int]] = []
    started = 0
    for event in events:
        before.append((len(states), started))
        if isinstance(event, Mark) and event.what == "begin":
            started = len(states) + 1
        elif isinstance(event, Mark) and event.what[0] == "kept":
            states.append(event.what[1])
    before.append((len(states), started))
    # Mostly where the disk is at work; SQLite rewrites a file in bursts.
    busy = [i for i, event in enumerate(events) if isinstance(event, (Write, Sync))]
    chosen = [draw.choice(busy) if draw.random() < 0.8 else draw.randrange(len(before)) for _ in range(cuts)]
    lossy = runs = 0
    figures.commits += len(states)
    for number, (at, image) in enumerate(survives(events, chosen, draw)):
        acknowledged, started = before[at]
        figures.kills += 1
        where, bad = f"cut {number} before event {at} of {len(events)}", len(figures.broken)
        try:
            left = Left(folder / "left", image, on=False)
            result = _prefix(left, states, started)
            runs = max(runs, left.runs)
            if left.unsound:
                figures.broken.append(f"I1: {where}: {left.unsound}")
            elif result is None:
                figures.broken.append(f"I1: {where}: the file says what was never so")
            elif result < acknowledged:
                lossy += 1
                if full:
                    figures.lost += acknowledged - result
                    figures.broken.append(
                        f"I1: {where}: {result} of {acknowledged} acknowledged batches are left"
                    )
            if number % 10 == 0 and not left.unsound:
                Left(folder / "on", image, on=True)
        except Exception as error:
            figures.broken.append(f"I5: {where}: {type(error).__name__}: {error}")
        for name in ("left", "on"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if len(figures.broken) > bad:
            figures.broken[-1] += f"; the files are in {_keep(image)}"
    figures.runs += runs
    if not full:
        figures.more["cuts at NORMAL that lost the last batches"] += lossy


def _prefix(left: Left, states: list[str], started: int) -> int | None:
    """How many batches are left; None if it is no prefix of those begun."""
    if not left.read_database:  # No file, an empty one, or one with empty tables.
        return 0
    # The newest of equal ones: a batch may change nothing.
    return max((i + 1 for i, what in enumerate(states[:started]) if what == left.read_database), default=None)


def fsync(name: str, draw: random.Random, cuts: int) -> Figures:
    """An fsync fails: nothing more is acknowledged, and a new store has all that was acknowledged before."""
    figures = Figures()
    folder = _folder(name)
    try:
        for number in range(cuts):
            figures.rounds += 1
            inner = folder / str(number)
            (inner / "written").mkdir(parents=True)
            _fail(figures, inner, draw)
            shutil.rmtree(inner)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def _fail(figures: Figures, folder: Path, draw: random.Random) -> None:
    path = folder / "written" / "runs.db"
    left = draw.randint(1, 40)
    failing = False

    def fail_sync(_: str) -> bool:
        nonlocal left, failing
        left -= 1
        failing = failing or left == 0
        # The next one succeeds again, as it does in the kernel: only the store knows better.
        return left == 0

    every = draw.choice((4, 1000))
    disk = Disk(folder / "written", (f"PRAGMA wal_autocheckpoint={every}",), fail_sync)
    refused = 0

    async def write() -> None:
        nonlocal refused
        store = RecordedStore(path, disk)
        async with store:
            for _ in range(6):
                try:
                    await history(store, draw, 12, delete=False)
                except StoreError:
                    refused += 1

    with disk:
        asyncio.run(write())
    states = [e.what[1] for e in disk.events if isinstance(e, Mark) and e.what[0] == "kept"]
    marks = [
        "failed" if isinstance(event, FailedSync) else event.what[0]
        for event in disk.events
        if isinstance(event, FailedSync) or (isinstance(event, Mark) and event.what != "begin")
    ]
    figures.kills += failing
    figures.commits += len(states)
    if ("refused" in marks) != bool(refused):
        figures.broken.append("I5: an operation failed and nobody was told, or the other way round")
    if "refused" in marks:
        poisoned = any(isinstance(e, Mark) and e.what == ("refused", True) for e in disk.events)
        after = marks[marks.index("refused") :].count("kept")
        # While the file is made nothing is written yet: the next call may try again.
        figures.more["poisoned" if poisoned else "failed while the file was made"] += 1
        if not poisoned and any(isinstance(e, FailedSync) and e.final for e in disk.events):
            figures.broken.append(
                f"I1: a failed fsync of a commit was taken for nothing; {after} more followed"
            )
        if poisoned and after:
            figures.broken.append(f"I1: {after} batches were acknowledged after a failed fsync")
    elif failing:
        figures.more["failed in a checkpoint, which is made again"] += 1
    # What a process sees that opens the file now, and what is there after a power cut on top of it. The batch
    # whose fsync failed may be there as well: nobody was told that it is, nor that it is not.
    entries: list[frozenset[int]] = [
        event.what[2] for event in disk.events if isinstance(event, Mark) and event.what[0] == "kept"
    ]
    acknowledged = entries[-1] if entries else frozenset()
    live = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    images = [live, *(image for _, image in survives(disk.events, [len(disk.events)] * 3, draw))]
    for number, image in enumerate(images):
        result = Left(folder / f"left {number}", image, on=False)
        if result.unsound or not acknowledged <= result.committed:
            what = (
                result.unsound
                or f"{len(acknowledged - result.committed)} of {len(acknowledged)} rows are lost"
            )
            figures.lost += 1
            figures.broken.append(f"I1: {'after a power cut too' if number else 'at once'}: {what}")
    figures.runs += Left(folder / "on", live, on=True).runs


def _keep(image: dict[str, bytes]) -> str:
    folder = tempfile.mkdtemp(prefix="stroma-chaos-cut-")
    for name, data in image.items():
        Path(folder, name).write_bytes(data)
    return folder


FAULTS: dict[str, Callable[[str, random.Random, int], Figures]] = {"powercut": powercut, "fsync": fsync}


def _folder(name: str) -> Path:
    """In memory where there is such a place: it is the record that counts."""
    shared = "/dev/shm"
    return Path(
        tempfile.mkdtemp(prefix=f"stroma-{name}-", dir=shared if os.access(shared, os.W_OK) else None)
    )


def rounds(fault: str, seed: int, numbers: range, broke: Callable[[int, Figures], None]) -> Figures:
    """Cuts of one fault; what is drawn, and so can be repeated, is a history of some cuts."""
    total, bad = Figures(), 0
    for number in range(numbers.start, numbers.stop, CUTS):
        draw = random.Random(f"{seed} {fault} {number}")
        cuts = min(CUTS, numbers.stop - number)
        figures = apart(partial(FAULTS[fault], fault, draw, cuts))
        total.add(figures)
        if figures.broken:
            broke(number, figures)
            bad += 1
            if bad == MOST_BROKEN:
                print(f"{fault}: given up after {bad} broken histories", file=sys.stderr)
                break
    return total
