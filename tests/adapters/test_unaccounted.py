"""A framework's own count of tokens, compared with that of the guard."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from stroma import ExecutionBudget, StromaRunner, Usage, UsageError
from stroma.adapters import Guard


def test_tokens_that_only_the_framework_has_counted_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a framework's run its own usage figure is compared with ours: a difference is a warning that names it."""
    guard = Guard()

    @guard.step("model", usage=lambda _: Usage(input_tokens=8, output_tokens=2))
    def model() -> str:
        return "answer"

    @guard.step("inner")
    def inner(counted: int) -> None:
        model()
        guard.compare_usage("Framework", counted)

    @guard.step("agent")
    def agent(*counted: int, own: int) -> None:
        for one in counted:
            inner(one)
        guard.compare_usage("Framework", own)

    with guard.run() as run, caplog.at_level(logging.WARNING):
        agent(10, 10, own=20)
        assert (guard.unaccounted, caplog.messages) == (0, [])
        agent(10, 10, own=12)  # It has not counted what failed.
        assert (guard.unaccounted, caplog.messages) == (0, [])
        agent(15, 10, own=27)  # What the inner agent has named is not named again.
    assert (run.unaccounted, guard.unaccounted) == (7, 7)
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "Framework counted 15 tokens in step 'inner', and the guard 10: 5 tokens count against no budget",
        "Framework counted 27 tokens in step 'agent', and the guard 20: 2 tokens count against no budget",
    ]
    with guard.run():
        assert guard.unaccounted == 0


@pytest.mark.parametrize("counted", [10, 25])
def test_outside_of_any_step_the_whole_run_is_compared(counted: int) -> None:
    """A framework whose run is the guard's own is compared with the run."""
    guard = Guard()
    model: Any = guard.wrap("model", lambda: "answer", usage=lambda _: Usage(input_tokens=8, output_tokens=2))
    with guard.run() as run:
        model()
        guard.compare_usage("Framework", counted)
        guard.compare_usage("Framework", counted)
    assert run.unaccounted == counted - 10


def test_usage_outside_of_steps_costs_what_it_costs_in_a_step() -> None:
    """What a cache keeps for an hour has its own price there, too."""
    used = Usage(10_000, 10, cache_write_tokens=9_000, cache_write_1h_tokens=9_000, model="claude-haiku-4-5")
    guard = Guard()
    model: Any = guard.wrap("model", lambda: "answer", usage=lambda _: used)
    with guard.run() as inside:
        model()
    with guard.run() as outside:
        outside.report_usage(used)
    assert inside.result is not None
    assert outside.result is not None
    assert outside.result.total_cost_usd == inside.result.total_cost_usd > 0


def test_a_model_without_a_price_that_no_step_has_called_is_refused_under_a_cost_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in a step: a limit in US dollars could not count it. Otherwise it counts as 0, with a warning."""
    used = Usage(input_tokens=8, output_tokens=2, model="nobody-knows-it")
    limited = Guard(StromaRunner.quick(budget=ExecutionBudget(max_cost_usd=1)))
    with pytest.raises(UsageError, match="'nobody-knows-it' outside of its steps"), limited.run() as run:
        run.report_usage(used)
    assert run.ctx.cost_tracker.total_tokens == 10
    with Guard().run() as run, caplog.at_level(logging.WARNING):
        run.report_usage(used)
        run.report_usage(used)
        run.report_usage(Usage(input_tokens=8, output_tokens=2, model="nobody-knows-it", cost_usd=0.5))
    assert run.result is not None
    assert (run.result.total_cost_usd, run.result.unpriced_models) == (0.5, ["nobody-knows-it"])
    assert sum("has no known price" in message for message in caplog.messages) == 1
