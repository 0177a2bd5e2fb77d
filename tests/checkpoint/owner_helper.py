"""A process of tests/checkpoint/test_run_ownership.py: `python owner_helper.py KIND PLACE SIDE_FILE
JSON_OPTIONS`; for the first two see tests/shared_stores.py.

Runs three nodes under one run id. Each call of a node appends "PID node" to the side file. Prints what became
of it.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any

from pydantic import BaseModel
from tests.shared_stores import opened

from stroma import RunBusy, StromaRunner, stroma_node


class Count(BaseModel):
    n: int = 0


def make(number: int, side: int, waits: dict[str, float]) -> Any:
    @stroma_node(f"n{number}", input=Count, output=Count)
    async def step(state: Count) -> Any:
        os.write(side, f"{os.getpid()} n{number}\n".encode())
        print(f"in n{number}", flush=True)
        await asyncio.sleep(waits.get(f"sleep{number}", 0))
        time.sleep(waits.get(f"block{number}", 0))
        return {"n": state.n + 1}, 10

    return step


async def main(kind: str, where: str, side_file: str, options: str) -> None:
    inputs = json.loads(options)
    waits = inputs.pop("waits", {})
    side = os.open(side_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nodes = [make(number, side, waits) for number in range(3)]
    async with opened(kind, where) as store:
        runner = StromaRunner.quick(store=store, run_id="owned", **inputs)
        print("ready", flush=True)
        if inputs.get("resume") is None and waits.get("wait"):
            await asyncio.to_thread(sys.stdin.readline)
        try:
            result = await runner.run(nodes, Count(n=waits.get("input", 0)))
        except RunBusy as busy:
            print(f"busy {busy.holder}", flush=True)
            return
        failure = type(result.failure.exception).__name__ if result.failure is not None else "-"
        print(f"{result.status} {failure} {result.final_state!r}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
