"""Random programs of flows: generated bodies of steps, branches on outputs, loops, failures that are caught, and tasks.

A program is data, so that a failing one can be shrunk: a list of instructions, each with a number that varies it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import strategies as st
from tests.kit import Num

from stroma import Flow, FlowFunction, StepFailed, stroma_flow

__all__ = ["Program", "flow_of", "programs"]

Program = list[Any]

_LEAVES = st.tuples(st.sampled_from(["add", "double", "bad", "map", "value", "sleep"]), st.integers(0, 3))


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    blocks = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("if"), blocks, blocks),
        st.tuples(st.just("loop"), st.integers(1, 3), blocks),
        st.tuples(st.just("try"), blocks),
        st.tuples(st.just("gather"), st.lists(blocks, min_size=2, max_size=3)),
        st.tuples(st.just("inner"), blocks),
    )


programs: st.SearchStrategy[Program] = st.lists(
    st.recursive(_LEAVES, _compound, max_leaves=8), min_size=1, max_size=5
)


def flow_of(program: Program, steps: dict[str, Any], name: str = "f") -> FlowFunction[Num, Num]:
    """Return a program as a flow over nodes "add", "double" and "bad"."""

    async def block(flow: Flow, body: Program, state: Num) -> Num:
        for instruction in body:
            state = await do(flow, instruction, state)
        return state

    async def do(flow: Flow, instruction: Any, state: Num) -> Num:
        kind, *rest = instruction
        if kind in ("add", "double", "bad"):
            return await flow.step(steps[kind], Num(n=(state.n + rest[0]) % 1000))
        if kind == "map":
            found = await flow.map(steps["add"], [Num(n=state.n + n) for n in range(rest[0])])
            return Num(n=sum(one.n for one in found) % 1000)
        if kind == "value":
            return Num(n=int(flow.random() * 1000))
        if kind == "sleep":
            await flow.sleep(0.001 * rest[0])
            return state
        if kind == "if":
            return await block(flow, rest[0] if state.n % 2 else rest[1], state)
        if kind == "loop":
            for _ in range(rest[0]):
                state = await block(flow, rest[1], state)
            return state
        if kind == "try":
            try:
                return await block(flow, rest[0], state)
            except StepFailed as error:
                return Num(n=len(error.failure.message))
        if kind == "gather":
            found = await asyncio.gather(
                *(block(flow, body, state) for body in rest[0]), return_exceptions=True
            )
            failed = [one for one in found if isinstance(one, BaseException)]
            if failed:
                raise failed[0]
            return Num(n=sum(one.n for one in found if isinstance(one, Num)) % 1000)
        assert kind == "inner"
        return await flow.run(flow_of(rest[0], steps, f"{name}i"), state)

    @stroma_flow(name, input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return await block(flow, program, state)

    return f
