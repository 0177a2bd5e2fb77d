"""A commit that goes to a Redis server straight from the event loop is kept as one of the store's thread is."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import tests.checkpoint.test_redis as by_thread
from tests.servers import Proxy, RedisServer, environment, proxied, shared_redis

from stroma.checkpoint import Fenced, StoreError
from stroma.checkpoint import _redis_lane as redis_lane
from stroma.checkpoint._redis_format import Run
from stroma.checkpoint._redis_lane import Lane
from stroma.checkpoint._rows import Attempt, Commit, Fence
from stroma.checkpoint._worker import Worker
from stroma.checkpoint.redis import RedisStore
from stroma.schemas import schema_of
from stroma.testing import JournalStoreTests
from stroma.testing.stores import State, begin, commit, finish, row

SCHEMA = schema_of(State)


@pytest.fixture
def server() -> RedisServer:
    """The shared server, empty."""
    found = shared_redis()
    found.execute("FLUSHALL")
    return found


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    async with RedisStore(server.url) as store:
        yield store


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with proxied(server) as found:
        yield found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first commit of a loop gets it a lane, which the second one takes."""

    def at_once(lane: Lane) -> None:
        if not lane._connecting:
            lane._connecting = True
            lane._connect()

    monkeypatch.setattr(Lane, "_counted", at_once)


