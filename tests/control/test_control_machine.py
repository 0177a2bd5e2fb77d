"""Pause, resume, raise and cancel under many concurrent runs, in any order."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.control.control_machine import ControlMachine
from tests.shared_stores import FAMILIES, IN_PROCESS, ON_SERVERS


def _check(kind: str, runs: int, examples: int, steps: int) -> None:
    machine: Any = type("Machine", (ControlMachine,), {"kind": kind, "runs": runs})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=(Phase.generate,),  # To shrink a history of concurrent runs finds another one.
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_a_few_runs(kind: str) -> None:
    """G5, G6. No attempt begins after an acknowledged pause or cancel, nothing committed is bought again."""
    _check(kind, runs=4, examples=8, steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_SERVERS)
def test_a_few_runs_on_servers(kind: str) -> None:
    """The same holds over stores of servers."""
    _check(kind, runs=4, examples=4, steps=8)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_hundred_runs(kind: str) -> None:
    """The same holds for 200 concurrent runs."""
    _check(kind, runs=100, examples=10, steps=20)
