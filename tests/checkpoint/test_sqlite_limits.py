"""Small promises of the SQLite store, each of which a small change of the source would break without a
sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Item

from stroma import NodeContract, Pipeline, SQLiteStore, StromaRunner, map_over, stroma_node
from stroma.checkpoint.durable.owner import new_owner
from stroma.checkpoint.durable.rows import Annotation
from stroma.checkpoint.sqlite import rows as _sqlite_rows
from stroma.checkpoint.sqlite.rows import SqliteRows


class Items(BaseModel):
    numbers: list[int]


@stroma_node("square", NodeContract(node_id="square", input_schema=Item, output_schema=Item))
async def square(state: Item) -> tuple[dict[str, int], int, int, str]:
    return {"n": state.n**2}, 3, 1, "gpt-4o-mini"


async def test_commits_that_wait_together_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many commits at once go in three statements, at the first try; all of them are there, with their
    tokens."""
    real, tries = SqliteRows.commit_all, []

    def watched(rows: SqliteRows, commits: Any) -> bool:
        tries.append(None)
        tries[-1] = real(rows, commits), len(commits)  # type: ignore[call-overload]
        return bool(tries[-1][0])

    monkeypatch.setattr(SqliteRows, "commit_all", watched)
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = StromaRunner.quick(store=store)
        pipeline = Pipeline("squares", [map_over("numbers", square, into="squares")])
        result = await runner.run(pipeline, Items(numbers=list(range(300))), run_id="many")
        assert result.total_tokens == 1200
        record = store.get_run("many")
        again = await runner.run(pipeline, Items(numbers=list(range(300))), run_id="many", resume=True)
    assert tries
    assert {match[0] if match else None for match in tries} == {True}
    assert record.tokens == 1200
    assert [item.n for item in again.final_state.squares] == [n**2 for n in range(300)]  # type: ignore[union-attr]


async def test_what_stands_beside_a_run_is_at_no_position_of_it(tmp_path: Path) -> None:
    """The trace context, the parent of a fork, marks of cancellation and the like never meet a node, however
    many there are."""
    outputs: list[str] = []

    def step(name: str) -> Any:
        @stroma_node(name, NodeContract(node_id=name, input_schema=Item, output_schema=Item))
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
    assert [one.final_state.n for one in (result, again, forked)] == [12, 12, 12]  # type: ignore[union-attr]


def test_a_lease_is_good_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a lease is told in seconds, to the millisecond; one of another start of the machine has
    expired."""
    monkeypatch.setattr(_sqlite_rows, "_clock_ms", lambda: 1_000_000)
    until = _sqlite_rows._lease_end(30)
    assert until == 1_030_000
    owner = new_owner(None, ends=False)
    assert _sqlite_rows._seconds_left(str(owner), until) == (
        30.0 if owner.boot == _sqlite_rows._BOOT else -1.0
    )
    assert _sqlite_rows._seconds_left(str(owner._replace(boot="another start")), until) == -1.0
    assert _sqlite_rows._seconds_left(str(owner), None) == -1.0
    assert _sqlite_rows._seconds_left(None, until) == -1.0
    assert _sqlite_rows._seconds_left("nobody", until) == -1.0


def test_the_positions_of_what_stands_beside_a_run_differ() -> None:
    """They are below all positions of nodes, and stay what they are: files that were written keep their
    meaning."""
    places = {annotation.name: annotation.value for annotation in Annotation}
    assert places == {
        "SAVED": -1,
        "WAITING": -2,
        "REQUEST": -3,
        "PARENT": -4,
        "TRACE": -5,
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
