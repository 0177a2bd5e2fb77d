"""RedisStore and SyncRedisStore: what they promise, each promise with the fault that would break it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from tests.kit import node, quick_without_retries
from tests.servers import RedisServer, proxied, shared_redis
from tests.shared_stores import subclass_of
from tests.store_suite.journal import (
    JournalStoreTests,
    State,
    begin,
    commit,
    fail,
    finish,
    restored,
    row,
    settled,
)
from tests.store_suite.machine import JournalStoreMachine
from tests.tiers import examples

from stroma.checkpoint import (
    CheckpointLost,
    CorruptCheckpoint,
    Fenced,
    RunBusy,
    RunRequest,
    StoreError,
    Waiting,
    open_store,
)
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Annotation, Rows
from stroma.checkpoint.queue import ClaimRequest, QueueEntry, RunLimits, ServedCode
from stroma.checkpoint.redis import reader as redis_reading
from stroma.checkpoint.redis.format import annotations_key
from stroma.checkpoint.redis.store import RedisStore, SyncRedisStore
from stroma.contracts.schema import schema_of

SCHEMA = schema_of(State)
#: Keys that have all runs, and no run that waits.
OF_ALL = ("format", "runs", "ids", "ended")
#: Key of the input, after the prefix of a run.
INPUT = annotations_key(Annotation.INPUT)


@pytest.fixture
def server() -> RedisServer:
    """The shared server, empty."""
    result = shared_redis()
    result.execute("FLUSHALL")
    return result


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    async with RedisStore(server.url) as store:
        yield store


class TestJournal(JournalStoreTests):
    @pytest.fixture
    async def other(self, server: RedisServer, store: RedisStore) -> AsyncIterator[RedisStore]:
        async with RedisStore(server.url) as other:
            yield other


@pytest.mark.nightly  # The plain calls send what the others send.
class TestSyncJournal(JournalStoreTests):
    @pytest.fixture
    def store(self, server: RedisServer) -> Iterator[SyncRedisStore]:
        with SyncRedisStore(server.url) as store:
            yield store

    @pytest.fixture
    async def other(self, server: RedisServer, store: SyncRedisStore) -> AsyncIterator[RedisStore]:
        async with RedisStore(server.url) as other:
            yield other


class _Model(JournalStoreMachine):
    kind: Any = RedisStore
    flushed = False

    def make_store(self) -> Any:
        server = shared_redis()
        if not self.flushed:
            self.flushed = True
            server.execute("FLUSHALL")
        return self.kind(server.url)


class _SyncModel(_Model):
    kind = SyncRedisStore


TestModel = _Model.TestCase
TestModel.settings = examples(30, stateful_step_count=30)
TestSyncModel = pytest.mark.nightly(_SyncModel.TestCase)
TestSyncModel.settings = examples(10, stateful_step_count=30)


def later(seconds: float, call: Any) -> threading.Thread:
    thread = threading.Timer(seconds, call)
    thread.start()
    return thread


@contextlib.contextmanager
def replicated() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary, and a replica that is up to date."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with RedisServer(port=str(port)) as primary, RedisServer() as replica:
        replica.execute("REPLICAOF", "127.0.0.1", port)
        deadline = time.monotonic() + 60
        while replica.execute("INFO", "replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline, "the replica does not come up"
            time.sleep(0.02)
        yield primary, replica


async def submit(store: RedisStore, operation: Callable[[Rows], None]) -> None:
    await store._submit(Transaction("run", operation))


def keys(server: RedisServer) -> set[str]:
    return {key.decode() for key in server.execute("KEYS", "*")}


class TestCrash:
    async def test_nothing_acknowledged_is_lost_with_the_server(self) -> None:
        """With appendfsync always, SIGKILL of the server between commits loses none; the session goes on."""
        with RedisServer() as server:
            async with RedisStore(server.url) as store:
                session = await begin(store)
                for position in range(8):
                    await commit(session, position, State(n=position), tokens=1)
                    if position % 3 == 0:
                        server.kill()
                        started = later(0.1 * (position % 2), server.start)
                        await commit(session, position, State(n=position), branch="0", tokens=1)
                        await asyncio.to_thread(started.join)
                server.kill()
                server.start()
                again = await begin(store, if_exists="resume", if_running="take_over")
                children = {(p, "0"): State(n=p) for p in (0, 3, 6)}
                assert restored(again) == {**{(p, ""): State(n=p) for p in range(8)}, **children}
                assert again.prior.tokens == 11 == len(store.attempts("run"))

    async def test_nothing_is_lost_or_doubled_in_mid_stream(self) -> None:
        """The server dies at random while eight runs commit: each attempt is there once, without errors."""
        with RedisServer() as server:

            async def one(store: RedisStore, i: int) -> None:
                session = await begin(store, f"run {i}")
                for position in range(40):
                    await commit(session, position, State(n=position), tokens=1)
                    await asyncio.sleep(random.uniform(0, 0.02))
                await finish(session)

            async def saboteur() -> None:
                for _ in range(6):
                    await asyncio.sleep(random.uniform(0.02, 0.15))
                    server.kill()
                    await asyncio.to_thread(server.start)

            async with RedisStore(server.url) as store:
                await asyncio.gather(*(one(store, i) for i in range(8)), saboteur())
                for run in store.list_runs():
                    assert (run.status, run.nodes, run.tokens, run.execution) == ("COMPLETED", 40, 40, 1)
                    assert [a.position for a in store.attempts(run.run_id)] == list(range(40))

    async def test_without_aof_the_loss_is_noticed(self) -> None:
        """A server that keeps nothing on its disk comes back empty: CheckpointLost, and no silent restart."""
        with RedisServer(appendonly="no") as server:
            async with RedisStore(server.url) as store:
                session = await begin(store)
                await commit(session, 0, State(n=1))
                server.kill()
                server.start()
                with pytest.raises(CheckpointLost, match=r"set appendonly yes.*delete\('run'\)") as raised:
                    await commit(session, 1, State(n=2))
                assert not raised.value.transient
                with pytest.raises(CheckpointLost):
                    await finish(session)
                assert not server.execute("EXISTS", "stroma:{run}:run")

    async def test_a_flush_is_noticed(self, store: RedisStore, server: RedisServer) -> None:
        """FLUSHALL under a session is CheckpointLost, also if somebody else's run stands there since."""
        session, other = await begin(store), await begin(store, "other")
        server.execute("FLUSHALL")
        with pytest.raises(CheckpointLost):
            await commit(session, 0, State())
        with pytest.raises(CheckpointLost):
            await finish(other)
        fresh = await begin(store)
        assert fresh.execution == 1
        with pytest.raises(Fenced):
            await commit(session, 0, State())
        await commit(fresh, 0, State())

    async def test_lost_writes_are_noticed(self, store: RedisStore, server: RedisServer) -> None:
        """A replica that took over without the last writes is older than what the session was told."""
        session = await begin(store)
        await commit(session, 0, State(n=1))
        before = {key: server.execute("DUMP", key) for key in server.execute("KEYS", "*")}
        await commit(session, 1, State(n=2))
        for key in server.execute("KEYS", "*"):
            server.execute("DEL", key)
        for key, value in before.items():
            server.execute("RESTORE", key, 0, value)
        with pytest.raises(CheckpointLost):
            await commit(session, 2, State(n=3))
        again = await begin(store, if_exists="resume", if_running="take_over")
        assert restored(again) == {(0, ""): State(n=1)}
        await commit(again, 1, State(n=2))

    async def test_an_epoch_that_was_lost_is_noticed(self, store: RedisStore, server: RedisServer) -> None:
        """If the server forgot a takeover, that session does not hear it was fenced off."""
        (await begin(store)).abandon()
        before = {key: server.execute("DUMP", key) for key in server.execute("KEYS", "*")}
        session = await begin(store, if_exists="resume")
        for key, value in before.items():
            server.execute("RESTORE", key, 0, value, "REPLACE")
        with pytest.raises(CheckpointLost):
            await commit(session, 0, State())

    @pytest.mark.parametrize("loses", [False, True])
    async def test_a_failover(self, loses: bool) -> None:
        """A replica that has everything is used on; one without the last commits is CheckpointLost first."""
        with replicated() as (primary, replica), proxied(primary) as proxy:
            async with RedisStore(proxy.url) as store:
                session = await begin(store)
                await commit(session, 0, State(n=1))
                assert primary.execute("WAIT", 1, 20_000) == 1
                replica.execute("REPLICAOF", "NO", "ONE")
                if loses:
                    await commit(session, 1, State(n=2))  # Of this one the replica never hears.
                proxy.target = replica.socket
                primary.kill()
                if loses:
                    with pytest.raises(CheckpointLost, match="lost in a crash or failover"):
                        await commit(session, 2, State(n=3))
                    with pytest.raises(CheckpointLost):
                        await finish(session)
                    session = await begin(store, if_exists="resume", if_running="take_over")
                    assert restored(session) == {(0, ""): State(n=1)}
                await commit(session, 1, State(n=2))
                await finish(session)
                assert [a.position for a in store.attempts("run")] == [0, 1]

    @pytest.mark.parametrize("part", ["run", INPUT, "steps:1", "attempts:1", "identities:1"])
    async def test_a_part_that_was_evicted_is_noticed(
        self, store: RedisStore, server: RedisServer, part: str
    ) -> None:
        """Whichever key of a run is gone: its session and every resume learn it, until it is deleted."""
        session = await begin(store)
        session.note_call(0, "a#0")
        await commit(session, 0, State(n=1))
        assert server.execute("DEL", f"stroma:{{run}}:{part}") == 1
        with pytest.raises(CheckpointLost):
            await commit(session, 1, State(n=2))
        for _ in range(2):
            with pytest.raises(CheckpointLost):
                await begin(store, if_exists="resume", if_running="take_over")
            store.list_runs()
        await store.delete("run")
        fresh = await begin(store, if_exists="resume")
        assert (fresh.execution, restored(fresh)) == (1, {})
        await commit(fresh, 0, State())

    async def test_eviction_is_noticed(self) -> None:
        """With allkeys-lru and little memory, runs are evicted: never does one begin anew without a word."""
        with RedisServer(**{"maxmemory": "4mb", "maxmemory-policy": "allkeys-lru"}) as server:
            async with RedisStore(server.url) as store:
                sessions = [await begin(store, f"run {i}") for i in range(10)]
                for session in sessions:
                    await commit(session, 0, State(text="x" * 20_000))
                outputs = [f"stroma:{{run%20{i}}}:steps:1" for i in range(10)]
                for i in range(1000):
                    server.execute("SET", f"filler {i}", "x" * 20_000)
                    if server.execute("EXISTS", *outputs) < 10:
                        break
                gone = known = 0
                for i in range(10):
                    prefix = f"stroma:{{run%20{i}}}:"
                    if server.execute("EXISTS", f"{prefix}steps:1"):
                        continue
                    gone += 1
                    with pytest.raises(CheckpointLost):
                        await commit(sessions[i], 1, State())
                    # Nobody can know of what left no trace at all.
                    parts = [f"{prefix}{part}" for part in ("run", INPUT, "attempts:1")]
                    if server.execute("EXISTS", *parts, "stroma:ids"):
                        known += 1
                        with pytest.raises(CheckpointLost):
                            await begin(store, f"run {i}", if_exists="resume", if_running="take_over")
                assert gone
                assert known

    async def test_a_full_server_loses_nothing(self) -> None:
        """Out of memory under noeviction is a transient StoreError that says so, with nothing half done."""
        with RedisServer() as server:
            async with RedisStore(server.url) as store:
                session = await begin(store)
                await commit(session, 0, State(n=1), tokens=1)
                server.execute("CONFIG", "SET", "maxmemory", "1")
                attempt = row(1, tokens=1, output=("", 2, 0.0, b""))
                with pytest.raises(StoreError, match="out of memory; raise maxmemory") as raised:
                    await session.record(attempt, SCHEMA, State(n=2))
                assert raised.value.transient
                assert (store.get_run("run").tokens, len(store.attempts("run"))) == (1, 1)
                await store.delete("nobody")
                server.execute("CONFIG", "SET", "maxmemory", "0")
                await session.record(attempt, SCHEMA, State(n=2))
                assert (store.get_run("run").tokens, len(store.attempts("run"))) == (2, 2)


