"""Timeouts, deadlines, latency budgets and idle time limits of nodes, groups and hooks."""

import asyncio
import threading
from typing import Any

import pytest
from pydantic import ValidationError
from tests.kit import NEVER, ONCE, Num, failing_with, node, quick, quick_without_retries, sleep_forever

from stroma import (
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    NodeTimeout,
    RunConfig,
    RunStatus,
    current_node,
    parallel,
)
from stroma.testing import FakeClock


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


def talking(seconds: float, events: int) -> Any:
    """Return a function that emits so many events, each after so many seconds, and then hangs."""

    async def func(state: Num) -> Any:
        for index in range(events):
            await asyncio.sleep(seconds)
            current_node().emit(index)
        return await sleep_forever()

    return func


@pytest.mark.core
async def test_each_event_renews_the_idle_limit() -> None:
    """A node that emits often enough takes any time, and fails that long after its last event, by name."""
    with FakeClock() as clock:
        runner = quick(node_timeouts={"a": NodeTimeout(idle_ms=1000)}, policy_map=NEVER)
        result = await runner.run([node("a", talking(0.9, 20))], Num())
        assert clock.elapsed == pytest.approx(20 * 0.9 + 1)
    assert result.status is RunStatus.PARTIAL
    assert isinstance(result.failure.exception, TimeoutError)
    assert (result.failure.reason, result.failure.message) == (
        "timeout",
        "node 'a' emitted no event for 1000 ms; raise idle_ms of node_timeouts['a'], or emit more often",
    )


@pytest.mark.core
async def test_a_node_that_ends_in_time_leaves_no_timer() -> None:
    """An output that comes within the limit counts, and nothing is left in the event loop."""

    async def func(state: Num) -> Any:
        await asyncio.sleep(0.9)
        return {"n": 1}

    with FakeClock() as clock:
        runner = quick(node_timeouts={"a": NodeTimeout(idle_ms=1000)}, policy_map=NEVER)
        result = await runner.run([node("a", func)], Num())
        timers = [one for one in asyncio.get_running_loop()._scheduled if not one.cancelled()]
        assert clock.elapsed == pytest.approx(0.9)
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=1))
    assert [one for one in timers if "IdleTimer" in repr(one)] == []


@pytest.mark.core
async def test_the_total_limit_holds_whatever_is_emitted() -> None:
    """With both limits the nearer one counts: events renew the idle one only."""
    with FakeClock() as clock:
        limits = {"a": NodeTimeout(total_ms=5000, idle_ms=1000)}
        result = await quick(node_timeouts=limits, policy_map=NEVER).run([node("a", talking(0.9, 20))], Num())
        assert clock.elapsed == pytest.approx(5)
    assert result.failure.message == (
        "node 'a' did not end within 5000 ms; raise node_timeouts['a'], or make the call shorter"
    )


@pytest.mark.core
async def test_each_attempt_has_the_whole_idle_limit() -> None:
    """A retry begins with a limit of its own, and is made as after any timeout."""
    with FakeClock() as clock:
        runner = quick(node_timeouts={"a": NodeTimeout(idle_ms=1000)}, policy_map=ONCE)
        result = await runner.run([node("a", talking(0.9, 2))], Num())
        assert clock.elapsed == pytest.approx(2 * (2 * 0.9 + 1))
    assert [event.outcome for event in result.trace] == ["failure", "failure"]


@pytest.mark.core
async def test_nodes_inside_renew_the_limit_of_a_group() -> None:
    """An idle limit under a group's id is renewed by each node inside, and ends all of them."""
    group = parallel(node("a", talking(0.9, 3)), node("b", talking(0.7, 20)))
    with FakeClock() as clock:
        runner = quick(node_timeouts={group.node_id: NodeTimeout(idle_ms=1000)}, policy_map=NEVER)
        result = await runner.run([group], Num())
        assert clock.elapsed == pytest.approx(20 * 0.7 + 1)
    assert result.failure.node_id == group.node_id
    assert "emitted no event for 1000 ms" in result.failure.message


async def test_a_child_renews_no_limit_of_its_sibling() -> None:
    """What one node emits does not help another one."""
    group = parallel(node("a", talking(0.9, 20)), node("b", sleep_forever))
    with FakeClock() as clock:
        runner = quick(node_timeouts={"b": NodeTimeout(idle_ms=1000)}, policy_map=NEVER)
        result = await runner.run([group], Num())
        assert clock.elapsed == pytest.approx(1)
    assert "node 'b' emitted no event for 1000 ms" in result.failure.message


async def test_a_plain_function_renews_its_limit_from_its_thread() -> None:
    """A def node that emits from any thread is not cut off; one that falls silent is."""
    for silent in (False, True):
        over = threading.Event()

        def func(state: Num, ctx: Any) -> Any:
            here = current_node()
            ctx["clock"].advance(0.9)
            for _ in range(5):
                thread = threading.Thread(target=here.emit, args=("x",))
                thread.start()
                thread.join()
                here.emit("y")
                ctx["clock"].advance(0.9)
            if ctx["silent"]:
                ctx["clock"].advance(0.2)
                assert ctx["over"].wait(30)
            return {"n": 1}

        with FakeClock() as clock:
            context = {"clock": clock, "silent": silent, "over": over}
            limits = {"a": NodeTimeout(idle_ms=1000)}
            runner = quick(node_timeouts=limits, policy_map=NEVER, context=context)
            result = await runner.run([node("a", func)], Num())
        over.set()
        assert result.status is (RunStatus.PARTIAL if silent else RunStatus.COMPLETED)


def test_limits_that_are_refused() -> None:
    """A NodeTimeout needs a positive whole number of milliseconds; a plain number is its total."""
    for fields in (
        {},
        {"total_ms": None},
        {"idle_ms": 0},
        {"total_ms": -1},
        {"idle_ms": 0.5},
        {"idle": 5},
        {"idle_ms": 10**31},
    ):
        with pytest.raises(ValidationError):
            NodeTimeout(**fields)
    for bad in (0, -1):
        with pytest.raises(ValidationError, match="slow"):
            RunConfig(node_timeouts={"slow": bad})
    with pytest.raises(ValidationError, match=r"NodeTimeout has no limit; pass total_ms or idle_ms"):
        RunConfig(node_timeouts={"a": NodeTimeout()})
    limits = {"a": NodeTimeout(total_ms=5), "b": 7}
    assert RunConfig(node_timeouts=limits).node_timeouts == limits
