"""How long the web interface takes for its pages, in CPU milliseconds of the server.

    ./dev run python -m benchmarks.pages

A run of 1,000 nodes and 2,000 attempts; the bound is 200 ms. The floor escapes the same bytes and packs them: what it
takes tells how fast this machine is at the moment. Each sample of ours is followed by one of the floor.
"""

from __future__ import annotations

import gzip
import html
import logging
import statistics
import tempfile
import time
from pathlib import Path

from starlette.requests import Request
from tests.ui.test_large_run import make_large_run

from stroma import SQLiteStore
from stroma.checkpoint.history import History
from stroma.ui.app import Settings
from stroma.ui.pages import Pages
from stroma.ui.security import Keys

ROUNDS = 15


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as home, SQLiteStore(Path(home, "runs.db")) as store:
        make_large_run(store)
        pages = Pages(Settings(store=store, name="runs.db", hosts=[]), History(store), Keys())
        request = Request(
            {"type": "http", "query_string": b"id=large", "headers": [(b"accept-encoding", b"gzip")], "path": "/run", "method": "GET"}
        )  # fmt: skip
        body = gzip.decompress(bytes(pages.run(request).body)).decode()
        taken, floor = [], []
        for _ in range(ROUNDS):
            began = time.process_time()
            answer = pages.run(request)
            taken.append((time.process_time() - began) * 1000)
            began = time.process_time()
            gzip.compress(html.escape(body).encode(), 6)
            floor.append((time.process_time() - began) * 1000)
    ratio = statistics.median(a / b for a, b in zip(taken, floor, strict=True))
    print(f"{len(body):,} bytes, packed {len(bytes(answer.body)):,}")
    print(f"{statistics.median(taken):.0f} ms of CPU ({min(taken):.0f} at best), {ratio:.1f} times the floor")


if __name__ == "__main__":
    main()
