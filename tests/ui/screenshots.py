"""Pictures of the web interface, made in a real browser from prepared runs: ``./dev screenshots DIR``."""

import argparse
import asyncio
import random
import re
import socket
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from tests.ui import scenes
from tests.ui.browser import Browser, find_chromium
from tests.ui.test_large_run import make_large_run

from stroma import SQLiteStore
from stroma.ui import Settings, make_app
from stroma.ui.settings import Served, Submission

_TALLEST = 3000  # pixels of a page, below which it is cut
SIZES = {"wide": (1280, 860), "narrow": (400, 860), "large": (2560, 1300)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev screenshots", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the pictures go")
    parser.add_argument("--only", default="", help="only pages whose name contains this")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    program = find_chromium()
    if program is None:
        parser.error("there is no Chromium here; name it with CHROMIUM=")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, socket.socket() as listening, socket.socket() as bare:
        path = Path(home, "runs.db")
        with SQLiteStore(path) as store:
            asyncio.run(scenes.fill(store))
        scenes.spread(path)
        pipeline = scenes.invoices(random.Random(7))
        with SQLiteStore(path) as store, SQLiteStore(Path(home, "none.db")) as empty, scenes.living(store):
            make_large_run(store)
            asyncio.run(scenes.make_map(store, 10_000, "book-10000"))
            about = {
                "pipelines": {
                    "invoices": Served(
                        lambda run_id: None,
                        Submission(scenes.Invoice, scenes.submit_nothing),
                        scenes.lineage(pipeline),
                        {"max_cost_usd": scenes.BUDGET},
                    )
                }
            }
            servers = [_serve(store, listening, about), _serve(empty, bare, {})]
            try:
                with Browser(program) as browser:
                    addresses = [f"http://127.0.0.1:{at.getsockname()[1]}" for at in (listening, bare)]
                    for file in shoot(browser, *addresses, directory, arguments.only):
                        print(file)
            finally:
                for server, thread in servers:
                    server.should_exit = True
                    thread.join()


def _serve(
    store: SQLiteStore, listening: socket.socket, settings: dict[str, object]
) -> tuple[uvicorn.Server, threading.Thread]:
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    hosts = [f"127.0.0.1:{listening.getsockname()[1]}"]
    app = make_app(Settings(store=store, name="runs.db", hosts=hosts, **settings))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    return server, thread


def shoot(browser: Browser, url: str, empty_url: str, directory: Path, only: str = "") -> list[Path]:
    """A picture of every page and state, light and dark, in every size."""
    known = scenes.Scenes()
    pages = {
        "runs": "/",
        "nothing": "/?q=nowhere",
        "run": f"/run?id={known.failed}",
        "live": "/run?id=lives-1",
        "suspended": f"/run?id={known.asking}",
        "flow": f"/run?id={known.flow}",
        "map": f"/run?id={known.map}",
        "large": "/run?id=large",
        "items": "/run?id=book-10000",
        "attempt": f"/attempt?id={known.failed}&at=3",
        "retried": f"/attempt?id={known.failed}&at=2",
        "queued": "/run?id=queued-1",
        "submit": "/submit",
        "overview": "/overview?days=7",
        "pipeline": "/pipeline",
        "problem": "/run?id=nowhere",
    }
    addresses = {name: url + path for name, path in pages.items()}
    addresses |= {
        "empty": f"{empty_url}/",
        "empty-overview": f"{empty_url}/overview",
        "no-pipeline": f"{empty_url}/pipeline",
    }
    chosen = {name: address for name, address in addresses.items() if only in name}
    if not chosen:
        raise SystemExit(f"no page has {only!r} in its name; the pages are: {', '.join(addresses)}")
    outputs = []
    for name, address in chosen.items():
        for size, (width, height) in SIZES.items():
            for dark in (False, True):
                browser.size(width, height, dark=dark)
                browser.goto(address)
                whole = int(browser.eval("document.documentElement.scrollHeight"))
                browser.size(width, min(max(height, whole), _TALLEST), dark=dark)
                if name == "run" and width >= 1360:
                    browser.until("!document.getElementById('panel').hidden")
                time.sleep(0.15)  # Fonts and the first tick.
                outputs.append(directory / f"{name}-{size}-{'dark' if dark else 'light'}.png")
                browser.screenshot(outputs[-1])
    assert not [problem for problem in browser.problems if not re.search("404", problem)], browser.problems
    return outputs


if __name__ == "__main__":
    main()
