"""What stored events cost: 50 runs that emit 1,000 deltas a second together, on one Postgres.

    ./dev run python -m benchmarks.events [--seconds 10] [--rounds 3]

A line for each round: the percentage of a core that this process and the server use, without events, with
stored events, and with a follower for each run as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from tests.kit import Num, Text, node
from tests.servers_postgres import shared_postgres

from stroma import StromaRunner, current_node
from stroma.checkpoint import PostgresStore

RUNS = 50
DELTAS = 20  # of each run, a second


def cpu_seconds(server: Any) -> tuple[float, float]:
    """Return the CPU time of this process, and of the server with the connections that have ended."""
    postmaster = int((server.data / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    ticks = 0
    for pid in (postmaster, *map(int, children)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:13]))
        if pid == postmaster:
            ticks += sum(map(int, fields[13:15]))
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


async def measure(server: Any, seconds: float, kind: str) -> tuple[float, float]:
    """Return the percentages of a core that this process and the server use."""

    async def speak(state: Num) -> Text:
        start = time.perf_counter()
        for number in range(int(seconds * DELTAS)):
            current_node().emit("a few words ")
            await asyncio.sleep(max(0.0, start + (number + 1) / DELTAS - time.perf_counter()))
        return Text(text="")

    work = [node("speak", speak, output=Text)]
    async with PostgresStore(server.dsn, schema=f"events_{time.time_ns()}") as store:
        runner = StromaRunner.quick(store=store, events="none" if kind == "none" else "store")
        await runner.run([node("warm", lambda state: state)], Num(n=1))

        async def follow(run_id: str) -> None:
            async for _ in runner.follow(run_id):
                pass

        async def one(number: int) -> None:
            await asyncio.sleep(number / DELTAS / RUNS)
            await runner.run(work, Num(n=1), run_id=f"run {number}")

        before = cpu_seconds(server)
        tasks = [asyncio.create_task(one(number)) for number in range(RUNS)]
        if kind == "followed":
            await asyncio.sleep(0.5)
            tasks += [asyncio.create_task(follow(f"run {number}")) for number in range(RUNS)]
        await asyncio.gather(*tasks)
        after = cpu_seconds(server)
    own, servers = (100 * (b - a) / seconds for a, b in zip(before, after, strict=True))
    return own, servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    server = shared_postgres()
    print(f"{RUNS} runs, {RUNS * DELTAS:,} deltas a second; % of a core: process + server")
    for _ in range(given.rounds):
        for kind in ("none", "stored", "followed"):
            own, servers = asyncio.run(measure(server, given.seconds, kind))
            print(f"{kind:10}{own:6.1f} +{servers:5.1f} ={own + servers:6.1f}", flush=True)


if __name__ == "__main__":
    main()
