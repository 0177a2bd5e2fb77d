"""A durable store whose calls take time, stop, fail, or lose their answers. Its rows are those of SQLite, in
memory.

What is decided about rows is decided by the code of all durable stores; each operation is one transaction, as
in the stores for files and servers. Under ``check_then_write`` an operation reads first and writes later, and
what others did meanwhile shows only where a write compares the epoch of its run.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stroma.checkpoint import StoreError
from stroma.checkpoint.durable.operations import Transaction, fenced_error
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Annotation, Fence, Rows, RunRow, StepRow
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.durable.store import _LOOK_SECONDS, DurableStore, LeaseRenewer, _renew
from stroma.checkpoint.durable.worker import Connection, Job, generation
from stroma.checkpoint.sqlite.connection import SqliteConnection, SqliteRows
from stroma.checkpoint.sqlite.file import _SCHEMA
from stroma.limits.reservations import ReservationRenewer

if TYPE_CHECKING:
    from tests.simulation.scheduler import Process
    from tests.simulation.world import World

T = TypeVar("T")


@functools.cache
def _empty() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    for statement in _SCHEMA:
        db.execute(statement)
    return db


class Changed(Exception):
    """What an operation was going to change is not as it was read."""


class Held(NamedTuple):
    """The state of a run taken over: the process of its last owner and the rest of its lease."""

    status: str
    pid: int
    left_seconds: float


def _place(owner: str) -> str:
    result = Owner.read(owner)
    return "?" if result is None else result.place


def _held(result: RunRow | None) -> Held | None:
    owner = None if result is None else Owner.read(result.owner)
    if result is None or owner is None:
        return None
    return Held(result.status, owner.pid, round(result.left_seconds, 3))


class LoggedConnection(sqlite3.Connection):
    """A connection that notes what its transactions have written, once they are committed."""

    world: World

    def prepare(self, world: World) -> None:
        self.world = world
        self.process: Process | None = None
        self.log: list[tuple[Any, ...]] = []
        self._mark = 0

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        done = super().execute(sql, *values)
        if sql == "SAVEPOINT one":
            self._mark = len(self.log)
        elif sql == "ROLLBACK TO one":
            del self.log[self._mark :]
        elif sql == "ROLLBACK":
            self.log.clear()
        elif sql == "COMMIT":
            for entry in self.log:
                self.world.note(self.process, *entry)
            self.log.clear()
        return done


class LoggedRows(SqliteRows):
    """Rows that note what is written, for the history of the simulation."""

    def __init__(self, db: Any, database: Database) -> None:
        super().__init__(db)
        self.database = database
        self.log: list[tuple[Any, ...]] = db.log

    def begin(self, existing: Any, opening: Any) -> Any:
        fence = super().begin(existing, opening)
        self.database.ids[fence.run] = opening.run_id
        self.log.append(("begun", opening.run_id, fence.epoch, _place(opening.owner), _held(existing)))
        return fence

    def take_over(self, existing: Any, opening: Any) -> Any:
        fence = super().take_over(existing, opening)
        self.log.append(("taken", opening.run_id, fence.epoch, _place(opening.owner), _held(existing)))
        return fence

    def replace_owner(self, existing: Any, owner: str) -> Any:
        keeps = self.database.keeps_late_owners
        return super().replace_owner(existing, existing.owner if keeps else owner)

    def annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        if self.database.forgets_cancels:
            kinds = tuple(set(kinds) - {Annotation.REQUEST, Annotation.CONTROL})
        return super().annotations(run, *kinds, branch=branch)

    def commit(self, fence: Any, attempt: Any, step: Any, *more: Any) -> Any:
        before = self.db.total_changes
        entry = super().commit(fence, attempt, step, *more)
        if entry and self.db.total_changes != before:  # Else it was kept by an earlier try.
            self._log_kept(fence, attempt, step)
        return entry

    def _log_kept(self, fence: Any, attempt: Any, step: Any) -> None:
        place = f"{attempt.position}:{attempt.branch}"
        sha = None if step is None else step.sha256.hex()[:8]
        self.log.append(("kept", self.database.ids[fence.run], fence.epoch, place, attempt.outcome, sha))

    def finish(self, fence: Any, end: Any) -> Any:
        done = super().finish(fence, end)
        if done:
            self.log.append(("finished", self.database.ids[fence.run], fence.epoch, end.status))
        return done

    def annotate(self, run: Any, position: int, branch: str, node_id: str, step: Any) -> None:
        super().annotate(run, position, branch, node_id, step)
        if position == Annotation.REQUEST:
            self.log.append(("cancel asked", self.database.ids[run]))


class GatheredRows(LoggedRows):
    """Rows that read at once and gather their writes, comparing only the epochs of runs."""

    def __init__(self, db: sqlite3.Connection, database: Database) -> None:
        super().__init__(db, database)
        self.writes: list[Callable[[], None]] = []
        self.cells: dict[str, bytes | None] = {}

    def begin(self, existing: Any, opening: Any) -> Any:
        return self._open(super().begin, existing, opening)

    def take_over(self, existing: Any, opening: Any) -> Any:
        return self._open(super().take_over, existing, opening)

    def replace_owner(self, existing: Any, owner: str) -> Any:
        self.writes.append(partial(super().replace_owner, existing, owner))
        return Fence(existing.run, existing.execution, existing.epoch, owner, 0.0)

    def _open(self, do: Callable[..., Any], existing: Any, opening: Any) -> Any:
        # What it makes is known before it is written; it is undone until then.
        self.db.execute("SAVEPOINT one")
        fence = do(existing, opening)
        self.db.execute("ROLLBACK TO one")
        self.db.execute("RELEASE one")

        def write() -> None:
            now = self.find(opening.run_id)
            if (now and now.epoch) != (existing and existing.epoch) or do(existing, opening) != fence:
                raise Changed

        self.writes.append(write)
        return fence

    def commit(self, fence: Any, attempt: Any, step: Any, *more: Any) -> Any:
        do = super().commit
        self.writes.append(lambda: self._fenced(do(fence, attempt, step, *more), fence))
        return True

    def finish(self, fence: Any, end: Any) -> Any:
        do = super().finish
        self.writes.append(lambda: self._fenced(do(fence, end), fence))
        return True

    def _fenced(self, done: Any, fence: Any) -> None:
        if not done:
            run_id = self.database.ids[fence.run]
            raise fenced_error(self.find(run_id), run_id)

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Any) -> None:
        self.writes.append(partial(super().annotate, run_id, position, branch, node_id, step))

    def delete_annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> None:
        self.writes.append(partial(super().delete_annotations, run, *kinds, branch=branch))

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        result = super().read_cell(name)
        self.cells[name] = result[0]
        return result

    def write_cell(self, name: str, data: bytes) -> None:
        do, before = super().write_cell, self.cells[name]

        def write() -> None:
            if SqliteRows.read_cell(self, name)[0] != before:
                raise Changed
            do(name, data)

        self.writes.append(write)


class Database:
    """What all processes share.

    Attributes:
        ids: run ids by the store's own key.
        check_then_write, forgets_cancels, keeps_late_owners: faults that are put in on purpose, see the
            world's.
    """

    #: As a SQLite file, for the connection that stores of files have.
    path = "the simulated store"

    def __init__(self, world: World) -> None:
        self.world = world
        self.db = sqlite3.connect(":memory:", isolation_level=None, factory=LoggedConnection)
        _empty().backup(self.db)
        self.db.prepare(world)
        self.ids: dict[Any, str] = {}
        self.check_then_write = "check-then-write" in world.put_in
        self.forgets_cancels = "cancel-forgotten" in world.put_in
        self.keeps_late_owners = "cancel-unfenced" in world.put_in

    def open(self) -> sqlite3.Connection:
        return self.db

    def identity(self) -> tuple[int, int]:
        return 0, 0

    def retry_while_locked(self, call: Callable[[], T]) -> T:
        return call()

    def explain(self, error: Exception) -> StoreError:
        return error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")

    def rows(self, db: Any = None) -> LoggedRows:
        return LoggedRows(self.db, self)

    def look(self, operation: Any) -> tuple[GatheredRows, Any]:
        """Do the reading half of an operation."""
        rows = GatheredRows(self.db, self)
        return rows, operation(rows)

    def write(self, process: Process, rows: GatheredRows) -> None:
        """Do the writing half. Raises Changed if it must be done again from the start."""
        self.db.process = process
        self.db.execute("BEGIN")
        try:
            for write in rows.writes:
                write()
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")


class SimulatedStore(DurableStore):
    """One process's connection to the database: a queue of operations, done one batch after the other."""

    address = "simulated:"

    def __init__(self, process: Process, database: Database) -> None:
        super().__init__()
        self.process = process
        self.database = database
        self.world = database.world
        self.queue: list[Job] = []
        file: Any = database
        self.connection = SqliteConnection(file)
        self.busy = False
        self._lease_renewers[generation()] = _SimulatedRenewer(self)

    def __repr__(self) -> str:
        return f"SimulatedStore({self.process.pid})"

    def _display_name(self) -> str:
        return "the simulated store"

    def _connect(self) -> Connection:
        raise NotImplementedError

    def _submit(self, operation: Any) -> asyncio.Future[Any]:
        future = self.process.create_future()
        self._put(Job(operation, future))
        return future

    def post(self, operation: Any) -> None:
        self._put(Job(operation, None))

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        if self.process.dead or self.world.strikes("a read fails", 0.01):
            raise StoreError("the simulated store cannot be read")
        return query(self.database.rows())

    def _put(self, job: Job) -> None:
        if not self.process.dead:
            self.queue.append(job)
            if not self.busy:
                self.busy = True
                # What comes meanwhile is done together.
                self._after(self.world.latency(), self._arrive)

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        """Go on in the worker's thread of the process."""
        self.process.scheduler.after(seconds, self.process, call)

    def _arrive(self) -> None:
        batch, self.queue = self.queue, []
        world = self.world
        if world.strikes("the store fails before an operation", 0.03):
            for job in batch:
                job.error = StoreError("the simulated store did nothing")
            self._reply(batch)
        elif world.strikes("a process dies while its operation is on its way", 0.01):
            world.kill(self.process)
            if world.draw.random() < 0.5:  # The request has left already.
                self._apply(batch, lambda _: None)
        else:
            self._apply(batch, self._applied)

    def _apply(self, batch: list[Job], then: Callable[[list[Job]], None]) -> None:
        """Do operations, then go on. What a dead process has asked for is done, too: it is at the server."""
        if self.database.check_then_write:
            self._in_halves(batch, 0, then)
        else:
            self.database.db.process = self.process
            self.connection.apply(batch, lambda: False)
            then(batch)

    def _in_halves(self, batch: list[Job], number: int, then: Callable[[list[Job]], None]) -> None:
        if number == len(batch):
            then(batch)
            return
        job = batch[number]

        def next_one() -> None:
            self._in_halves(batch, number + 1, then)

        def write() -> None:
            try:
                self.database.write(self.process, rows)
            except Changed:
                self._in_halves(batch, number, then)
                return
            except Exception as error:
                job.error = self.database.explain(error)
            next_one()

        try:
            rows, job.value = self.database.look(job.operation)
        except Exception as error:
            job.error = self.database.explain(error)
            next_one()
        else:
            self.process.scheduler.after(self.world.latency(), None, write)

    def _applied(self, batch: list[Job]) -> None:
        world = self.world
        if self.process.dead:
            return
        if world.strikes("a process dies before the answer arrives", 0.02):
            world.kill(self.process)
        elif world.strikes("the store's answer is lost", 0.03):
            if world.draw.random() < 0.5:
                self._after(world.latency(), lambda: self._again(batch))
            else:
                for job in batch:
                    job.error = StoreError("the simulated store was lost before it answered")
                self._reply(batch)
        else:
            self._reply(batch)

    def _again(self, batch: list[Job]) -> None:
        """Do operations once more after a broken connection: what opened a run is recognised by its owner."""
        open_still: list[Job] = []
        for job in batch:
            opening = job.operation.opening if isinstance(job.operation, Transaction) else None
            if opening is not None and job.error is None:
                result = self.database.rows().find(opening.run_id)
                if result is not None and result.owner == opening.owner:
                    job.value = job.operation.result
                    continue
            job.error = None
            open_still.append(job)
        self._apply(open_still, lambda _: self._reply(batch))

    def _reply(self, batch: list[Job]) -> None:
        def arrived() -> None:
            for job in batch:
                job.settle()
            self.busy = False
            if self.queue:
                self.busy = True
                self._after(self.world.latency(), self._arrive)

        self._after(self.world.latency(), arrived)


