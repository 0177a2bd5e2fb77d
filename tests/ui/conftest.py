"""The web interface behind a real server, asked over real HTTP."""

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import uvicorn
from pydantic import BaseModel
from tests.ui.browser import Browser, find_chromium
from tests.ui.page_tools import missing

from stroma import FailurePolicy, Pipeline, SQLiteStore, StromaRunner, current_node, parallel, stroma_node
from stroma.ui import Settings, make_app
from stroma.ui.app import make_server
from stroma.ui.settings import Served

#: What a page must never take for its own.
SCRIPT = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"'&amp;]]>"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass
class Site:
    """A server, and how it is asked. ``resumed``: the runs that it was told to resume."""

    port: int
    store: SQLiteStore
    app: Any = None
    resumed: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def ask(self, method: str, path: str, body: bytes | None = None, /, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            argument = {"host": self.host} | {
                name.replace("_", "-"): value for name, value in headers.items()
            }
            if body is not None:
                argument["content-length"] = str(len(body))
            for name, value in argument.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            events = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, events, answer.read())

    def get(self, path: str, /, **query: Any) -> Answer:
        return self.ask("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str, form: dict[str, str], **headers: str) -> Answer:
        about = {"content_type": "application/x-www-form-urlencoded", "origin": self.url} | headers
        return self.ask("POST", path, urlencode(form).encode(), **about)


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    """Starts a site for a store; the keywords are settings, and those of its pipeline.

    ``serve.listening()``: a socket to give it, whose port is known.

    ``app``: the application of another site, to be served by one more thread.
    """
    servers: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def listen() -> socket.socket:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        return listening

    def start(
        store: SQLiteStore,
        *,
        listening: socket.socket | None = None,
        app: Any = None,
        pipeline: str | None = None,
        **settings: Any,
    ) -> Site:
        listening = listening or listen()
        site = Site(listening.getsockname()[1], store)
        served = {name: settings.pop(name) for name in Served._fields if name in settings}
        if pipeline is not None:
            settings["pipelines"] = {pipeline: Served(**{"resume": site.resumed.append} | served)}
        value: dict[str, Any] = {
            "hosts": [site.host, f"localhost:{site.port}"],
            "poll_seconds": 0.05,
        } | settings
        site.app = app or make_app(Settings(store=store, name="runs.db", **value))
        server = make_server(site.app)
        server.config.log_level = "critical"
        server.config.configure_logging()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread, listening))
        return site

    start.listening = listen
    yield start
    for server, thread, listening in servers:
        server.should_exit = True
        thread.join(30)
        listening.close()


class State(BaseModel):
    n: int = 0
    text: str = SCRIPT


class Total(BaseModel):
    lines: list[dict[str, int]]


def node(node_id: str, func: Any, output: type[BaseModel] = State) -> Any:
    return stroma_node(node_id, input=State, output=output)(func)


async def first(state: Any) -> Any:
    return {"n": state.n + 1, "text": SCRIPT}, 120, 20, "gpt-4o-mini"


async def flaky(state: Any) -> Any:
    if current_node().attempt == 1:
        raise TimeoutError(SCRIPT)
    return {"n": 2}, 10, 5, "gpt-4o-mini"


async def breaks(state: Any) -> Any:
    return {"lines": [{"price": SCRIPT}]}, 20, 20, "gpt-4o-mini"


QUICK = {
    kind: FailurePolicy(max_retries=1, backoff_seconds=0.01, jitter=False)
    for kind in ("RECOVERABLE", "AMBIGUOUS")
}
CONFIG: Any = {"policy_map": QUICK}
GOOD = Pipeline(
    "flows", [node("first", first), node("flaky", flaky), parallel(node("left", first), node("right", first))]
)
BAD = Pipeline("flows", [*GOOD.nodes, node("total", breaks, Total)])


def make_runs(store: Any, *runs: tuple[str, Pipeline], state: BaseModel | None = None, **config: Any) -> None:
    async def go() -> None:
        for run_id, pipeline in runs:
            runner = StromaRunner.quick(store=store, **(CONFIG | config))
            await runner.run(pipeline, state or State(), run_id=run_id)
            await asyncio.sleep(0.002)  # Their order is that of their starts.

    asyncio.run(go())


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The address of an empty store."""
    return f"sqlite:///{tmp_path / 'x.db'}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(tmp_path / "runs.db") as instance:
        yield instance


@pytest.fixture
def site(store: SQLiteStore, serve: Callable[..., Site]) -> Site:
    """A site with a run that completed and one that failed."""
    make_runs(store, ("good", GOOD), ("bad", BAD), tags=("nightly", SCRIPT[:40]))
    return serve(store, pipeline="flows")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser; where there is none, the tests that ask for it are skipped."""
    program = find_chromium()
    if program is None:
        missing("there is no Chromium here; name it with CHROMIUM=")
    assert program is not None
    with Browser(program) as browser:
        yield browser
