"""The queue: one worker beside ``run_many`` on the same store, its latency, its idle time, and DBOS beside it.

    ./dev run python -m benchmarks.queue [--stores sqlite,postgres,redis] [--runs 10000] [--rounds 1]
    [--peer-runs 1000]

Runs of one node on a state of 1 KB, 100 at once. First so many runs directly, then as many submitted, then
one worker that claims and runs them. A ratio is of two figures of one process and round. CPU is that of the
process, without the server's. Latencies are from a submission in one process to the start of the run in an
idle worker in another one. DBOS has one process, 100 workflows at once, and looks at its queue every second
(its default), or every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.durable import ROOT, python_of
from benchmarks.scale import address
from benchmarks.temporal import cpu_of

IDLE_SECONDS = 60


def child(module: str, *arguments: object) -> Any:
    """Return what a process prints as JSON."""
    command = [python_of(module), "-m", f"benchmarks.peers.{module}", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, check=True, timeout=1800
    )
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}


def rates(store: str, runs: int, rounds: int) -> None:
    for _ in range(rounds):
        with address(store, durable=True) as url:
            figures = child("ours_queue", url, runs)
        (direct, direct_cpu), (submit, submit_cpu), (queue, queue_cpu) = figures.values()
        print(
            f"| {store} | {direct:,.0f} | {submit:,.0f} | {queue:,.0f} | {queue / direct:.2f} "
            f"| {direct_cpu:,.0f} | {submit_cpu:,.0f} | {queue_cpu:,.0f} | {direct_cpu / queue_cpu:.2f} |",
            flush=True,
        )


def waits(store: str) -> None:
    """Print how long a run waits for an idle worker, and what an idle worker costs."""
    with address(store, durable=True) as url:
        command = [sys.executable, "-m", "benchmarks.peers.ours_queue", url, "--work"]
        worker = subprocess.Popen(command, cwd=ROOT, env=_environment())
        try:
            latencies = child("ours_queue", url, "--latencies")
            before, since = cpu_of(worker.pid), time.monotonic()
            time.sleep(IDLE_SECONDS)
            idle = (cpu_of(worker.pid) - before) / (time.monotonic() - since)
        finally:
            worker.kill()
            worker.wait()
    print(f"| {store} | {_spread(latencies)} | {100 * idle:.2f} % |", flush=True)


def peer(runs: int) -> None:
    """Print our queue and that of DBOS on a PostgreSQL server, one after the other."""
    with address("postgres", durable=True) as url:
        ours = child("ours_queue", url, runs)
        (direct, direct_cpu), (submit, submit_cpu), (queue, queue_cpu) = ours.values()
        both = 1 / (1 / submit + 1 / queue)
        print(
            f"| Stroma | {direct:,.0f} | {both:,.0f} | {direct_cpu:,.0f} | {submit_cpu + queue_cpu:,.0f} | |"
        )
        for seconds in (1.0, 0.05):
            figures = child("dbos_queue", url, runs, seconds)
            (direct, direct_cpu), (both, both_cpu) = figures["direct"], figures["submit and queue"]
            print(
                f"| DBOS {figures['version']}, every {seconds:g} s | {direct:,.0f} | {both:,.0f} | {direct_cpu:,.0f} "
                f"| {both_cpu:,.0f} | {_spread(figures['latencies'])} |",
                flush=True,
            )


def _spread(latencies: list[float]) -> str:
    return f"{statistics.median(latencies):.0f} ({min(latencies):.0f} to {max(latencies):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stores", default="sqlite,postgres,redis")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer-runs", type=int, default=1000, help="beside DBOS; 0 leaves it out")
    options = parser.parse_args()
    stores = options.stores.split(",")
    if options.runs:
        print(
            "| runs a second | run_many | submit | worker | worker / run_many | CPU us: run_many | submit | worker | ratio |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for store in stores:
            rates(store, options.runs, options.rounds)
    print("\n| idle worker | submit to start, ms | CPU of a core |\n| --- | ---: | ---: |")
    for store in stores:
        waits(store)
    if options.peer_runs:
        print(
            "\n| runs a second | direct | submitted and run | CPU us: direct | submitted and run | submit to start, ms |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        peer(options.peer_runs)


if __name__ == "__main__":
    main()
