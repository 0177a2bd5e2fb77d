"""One engine in this process: JSON lines in, JSON lines out. See benchmarks.durable.

    python -m benchmarks.peers MODULE ADDRESS NODES

``{"runs": 64, "round": 3}`` is answered with the seconds of the wall and of this process's CPU.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import time


async def main() -> None:
    # What an engine prints must not reach the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, address, nodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    engine = importlib.import_module(f"benchmarks.peers.{name}")
    run, close = await engine.opened(address, nodes)
    assert await run("warm-up") == nodes
    print(json.dumps({"versions": engine.versions()}), file=answers, flush=True)
    while line := sys.stdin.readline():
        job = json.loads(line)
        ids = [f"{job['round']}-{job['runs']}-{number}" for number in range(job["runs"])]
        gc.collect()
        cpu, begun = time.process_time(), time.perf_counter()
        counts = await asyncio.gather(*map(run, ids))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert counts == [nodes] * len(ids), counts
        print(json.dumps({"wall": wall, "cpu": cpu}), file=answers, flush=True)
    await close()
    answers.close()
    os._exit(0)  # Some engines keep threads.


asyncio.run(main())
