"""SQLiteStore: what it promises, each promise with the fault that would break it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import pathlib
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import computing, ended, start_python
from tests.shared_stores import subclass_of
from tests.store_suite.journal import State, begin, row, settled

from stroma import StromaRunner
from stroma.checkpoint import (
    AsyncInMemoryStore,
    CheckpointLost,
    CorruptCheckpoint,
    RunRequest,
    StoreError,
    open_store,
)
from stroma.checkpoint.queue import ClaimRequest, RunLimits
from stroma.checkpoint.sqlite import file as sqlite_file
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of


class Holds(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    thing: Any = None


SCHEMA = schema_of(State)


async def commit(session: Any, position: int, n: int = 0, node: str = "node", **facts: Any) -> None:
    await settled(session.record(row(position, node, **facts), SCHEMA, State(n=n)))


def restored(session: Any) -> dict[tuple[int, str], tuple[str, BaseModel]]:
    return {key: (result.node_id, SCHEMA.restore(result.output)) for key, result in session.restored.items()}


def raw(path: pathlib.Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10))


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A process that runs code with this module's helpers at hand."""
    return start_python(
        *args,
        code=f"import asyncio, os, sys\nfrom tests.checkpoint.test_sqlite import *\n{textwrap.dedent(code)}",
    )


class Faulty(sqlite3.Connection):
    """A connection whose statements can be intercepted."""

    intercept: Any = staticmethod(lambda run, sql: run())

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        run = lambda: super(Faulty, self).execute(sql, *parameters)  # noqa: E731
        return self.intercept(run, sql) or run()


def faulty(intercept: Any) -> Any:
    kind = type("Intercepted", (Faulty,), {"intercept": staticmethod(intercept)})
    return lambda uri: sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=kind)


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("injected")
    error.sqlite_errorcode = code
    return error


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "runs.db"


@pytest.fixture
def store(path: pathlib.Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(path) as opened:
        yield opened


class TestCommit:
    @pytest.mark.core
    async def test_acknowledged_only_after_commit(self, path: pathlib.Path) -> None:
        """Nobody is told that an output is kept before its COMMIT has ended."""
        reached, release = threading.Event(), threading.Event()

        def intercept(run: Any, sql: str) -> None:
            if sql == "COMMIT" and armed:
                reached.set()
                release.wait(10)

        armed = False
        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            session = await begin(store)
            armed = True
            pending = session.record(row(), SCHEMA, State(n=1))
            await asyncio.to_thread(reached.wait, 10)
            await asyncio.sleep(0.05)
            assert not pending.done()
            with raw(path) as db:
                assert db.execute("SELECT count(*) FROM steps WHERE position >= 0").fetchone() == (0,)
            release.set()
            await pending
            with raw(path) as db:
                assert db.execute("SELECT count(*) FROM steps WHERE position >= 0").fetchone() == (1,)

    async def test_what_waits_together_is_committed_together(self, path: pathlib.Path) -> None:
        """A hundred concurrent runs need few transactions, and each has exactly its own outputs."""
        commits = itertools.count()
        count = lambda run, sql: next(commits) and None if sql == "COMMIT" else None  # noqa: E731

        async def one(store: SQLiteStore, i: int) -> None:
            session = await begin(store, f"run {i}")
            for position in range(5):
                await commit(session, position, i)
            await session.end("COMPLETED", None)

        async with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(count)))(path) as store:
            await asyncio.gather(*(one(store, i) for i in range(100)))
            runs = store.list_runs(limit=1000)
            assert sorted(run.run_id for run in runs) == sorted(f"run {i}" for i in range(100))
            assert {(run.nodes, run.status) for run in runs} == {(5, "COMPLETED")}
            assert await store.load_typed("run 42", "node", State) == State(n=42)
        assert next(commits) < 100

    async def test_what_cannot_be_kept_is_refused_at_once(self, store: SQLiteStore) -> None:
        """NotSerialisable names the field, out of the call itself, for inputs, outputs and saved states."""
        session = await begin(store)
        broken = Holds(thing=threading.Lock())
        with pytest.raises(NotSerialisable, match=r"Holds\.thing cannot be serialised"):
            session.record(row(), schema_of(Holds), broken)
        with pytest.raises(NotSerialisable, match=r"Holds\.thing"):
            store.open_run(RunRequest("x", "p", broken, schema_of(Holds)))
        with pytest.raises(NotSerialisable, match=r"Holds\.thing"):
            await store.save("x", "node", broken)
        assert store.find_run("x") == []