class TestAmbiguous:
    """The connection breaks, and nobody knows whether what was sent was done."""

    @pytest.mark.parametrize("lose", ["request", "reply"])
    @pytest.mark.parametrize("together", [1, 5])
    async def test_a_commit(self, server: RedisServer, lose: str, together: int) -> None:
        """The commit is sent again, and kept once."""
        with proxied(server) as proxy:
            async with RedisStore(proxy.url) as store:
                session = await begin(store)
                await commit(session, 0, State(n=0), tokens=1)
                broken: list[bytes] = []

                def check(data: bytes) -> bool:
                    if not broken:
                        broken.append(data)
                        return False
                    return True

                setattr(proxy, f"on_{lose}", check)
                await asyncio.gather(
                    *(commit(session, p, State(n=p), tokens=1) for p in range(1, 1 + together))
                )
                assert broken
                run = store.get_run("run")
                assert (run.tokens, run.nodes) == (1 + together, 1 + together)
                assert [a.position for a in store.attempts("run")] == list(range(1 + together))

    async def test_every_operation(self, server: RedisServer) -> None:
        """Whatever reply gets lost, of whatever call: each is done once, and the run has one execution."""
        for lost in range(25):
            server.execute("FLUSHALL")
            with proxied(server) as proxy:
                count = iter(range(1000))

                def check(data: bytes, count: Iterator[int] = count, lost: int = lost) -> bool:
                    return next(count) != lost

                proxy.on_reply = check
                async with RedisStore(proxy.url) as store:
                    session = await begin(store)
                    await commit(session, 0, State(n=1), tokens=1)
                    await fail(session, 1, tokens=1)
                    await finish(session, "PARTIAL")
                    again = await begin(store, if_exists="resume", discard_from=1)
                    await commit(again, 1, State(n=2), tokens=1)
                    await finish(again, "RESUMED")
                    run = store.get_run("run")
                    assert (run.status, run.execution, run.nodes, run.tokens) == ("RESUMED", 1, 2, 3)
                    assert len(store.attempts("run")) == 3
                    await store.save("saved", "node", State(n=5))
                    assert await store.load_typed("saved", "node", State) == State(n=5)
                    await store.delete("run")
                    assert store.list_runs() == []

    async def test_a_stopped_server(self, server: RedisServer) -> None:
        """A server that does not answer holds nobody for ever; once it does, the commit is there once."""
        async with RedisStore(f"{server.url}?socket_timeout=0.2") as store:
            session = await begin(store)
            server.pause()
            started = later(0.7, server.resume)
            await commit(session, 0, State(n=1), tokens=1)
            started.join()
            assert [a.tokens for a in store.attempts("run")] == [1]

    async def test_a_server_that_is_not_there(self, server: RedisServer) -> None:
        """After the patience a transient StoreError names host and database, never the password."""
        store = subclass_of(RedisStore, _patience_seconds=0.2)("redis://me:secret@127.0.0.1:1/3")
        waiting = [store.save(f"r{i}", "n", State()) for i in range(5)]
        before = time.monotonic()
        errors = await asyncio.gather(*waiting, begin(store), return_exceptions=True)
        assert time.monotonic() - before < 2  # Not one after another.
        assert len(set(map(id, errors))) == 6
        for error in errors:
            assert isinstance(error, StoreError)
            assert error.transient
            assert "cannot reach redis://127.0.0.1:1/3" in str(error)
            assert "start the server, or correct the URL" in str(error)
            assert "secret" not in f"{error} {store!r}"
        with pytest.raises(StoreError, match="cannot reach"):
            store.list_runs()
        sync = subclass_of(SyncRedisStore, _patience_seconds=0.1)("redis://127.0.0.1:1")
        with pytest.raises(StoreError, match=r"cannot reach redis://127\.0\.0\.1:1/0"):
            sync.save("r", "n", State())
        await store.aclose()

    async def test_a_fork(self, server: RedisServer) -> None:
        """A fork is one transaction: whichever reply gets lost, there is one new run, whole; or none."""
        for lost in range(6):
            server.execute("FLUSHALL")
            with proxied(server) as proxy:
                async with RedisStore(proxy.url) as store:
                    session = await begin(store)
                    for position in range(4):
                        await commit(session, position, State(n=position))
                    await finish(session)
                    count = iter(range(1000))
                    proxy.on_reply = lambda data, count=count, lost=lost: next(count) != lost
                    await store.fork("run", "new", 3, edited=(SCHEMA, State(n=20)))
                    run = store.get_run("new")
                    assert (run.status, run.parent, run.nodes, run.execution) == ("INTERRUPTED", "run", 3, 1)
                    assert await store.load_typed("new", "node", State) == State(n=20)
                    forked = await begin(store, "new", if_exists="resume")
                    assert list(restored(forked).values()) == [State(n=0), State(n=1), State(n=20)]

    async def test_what_a_node_waits_for(self, server: RedisServer) -> None:
        """An attempt that waits and what it waits for are kept together, or neither after a takeover."""
        with proxied(server) as proxy:
            async with RedisStore(proxy.url) as store:
                stale = await begin(store)
                lose = iter([False])
                proxy.on_reply = lambda data: next(lose, True)
                request = Waiting(0, "", "node", "may I?", "")
                await stale.suspend(row(0, tokens=3), request)
                assert (len(store.attempts("run")), store.waiting("run")) == (1, [request])
                owner = await begin(store, if_exists="resume", if_running="take_over")
                assert dict(owner.waiting) == {(0, ""): request}
                with pytest.raises(Fenced):
                    await stale.suspend(row(1), Waiting(1, "", "node", "late", ""))
                assert (len(store.attempts("run")), store.waiting("run")) == (1, [request])

    async def test_an_answer_that_arrives_while_the_question_is_repeated_stays(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An answer between the read and the write of a repeated question is not overwritten."""
        from stroma.checkpoint.durable import session

        question = Waiting(0, "", "node", "may I?", "")
        answered = question._replace(payload=b'{"n": 1}')
        put_waiting, answers = session.put_waiting, iter([answered])

        async with RedisStore(server.url) as store, RedisStore(server.url) as other:
            owner = await begin(store)
            await owner.suspend(row(0), question)

            def interrupted(*args: Any) -> Waiting:
                result = put_waiting(*args)
                if (arrived := next(answers, None)) is not None:
                    asyncio.run(other.signal("run", arrived))
                return result

            monkeypatch.setattr(session, "put_waiting", interrupted)
            await owner.suspend(row(1), question)
            (stored,) = store.waiting("run")
            assert stored._replace(answered_ms=0) == answered

    async def test_an_operation_is_repeated_if_the_row_has_changed_since_it_was_read(
        self, server: RedisServer
    ) -> None:
        """A due time that another process sets between the read and the write of an operation is read."""
        read: list[int | None] = []

        async with RedisStore(server.url) as store, RedisStore(server.url) as other:
            await finish(await begin(store), "PARTIAL")

            def wake(rows: Rows) -> None:
                run = rows.find("run", lock=True)
                assert run is not None
                rows.wake(run, 5)

            def forget(rows: Rows) -> None:
                run = rows.find("run", lock=True)
                assert run is not None
                read.append(run.wake_ms)
                if len(read) == 1:
                    asyncio.run(submit(other, wake))
                rows.wake(run, None)

            await submit(store, forget)
            assert read == [None, 5]


class TestOwners:
    async def test_leases_go_by_the_clock_of_the_server(self, store: RedisStore, server: RedisServer) -> None:
        """A silent holder loses the run when its lease ends; while it lives the lease is renewed."""
        session = await begin(store, lease_seconds=0.6)
        await asyncio.sleep(1.0)
        run = store.get_run("run")
        assert run.holder is not None
        # Another host that died without a word: nobody renews, and no process id can be looked up.
        owner = server.execute("HGET", "stroma:{run}:run", "owner").decode()
        server.execute("HSET", "stroma:{run}:run", "owner", "elsewhere|boot|1|1|1|token")
        with pytest.raises(RunBusy, match="process 1 on elsewhere"):
            await begin(store)
        await asyncio.sleep(0.8)
        assert (await begin(store, if_exists="restart")).execution == 2
        assert owner
        with pytest.raises(Fenced):
            await commit(session, 0, State())

    async def test_a_session_of_a_deleted_run(self, store: RedisStore, server: RedisServer) -> None:
        """A deleted run leaves no key of its own, and its session writes nothing more."""
        session = await begin(store)
        await store.delete("run")
        with pytest.raises(CheckpointLost, match="was deleted"):
            await commit(session, 0, State())
        with pytest.raises(CheckpointLost, match="was deleted"):
            await finish(session)
        assert keys(server) == {"stroma:format"}

    async def test_lists_of_waiting_runs(self, store: RedisStore, server: RedisServer) -> None:
        """A run is in the lists that its status, times, key and version say, and in none once it ended."""
        later = time.time_ns() // 1_000_000 + 60_000

        def lists() -> set[str]:
            return {key for key in keys(server) if "{" not in key} - {f"stroma:{name}" for name in OF_ALL}

        request = RunRequest("run", "p", State(), SCHEMA, version="1")
        await store.submit(request, QueueEntry(later, 3, "k", later))
        lane = "p\0001"
        assert lists() == {f"stroma:later:{lane}"}
        await store.reopen("run")
        queued = {f"stroma:queue:3:{lane}:k", f"stroma:queuekeys:{lane}"}
        assert lists() == queued
        await store.pause("run")
        assert lists() == set()
        await store.unpause("run")
        await store.block("run", "changed", "code", None, later)
        assert lists() == {f"stroma:blocked:{lane}"}
        await store.reopen("run")
        claim = ClaimRequest("t", 30.0, 1, later + 1, {"p": RunLimits()}, code={"p": ServedCode(("1",))})
        await store.claim(claim)
        assert lists() == {*queued, "stroma:live:p"}
        for version in ("", "2"):
            session = await store.open_run(
                request._replace(if_exists="restart", if_running="take_over", version=version)
            )
            lane = f"p\0{version}" if version else "p"
            assert lists() == {"stroma:live:p", f"stroma:due:{lane}"}
        await finish(session, "FAILED")
        assert lists() == set()

    async def test_another_format_is_refused(self, store: RedisStore, server: RedisServer) -> None:
        """Data of another release is neither read nor written, and the message says so."""
        await begin(store)
        server.execute("SET", "stroma:format", "99")
        before = {key: server.execute("DUMP", key) for key in keys(server)}
        for call in (lambda other: other.list_runs(), lambda other: begin(other, "other")):
            with RedisStore(server.url) as other:
                for _ in range(2):
                    with pytest.raises(StoreError, match="has format 99, and this release has") as refused:
                        await settled(call(other))
                assert not refused.value.transient
        assert {key: server.execute("DUMP", key) for key in keys(server)} == before


class TestExpiry:
    async def test_only_finished_runs_expire(self, server: RedisServer) -> None:
        """No key of a run that goes on or can be resumed has an expiry; of a finished one all go at once."""
        async with RedisStore(server.url, ttl_seconds=60) as store:

            def expiries() -> set[int]:
                names = {key for key in keys(server) if key.startswith("stroma:{run}")}
                assert len(names) >= 2
                return {server.execute("PTTL", key) for key in names}

            session = await begin(store)
            await commit(session, 0, State())
            assert expiries() == {-1}
            for status in ("PARTIAL", "FAILED", "INTERRUPTED", "CANCELLED"):
                await finish(session, status)
                assert expiries() == {-1}
                session = await begin(store, if_exists="resume")
            await finish(session, "COMPLETED")
            assert all(55_000 < left <= 60_000 for left in expiries())
            assert max(left := expiries()) - min(left) < 5_000  # They are asked for one after another.
            # Taken up again, it stays again, and so do its earlier executions.
            session = await begin(store)
            assert expiries() == {-1}
            await commit(session, 0, State())
            await finish(session, "RESUMED")
            assert all(55_000 < left <= 60_000 for left in expiries())
            again = await begin(store, if_exists="resume")
            assert expiries() == {-1}
            assert restored(again) == {(0, ""): State()}

    async def test_many_runs_are_looked_at_a_part_at_a_time(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Lists and beginnings say the same where there are too many runs to look at at once."""
        ids = [f"{'ab'[i % 2]}{i}" for i in range(9)] + ["a", "a:%", "é", "ab*"]
        async with RedisStore(server.url) as store:
            for number, run_id in enumerate(ids):
                session = await begin(store, run_id)
                if number % 3 == 0:
                    await finish(session, "FAILED")
                await asyncio.sleep(0.001)  # Their order is that of their starts.

            def read_replies() -> list[Any]:
                runs = [
                    [run.run_id for run in store.list_runs(limit=limit, status=status)]
                    for limit in (1, 2, 50)
                    for status in ("FAILED", "RUNNING", "COMPLETED", None)
                ]
                beginnings = [
                    store.find_run(beginning, limit=limit)
                    for limit in (1, 2, 50)
                    for beginning in ("a", "b", "a:", "é", "c", "a1")
                ]
                return runs + beginnings

            known = read_replies()
            for page, looked_at in ((200, 1), (2, 4), (1, 3)):
                monkeypatch.setattr(redis_reading, "PAGE", page)
                monkeypatch.setattr(redis_reading, "_MAX_EXAMINED", looked_at)
                assert read_replies() == known
            assert known[2] == []
            assert known[8] == ids[::-3]
            assert known[-6] == ["a"]

    async def test_what_expired_is_gone_from_the_lists(self, server: RedisServer) -> None:
        """A run that has expired is a run that never was; it is dropped from the lists when they are read."""
        async with RedisStore(server.url, ttl_seconds=1) as store:
            for run_id in ("a1", "a2"):
                session = await begin(store, run_id)
                await commit(session, 0, State())
                await finish(session)
            await begin(store, "a3")
            assert len(store.list_runs()) == 3
            await asyncio.sleep(1.2)
            assert store.find_run("a") == ["a3"]
            assert [run.run_id for run in store.list_runs()] == ["a3"]
            assert store.get_run("a1") is None
            assert not keys(server) & {"stroma:ended"}
            assert server.execute("ZRANGE", "stroma:ids", 0, -1) == [b"a3"]
            assert (await begin(store, "a1", if_exists="resume")).execution == 1

    async def test_what_is_saved_expires(self, server: RedisServer) -> None:
        """save() sets the ttl each time, of each node; None keeps it, longer than others' states."""
        async with RedisStore(server.url, 1) as brief, RedisStore(server.url, None) as lasting:
            await brief.save("run", "a", State(n=1))
            await asyncio.sleep(0.7)
            await brief.save("run", "b", State(n=2))
            assert await brief.load_typed("run", "a", State) == State(n=1)
            await asyncio.sleep(0.5)
            assert await brief.load_typed("run", "a", State) is None
            assert await brief.load_typed("run", "b", State) == State(n=2)
            await lasting.save("run", "c", State(n=3))
            await brief.save("run", "d", State(n=4))
            await asyncio.sleep(1.2)
            assert await brief.load_typed("run", "d", State) is None
            assert await brief.load_typed("run", "c", State) == State(n=3)
        for wrong in (0, -1):
            with pytest.raises(ValueError, match="must be positive, or None"):
                RedisStore(server.url, wrong)

    async def test_what_was_saved_before_a_run(self, store: RedisStore) -> None:
        """The newest of what was saved and committed is loaded, whichever came first."""
        await store.save("run", "node", State(n=1))
        session = await begin(store)
        assert await store.load_typed("run", "node", State) == State(n=1)
        await commit(session, 0, State(n=2))
        assert await store.load_typed("run", "node", State) == State(n=2)
        await store.save("run", "node", State(n=3))
        await commit(session, 1, State(n=4))
        assert await store.load_typed("run", "node", State) == State(n=4)
        await finish(session)
        again = await begin(store, if_exists="resume", discard_from=1)
        assert await store.load_typed("run", "node", State) == State(n=3)
        await commit(again, 1, State(n=5))
        assert await store.load_typed("run", "node", State) == State(n=5)


class TestServer:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"appendonly": "no"}, ["appendonly is off: everything is lost"]),
            (
                {"appendonly": "no", "save": "3600 1"},
                ["appendonly is off: everything since its last snapshot is lost"],
            ),
            ({"appendfsync": "everysec"}, ["appendfsync is everysec: .* last second or two"]),
            ({"appendfsync": "no"}, ["appendfsync is no: "]),
            ({"maxmemory-policy": "allkeys-lru"}, ["maxmemory-policy is allkeys-lru: runs may be evicted"]),
            (
                {"maxmemory-policy": "volatile-ttl", "appendfsync": "everysec"},
                ["appendfsync is everysec", r"volatile-ttl: finished runs and saved states may be evicted"],
            ),
            ({}, []),
        ],
    )
    async def test_what_may_be_lost_is_said_once(
        self, settings: dict[str, str], message: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """The settings of a server that put runs at risk are named, with those that mend it, once."""
        caplog.set_level(logging.INFO, logger="stroma")
        with RedisServer(**settings) as server:
            for _ in range(2):
                async with RedisStore(server.url) as store:
                    await begin(store, if_exists="restart", if_running="take_over")
                    store.list_runs()
            SyncRedisStore(server.url).save("r", "n", State())
        warnings = [r for r in caplog.records if r.name == "stroma" and r.levelno == logging.WARNING]
        assert len(warnings) == len(message)
        for record, text in zip(warnings, message, strict=True):
            assert server.socket in record.getMessage()
            assert re.search(text, record.getMessage())
            assert "; set " in record.getMessage()

    async def test_a_server_forbids_it(self, server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """Where CONFIG and INFO are forbidden, and all keys but ours, the store works, without a warning."""
        server.execute("ACL", "SETUSER", "me", "on", ">secret", "~stroma:*", "+@all", "-config", "-info")
        with proxied(server) as proxy:
            url = proxy.url.replace("//", "//me:secret@")
            async with RedisStore(url) as store:
                session = await begin(store)
                await commit(session, 0, State(n=1))
                await finish(session)
                assert len(store.list_runs()) == 1
            assert not caplog.records
            async with RedisStore(url.replace("secret", "wrong")) as store:
                with pytest.raises(StoreError, match="refused the user of the URL") as raised:
                    await begin(store)
                assert not raised.value.transient
                assert "wrong" not in str(raised.value).replace("WRONGPASS", "").replace("wrong pass", "")

    async def test_what_the_server_cannot_add_up(self, store: RedisStore) -> None:
        """A sum beyond 64 bits is refused whole: nothing of that attempt is kept, and the next one is."""
        session = await begin(store)
        await commit(session, 0, State(), tokens=3, cost=9_000_000.0)
        with pytest.raises(StoreError, match="overflow"):
            await commit(session, 1, State(), tokens=3, cost=9_000_000.0)
        await commit(session, 1, State(), tokens=2, cost=0.5)
        run = store.get_run("run")
        assert (run.tokens, run.cost_usd, run.nodes, len(store.attempts("run"))) == (5, 9_000_000.5, 2, 2)

    async def test_a_replica_takes_no_writes(self) -> None:
        """A server that became a replica is tried again while a failover may pass; then the error says so."""
        with RedisServer() as server:
            async with subclass_of(RedisStore, _patience_seconds=0.3)(server.url) as store:
                session = await begin(store)
                server.execute("REPLICAOF", "127.0.0.1", "1")
                with pytest.raises(StoreError, match="is a replica and refuses writes") as raised:
                    await commit(session, 0, State())
                assert raised.value.transient
                for _ in range(2):
                    later(0.1, lambda: server.execute("REPLICAOF", "NO", "ONE")).join()
                    await commit(session, 0, State())

    async def test_keys_of_another_program(self, store: RedisStore, server: RedisServer) -> None:
        """A key of another type in the place of ours is a StoreError that says so."""
        server.execute("SET", "stroma:{run}:run", "x")
        with pytest.raises(StoreError, match="another database number"):
            await begin(store)

    async def test_damage_is_named(self, store: RedisStore, server: RedisServer) -> None:
        """What is not what was kept is CorruptCheckpoint with the run, the node and the way out."""
        session = await begin(store)
        await commit(session, 0, State(n=1), "first")
        await commit(session, 1, State(n=2), "second")
        await finish(session, "PARTIAL")
        good = server.execute("HGET", "stroma:{run}:steps:1", "1:")
        for bad in (b"", b"garbage", b"[1]\n", good[:-1], good[:-1] + b"x", good.replace(b"[", b"{", 1)):
            server.execute("HSET", "stroma:{run}:steps:1", "1:", bad)
            with pytest.raises(CorruptCheckpoint, match=r"'second' at position 1 of run 'run'.*resume_from"):
                await begin(store, if_exists="resume")
            states = [(a.damaged, a.output is None) for a in store.attempts("run")]
            assert states == [(False, False), (True, True)]
            with pytest.raises(CorruptCheckpoint):
                await store.load("run", "second")
        again = await begin(store, if_exists="resume", discard_from=1)
        assert restored(again) == {(0, ""): State(n=1)}
        server.execute("HSET", f"stroma:{{run}}:{INPUT}", "", "garbage")
        with pytest.raises(CorruptCheckpoint, match="input of run 'run' is damaged"):
            store.input_of("run")

    async def test_a_codec(self, server: RedisServer) -> None:
        """What goes through a codec stands nowhere in the server as it was, of either store."""

        class Turned:
            def encode(self, data: bytes) -> bytes:
                return data[::-1]

            def decode(self, data: bytes) -> bytes:
                return data[::-1]

        async with RedisStore(server.url, codec=Turned()) as store:
            session = await begin(store, state=State(text="secret"))
            await commit(session, 0, State(text="secret"))
            with SyncRedisStore(server.url, codec=Turned()) as sync:
                sync.save("run", "large", State(text="secret" * 100_000))
                assert sync.load_typed("run", "large", State) == State(text="secret" * 100_000)
                assert sync.load_typed("run", "node", State) == State(text="secret")
            for key in server.execute("KEYS", "*"):
                if server.execute("TYPE", key) == b"hash":
                    assert b"secret" not in b"".join(server.execute("HVALS", key))

    async def test_no_key_stands_outside_of_its_run(self, store: RedisStore, server: RedisServer) -> None:
        """Ids are encoded: whatever they hold, a run's keys share one hash tag that is its own."""
        for run_id in ("}:run", "a{b}c", "a:b", "é", "*"):
            await commit(await begin(store, run_id), 0, State())
        result = keys(server) - {f"stroma:{name}" for name in (*OF_ALL, "due:pipeline", "live:pipeline")}
        assert len(result) == 5 * 4
        for key in result:
            assert key.isascii()
            assert key.count("{") == key.count("}") == 1

    def test_a_url(self, server: RedisServer) -> None:
        """open_store takes redis:// and rediss:// URLs; anything else is a ValueError without a request."""
        assert isinstance(open_store("redis://127.0.0.1:1/0"), RedisStore)
        shown = repr(open_store("rediss://me:secret@h:7/2"))
        assert shown == "RedisStore('rediss://h:7/2', ttl_seconds=3600.0)"
        for wrong in ("http://h", "nonsense"):
            with pytest.raises(ValueError):
                RedisStore(wrong)

    async def test_what_waits_together_is_sent_together(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hundred concurrent commits need few round trips."""
        async with RedisStore(server.url) as store:
            sessions = [await begin(store, f"run {i}") for i in range(100)]
            server.execute("CONFIG", "RESETSTAT")
            await asyncio.gather(*(commit(s, 0, State()) for s in sessions))
            assert 1 <= server.execute("INFO", "commandstats")["cmdstat_exec"]["calls"] <= 5


class TestPipelines:
    @pytest.mark.example
    @pytest.mark.parametrize("kind", [RedisStore, SyncRedisStore])
    async def test_a_run_resumes(self, server: RedisServer, kind: Any) -> None:
        """A pipeline that stopped goes on where it stopped, whichever of the two stores it is on."""
        calls: list[str] = []

        async def a(state: State) -> State:
            calls.append("a")
            return State(n=state.n + 1)

        async def b(state: State) -> State:
            calls.append("b")
            if calls.count("b") == 1:
                raise ValueError("not yet")
            return State(n=state.n + 10)

        nodes = [node("a", a, State, State), node("b", b, State, State)]
        store = kind(server.url)
        runner = quick_without_retries(store=store, run_id="it", resume=True)
        assert (await runner.run(nodes, State(n=1))).status == "PARTIAL"
        result = await runner.run(nodes, State(n=1))
        assert (result.status, calls) == ("RESUMED", ["a", "b", "b"])
        assert result.final_state == State(n=12)
        await settled(store.aclose())

    def test_sync_calls_are_sync(self, server: RedisServer) -> None:
        """Without any event loop, and inside one, SyncRedisStore's calls give values, not awaitables."""
        with SyncRedisStore(server.url) as store:

            def use() -> None:
                assert store.save("r", "n", State(n=1)) is None
                assert store.load_typed("r", "n", State) == store.load("r", "n") == State(n=1)
                store.save_typed("r", "m", State(n=2), State)
                assert store.load("r", "m") == State(n=2)
                store.delete("r")
                assert store.load("r", "n") is None

            async def inside() -> None:
                use()

            use()
            asyncio.run(inside())
