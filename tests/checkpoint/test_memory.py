"""What the journal in memory keeps of outputs that it cannot take from their rows."""

from __future__ import annotations

from stroma import AsyncInMemoryStore
from stroma.schemas import schema_of
from stroma.testing.stores import State, begin, row, settled


async def test_an_output_belongs_to_the_attempt_that_committed_it() -> None:
    """Also where its row holds a picture for people only: an attempt that was discarded has no output any more."""
    store, schema = AsyncInMemoryStore(), schema_of(State)
    session = await begin(store)
    first = row(0, tokens=3, output={"a picture": "for people"})
    await settled(session.record(first, schema, State(n=1)))
    (kept,) = store.attempts("run")
    assert (kept.tokens, kept.output) == (3, schema.encode(State(n=1)))
    await settled(session.end("INTERRUPTED", None))

    session = await begin(store, if_exists="resume", discard_from=0)
    again = row(0, tokens=4, output={"a picture": "for people"})
    await settled(session.record(again, schema, State(n=2)))
    assert [(one.tokens, one.output) for one in store.attempts("run")] == [
        (3, None),
        (4, schema.encode(State(n=2))),
    ]


async def test_a_row_of_another_schema_is_not_read_by_its_own() -> None:
    """What is loaded is what was committed, whatever reads the row's pictures."""
    store, schema = AsyncInMemoryStore(), schema_of(State)
    session = await begin(store)
    odd = (*row(0, output=("x", 1, 0.5, b""), schema=schema)[:12], None, None)
    await settled(session.record(odd, schema, State(n=7)))
    assert store.attempts("run")[0].output == schema.encode(State(n=7))
    assert await store.load("run", "node") == State(n=7)
