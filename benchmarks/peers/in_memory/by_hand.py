"""What one would write by hand: the floor with a JSON checkpoint, a trace with both states, totals and a clock."""

from __future__ import annotations

from importlib.metadata import version
from time import perf_counter_ns, time_ns
from typing import Any

from benchmarks.peers.in_memory.work import START, In, Out, Run, add_one


def versions() -> str:
    return f"pydantic {version('pydantic')}"


def build(nodes: int) -> Run:
    functions = [(f"n{k}", add_one()) for k in range(nodes)]

    async def run() -> int:
        store: dict[tuple[str, str], str] = {}
        trace: list[Any] = []
        tokens, state = 0, START
        for name, function in functions:
            given = In.model_validate(state)
            at, begin = time_ns(), perf_counter_ns()
            output = Out.model_validate(await function(given))
            took = perf_counter_ns() - begin
            tokens += 0
            store["run", name] = output.model_dump_json()
            state = output.model_dump()
            trace.append((name, 1, at, given.model_dump(), state, took))
        return int(state["i"])

    return run
