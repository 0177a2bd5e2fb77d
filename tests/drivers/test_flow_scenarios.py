"""What becomes of a flow does not depend on who drives it."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from tests.drivers.conftest import LocalDriver
from tests.drivers.flow_scenarios import FLOW_SCENARIOS, FlowScenario
from tests.drivers.scenarios import result_told
from tests.flows.steps import World

from stroma import ExecutionResult, RunStatus


async def lived(scenario: FlowScenario, driver: Any, world: World) -> ExecutionResult[Any]:
    """Run a flow, and answer its questions."""
    world.failing |= scenario.failing
    made = scenario.make(world)
    nodes = made if isinstance(made, list) else [made]
    async with driver.bind(nodes, **copy.deepcopy(scenario.config)) as bound:
        result = await bound.run(scenario.state)
        for answer, key in scenario.answers:
            assert result.status is RunStatus.SUSPENDED, result.failure
            await bound.runner.signal(result.run_id, answer, node_id=key)
            result = await bound.go_on(scenario.state, result.run_id)
    return result  # type: ignore[no-any-return]


async def test_attempts_of_a_flow_are_in_the_order_of_their_start(any_driver: Any) -> None:
    """Where steps run side by side, the trace has the one that began first before the one that ended first."""
    if any_driver.name == "seam":
        pytest.skip("it has one step at a time")
    result = await asyncio.wait_for(lived(FLOW_SCENARIOS["first of two"], any_driver, World()), 60)
    assert [event.branch for event in result.trace] == ["slow#0", "quick#0"]


@pytest.mark.parametrize("name", FLOW_SCENARIOS)
async def test_a_flow_comes_to_the_same_under_every_driver(name: str, any_driver: Any) -> None:
    """Status, calls, output, totals and failure are as the scenario says; the trace is that of a local run."""
    scenario, world = FLOW_SCENARIOS[name], World()
    if any_driver.name == "seam" and (scenario.answers or scenario.at_once):
        pytest.skip("it has one step at a time, and no signals")
    # Without a cache the SDK loses an activation now and then, which the server repeats after ten seconds.
    result = await asyncio.wait_for(lived(scenario, any_driver, world), 110)
    assert result.status is scenario.status, result.failure
    if scenario.calls:
        assert sorted(world.calls) == sorted(scenario.calls)
    if scenario.output is not None:
        assert result.final_state is not None
        assert result.final_state.model_dump() == scenario.output
    if scenario.reason is not None:
        assert result.failure is not None
        assert result.failure.reason == scenario.reason

    there = World()
    local = await lived(scenario, LocalDriver(), there)
    ours, theirs = result_told(result), result_told(local)
    for told in (ours, theirs):  # Steps at once end in any order.
        told["trace"] = [] if scenario.is_race else sorted(told["trace"], key=repr)
    assert ours == theirs
