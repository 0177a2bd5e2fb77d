"""One life of a process that runs a flow and kills itself in one of its calls: kind, place, side file, run, life."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from typing import Any

from pydantic import BaseModel
from tests.kit import NEVER, Num, node
from tests.shared_stores import opened

from stroma import Flow, RunStatus, StepFailed, StromaRunner, current_node, stroma_flow

KIND, WHERE, SIDE, RUN, LIFE = sys.argv[1:6]
CHANCE = random.Random(f"{KIND} {RUN} {LIFE}")
LEFT = CHANCE.randint(1, 5) if int(LIFE) < 12 else 10**9
CALLS = 0


class Text(BaseModel):
    text: str = ""


async def call(name: str, state: Num) -> None:
    global CALLS
    CALLS += 1
    here = current_node()
    with open(SIDE, "a") as file:
        file.write(f"{here.branch} {name} {state.n}|{here.idempotency_key}\n")
    await asyncio.sleep(CHANCE.random() * 0.003)
    if CALLS >= LEFT:
        if CHANCE.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        # Or a little later, in whatever the store does then.
        asyncio.get_running_loop().call_later(CHANCE.random() * 0.004, os.kill, os.getpid(), signal.SIGKILL)


def step(name: str, change: Any) -> Any:
    async def func(state: Num) -> Num:
        await call(name, state)
        if name == "bad":
            raise NotImplementedError("bad")
        return Num(n=change(state.n))

    return node(name, func)


add, double, bad = step("add", lambda n: n + 1), step("double", lambda n: 2 * n), step("bad", int)


@stroma_flow("inner", input=Num, output=Num)
async def inner(flow: Flow, state: Num) -> Num:
    return await flow.step(double, await flow.step(add, state))


@stroma_flow("f", input=Num, output=Text)
async def f(flow: Flow, state: Num) -> Text:
    while state.n < 3:
        state = await flow.step(add, state)
    async with asyncio.TaskGroup() as group:
        x = group.create_task(flow.step(double, state))
        y = group.create_task(flow.step(add, state))
    try:
        await flow.step(bad, state)
    except StepFailed:
        items = await flow.map(double, [Num(n=n) for n in range(4)], max_concurrency=2)
    child = await flow.run(inner, x.result())
    await flow.sleep(0.01)
    answer = await flow.wait_for(Text, reason="Well?")
    return Text(
        text=f"{state.n} {x.result().n} {y.result().n} {[one.n for one in items]} {child.n} {answer.text}"
    )


async def main() -> None:
    with opened(KIND, WHERE) as store:
        runner = StromaRunner.quick(
            store=store,
            policy_map=NEVER,
            run_id=f"r{RUN}",
            resume=True,
            max_recoveries=100,
            if_running="take_over",
        )
        result = await runner.run(f, Num())
        if result.status is RunStatus.SUSPENDED:
            await runner.signal(f"r{RUN}", Text(text="yes"))
            return
        result.raise_for_status()
        print("ended", result.status, result.output.text)


asyncio.run(main())
