"""What runs on a Temporal cluster cost: workers beside each other, one that dies, and what a cluster of N gives.

    ./dev run python -m benchmarks.temporal [--runs 1000] [--scale-runs 100] [--workers 1 2 3 4]

Runs of three nodes, each of which waits 20 ms as if for a provider; a development server of Temporal with its data in
memory, workers in processes of their own. CPU time of each process is taken from the kernel, so that what a step costs does
not depend on what else the machine does; runs per second of wall time do, and are to be read as ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.chaos.cluster_worker import connect
from tests.servers_temporal import TemporalServer

from stroma import NodeContract, Pipeline, current_node, stroma_node
from stroma.temporal import TemporalRunner, stroma_worker

NODES = 3
WAIT = 0.02
#: Steps that a run asks workers for: its nodes, and its two ends.
STEPS = NODES + 2
HEARTBEAT = 5.0
TICK = os.sysconf("SC_CLK_TCK")


class State(BaseModel):
    n: int = 0
    text: str = "x" * 500


def pipeline(file: int | None = None) -> Pipeline:
    """Each call is a line in a file: who, which run, which node, when."""

    def node(number: int) -> Any:
        contract: NodeContract[Any, Any] = NodeContract(
            node_id=f"n{number}", input_schema=State, output_schema=State
        )

        @stroma_node(f"n{number}", contract)
        async def call(state: State) -> State:
            here = current_node()
            assert file is not None
            os.write(file, f"{os.getpid()} {here.run_id} {number} {time.time()}\n".encode())
            await asyncio.sleep(WAIT)
            return state.model_copy(update={"n": state.n + 1})

        return call

    return Pipeline("bench", [node(number) for number in range(NODES)])


async def work(address: str, queue: str, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    client = await connect(address)
    async with stroma_worker(client, queue, [pipeline(file)]):
        print("ready", flush=True)
        await asyncio.Event().wait()


class Workers:
    def __init__(self, address: str, queue: str, path: Path, count: int) -> None:
        command = [sys.executable, "-m", "benchmarks.temporal", "--work", address, queue, str(path)]
        self.processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"

    def cpu(self) -> float:
        return sum(cpu_of(process.pid) for process in self.processes if process.poll() is None)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def cpu_of(pid: int) -> float:
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def runs(runner: TemporalRunner, count: int, prefix: str, done: list[float]) -> None:
    results = await runner.run_many(
        pipeline(), [State() for _ in range(count)], max_concurrency=100,
        run_ids=lambda number, _: f"{prefix}-{number}",
        on_result=lambda _, result: done.append(time.time()),
    )  # fmt: skip
    for result in results:
        assert not isinstance(result, Exception), result
        assert result.final_state == State(n=NODES), result.failure


async def scale(server: TemporalServer, count: int, workers: int, folder: Path) -> dict[str, float]:
    """Some runs with so many workers."""
    queue, path = f"scale-{workers}", folder / f"scale-{workers}"
    client = await connect(server.address)
    runner = TemporalRunner(client, queue, heartbeat_seconds=HEARTBEAT)
    assert server.process is not None
    made = Workers(server.address, queue, path, workers)
    try:
        await runs(runner, 2 * workers, f"warm-{workers}", [])
        before = cpu_of(server.process.pid), made.cpu(), time.process_time(), time.monotonic()
        await runs(runner, count, queue, [])
        after = cpu_of(server.process.pid), made.cpu(), time.process_time(), time.monotonic()
    finally:
        made.end()
    steps = count * STEPS
    of_server, of_workers, of_client, wall = (b - a for a, b in zip(before, after, strict=True))
    return {
        "runs/s": count / wall,
        "server": of_server / steps,
        "worker": of_workers / steps,
        "client": of_client / count,
    }


async def death(server: TemporalServer, count: int, folder: Path) -> dict[str, Any]:
    """Three workers share the runs, and one is killed in the middle."""
    queue, path = "death", folder / "death"
    client = await connect(server.address)
    runner = TemporalRunner(client, queue, heartbeat_seconds=HEARTBEAT, redelivery_seconds=0.1)
    made = Workers(server.address, queue, path, 3)
    done: list[float] = []
    try:
        begun = time.time()
        running = asyncio.create_task(runs(runner, count, queue, done))
        while len(done) < count * 0.4 and not running.done():
            await asyncio.sleep(0.02)
        dead = made.processes[0]
        dead.send_signal(signal.SIGKILL)
        killed = time.time()
        dead.wait()
        await running
        ended = time.time()
    finally:
        made.end()
    calls = [line.split() for line in path.read_text().splitlines()]
    at: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for pid, run_id, node, when in calls:
        at.setdefault((run_id, node), []).append((float(when), int(pid)))
    again = [sorted(found) for found in at.values() if len(found) > 1]
    # What the dead one was at, until another one has begun it.
    waits = [found[-1][0] - killed for found in again if found[0][1] == dead.pid]
    shares = Counter(int(pid) for pid, _, _, when in calls if float(when) < killed)
    rates = [
        len([when for when in done if lower < when <= upper]) / (upper - lower)
        for lower, upper in ((begun, killed), (killed, killed + HEARTBEAT), (killed + HEARTBEAT, ended))
    ]
    return {
        "calls": len(calls),
        "again": len(again),
        "strangers": len(again) - len(waits),
        "waits": sorted(waits),
        "shares": sorted((n / sum(shares.values()) for n in shares.values()), reverse=True),
        "rates": rates,
        "seconds": ended - begun,
    }


async def main(args: argparse.Namespace) -> None:
    server = TemporalServer()
    try:
        with tempfile.TemporaryDirectory() as folder:
            load = os.getloadavg()[0]
            print(f"{os.cpu_count()} cores; load before this began: {load:.1f}\n")
            print(
                "| workers | runs/s | to 1 worker | CPU ms a step: worker | server | CPU ms a run: client |"
            )
            print("| ---: | ---: | ---: | ---: | ---: | ---: |")
            found = {}
            for count in args.workers:
                one = found[count] = await scale(server, args.scale_runs, count, Path(folder))
                ratio = one["runs/s"] / found[args.workers[0]]["runs/s"]
                print(
                    f"| {count} | {one['runs/s']:.1f} | {ratio:.2f} | {1000 * one['worker']:.1f} | "
                    f"{1000 * one['server']:.1f} | {1000 * one['client']:.1f} |",
                    flush=True,
                )
            worker, own = (
                statistics.median(one[who] for one in found.values()) for who in ("worker", "server")
            )
            print(f"\nby calculation, steps of {WAIT * 1000:.0f} ms, a core for each worker:\n")
            print("| workers | steps/s of the workers | cores of the server for that |")
            print("| ---: | ---: | ---: |")
            for count in (1, 2, 4, 8, 16, 32):
                print(f"| {count} | {count / worker:.0f} | {count * own / worker:.1f} |")
            if args.runs:
                told = await death(server, args.runs, Path(folder))
                waits = told["waits"]
                print(f"\n{args.runs} runs on three workers, one killed after 40 %: {told['seconds']:.0f} s")
                print("shares of the calls until then: " + ", ".join(f"{s:.0%}" for s in told["shares"]))
                before, during, after = told["rates"]
                print(
                    f"runs/s before: {before:.1f}; in the {HEARTBEAT:g} s after (the heartbeat): {during / before:.2f} "
                    f"of that; then: {after / before:.2f}"
                )
                print(
                    f"{told['again']} of {told['calls']} calls were repeated, {told['strangers']} of them not the dead one's"
                )
                if waits:
                    print(
                        f"begun again after the kill: the first in {waits[0]:.1f} s, the median in "
                        f"{statistics.median(waits):.1f} s, the last in {waits[-1]:.1f} s"
                    )
    finally:
        server.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, help="that a worker dies in; 0 for none")
    parser.add_argument("--scale-runs", type=int, default=100, help="for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--work", nargs=3, metavar=("ADDRESS", "QUEUE", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    asyncio.run(work(*given.work) if given.work else main(given))
