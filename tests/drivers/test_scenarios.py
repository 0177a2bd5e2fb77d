"""What becomes of a run or a flow does not depend on the process that drives it."""

import asyncio
import copy
from typing import Any

import pytest
from tests.drivers.conftest import Way, embedded
from tests.drivers.flow_scenarios import FLOW_SCENARIOS, FlowScenario
from tests.drivers.scenarios import SCENARIOS
from tests.flows.steps import World
from tests.kit import node, same

from stroma import ExecutionResult, RunStatus
from stroma.checkpoint import AttemptRecord

#: The records of each scenario that ran in this process, by name: the ways to run it share them.
_EMBEDDED: dict[str, list[Any]] = {}


def pipeline_of(nodes: list[Any], state: Any) -> list[Any]:
    """Return the nodes after one that returns its input: its contract names the class, which workers need."""
    return [node("first", same, type(state), type(state)), *nodes]


def recorded(store: Any, run_id: str) -> list[Any]:
    """Return the attempts of a run as the store has them, without times and owners."""
    attempts: list[AttemptRecord] = store.attempts(run_id)
    return sorted(
        (
            one.position,
            one.branch,
            one.attempt,
            one.node_id,
            str(one.failure_class),
            str(one.reason),
            one.tokens,
            one.cost_usd,
            str(one.output),
        )
        for one in attempts
    )


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_comes_to_the_same_whoever_drives_it(name: str, way: Way) -> None:
    """Status, calls, state and records of a run are the same in one process, by workers and by Temporal."""
    scenario = SCENARIOS[name]
    calls: list[str] = []
    nodes = pipeline_of(scenario.make(calls), scenario.state)
    async with way.bind(nodes, **copy.deepcopy(scenario.config)) as bound:
        result = await bound.run(scenario.state)
        records = recorded(way.store, result.run_id)
    assert result.status is scenario.end.status, result.failure
    assert sorted(calls) == sorted(scenario.end.calls.split())
    assert result.final_state.model_dump() == scenario.end.final
    record = way.store.get_run(result.run_id)
    assert record.tokens == scenario.tokens
    assert (result.failure is None) == (scenario.end.failure is None)

    if name not in _EMBEDDED:
        nodes = pipeline_of(scenario.make([]), scenario.state)
        with embedded() as reference:
            async with reference.bind(nodes, **copy.deepcopy(scenario.config)) as bound:
                local = await bound.run(scenario.state)
            _EMBEDDED[name] = recorded(reference.store, local.run_id)
    assert records == _EMBEDDED[name]


#: The end and the records of each scenario that ran in this process, by name: the ways to run it share them.
_EMBEDDED_FLOWS: dict[str, tuple[RunStatus, list[Any]]] = {}


async def executed(scenario: FlowScenario, way: Way, world: World) -> ExecutionResult[Any]:
    """Run a flow, and answer its questions."""
    world.failing |= scenario.failing
    made = scenario.make(world)
    nodes = made if isinstance(made, list) else [made]
    async with way.bind(nodes, **copy.deepcopy(scenario.config)) as bound:
        result = await bound.run(scenario.state)
        for answer, key in scenario.answers:
            assert result.status is RunStatus.SUSPENDED, result.failure
            question = next((one.id for one in result.questions if key in (None, one.reason)), None)
            await bound.control.signal(result.run_id, answer, question=question)
            result = await bound.go_on(result.run_id)
    return result


@pytest.mark.parametrize("name", FLOW_SCENARIOS)
async def test_a_flow_comes_to_the_same_whoever_drives_it(name: str, way: Way) -> None:
    """Status, calls, output and records of a flow are the same in one process, by workers and by Temporal."""
    scenario, world = FLOW_SCENARIOS[name], World()
    result = await asyncio.wait_for(executed(scenario, way, world), 110)
    assert result.status is scenario.status, result.failure
    if scenario.calls:
        assert sorted(world.calls) == sorted(scenario.calls)
    if scenario.output is not None:
        assert result.final_state.model_dump() == scenario.output
    if scenario.reason is not None:
        record = way.store.get_run(result.run_id)
        assert (record.cause and record.cause.reason) or result.failure is not None
    if name not in _EMBEDDED_FLOWS:
        with embedded() as reference:
            local = await executed(scenario, reference, World())
            _EMBEDDED_FLOWS[name] = local.status, recorded(reference.store, local.run_id)
    status, records = _EMBEDDED_FLOWS[name]
    assert status is result.status
    if not scenario.is_race:
        assert recorded(way.store, result.run_id) == records
