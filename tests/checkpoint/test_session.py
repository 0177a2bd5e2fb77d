"""What a session of a durable store knows when it begins to work on a run, and whom it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.checkpoint.one_store import (
    COMMITS,
    EMPTY,
    PRIOR,
    SCHEMA,
    State,
    Store,
    attempt,
    begin_run,
    lose,
    row,
    sealed_row,
    store_fixture,
    stored,
)

from stroma.checkpoint import CorruptCheckpoint, PipelineChanged, RunBusy, RunExists, StepCall
from stroma.checkpoint.durable.annotations import record_due_hooks
from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.durable.owner import LIVE_SESSIONS, Owner
from stroma.checkpoint.durable.rows import Annotation, Fence, RunEnd, Step
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import OF_MAP, Committed, Finished, PriorUsage, Tried, Waiting
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage
from stroma.trace.events import Failed

store = store_fixture()


# ---------------------------------------------------------------------- how it begins


async def test_a_session_of_a_new_run(store: Store) -> None:
    """It knows of nothing that was before it."""
    session = store.open(tags=("t",))
    assert (session.run_id, session.execution, session.continued, session.ended) == ("r", 1, False, False)
    assert (session.restored, session.prior, session.waiting) == ({}, PriorUsage(0, 0.0, 0.0), {})
    assert (session.finished, session.traceparent, session.undelivered, session.on_control) == (
        None,
        None,
        [],
        None,
    )
    assert session.fence == Fence(1, 1, 1, session.fence.owner, 30.0)
    assert LIVE_SESSIONS[Owner.read(session.fence.owner).token] is session
    assert store.table("inputs") == [(1, 1, SCHEMA.fingerprint, stored(0), checksum(stored(0)))]


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
        "force_resume=True, "
        "or stroma resume --force"
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


@pytest.mark.parametrize("if_exists", ["resume", "return", "attach"])
async def test_a_session_that_goes_on(store: Store, if_exists: Any) -> None:
    """It knows what was committed, used, waited for, and under which trace."""
    first = await begin_run(store)
    store.keep_beside()
    store.rows.delete_annotations(1, Annotation.REQUEST)
    history = store.table("attempts")
    session = store.open(if_exists=if_exists)
    assert (session.execution, session.continued, session.finished) == (1, True, None)
    assert session.fence == replace(first.fence, epoch=2, owner=session.fence.owner)
    assert session.restored == COMMITS
    assert session.prior == PRIOR
    assert session.traceparent == "at -5"
    assert session.waiting == {
        (0, ""): Waiting(0, "", "first", "why", "m:Q", None),
        (2, "0"): Waiting(2, "0", "second", "what", "", b"7"),
    }
    assert session.undelivered == []  # Nobody asked for them.
    assert store.annotations() == [
        (-7, "", "at -7"),
        (-6, "0:20:1:", "node"),
        (-6, "1:50:1:", "node"),
        (-5, "", "at -5"),
        (-4, "", "at -4"),
        (-2, "0:", "first"),
        (-2, "2:0", "second"),
        (-1, "", "at -1"),
    ]
    assert store.table("attempts") == history


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


async def test_a_session_that_begins_anew(store: Store) -> None:
    """What was kept for the execution before goes; what was saved, and the run's parent, stay."""
    await begin_run(store)
    store.keep_beside()
    for request in ({}, {"deliver": True}):
        session = store.open(n=1, if_exists="restart", **request)
        assert (session.continued, session.finished, session.traceparent) == (False, None, None)
        assert (session.restored, session.prior, session.waiting, session.undelivered) == (
            {},
            PriorUsage(),
            {},
            [],
        )
        assert store.annotations() == [(-4, "", "at -4"), (-1, "", "at -1")]
    assert session.execution == 3
    assert session.fence.epoch == 3
    assert [one[1] for one in store.table("inputs")] == [1, 2, 3]


@pytest.mark.parametrize("if_exists", ["resume", "restart"])
async def test_a_run_of_which_only_states_were_saved_begins(store: Store, if_exists: Any) -> None:
    store.rows.annotate("r", Annotation.SAVED, "n", "n", EMPTY)
    session = store.open(if_exists=if_exists)
    assert (session.execution, session.continued, session.restored) == (1, False, {})
    assert store.annotations() == [(-1, "n", "n")]


@pytest.mark.parametrize("status", ["COMPLETED", "RESUMED"])
async def test_a_run_that_has_finished_is_returned_as_it_is(store: Store, status: str) -> None:
    """Nothing of it changes; its session holds nothing and ends nothing."""
    await begin_run(store)
    fence = store.rows.find("r")
    assert fence is not None
    store.rows.finish(Fence(1, 1, 1, str(fence.owner), 30.0), RunEnd(status, "said"))
    store.keep_beside()
    before = store.tables()
    session = store.open(if_exists="return", deliver=True)
    assert store.tables() == before
    assert session.finished == Finished(status, "said")
    assert session.fence == Fence(1, 1, 1, "", 0.0)
    assert (session.execution, session.continued) == (1, False)
    assert session.restored == COMMITS
    assert session.prior == PRIOR
    assert session.traceparent == "at -5"
    assert list(session.waiting) == [(0, ""), (2, "0")]
    assert session.undelivered == []
    assert session.end("COMPLETED", None) is None
    assert not session.ended
    assert store.tables() == before


