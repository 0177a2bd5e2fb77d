"""Connections to a Redis server: no reply answers another command."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
import redis.backoff
import redis.connection
import redis.exceptions
import redis.retry
from tests.servers import Proxy, RedisServer, proxied, shared_redis
from tests.shared_stores import subclass_of
from tests.store_suite.journal import State, begin, commit, row

from stroma.checkpoint import Fenced, StoreError
from stroma.checkpoint.redis.server import RedisEndpoint, RedisLink
from stroma.checkpoint.redis.store import RedisStore
from stroma.contracts.schema import schema_of


@pytest.fixture
def server() -> RedisServer:
    """The shared server, empty."""
    result = shared_redis()
    result.execute("FLUSHALL")
    return result


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with proxied(server) as result:
        yield result


def link(url: str, patience: float = 0.0) -> RedisLink:
    """Return connections that try nothing again unless they have patience."""
    return RedisEndpoint(redis, url, patience).link()


class TestLink:
    @pytest.mark.core
    def test_what_nobody_asked_for(self, server: RedisServer, proxy: Proxy) -> None:
        """A reply that is left over answers no other command."""
        server.execute("SET", "k", "mine")
        ours = link(proxy.url)
        assert ours.send([("GET", "k")]) == [b"mine"]
        proxy.on_reply = lambda data: data + b"$5\r\nother\r\n"
        assert ours.send([("GET", "k")]) == [b"mine"]
        proxy.on_reply = lambda data: True
        for _ in range(3):
            assert ours.send([("GET", "k")]) == [b"mine"]

    def test_a_reply_that_comes_too_late(self, server: RedisServer, proxy: Proxy) -> None:
        """What was given up is not read by who asks next."""
        server.execute("SET", "k", "mine")
        ours = link(f"{proxy.url}?socket_timeout=0.2")
        assert ours.send([("GET", "k")]) == [b"mine"]
        with pytest.raises(redis.exceptions.TimeoutError):
            ours.send([("BLPOP", "nothing", "1")])
        assert ours.send([("GET", "k")]) == [b"mine"]

    def test_a_dead_server(self, server: RedisServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        """A try to reach it connects once: each may take seconds."""
        ours = link(proxy.url)
        assert ours.send([("PING",)]) == [True]
        tries: list[object] = []
        connect = redis.connection.Connection._connect
        monkeypatch.setattr(
            redis.connection.Connection, "_connect", lambda self: (tries.append(self), connect(self))[1]
        )
        proxy.on_request = lambda data: False
        for count in (0, 1, 2):
            with pytest.raises(redis.exceptions.ConnectionError):
                ours.send([("PING",)])
            assert len(tries) == count
        proxy.on_request = lambda data: True
        assert ours.send([("PING",)]) == [True]
        assert len(tries) == 3

    @pytest.mark.core
    def test_a_transaction(self, server: RedisServer) -> None:
        """All of it at once, or the error that kept it from being done; and the connection goes on."""
        ours = link(server.url)
        assert ours.send([("SET", "k", "1"), ("INCR", "k")], atomic=True) == [True, 2]
        _, wrong, last = ours.send([("SET", "k", "a"), ("INCR", "k"), ("GET", "k")], atomic=True)
        assert isinstance(wrong, redis.exceptions.ResponseError)
        assert last == b"a"
        with pytest.raises(redis.exceptions.ResponseError, match="unknown command"):
            ours.send([("SET", "k", "b"), ("NONSENSE",)], atomic=True)
        assert ours.send([("GET", "k")]) == [b"a"]


class TestStore:
    @pytest.mark.parametrize("protocol", [2, 3])
    async def test_a_connection_closed_while_idle(self, server: RedisServer, protocol: int) -> None:
        """The next commit goes through at once, also where nothing is tried again."""
        async with subclass_of(RedisStore, _patience_seconds=0.0)(
            f"{server.url}?protocol={protocol}"
        ) as store:
            session = await begin(store)
            for position in range(3):
                await commit(session, position, State(n=position))
                server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await commit(session, 3, State(n=3))
            assert [a.position for a in store.attempts("run")] == [0, 1, 2, 3]

    async def test_what_nobody_asked_for_is_no_answer(self, server: RedisServer, proxy: Proxy) -> None:
        """A session that was taken over is told so, whatever replies were left over."""
        async with RedisStore(proxy.url) as store:
            session = await begin(store)
            await commit(session, 0, State(n=0))
            proxy.on_reply = lambda data: data + b":77\r\n"
            await commit(session, 1, State(n=1))
            proxy.on_reply = lambda data: True
            async with RedisStore(server.url) as other:
                await begin(other, if_exists="resume", if_running="take_over")
            with pytest.raises(Fenced):
                await commit(session, 2, State(n=2))
            assert [a.position for a in store.attempts("run")] == [0, 1]

    @pytest.mark.parametrize("sent", [1, 2])
    async def test_a_peer_that_goes_in_a_reply(self, server: RedisServer, proxy: Proxy, sent: int) -> None:
        """The commit is sent again, and kept once: what was read of the reply counts for nothing."""
        async with RedisStore(proxy.url) as store:
            session = await begin(store)
            await commit(session, 0, State(n=0), tokens=1)

            def half(data: bytes) -> bytes:
                proxy.on_reply = lambda data: True
                proxy.cut = True
                return data[:sent]

            proxy.on_reply = half
            await commit(session, 1, State(n=1), tokens=1)
            assert not proxy.cut
            run = store.get_run("run")
            assert (run.tokens, run.nodes) == (2, 2)

    async def test_a_server_that_forgot_the_script(self, server: RedisServer) -> None:
        """It is given it again; who may not do that is told."""
        async with RedisStore(server.url) as store:
            session = await begin(store)
            await commit(session, 0, State())
            server.execute("SCRIPT", "FLUSH")
            await commit(session, 1, State())
            assert len(store.attempts("run")) == 2
        server.execute("ACL", "SETUSER", "few", "reset", "on", ">secret", "~stroma:*", "+@all", "-script")
        with proxied(server) as proxy:
            async with RedisStore(proxy.url.replace("//", "//few:secret@")) as store:
                await begin(store, "other")
                server.execute("SCRIPT", "FLUSH")
                with pytest.raises(StoreError, match="refused the user of the URL"):
                    await begin(store, "third")

    async def test_an_answer_that_is_no_answer_is_no_verdict(self, server: RedisServer, proxy: Proxy) -> None:
        """A garbled word says nothing of who owns the run: the commit can be sent again, and is kept once."""
        async with RedisStore(proxy.url) as store:
            session = await begin(store)
            await commit(session, 0, State(n=0), tokens=1)
            attempt, schema = row(1, tokens=1, output=("", 1, 0.0, b"")), schema_of(State)
            proxy.on_reply = lambda data: b"$6\r\nfnecde\r\n"
            with pytest.raises(StoreError, match="fnecde") as report:
                await session.record(attempt, schema, State(n=1))
            assert not isinstance(report.value, Fenced)
            assert report.value.transient
            proxy.on_reply = lambda data: True
            await session.record(attempt, schema, State(n=1))
            run = store.get_run("run")
            assert (run.tokens, run.nodes) == (2, 2)
