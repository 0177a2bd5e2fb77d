"""Small promises of the SQLite store, each of which a small change of the source would break without a sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stroma import NodeContract, Pipeline, SQLiteStore, StromaRunner, map_over, stroma_node
from stroma.checkpoint._sqlite_rows import SqliteRows


class Item(BaseModel):
    n: int


class Items(BaseModel):
    numbers: list[int]


@stroma_node("square", NodeContract(node_id="square", input_schema=Item, output_schema=Item))
async def square(state: Item) -> tuple[dict[str, int], int, int, str]:
    return {"n": state.n**2}, 3, 1, "gpt-4o-mini"


async def test_commits_that_wait_together_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many commits at once go in three statements, at the first try; all of them are there, with their tokens."""
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
    assert {found[0] if found else None for found in tries} == {True}
    assert record.tokens == 1200
    assert [item.n for item in again.final_state.squares] == [n**2 for n in range(300)]  # type: ignore[union-attr]
