"""How long the web interface takes for its pages, in CPU milliseconds of the server, and what open pages cost.

    ./dev run python -m benchmarks.pages            # both
    ./dev run python -m benchmarks.pages --viewers  # 50 open pages alone

A run of 1,000 nodes and 2,000 attempts (bound: 200 ms), a map of 10,000 items (300 ms), and 50 viewers of a
run that commits five nodes a second (5 % of a core). The floor escapes the bytes of the first page and packs
them: what it takes tells how fast this machine is at the moment. Times are the least of all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import html
import json
import logging
import multiprocessing
import socket
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from tests.ui import scenes
from tests.ui.conftest import State, node
from tests.ui.test_large_run import make_large_run

from stroma import Pipeline, SQLiteStore, StromaRunner
from stroma.checkpoint.history import History
from stroma.ui.app import make_app
from stroma.ui.rendering import Renderer
from stroma.ui.run_pages import RunPages
from stroma.ui.security import Keys
from stroma.ui.settings import Settings

ROUNDS = 15
VIEWERS = 50
SECONDS = 20.0


def measure_pages(home: Path) -> None:
    with SQLiteStore(home / "large.db") as store:
        make_large_run(store)
        asyncio.run(scenes.make_map(store, 10_000, "items"))
        settings = Settings(store=store, name="runs.db", hosts=[])
        pages = RunPages(Renderer(settings, History(store), Keys()))
        body = bytes(_page(pages, "large").body).decode()
        floor = min(_cpu_ms(lambda: gzip.compress(html.escape(body).encode(), 6)) for _ in range(ROUNDS))
        for run_id in ("large", "items"):
            answer = _page(pages, run_id)
            taken = min(_cpu_ms(lambda run_id=run_id: _page(pages, run_id)) for _ in range(ROUNDS))
            print(
                f"{run_id}: {taken:.0f} ms of CPU, {taken / floor:.1f} floors, {len(gzip.compress(bytes(answer.body), 6)):,} bytes packed"
            )


def _page(pages: RunPages, run_id: str) -> Any:
    request = {"type": "http", "query_string": f"id={run_id}".encode(), "path": "/run", "method": "GET"}
    return pages.run(Request(request | {"headers": [], "server": ("localhost", 80)}))


def _cpu_ms(call: Any) -> float:
    began = time.process_time()
    call()
    return (time.process_time() - began) * 1000


def serve(path: str, port: int, questions: Connection) -> None:
    """Serve a store, and answer each question with the CPU seconds of this process."""
    with SQLiteStore(path) as store:
        app = make_app(Settings(store=store, name="runs.db", hosts=[f"127.0.0.1:{port}"]))
        server = uvicorn.Server(
            uvicorn.Config(app, port=port, log_level="critical", lifespan="off", ws="none")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while questions.recv():
            questions.send(time.process_time())


async def _view(port: int, path: str, events: str, seen: list[int]) -> None:
    """Be one viewer: read its events, and ask for the page after each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {events} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    async for line in reader:
        if not line.startswith(b"data:"):
            continue
        state = json.loads(line[5:])["state"]
        asking, out = await asyncio.open_connection("127.0.0.1", port)
        out.write(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept-Encoding: gzip\r\nX-Stroma-State: {state}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        seen.append(len(await asking.read()))
        out.close()


async def _watch(port: int, store: SQLiteStore, questions: Connection, path: str, events: str) -> None:
    seen: list[int] = []
    viewers = [asyncio.create_task(_view(port, path, events, seen)) for _ in range(VIEWERS)]

    async def step(state: Any) -> Any:
        await asyncio.sleep(0.2)
        return {"n": state.n + 1, "text": "x"}, 120, 20, "gpt-4o-mini"

    nodes = [node(f"step-{number}", step) for number in range(int(SECONDS * 5))]
    running = asyncio.create_task(
        StromaRunner.quick(store=store).run(Pipeline("flows", nodes), State(text="x"), run_id="live")
    )
    await asyncio.sleep(2)  # All have their first page.
    questions.send(True)
    before, began, first = questions.recv(), time.monotonic(), len(seen)
    await running
    questions.send(True)
    used, seconds = questions.recv() - before, time.monotonic() - began
    print(
        f"{VIEWERS} viewers of {path}: {100 * used / seconds:.1f} % of a core, {(len(seen) - first) / VIEWERS / seconds:.2f} "
        f"pages per second and viewer"
    )
    for viewer in viewers:
        viewer.cancel()


def measure_viewers(home: Path) -> None:
    for path, events in (("/run?id=live", "/events?id=live"), ("/", "/events")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = home / f"viewers{len(path)}.db"
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(str(file), port, theirs))
        with SQLiteStore(file) as store:
            asyncio.run(
                StromaRunner.quick(store=store).run(
                    Pipeline("flows", [node("first", _first)]), State(text="x")
                )
            )
            process.start()
            while True:
                with socket.socket() as asked:
                    if asked.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            asyncio.run(_watch(port, store, ours, path, events))
            ours.send(False)
            process.join(30)
            process.kill()


async def _first(state: Any) -> Any:
    return {"n": 1, "text": "x"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages")
    parser.add_argument("--viewers", action="store_true", help="measure 50 open pages alone")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as home:
        if not arguments.viewers:
            measure_pages(Path(home))
        measure_viewers(Path(home))


if __name__ == "__main__":
    main()
