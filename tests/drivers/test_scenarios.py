"""What becomes of a run does not depend on who drives it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.drivers.conftest import LocalDriver
from tests.drivers.scenarios import SCENARIOS, result_told

from stroma.temporal import RemoteFailure


@pytest.mark.core
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_comes_to_the_same_under_every_driver(name: str, any_driver: Any) -> None:
    """Status, calls, state, totals and failure are as the scenario says; the trace is that of a local run, event for event."""
    scenario = SCENARIOS[name]
    calls: list[str] = []
    config = copy.deepcopy(scenario.config)
    async with any_driver.bind(scenario.make(calls), **config) as bound:
        result = await bound.run(scenario.state)
    assert result.status is scenario.status
    assert sorted(calls) == sorted(scenario.calls)
    assert result.final_state is not None
    assert result.final_state.model_dump() == scenario.final
    assert result.total_tokens == scenario.tokens
    if scenario.failure is None:
        assert result.failure is None
    else:
        assert result.failure is not None
        exception = result.failure.exception
        kind = exception.type_name if isinstance(exception, RemoteFailure) else type(exception).__name__
        assert (result.failure.failure_class, kind) == scenario.failure

    there: list[str] = []
    config = copy.deepcopy(scenario.config)
    async with LocalDriver().bind(scenario.make(there), **config) as bound:
        local = await bound.run(scenario.state)
    assert result_told(result) == result_told(local)