@pytest.fixture
def by_worker(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the thread was given to do, but for what opens a run."""
    given: list[Any] = []
    put = Worker.put

    def noted(worker: Worker, job: Any) -> None:
        given.append(job.operation)
        put(worker, job)

    monkeypatch.setattr(Worker, "put", noted)
    return given


async def opened(store: RedisStore, run_id: str = "run") -> Any:
    """A session in a loop with a lane, and one commit."""
    session = await begin(store, run_id)
    await commit(session, 0, State(n=0), tokens=1)
    await asyncio.sleep(0)
    return session


def connections(server: RedisServer) -> int:
    return len(server.execute("CLIENT", "LIST", "TYPE", "normal").splitlines())


def until(holds: Any) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("eager")
class TestJournal(JournalStoreTests):
    @pytest.fixture
    def store(self, store: RedisStore) -> RedisStore:
        return store


@pytest.mark.usefixtures("eager")
class TestCrash(by_thread.TestCrash):
    """All that happens to a server and to connections, with a lane."""


@pytest.mark.usefixtures("eager")
class TestAmbiguous(by_thread.TestAmbiguous):
    """The same."""


@pytest.mark.usefixtures("eager")
class TestOwners(by_thread.TestOwners):
    """The same."""


@pytest.mark.usefixtures("eager")
class TestServer(by_thread.TestServer):
    """The same."""


class TestWhen:
    """What takes the lane, and what does not."""

    async def test_a_loop_that_commits_much(self, server: RedisServer, by_worker: list[Any]) -> None:
        """It gets a lane after some commits; before that, and on other loops, the thread does them."""
        async with RedisStore(server.url) as store:
            session = await begin(store)
            del by_worker[:]
            for position in range(15):
                await commit(session, position, State(n=position))
            assert len(by_worker) == 15
            before = connections(server)
            await commit(session, 15, State(n=15))
            until(lambda: connections(server) == before + 1)
            await asyncio.sleep(0.05)
            del by_worker[:]
            for position in range(16, 40):
                await commit(session, position, State(n=position))
            assert not by_worker
            assert [a.position for a in store.attempts("run")] == list(range(40))
            await asyncio.to_thread(asyncio.run, commit(await begin(store, "other"), 0, State()))
            assert len(by_worker) == 2
            await finish(session)

    async def test_no_thread_to_connect(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch, by_worker: list[Any]
    ) -> None:
        """Where none can be started, commits go on without a lane, and it is tried again more and more rarely."""
        tries: list[object] = []

        def refuse(*_: object) -> None:
            tries.append(len(by_worker))
            raise RuntimeError("can't start new thread")

        async with RedisStore(server.url) as store:
            session = await begin(store)
            del by_worker[:]
            monkeypatch.setattr(threading.Thread, "start", refuse)
            for position in range(70):
                await commit(session, position, State(n=position))
            monkeypatch.undo()
            assert tries == [15, 31, 63]
            assert len(store.attempts("run")) == 70

    @pytest.mark.usefixtures("eager")
    async def test_what_waits_together(self, server: RedisServer, by_worker: list[Any]) -> None:
        """The thread sends it together: of many at once, one takes the lane."""
        async with RedisStore(server.url) as store:
            session = await opened(store)
            del by_worker[:]
            await asyncio.gather(*(commit(session, p, State(n=p)) for p in range(1, 50)))
            assert len(by_worker) == 48
            assert len(store.attempts("run")) == 50
            go_on = threading.Event()
            store.post(lambda rows: go_on.wait())
            del by_worker[:]
            pending = [asyncio.ensure_future(commit(session, p, State(n=p))) for p in (50, 51)]
            await asyncio.sleep(0)
            assert len(by_worker) == 2
            go_on.set()
            await asyncio.gather(*pending)

    @pytest.mark.usefixtures("eager")
    async def test_what_is_large(self, server: RedisServer, by_worker: list[Any]) -> None:
        """No event loop is held up by sending it."""
        async with RedisStore(server.url) as store:
            session = await opened(store)
            del by_worker[:]
            sizes = [10, 16_000, 17_000, 40_000, 2_000_000]
            for position, size in enumerate(sizes, 1):
                await commit(session, position, State(text="x" * size))
                assert len(by_worker) == max(0, position - 2)
            kept = [a.output for a in store.attempts("run")][1:]
            assert all(b"x" * size in (output or b"") for size, output in zip(sizes, kept, strict=True))
            del by_worker[:]
            await commit(session, 6, State(), "n" * 40_000)
            assert len(by_worker) == 1

    @pytest.mark.usefixtures("eager")
    async def test_a_loop_that_cannot_watch_sockets(
        self,
        server: RedisServer,
        by_worker: list[Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """There the thread does it all."""
        before = connections(server)

        def refuse(*_: object) -> None:
            raise NotImplementedError

        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
            async with RedisStore(server.url) as store:
                session = await opened(store)
                for position in range(1, 4):
                    await commit(session, position, State(n=position))
                assert len(by_worker) == 5
                assert len(store.attempts("run")) == 4
                until(lambda: connections(server) <= before + 2)
        assert not caplog.records

    async def test_tls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the event loop would read of such a socket is not what was sent: there is no lane."""
        asked: list[Lane] = []
        monkeypatch.setattr(Lane, "_counted", lambda lane: asked.append(lane))
        for url, lanes in (("rediss://127.0.0.1:1", 0), ("redis://127.0.0.1:1", 1)):
            async with RedisStore(url, _patience_seconds=0.0) as store:
                attempt = Attempt(0, 0, "", 1, "node", 0, "success", None, None, None, 0, 0, 0, None)
                fence = Fence(Run("run", "", 1, 1), 1, 1, "", 1.0)
                with pytest.raises(StoreError, match="cannot reach"):
                    await store._submit(Commit("run", fence, attempt, None))
            assert len(asked) == lanes


@pytest.mark.usefixtures("eager")
class TestBroken:
    """The lane breaks, and the thread goes on."""

    async def test_closed_while_it_was_idle(self, server: RedisServer) -> None:
        """The next commit goes through at once, also where nothing is tried again; and the lane comes back."""
        async with RedisStore(server.url, _patience_seconds=0.0) as store:
            session = await opened(store)
            for position in range(1, 6):
                server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await commit(session, position, State(n=position))
            await asyncio.sleep(0.02)
            for position in range(6, 10):
                await commit(session, position, State(n=position))
            assert [a.position for a in store.attempts("run")] == list(range(10))

    @pytest.mark.parametrize("reply", [b":77\r\n", b"+OK\r\n", b":7", b"$6\r\nfenced\r\n", b"-ERR no\r\n"])
    async def test_what_nobody_asked_for(self, server: RedisServer, proxy: Proxy, reply: bytes) -> None:
        """It acknowledges nothing, whether it came with a reply or behind it."""
        async with RedisStore(proxy.url) as store:
            session = await opened(store)
            proxy.on_reply = lambda data: data + reply
            await commit(session, 1, State(n=1))
            proxy.on_reply = lambda data: True
            await commit(session, 2, State(n=2))
            async with RedisStore(server.url) as other:
                await begin(other, if_exists="resume", if_running="take_over")
            with pytest.raises(Fenced):
                await commit(session, 3, State(n=3))
            assert [a.position for a in store.attempts("run")] == [0, 1, 2]

    async def test_what_came_behind_a_reply(self, server: RedisServer, by_worker: list[Any]) -> None:
        """A lane on which something is said by itself is left before the next commit."""
        with proxied(server) as proxy:
            async with RedisStore(proxy.url) as store:
                session = await opened(store)
                await commit(session, 1, State(n=1))
                proxy.say(b":1\r\n")
                await asyncio.sleep(0.1)
                del by_worker[:]
                await commit(session, 2, State(n=2))
                assert len(by_worker) == 1

    @pytest.mark.parametrize("sent", [0, 100, None])
    async def test_a_socket_that_takes_no_more(
        self, server: RedisServer, by_worker: list[Any], sent: int | None
    ) -> None:
        """No event loop waits for it: what was not sent whole is the thread's."""

        class Full:
            def __init__(self, sock: Any) -> None:
                self.fileno = sock.fileno
                self.sock = sock

            def send(self, data: bytes) -> int:
                if sent is None:
                    raise BlockingIOError
                return self.sock.send(data[:sent]) if sent else 0

        async with RedisStore(server.url) as store:
            session = await opened(store)
            (lane,) = store._begin_lanes()._all()
            lane._socket = Full(lane._socket)  # type: ignore[assignment]
            del by_worker[:]
            await commit(session, 1, State(n=1), tokens=1)
            assert len(by_worker) == 1
            run = store.get_run("run")
            assert run is not None
            assert (run.tokens, run.nodes) == (2, 2)

    @pytest.mark.parametrize("sent", [0, 1, 2, 3])
    @pytest.mark.parametrize("cut", [True, False])
    async def test_a_reply_that_is_not_whole(
        self, server: RedisServer, proxy: Proxy, sent: int, cut: bool
    ) -> None:
        """The thread asks again, at once or once it has waited for the rest; the commit is kept once."""
        async with RedisStore(f"{proxy.url}?socket_timeout=0.3") as store:
            session = await opened(store)

            def part(data: bytes) -> bytes | bool:
                proxy.on_reply = lambda data: True
                proxy.cut = cut
                return data[: max(sent, 1)] if sent or not cut else False

            proxy.on_reply = part
            await commit(session, 1, State(n=1), tokens=1)
            run = store.get_run("run")
            assert run is not None
            assert (run.tokens, run.nodes) == (2, 2)

    async def test_a_reply_in_pieces(self, server: RedisServer, proxy: Proxy, by_worker: list[Any]) -> None:
        """It is put together."""
        async with RedisStore(proxy.url) as store:
            session = await opened(store)
            del by_worker[:]
            proxy.pieces = True
            for position in range(1, 5):
                await commit(session, position, State(n=position))
            assert not by_worker
            proxy.pieces = False
            assert len(store.attempts("run")) == 5

    async def test_a_server_that_does_not_answer(self, server: RedisServer, by_worker: list[Any]) -> None:
        """The thread takes over after a second, or what the URL says, and others are not held up meanwhile."""
        async with RedisStore(f"{server.url}?socket_timeout=0.2") as store:
            session = await opened(store)
            for position in range(1, 4):  # The timer of an earlier commit is no business of a later one.
                await commit(session, position, State(n=position))
                await asyncio.sleep(0.07)
            del by_worker[:]
            server.pause()
            started = by_thread.later(0.7, server.resume)
            await commit(session, 4, State(n=4), tokens=1)
            started.join()
            assert len(by_worker) == 1
            assert [a.position for a in store.attempts("run")] == [0, 1, 2, 3, 4]

    async def test_a_server_that_stays_away(self) -> None:
        """The error is that of the thread, when its patience ends."""
        with RedisServer() as server:
            async with RedisStore(server.url, _patience_seconds=0.2) as store:
                session = await opened(store)
                server.kill()
                with pytest.raises(StoreError, match="cannot reach unix://"):
                    await commit(session, 1, State())
                server.start()
                await commit(session, 1, State())
                assert len(store.attempts("run")) == 2

    async def test_a_script_that_was_forgotten(self, server: RedisServer) -> None:
        async with RedisStore(server.url) as store:
            session = await opened(store)
            server.execute("SCRIPT", "FLUSH")
            for position in range(1, 4):
                await commit(session, position, State(n=position))
            assert len(store.attempts("run")) == 4

    async def test_losses_are_noticed(self, server: RedisServer) -> None:
        """What a lane was told counts: a server that is back at an earlier commit has lost some."""
        async with RedisStore(server.url) as store:
            session = await opened(store)
            before = {key: server.execute("DUMP", key) for key in by_thread.keys(server) if "{run}" in key}
            await commit(session, 1, State(n=1))
            for key, dump in before.items():
                server.execute("RESTORE", key, 0, dump, "REPLACE")
            with pytest.raises(StoreError, match="is gone, or older than what it acknowledged"):
                await commit(session, 2, State(n=2))

    async def test_a_caller_who_is_cancelled(self, server: RedisServer, proxy: Proxy) -> None:
        """What was asked for is done all the same, and the lane goes on."""
        async with RedisStore(proxy.url) as store:
            session = await opened(store)
            task = asyncio.ensure_future(commit(session, 1, State(n=1)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await commit(session, 2, State(n=2))
            assert [a.position for a in store.attempts("run")] == [0, 1, 2]


@pytest.mark.usefixtures("eager")
class TestEnds:
    """Stores, loops and processes end."""

    async def test_close_waits_for_what_is_under_way(self, server: RedisServer) -> None:
        """It is kept when close() returns, although the event loop that asked for it does nothing meanwhile."""
        before = connections(server)
        store = RedisStore(server.url)
        session = await opened(store)
        server.pause()
        pending = asyncio.ensure_future(commit(session, 1, State(n=1)))
        await asyncio.sleep(0)
        by_thread.later(0.3, server.resume)
        store.close()
        with RedisStore(server.url) as other:
            assert [a.position for a in other.attempts("run")] == [0, 1]
        await pending
        with pytest.raises(StoreError, match="is closed"):
            await commit(session, 2, State(n=2))
        await asyncio.sleep(0)
        until(lambda: connections(server) == before)

    async def test_a_store_that_is_closed_elsewhere(self, server: RedisServer) -> None:
        before = connections(server)
        store = RedisStore(server.url)
        session = await opened(store)
        await store.aclose()
        await asyncio.sleep(0)
        until(lambda: connections(server) == before)
        for _ in range(20):
            with pytest.raises(StoreError, match="is closed"):
                await commit(session, 2, State(n=2))
        assert connections(server) == before

    async def test_a_store_that_is_closed_while_it_connects(self, server: RedisServer) -> None:
        """What was to become a lane is disconnected."""
        before = connections(server)
        store = RedisStore(server.url)
        session = await begin(store)
        await asyncio.sleep(0)
        pending = asyncio.ensure_future(commit(session, 0, State()))
        await asyncio.sleep(0)
        store.close()
        await pending
        await asyncio.sleep(0.05)
        until(lambda: connections(server) == before)

    async def test_a_store_that_is_dropped(self, server: RedisServer) -> None:
        """Its connections go with it, that of the running loop too."""
        before = connections(server)
        store = RedisStore(server.url)
        await opened(store)
        assert connections(server) == before + 2
        del store
        gc.collect()
        await asyncio.sleep(0.05)
        until(lambda: connections(server) == before)

    def test_loops_that_end(self, server: RedisServer) -> None:
        """A lane goes with its loop."""
        before = connections(server)
        with RedisStore(server.url) as store:
            for number in range(5):
                asyncio.run(opened(store, f"run {number}"))
            gc.collect()
            until(lambda: connections(server) <= before + 3)
            assert len(store.list_runs()) == 5

    def test_a_loop_that_ends_in_the_middle(
        self, server: RedisServer, proxy: Proxy, by_worker: list[Any]
    ) -> None:
        """What it asked for is done all the same."""
        under_way: list[Any] = []
        loop_is_closed = threading.Event()
        with RedisStore(proxy.url) as store:

            async def leave() -> None:
                session = await opened(store)
                del by_worker[:]
                proxy.on_request = lambda data: not loop_is_closed.wait()
                attempt = row(1, "node", output=SCHEMA.snapshot(State(n=1)))
                under_way.append(session.record(attempt, SCHEMA, State(n=1)))

            loop = asyncio.new_event_loop()
            loop.run_until_complete(leave())
            loop.close()
            assert not by_worker
            proxy.on_request = lambda data: True
            loop_is_closed.set()
            asyncio.run(opened(store, "other"))
            until(lambda: len(store.attempts("run")) == 2)

    def test_several_event_loops_and_threads(self, server: RedisServer) -> None:
        """Each has a lane of its own, and a session's number goes up whoever is told."""
        store = RedisStore(server.url)

        async def use(name: str) -> None:
            session = await opened(store, name)
            for position in range(1, 30):
                await asyncio.gather(
                    *(commit(session, position * 10 + child, State(n=child)) for child in range(3))
                )
            await finish(session)

        threads = [threading.Thread(target=lambda i=i: asyncio.run(use(f"run {i}"))) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {(run.nodes, run.status) for run in store.list_runs()} == {(88, "COMPLETED")}
        store.close()

    async def test_what_is_the_parents(
        self, server: RedisServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child that goes on with its parent's event loop reads no reply of it, and ends nothing."""
        async with RedisStore(f"{proxy.url}?socket_timeout=0.1") as store:
            session = await opened(store)
            (lane,) = store._begin_lanes()._all()
            server.pause()
            pending = asyncio.ensure_future(commit(session, 1, State(n=1)))
            await asyncio.sleep(0)
            job = lane.job
            assert job is not None
            with monkeypatch.context() as patch:
                patch.setattr(redis_lane, "generation", lambda: -1)
                await asyncio.sleep(0.2)
                lane._look()
                server.resume()
                await asyncio.sleep(0.1)
                assert lane.job is job
                assert not pending.done()
            await pending
            assert lane.job is None
            assert len(store.attempts("run")) == 2

    def test_a_fork(self, server: RedisServer) -> None:
        """A child has lanes of its own, and neither reads what is the other's."""
        code = """
            import asyncio, gc, os, sys
            from stroma.checkpoint import _redis_lane
            from stroma.checkpoint.redis import RedisStore
            from stroma.testing.stores import State, begin, commit, finish

            _redis_lane.Lane._counted = _redis_lane.Lane._connect
            store = RedisStore(sys.argv[1])

            async def use(name, fork):
                session = await begin(store, name)
                for position in range(10):
                    await commit(session, position, State(n=position))
                if fork:
                    under_way = asyncio.ensure_future(commit(session, 10, State(n=10)))
                    await asyncio.sleep(0)
                    child = os.fork()
                    if child == 0:
                        asyncio.events._set_running_loop(None)
                        asyncio.run(use("child", False))
                        gc.collect()
                        os._exit(0)
                    await under_way
                    for position in range(11, 20):
                        await commit(session, position, State(n=position))
                    assert os.waitpid(child, 0)[1] == 0
                    for position in range(20, 30):
                        await commit(session, position, State(n=position))
                await finish(session)

            asyncio.run(use("parent", True))
        """
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), server.url],
            env=environment(),
            check=True,
            timeout=60,
        )
        with RedisStore(server.url) as store:
            runs = {run.run_id: (run.nodes, run.status) for run in store.list_runs()}
        assert runs == {"parent": (30, "COMPLETED"), "child": (10, "COMPLETED")}
