"""Large stores and long runs: what opens, lists, finds and resumes them, in time and memory.

    ./dev run python -m benchmarks.scale [--stores sqlite,postgres,redis] [--shapes 1000x1000,100000x10]
    [--nodes 10000]

A store of a million attempts in each shape (runs x attempts of each), filled with generated rows; beside it a
run of 10,000 nodes, through the runner. Each figure is a process of its own: the seconds of the call alone.
stderr has by how much it raised the peak of the process's memory. ``stroma ...`` rows are whole commands, start of
Python and all: their import takes some 0.3 s and 60 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.checkpoint.large_stores import OPERATIONS, fill, long_run, run_name

from stroma.checkpoint import open_store

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------- processes


def child(operation: str, url: str, number: int) -> None:
    call = long_run if operation == "long" else OPERATIONS[operation]

    async def main() -> None:
        store: Any = open_store(url)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Forget the highest peak so far.
        before = memory_kb("VmRSS")
        begun = time.perf_counter()
        found = await call(store, number)
        seconds = time.perf_counter() - begun
        peak = memory_kb("VmHWM") - before
        await store.aclose()
        print(json.dumps([seconds, peak / 1024, found]))

    asyncio.run(main())


def memory_kb(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))


_COMMAND = """
import sys
from benchmarks.scale import memory_kb
try:
    from stroma.cli import main
    main()
finally:
    print(memory_kb("VmHWM"), file=sys.stderr)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def measured(operation: str, url: str, number: int, **env: str) -> tuple[float, float, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--child", operation, url, str(number)]
    done = subprocess.run(
        command, env=environment(**env), capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    if done.returncode:
        return 0.0, 0.0, done.stderr.strip().splitlines()[-1]
    seconds, mb, found = json.loads(done.stdout)
    return seconds, mb, found


def commanded(*arguments: str) -> tuple[float, float, str]:
    """A command of ours as a whole: seconds, and its whole peak of memory."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", _COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    seconds, lines = time.perf_counter() - begun, done.stdout.count("\n")
    peak = int(done.stderr.split()[-1]) / 1024
    return seconds, peak, f"{lines} lines" if not done.returncode else f"exit code {done.returncode}"


@contextlib.contextmanager
def address(store: str, *, durable: bool = False) -> Iterator[str]:
    """Yield the URL of an empty store. ``durable``: also on Redis, whose writes take longer then."""
    from tests.servers import RedisServer
    from tests.servers_postgres import PostgresServer

    if store == "sqlite":
        with tempfile.TemporaryDirectory(prefix="stroma-bench-") as folder:
            yield f"sqlite:///{folder}/runs.db"
    elif store == "postgres":
        server = PostgresServer()
        try:
            yield server.dsn
        finally:
            server.stop()
    else:
        with RedisServer(appendonly="yes" if durable else "no") as redis:
            yield redis.url


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stores", default="sqlite,postgres,redis")
    parser.add_argument("--shapes", default="1000x1000,100000x10")
    parser.add_argument("--nodes", type=int, default=10_000)
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    columns = [f"{runs:,} runs of {attempts:,}" for runs, attempts in shapes]
    for store in options.stores.split(","):
        seconds: dict[str, list[str]] = {}

        def add(
            what: str, figures: tuple[float, float, Any], seconds: dict[str, list[str]] = seconds
        ) -> None:
            took, mb, found = figures
            print(f"{what}: {took:.3f} s, {mb:.0f} MB over the start, {found}", file=sys.stderr, flush=True)
            seconds.setdefault(what, []).append(f"{took:.3f}")

        for runs, attempts in shapes:
            with address(store) as url:
                begun = time.perf_counter()
                fill(url, runs, attempts)
                print(f"filled {store} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
                for what in OPERATIONS:
                    add(what, measured(what, url, runs))
                add("`stroma runs`", commanded("runs", "--db", url))
                add("`stroma show RUN`", commanded("show", run_name(runs // 2), "--db", url))
        print(f"| seconds on {store} | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
        for what, cells in seconds.items():
            print(f"| {what} | {' | '.join(cells)} |")
        print()
        if options.nodes:
            with address(store) as url:
                done = measured("long", url, options.nodes, STOPS="1")[0]
                resumed = measured("long", url, options.nodes)[0]
            print(
                f"A run of {options.nodes:,} nodes took {done:.1f} s in {store}, and its resume at the last node "
                f"{resumed:.1f} s.\n"
            )
    return None


if __name__ == "__main__":
    main()
