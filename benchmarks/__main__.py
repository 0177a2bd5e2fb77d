"""What Stroma's own work costs per node, as a ratio to the bare contract work, in one run.

    ./dev bench

The floor validates the input, awaits the function and validates the output; Stroma does that and keeps a trace, a
checkpoint and totals. CPU time; each sample of ours is followed by one of the floor, and the ratio is the median of
the pairs. Targets, on Python 3.12: at most 2.5 at 100 nodes; a node of 5,000 at most 1.2 times one of 100.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel

from stroma import NodeContract, StromaRunner, stroma_node

ROUNDS = 15


class In(BaseModel):
    i: int
    s: str


class Out(BaseModel):
    i: int
    s: str


def _function() -> Callable[[Any], Awaitable[dict[str, Any]]]:
    async def node(state: In) -> dict[str, Any]:
        return {"i": state.i + 1, "s": state.s}

    return node


def floor(n: int) -> Callable[[], Awaitable[int]]:
    functions = [_function() for _ in range(n)]

    async def run() -> int:
        state: dict[str, Any] = {"i": 0, "s": "hello"}
        for function in functions:
            state = Out.model_validate(await function(In.model_validate(state))).__dict__
        return int(state["i"])

    return run


def ours(n: int) -> Callable[[], Awaitable[int]]:
    nodes = [
        stroma_node(f"n{k}", NodeContract(node_id=f"n{k}", input_schema=In, output_schema=Out))(_function())  # type: ignore[arg-type]
        for k in range(n)
    ]

    async def run() -> int:
        result = await StromaRunner.quick().run(nodes, In(i=0, s="hello"))
        assert isinstance(result.final_state, Out), result.failure
        return result.final_state.i

    return run


async def _sample(run: Callable[[], Awaitable[int]], n: int) -> float:
    """CPU microseconds per node."""
    times = max(1, 2000 // n)
    gc.collect()
    begin = time.process_time()
    for _ in range(times):
        assert await run() == n
    return (time.process_time() - begin) / (times * n) * 1e6


async def main() -> None:
    print(f"{'nodes':>6}  {'floor':>8}  {'stroma':>8}  ratio")
    costs: dict[int, float] = {}
    for n in (1, 100, 1000, 5000):
        mine, base = ours(n), floor(n)
        await _sample(mine, n)
        pairs = [(await _sample(mine, n), await _sample(base, n)) for _ in range(ROUNDS)]
        costs[n] = statistics.median(a for a, _ in pairs)
        low = statistics.median(b for _, b in pairs)
        print(
            f"{n:>6}  {low:>5.2f} us  {costs[n]:>5.2f} us  {statistics.median(a / b for a, b in pairs):.2f}"
        )
    print(f"a node of 5,000 costs {costs[5000] / costs[100]:.2f} times one of 100")


if __name__ == "__main__":
    asyncio.run(main())
