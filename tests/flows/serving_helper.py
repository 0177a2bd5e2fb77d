"""A worker process of test_worker_processes.py: `python serving_helper.py KIND WHERE SIDE_FILE`."""

from __future__ import annotations

import asyncio
import os
import sys

from pydantic import BaseModel
from tests.kit import NEVER, Num, node
from tests.shared_stores import opened

from stroma import Flow, Pipeline, RunConfig, StromaRunner, current_node, stroma_flow


class Yes(BaseModel):
    add: int


def note(state: Num) -> None:
    """Append the call and this process to the side file, in one write."""
    here = current_node()
    side = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(side, f"{here.run_id} {here.node_id} {here.branch} {state.n} {os.getpid()}\n".encode())
    os.close(side)


async def _add(state: Num) -> Num:
    note(state)
    await asyncio.sleep(0.01)
    return Num(n=state.n + 1)


async def _double(state: Num) -> Num:
    note(state)
    await asyncio.sleep(0.01)
    return Num(n=state.n * 2)


add, double = node("add", _add), node("double", _double)


@stroma_flow("inner", input=Num, output=Num)
async def inner(flow: Flow, state: Num) -> Num:
    return await flow.step(double, await flow.step(add, state))


@stroma_flow("work", input=Num, output=Num)
async def work(flow: Flow, state: Num) -> Num:
    """A branch, a loop, parallel steps, a map, a child flow, a sleep and a question."""
    state = await flow.step(add if state.n % 2 else double, state)
    for _ in range(2):
        state = await flow.step(add, state)
    async with asyncio.TaskGroup() as group:
        one = group.create_task(flow.step(add, state))
        two = group.create_task(flow.step(double, state))
    items = await flow.map(add, [Num(n=state.n + i) for i in range(3)])
    child = await flow.run(inner, state)
    await flow.sleep(0.3)
    answer = await flow.wait_for(Yes, reason="Go on?")
    total = one.result().n + two.result().n + sum(item.n for item in items) + child.n + answer.add
    return await flow.step(add, Num(n=total))


CONFIG = RunConfig(lease_seconds=2, inline_wait_seconds=0, max_recoveries=10_000, policy_map=NEVER)
pipeline = Pipeline("work", [work], config=CONFIG)
#: Steps that a run commits.
STEPS = 1 + 2 + 2 + 3 + 2 + 1


def expected(n: int, answer: int) -> int:
    """Return the end of a run that began with ``n``."""
    state = (n + 1 if n % 2 else n * 2) + 2
    return (state + 1) + 2 * state + sum(state + i + 1 for i in range(3)) + 2 * (state + 1) + answer + 1


async def main() -> None:
    store = opened(*sys.argv[1:3])
    runner = StromaRunner.quick(store=store)
    runner = StromaRunner(runner.registry, runner.checkpoint_manager)  # Uses the config of the pipeline.
    print("ready", flush=True)
    await runner.serve(pipeline, max_concurrency=8, poll_seconds=0.1)


if __name__ == "__main__":
    asyncio.run(main())
