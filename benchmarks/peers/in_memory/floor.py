"""The floor: a loop that validates, awaits and validates, and keeps nothing."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.peers.in_memory.work import START, In, Out, Run, add_one


def versions() -> str:
    return f"pydantic {version('pydantic')}"


def build(nodes: int) -> Run:
    functions = [add_one() for _ in range(nodes)]

    async def run() -> int:
        state = START
        for function in functions:
            state = Out.model_validate(await function(In.model_validate(state))).__dict__
        return int(state["i"])

    return run