class _SimulatedRenewer(LeaseRenewer):
    """The thread that renews the leases of runs, as events of its process."""

    def __init__(self, store: SimulatedStore) -> None:
        super().__init__(store)
        self._simulated = store

    def watch(self, session: DurableSession) -> None:
        self._sessions.add(session)
        if not self._running:
            self._running = True
            self._renewed = self._simulated.process.scheduler.now
            self._next()

    def _next(self) -> None:
        self._simulated._after(min(self._interval(), _LOOK_SECONDS), self._tick)

    def _tick(self) -> None:
        store, now = self._simulated, self._simulated.process.scheduler.now
        sessions = sorted((s for s in self._sessions if not s.ended), key=lambda s: (s.run_id, s.fence.epoch))
        if not sessions:
            self._running = False
            return
        if now - self._renewed >= self._interval() * 0.9:
            self._renewed = now
            store.post(partial(_renew, [session.fence for session in sessions]))
        self._read_requests(store, [session for session in sessions if session.on_control])
        self._next()


class SimulatedRenewals:
    """The thread that renews what calls have reserved, as events of each process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._of: dict[Process, ReservationRenewer] = {}

    def add(self, token: str, lease_seconds: float, renew: Any) -> None:
        process = self._world.scheduler.current
        assert process is not None
        renewer = self._of.get(process)
        if renewer is None:
            renewer = self._of[process] = ReservationRenewer()
        begin = not renewer._running
        renewer._running = True  # No thread of its own.
        renewer.add(token, lease_seconds, renew)
        if begin:
            process.scheduler.after(lease_seconds / 3, process, partial(self._tick, process, renewer))

    def remove(self, token: str) -> None:
        process = self._world.scheduler.current
        if process is not None and process in self._of:
            self._of[process].remove(token)

    def _tick(self, process: Process, existing: ReservationRenewer) -> None:
        if existing._renew_all():
            process.scheduler.after(existing._seconds, process, partial(self._tick, process, existing))
