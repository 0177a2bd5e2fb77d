"""SQLiteStore: what it promises, each promise with the fault that would break it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
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
from pydantic import BaseModel, Field
from tests.checkpoint.damage import loose, reseal
from tests.shared_stores import subclass_of

import stroma
from stroma import StromaRunner
from stroma.checkpoint import (
    AsyncCheckpointStore,
    AsyncInMemoryStore,
    CheckpointLost,
    CheckpointManager,
    CorruptCheckpoint,
    Fenced,
    JournalStore,
    RunRequest,
    StoreError,
    open_store,
)
from stroma.checkpoint.sqlite import SQLiteStore
from stroma.checkpoint.sqlite import file as sqlite_file
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage
from stroma.trace.events import AttemptRow, Failed

STARTS = itertools.count(1_700_000_000_000_000_000, 1_000_000)
SRC = str(pathlib.Path(stroma.__file__).parents[1])


class State(BaseModel):
    text: str = "a"
    n: int = 0


class Other(BaseModel):
    n: int


class Holds(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    thing: Any = None


SCHEMA = schema_of(State)


def row(
    position: int = 0,
    node: str = "node",
    *,
    attempt: int = 1,
    branch: str = "",
    tokens: int = 0,
    cost: float = 0.0,
    ms: int = 0,
    failure: FailureClass | None = None,
    message: str | None = None,
) -> AttemptRow:
    outcome: Any = "success" if failure is None else "failure"
    usage = AttemptUsage(tokens, tokens // 2, cost, "model" if tokens else None)
    failed = None if failure is None else Failed(failure, message or "", None, "KeyError")
    return AttemptRow(
        node,
        attempt,
        next(STARTS),
        ms * 1_000_000,
        (),
        None,
        outcome,
        failed,
        usage,
        position,
        branch,
        None,
        None,
        None,
        ms * 1_000_000,
    )


async def begin(store: Any, run_id: str = "run", state: BaseModel | None = None, **request: Any) -> Any:
    state = State() if state is None else state
    if request.pop("resume", False):
        request["if_exists"] = "resume"
    request.setdefault("if_running", "take_over")
    opened = store.open_run(RunRequest(run_id, "pipeline", state, schema_of(type(state)), **request))
    return await opened if inspect.isawaitable(opened) else opened


async def settle(pending: Any) -> None:
    if pending is not None:
        await pending


async def commit(session: Any, position: int, n: int = 0, node: str = "node", **facts: Any) -> None:
    await settle(session.record(row(position, node, **facts), SCHEMA, State(n=n)))


def restored(session: Any) -> dict[tuple[int, str], tuple[str, BaseModel]]:
    return {key: (result.node_id, SCHEMA.restore(result.output)) for key, result in session.restored.items()}


def raw(path: pathlib.Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10))


def child(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    """A process that runs code with this module's helpers at hand."""
    prelude = f"""
        import asyncio, importlib.util, os, sys
        spec = importlib.util.spec_from_file_location("helpers", {__file__!r})
        helpers = sys.modules["helpers"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        from helpers import *
    """
    text = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)],
        env={**os.environ, "PYTHONPATH": SRC},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


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


@pytest.fixture(params=["memory", "sqlite"])
def any_store(request: pytest.FixtureRequest, path: pathlib.Path) -> Iterator[Any]:
    if request.param == "memory":
        yield AsyncInMemoryStore()
    else:
        with SQLiteStore(path) as opened:
            yield opened


class TestExecutions:
    """Every store agrees with the one in memory about what an execution is."""

    async def test_typed_saving_and_loading(self, any_store: Any) -> None:
        """save_typed keeps an instance of the schema; load_typed refuses what is none, and schemas that are
        none."""
        await any_store.save_typed("run", "node", State(n=4), Other)
        assert await any_store.load("run", "node") == Other(n=4)
        await any_store.save("run", "node", State(text="x"))
        with pytest.raises(CorruptCheckpoint):
            await any_store.load_typed("run", "node", schema_misfit())
        for wrong in (dict, "State", None):
            with pytest.raises(TypeError, match="schema must be a BaseModel type"):
                await any_store.load_typed("run", "node", wrong)
            with pytest.raises(TypeError, match="schema must be a BaseModel type"):
                await any_store.save_typed("run", "node", State(), wrong)


