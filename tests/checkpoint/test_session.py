"""What a session of a durable store knows when it begins to work on a run, and whom it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from tests.checkpoint.one_store import (
    EMPTY,
    SCHEMA,
    State,
    Store,
    attempt,
    begin_run,
    lose,
    row,
    sealed_row,
    store_fixture,
)

from stroma.checkpoint import CorruptCheckpoint
from stroma.checkpoint.durable.annotations import record_due_hooks
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Annotation, Step
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import Finished, Tried
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage
from stroma.trace.events import Failed

store = store_fixture()


# ---------------------------------------------------------------------- how it begins


def killed(store: Store, session: DurableSession) -> None:
    """Leave a run as another process does that is killed."""
    owner = Owner.read(session.fence.owner)
    assert owner is not None
    store.db.execute("UPDATE runs SET lease_owner = ?", (str(owner._replace(pid=owner.pid + 1)),))
    lose(session)


async def test_a_run_whose_process_died_too_often(store: Store) -> None:
    """Its next session ends it as poison, and so does each one after that until one is forced."""
    error = (
        "poison: the process died 2 times under this run; see what kills it, then resume it with "
        "force_resume=True, or stroma resume --force"
    )
    request: dict[str, Any] = {"if_exists": "resume", "max_recoveries": 2}
    for _ in range(2):
        session = store.open(**request)
        assert session.finished is None
        killed(store, session)
    poisoned = store.open(**request)
    assert poisoned.finished == Finished("FAILED", error)
    await poisoned.end("FAILED", error)
    assert store.open(**request).finished == Finished("FAILED", error)
    assert store.open(**request, force=True).finished is None


async def test_deaths_before_an_orderly_end_do_not_count(store: Store) -> None:
    """A run that a process has ended in order is no poison, however often others died under it before."""
    request: dict[str, Any] = {"if_exists": "resume", "max_recoveries": 2}
    for _ in range(2):
        killed(store, store.open(**request | {"max_recoveries": 3}))
    await store.open(**request | {"max_recoveries": 3}).end("INTERRUPTED", None)
    assert store.open(**request).finished is None


async def test_what_a_process_that_died_had_tried(store: Store) -> None:
    """After a death a session knows how often each node had failed that is not committed, and how it failed
    last.

    What a group's children tried counts until the group itself is tried again.
    """
    failure = FailureClass.RECOVERABLE
    session = store.open()
    for place in (
        row(0, 10, failed=Failed(failure, "early", "why", "KeyError")),
        row(1, 20, failed=Failed(failure, "one", "contract", "KeyError")),
        row(1, 21, number=2, failed=Failed(FailureClass.AMBIGUOUS, "two", "why", "KeyError")),
        row(2, 30, "0", node="child", failed=Failed(failure, "child", None, "KeyError")),
        row(2, 33, node="group", failed=Failed(failure, "group", None, "KeyError")),
        row(2, 41, "1", node="child", failed=Failed(failure, "again", None, "KeyError")),
        row(3, 50, "1.0", node="inner", failed=Failed(failure, "inner", None, "KeyError")),
        row(3, 51, "10", node="other", failed=Failed(failure, "other", None, "KeyError")),
        row(3, 60, "1", node="group", failed=Failed(failure, "group", None, "KeyError")),
    ):
        await session.record(place, None, None)
    await session.record(row(0, 11, number=2), SCHEMA, State(n=10))
    killed(store, session)
    assert store.open(if_exists="resume").tried == {
        (1, ""): Tried(2, 1, "node", "AMBIGUOUS", "two", "why", "KeyError", 21),
        (2, ""): Tried(1, 0, "group", "RECOVERABLE", "group", None, "KeyError", 33),
        (2, "1"): Tried(1, 0, "child", "RECOVERABLE", "again", None, "KeyError", 41),
        (3, "10"): Tried(1, 0, "other", "RECOVERABLE", "other", None, "KeyError", 51),
        (3, "1"): Tried(1, 0, "group", "RECOVERABLE", "group", None, "KeyError", 60),
    }


async def test_end_hooks_that_may_not_have_been_told(store: Store) -> None:
    """A session that delivers has them, the oldest first; a damaged one stops the resume."""
    await begin_run(store)
    for number, started in enumerate((70, 50, 90)):
        record_due_hooks(
            store.rows,
            "r",
            attempt(
                number,
                started,
                "2",
                3,
                outcome="failure",
                failure_class="TERMINAL",
                message="m",
                error_type="KeyError",
            ),
        )
    store.rows.annotate("r", Annotation.DUE_HOOKS, "damaged", "node", Step("", "", b"{}", b"wrong"))
    with pytest.raises(CorruptCheckpoint, match="the due hooks 'damaged' of run 'r' is damaged"):
        store.open(if_exists="resume", deliver=True)
    store.rows.delete_annotations(1, Annotation.DUE_HOOKS, branch="damaged")
    session = store.open(if_exists="resume", deliver=True)
    failed = Failed(FailureClass.TERMINAL, "m", None, "KeyError")
    usage = AttemptUsage(5, 3, 0.25, "m")
    assert session.undelivered == [
        ("node", 3, started, 7, {}, None, "failure", failed, usage, position, "2", None, None, None, 7)
        for position, started in ((1, 50), (0, 70), (2, 90))
    ]
    assert len(store.rows.annotations(1, Annotation.DUE_HOOKS)) == 3  # Until they were told.


@pytest.mark.parametrize("if_exists", ["resume", "restart"])
async def test_a_run_of_which_only_states_were_saved_begins(store: Store, if_exists: Any) -> None:
    store.rows.annotate("r", Annotation.SAVED, "n", "n", EMPTY)
    session = store.open(if_exists=if_exists)
    assert (session.execution, session.continued, session.restored) == (1, False, {})
    assert store.annotations() == [(-1, "n", "n")]


@pytest.mark.parametrize("branch", ["1:", "x:"])
async def test_a_damaged_question_stops_a_resume(store: Store, branch: str) -> None:
    """A question or an answer that is damaged stops the resume of its run, which stays as it is."""
    await begin_run(store)
    store.keep_beside()
    step = (
        Step("", "", b"7", b"wrong", 1) if branch == "1:" else sealed_row(Annotation.WAITING, "x:", "n").step
    )
    store.rows.annotate("r", Annotation.WAITING, branch, "n", step)
    before = store.tables()
    with pytest.raises(CorruptCheckpoint, match=f"the waiting '{branch}' of run 'r' is damaged"):
        store.open(if_exists="resume")
    assert store.tables() == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "position = 0",
            "the output of node 'node' at position 0 of run 'r' is damaged; resume from that node "
            "(resume_from='node') to recompute it",
        ),
        (
            "position = 1 AND branch = '1'",
            "the output of node 'node' at position 1 of run 'r' is damaged; resume from the outermost group "
            "around it (resume_from='group') to recompute it",
        ),
    ],
)
async def test_a_damaged_commit_is_told_with_its_place(store: Store, place: str, message: str) -> None:
    """By who goes on, and by who asks for it."""
    session = await begin_run(store)
    store.db.execute(f"UPDATE steps SET output = x'00' WHERE {place}")
    position, branch = store.db.execute(f"SELECT position, branch FROM steps WHERE {place}").fetchone()
    with pytest.raises(CorruptCheckpoint) as caught:
        store.open(if_exists="resume")
    assert str(caught.value) == message
    with pytest.raises(CorruptCheckpoint) as caught:
        await session.committed(position, [branch])
    assert str(caught.value) == message
