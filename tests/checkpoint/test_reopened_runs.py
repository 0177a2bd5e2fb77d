"""Runs that are reopened, over every durable store."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import World
from tests.kit import NEVER, Num
from tests.shared_stores import SHARED

from stroma import CheckpointNotFound, Pipeline, RunStatus, StromaRunner

store = store_fixture(*SHARED)


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
