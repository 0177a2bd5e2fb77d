"""Bodies of flows beside an interpreter, without a server: what they may hold, and which nodes a worker finds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.drivers.seam import SeamRunner
from tests.flows.steps import World
from tests.kit import NEVER, Num, node

from stroma import (
    ExecutionBudget,
    Flow,
    FlowFunction,
    Pipeline,
    RunConfig,
    RunStatus,
    parallel,
    stroma_flow,
)
from stroma.checkpoint.payloads import blob_store
from stroma.contracts.node import FlowNode
from stroma.drivers.remote import state as states
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.flow_nodes import nodes_of_flow


def called(node_id: str) -> Callable[[Num], Coroutine[Any, Any, Num]]:
    async def func(state: Num) -> Num:
        return Num(n=state.n + 1)

    made: Callable[[Num], Coroutine[Any, Any, Num]] = node(node_id, func)
    return made


def found_in(flow: FlowFunction[Any, Any]) -> list[str]:
    record = flow.node
    assert isinstance(record, FlowNode)
    return sorted(one.node_id for one in nodes_of_flow(record))


in_global = called("in_global")
in_list = [called("in_list")]
in_dict = {"one": called("in_dict")}


async def helper(flow: Flow, state: Num) -> Num:
    return await flow.step(in_global, state)


class Steps:
    of_class = staticmethod(called("of_class"))

    def __init__(self) -> None:
        self.of_object = called("of_object")

    async def body(self, flow: Flow, state: Num) -> Num:
        return await flow.step(self.of_object, await flow.step(self.of_class, state))


def test_a_worker_finds_the_nodes_that_a_body_refers_to() -> None:
    """Globals, closures, defaults, lists, dicts, helpers, groups, flows and pipelines inside; not what is computed."""
    in_closure, of_default, of_group, of_flow, of_pipeline = map(
        called, ("in_closure", "of_default", "of_group", "of_flow", "of_pipeline")
    )
    group, inside = parallel(of_group, called("other")), Pipeline("inside", [of_pipeline])

    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(of_flow, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num, last: Any = of_default) -> Num:
        state = await flow.step(in_closure, await helper(flow, state))
        await asyncio.gather(*(flow.step(one, state) for one in [*in_list, *in_dict.values()]))
        await flow.step(group, state)
        await flow.run(inside, state)
        found: Num = await flow.step(last, await flow.run(child, state))
        return found

    assert found_in(f) == sorted([
        "in_global", "in_list", "in_dict", "in_closure", "of_default", "of_flow", "of_pipeline", group.node_id,
    ])  # fmt: skip


def test_a_worker_finds_the_nodes_of_an_object() -> None:
    """Those that a method refers to through ``self``, and arguments of a partial."""
    steps = Steps()

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return await steps.body(flow, state)

    assert found_in(f) == ["of_class", "of_object"]
    later = partial(helper)

    @stroma_flow("g", input=Num, output=Num)
    async def g(flow: Flow, state: Num) -> Num:
        return await later(flow, state)

    assert found_in(g) == ["in_global"]


async def test_a_flow_that_is_too_long_stops_before_it_fills_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A flow whose records do not fit into a run is PARTIAL with the fix, and what is committed is not lost."""
    monkeypatch.setattr(states, "ROOM", -200_000)
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        while True:
            state = await flow.step(add, state)

    config = RunConfig(policy_map=NEVER)
    runner = SeamRunner(Attempts([f], config=config, payloads=blob_store(str(tmp_path))), config, full=False)
    result = await asyncio.wait_for(runner.run(f, Num()), 60)
    assert result.failure is not None
    assert (result.status, result.failure.reason) == (RunStatus.PARTIAL, "store")
    assert "more calls than one run can hold" in result.failure.message
    assert 30 < len(world.calls) < 300


@pytest.mark.parametrize("full", [True, False])
async def test_the_time_of_steps_counts_against_the_budget_of_a_flow(full: bool) -> None:
    """Also where each step is in a history of its own."""
    calls: list[int] = []

    async def wait(state: Num) -> Num:
        calls.append(state.n)
        await asyncio.sleep(0.05)
        return Num(n=state.n + 1)

    waiting = node("wait", wait)

    async def body(flow: Flow, state: Num) -> Num:
        for _ in range(40):
            state = await flow.step(waiting, state)
        return state

    pipeline = Pipeline("pipe", [stroma_flow("flow", input=Num, output=Num)(body)])
    config = RunConfig(budget=ExecutionBudget(max_latency_ms=200), policy_map=NEVER)
    result = await SeamRunner(Attempts([pipeline], config=config), config, full=full).run(pipeline, Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert result.failure.reason == "budget"
    assert len(calls) <= 4