def schema_misfit() -> type[BaseModel]:
    class Misfit(BaseModel):
        text: int

    return Misfit


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
                assert db.execute("SELECT count(*) FROM steps").fetchone() == (0,)
            release.set()
            await pending
            with raw(path) as db:
                assert db.execute("SELECT count(*) FROM steps").fetchone() == (1,)

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

    @pytest.mark.core
    async def test_an_attempt_is_kept_once_however_often_it_is_sent(self, path: pathlib.Path) -> None:
        """A commit that succeeded but whose acknowledgement was lost is not counted again when it is
        repeated."""
        lose = False

        def intercept(run: Any, sql: str) -> Any:
            if sql == "COMMIT" and lose:
                run()
                raise sqlite_error(sqlite3.SQLITE_PROTOCOL)

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            session = await begin(store)
            attempt = row(tokens=10, cost=0.1, ms=5)
            lose = True
            with pytest.raises(StoreError) as raised:
                await session.record(attempt, SCHEMA, State(n=1))
            assert raised.value.transient
            lose = False
            await session.record(attempt, SCHEMA, State(n=1))
            (entry,) = store.attempts("run")
            run = store.get_run("run")
            assert run is not None
            assert (run.tokens, run.cost_usd, run.nodes, entry.output) == (
                10,
                0.1,
                1,
                SCHEMA.encode(State(n=1)),
            )

    async def test_if_commit_fails_everybody_in_it_is_told(self, path: pathlib.Path) -> None:
        """A failed COMMIT fails each operation of its transaction with an error of its own, and keeps
        none."""
        fail = False

        def intercept(run: Any, sql: str) -> None:
            if sql == "BEGIN IMMEDIATE":
                time.sleep(0.05)  # Let them gather.
            if sql == "COMMIT" and fail:
                raise sqlite_error(sqlite3.SQLITE_FULL)

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            session = await begin(store)
            fail = True
            pending = [session.record(row(i), SCHEMA, State(n=i)) for i in range(20)]
            errors = await asyncio.gather(*pending, return_exceptions=True)
            assert all(type(error) is StoreError and "disk is full" in str(error) for error in errors)
            assert len(set(map(id, errors))) == 20
            fail = False
            await commit(session, 5)
            assert [a.position for a in store.attempts("run")] == [5]

    @pytest.mark.core
    async def test_one_refused_operation_does_not_harm_its_neighbours(self, store: SQLiteStore) -> None:
        """Operations share a transaction, but each is kept or refused by itself."""
        stale = await begin(store, "stale")
        await begin(store, "stale", if_exists="restart")
        good = await begin(store, "good")
        pending = [(stale if i % 2 else good).record(row(i), SCHEMA, State(n=i)) for i in range(20)]
        errors = await asyncio.gather(*pending, return_exceptions=True)
        assert [type(error) for error in errors] == [type(None), Fenced] * 10
        assert [a.position for a in store.attempts("good")] == list(range(0, 20, 2))
        assert store.attempts("stale") == []

    @pytest.mark.core
    async def test_repeats_and_replacements_among_many_commits(self, path: pathlib.Path) -> None:
        """In a batch of commits one may be kept already, another replace an output: each counts as it would
        alone."""
        gathered = threading.Event()

        def intercept(run: Any, sql: str) -> None:
            if sql == "BEGIN IMMEDIATE":
                gathered.wait(5)  # Until all of them are there.

        gathered.set()
        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            one, two = await begin(store, "one"), await begin(store, "two")
            repeated, failed = row(0, tokens=1), row(1, tokens=2, failure=FailureClass.RECOVERABLE)
            await one.record(repeated, SCHEMA, State(n=1))
            await one.record(failed, None, None)
            await commit(two, 0, 1, tokens=1)
            again = row(0, attempt=2, tokens=10)  # the same position, another attempt
            for first, strange in (
                (10, lambda: one.record(repeated, SCHEMA, State(n=1))),
                (20, lambda: one.record(failed, None, None)),
                (30, lambda: two.record(again, SCHEMA, State(n=2))),
            ):
                gathered.clear()
                pending = [one.record(row(first + i, tokens=100), SCHEMA, State(n=i)) for i in range(3)]
                pending.append(strange())
                pending += [two.record(row(first + i, tokens=100), None, None) for i in range(2)]
                gathered.set()
                await asyncio.gather(*pending)
            tokens = {run.run_id: run.tokens for run in store.list_runs()}
            assert tokens == {"one": 3 + 900, "two": 1 + 600 + 10}
            assert restored(await begin(store, "two", resume=True)) == {(0, ""): ("node", State(n=2))}
            result = restored(await begin(store, "one", resume=True))
            assert sorted(position for position, _ in result) == [0, 10, 11, 12, 20, 21, 22, 30, 31, 32]

    async def test_cancelling_a_caller_loses_no_commit(self, store: SQLiteStore) -> None:
        """Whoever awaits a commit may be cancelled at any instant: the output is kept, once."""
        session = await begin(store)
        for position in range(30):
            task = asyncio.ensure_future(commit(session, position, position))
            await asyncio.sleep(position * 0.00002)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await commit(session, 30)
        assert [a.position for a in store.attempts("run")] == list(range(31))

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
    async def test_a_replaced_file_fences_the_sessions_of_the_old_one(
        self, store: SQLiteStore, path: pathlib.Path
    ) -> None:
        """If the file is deleted while in use, nothing is acknowledged into the void; new runs get a new
        file."""
        stale = await begin(store)
        await commit(stale, 0)
        for file in path.parent.iterdir():
            file.unlink()
        with pytest.raises(CheckpointLost, match="was not deleted"):
            await commit(stale, 1)
        await commit(await begin(store, "new"), 0, 5)
        with pytest.raises(CheckpointLost):
            await commit(stale, 2)
        with raw(path) as db:
            assert db.execute("SELECT run_id FROM runs").fetchall() == [("new",)]


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
    @pytest.mark.parametrize("processes", [2, 8])
    def test_many_processes_write_one_file(self, path: pathlib.Path, processes: int) -> None:
        """2 and 8 processes that make and fill one new file together: every run complete, nothing lost or
        doubled."""
        running = [child(WRITER, path, f"process{i}") for i in range(processes)]
        complaints = [process.communicate(timeout=60)[1] for process in running]
        assert [process.returncode for process in running] == [0] * processes, complaints
        store = SQLiteStore(path)
        runs = store.list_runs(limit=1000)
        assert len(runs) == 4 * processes
        assert {(run.status, run.nodes, run.tokens, run.cost_usd) for run in runs} == {
            ("COMPLETED", 25, 25, 0.025)
        }
        for run in runs:
            assert [a.position for a in store.attempts(run.run_id)] == list(range(25))
        with raw(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    @pytest.mark.slow
    @pytest.mark.parametrize("acknowledged", [1, 40, 300])
    async def test_what_was_acknowledged_survives_sigkill(
        self, path: pathlib.Path, acknowledged: int
    ) -> None:
        """After kill -9 in mid-stream every acknowledged commit is there, totals agree, and runs can be
        resumed."""
        process = child(ENDLESS, path)
        assert process.stdout is not None
        assert process.stderr is not None
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
                assert run is not None
                session = await begin(store, run_id, resume=True)
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
    def test_a_forked_child_opens_the_file_anew(self, path: pathlib.Path) -> None:
        """After a fork both processes write, each through a connection and thread of its own."""
        code = """
            import gc

            async def write(store, run_id):
                session = await begin(store, run_id)
                for position in range(20):
                    await commit(session, position)

            store = SQLiteStore(sys.argv[1])
            unused = SQLiteStore(sys.argv[1])
            asyncio.run(write(store, "before"))
            asyncio.run(write(unused, "unused"))
            pid = os.fork()
            if pid == 0:
                del unused
                gc.collect()
                asyncio.run(write(store, "child"))
                store.close()
                sys.exit(0)
            asyncio.run(write(store, "parent"))
            assert os.waitpid(pid, 0)[1] == 0
            asyncio.run(write(store, "after"))
            asyncio.run(write(unused, "unused after"))
            store.close()
        """
        finish(child(code, path))
        runs = SQLiteStore(path).list_runs()
        assert {run.run_id: run.nodes for run in runs} == dict.fromkeys(
            ("before", "unused", "child", "parent", "after", "unused after"), 20
        )
        with raw(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

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
        finish(child(code, path))
        nodes = {run.run_id: run.nodes for run in SQLiteStore(path).list_runs()}
        assert {nodes[f"child-{number}"] for number in range(15)} == {3}
        with raw(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def test_a_copy_of_the_file_alone_is_whole_after_run_sync(self, path: pathlib.Path) -> None:
        """After ``run_sync`` and after ``aclose`` the database without its WAL has every run, whoever has it
        open."""
        store, other = SQLiteStore(path), SQLiteStore(path)
        runner = StromaRunner.quick(store=store)

        @runner.node("add", input=State, output=State)
        async def add(state: State) -> State:
            return State(n=state.n + 1)

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
    def test_the_thread_does_not_keep_the_interpreter_alive(self, path: pathlib.Path) -> None:
        """A program that forgets to close its store ends all the same, with everything kept."""
        code = """
            async def main():
                await commit(await begin(store), 0)

            store = SQLiteStore(sys.argv[1])
            asyncio.run(main())
        """
        finish(child(code, path))
        assert SQLiteStore(path).find_run("last") == ["run"]

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
        finish(child(code, path))


class TestThreads:
    async def test_several_event_loops_use_one_store(self, store: SQLiteStore) -> None:
        """Event loops in several threads write through one store at once; each is woken in its own loop."""

        async def work(i: int) -> None:
            session = await begin(store, f"run{i}")
            for position in range(20):
                await commit(session, position, i)

        await asyncio.gather(*(asyncio.to_thread(asyncio.run, work(i)) for i in range(6)), work(6))
        assert {(run.run_id, run.nodes) for run in store.list_runs()} == {(f"run{i}", 20) for i in range(7)}

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
        """Should the writer thread die, every operation that waits and every later one fails with a
        StoreError."""

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
        """A database that cannot grow is a named error; what was acknowledged stays, and it goes on with
        room."""
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
            assert run is not None
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

    async def test_a_lock_is_not_waited_for_for_ever(self, path: pathlib.Path) -> None:
        """At the end of its patience the store says that the database is locked, and works once it is
        free."""
        with subclass_of(SQLiteStore, _patience_seconds=0.2)(path) as store:
            session = await begin(store)
            attempt = row(tokens=1)
            with raw(path) as db:
                db.execute("BEGIN IMMEDIATE")
                with pytest.raises(
                    StoreError, match=r"database is locked: .* for 0\.2 s; end that process"
                ) as raised:
                    await session.record(attempt, SCHEMA, State())
                assert raised.value.transient
            await session.record(attempt, SCHEMA, State())
            assert len(store.attempts("run")) == 1

    async def test_a_damaged_output_is_never_handed_out(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """A flipped byte is CorruptCheckpoint that names run, position, node and the way out; and that way
        works."""
        session = await begin(store)
        for position in range(3):
            await commit(session, position, position, f"n{position}")
        with raw(path) as db:
            db.execute("UPDATE steps SET output = CAST(replace(output, '1', '7') AS BLOB) WHERE position = 1")
        damaged = (
            r"node 'n1' at position 1 of run 'run' is damaged; resume from that node \(resume_from='n1'\)"
        )
        with pytest.raises(CorruptCheckpoint, match=damaged):
            await begin(store, resume=True)
        with pytest.raises(CorruptCheckpoint, match=damaged):
            await store.load_typed("run", "n1", State)
        assert [(a.damaged, a.output is None) for a in store.attempts("run")] == [
            (False, False),
            (True, True),
            (False, False),
        ]
        await commit(session, 3)  # The refused resume has fenced nobody, and left no statement open.
        again = await begin(store, resume=True, discard_from=1)
        await commit(again, 1, 1, "n1")
        assert await store.load_typed("run", "n1", State) == State(n=1)

    async def test_a_damaged_input_or_saved_state_is_told(
        self, store: SQLiteStore, path: pathlib.Path
    ) -> None:
        """Checksums stand over inputs and saved states too, and data of another type is damage."""
        await begin(store)
        await store.save("run", "node", State())
        assert store.input_of("run") == SCHEMA.encode(State())
        with loose(path) as db:
            db.execute("UPDATE inputs SET input = 'text'")
            db.execute("UPDATE steps SET output = 5")
        with pytest.raises(CorruptCheckpoint, match="input of run 'run' is damaged"):
            store.input_of("run")
        with pytest.raises(CorruptCheckpoint, match="saved state of node 'node' in run 'run' is damaged"):
            await store.load("run", "node")

    @pytest.mark.parametrize("content", [b"not a database, but long enough to look at" * 50, b"short"])
    async def test_what_is_no_database_is_refused(self, path: pathlib.Path, content: bytes) -> None:
        """A file that is not SQLite is left alone; the error names it and what to do."""
        path.write_bytes(content)
        with SQLiteStore(path) as store:
            with pytest.raises(
                StoreError, match=r"runs\.db is not an SQLite database; use another path"
            ) as raised:
                await begin(store)
            assert not raised.value.transient
            with pytest.raises(StoreError, match="is not an SQLite database"):
                store.list_runs()
        assert path.read_bytes() == content
        assert len(list(path.parent.iterdir())) == 1

    async def test_a_database_of_another_program_is_refused(self, path: pathlib.Path) -> None:
        """Somebody else's SQLite file is not changed by a byte."""
        with raw(path) as db:
            db.execute("CREATE TABLE meta (k, v)")
        before = path.read_bytes()
        with SQLiteStore(path) as store:
            with pytest.raises(StoreError, match="of another program, not a stroma store"):
                await begin(store)
            with pytest.raises(StoreError, match="of another program"):
                store.list_runs()
        assert path.read_bytes() == before

    @pytest.mark.parametrize("make", [SQLiteStore, open_store, lambda path: open_store(f"sqlite:///{path}")])
    async def test_a_missing_directory_is_named(self, tmp_path: pathlib.Path, make: Any) -> None:
        """A path in a directory that does not exist is refused when the store is made; once it is there, the
        path is fine."""
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

    @pytest.mark.parametrize(
        ("code", "printed"),
        [
            (sqlite3.SQLITE_CORRUPT, "is damaged .* restore it from a backup"),
            (sqlite3.SQLITE_READONLY, "cannot write to"),
            (sqlite3.SQLITE_IOERR_WRITE, "free some space"),
            (sqlite3.SQLITE_ERROR, "injected"),
        ],
    )
    async def test_errors_of_sqlite_are_named(self, path: pathlib.Path, code: int, printed: str) -> None:
        """Whatever SQLite says comes out as a StoreError with the path and what to do, the cause attached."""

        def intercept(run: Any, sql: str) -> None:
            if sql == "BEGIN IMMEDIATE" and fail:
                raise sqlite_error(code)

        fail = False
        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            session = await begin(store)
            fail = True
            with pytest.raises(StoreError, match=printed) as raised:
                await commit(session, 0)
            assert str(path) in str(raised.value)
            assert isinstance(raised.value.__cause__, sqlite3.OperationalError)

    async def test_an_output_that_is_too_large_for_a_row(self, path: pathlib.Path) -> None:
        """An output beyond SQLite's limit is refused once, with the way out, and nothing else is harmed."""

        def connect(uri: str) -> sqlite3.Connection:
            db = sqlite_file.connect(uri)
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
            return db

        with subclass_of(SQLiteStore, _open_file=staticmethod(connect))(path) as store:
            session = await begin(store)
            with pytest.raises(StoreError, match="pass blobs= to the store") as raised:
                await settle(session.record(row(0), SCHEMA, State(text="x" * 60_000)))
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

    async def test_a_file_that_is_made_meanwhile_is_ours(self, path: pathlib.Path) -> None:
        """Whoever looks at a file while another process makes it takes it for what it becomes."""
        looks = itertools.count()

        def intercept(run: Any, sql: str) -> Any:
            if ("sqlite_master" not in sql and "application_id" not in sql) or next(looks):
                return None
            seen = run().fetchone()
            sqlite_file.DatabaseFile(str(path), "full", sqlite_file.connect, 1.0).open().close()
            return sqlite3.connect(":memory:").execute("SELECT ?", seen)

        with subclass_of(SQLiteStore, _open_file=staticmethod(faulty(intercept)))(path) as store:
            await begin(store)

    @pytest.mark.slow
    async def test_a_file_whose_maker_died_can_be_read(self, path: pathlib.Path) -> None:
        """What a process leaves behind that is killed while it makes the file hinders no reader, and no
        writer."""
        code = (
            "import os, sqlite3, sys\n"
            "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('PRAGMA cache_size=1')\n"
            "db.execute('BEGIN')\n"
            "for i in range(50): db.execute(f'CREATE TABLE t{i} (x)')\n"
            "os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert pathlib.Path(f"{path}-journal").stat().st_size > 0
        with SQLiteStore(path) as store:
            assert store.list_runs() == []
            await begin(store)

    async def test_without_wal_there_is_no_store(self, path: pathlib.Path) -> None:
        """Where WAL cannot be had (some network file systems), the store refuses instead of losing
        commits."""

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
                await begin(store, resume=True)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    @pytest.mark.core
    async def test_durability_is_set_as_asked(self, tmp_path: pathlib.Path) -> None:
        """The default is WAL with synchronous=FULL; "normal" must be asked for, and nothing else exists."""

        async def pragmas(store: SQLiteStore) -> tuple[Any, ...]:
            names = ("journal_mode", "synchronous", "busy_timeout", "trusted_schema")
            return await store._submit(
                lambda rows: tuple(rows.db.execute(f"PRAGMA {n}").fetchone()[0] for n in names)
            )

        with SQLiteStore(tmp_path / "a") as full, SQLiteStore(tmp_path / "b", synchronous="normal") as normal:
            assert await pragmas(full) == ("wal", 2, 0, 0)
            assert await pragmas(normal) == ("wal", 1, 0, 0)
        with pytest.raises(ValueError, match='must be "full" or "normal"'):
            SQLiteStore(tmp_path / "c", synchronous="off")

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


class TestIds:
    @pytest.mark.parametrize("wrong", ["", "a\0b", "\ud800", 5])
    async def test_what_is_no_id_is_refused(self, store: SQLiteStore, wrong: Any) -> None:
        """Empty, NUL, lone surrogates and what is no text are a ValueError everywhere."""
        with pytest.raises(ValueError):
            store.open_run(RunRequest(wrong, "p", State(), SCHEMA))
        for call in (
            lambda: store.save(wrong, "node", State()),
            lambda: store.save("run", wrong, State()),
            lambda: store.load("run", wrong),
            lambda: store.load_typed(wrong, "node", State),
            lambda: store.delete(wrong),
        ):
            with pytest.raises(ValueError):
                await call()
        for read in (store.get_run, store.attempts, store.input_of, store.find_run):
            with pytest.raises(ValueError):
                read(wrong)


class TestReading:
    async def test_a_prefix_finds_runs(self, store: SQLiteStore) -> None:
        """find_run takes a prefix literally, prefers a whole id, and knows "last"."""
        for name in ("a", "ab", "aB", "a%c", "a_c", "a\U0010ffffx"):
            await begin(store, name)
            await asyncio.sleep(0.002)
        assert store.find_run("a") == ["a"]
        assert store.find_run("ab") == ["ab"]
        assert store.find_run("a%") == ["a%c"]
        assert store.find_run("a_") == ["a_c"]
        assert store.find_run("a\U0010ffff") == ["a\U0010ffffx"]
        assert store.find_run("%") == store.find_run("b") == []
        assert store.find_run("last") == ["a\U0010ffffx"]
        await begin(store, "b1")
        await begin(store, "b2")
        assert sorted(store.find_run("b")) == ["b1", "b2"]
        assert len(store.find_run("b", limit=1)) == 1

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

    async def test_stored_data_imports_nothing(self, store: SQLiteStore, path: pathlib.Path) -> None:
        """load looks its class up among imported modules only (G11); load_typed does not need it."""
        await store.save("run", "node", State(n=1))
        for ref, printed in (
            ("this:Zen", "not imported"),
            ("os:path", "not a BaseModel"),
            ("os:no", "has no"),
        ):
            with raw(path) as db:
                db.execute("UPDATE steps SET schema_ref = ?", (ref,))
                reseal(db)
            with pytest.raises(StoreError, match=rf"{printed}.*load_typed"):
                await store.load("run", "node")
        assert "this" not in sys.modules
        assert await store.load_typed("run", "node", State) == State(n=1)


class TestUrls:
    def test_urls_and_paths_name_stores(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ) -> None:
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


async def test_the_store_speaks_both_protocols(store: SQLiteStore) -> None:
    """CheckpointManager takes it for a journal, and as an async store of the simple protocol."""
    assert isinstance(store, JournalStore)
    assert isinstance(store, AsyncCheckpointStore)
    manager = CheckpointManager(store)
    await manager.checkpoint("run", "node", State(n=3))
    assert await manager.resume("run", "node", State) == State(n=3)
    await manager.clear("run")
    assert await manager.resume("run", "node", State) is None


async def test_states_come_back_as_they_were(store: SQLiteStore) -> None:
    """What JSON cannot say (bytes, NaN, sets) survives a commit and a resume."""

    class Rich(BaseModel):
        data: bytes
        numbers: set[int] = Field(default_factory=lambda: {1, 2})
        infinite: float = float("inf")
        nested: dict[str, list[State]] = Field(default_factory=lambda: {"a": [State()]})

    schema, state = schema_of(Rich), Rich(data=b"\xff\0")
    session = await begin(store, state=state)
    await session.record(row(), schema, state)
    again = await begin(store, state=state, resume=True)
    assert schema.restore(again.restored[0, ""].output) == state
    assert await store.load_typed("run", "node", Rich) == state


def test_a_file_is_made_without_a_descriptor_left_open(path: pathlib.Path) -> None:
    """Closing a descriptor drops all locks of the process on a file: the one that makes it is never left for
    later."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    file = sqlite_file.DatabaseFile(str(path), "full", sqlite_file.connect, 1.0)
    file.open().close()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert before == after
