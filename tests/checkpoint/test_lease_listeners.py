"""Listeners of renewed leases, and runs that are reopened, over every durable store."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import World
from tests.kit import NEVER, Num, node
from tests.shared_stores import SHARED, opened

from stroma import CheckpointNotFound, Pipeline, RunStatus, StromaRunner

store = store_fixture(*SHARED)


async def test_a_listener_hears_of_each_renewed_lease(store: Any) -> None:
    """A listener gets a run's id at each renewal of its lease, while its event loop is blocked too."""
    heard: list[str] = []

    async def block(state: Num) -> Num:
        time.sleep(1.0)
        return state

    store.lease_listeners.append(heard.append)
    runner = StromaRunner.quick(store=store, lease_seconds=0.3)
    await runner.run([node("a", block)], Num(), run_id="r")
    assert heard
    assert set(heard) == {"r"}


async def test_a_run_that_lost_its_lease_is_not_heard_of(journal: tuple[str, str]) -> None:
    """A lease that another owner has taken over is not renewed, and no listener is called."""
    heard: list[str] = []
    reached, gate = asyncio.Event(), asyncio.Event()

    async def wait(state: Num) -> Num:
        reached.set()
        await gate.wait()
        return state

    kind, where = journal
    with opened(kind, where) as mine, opened(kind, where) as others:
        runner = StromaRunner.quick(store=mine, lease_seconds=0.3, policy_map=NEVER)
        running = asyncio.ensure_future(runner.run([node("a", wait)], Num(), run_id="r"))
        await reached.wait()
        other = StromaRunner.quick(store=others, lease_seconds=60.0, if_running="take_over", resume=True)
        taken = asyncio.ensure_future(other.run([node("a", wait)], Num(), run_id="r"))
        while mine.get_run("r").epoch < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # A renewal under way ends.
        mine.lease_listeners.append(heard.append)
        await asyncio.sleep(0.5)  # Several renewals.
        gate.set()
        await asyncio.gather(running, taken)
    assert heard == []


@pytest.mark.parametrize("end", ["failed", "cancelled", "paused"])
async def test_a_run_that_is_reopened(store: Any, end: str) -> None:
    """A run that failed, was cancelled or paused is due once reopened, and calls no committed node again."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    world.failing.add("b")
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    await runner.run(pipeline, Num(), run_id="r")
    if end == "cancelled":
        assert await runner.cancel("r")
    if end == "paused":
        assert await store.reopen("r")
        assert await runner.pause("r")
    world.failing.clear()
    assert await store.reopen("r")
    assert store.get_run("r").due_ms is not None
    outcome = await runner.drive("r", pipelines=[pipeline])
    assert outcome.status == RunStatus.RESUMED
    assert world.calls == ["a 0", "b 1", "b 1"]
    assert not await store.reopen("r")
    with pytest.raises(CheckpointNotFound):
        await store.reopen("unknown")
