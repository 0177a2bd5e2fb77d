"""CPU time of a worker and of a Temporal server, for runs that Temporal dispatches.

    ./dev run python -m benchmarks.temporal [--runs 20] [--nodes 100]

A development server of Temporal with its data in memory, a worker in a process of its own, and a store on
PostgreSQL. Each node waits 5 ms as if for a provider. CPU time of each process is taken from the kernel, so
that what a step costs does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from temporalio.client import Client
from tests.servers_postgres import PostgresServer
from tests.servers_temporal import TemporalServer

from stroma import NodeContract, Pipeline, stroma_node
from stroma.temporal import TemporalRunner, stroma_worker

WAIT_SECONDS = 0.005
TICK = os.sysconf("SC_CLK_TCK")
QUEUE = "bench"


class State(BaseModel):
    n: int = 0
    text: str = "x" * 500


def pipeline(count: int) -> Pipeline:
    def node(number: int) -> Any:
        contract: NodeContract[Any, Any] = NodeContract(
            node_id=f"n{number}", input_schema=State, output_schema=State
        )

        @stroma_node(f"n{number}", contract)
        async def call(state: State) -> State:
            await asyncio.sleep(WAIT_SECONDS)
            return state.model_copy(update={"n": state.n + 1})

        return call

    return Pipeline("bench", [node(number) for number in range(count)])


async def work(address: str, store: str, count: int) -> None:
    client = await Client.connect(address)
    async with stroma_worker(client, QUEUE, [pipeline(count)], store=store):
        print("ready", flush=True)
        await asyncio.Event().wait()


def cpu_of(pid: int) -> float:
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def measure(server: TemporalServer, store: str, worker: int, runs: int, nodes: int) -> None:
    client = await Client.connect(server.address)
    runner = TemporalRunner(client, QUEUE, store)
    steps = pipeline(nodes)
    await runner.run(steps, State(), run_id="warm")
    assert server.process is not None

    def cpu() -> tuple[float, float, float, float]:
        assert server.process is not None
        return cpu_of(server.process.pid), cpu_of(worker), time.process_time(), time.monotonic()

    before = cpu()
    results = await asyncio.gather(
        *(runner.run(steps, State(), run_id=f"run-{number}") for number in range(runs))
    )
    of_server, of_worker, of_client, wall = (b - a for a, b in zip(before, cpu(), strict=True))
    assert all(result.final_state == State(n=nodes) for result in results)
    print(f"{runs} runs of {nodes} nodes in {wall:.1f} s\n")
    print("| CPU ms | a run | a step |\n| --- | ---: | ---: |")
    for name, seconds in (("worker", of_worker), ("server", of_server), ("client", of_client)):
        print(f"| {name} | {1000 * seconds / runs:.1f} | {1000 * seconds / runs / nodes:.2f} |")


def main(args: argparse.Namespace) -> None:
    server, postgres = TemporalServer(), PostgresServer()
    command = [sys.executable, "-m", "benchmarks.temporal", "--nodes", str(args.nodes), "--work"]
    worker = subprocess.Popen([*command, server.address, postgres.dsn], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        asyncio.run(measure(server, postgres.dsn, worker.pid, args.runs, args.nodes))
    finally:
        worker.kill()
        worker.wait()
        server.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--work", nargs=2, metavar=("ADDRESS", "STORE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        asyncio.run(work(*given.work, given.nodes))
    else:
        main(given)
