"""Usage and costs: odd figures, exact sums, refused prices, and models without a known price."""

import threading
from itertools import count
from typing import Any

import pytest
from genai_prices import data_snapshot
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import (
    Note,
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
    FailureClass,
    FailurePolicy,
    Flow,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SharedBudget,
    StromaRunner,
    Usage,
    UsageError,
    current_node,
    execute_step,
    map_over,
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


_numbers = count()
UNKNOWN = "a-fine-tune-of-our-own"


class Texts(BaseModel):
    items: list[Note]


def shared(**options: Any) -> SharedBudget:
    return SharedBudget(f"unpriced models {next(_numbers)}", **options)


LIMITS: list[Any] = [
    pytest.param(lambda: {"budget": ExecutionBudget(max_cost_usd=10.0)}, id="run"),
    pytest.param(lambda: {"shared_budgets": shared(max_cost_usd=10.0)}, id="shared"),
    pytest.param(
        lambda: {"shared_budgets": [shared(max_tokens=10**9, max_cost_usd_by_node={"ask": 5.0})]}, id="node"
    ),
]


def ask_node(runner: StromaRunner, calls: list[str], returned: Any = None) -> Any:
    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        calls.append(state.text)
        return returned or ({"text": "kept"}, 5_000_000, 100_000, UNKNOWN)

    return ask


@pytest.mark.parametrize("limit", LIMITS)
async def test_an_unknown_model_stops_a_run_under_a_cost_limit(limit: Any) -> None:
    """Under a limit in US dollars a model without a known price is an error; its output is kept."""
    calls: list[str] = []
    runner = StromaRunner.quick(**limit())
    ask = ask_node(runner, calls)
    result = await runner.run([ask, ask], Note())
    assert (result.status, len(calls), len(result.trace)) == (RunStatus.FAILED, 1, 1)
    assert result.failure.failure_class is FailureClass.TERMINAL
    assert result.failure.reason == "usage"
    assert isinstance(result.failure.exception, UsageError)
    assert UNKNOWN in result.failure.message
    assert 'unknown_model="warn"' in result.failure.message
    assert result.final_state == Note(text="kept")
    assert result.unpriced_models == [UNKNOWN]


@pytest.mark.parametrize("limit", LIMITS)
async def test_an_unknown_model_counts_as_nothing_under_a_cost_limit_if_so_configured(limit: Any) -> None:
    """``unknown_model="warn"`` counts a model without a known price as 0 USD, whatever the limits are."""
    runner = StromaRunner.quick(**limit(), unknown_model="warn")
    ask = ask_node(runner, [])
    result = await runner.run([ask, ask], Note())
    assert (result.status, result.total_cost_usd) == (RunStatus.COMPLETED, 0.0)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"budget": ExecutionBudget(max_tokens_total=10**8, max_latency_ms=600_000)},
        {"shared_budgets": shared(max_tokens=10**9)},
        {"shared_budgets": shared(max_cost_usd=1.0, nodes=["another"])},
        {"shared_budgets": shared(max_tokens=10**9, max_cost_usd_by_node={"another": 1.0})},
    ],
    ids=["none", "tokens", "shared tokens", "other nodes", "cap of another node"],
)
async def test_an_unknown_model_counts_as_nothing_where_no_cost_limit_is(config: dict[str, Any]) -> None:
    """Without a limit in US dollars on the node, a model without a known price counts as 0 USD."""
    runner = StromaRunner.quick(**config)
    runner.node("another", input=Note, output=Note)(lambda state: state)
    result = await runner.run([ask_node(runner, [])], Note())
    assert (result.status, result.unpriced_models) == (RunStatus.COMPLETED, [UNKNOWN])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", ["step", "parallel", "map"])
async def test_an_unknown_model_stops_steps_and_groups_under_a_cost_limit(limit: Any, shape: str) -> None:
    """The limit in US dollars holds for single steps, children of groups and items of maps alike."""
    calls: list[str] = []
    runner = StromaRunner.quick(**limit())
    ask = ask_node(runner, calls)
    if shape == "step":
        ctx = context_of(runner)
        result = await execute_step("ask", ask, Note(), ctx)
    elif shape == "parallel":
        result = await runner.run([parallel(ask), ask], Note())
    else:
        nodes = [map_over("items", ask, into="out", max_concurrency=1)]
        result = await runner.run(nodes, Texts(items=[Note(), Note(), Note()]))
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
    assert result.failure.reason == "usage"


