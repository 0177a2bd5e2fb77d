"""Our queue in one process: rates of one worker. ``python -m benchmarks.peers.ours_queue ADDRESS RUNS``; JSON out.

With ``--work`` instead of a number it only serves; each run notes when it started.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from benchmarks.peers.work import AT_ONCE, START, In, Out, node, timed
from stroma import NodeContract, Pipeline, StromaRunner, open_store, stroma_node


@stroma_node("n0", NodeContract(node_id="n0", input_schema=In, output_schema=Out))
async def step(state: In) -> dict[str, Any]:
    return {**await node(state), "text": repr(time.time())}


PIPELINE = Pipeline("bench", [step])


async def rates(runner: StromaRunner, runs: int) -> dict[str, tuple[float, float]]:
    """Run so many runs directly, then submit as many, then let a worker claim and run them."""
    state = In.model_validate(START)

    async def direct() -> None:
        results = await runner.run_many(PIPELINE, [state] * runs, max_concurrency=AT_ONCE)
        assert len(results) == runs

    async def submit() -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            async with places:
                await runner.submit(PIPELINE, state)

        await asyncio.gather(*(one() for _ in range(runs)))

    async def serve() -> None:
        left, served = runs, asyncio.Event()

        def on_result(run_id: str, result: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                served.set()

        worker = asyncio.ensure_future(runner.serve(PIPELINE, max_concurrency=AT_ONCE, on_result=on_result))
        await served.wait()
        await runner.shutdown()
        await worker

    await runner.run(PIPELINE, state)
    return {
        name: await timed(call, runs)
        for name, call in (("direct", direct), ("submit", submit), ("queue", serve))
    }


async def latencies(runner: StromaRunner, count: int) -> list[float]:
    """Return the milliseconds from each submission to the start of its run, in the worker that serves the store."""
    state, result = In.model_validate(START), []
    for _ in range(count):
        await asyncio.sleep(0.3)
        begun = time.time()
        handle = await runner.submit(PIPELINE, state)
        ended = await handle.result(timeout=60)
        assert ended.output is not None
        result.append((float(ended.output.model_dump()["text"]) - begun) * 1000)
    return result


async def main(address: str, what: str) -> None:
    logging.disable(logging.WARNING)
    store: Any = open_store(address)
    async with store:
        runner = StromaRunner.quick(store=store)
        if what == "--work":
            await runner.serve(PIPELINE)
        elif what == "--latencies":
            print(json.dumps(await latencies(runner, 40)))
        else:
            print(json.dumps(await rates(runner, int(what))))


asyncio.run(main(sys.argv[1], sys.argv[2]))