@pytest.mark.parametrize(
    ("discard_from", "left", "waits"),
    [
        (0, [], []),
        (1, [(0, "")], [(0, "")]),
        (2, [(0, ""), (1, "0"), (1, "1"), (1, "")], [(0, "")]),
        (3, list(COMMITS), [(0, ""), (2, "0")]),
    ],
)
async def test_a_session_that_goes_on_from_an_earlier_position(
    store: Store, discard_from: int, left: list[Any], waits: list[Any]
) -> None:
    """What was committed or waited for from there on is forgotten; what was used counts all the same."""
    await begin_run(store)
    store.keep_beside()
    store.rows.delete_annotations(1, Annotation.REQUEST)
    # It goes on with another input, and with damage to what is forgotten.
    store.db.execute("UPDATE steps SET output = x'00' WHERE position >= ? AND position >= 0", (discard_from,))
    session = store.open(n=7, if_exists="resume", discard_from=discard_from)
    assert session.restored == {at: COMMITS[at] for at in left}
    assert session.prior == PRIOR
    assert session.continued
    assert list(session.waiting) == waits
    assert {(one.position, one.branch) for one in store.rows.steps(1, 1)} == set(left)
    assert [one.branch for one in store.rows.annotations(1, Annotation.WAITING)] == [
        f"{at}:{branch}" for at, branch in waits
    ]


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


async def test_commits_that_are_apart_are_not_restored(store: Store) -> None:
    """They stay where they are, and committed() gives them."""
    await begin_run(store)
    session = store.open(if_exists="resume", lazily_loaded=((1, ""),))
    assert session.restored == {at: COMMITS[at] for at in ((0, ""), (1, ""), (2, ""))}
    assert await session.committed(1, ["0", "1", "2"]) == {"0": COMMITS[1, "0"], "1": COMMITS[1, "1"]}
    assert await session.committed(1, ["1"]) == {"1": COMMITS[1, "1"]}
    assert await session.committed(2, ["0"]) == {}


async def test_items_that_failed_are_made_again(store: Store) -> None:
    """With them goes the group around them, and all that was made of it."""
    session = store.open()
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, "0"), SCHEMA, State(n=2))
    await session.record(row(1, 19), SCHEMA, State(n=3), StepCall(1, OF_MAP + b"2"))
    await session.record(row(2, 30), SCHEMA, State(n=4))
    lose(session)
    seen: list[Any] = []
    again = store.open(if_exists="resume", retry_failed=True, accept=lambda *report: seen.append(report))
    assert set(again.restored) == {(0, ""), (1, "0")}
    assert [report[:2] for report in seen] == [(0, ""), (1, "0")]
    assert {(one.position, one.branch) for one in store.rows.steps(1, 1)} == {(0, ""), (1, "0"), (1, "")}


async def test_who_refuses_what_would_be_restored_changes_nothing(store: Store) -> None:
    await begin_run(store)
    store.keep_beside()
    before = store.tables()
    seen: list[Any] = []

    def accept(position: int, branch: str, commit: Committed) -> None:
        seen.append((position, branch, commit))
        if len(seen) == len(COMMITS):
            raise PipelineChanged("no")

    with pytest.raises(PipelineChanged):
        store.open(if_exists="resume", accept=accept)
    assert {report[:2]: report[2] for report in seen} == COMMITS
    assert store.tables() == before


@pytest.mark.parametrize(("n", "what"), [(0, ""), (1, " with another input")])
async def test_a_run_that_is_held(store: Store, n: int, what: str) -> None:
    """The refusal tells who holds it and for how long, and changes nothing."""
    session = store.open(lease_seconds=3600.0)
    before = store.tables()
    with pytest.raises(RunBusy) as caught:
        store.open(n=n, if_exists="resume", if_running="error")
    place = Owner.read(session.fence.owner).place
    error = caught.value
    left = f"{error.left_seconds:.1f}"
    assert str(error) == (
        f"run 'r' is already running{what} in {place} (lease expires in {left} s); "
        'pass if_running="attach" to wait for its result, or use another run id'
    )
    assert error.holder == place
    assert 0 < error.left_seconds <= 3600.0
    assert error.same_input is (n == 0)
    assert store.tables() == before


async def test_a_run_that_must_not_be_there(store: Store) -> None:
    await begin_run(store)
    with pytest.raises(RunExists) as caught:
        store.open(if_exists="error")
    assert str(caught.value) == (
        "run 'r' already exists (execution 1, RUNNING); use another run id, or pass "
        'if_exists="resume", "return" or "restart"'
    )


async def test_another_input_is_refused(store: Store) -> None:
    await begin_run(store)
    with pytest.raises(PipelineChanged) as caught:
        store.open(n=1, if_exists="resume")
    assert str(caught.value) == (
        "run 'r' was started with another input (or State has changed); pass the same input, or use another "
        "run id"
    )


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
            "around it "
            "(resume_from='group') to recompute it",
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