@pytest.mark.parametrize("ends", ["raising", "breaking its contract"])
async def test_a_failed_attempt_of_an_unknown_model_is_not_tried_again_under_a_cost_limit(ends: str) -> None:
    """A failed attempt counts in US dollars, too: one that cannot be counted is not followed by another."""
    calls: list[int] = []
    runner = StromaRunner.quick(
        budget=ExecutionBudget(max_cost_usd=1.0),
        contract_retries={"ask": 3},
        policy_map={FailureClass.RECOVERABLE: FailurePolicy(backoff_seconds=0)},
    )

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        calls.append(1)
        current_node().report_usage(input_tokens=1_000_000, model=UNKNOWN)
        if ends == "raising":
            raise TimeoutError("the server hung up")
        return {"text": 7}

    result = await runner.run([ask], Note())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
    assert isinstance(result.failure.exception, UsageError)
    assert result.failure.exception.__cause__ is not None


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", ["pair", "usage", "report", "step", "parallel", "map", "flow", "cached"])
async def test_tokens_without_a_model_are_refused_under_a_cost_limit(limit: Any, shape: str) -> None:
    """Tokens without any model are those of an unknown one: a limit in US dollars refuses them."""
    calls: list[str] = []
    runner = StromaRunner.quick(**limit())
    returned: Any = ({"text": "kept"}, 100)
    if shape == "usage":
        returned = ({"text": "kept"}, Usage(100, 20))
    if shape in ("report", "cached"):

        @runner.node("ask", input=Note, output=Note)
        async def ask(state: Note) -> Any:
            calls.append(state.text)
            cached = 60 if shape == "cached" else 0
            current_node().report_usage(input_tokens=100, cached_input_tokens=cached)
            return {"text": "kept"}
    else:
        ask = ask_node(runner, calls, returned)
    result: Any
    if shape == "step":
        ctx = context_of(runner)
        result = await execute_step("ask", ask, Note(), ctx)
    elif shape == "map":
        nodes = [map_over("items", ask, into="out", max_concurrency=1)]
        result = await runner.run(nodes, Texts(items=[Note(), Note(), Note()]))
    elif shape == "flow":

        @runner.flow("twice", input=Note, output=Note)
        async def twice(flow: Flow, state: Note) -> Note:
            return await flow.step(ask, await flow.step(ask, state))

        result = await runner.run(twice, Note())
    else:
        result = await runner.run([parallel(ask) if shape == "parallel" else ask, ask], Note())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
    assert result.failure.reason == "usage"
    assert "'ask' reported tokens without a model" in result.failure.message
    if shape != "step":
        assert result.unpriced_models == ["(no model)"]


@pytest.mark.parametrize(
    "config", [{}, {"unknown_model": "warn", "budget": ExecutionBudget(max_cost_usd=1.0)}]
)
async def test_tokens_without_a_model_count_as_nothing_elsewhere(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a cost limit, tokens without a model cost 0 USD, with one warning and an unpriced model."""
    runner = StromaRunner.quick(**config)
    ask = ask_node(runner, [], ({"text": "x"}, 100))
    result = await runner.run([ask, ask], Note())
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.COMPLETED, 200, 0.0)
    assert result.unpriced_models == ["(no model)"]
    assert sum("without a model" in record.getMessage() for record in caplog.records) == 1


async def test_unknown_model_error_refuses_tokens_without_a_model_without_any_limit() -> None:
    """``unknown_model="error"`` refuses tokens without a model, whatever the limits are."""
    runner = StromaRunner.quick(unknown_model="error")
    assert (await runner.run([ask_node(runner, [], ({"text": "x"}, 100))], Note())).status is RunStatus.FAILED


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("used", [0, Usage(), Usage(100, 20, cost_usd=0.5)], ids=["zero", "none", "charged"])
async def test_a_cost_that_is_reported_needs_no_model(limit: Any, used: Any) -> None:
    """No tokens, and tokens whose cost is reported, need no model under a limit in US dollars."""
    runner = StromaRunner.quick(**limit())
    result = await runner.run([ask_node(runner, [], ({"text": "x"}, used))], Note())
    assert (result.status, result.unpriced_models) == (RunStatus.COMPLETED, [])


@pytest.mark.parametrize("limit", [*LIMITS, lambda: {"shared_budgets": shared(max_tokens=10**9)}])
async def test_a_response_without_usage_stops_a_run_under_any_limit_that_depends_on_it(limit: Any) -> None:
    """A response that leaves its usage out cannot be counted, so it stops a run that shares a budget, too."""
    calls: list[str] = []
    runner = StromaRunner.quick(**limit())
    response = {"choices": [{"message": {"content": "x"}}], "usage": None, "model": "gpt-4o-mini"}
    ask = ask_node(runner, calls, ({"text": "kept"}, response))
    result = await runner.run([ask, ask], Note())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
    assert result.final_state == Note(text="kept")


def test_the_default_depends_on_the_limits() -> None:
    """``RunConfig().unknown_model`` is None, which leaves the decision to the limits of each node."""
    assert RunConfig().unknown_model is None
