"""Runs inside of nodes and scopes: each gets the errors, deadlines and cancellations that are its own."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
from tests.engine.awaits import Awaits
from tests.fixtures import store_fixture
from tests.kit import (
    TWICE,
    Num,
    One,
    context_of,
    failing_with,
    forever,
    give_one,
    node,
    quick,
    quick_without_retries,
)
from tests.shared_stores import IN_PROCESS

from stroma import (
    BudgetExceeded,
    ContractViolation,
    CorruptCheckpoint,
    ExecutionBudget,
    FailureClass,
    Flow,
    NodeContext,
    NodeContract,
    NodeHooks,
    PipelineChanged,
    RunStatus,
    SharedBudget,
    SQLiteStore,
    StoreError,
    StromaRunner,
    execute_step,
    parallel,
)
from stroma.hooks.dispatch import HookNotAsync

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


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "status", "attempts"),
    [
        (PipelineChanged, RunStatus.FAILED, 1),  # Another attempt would meet the same.
        (CorruptCheckpoint, RunStatus.PARTIAL, 3),
        (StoreError, RunStatus.PARTIAL, 3),
    ],
)
async def test_errors_of_a_nested_run_are_failures_of_the_node(
    kind: type[Exception], status: RunStatus, attempts: int
) -> None:
    """What a node's own run raises is a failure of the node: a result with that error, not an exception."""
    result = await quick().run([node("a", failing_with(kind, "of another run"))], Num())
    assert (result.status, len(result.trace)) == (status, attempts)
    assert type(result.failure.exception) is kind


R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


async def _unopened() -> None:
    await SQLiteStore("/dev/null/x.db").save("a", "b", Num())


async def _sync_hook() -> None:
    hooks = NodeHooks(on_node_start=lambda *_: len(_))
    await quick_without_retries(hooks=hooks).run([node("i", give_one, output=One)], Num())


async def _deadline() -> None:
    async def slow(state: Num) -> Any:
        await forever()

    budget = ExecutionBudget(max_latency_ms=1)
    result = await quick_without_retries(budget=budget).run([node("i", slow)], Num())
    result.raise_for_status()


NESTED = [(_unopened, StoreError, A), (_sync_hook, HookNotAsync, A), (_deadline, BudgetExceeded, R)]


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize(("inner", "error", "kind"), NESTED, ids=lambda p: getattr(p, "__name__", None))
async def test_errors_of_a_run_within_a_node_are_failures_like_any_other(
    inner: Any, error: type[Exception], kind: FailureClass, budget: int | None, in_group: bool, store: Any
) -> None:
    """What a run or a store of the node's own raises is that node's failure: classified and retried."""
    requests: list[type[BaseException]] = []
    calls: list[int] = []
    recover_at = [99]

    async def outer(state: Num) -> Any:
        calls.append(1)
        if len(calls) < recover_at[0]:
            await inner()
        return {"a": 1}

    def look(exc: Exception, _: NodeContext) -> None:
        requests.append(type(exc))

    outer_node: Any = node("outer", outer, output=One)
    nodes = [parallel(outer_node)] if in_group else [outer_node]
    limits = ExecutionBudget(max_latency_ms=budget)
    runner = quick_without_retries(store=store, policy_map=TWICE, classifiers=[look], budget=limits)
    result = await runner.run(nodes, Num())
    assert result.status is RunStatus.PARTIAL
    assert isinstance(result.failure.exception, error)
    assert result.failure.failure_class is kind
    assert len(calls) == 3
    assert len(requests) == 3
    assert all(issubclass(a, error) for a in requests)
    assert [e.failure for e in result.trace.walk() if e.node_id == "outer"] == [kind] * 3

    calls.clear()
    recover_at[0] = 3
    assert (await runner.run(nodes, Num())).status is RunStatus.COMPLETED
    assert len(calls) == 3

    calls.clear()
    recover_at[0] = 99
    result = await runner.with_classifiers([lambda exc, _: T]).run(nodes, Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)


@pytest.mark.core
async def test_a_violation_inside_a_node_is_not_repaired() -> None:
    """contract_retries is about a node's own output, not about a violation in a run that the node made."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ContractViolation("inside", "output", {}, [])

    result = await quick(contract_retries={"a": 3}).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
