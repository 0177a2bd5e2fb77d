"""Tokens that no step has used, and a framework's own count of tokens, compared with that of the guard."""

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.kit import run_python
from tests.shared_stores import STORES, store_of

from stroma import BudgetExceeded, ExecutionBudget, StromaRunner, Usage, UsageError
from stroma.adapters import Guard


def test_usage_outside_of_steps_costs_what_it_costs_in_a_step() -> None:
    """What a cache keeps for an hour has its own price there, too."""
    used = Usage(10_000, 10, cache_write_tokens=9_000, cache_write_1h_tokens=9_000, model="claude-haiku-4-5")
    guard = Guard()
    model: Any = guard.wrap("model", lambda: "answer", usage=lambda _: used)
    with guard.run() as inside:
        model()
    with guard.run() as outside:
        outside.report_usage(used)
    assert outside.result.total_cost_usd == inside.result.total_cost_usd > 0


def test_a_model_without_a_price_is_refused_under_a_cost_limit(caplog: pytest.LogCaptureFixture) -> None:
    """As in a step: a limit in US dollars could not count it. Otherwise it counts as 0, with a warning."""
    used = Usage(input_tokens=8, output_tokens=2, model="nobody-knows-it")
    limited = Guard(StromaRunner.quick(budget=ExecutionBudget(max_cost_usd=1)))
    with (
        pytest.raises(UsageError, match="outside of its steps, used model 'nobody-knows-it'"),
        limited.run() as run,
    ):
        run.report_usage(used)
    assert run.ctx.cost_tracker.total_tokens == 10
    with Guard().run() as run, caplog.at_level(logging.WARNING):
        run.report_usage(used)
        run.report_usage(used)
        run.report_usage(Usage(input_tokens=8, output_tokens=2, model="nobody-knows-it", cost_usd=0.5))
    assert (run.result.total_cost_usd, run.result.unpriced_models) == (0.5, ["nobody-knows-it"])
    assert sum("has no known price" in message for message in caplog.messages) == 1


KILLED = """
import os, signal, sys, time
from stroma import SQLiteStore, StromaRunner, Usage
from stroma.adapters import Guard
store = SQLiteStore(sys.argv[1])
with Guard(StromaRunner.quick(store=store, run_id="r", resume=True, lease_seconds=0.2)).run("q") as run:
    run.report_usage(Usage(input_tokens=60, model="gpt-4o"))
    while not store.flow_notes("r"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", STORES)
def test_a_resume_counts_what_no_step_has_used(kind: str) -> None:
    """G6: usage outside of steps counts against the budget of a resume too, although no attempt has it."""
    budget = ExecutionBudget(max_tokens_total=100)
    with store_of(kind) as store:
        guard = Guard(StromaRunner.quick(store=store, run_id="r", resume=True, budget=budget))
        for tokens in (60, 30):
            with pytest.raises(RuntimeError), guard.run("q") as run:
                run.report_usage(Usage(input_tokens=tokens))
                run.check_budget()
                raise RuntimeError
            assert run.result.total_tokens == tokens
        with pytest.raises(BudgetExceeded, match="101"), guard.run("q") as run:
            run.check_budget()
            run.report_usage(Usage(input_tokens=11))
            run.check_budget()


@pytest.mark.slow
def test_what_no_step_has_used_is_stored_at_once(tmp_path: Path) -> None:
    """A process that is killed before the run has a step or an end loses nothing of it."""
    file = tmp_path / "r.db"
    run_python(file, code=KILLED, status=-signal.SIGKILL)
    budget = ExecutionBudget(max_tokens_total=50)
    runner = StromaRunner.quick(store=str(file), run_id="r", resume=True, budget=budget)
    with pytest.raises(BudgetExceeded, match="60"), Guard(runner).run("q") as run:
        run.check_budget()
