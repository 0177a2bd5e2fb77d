"""The queue of DBOS in one process: ``python -m benchmarks.peers.dbos_queue ADDRESS RUNS POLLING_SECONDS``; JSON out."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import os
import sys
import time
from typing import Any

from benchmarks.peers.work import AT_ONCE, START, In, Out, node, timed


async def main(address: str, runs: int, polling_seconds: float) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    dbos: Any = importlib.import_module("dbos")
    config = {
        "name": "bench",
        "system_database_url": address,
        "log_level": "ERROR",
        "run_admin_server": False,
    }
    dbos.DBOS(config=config)

    async def step(state: dict[str, Any]) -> dict[str, Any]:
        return Out.model_validate(await node(In.model_validate(state))).model_dump()

    each = dbos.DBOS.step(name="n0")(step)

    async def flow(state: dict[str, Any]) -> dict[str, Any]:
        started = time.time()
        return {**await each(state), "started": started}

    workflow = dbos.DBOS.workflow(name="flow")(flow)
    dbos.DBOS.launch()
    await dbos.DBOS.register_queue_async(
        "bench", worker_concurrency=AT_ONCE, polling_interval_sec=polling_seconds
    )
    result: dict[str, Any] = {"version": importlib.metadata.version("dbos")}
    places = asyncio.Semaphore(AT_ONCE)
    handles: list[Any] = []

    async def direct() -> None:
        async def one() -> None:
            async with places:
                await workflow(START)

        await asyncio.gather(*(one() for _ in range(runs)))

    async def submit() -> None:
        async def one() -> None:
            async with places:
                handles.append(await dbos.DBOS.enqueue_workflow_async("bench", workflow, START))

        await asyncio.gather(*(one() for _ in range(runs)))

    async def both() -> None:
        await submit()
        for handle in handles:
            await handle.get_result()

    await workflow(START)
    result["direct"] = await timed(direct, runs)
    result["submit and queue"] = await timed(both, runs)
    latencies = []
    for _ in range(20):
        await asyncio.sleep(0.3)
        begun = time.time()
        handle = await dbos.DBOS.enqueue_workflow_async("bench", workflow, START)
        latencies.append(((await handle.get_result())["started"] - begun) * 1000)
    result["latencies"] = latencies
    print(json.dumps(result), file=answers, flush=True)
    os._exit(0)  # It keeps threads.


asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
