"""Rows of a SQLite store: changed bytes, refused operations and exact costs."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.kit import Num, node, quick

from stroma import CorruptCheckpoint, SQLiteStore
from stroma.checkpoint import Fenced, RunRequest
from stroma.contracts.schema import schema_of
from stroma.cost import KNOWN_MODELS
from stroma.trace.events import AttemptRow


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(tmp_path / "runs.db") as instance:
        yield instance


@pytest.mark.core
async def test_bytes_that_changed_are_never_handed_out(store: SQLiteStore) -> None:
    """An output whose bytes still make sense, but are not those that were committed, is damaged."""

    async def func(state: Num) -> Any:
        return {"n": 1}

    await quick(store=store, run_id="r").run([node("a", func)], Num())
    with closing(sqlite3.connect(store.path)) as db, db:
        other = "CAST(replace(CAST(output AS TEXT), '1', '7') AS BLOB)"
        changed = db.execute(f"UPDATE steps SET output = {other} WHERE position = 0")
        assert changed.rowcount == 1
        assert db.execute("SELECT typeof(output) FROM steps WHERE position = 0").fetchone() == ("blob",)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await store.load_typed("r", "a", Num)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await quick(store=store, run_id="r", resume=True).run([node("a", func)], Num())


@pytest.mark.core
async def test_a_refused_operation_leaves_nothing_behind(store: SQLiteStore) -> None:
    """What a stale session wrote beside another run's commits is not there, in its own execution either."""
    request = RunRequest("stale", "pipeline", Num(), schema_of(Num))
    stale = await store.open_run(request)
    await store.open_run(request._replace(if_exists="restart", if_running="take_over"))
    good = await store.open_run(request._replace(run_id="good"))

    def row(position: int) -> AttemptRow:
        return AttemptRow(
            "a", 1, 10**18 + position, 5, (0,), (1,), "success", None, None, position, "", None, None, None, 5
        )

    pending = [(stale if i % 2 else good).record(row(i), schema_of(Num), Num(n=i), None) for i in range(6)]
    errors = await asyncio.gather(*pending, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None), Fenced] * 3
    assert [a.position for a in store.attempts("good")] == [0, 2, 4]
    assert store.attempts("stale", execution=1) == store.attempts("stale") == []


@pytest.mark.core
async def test_the_smallest_costs_are_exact(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may cost less than a millionth of a dollar: a run's cost in the store is still the sum."""
    monkeypatch.setitem(KNOWN_MODELS, "a-model-of-ours", (0.15, 0.6))

    async def func(state: Num) -> Any:
        return {"n": state.n + 1}, 1, 1, "a-model-of-ours"

    await quick(store=store, run_id="r").run([node("a", func)] * 10, Num())
    run = store.get_run("r")
    assert run.cost_usd == 0.000_007_5
    assert [attempt.cost_usd for attempt in store.attempts("r")] == [0.000_000_75] * 10
