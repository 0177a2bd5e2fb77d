"""A flow of many steps, recorded by one process that dies and resumed by another: "record" or "resume", file,
steps.

The resume prints seconds of CPU, and MB of memory, that it took beyond what a run of one step takes.
"""

import asyncio
import os
import sys
import time

from tests.kit import Num, node

from stroma import Flow, SQLiteStore, StromaRunner, stroma_flow

WHAT, FILE, STEPS = sys.argv[1], sys.argv[2], int(sys.argv[3])
CALLS = 0


async def func(state: Num) -> Num:
    global CALLS
    CALLS += 1
    return Num(n=state.n + 1)


async def last_func(state: Num) -> Num:
    if WHAT == "record":
        os._exit(0)
    return state


add, last = node("add", func), node("last", last_func)


@stroma_flow("f", input=Num, output=Num)
async def f(flow: Flow, state: Num) -> Num:
    for _ in range(STEPS):
        state = await flow.step(add, state)
    return await flow.step(last, state)


@stroma_flow("one", input=Num, output=Num)
async def one(flow: Flow, state: Num) -> Num:
    return await flow.step(add, state)


def peak_mb() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


async def main() -> None:
    with SQLiteStore(FILE) as store:
        runner = StromaRunner.quick(store=store, resume=True, if_running="take_over")
        await runner.run(one, Num(), run_id=WHAT)  # What is imported and prepared once.
        calls, memory, begin = CALLS, peak_mb(), time.process_time()
        result = await runner.run(f, Num(), run_id="r")
        seconds = time.process_time() - begin
        assert (result.output.n, CALLS) == (STEPS, calls), result
        print(seconds, peak_mb() - memory)


asyncio.run(main())
