"""Promises about ownership, journals, repairs, budgets, answers and cancels, over many simulated histories.

`./dev run python -m tests.simulation --first SEED --seeds 1` runs one of them again.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.__main__ import explain, look
from tests.simulation.world import simulate

#: Each fault that can be put back, and what the simulation must say of it.
FOUND = {
    "settled-apart": "tokens spent, the journal has",
    "check-then-write": "contradictory answers were taken",
    "cancel-forgotten": "after an acknowledged cancel",
    "cancel-unfenced": "after the run had ended as cancelled",
}


def test_a_seed_is_one_history() -> None:
    """The same seed gives the same history, event for event."""
    first, again = simulate(7), simulate(7)

    assert first.history == again.history
    assert simulate(8).history != first.history


def test_promises_hold() -> None:
    """One owner, no lost acknowledgement, no double execution; repairs, budgets, answers, cancels."""
    outcome = look(range(100), most=1)

    assert not outcome.broken, explain(simulate(outcome.broken[0][0]))


def test_a_store_that_comes_back_older() -> None:
    """Whoever knows of commits that a restored store lost writes no more to their run: one history."""
    outcome = look(range(50), ("comes-back-older",), most=1)

    assert not outcome.broken, explain(simulate(outcome.broken[0][0], "comes-back-older"))


@pytest.mark.parametrize("fault", FOUND)
def test_faults_that_are_put_back_are_found(fault: str) -> None:
    """A fault of the past that is put back breaks a promise within 300 seeds."""
    for seed in (*range(400, 500), *range(200)):  # The order that finds them soonest.
        problems = simulate(seed, fault).problems
        if any(FOUND[fault] in problem for problem in problems):
            return
    pytest.fail(f"{fault} was not found")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_ten_thousand_seeds() -> None:
    """The same for 10,000 seeds."""
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "10000"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
