"""How long a group took: as recorded, as drawn, and as budgets count it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.kit import Note as Item
from tests.shared_stores import STORES, store_of

from stroma import FailurePolicy, StromaRunner, current_node, parallel
from stroma.testing import FakeClock

WAIT, WORK = 0.3, 0.05


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


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Any]:
    with store_of(request.param) as instance:
        yield instance


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
