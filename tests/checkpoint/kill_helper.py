"""The child of tests/checkpoint/test_kill.py: `python kill_helper.py DATABASE SIDE_FILE` runs 20 nodes on
SQLite, resuming.

Each call of a node's function appends "call N" to the side file, and its end "done N", each in one write.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from stroma import NodeContract, StromaRunner, stroma_node
from stroma.checkpoint.sqlite.store import SQLiteStore

NODES = 20


class Count(BaseModel):
    seen: list[int] = []


def make(number: int, side: int) -> Callable[..., Any]:
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=f"node {number}", input_schema=Count, output_schema=Count
    )

    @stroma_node(f"node {number}", contract)
    async def step(state: Count) -> Any:
        os.write(side, f"call {number}\n".encode())
        # Something to be killed in: sometimes awake, sometimes asleep.
        if number % 3 == 0:
            end = time.perf_counter() + 0.005
            while time.perf_counter() < end:
                pass
        else:
            await asyncio.sleep(0.005)
        os.write(side, f"done {number}\n".encode())
        return {"seen": [*state.seen, number]}, 7

    return step


async def main(database: str, side_file: str) -> None:
    side = os.open(side_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nodes = [make(number, side) for number in range(NODES)]
    os.write(1, b"ready\n")
    async with SQLiteStore(database) as store:
        runner = StromaRunner.quick(store=store, run_id="killed", resume=True)
        result = await runner.run(nodes, Count())
    assert result.final_state == Count(seen=list(range(NODES))), result
    os.write(1, f"{result.status}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
