"""The child of tests/engine/test_called_steps.py: `python called_steps_helper.py KIND PLACE SIDE_FILE WAY
LIFE`.

Three branches of two steps race, in a node of a pipeline or in plain code. Life 0 dies in a step of the
second level of branch 1, life 1 in that of branch 2, and the order in which the branches come to it is
another one in each life.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from pydantic import BaseModel
from tests.kit import context_of
from tests.shared_stores import opened

from stroma import ReliabilityContext, StromaRunner, current_node, current_run, execute_step, stroma_node

ORDER = {0: "120", 1: "210", 2: "021"}


class Text(BaseModel):
    text: str = ""


async def main(kind: str, where: str, side_file: str, way: str, life: int) -> None:
    side = os.open(side_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    turns = {name: asyncio.Event() for name in "012"}
    order = ORDER[life]

    async def step(state: Text) -> dict[str, Any]:
        here = current_node()
        os.write(side, f"{here.node_id} {state.text}|{here.idempotency_key}\n".encode())
        if here.node_id == "judge" and life < 2 and state.text[0] == order[life]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"text": f"{state.text}{here.node_id[0]}"}

    async def branch(name: str, ctx: ReliabilityContext) -> str:
        fetched = await execute_step("fetch", step, Text(text=name), ctx)
        at = order.index(name)
        if at:
            await turns[order[at - 1]].wait()
        judged = await execute_step("judge", step, fetched.final_state, ctx)
        turns[name].set()
        return str(judged.final_state.text)

    async def all_of(ctx: ReliabilityContext) -> str:
        return " ".join(await asyncio.gather(*(branch(name, ctx) for name in "012")))

    @stroma_node("answer", input=Text, output=Text)
    async def answer(state: Text) -> Text:
        ctx = current_run()
        assert ctx is not None
        return Text(text=await all_of(ctx))

    with opened(kind, where) as store:
        runner = StromaRunner.quick(store=store, run_id="r", resume=True, lease_seconds=0.2)
        if way == "pipeline":
            result = await runner.run([answer], Text())
            print(result.final_state.text)
            return
        ctx = context_of(runner)
        async with ctx:
            print(await all_of(ctx))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5], int(sys.argv[5])))
