"""A worker in a process of its own: ``python -m tests.drivers.worker_helper ADDRESS QUEUE FOLDER``.

Each call of a node leaves a file in the folder; the node "slow" waits until there is a file "go".
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
import uuid
from typing import Any

from temporalio.client import Client
from tests.kit import Num, node

from stroma import Pipeline
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


async def main(address: str, queue: str, folder: str) -> None:
    await stroma_worker(await Client.connect(address), queue, [pipeline(pathlib.Path(folder))]).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
