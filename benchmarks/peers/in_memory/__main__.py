"""One library in this process: JSON lines in, JSON lines out. See benchmarks.compare.

    python -m benchmarks.peers.in_memory MODULE

``{"nodes": 100}`` is answered with the CPU microseconds per node of one sample, and of the floor beside it.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import time

from benchmarks.peers.in_memory import floor
from benchmarks.peers.in_memory.work import Run

SECONDS = 0.05


async def sample(run: Run, nodes: int, times: int) -> float:
    """CPU microseconds per node."""
    gc.collect()
    begin = time.process_time()
    for _ in range(times):
        assert await run() == nodes
    return (time.process_time() - begin) / (times * nodes) * 1e6


async def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not reach the protocol.
    peer = importlib.import_module(f"benchmarks.peers.in_memory.{sys.argv[1]}")
    print(json.dumps({"versions": peer.versions()}), file=answers, flush=True)
    built: dict[int, list[tuple[Run, int]]] = {}
    while line := sys.stdin.readline():
        nodes = int(json.loads(line)["nodes"])
        if nodes not in built:
            built[nodes] = []
            for module in (peer, floor):
                run = module.build(nodes)
                await sample(run, nodes, 1)  # Warm.
                cost = await sample(run, nodes, 1)
                built[nodes].append((run, max(1, round(SECONDS * 1e6 / (cost * nodes)))))
        (run, times), (base, base_times) = built[nodes]
        before = await sample(base, nodes, base_times)
        cost = await sample(run, nodes, times)
        after = await sample(base, nodes, base_times)
        print(json.dumps({"cpu": cost, "floor": (before + after) / 2}), file=answers, flush=True)
    answers.close()
    os._exit(0)  # Some libraries keep threads.


asyncio.run(main())
