"""A worker in a process of its own: ``python -m tests.drivers.worker_helper ADDRESS QUEUE FOLDER [flow|effect|reconciled]``.

Each call of a node leaves a file in the folder; the node "slow" waits until there is a file "go". With "flow" the worker
has the flow of the chaos rounds, whose calls are lines of the file "calls"; with "effect" and "reconciled" an effect that
never returns.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import sys
import uuid
from typing import Any

from temporalio.client import Client
from tests.chaos.flows import make_flow
from tests.kit import NEVER, Num, node

from stroma import NodeContract, NotDone, Pipeline, RunConfig, default_policy_map, stroma_node
from stroma.temporal import stroma_worker


def pipeline(folder: pathlib.Path) -> Pipeline:
    def step(node_id: str, *, waits: bool = False) -> Any:
        async def func(state: Num) -> Any:
            (folder / f"{node_id}.{os.getpid()}.{uuid.uuid4().hex}").touch()
            while waits and not (folder / "go").exists():
                await asyncio.sleep(0.02)
            return {"n": state.n + 1}, 10

        return node(node_id, func)

    return Pipeline("killed", [step("before"), step("slow", waits=True), step("after")])


def charging(folder: pathlib.Path, *, reconciles: bool) -> Pipeline:
    async def charge(state: Num) -> Any:
        (folder / f"charge.{os.getpid()}.{uuid.uuid4().hex}").touch()
        await asyncio.Event().wait()

    async def look(state: Num, key: str) -> Any:
        return {"n": 7} if list(folder.glob("charge.*")) else NotDone()

    contract = NodeContract(
        node_id="charge",
        input_schema=Num,
        output_schema=Num,
        effect=True,
        reconcile=look if reconciles else None,
    )
    return Pipeline("charging", [stroma_node("charge", contract)(charge)])


def noted_flow(folder: pathlib.Path) -> Any:
    file = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    return make_flow(note, random.Random())


async def main(address: str, queue: str, folder: str, kind: str = "") -> None:
    made: Any
    if kind in ("effect", "reconciled"):
        made = charging(pathlib.Path(folder), reconciles=kind == "reconciled")
    else:
        made = (noted_flow if kind == "flow" else pipeline)(pathlib.Path(folder))
    # Without a cache, the workflow of a killed worker is not waited for by its sticky queue.
    options = {"max_cached_workflows": 0} if kind == "flow" else {}
    config = RunConfig(policy_map=NEVER if kind == "flow" else default_policy_map())
    await stroma_worker(await Client.connect(address), queue, [made], config=config, **options).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