class TestFence:
    async def test_a_replaced_file_fences_sessions(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """If the file is deleted while in use, nothing more is acknowledged; new runs get a new file."""
        stale = await begin(store)
        await commit(stale, 0)
        for file in path.parent.iterdir():
            file.unlink()
        with pytest.raises(CheckpointLost, match="no longer in the store"):
            await commit(stale, 1)
        await commit(await begin(store, "new"), 0, 5)
        with pytest.raises(CheckpointLost):
            await commit(stale, 2)
        with raw(path) as db:
            assert db.execute("SELECT run_id FROM runs").fetchall() == [("new",)]

    async def test_a_worker_reports_a_deleted_file(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """A claim fails while a file that was used is gone; one that no run has created yet has no runs."""
        request = ClaimRequest("t", 30.0, 10, 0, {"p": RunLimits()})
        assert await store.claim(request) == []
        await commit(await begin(store), 0)
        await store.merge_log()
        assert await store.claim(request) == []
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(StoreError, match=r"runs\.db was deleted or moved while .*; restore it") as gone:
            await store.claim(request)
        assert gone.value.transient
        assert not path.exists()
        path.with_name("elsewhere").rename(path)
        assert await store.claim(request) == []


WRITER = """
    async def one(store, run_id, commits):
        session = await begin(store, run_id)
        for position in range(commits):
            await commit(session, position, position, tokens=1, cost=0.001)
        await session.end("COMPLETED", None)

    async def main():
        async with SQLiteStore(sys.argv[1]) as store:
            await asyncio.gather(*(one(store, f"{sys.argv[2]}-{i}", 25) for i in range(4)))

    asyncio.run(main())
"""


ENDLESS = """
    async def one(store, run_id):
        session = await begin(store, run_id)
        for position in range(100_000):
            await commit(session, position, position, tokens=1)
            print(run_id, position, flush=True)

    async def main():
        store = SQLiteStore(sys.argv[1])
        await asyncio.gather(*(one(store, f"r{i}") for i in range(4)))

    asyncio.run(main())
"""


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [4, pytest.param(8, marks=pytest.mark.nightly)])
    def test_many_processes_write_one_file(self, path: pathlib.Path, processes: int) -> None:
        """4 and 8 processes make and fill one new file: every run complete, nothing lost or doubled."""
        running = [child(WRITER, path, f"process{i}") for i in range(processes)]
        complaints = [process.communicate(timeout=60)[1] for process in running]
        assert [process.returncode for process in running] == [0] * processes, complaints
        store = SQLiteStore(path)
        runs = store.list_runs(limit=1000)
        assert len(runs) == 4 * processes
        totals = {(run.status, run.nodes, run.tokens, run.cost_usd) for run in runs}
        assert totals == {("COMPLETED", 25, 25, 0.025)}
        for run in runs:
            assert [a.position for a in store.attempts(run.run_id)] == list(range(25))
        with raw(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    @pytest.mark.slow
    @pytest.mark.parametrize("acknowledged", [1, 40, 300])
    async def test_what_was_acknowledged_survives_kills(self, path: pathlib.Path, acknowledged: int) -> None:
        """After kill -9 in mid-stream acknowledged commits are there, totals agree and runs are resumable."""
        process = child(ENDLESS, path)
        events = [process.stdout.readline() for _ in range(acknowledged)]
        process.kill()
        events += process.stdout.readlines()
        process.stdout.close()
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL
        lines = [line.split() for line in events if line.endswith("\n")]
        assert len(lines) >= acknowledged
        with SQLiteStore(path) as store:
            for run_id in {run_id for run_id, _ in lines}:
                run = store.get_run(run_id)
                session = await begin(store, run_id, if_exists="resume", if_running="take_over")
                positions = [position for position, _ in session.restored]
                assert positions == list(range(len(positions)))
                assert set(positions) >= {int(p) for r, p in lines if r == run_id}
                assert (
                    run.nodes
                    == run.tokens
                    == session.prior.tokens
                    == len(store.attempts(run_id))
                    == len(positions)
                )
                assert all(model == State(n=p) for (p, _), (_, model) in restored(session).items())

    @pytest.mark.slow
    def test_a_child_forked_during_a_transaction_writes(self, path: pathlib.Path) -> None:
        """A child that is forked while threads of the parent write and read does not find the file locked."""
        code = """
            import threading

            async def write(store, run_id, count):
                session = await begin(store, run_id)
                for position in range(count):
                    await commit(session, position)

            def load(number):
                while not stop.is_set():
                    asyncio.run(write(store, f"load-{number}", 20))
                    store.list_runs()

            store, stop = SQLiteStore(sys.argv[1]), threading.Event()
            asyncio.run(write(store, "before", 1))
            threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for number in range(15):
                pid = os.fork()
                if pid == 0:
                    store._patience_seconds = 5.0
                    asyncio.run(write(store, f"child-{number}", 3))
                    store.close()
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0, number
            stop.set()
            for thread in threads:
                thread.join()
            store.close()
        """
        ended(child(code, path))
        nodes = {run.run_id: run.nodes for run in SQLiteStore(path).list_runs()}
        assert {nodes[f"child-{number}"] for number in range(15)} == {3}
        with raw(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def test_a_copy_of_the_file_alone_is_whole_after_run_sync(self, path: pathlib.Path) -> None:
        """After ``run_sync`` and after ``aclose`` the database without its WAL has every run, whoever has it
        open."""
        store, other = SQLiteStore(path), SQLiteStore(path)
        runner = StromaRunner.quick(store=store)
        add = runner.node("add", input=State, output=State)(computing(lambda state: State(n=state.n + 1)))
        runner.run_sync([add, add], State(), run_id="sync")
        copy = path.with_name("copy.db")
        shutil.copy(path, copy)
        assert {run.run_id: run.nodes for run in SQLiteStore(copy).list_runs()} == {"sync": 2}

        async def write() -> None:
            await StromaRunner.quick(store=other).run([add, add], State(), run_id="other")
            await other.aclose()

        asyncio.run(write())  # The first store keeps its connection.
        shutil.copy(path, copy)
        assert {run.run_id for run in SQLiteStore(copy).list_runs()} == {"sync", "other"}
        store.close()

    def test_run_sync_that_is_refused_creates_no_file(self, path: pathlib.Path) -> None:
        """A call that nothing came of leaves no database behind."""
        with pytest.raises(TypeError):
            StromaRunner.quick(store=SQLiteStore(path)).run_sync([3], State())
        assert not path.exists()

    @pytest.mark.slow
    def test_a_full_disk_is_survived(self, path: pathlib.Path) -> None:
        """When the file may not grow, that is a named error; once there is room, the same process goes on."""
        code = """
            import resource

            async def main():
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                async with SQLiteStore(sys.argv[1]) as store:
                    session = await begin(store)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
                    for position in range(1000):
                        attempt = row(position, tokens=1)
                        try:
                            await session.record(attempt, SCHEMA, State(text="x" * 2000))
                        except StoreError as error:
                            assert error.transient and "free some space" in str(error), error
                            break
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                    await session.record(attempt, SCHEMA, State(text="x" * 2000))
                    assert 10 < position < 999
                    run = store.get_run("run")
                    assert run.nodes == run.tokens == position + 1, run
            asyncio.run(main())
        """
        ended(child(code, path))


class TestThreads:
    async def test_a_loop_that_closed_meanwhile_disturbs_nobody(self, path: pathlib.Path) -> None:
        """If the loop of a caller is gone when its commit ends, the commit stands and others are served."""
        hold = threading.Event()
        slow = lambda run, sql: hold.wait(10) and None if sql == "COMMIT" and armed else None  # noqa: E731
        armed = False
        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(slow)))(path) as store:
            session = await begin(store)
            armed = True

            async def leave() -> None:
                session.record(row(0), SCHEMA, State())

            await asyncio.to_thread(asyncio.run, leave())
            hold.set()
            await commit(session, 1)
            assert [a.position for a in store.attempts("run")] == [0, 1]

    async def test_if_the_thread_dies_everybody_is_told(self, store: SQLiteStore) -> None:
        """Should the writer thread die, every pending and later operation fails with a StoreError."""

        def die(db: sqlite3.Connection) -> None:
            time.sleep(0.05)
            raise SystemExit

        session = await begin(store)
        pending = [store._submit(die), *(session.record(row(i), None, None) for i in range(5))]
        errors = await asyncio.gather(*pending, return_exceptions=True)
        errors += await asyncio.gather(session.record(row(9), None, None), return_exceptions=True)
        assert all(
            isinstance(e, StoreError) and "writer thread" in str(e) and not e.transient for e in errors
        )
        assert len(errors) == 7
        assert store.attempts("run") == []

    async def test_close_writes_what_is_queued(self, path: pathlib.Path) -> None:
        """close() ends only once everything queued is committed; afterwards the store refuses to write."""
        store = SQLiteStore(path)
        session = await begin(store)
        pending = [session.record(row(i), SCHEMA, State()) for i in range(50)]
        await store.aclose()
        await asyncio.gather(*pending)
        assert [file.name for file in path.parent.iterdir()] == ["runs.db"]
        assert len(store.attempts("run")) == 50
        with pytest.raises(StoreError, match="is closed"):
            await commit(session, 51)
        store.close()

    async def test_a_forgotten_store_leaves_no_thread(self, path: pathlib.Path) -> None:
        """The thread ends when its store is collected."""
        store = SQLiteStore(path)
        await store.save("run", "node", State())
        (thread,) = [w._thread for w in store._workers.values()]
        del store
        gc.collect()
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()


class TestFaults:
    async def test_disk_full(self, path: pathlib.Path) -> None:
        """A database that cannot grow is a named error; what was acknowledged stays; room lets it go on."""
        limit = 40

        class Small(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                if sql == "BEGIN IMMEDIATE":
                    super().execute(f"PRAGMA max_page_count={limit}")
                return super().execute(sql, *parameters)

        def small(uri: str) -> sqlite3.Connection:
            return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=Small)

        with subclass_of(SQLiteStore, _open_file=staticmethod(small))(path) as store:
            session = await begin(store)
            attempt, entry = row(), 0
            with pytest.raises(
                StoreError, match=r"the disk is full: .*runs\.db cannot grow; free some space"
            ) as raised:
                while True:
                    attempt = row(entry, tokens=1)
                    await session.record(attempt, SCHEMA, State(text="x" * 2000))
                    entry += 1
            assert raised.value.transient
            assert len(store.attempts("run")) == entry > 5
            limit = 1000
            await session.record(attempt, SCHEMA, State())
            run = store.get_run("run")
            assert run.tokens == run.nodes == entry + 1

    @pytest.mark.core
    async def test_after_a_failed_fsync_nothing_is_acknowledged(self, path: pathlib.Path) -> None:
        """A store whose disk failed poisons itself: an fsync that then succeeds would be a lie."""
        fail = False

        def intercept(run: Any, sql: str) -> None:
            if sql == "COMMIT" and fail:
                raise sqlite_error(sqlite3.SQLITE_IOERR_FSYNC)

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            session = await begin(store)
            await commit(session, 0)
            fail = True
            with pytest.raises(StoreError, match=r"the disk of .* failed") as raised:
                await commit(session, 1)
            assert not raised.value.transient
            fail = False
            with pytest.raises(StoreError, match="resume in a new process"):
                await commit(session, 2)
            with pytest.raises(StoreError, match=r"the disk of .* failed"):
                await begin(store, "other")
        assert [a.position for a in SQLiteStore(path).attempts("run")] == [0]

    async def test_a_lock_is_waited_for(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """While another process holds the lock, commits wait, off the event loop, and then all succeed."""
        session = await begin(store)
        with raw(path) as db:
            db.execute("BEGIN IMMEDIATE")
            pending = [session.record(row(i), SCHEMA, State()) for i in range(10)]
            ticks = 0
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                await asyncio.sleep(0.01)
                ticks += 1
            assert ticks > 20
            assert not any(p.done() for p in pending)
            assert store.attempts("run") == []  # Readers need not wait.
            db.execute("ROLLBACK")
        await asyncio.gather(*pending)
        assert len(store.attempts("run")) == 10

    async def test_a_damaged_output_is_never_handed_out(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """A flipped byte is CorruptCheckpoint that names run, position, node and a way out that works."""
        session = await begin(store)
        for position in range(3):
            await commit(session, position, position, f"n{position}")
        with raw(path) as db:
            db.execute("UPDATE steps SET output = CAST(replace(output, '1', '7') AS BLOB) WHERE position = 1")
        damaged = (
            r"node 'n1' at position 1 of run 'run' is damaged; resume from that node \(resume_from='n1'\)"
        )
        with pytest.raises(CorruptCheckpoint, match=damaged):
            await begin(store, if_exists="resume", if_running="take_over")
        with pytest.raises(CorruptCheckpoint, match=damaged):
            await store.load_typed("run", "n1", State)
        states = [(a.damaged, a.output is None) for a in store.attempts("run")]
        assert states == [(False, False), (True, True), (False, False)]
        await commit(session, 3)  # The refused resume has fenced nobody, and left no statement open.
        again = await begin(store, if_exists="resume", if_running="take_over", discard_from=1)
        await commit(again, 1, 1, "n1")
        assert await store.load_typed("run", "n1", State) == State(n=1)

    @pytest.mark.parametrize("make", [SQLiteStore, open_store, lambda path: open_store(f"sqlite:///{path}")])
    async def test_a_missing_directory_is_named(self, tmp_path: pathlib.Path, make: Any) -> None:
        """A path in a missing directory is refused when the store is made, and accepted once it exists."""
        for folder in (tmp_path / "no", tmp_path / "file" / "no"):
            (tmp_path / "file").touch()
            with pytest.raises(
                StoreError, match=f"there is no directory {folder}; create it, or use another path"
            ):
                make(str(folder / "runs.db"))
        (tmp_path / "no").mkdir()
        with make(str(tmp_path / "no" / "runs.db")) as store:
            await begin(store)
            (tmp_path / "no" / "runs.db").unlink()

    async def test_a_directory_is_no_database(self, tmp_path: pathlib.Path) -> None:
        """A path that is a directory is a StoreError that names it."""
        with SQLiteStore(tmp_path) as store, pytest.raises(StoreError, match="cannot open"):
            await begin(store)

    async def test_an_output_that_is_too_large_for_a_row(self, path: pathlib.Path) -> None:
        """An output beyond SQLite's limit is refused once, with the way out, and nothing else is harmed."""

        def connect(uri: str) -> sqlite3.Connection:
            db = sqlite_file.connect(uri)
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
            return db

        with subclass_of(SQLiteStore, _open_file=staticmethod(connect))(path) as store:
            session = await begin(store)
            with pytest.raises(StoreError, match="pass blobs= to the store") as raised:
                await settled(session.record(row(0), SCHEMA, State(text="x" * 60_000)))
            assert not raised.value.transient
            await commit(session, 0, 5)

    async def test_journal_mode_is_tried_again_when_locked(self, path: pathlib.Path) -> None:
        """Processes that make a file together may find it locked at the first statement: they wait."""
        times = itertools.count()

        def intercept(run: Any, sql: str) -> None:
            if "journal_mode" in sql and next(times) < 5:
                raise sqlite_error(sqlite3.SQLITE_BUSY_RECOVERY)

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            await begin(store)

    async def test_a_file_whose_making_was_cut_off_can_be_read(self, tmp_path: pathlib.Path) -> None:
        """A reader finds no runs, not an error, in a file that a power cut left half made."""
        making = tmp_path / "making.db"
        db = sqlite3.connect(making, isolation_level=None)
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE runs (run BLOB)")
        db.executemany("INSERT INTO runs VALUES (zeroblob(4000))", [()] * 50)  # More than the cache holds.
        left = tmp_path / "runs.db"
        left.write_bytes(making.read_bytes())
        journal = (tmp_path / "making.db-journal").read_bytes()
        (tmp_path / "runs.db-journal").write_bytes(journal)
        db.close()
        assert any(journal)
        with SQLiteStore(left) as store:
            assert store.list_runs() == []
            await begin(store)
            assert len(store.list_runs()) == 1

    @pytest.mark.slow
    async def test_a_file_whose_maker_died_can_be_read(self, path: pathlib.Path) -> None:
        """What a process killed while making the file leaves behind hinders no reader, and no writer."""
        code = (
            "import os, sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('PRAGMA cache_size=1')\ndb.execute('BEGIN')\nfor i in range(50): db.execute(f'CREATE "
            "TABLE t{i} (x)')\nos.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert pathlib.Path(f"{path}-journal").stat().st_size > 0
        with SQLiteStore(path) as store:
            assert store.list_runs() == []
            await begin(store)

    async def test_without_wal_there_is_no_store(self, path: pathlib.Path) -> None:
        """Where WAL cannot be had (some network file systems) the store refuses rather than lose commits."""

        def intercept(run: Any, sql: str) -> Any:
            return sqlite3.connect(":memory:").execute("SELECT 'delete'") if "journal_mode" in sql else None

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            with pytest.raises(StoreError, match="use a path on a local disk"):
                await begin(store)


class TestFile:
    @pytest.mark.core
    @pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
    async def test_only_the_owner_may_read(self, path: pathlib.Path) -> None:
        """The file and those beside it have mode 0600, whatever the umask; an existing file keeps its own."""
        before = os.umask(0)
        try:
            with SQLiteStore(path) as store:
                await begin(store)
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
                assert modes == {"runs.db": 0o600, "runs.db-wal": 0o600, "runs.db-shm": 0o600}
            path.chmod(0o640)
            with SQLiteStore(path) as store:
                await begin(store, if_exists="resume", if_running="take_over")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    async def test_nothing_is_opened_before_it_is_needed(self, path: pathlib.Path) -> None:
        """Making a store, loading from it and reading it make no file; reading says that there is none."""
        with SQLiteStore(path) as store:
            assert await store.load("run", "node") is None
            assert await store.load_typed("run", "node", State) is None
            for read in (
                store.list_runs,
                lambda: store.find_run("last"),
                lambda: store.get_run("run"),
                lambda: store.attempts("run"),
                lambda: store.input_of("run"),
            ):
                with pytest.raises(StoreError, match=rf"no such database: {path}"):
                    read()
        assert list(path.parent.iterdir()) == []
        path.touch()
        assert SQLiteStore(path).list_runs() == []

    async def test_a_relative_path_stays_the_same_file(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The path is taken when the store is made, with any character in it."""
        monkeypatch.chdir(tmp_path)
        name = "ru ns?mode=memory#%41é.db"
        with SQLiteStore(name) as store:
            (tmp_path / "sub").mkdir()
            monkeypatch.chdir("sub")
            await begin(store)
            assert [run.run_id for run in store.list_runs()] == ["run"]
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "sub"])

    async def test_two_stores_over_one_file(self, path: pathlib.Path) -> None:
        """Stores of one file in one process see each other's commits and do not disturb each other."""
        with SQLiteStore(path) as one, SQLiteStore(path) as two:
            sessions = [await begin(one, "a"), await begin(two, "b")]
            for position in range(20):
                await asyncio.gather(*(commit(session, position) for session in sessions))
            assert {run.run_id: run.nodes for run in one.list_runs()} == {"a": 20, "b": 20}
            assert await two.load_typed("a", "node", State) == State()


class TestReading:
    async def test_reading_does_not_wait_for_writers(self, store: SQLiteStore) -> None:
        """The command line may read at any time while runs are being written."""

        async def write() -> None:
            session = await begin(store)
            for position in range(200):
                await commit(session, position)

        writing = asyncio.ensure_future(write())
        seen = []
        while not writing.done():
            if os.path.exists(store.path):
                seen.append(await asyncio.to_thread(lambda: len(store.list_runs() and store.attempts("run"))))
            await asyncio.sleep(0)
        await writing
        assert seen == sorted(seen)


class TestUrls:
    def test_urls_and_paths_name_store(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
        """sqlite:///relative, sqlite:////absolute, a bare path and memory:// are understood."""
        monkeypatch.chdir(tmp_path)
        here = str(tmp_path)
        (tmp_path / "sub").mkdir()
        for url, expected in {
            "sqlite:///runs.db": f"{here}/runs.db",
            "sqlite:///sub/runs.db": f"{here}/sub/runs.db",
            "sqlite:////var/runs.db": "/var/runs.db",
            "SQLITE:///a%20b.db": f"{here}/a b.db",
            "a%20b.db": f"{here}/a%20b.db",
            "runs.db": f"{here}/runs.db",
            "/var/runs.db": "/var/runs.db",
        }.items():
            result = open_store(url)
            assert isinstance(result, SQLiteStore)
            assert (result.path, result.synchronous) == (expected, "full")
        normal = open_store("sqlite:///runs.db?synchronous=normal")
        assert isinstance(normal, SQLiteStore)
        assert normal.synchronous == "normal"
        assert isinstance(open_store(tmp_path / "x.db"), SQLiteStore)
        assert isinstance(open_store("memory://"), AsyncInMemoryStore)
        assert list(tmp_path.rglob("*")) == [tmp_path / "sub"]

    @pytest.mark.parametrize(
        ("url", "printed"),
        [
            ("mysql://host/db", "mysql:// stores are not available in this release"),
            ("sqlite://runs.db", "names no database file"),
            ("sqlite://", "names no database file"),
            ("sqlite:///:memory:", "memory://"),
            ("sqlite:///a.db?x=1", "use .synchronous=full"),
            ("sqlite:///a.db?synchronous=off", "use .synchronous=full"),
            ("sqlite:///a.db#x", "names no database file"),
            ("memory://x", "use .* memory://"),
            ("", "must name a file"),
            (":memory:", "AsyncInMemoryStore"),
        ],
    )
    def test_other_urls_are_refused(self, url: str, printed: str) -> None:
        """What is not understood is a ValueError that names the forms that are."""
        with pytest.raises(ValueError, match=printed):
            open_store(url)


def test_a_file_is_made_without_a_descriptor_left_open(path: pathlib.Path) -> None:
    """Closing a descriptor drops all locks of the process on a file: it is never left for later."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    file = sqlite_file.DatabaseFile(str(path), "full", sqlite_file.connect, 1.0)
    file.open().close()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert before == after
