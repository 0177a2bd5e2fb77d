"""A process that runs pipelines under a shared budget or limit.

usage: python -m tests.limits.budget_helper KIND PLACE WHAT ...

It prints "ready", waits for a line, and then prints what it came to as one line of JSON.
"""

import asyncio
import json
import random
import sys
import time
from typing import Any

from pydantic import BaseModel
from tests.shared_stores import opened

from stroma import KNOWN_MODELS, Limit, NodeContract, SharedBudget, StromaRunner, current_node, stroma_node


class State(BaseModel):
    n: int = 0


#: A token of it costs a cent.
KNOWN_MODELS["cents"] = (10_000.0, 10_000.0)
CONTRACT = NodeContract(node_id="call", input_schema=State, output_schema=State)
RESERVE_CENTS = 20


def budget(store: Any, **options: Any) -> SharedBudget:
    return SharedBudget(
        "team-a", max_cost_usd=10, per="month", store=store, reserve_usd=RESERVE_CENTS / 100, **options
    )


async def spend(store: Any, seed: int, runs: int) -> dict[str, Any]:
    """Runs of two nodes, whose calls cost up to what they reserve, now and then by failing."""
    rng = random.Random(seed)
    spent: list[int] = []

    @stroma_node("call", CONTRACT)
    async def call(state: State) -> Any:
        cents = rng.randint(1, RESERVE_CENTS)
        await asyncio.sleep(rng.uniform(0, 0.005))
        spent.append(cents)
        if rng.random() < 0.2:
            current_node().report_usage(input_tokens=cents, model="cents")
            raise ConnectionError("no")
        return {"n": state.n + 1}, cents, "cents"

    runner = StromaRunner.quick(shared_budgets=budget(store))
    results = await asyncio.gather(*(runner.run([call, call], State()) for _ in range(runs)))
    # What had to be tried again waits up to a second for it.
    return {"cents": sum(spent), "statuses": [str(result.status) for result in results]}


async def hang(store: Any, lease_seconds: float) -> None:
    """One call that never ends."""

    @stroma_node("call", CONTRACT)
    async def call(state: State) -> Any:
        print("calling", flush=True)
        await asyncio.sleep(3600)

    runner = StromaRunner.quick(shared_budgets=budget(store, lease_seconds=lease_seconds))
    await runner.run([call], State())


async def limited(store: Any, options: dict[str, Any], runs: int) -> dict[str, Any]:
    """When each call began and ended, by a clock that all processes of the machine share."""
    calls: list[tuple[float, float]] = []

    @stroma_node("call", CONTRACT)
    async def call(state: State) -> Any:
        begin = time.monotonic()
        await asyncio.sleep(0.02)
        calls.append((begin, time.monotonic()))
        return {"n": 1}

    runner = StromaRunner.quick(limits={"call": Limit(store=store, **options)})
    results = await asyncio.gather(*(runner.run([call], State()) for _ in range(runs)))
    return {"calls": calls, "statuses": [str(result.status) for result in results]}


async def main(kind: str, where: str, what: str, *rest: str) -> None:
    with opened(kind, where) as store:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if what == "spend":
            print(json.dumps(await spend(store, int(rest[0]), int(rest[1]))), flush=True)
        elif what == "hang":
            await hang(store, float(rest[0]))
        else:
            print(json.dumps(await limited(store, json.loads(rest[0]), int(rest[1]))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
