"""Small promises of the SQLite store that a small change of the source would break silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.kit import Item

from stroma import SQLiteStore, StromaRunner, stroma_node
from stroma.checkpoint.durable.rows import Annotation


class Items(BaseModel):
    numbers: list[int]


@stroma_node("square", input=Item, output=Item)
async def square(state: Item) -> tuple[dict[str, int], int, int, str]:
    return {"n": state.n**2}, 3, 1, "gpt-4o-mini"


async def test_what_stands_beside_a_run_is_at_no_position_of_it(tmp_path: Path) -> None:
    """The trace context, the parent of a fork, marks of cancellation and the like never meet a node."""
    outputs: list[str] = []

    def step(name: str) -> Any:
        @stroma_node(name, input=Item, output=Item)
        async def add(state: Item) -> dict[str, int]:
            outputs.append(name)
            return {"n": state.n + 1}

        return add

    nodes = [step(f"step {number}") for number in range(12)]
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = StromaRunner.quick(store=store)
        result = await runner.run(nodes, Item(n=0), run_id="long", traceparent=parent)
        again = await runner.run(nodes, Item(n=0), run_id="long", resume=True)
        forked = await runner.fork("long", nodes, at="step 8")
    assert [len(match) for match in (outputs, set(outputs))] == [16, 12]
    assert [one.final_state.n for one in (result, again, forked)] == [12, 12, 12]


def test_the_positions_of_what_stands_beside_a_run_differ() -> None:
    """They are below all positions of nodes and stay so: written files keep their meaning."""
    places = {annotation.name: annotation.value for annotation in Annotation}
    assert places == {
        "SAVED": -1,
        "WAITING": -2,
        "REQUEST": -3,
        "INPUT": -4,
        "DUE_HOOKS": -6,
        "FAILURE_SITE": -7,
        "DEATHS": -8,
        "NOTE": -9,
        "CONTROL": -10,
        "REJECTED": -11,
        "ATTRIBUTION": -12,
        "EFFECT": -13,
        "MESSAGE": -14,
    }
