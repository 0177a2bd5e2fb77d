"""What a new run has that is made of what another one committed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.checkpoint.one_store import (
    COMMITS,
    EMPTY,
    SCHEMA,
    TABLES,
    State,
    Store,
    begin_run,
    row,
    sealed_row,
    store_fixture,
    stored,
)

from stroma.checkpoint import CheckpointNotFound, CorruptCheckpoint, RunExists
from stroma.checkpoint.durable.fork import fork_run
from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.durable.owner import new_owner
from stroma.checkpoint.durable.rows import Annotation, Opening, Step
from stroma.checkpoint.entries import PriorUsage
from stroma.checkpoint.payloads import Payloads
from stroma.checkpoint.records import AttemptRecord, stored_values

store = store_fixture()


def forked(
    store: Store, before: int, *, to: str = "f", source: str = "r", n: int | None = None, edited: Any = None
) -> None:
    sha = b"" if n is None else checksum(stored(n))
    value = ("", b"") if n is None else ("another", stored(n))
    opening = Opening(to, "", str(new_owner(None, ends=False)), 0.0, *value, sha, None)
    store.do(lambda rows: fork_run(rows, Payloads(), source, opening, before, edited))


def of_fork(store: Store, run: int = 2) -> Any:
    return store.rows.steps(run, 1), [tried for tried, _ in store.rows.attempts(run, 1)]


async def test_a_fork_has_what_was_committed_before(store: Store) -> None:
    """Each with an attempt that cost nothing; its parent and its input are those of the run, which stays as
    it is."""
    await begin_run(store)
    before = store.tables()
    forked(store, 2)
    steps, attempts = of_fork(store)
    assert sorted(steps) == sorted(one for one in store.rows.steps(1, 1) if one.position < 2)
    assert {(one.position, one.branch) for one in steps} == {(0, ""), (1, "0"), (1, "1"), (1, "")}
    assert sorted(stored_values(replace(one, started_ns=0)) for one in attempts) == sorted(
        stored_values(AttemptRecord(one.position, 0, one.branch, 1, "node", 0, "forked")) for one in steps
    )
    assert sorted(one.started_ns for one in attempts) == [0, 1, 2, 3]
    assert store.table("inputs")[1] == (2, 1, *before["inputs"][0][2:])
    result = store.rows.find("f")
    assert result is not None
    assert result[1:11] == (
        "f",
        "pipeline",
        1,
        "INTERRUPTED",
        "forked from run 'r' before position 2",
        1000,
        1000,
        0,
        0,
        0,
    )
    assert (result.epoch, result.left_seconds, result.nodes) == (1, -1.0, 2)
    assert store.rows.annotations(2, Annotation.PARENT) == [
        sealed_row(Annotation.PARENT, "", "r", Step("", "", b"", b"", 2))
    ]
    for name in TABLES:
        assert store.table(name)[: len(before[name])] == before[name] or name == "steps"
    assert [one for one in store.table("steps") if one[1] == 1] == before["steps"]


@pytest.mark.parametrize(("before", "places"), [(0, []), (1, [(0, "")]), (3, list(COMMITS))])
async def test_where_a_run_is_forked(store: Store, before: int, places: list[Any]) -> None:
    await begin_run(store)
    forked(store, before)
    assert {(one.position, one.branch) for one in store.rows.steps(2, 1)} == set(places)
    session = store.open("f", if_exists="resume")
    assert session.restored == {at: COMMITS[at] for at in places}
    assert session.prior == PriorUsage()


async def test_a_fork_with_an_output_of_its_own(store: Store) -> None:
    """It stands in for the last of what was before, and for nothing else; it is filed where that was."""
    await begin_run(store)
    edited = Step("its own", "m:Q", b"[]", b"", 1, b"g")
    forked(store, 2, edited=edited)
    entries = {(one.position, one.branch): one.step for one in store.rows.steps(1, 1)}
    outputs = {(one.position, one.branch): one.step for one in store.rows.steps(2, 1)}
    last = (1, "")
    assert outputs[last] == sealed_row(*last, "node", edited._replace(contract=entries[last].contract)).step
    assert {at: one for at, one in outputs.items() if at != last} == {
        at: one for at, one in entries.items() if at[0] < 2 and at != last
    }


async def test_a_fork_with_an_input_of_its_own(store: Store) -> None:
    await begin_run(store)
    forked(store, 1, n=9)
    assert store.table("inputs")[1] == (2, 1, "another", stored(9), checksum(stored(9)))


async def test_what_cannot_be_forked(store: Store) -> None:
    """No run that is not there or has nothing, at no place before which nothing is committed, and not into
    another run."""
    await begin_run(store)
    store.rows.annotate("saved", Annotation.SAVED, "n", "n", EMPTY)
    before = store.tables()
    for source in ("nobody", "saved"):
        with pytest.raises(CheckpointNotFound) as caught:
            forked(store, 0, source=source)
        assert str(caught.value) == f"there is no run {source!r} to fork; check the id and the store"
    with pytest.raises(CheckpointNotFound) as caught:
        forked(store, 4)
    assert str(caught.value) == (
        "run 'r' has no output at position 3, so it cannot be forked before position 4; fork at an earlier "
        "node"
    )
    with pytest.raises(RunExists) as exists:
        forked(store, 1, to="r")
    assert str(exists.value) == "run 'r' already exists; use another id for the fork"
    assert store.tables() == before
    # A group of which only children are committed has no output.
    store.db.execute("DELETE FROM steps WHERE position = 1 AND branch = ''")
    with pytest.raises(CheckpointNotFound):
        forked(store, 2)


async def test_a_damaged_output_is_not_forked(store: Store) -> None:
    """Unless it is behind the place of the fork."""
    await begin_run(store)
    store.db.execute("UPDATE steps SET output = x'00' WHERE position = 1 AND branch = '0'")
    with pytest.raises(CorruptCheckpoint) as caught:
        forked(store, 2)
    assert str(caught.value) == (
        "the output of node 'node' at position 1 of run 'r' is damaged; resume from the outermost group "
        "around it (resume_from='group') to recompute it"
    )
    assert store.rows.find("f") is None
    forked(store, 1)
    assert len(store.rows.steps(2, 1)) == 1


async def test_a_fork_takes_an_id_under_which_states_were_saved(store: Store) -> None:
    await begin_run(store)
    store.rows.annotate("f", Annotation.SAVED, "n", "n", EMPTY)
    forked(store, 1)
    result = store.rows.find("f")
    assert result is not None
    assert (result.run, result.execution, result.nodes) == (2, 1, 1)
    assert len(store.rows.annotations(2, Annotation.SAVED)) == 1


async def test_the_last_execution_is_forked(store: Store) -> None:
    await begin_run(store)
    session = store.open(n=5, if_exists="restart")
    await session.record(row(0, 99), SCHEMA, State(n=50))
    with pytest.raises(CheckpointNotFound):
        forked(store, 2)
    forked(store, 1)
    assert [one.step.output for one in store.rows.steps(2, 1)] == [stored(50)]
    assert store.table("inputs")[2][3] == stored(5)
