"""Guarded runs that somebody pauses, or whose budget somebody changes."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import Num, node

from stroma import (
    BudgetExceeded,
    ExecutionBudget,
    InMemoryStore,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    current_run,
)
from stroma.adapters import Guard, RunCancelled

store = store_fixture("async-memory", "sqlite")


def guard_of(store: Any) -> tuple[Guard, list[int], asyncio.Event, asyncio.Event]:
    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=10))
    return Guard(runner), [], asyncio.Event(), asyncio.Event()


async def test_the_next_step_of_a_paused_run_is_not_called(store: Any) -> None:
    """The current step is committed, the next raises Suspend, and the run is SUSPENDED ("paused")."""
    guard, calls, reached, go = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        reached.set()
        await go.wait()
        return n

    raised: list[BaseException] = []

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await work(1)
            try:
                await work(2)
            except Exception as error:
                raised.append(error)
                raise

    task = asyncio.create_task(framework())
    await reached.wait()
    assert await guard.runner.pause("x") is True
    go.set()
    await asyncio.wait([task])
    assert calls == [1]
    assert isinstance(raised[0], Suspend)
    task.exception()
    assert (guard.last.result.status, guard.last.result.suspended) == (RunStatus.SUSPENDED, ["paused"])
    record = store.get_run("x")
    assert (record.status, record.error, record.holder) == ("SUSPENDED", "paused", None)


async def test_a_raise_applies_to_the_next_step(store: Any) -> None:
    """A budget that is raised while a step is at work is the one that it and the next one meet."""
    guard, calls, reached, go = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        reached.set()
        await go.wait()
        current_node().report_usage(input_tokens=8)
        return n

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await work(1)
            await work(2)

    task = asyncio.create_task(framework())
    await reached.wait()
    assert await guard.runner.set_budget("x", tokens=16) is True
    go.set()
    await task
    assert (calls, store.get_run("x").status) == ([1, 2], "COMPLETED")


@pytest.mark.parametrize("request_name", ["cancel", "pause", "set_budget"])
async def test_requests_reach_the_steps_outside_of_runs(request_name: str) -> None:
    """Steps outside of ``guard.run()`` heed a request about their run, which has no owner."""
    store = InMemoryStore()
    guard, calls, _, _ = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        current_node().report_usage(input_tokens=3)
        return n

    await work(1)
    run_id = guard.current.ctx.run_id
    limits = {"tokens": 5} if request_name == "set_budget" else {}
    assert await getattr(guard.runner, request_name)(run_id, **limits) is True
    record = store.get_run(run_id)
    stop, status = {
        "cancel": (RunCancelled, "CANCELLED"),
        "pause": (Suspend, "SUSPENDED"),
        "set_budget": (BudgetExceeded, "RUNNING"),
    }[request_name]
    assert (record.status, record.holder) == (status, None)
    for n in (2, 3, 4):
        with pytest.raises(stop):
            await work(n)
    assert calls == (
        [1, 2] if request_name == "set_budget" else [1]
    )  # The call that crosses a limit is made.
    record = store.get_run(run_id)
    assert record.status == status


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_pause_inside_a_node_asks_nothing(store: Any, is_wrapped: bool, is_nested: bool) -> None:
    """The node around the step that is not called waits with the run: no failure, and nothing to answer."""
    runner, calls = StromaRunner.quick(store=store), list[int]()

    async def func(state: Num) -> dict[str, int]:
        guard = Guard(current_run())

        @guard.step("tool")
        async def tool(number: int) -> int:
            calls.append(number)
            if calls == [0]:
                await runner.pause("x")
            return number

        async def agent() -> int:
            try:
                return await tool(0) + await tool(1)
            except Suspend as error:
                if is_wrapped:
                    raise RuntimeError("a tool has failed") from error
                raise

        return {"n": state.n + await (guard.step("agent")(agent) if is_nested else agent)()}

    nodes = [node("node", func)]
    result = await runner.run(nodes, Num(n=1), run_id="x")
    assert (result.status, result.suspended, result.failure) == (RunStatus.SUSPENDED, ["paused"], None)
    assert [event.outcome for event in result.trace] == ["suspended"]
    assert store.waiting("x") == []
    resumed = await runner.resume(nodes, "x")
    assert (resumed.status, resumed.final_state) == (RunStatus.RESUMED, Num(n=2))
