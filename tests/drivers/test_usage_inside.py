"""Steps inside a node use what they use in a local run: it is in the totals, and counts against the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel
from tests.drivers.conftest import LocalDriver, TemporalDriver
from tests.drivers.scenarios import Texts, spending
from tests.drivers.seam import Seam, SeamDriver, SeamRunner
from tests.kit import NEVER, THRICE, Num, node

from stroma import (
    ExecutionBudget,
    FallbackPolicy,
    Flow,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    SQLiteStore,
    Suspend,
    Usage,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
)
from stroma.adapters import Guard
from stroma.cost import KNOWN_MODELS
from stroma.drivers.remote.attempts import Attempts
from stroma.trace import ExecutionResult

DEAR = "a-very-dear-one"
KNOWN_MODELS.setdefault(DEAR, (1000.0, 2000.0))  # USD for 1,000,000 tokens: 1 USD for 1,000
Calls = list[str]


class Length(BaseModel):
    length: int


class Text(BaseModel):
    text: str


def asked(calls: Calls, tokens: int, model: str | None = DEAR) -> Callable[[Any], Any]:
    """Return the function of a step that uses tokens."""

    async def ask(state: Any) -> Any:
        calls.append("ask")
        return {"n": 1}, tokens, model

    return ask


async def ask_once(calls: Calls, tokens: int, model: str | None = DEAR) -> None:
    """Call a step inside the node that runs here. Raises what stopped it."""
    result = await execute_step("ask", asked(calls, tokens, model), Num(), current_run())  # type: ignore[arg-type]
    if result.failure is not None:
        raise result.failure.exception


def agent(
    calls: Calls,
    node_id: str = "agent",
    tokens: int = 1000,
    *,
    own: int = 0,
    model: str | None = DEAR,
    fails: int = 0,
) -> Any:
    """Return a node that calls a step, and fails after it in its first attempts."""

    async def func(state: Num) -> Any:
        calls.append(node_id)
        await ask_once(calls, tokens, model)
        if current_node().attempt <= fails:
            raise ValueError("odd")
        return {"n": state.n + 1}, own, DEAR

    return node(node_id, func)


def guarded(calls: Calls, tokens: int = 1000, outside: int = 0) -> Any:
    """Return a node that calls an agent framework, which has a guard on the run."""

    async def func(state: Num) -> dict[str, int]:
        guard = Guard(current_run())
        if outside:
            guard.current.report_usage(Usage(outside, model=DEAR))
        step = guard.wrap("tool", tool, usage=lambda _: Usage(tokens, model=DEAR))
        return {"n": state.n + await step("x")}

    async def tool(text: str) -> int:
        calls.append("tool")
        return len(text)

    return node("guarded", func)


def each(calls: Calls, failing_at: str | None = None, tokens: int = 1000) -> Any:
    async def func(state: Text) -> dict[str, int]:
        await ask_once(calls, tokens)
        if state.text == failing_at:
            raise ValueError("odd")
        return {"length": len(state.text)}

    return node("each", func, Text, Length)


def mapping(calls: Calls, **options: Any) -> Any:
    """Return a node that maps over items by itself."""

    async def func(state: Num) -> dict[str, int]:
        inside = map_over("texts", each(calls), into="lengths", **options)
        result = await execute_step("inside", inside, Texts(texts=["a", "b"]), current_run())  # type: ignore[arg-type]
        result.raise_for_status()
        return {"n": 1}

    return node("mapping", func)


def model_of(calls: Calls) -> Any:
    async def func(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append(ctx.get("_stroma_model", "no fallback"))
        return {"n": state.n}

    return node("model", func)


def cancelling(calls: Calls) -> Any:
    """Return a node that is cut off by its time limit, after its step."""

    async def func(state: Num) -> dict[str, int]:
        await ask_once(calls, 1000)
        await asyncio.Event().wait()
        return {}

    return node("cut", func)


def asking(calls: Calls) -> Any:
    """Return a node that asks a person after its step."""

    async def func(state: Num) -> dict[str, int]:
        await ask_once(calls, 1000)
        raise Suspend("may it continue?")

    return node("asking", func)


def a_flow(calls: Calls) -> Any:
    first, second = agent(calls, "first"), agent(calls, "second")

    async def body(flow: Flow, state: Num) -> Num:
        for step in (first, second, first):
            state = await flow.step(step, state)
        return state

    return stroma_flow("flow", input=Num, output=Num)(body)


@dataclass
class Case:
    make: Callable[[Calls], list[Any]]
    tokens: int
    status: RunStatus = RunStatus.COMPLETED
    config: dict[str, Any] = field(default_factory=dict)
    state: BaseModel = field(default_factory=Num)


def limit(usd: float) -> dict[str, Any]:
    return {"budget": ExecutionBudget(max_cost_usd=usd)}


LETTERS = Texts(texts=["a", "b", "c"])
CASES: dict[str, Case] = {
    "no limit": Case(lambda calls: [agent(calls, own=500), agent(calls)], 2500),
    "a limit": Case(lambda calls: [agent(calls)] * 4, 2000, RunStatus.PARTIAL, limit(1.5)),
    "exactly at the limit": Case(lambda calls: [agent(calls)] * 2, 2000, config=limit(2.0)),
    "a limit of tokens": Case(
        lambda calls: [agent(calls)] * 4, 2000, RunStatus.PARTIAL,
        {"budget": ExecutionBudget(max_tokens_total=1500)},
    ),
    "what failed attempts used": Case(
        lambda calls: [agent(calls, fails=2), spending(calls, "plain", 1)], 3001, config={"policy_map": THRICE},
    ),
    "failed attempts over the limit": Case(
        lambda calls: [agent(calls, fails=3)], 2000, RunStatus.PARTIAL, {"policy_map": THRICE, **limit(1.5)},
    ),
    "a guard": Case(lambda calls: [guarded(calls)] * 4, 2000, RunStatus.PARTIAL, limit(1.5)),
    "a guard, and usage outside of its steps": Case(
        lambda calls: [guarded(calls, 500, outside=500)] * 4, 2000, RunStatus.PARTIAL, limit(1.5),
    ),
    "side by side": Case(
        lambda calls: [parallel(agent(calls, "l"), agent(calls, "r"), max_concurrency=1), agent(calls)], 3000,
        config=limit(3.0),
    ),
    "side by side over the limit": Case(
        lambda calls: [parallel(*[agent(calls, name) for name in "lmr"], max_concurrency=1)], 2000,
        RunStatus.PARTIAL, limit(1.5),
    ),
    "items": Case(
        lambda calls: [map_over("texts", each(calls, "b"), into="lengths", max_concurrency=1, on_item_failure="collect")],
        3000, config={"policy_map": NEVER, **limit(3.0)}, state=LETTERS,
    ),
    "items over the limit": Case(
        lambda calls: [map_over("texts", each(calls, "b"), into="lengths", max_concurrency=1, on_item_failure="collect")],
        2000, RunStatus.PARTIAL, {"policy_map": NEVER, **limit(1.5)}, LETTERS,
    ),
    "a map inside a node": Case(
        lambda calls: [mapping(calls, max_concurrency=1), agent(calls)], 3000, RunStatus.PARTIAL, limit(2.5),
    ),
    "a flow": Case(lambda calls: [a_flow(calls)], 2000, RunStatus.PARTIAL, limit(1.5)),
    "a model that nobody knows": Case(lambda calls: [agent(calls, model="nobody-knows-it")], 1000),
    "a fallback": Case(
        lambda calls: [model_of(calls), agent(calls), model_of(calls)], 1000,
        config={"model_fallbacks": [FallbackPolicy(DEAR, "a-cheap-one", 0.5)], **limit(1.5)},
    ),
    "a question": Case(lambda calls: [asking(calls)], 1000, RunStatus.SUSPENDED),
    "a time limit": Case(
        lambda calls: [cancelling(calls)], 1000, RunStatus.PARTIAL,
        {"policy_map": NEVER, "node_timeouts": {"cut": 100}},
    ),
}  # fmt: skip


def sums_by_node(result: ExecutionResult[Any]) -> dict[Any, list[float]]:
    sums: dict[Any, list[float]] = {}
    for node_id, tokens, output_tokens, cost, _, model in result.trace.figures():
        row = sums.setdefault((node_id, model if tokens else None), [0, 0, 0.0])
        for index, figure in enumerate((tokens, output_tokens, cost)):
            row[index] += figure
    return sums


async def outcome(case: Case, driver: Any) -> tuple[ExecutionResult[Any], dict[str, Any]]:
    """Run a case. Return its result, and what is the same under every driver."""
    calls: Calls = []
    warnings: list[Any] = []

    async def warning(run_id: str, dimension: str, used: float, of: float) -> None:
        warnings.append((dimension, used, of))

    async def look(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        run = current_run()
        assert run is not None
        assert all(event.node_id for event in run.trace.walk())  # Its rows are events from now on.

    hooks = NodeHooks(on_budget_warning=warning, on_node_success=look)
    async with driver.bind(case.make(calls), **case.config, hooks=hooks) as bound:
        result = await bound.run(case.state)
    failure = result.failure
    return result, {
        "calls": calls,
        "status": result.status,
        "tokens": result.total_tokens,
        "cost": result.total_cost_usd,
        "failure": None if failure is None else (failure.failure_class, failure.message, failure.reason),
        "items": result.failed_items,
        "unpriced": result.unpriced_models,
        "warnings": warnings,
        "state": result.final_state,
    }


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
async def test_steps_inside_a_node_are_counted_as_in_a_local_run(name: str) -> None:
    """Calls, status, totals, warnings and failure are the same, and the trace has the sums of each node."""
    case = CASES[name]
    local, expected = await outcome(case, LocalDriver())
    remote, told = await outcome(case, SeamDriver())
    assert (local.status, local.total_tokens) == (case.status, case.tokens)
    assert told == expected
    sums = sums_by_node(remote)
    # A local trace has no row for usage outside of steps.
    assert {key: row for key, row in sums.items() if key[0] != "outside of steps"} == sums_by_node(local)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a limit", "a guard", "failed attempts over the limit", "items", "a flow"])
async def test_steps_inside_a_node_are_counted_on_a_cluster(name: str, temporal: TemporalDriver) -> None:
    """What is inside of an attempt comes back from its worker, with that of a failed one."""
    case = CASES[name]
    _, expected = await outcome(case, LocalDriver())
    _, told = await outcome(case, temporal)
    assert told == expected


async def test_steps_inside_a_node_are_in_the_sums_of_the_store(tmp_path: Any) -> None:
    """The copy of a run in a store has its totals; the trace counts the attempts inside, and what was lost."""
    calls: Calls = []
    pipeline = Pipeline("pipe", [agent(calls, own=500, fails=1), mapping(calls)])
    config = RunConfig(policy_map=THRICE)
    async with SQLiteStore(tmp_path / "runs.db") as store:
        attempts = Attempts([pipeline], config=config, store=store)
        result = await SeamRunner(attempts, config).run(pipeline, Num())
        record = store.get_run("run")
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.COMPLETED, 4500, 4.5)
    counts = [None if e.left_out is None else (e.left_out.events, e.left_out.failures) for e in result.trace]
    assert counts == [(1, 0), (1, 0), (5, 0)]
    assert record is not None
    assert (record.tokens, record.cost_usd) == (4500, 4.5)


class OldSeam(Seam):
    """Has workers of an earlier release, whose replies lack the steps inside a node."""

    async def ask(self, request: Any) -> tuple[Any, bool]:
        reply, cancelled = await super().ask(request)
        reply.get("row", {}).pop("inside", None)
        return reply, cancelled


async def test_a_reply_without_the_steps_inside_is_read_as_before() -> None:
    calls: Calls = []
    pipeline = Pipeline("pipe", [agent(calls, own=500)] * 2)
    runner = SeamRunner(Attempts([pipeline]), RunConfig())
    runner.seam = OldSeam(Attempts([pipeline]))
    result = await runner.run(pipeline, Num())
    assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 1000)
