"""Guarded runs that somebody pauses, or whose budget somebody changes."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fixtures import store_fixture

from stroma import ExecutionBudget, RunStatus, StromaRunner, Suspend, current_node
from stroma.adapters import Guard

store = store_fixture("async-memory", "sqlite")


def guard_of(store: Any) -> tuple[Guard, list[int], asyncio.Event, asyncio.Event]:
    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=10))
    return Guard(runner), [], asyncio.Event(), asyncio.Event()


async def test_the_next_step_of_a_paused_run_is_not_called(store: Any) -> None:
    """The step at work ends and is committed, the next one raises Suspend, and the run is SUSPENDED with reason "paused"."""
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
    assert guard.last is not None
    assert guard.last.result is not None
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
        node = current_node()
        node.report_usage(input_tokens=8)
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
