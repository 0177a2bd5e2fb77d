"""What the journal in memory keeps of outputs that it cannot take from their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel
from tests.kit import Item
from tests.shared_stores import IN_PROCESS
from tests.store_suite.journal import State, begin, row, settled

from stroma import AsyncInMemoryStore, InMemoryStore, SQLiteStore, StromaRunner, current_node, map_over
from stroma.contracts.schema import schema_of


class Numbers(BaseModel):
    numbers: list[int] = [1, 2]


async def test_an_output_belongs_to_the_attempt_that_committed_it() -> None:
    """Also where its row holds a picture for people only: a discarded attempt has no output."""
    store, schema = AsyncInMemoryStore(), schema_of(State)
    session = await begin(store)
    first = row(0, tokens=3, output={"a picture": "for people"})
    await settled(session.record(first, schema, State(n=1)))
    (entry,) = store.attempts("run")
    assert (entry.tokens, entry.output) == (3, schema.encode(State(n=1)))
    await settled(session.end("INTERRUPTED", None))

    session = await begin(store, if_exists="resume", discard_from=0)
    again = row(0, tokens=4, output={"a picture": "for people"})
    await settled(session.record(again, schema, State(n=2)))
    records = [(one.tokens, one.output) for one in store.attempts("run")]
    assert records == [(3, None), (4, schema.encode(State(n=2)))]


async def test_a_row_of_another_schema_is_not_read_by_its_own() -> None:
    """What is loaded is what was committed, whatever reads the row's pictures."""
    store, schema = AsyncInMemoryStore(), schema_of(State)
    session = await begin(store)
    odd = row(0, output=("x", 1, 0.5, b""), schema=schema)._replace(
        schemas=None, children=None, function_ns=0
    )
    await settled(session.record(odd, schema, State(n=7)))
    assert store.attempts("run")[0].output == schema.encode(State(n=7))
    assert await store.load("run", "node") == State(n=7)


@pytest.mark.core
@pytest.mark.parametrize("store", IN_PROCESS)
async def test_an_attempt_whose_place_is_committed_again_stays(store: str, tmp_path: Path) -> None:
    """A failed item that is run again, and the map around it: earlier attempts are shown, without output."""
    entry = AsyncInMemoryStore() if store == "memory" else SQLiteStore(tmp_path / "runs.db")
    runner, broken = StromaRunner.quick(store=entry), [True]

    @runner.node("half", input=Item, output=Item)
    async def half(state: Item) -> Item:
        if broken and state.n == 2:
            raise PermissionError("not this one")
        return state

    halves = map_over("numbers", half, into="halves", on_item_failure="collect")
    await runner.run([halves], Numbers(), run_id="run")
    broken.clear()
    await runner.run([halves], Numbers(), run_id="run", resume=True, retry_failed_items=True)
    events = sorted((a.branch, a.started_ns, a.outcome, a.output is not None) for a in entry.attempts("run"))
    assert [(branch, outcome) for branch, _, outcome, _ in events] == [
        ("", "success"),
        ("", "success"),
        ("0", "success"),
        ("1", "failure"),
        ("1", "failure"),
        ("1", "success"),
    ]
    assert [has for *_, has in events] == [False, True, True, False, False, True]


@pytest.mark.parametrize("store", ["default", "async", "sync", "sqlite"])
async def test_a_suspension_in_memory_is_a_warning(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first run suspended in memory is named with the store to pass; a durable store warns of nothing."""
    stores = {
        "default": None,
        "async": AsyncInMemoryStore(),
        "sync": InMemoryStore(),
        "sqlite": SQLiteStore(tmp_path / "x.db"),
    }
    runner = StromaRunner.quick(store=stores[store])

    @runner.node("asks", input=Item, output=Item)
    async def asks(state: Item) -> Item:
        return current_node().wait_for(Item, reason="how many?")

    for run_id in ("a", "b"):
        result = await runner.run([asks], Item(n=1), run_id=run_id)
        assert result.status == "SUSPENDED"
    texts = [one.getMessage() for one in caplog.records if "in memory" in one.getMessage()]
    expected = (
        "run 'a' is suspended in memory, and is lost when this process ends; pass a durable store, as "
        'in store="sqlite:///runs.db"'
    )
    assert texts == ([] if store == "sqlite" else [expected])
    await runner.aclose()
