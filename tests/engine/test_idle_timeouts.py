"""Idle time limits of nodes, which each emitted event renews."""

import asyncio
import threading
from typing import Any

import pytest
from pydantic import ValidationError
from tests.kit import NEVER, ONCE, Num, node, quick, sleep_forever

from stroma import NodeTimeout, RunConfig, RunStatus, current_node, parallel
from stroma.testing import FakeClock


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
