"""A worker for Temporal in a process of its own, which tests kill and stop: ADDRESS QUEUE PLACE DIARY."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from temporalio.client import Client
from tests.kit import NEVER, Num, node
from tests.shared_stores import opened

from stroma import Pipeline, RunConfig
from stroma.temporal import stroma_worker

NODES = 8
LEASE_SECONDS = 2.0
#: A call takes longer than a test needs to kill its process in the middle of it.
CALL_SECONDS = 0.4


def pipeline(diary: str = "") -> Pipeline:
    """Return nodes whose calls and ends are lines of a file: what, node, process."""

    def write(what: str, number: int) -> None:
        with open(diary, "a") as file:
            file.write(f"{what} {number} {os.getpid()}\n")

    def step(number: int) -> Any:
        async def call(state: Num) -> Num:
            write("call", number)
            await asyncio.sleep(CALL_SECONDS)
            write("done", number)
            return Num(n=state.n + 1)

        return node(f"n{number}", call)

    return Pipeline("slow", [step(number) for number in range(NODES)])


async def work(address: str, queue: str, place: str, diary: str) -> None:
    while True:
        try:
            client = await Client.connect(address)
            break
        except RuntimeError:
            await asyncio.sleep(0.1)
    config = RunConfig(policy_map=NEVER, lease_seconds=LEASE_SECONDS)
    with opened("postgres", place) as store:
        worker = stroma_worker(client, queue, [pipeline(diary)], store=store, config=config, drain_seconds=20)
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(worker.run())
        loop.add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(worker.shutdown()))
        print("ready", flush=True)
        await running


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
