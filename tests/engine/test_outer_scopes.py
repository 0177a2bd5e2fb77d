"""Scopes and cancellations around a run, at each of its awaits: each gets its own CancelledError back."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
from tests.engine.awaits import Awaits
from tests.fixtures import store_fixture
from tests.kit import Num, context_of, node, quick
from tests.shared_stores import IN_PROCESS

from stroma import (
    ExecutionBudget,
    Flow,
    NodeContract,
    NodeHooks,
    SharedBudget,
    StromaRunner,
    execute_step,
    parallel,
)

store = store_fixture(*IN_PROCESS)
#: More awaits than any of the runs here makes.
MANY = 500


async def add(state: Num) -> Any:
    await asyncio.sleep(0)
    return {"n": state.n + 1}, 5, "gpt-4o-mini"


async def hook(*_: Any) -> None:
    await asyncio.sleep(0)


def runner_of(store: Any) -> StromaRunner:
    hooks = NodeHooks(on_node_start=hook, on_node_success=hook, on_run_end=hook, on_node_cancelled=hook)
    shared = SharedBudget("scopes", max_tokens=10_000_000, store=store)
    budget = ExecutionBudget(max_tokens_total=1000)
    return quick(store=store, hooks=hooks, budget=budget, shared_budgets=[shared])


def a_list(store: Any, run_id: str) -> Any:
    nodes = [node("a", add), parallel(node("b", add), node("c", add))]
    return runner_of(store).run(nodes, Num(), run_id=run_id)


def a_flow(store: Any, run_id: str) -> Any:
    runner = runner_of(store)

    @runner.flow("flow", input=Num, output=Num)
    async def flow(flow: Flow, state: Num) -> Num:
        state = await flow.step(node("a", add), state)
        return await flow.step(node("b", add), state)

    return runner.run(flow, Num(), run_id=run_id)


async def plain_code(store: Any, run_id: str) -> None:
    runner = runner_of(store)
    runner.config = runner.config.model_copy(update={"run_id": run_id})
    contract = NodeContract(node_id="a", input_schema=Num, output_schema=Num)
    async with context_of(runner) as ctx:
        await execute_step("a", add, Num(), ctx, contract=contract)


def an_effect(store: Any, run_id: str) -> Any:
    runner = runner_of(store)

    @runner.node("pay", input=Num, output=Num, effect=True)
    async def pay(state: Num) -> Num:
        await asyncio.sleep(0)
        return state

    return runner.run([pay], Num(), run_id=run_id)


WAYS = [a_list, a_flow, plain_code, an_effect]


@pytest.mark.core
@pytest.mark.parametrize("way", WAYS)
async def test_the_cancellation_that_came_is_the_one_that_leaves(store: Any, way: Callable[..., Any]) -> None:
    """The CancelledError that comes out of a run has the message of cancel(), at each await."""
    for number in range(1, MANY):
        awaits = Awaits(number, lambda: None)
        awaits.of_new_tasks()
        running = asyncio.ensure_future(way(store, f"r{number}"))
        awaits.act = partial(running.cancel, "that one")
        await asyncio.wait([running])
        if not awaits.has_acted:
            break
        with pytest.raises(asyncio.CancelledError) as caught:
            running.result()
        assert caught.value.args == ("that one",), number
    assert 3 < number < MANY - 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_scope_of_anyio_ends_at_its_own_cancellation(store: Any, way: Callable[..., Any]) -> None:
    """An anyio scope around a run catches its cancellation at whichever await, and the task goes on."""
    task = asyncio.current_task()
    assert task is not None
    for number in range(1, MANY):
        with anyio.CancelScope() as scope:
            awaits = Awaits(number, scope.cancel)
            awaits.of_new_tasks()
            await awaits.of(way(store, f"r{number}"))
        assert scope.cancelled_caught is awaits.has_acted, number
        assert task.cancelling() == 0
        if not awaits.has_acted:
            break
    assert 3 < number < MANY - 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_timeout_around_a_run_is_a_timeout(store: Any, way: Callable[..., Any]) -> None:
    """asyncio.timeout() around a run raises TimeoutError at whichever await it expires; the task goes on."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in range(1, MANY):
        try:
            async with asyncio.timeout(None) as timeout:
                awaits = Awaits(number, lambda: timeout.reschedule(loop.time() - 1))
                awaits.of_new_tasks()
                await awaits.of(way(store, f"r{number}"))
        except TimeoutError:
            assert awaits.has_acted
        assert task.cancelling() == 0
        if not awaits.has_acted:
            break
    assert 3 < number < MANY - 1


async def test_a_scope_inside_of_a_flow_is_the_flows(store: Any) -> None:
    """A scope that a body opens around a step catches its cancellation, and the run goes on."""
    runner = runner_of(store)

    @runner.flow("flow", input=Num, output=Num)
    async def flow(flow: Flow, state: Num) -> Num:
        slow = node("slow", lambda _: asyncio.sleep(3600))
        with anyio.move_on_after(0.05):
            return await flow.step(slow, state)
        return Num(n=7)

    result = await runner.run(flow, Num(), run_id="r")
    assert (result.status, result.final_state) == ("COMPLETED", Num(n=7))


async def test_a_failed_sibling_of_a_task_group_ends_the_run_beside_it(store: Any) -> None:
    """A TaskGroup with a run and a task that fails ends with that failure alone."""

    async def fails() -> None:
        raise ValueError("sibling")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(a_list(store, "r"))
            group.create_task(fails())
    assert [str(error) for error in caught.value.exceptions] == ["sibling"]
