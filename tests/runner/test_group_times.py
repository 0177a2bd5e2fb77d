"""How long a group took: as recorded, as drawn, and as budgets count it."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import Note as Item
from tests.shared_stores import STORES

from stroma import FailurePolicy, NodeHooks, StromaRunner, current_node, map_over, parallel
from stroma.testing import FakeClock

WAIT, WORK = 0.3, 0.05


class Batch(BaseModel):
    items: list[Item] = [Item()]
    text: str = ""


def runner_of(store: Any = None, **config: Any) -> tuple[StromaRunner, Any]:
    policy: Any = {"RECOVERABLE": FailurePolicy(max_retries=1, backoff_seconds=WAIT, jitter=False)}
    runner = StromaRunner.quick(store=store, policy_map=policy, **config)

    @runner.node("a", input=Item, output=Item)
    async def a(state: Item) -> Any:
        await asyncio.sleep(WORK)
        node = current_node()
        if node.attempt == 1:
            raise TimeoutError("x")
        return state

    return runner, a


def shapes(a: Any) -> dict[str, Any]:
    return {
        "parallel": parallel(a),
        "map": map_over("items", a, into="out"),
        "nested": parallel(parallel(a)),
        "map of groups": map_over("items", parallel(a), into="out"),
    }


SHAPES = ["parallel", "map", "nested", "map of groups"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_groups_time_is_that_of_its_bar(shape: str) -> None:
    """A group is recorded from its first function's start to the last end, with the time functions ran."""
    seen: list[float] = []

    async def succeeded(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        node = current_node()
        if node.kind == "group" and not node.branch:
            assert node.duration_ms is not None
            seen.append(node.duration_ms)

    runner, a = runner_of(hooks=NodeHooks(on_node_success=succeeded))
    result = await runner.run([shapes(a)[shape]], Batch())
    bars = result.trace._story().bars  # To the nanosecond, as long as nobody has looked at the events.
    (group,) = result.trace
    assert group.function_ms is not None
    assert group.duration_ms >= 1000 * (WAIT + 2 * WORK) - 5
    # On a busy machine the functions take longer; the wait is in the group's time alone.
    assert 1000 * 2 * WORK - 5 <= group.function_ms < group.duration_ms - 1000 * WAIT / 2
    assert seen == [pytest.approx(group.duration_ms, abs=1.1)]
    outer = next(bar for bar in bars if bar.at == "0")
    inner = [bar for bar in bars if bar.at != "0"]
    assert outer.began_ms == pytest.approx(min(bar.began_ms for bar in inner), abs=0.01)
    assert outer.began_ms + outer.took_ms == pytest.approx(
        max(b.began_ms + b.took_ms for b in inner), abs=0.01
    )
    for leaf in (event for event in result.trace.walk() if event.node_id == "a"):
        assert leaf.function_ms == leaf.duration_ms


async def test_a_groups_time_to_the_millisecond() -> None:
    """By a clock of the test: waits between attempts are in the group's time, not a function's."""
    policy: Any = {"RECOVERABLE": FailurePolicy(max_retries=1, backoff_seconds=9, jitter=False)}
    with FakeClock():
        runner = StromaRunner.quick(policy_map=policy)

        @runner.node("a", input=Item, output=Item)
        async def a(state: Item) -> Any:
            await asyncio.sleep(0.1)
            node = current_node()
            if node.attempt == 1:
                raise TimeoutError("x")
            return state

        result = await runner.run([parallel(parallel(a), a, max_concurrency=1)], Item())
    (group,) = result.trace
    inner = group.children[0]
    assert (inner.duration_ms, inner.function_ms) == (9200, 200)
    assert (group.duration_ms, group.function_ms) == (18_400, 400)


async def test_a_group_that_failed_or_was_cancelled_has_its_time_too() -> None:
    """Also where it ended without an output."""
    runner, a = runner_of()

    @runner.node("bad", input=Item, output=Item)
    async def bad(state: Item) -> Any:
        await asyncio.sleep(2 * WORK + WAIT / 2)
        raise LookupError

    result = await runner.run([parallel(a, bad)], Item(), run_id="failed")
    group = next(iter(result.trace))
    assert group.outcome == "failure"
    assert group.duration_ms >= max(child.duration_ms for child in group.children)
    task = asyncio.ensure_future(runner.run([parallel(bad)], Item()))
    await asyncio.sleep(WORK)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


store = store_fixture(*STORES)


@pytest.mark.slow
async def test_stores_have_both_times_and_count_that_of_functions(store: Any) -> None:
    """Every store has a group's wall time and the time its functions ran; a run's latency is the latter."""
    runner, a = runner_of(store)
    result = await runner.run([parallel(a)], Item(), run_id="r")
    (group,) = result.trace
    attempts = await asyncio.to_thread(store.attempts_at, "r", 0, "")
    (entry,) = attempts
    assert int(entry.duration_ms) == group.duration_ms
    assert int(entry.function_ms) == group.function_ms
    assert (entry.group_id, entry.branch) == (None, "")
    inner = await asyncio.to_thread(store.attempts_at, "r", 0, "0")
    assert [one.group_id for one in inner] == ["parallel(a)"] * 2
    assert [one.function_ms for one in inner] == [one.duration_ms for one in inner]
    record = await asyncio.to_thread(store.get_run, "r")
    assert record.latency_ms == pytest.approx(entry.function_ms, abs=0.01)
