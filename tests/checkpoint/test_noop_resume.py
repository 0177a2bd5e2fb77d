"""Resuming a run that has nothing left to do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.kit import Num
from tests.shared_stores import STORES, store_of

from stroma import NodeHooks, StromaRunner, parallel, stroma_node


def node(node_id: str, calls: list[str]) -> Any:
    @stroma_node(node_id, input=Num, output=Num)
    async def call(state: Num) -> Any:
        calls.append(node_id)
        return {"n": state.n + 1}, 10

    return call


@pytest.mark.parametrize("kind", STORES)
async def test_nothing_of_the_run_changes(kind: str) -> None:
    """A resume that finds every node committed is RESUMED, calls nothing, and leaves the record as it was."""
    with store_of(kind) as store:
        calls: list[str] = []
        skipped: list[str] = []

        async def skip(run_id: str, node_id: str, output: Any) -> None:
            skipped.append(node_id)

        nodes = [node("a", calls), parallel(node("b", calls), node("c", calls)), node("d", calls)]
        runner = StromaRunner.quick(store=store, hooks=NodeHooks(on_node_skipped=skip))
        first = await runner.run(nodes, Num(), run_id="r")
        assert first.status == "COMPLETED"
        before = store.get_run("r")
        await asyncio.sleep(0.01)
        for _ in range(2):
            again = await runner.run(nodes, Num(), run_id="r", resume=True)
            assert (again.status, again.final_state, again.total_tokens) == ("RESUMED", first.final_state, 0)
        after = store.get_run("r")
        assert after == before
        assert len(calls) == 4
        assert skipped.count("a") == skipped.count("d") == 2
        # A node more is something to do.
        longer = await runner.run([*nodes, node("e", calls)], Num(), run_id="r", resume=True)
        assert (longer.status, calls[-1], len(calls)) == ("RESUMED", "e", 5)
        assert store.get_run("r").status == "RESUMED"
