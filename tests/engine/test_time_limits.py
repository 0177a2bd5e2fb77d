"""Timeouts, deadlines and latency budgets of nodes, groups and hooks."""

import asyncio
from typing import Any

import pytest
from tests.kit import Num, failing_with, node, quick, quick_without_retries, sleep_forever

from stroma import (
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    NodeTimeout,
    RunStatus,
    current_node,
    parallel,
)


@pytest.mark.core
async def test_a_child_is_not_tried_again_once_the_latency_is_spent() -> None:
    """Time passes for all siblings: a child whose wait ends past the limit is not called again."""
    calls: list[str] = []

    async def failing(state: Num) -> Any:
        calls.append("failing")
        raise ConnectionError

    waits = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=0.15, jitter=False)}
    runner = quick_without_retries(policy_map=waits, budget=ExecutionBudget(max_latency_ms=50))
    result = await runner.run([parallel(node("slow", sleep_forever), node("failing", failing))], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["failing"])
    assert result.failure.reason == "budget"


async def test_limits_of_any_size() -> None:
    """A limit too large to count with is refused when it is made; the largest one is no limit."""
    largest = 10**30
    for field in ("max_tokens_total", "max_latency_ms"):
        with pytest.raises(ValueError, match=field):
            ExecutionBudget(**{field: 10**400})
    with pytest.raises(ValueError, match="node_timeouts"):
        quick(node_timeouts={"a": 10**5000})
    with pytest.raises(ValueError, match="hook_timeout_ms"):
        quick(hook_timeout_ms=10**400)
    with pytest.raises(ValueError, match="lease_seconds"):
        quick(lease_seconds=1e300)
    budget = ExecutionBudget(max_tokens_total=largest, max_cost_usd=1.7e308, max_latency_ms=largest)

    async def wait(*_: Any) -> None:
        await asyncio.sleep(0)

    async def func(state: Num) -> Any:
        left = current_node().remaining_budget
        await asyncio.sleep(0)
        assert left.tokens == largest
        return state, 5, 5, "gpt-4o"

    hooks = NodeHooks(on_node_start=wait, on_budget_warning=wait)
    runner = quick(budget=budget, hooks=hooks, hook_timeout_ms=largest, node_timeouts={"a": largest})
    result = await runner.run([parallel(node("a", func))], Num())
    result.raise_for_status()


@pytest.mark.core
async def test_a_node_is_cut_off_when_the_latency_is_spent() -> None:
    """The latency budget is a deadline for the function in flight, which then fails for the budget."""
    finished: list[str] = []

    async def func(state: Num) -> Any:
        await asyncio.sleep(1)
        finished.append("node")
        return {"n": 1}

    result = await quick(budget=ExecutionBudget(max_latency_ms=30)).run([node("a", func)], Num())
    assert (result.status, finished) == (RunStatus.PARTIAL, [])
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert result.failure.exception.dimension == "latency"


@pytest.mark.parametrize(
    "config",
    [
        {"node_timeouts": {"slow": 30}},
        {"node_timeouts": {"slow": NodeTimeout(idle_ms=30)}},
        {"budget": ExecutionBudget(max_latency_ms=30)},
    ],
    ids=["own", "idle", "latency"],
)
async def test_a_node_is_cut_off_after_a_failed_task_group(config: dict[str, Any]) -> None:
    """A time limit fails the node, also if the node has handled the failure of a task group before."""

    async def slow(state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(failing_with(KeyError, "x")(state))
        except* KeyError:
            pass
        return await sleep_forever(state)

    result = await quick_without_retries(**config).run([node("slow", slow)], Num())
    assert (result.status, [event.outcome for event in result.trace]) == (RunStatus.PARTIAL, ["failure"])
    assert result.failure.reason == ("budget" if "budget" in config else "timeout")
