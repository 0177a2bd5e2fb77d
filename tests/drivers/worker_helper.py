"""A worker for Temporal in a process of its own, which tests kill and stop: ADDRESS QUEUE STORE DIARY [JOB].

JOB: "owner" drives runs of a pipeline with a place, "place" is a worker of that place.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from temporalio.client import Client
from tests.kit import NEVER, ONCE, Num, node, same
from tests.shared_stores import opened

from stroma import NodeContract, Pipeline, RunConfig, current_node, stroma_node
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


def place_of(queue: str) -> str:
    return f"{queue}-gpu"


def placed_pipeline(queue: str, diary: str = "", *, effect: bool = False) -> Pipeline:
    """Return a pipeline of a node at a place: each call writes a line to a file and awaits DIARY.go."""

    async def call(state: Num) -> Num:
        with open(diary, "a") as file:
            file.write(f"call {current_node().attempt} {os.getpid()}\n")
        while not os.path.exists(f"{diary}.go"):
            await asyncio.sleep(0.02)
        return Num(n=state.n + 1)

    name = "effect" if effect else "placed"
    contract = NodeContract(
        node_id=name, input_schema=Num, output_schema=Num, effect=effect, place=place_of(queue)
    )
    return Pipeline(name, [node("first", same), stroma_node(name, contract)(call)])


async def work(address: str, queue: str, store_place: str, diary: str, job: str = "") -> None:
    while True:
        try:
            client = await Client.connect(address)
            break
        except RuntimeError:
            await asyncio.sleep(0.1)
    config = RunConfig(policy_map=ONCE if job else NEVER, lease_seconds=LEASE_SECONDS)
    pipelines = [pipeline(diary), placed_pipeline(queue, diary), placed_pipeline(queue, diary, effect=True)]
    place = place_of(queue) if job == "place" else None
    with opened("postgres", store_place) as store:
        worker = stroma_worker(
            client, queue, pipelines, store=store, config=config, drain_seconds=20, place=place
        )
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(worker.run())
        loop.add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(worker.shutdown()))
        print("ready", flush=True)
        await running


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
