"""Usage and costs: odd figures, exact sums, warnings, and what a refused price costs."""

import threading
from typing import Any

import pytest
from genai_prices import data_snapshot
from tests.fixtures import store_fixture
from tests.kit import (
    Num,
    One,
    computing,
    context_of,
    node,
    noting,
    plus,
    quick,
    quick_without_retries,
    record_node_hooks,
    returning,
)

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    NodeHooks,
    ReliabilityContext,
    RunStatus,
    Usage,
    execute_step,
    parallel,
)
from stroma.cost import KNOWN_MODELS, prices


def context(**config: Any) -> ReliabilityContext:
    runner = quick_without_retries(**config)
    return context_of(runner)


@pytest.mark.core
async def test_what_each_node_used_is_told_by_the_tracker() -> None:
    """summary() has the sums per node id over all attempts, read or not, in groups too."""
    spend = computing(lambda state: (state, 3, 4, "gpt-4o-mini"))
    ctx = context()
    await execute_step("a", spend, Num(), ctx)
    await execute_step("a", spend, Num(), ctx)
    await execute_step("g", parallel(node("b", spend), node("c", spend)), Num(), ctx)
    summary = ctx.cost_tracker.summary()
    tokens = {name: used.tokens_used for name, used in summary.items()}
    assert tokens == {"a": 14, "parallel(b, c)": 0, "b": 7, "c": 7}
    assert (summary["a"].model, summary["a"].output_tokens) == ("gpt-4o-mini", 8)
    assert [event.usage.input_tokens for event in ctx.trace] == [3, 3, 0]
    looked_at = ctx.cost_tracker.summary()
    assert {n: (u.tokens_used, u.cost_usd) for n, u in looked_at.items()} == {
        n: (u.tokens_used, u.cost_usd) for n, u in summary.items()
    }


async def test_a_step_of_plain_code_that_crosses_a_limit_returns_its_output() -> None:
    """The output that took the run over its budget is the state of the result of execute_step."""
    spend = computing(lambda _: (Num(n=8), 3, 4))
    result = await execute_step("a", spend, Num(), context(budget=ExecutionBudget(max_tokens_total=5)))
    assert (result.status, result.final_state) == (RunStatus.FAILED, Num(n=8))


async def test_prices_are_read_once_and_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price data is imported off the event loop, and asked once for each model."""
    requests: list[tuple[str, bool]] = []
    find = data_snapshot.DataSnapshot.find_provider_model

    def read(self: Any, model: str, *more: Any) -> Any:
        requests.append((model, threading.current_thread() is threading.main_thread()))
        return find(self, model, *more)

    func = returning(({"n": 1}, 4_000_000, "gpt-5"))
    monkeypatch.setattr(prices, "_looked_up", {})
    monkeypatch.setattr(data_snapshot.DataSnapshot, "find_provider_model", read)
    for _ in range(2):
        result = await quick().run([node("a", func), node("b", func)], Num())
        assert result.total_cost_usd == 10.0
    assert requests == [("gpt-5", False)]


async def test_what_was_refused_for_its_price_is_not_bought_again() -> None:
    """unknown_model="error" keeps the output: a resume goes on behind it, without another call."""
    store = AsyncInMemoryStore()
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}, 5, "nobody knows this model"

    nodes = [node("a", func), node("b", plus)]
    runner = quick(store=store, run_id="r", unknown_model="error")
    assert (await runner.run(nodes, Num())).status is RunStatus.FAILED
    result = await runner.run(nodes, Num(), resume=True)
    assert (result.status, result.final_state, len(calls)) == (RunStatus.RESUMED, Num(n=8), 1)


store = store_fixture("async-memory", "sqlite")


async def test_a_billion_tokens_can_be_counted(store: Any) -> None:
    """A billion tokens in one report are counted and priced like any other."""
    a = computing(lambda _: ({"a": 1}, 10**9, "gpt-4o"))
    result = await quick_without_retries(store=store).run([node("a", a, output=One)], Num())
    assert result.status is RunStatus.COMPLETED
    assert result.total_tokens == 10**9
    assert result.total_cost_usd == pytest.approx(2500)


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.7, 1.1], ids=str)
async def test_a_cost_at_eighty_percent_warns(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """on_budget_warning is called at 80 % of a limit in dollars, despite binary fractions."""
    monkeypatch.setitem(KNOWN_MODELS, "one cent", (10_000.0, 0.0))
    seen: list[Any] = []

    warn = noting(seen, lambda *arguments: arguments)
    func = computing(lambda _: ({"n": 1}, round(limit * 80), "one cent"))
    budget = ExecutionBudget(max_cost_usd=limit)
    runner = quick(budget=budget, hooks=NodeHooks(on_budget_warning=warn), run_id="r")
    await runner.run([node("a", func)], Num())
    assert seen == ([("r", "cost", pytest.approx(0.8 * limit), limit)] if limit else [])


@pytest.mark.core
@pytest.mark.parametrize("used", [5, Usage(5, cached_input_tokens=2, model="mine")], ids=["plain", "cached"])
@pytest.mark.parametrize(
    "price",
    [(1,), "dear", {"input": 1}, ("1", "2"), (float("nan"), 1.0), (float("inf"), 1.0), (-5.0, 1.0)],
    ids=str,
)
async def test_a_senseless_price_loses_no_output(
    price: Any, used: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4, G9: a senseless price in KNOWN_MODELS is bad usage: TERMINAL, the output kept, each start ended."""
    monkeypatch.setitem(KNOWN_MODELS, "mine", price)
    store = AsyncInMemoryStore()
    seen: list[str] = []

    runner = quick(store=store, hooks=record_node_hooks(seen), run_id="r")
    returned = ({"n": 7}, used, "mine") if used == 5 else ({"n": 7}, used)
    result = await runner.run([node("a", returning(returned))], Num())
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.FAILED, 5, 0.0)
    assert (await store.load("r", "a"), seen) == (Num(n=7), ["start", "failure"])
