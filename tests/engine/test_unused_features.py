"""Features that are not used cost nothing, and a node costs the same in a run of any length."""

import asyncio
import gc
import sys
import weakref
from functools import partial
from typing import Any

import pytest
from tests.kit import THRICE, Num, node

from stroma import BudgetExceeded, ExecutionBudget, NodeHooks, RunStatus, StromaRunner, current_run, parallel
from stroma.cost import CostTracker
from stroma.engine.tasks import TICK_SECONDS, LoopTicks

pytestmark = pytest.mark.core

quick = partial(StromaRunner.quick, policy_map=THRICE)


def giving(output: Any) -> tuple[Any, list[Any]]:
    """A node's function that returns a value, and the list of its inputs."""
    calls: list[Any] = []

    async def func(state: Any) -> Any:
        calls.append(state)
        return output

    return func, calls


async def _quiet(*_: Any) -> None:
    return None


async def test_no_budget_no_summing(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: without a budget no total is compared with anything."""
    compared: list[Any] = []
    original = CostTracker.exceeded

    def exceeded(self: CostTracker, budget: ExecutionBudget, node_id: str) -> BudgetExceeded | None:
        compared.append(node_id)
        return original(self, budget, node_id)

    monkeypatch.setattr(CostTracker, "exceeded", exceeded)
    nodes = [node("a", giving(({"n": 1}, 5))[0])] * 5
    await quick().run(nodes, Num())
    assert compared == []
    await quick(budget=ExecutionBudget(max_tokens_total=100)).run(nodes, Num())
    assert len(compared) >= 5


async def test_no_timers_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: Without timeouts and suspending hooks, the only timer is that for a blocked event loop."""
    loop = asyncio.get_running_loop()
    armed: list[Any] = []
    original = loop.call_at

    def call_at(when: float, callback: Any, *rest: Any, **more: Any) -> Any:
        armed.append(callback)
        return original(when, callback, *rest, **more)

    monkeypatch.setattr(loop, "call_at", call_at)
    nodes = [node("a", giving({"n": 1})[0])] * 5
    begin = loop.time()
    await quick(hooks=NodeHooks(on_node_start=_quiet, on_node_success=_quiet)).run(nodes, Num())
    at_most = 1 + (loop.time() - begin) / TICK_SECONDS
    assert len(armed) <= at_most
    assert all(isinstance(callback.__self__, LoopTicks) for callback in armed)
    armed.clear()
    await quick(node_timeouts={"a": 10_000}).run(nodes, Num())
    assert all(isinstance(callback.__self__, LoopTicks) for callback in armed)

    async def waits(state: Num) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"n": state.n}

    armed.clear()
    await quick(node_timeouts={"a": 10_000}).run([node("a", waits)] * 5, Num())
    assert len([one for one in armed if not isinstance(getattr(one, "__self__", None), LoopTicks)]) == 5


@pytest.mark.parametrize("kind", ["plain", "watched", "retried", "group"])
async def test_no_run_waits_for_the_collector(kind: str) -> None:
    """G12: Everything that a run owned is freed with the last reference to it, without garbage collection."""
    owned: list[weakref.ref[Any]] = []

    async def work(state: Num) -> dict[str, int]:
        owned.append(weakref.ref(current_run()))
        if kind == "retried" and len(owned) % 2:
            raise ValueError("not yet")
        return {"n": state.n + 1}

    hooks = NodeHooks(on_node_start=_quiet, on_node_success=_quiet) if kind == "watched" else NodeHooks()
    nodes = [node("a", work), node("b", work)]
    gc.collect()
    gc.disable()
    try:
        runner = quick(hooks=hooks, policy_map=THRICE)
        result = await runner.run([parallel(*nodes)] if kind == "group" else nodes, Num())
        assert result.status is RunStatus.COMPLETED
        del result
        assert len(owned) == (4 if kind == "retried" else 2)
        assert [ref() for ref in owned] == [None] * len(owned)
    finally:
        gc.enable()


def _calls_of_a_run(runner: StromaRunner, nodes: list[Any]) -> int:
    """How many Python functions a run of nodes calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    async def main() -> None:
        sys.setprofile(profile)
        try:
            await runner.run(nodes, Num())
        finally:
            sys.setprofile(None)

    gc.collect()
    gc.disable()  # Finalizers of other tests' garbage would be counted.
    try:
        asyncio.run(main())
    finally:
        gc.enable()
    return count


@pytest.mark.parametrize("kind", ["plain", "hooks", "budget", "resume", "group"])
def test_cost_per_node_does_not_grow(kind: str) -> None:
    """G12: A node costs the same number of calls in a run of 400 nodes as in a run of 100."""
    hooks = NodeHooks(on_node_start=_quiet, on_node_success=_quiet)
    config: dict[str, Any] = {
        "plain": {},
        "hooks": {"hooks": hooks},
        "budget": {"budget": ExecutionBudget(max_tokens_total=10**9, max_cost_usd=1e9)},
        "resume": {"resume": True},
        "group": {},
    }[kind]

    def measure(n: int) -> int:
        func, _ = giving(({"n": 1}, 5))
        nodes = [node(f"n{i}", func) for i in range(n)]
        return _calls_of_a_run(quick(**config), [parallel(*nodes)] if kind == "group" else nodes)

    measure(100)
    few, many, more = measure(100), measure(400), measure(700)
    assert (more - many) / 300 <= (many - few) / 300 * 1.02
