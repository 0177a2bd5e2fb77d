"""The queue of runs: submitting, claiming, and which run comes next; over every store."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures import store_fixture
from tests.kit import Num
from tests.shared_stores import ON_SERVERS, STORES, opened, place
from tests.store_suite.helpers import finish, settled
from tests.tiers import examples

from stroma import CheckpointNotFound, RunExists, SQLiteStore
from stroma.checkpoint.entries import RunRequest, SentMessage
from stroma.checkpoint.history.facts import facts_of
from stroma.checkpoint.queue import (
    Candidate,
    ClaimRequest,
    QueueEntry,
    QueueFigures,
    RunLimits,
    ServedCode,
    choose,
)
from stroma.contracts.schema import schema_of

store = store_fixture(*STORES)

NOW = 1_800_000_000_000


def request_of(run_id: str, n: int = 0, pipeline: str = "p", **fields: Any) -> RunRequest:
    return RunRequest(run_id, pipeline, Num(n=n), schema_of(Num), **fields)


async def submit(store: Any, run_id: str, *, n: int = 0, pipeline: str = "p", **entry: Any) -> bool:
    is_new: bool = await store.submit(request_of(run_id, n, pipeline), QueueEntry(**{"due_ms": NOW, **entry}))
    return is_new


async def claim(
    store: Any,
    limit: int = 10,
    *,
    now_ms: int = NOW,
    token: str = "t",
    seconds: float = 30.0,
    **pipelines: RunLimits,
) -> list[str]:
    """Return the ids of the runs that a worker gets."""
    claimed = await store.claim(ClaimRequest(token, seconds, limit, now_ms, pipelines or {"p": RunLimits()}))
    return [one.run_id for one in claimed]


async def open_claimed(store: Any, run_id: str, token: str = "t", **fields: Any) -> Any:
    request = request_of(run_id, if_exists="resume", due_ms=NOW, claim=token, **fields)
    return await settled(store.open_run(request))


async def test_a_submitted_run_is_queued(store: Any) -> None:
    """A submitted run is stored as QUEUED, is due from its time on, and has no owner."""
    assert await submit(store, "r", due_ms=NOW + 5)
    record = store.get_run("r")
    assert (record.status, record.pipeline, record.holder, record.due_ms) == ("QUEUED", "p", None, NOW + 5)
    assert store.statuses(["r", "other"]) == {"r": "QUEUED"}
    assert await claim(store) == []
    assert await claim(store, now_ms=NOW + 5) == ["r"]


async def test_a_record_has_the_place_in_the_queue(store: Any) -> None:
    """The record of a submitted run has its priority, key and latest start, also once it has started."""
    await submit(store, "r", priority=-3, key="k", expires_ms=NOW + 9)
    await submit(store, "plain")
    for record, expected in (
        (store.get_run("r"), (-3, "k", NOW + 9)),
        (store.list_runs()[-1], (-3, "k", NOW + 9)),
        (store.get_run("plain"), (0, None, None)),
    ):
        assert (record.priority, record.key, record.expires_ms) == expected
    assert await claim(store, limit=1) == ["r"]
    session = await open_claimed(store, "r")
    record = store.get_run("r")
    assert (record.status, record.priority, record.key, record.expires_ms) == ("RUNNING", -3, "k", NOW + 9)
    await finish(session)


async def test_submitting_twice(store: Any) -> None:
    """A run submitted again is the same run, whatever its status; another input or pipeline is RunExists."""
    assert await submit(store, "r")
    assert not await submit(store, "r", priority=5)
    with pytest.raises(RunExists, match="another input"):
        await submit(store, "r", n=1)
    with pytest.raises(RunExists, match="another pipeline"):
        await submit(store, "r", pipeline="other")
    await claim(store)
    session = await open_claimed(store, "r")
    assert not await submit(store, "r")
    await finish(session)
    assert not await submit(store, "r")
    assert store.get_run("r").status == "COMPLETED"


async def test_a_claimed_run_starts_once(store: Any) -> None:
    """A claimed run is not offered again; its opening starts the first execution, complete as any."""
    await submit(store, "r")
    assert await claim(store) == ["r"]
    assert await claim(store, token="other") == []
    with pytest.raises(RunExists, match="no longer claimed"):
        await open_claimed(store, "r", "other")
    session = await open_claimed(store, "r")
    assert (session.execution, session.continued, session.finished) == (1, False, None)
    assert store.get_run("r").status == "RUNNING"
    await finish(session)
    assert await claim(store) == []


async def test_a_lost_claim_is_free_again(store: Any) -> None:
    """A run whose worker died after its claim is offered again when the claim is over."""
    await submit(store, "r")
    assert await claim(store, seconds=-1.0) == ["r"]
    assert await claim(store, token="other") == ["r"]
    with pytest.raises(RunExists, match="no longer claimed"):
        await open_claimed(store, "r")


async def test_a_run_that_is_given_back(store: Any) -> None:
    """A worker that cannot continue a run returns it until later; without its claim it changes nothing."""
    await submit(store, "r")
    await claim(store)
    await store.postpone("r", "other", NOW + 99)
    assert await claim(store, token="u") == []
    await store.postpone("r", "t", NOW + 10)
    assert await claim(store) == []
    assert await claim(store, now_ms=NOW + 10) == ["r"]


async def test_a_run_that_is_given_back_as_it_was(store: Any) -> None:
    """A worker that drains gives a claimed run back with its due time, so the queue's age is right."""
    await submit(store, "r")
    await claim(store)
    await store.postpone("r", "t", None)
    assert store.get_run("r").due_ms == NOW
    assert store.queue_figures({"p": ServedCode()}, NOW + 5) == {"p": QueueFigures(1, NOW)}
    assert await claim(store) == ["r"]


async def test_a_delayed_run_that_is_resumed_is_due_now(store: Any) -> None:
    """A queued run that somebody resumes is due from now on; one that was due before keeps its place."""
    await submit(store, "delayed")
    await submit(store, "due", due_ms=1000)
    assert await store.reopen("delayed")
    assert await store.reopen("due")
    assert 1000 < store.get_run("delayed").due_ms < NOW
    assert store.get_run("due").due_ms == 1000


@pytest.mark.parametrize("how", ["cancel", "pause"])
async def test_a_claimed_run_that_somebody_stops_holds_no_place(store: Any, how: str) -> None:
    """A queued run that is cancelled or paused after its claim makes room for the next run at once."""
    await submit(store, "a")
    await submit(store, "b")
    one = RunLimits(max_runs=1)
    assert await claim(store, p=one) == ["a"]
    assert await getattr(store, how)("a")
    assert await claim(store, p=one) == ["b"]


async def test_a_restarted_run_has_no_place_in_the_queue(store: Any) -> None:
    """A run that starts anew outside of the queue has neither the priority nor the key of its submission."""
    await submit(store, "r", priority=3, key="k", expires_ms=NOW + 9)
    await finish(await settled(store.open_run(request_of("r", if_exists="restart"))))
    record = store.get_run("r")
    assert (record.priority, record.key, record.expires_ms) == (0, None, None)


async def test_a_blocked_run_stays_blocked_after_its_pause(store: Any) -> None:
    """A queued run that was paused and blocked is kept from the code that blocked it when its pause ends."""
    await submit(store, "r")
    assert await store.pause("r")
    await store.block("r", "changed", "code", None, NOW)
    assert await store.unpause("r")
    served = {"p": ServedCode((), "code")}
    request = ClaimRequest("t", 30.0, 10, NOW, {"p": RunLimits()}, code=served)
    assert await store.claim(request) == []
    assert store.queue_figures(served, NOW)["p"].blocked == 1
    assert await claim(store, now_ms=NOW + 1_000_000) == ["r"]


async def test_a_request_about_an_unknown_run_leaves_nothing(store: Any) -> None:
    """A request about a run that does not exist stores nothing that a later gc() counts."""
    for refused in (store.cancel("r"), store.pause("r"), store.reopen("r"), store.set_budget("r", {})):
        with pytest.raises(CheckpointNotFound):
            await refused
    await store.postpone("r", "t", None)
    await store.block("r", "changed", "code", None, NOW)
    assert (await store.gc(keep_for=timedelta(-1), unfinished=True)).runs == 0


async def test_the_order_of_claims(store: Any) -> None:
    """Runs start by priority, then due time, then submission."""
    for run_id, priority, due_ms in (
        ("late", 0, NOW - 1),
        ("first", 0, NOW - 2),
        ("second", 0, NOW - 2),
        ("urgent", -1, NOW),
        ("some day", 7, NOW - 9),
    ):
        await submit(store, run_id, priority=priority, due_ms=due_ms)
    assert await claim(store, 1) == ["urgent"]
    assert await claim(store) == ["first", "second", "late", "some day"]


async def test_stopped_runs_keep_their_order(store: Any) -> None:
    """Runs that stopped and are due at the same time continue in the order of their submission."""
    run_ids = ["c", "a", "b"]
    for run_id in run_ids:
        await submit(store, run_id)
    await claim(store)
    for session in [await open_claimed(store, run_id) for run_id in reversed(run_ids)]:
        await settled(session.end("SUSPENDED", None, NOW))
    assert await claim(store, 2) == ["c", "a"]
    assert await claim(store) == ["b"]


async def test_keys_share_the_workers(store: Any) -> None:
    """Runs of a key with few runs do not wait for those of a key with many; live runs of a key count."""
    for number in range(5):
        await submit(store, f"a{number}", key="a", due_ms=NOW - 9)
    for number in range(2):
        await submit(store, f"b{number}", key="b")
    assert await claim(store, 3) == ["a0", "b0", "a1"]
    assert await claim(store, 3) == ["b1", "a2", "a3"]


async def test_finished_runs_of_a_key_do_not_count(store: Any) -> None:
    """Of keys without live runs, the run that is due first starts first; a live run of its key delays it."""
    for number in range(3):
        await submit(store, f"a{number}", key="a", due_ms=NOW - 9)
    await submit(store, "b0", key="b")
    assert await claim(store, 1) == ["a0"]
    await finish(await open_claimed(store, "a0"))
    assert await claim(store, 1) == ["a1"]
    assert await claim(store) == ["b0", "a2"]


async def test_limits_of_runs(store: Any) -> None:
    """At most max_runs runs of a pipeline, and max_runs_per_key of a key, are in progress; others wait.

    The facts of a waiting run have the numbers of those in progress.
    """
    for number in range(4):
        await submit(store, f"a{number}", key="a")
        await submit(store, f"b{number}", key="b")
    limits = RunLimits(max_runs=3, max_runs_per_key=2)
    assert await claim(store, p=limits) == ["a0", "b0", "a1"]
    session = await open_claimed(store, "a0")
    assert await claim(store, p=limits) == []
    facts = dict(facts_of(store.get_run("a2"), store.facts_of("a2"), (), str))
    assert facts["running"].startswith("3 runs of its pipeline, 2 of its key; a worker starts this one once")
    await finish(session)
    assert await claim(store, p=limits) == ["b1"]
    assert store.facts_of("a0").live_runs == {}


@pytest.mark.parametrize("how", ["suspended", "lost", "blocked"])
async def test_runs_that_stopped_are_picked_as_queued_ones(store: Any, how: str) -> None:
    """Among due runs priority comes first, and those of a key at its limit do not delay another key."""
    runs = [(f"a{number}", 0, "a") for number in range(4)]
    runs += [("b0", 0, "b"), ("plain", 1, None), ("urgent", -1, None)]
    for run_id, priority, key in runs:
        await submit(store, run_id, priority=priority, key=key)
    await submit(store, "last", pipeline="q")
    await claim(store, p=RunLimits(), q=RunLimits())
    lease_seconds = 0.1 if how == "lost" else 30.0
    sessions = []
    for run_id, pipeline in [*((run_id, "p") for run_id, _, _ in runs), ("last", "q")]:
        session = await open_claimed(store, run_id, pipeline=pipeline, lease_seconds=lease_seconds)
        if how == "lost":
            session.abandon()  # Before its lease is renewed: the leases end in the order of the runs.
        else:
            sessions.append(session)
    for due_ms, session in enumerate(sessions, NOW - len(sessions)):
        await settled(session.end("SUSPENDED", None, due_ms))
        if how == "blocked":
            await store.block(session.run_id, "changed", "code", None, due_ms)
    del session, sessions
    later, limits = NOW + 1_000_000, RunLimits(max_runs_per_key=1)
    async with asyncio.timeout(10):
        while not await claim(store, now_ms=later, q=RunLimits()):  # Its lease ends last.
            await asyncio.sleep(0.01)
    assert await claim(store, 1, now_ms=later, p=limits) == ["urgent"]
    assert await claim(store, 2, now_ms=later, p=limits) == ["a0", "b0"]
    assert await claim(store, 1, now_ms=later, p=limits) == ["plain"]
    assert await claim(store, now_ms=later) == ["a1", "a2", "a3"]


async def test_a_claim_reads_no_suspended_run_that_is_not_due(tmp_path: Path) -> None:
    """In SQLite, the suspended runs that are not due are behind the end of the index that a claim reads."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        await submit(store, "r")
        texts: list[str] = []

        def read(rows: Any) -> None:
            rows.db.set_trace_callback(texts.append)
            rows.candidates("p", ClaimRequest("t", 30.0, 10, NOW, {"p": RunLimits()}))

        store.read(read, None)
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        plans = [
            [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}")]
            for text in texts
            if "runs_by_wake" in text
        ]
    searched = [line for plan in plans for line in plan if "runs_by_wake" in line]
    assert len(plans) == 2
    assert all("(pipeline=? AND wake_ms<?)" in line for line in searched)


async def test_a_claim_reads_the_first_runs_of_each_key(tmp_path: Path) -> None:
    """In SQLite, a claim costs the same for a key with 500 queued runs as for one with 20."""
    steps: list[int] = []
    async with SQLiteStore(tmp_path / "runs.db") as store:
        for first, last in ((0, 20), (20, 500)):
            await asyncio.gather(
                *(submit(store, f"{k}{n}", key=k) for k in "abc" for n in range(first, last))
            )

            def read(rows: Any) -> int:
                steps.append(0)

                def count() -> None:
                    steps[-1] += 1

                rows.db.set_progress_handler(count, 10)
                return len(rows.candidates("p", ClaimRequest("t", 30.0, 5, NOW, {"p": RunLimits()})))

            assert store.read(read, 0) == 15
    assert steps[1] < 1.5 * steps[0]


async def test_a_claim_takes_what_a_choice_from_all_runs_would_take(store: Any) -> None:
    """Of each key, a claim reads the runs that are first by priority, due time and submission."""
    chance = random.Random(0)
    places = [(chance.randrange(2), NOW - chance.randrange(4), chance.choice("abcd")) for _ in range(60)]
    runs = [Candidate(number, f"r{number}", "p", *place) for number, place in enumerate(places)]
    for one in runs:
        await submit(store, one.run_id, key=one.key, priority=one.priority, due_ms=one.due_ms)
    request = ClaimRequest("t", 30.0, 15, NOW, {"p": RunLimits()})
    assert await claim(store, 15) == [one.run_id for one in choose(runs, {"p": {}}, request)]


async def test_owners_that_are_gone_hold_no_place(store: Any) -> None:
    """A run whose owner is gone is offered again once its lease is over, and does not count for max_runs."""
    await submit(store, "r")
    await claim(store)
    session = await open_claimed(store, "r", lease_seconds=0.1)
    session.abandon()
    del session
    await submit(store, "s")
    claimed: list[str] = []
    async with asyncio.timeout(10):
        while len(claimed) < 2:
            claimed += await claim(store, p=RunLimits(max_runs=2))
    assert sorted(claimed) == ["r", "s"]


async def test_runs_of_other_pipelines_are_left_alone(store: Any) -> None:
    """A worker claims runs of the pipelines that it serves, in one order for all of them."""
    await submit(store, "r", pipeline="q", priority=1)
    await submit(store, "s", pipeline="p", priority=2)
    await submit(store, "t", pipeline="other")
    assert await claim(store, p=RunLimits(), q=RunLimits()) == ["r", "s"]


async def test_an_expired_run_fails(store: Any) -> None:
    """A run that starts after its latest start is FAILED with reason "expired", and nothing is called."""
    await submit(store, "r", due_ms=1, expires_ms=2)
    await claim(store)
    session = await open_claimed(store, "r")
    assert (session.finished.status, session.finished.reason) == ("FAILED", "expired")
    await finish(session, "FAILED", session.finished.error)
    assert store.get_run("r").status == "FAILED"


@pytest.mark.parametrize("key", [None, "tenant"])
async def test_delayed_runs_do_not_keep_a_due_one_from_workers(
    store: Any, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is due starts, however many runs of its queue are delayed; these start in their time."""
    monkeypatch.setattr("stroma.checkpoint.redis.reader._MAX_EXAMINED", 20)
    later = [(f"later{number}", NOW + 10 * number + 10) for number in range(120)]
    await asyncio.gather(
        *(submit(store, run_id, due_ms=due_ms, priority=-1, key=key) for run_id, due_ms in later)
    )
    await submit(store, "now", priority=1)
    assert store.queue_figures({"p": ServedCode()}, NOW) == {"p": QueueFigures(121, NOW)}
    assert await claim(store) == ["now"]
    assert await claim(store, now_ms=NOW + 25) == ["later0", "later1"]
    assert store.queue_figures({"p": ServedCode()}, NOW + 35) == {"p": QueueFigures(121, NOW)}
    await store.cancel("later2")
    assert await claim(store, now_ms=NOW + 45) == ["later3"]


async def test_the_figures_of_a_queue(store: Any) -> None:
    """The figures of a queue are its QUEUED runs and the earliest time of those and of sleeping runs."""
    p = {"p": ServedCode()}
    assert store.queue_figures(p, NOW) == {"p": QueueFigures(0, None)}
    await submit(store, "later", due_ms=NOW + 50)
    await submit(store, "other", pipeline="q", due_ms=NOW - 90)
    figures = store.queue_figures({**p, "q": ServedCode()}, NOW)
    assert figures == {"p": QueueFigures(1, None), "q": QueueFigures(1, NOW - 90)}
    await submit(store, "urgent", due_ms=NOW - 2, priority=-1)
    await submit(store, "old", due_ms=NOW - 9, priority=3)
    await submit(store, "keyed", due_ms=NOW - 7, priority=1, key="k")
    assert store.queue_figures(p, NOW) == {"p": QueueFigures(4, NOW - 9)}
    assert await claim(store, limit=3) == ["urgent", "keyed", "old"]
    session = await open_claimed(store, "old")
    assert store.queue_figures(p, NOW) == {"p": QueueFigures(3, NOW - 7)}
    await settled(session.end("SUSPENDED", "sleeping", NOW - 8))
    assert store.queue_figures(p, NOW) == {"p": QueueFigures(3, NOW - 8)}
    await store.cancel("old")
    await store.cancel("keyed")
    await store.pause("urgent")
    assert store.queue_figures(p, NOW) == {"p": QueueFigures(1, None)}


async def test_control_of_a_queued_run(store: Any) -> None:
    """A queued run is cancelled or paused at once; a paused one is due again once the pause is taken back."""
    await submit(store, "r")
    await submit(store, "s")
    assert await store.cancel("r")
    assert await store.pause("s")
    assert [store.get_run(run_id).status for run_id in ("r", "s")] == ["CANCELLED", "SUSPENDED"]
    assert await claim(store) == []
    assert await store.unpause("s")
    assert await claim(store) == ["s"]


@pytest.mark.parametrize("take_back", ["unpause", "reopen"])
async def test_a_queued_run_whose_pause_ends_is_queued_as_before(store: Any, take_back: str) -> None:
    """A queued run that was paused has its due time, priority, key and latest start again after the pause."""
    place = {"due_ms": NOW + 5, "priority": 3, "key": "k", "expires_ms": NOW + 9}
    await submit(store, "later", **place)
    await submit(store, "urgent", due_ms=NOW + 5, priority=-1)
    for _ in range(2):
        assert await store.pause("later")
    await store.send("later", SentMessage(0, "", "m", b"1"))
    assert store.get_run("later").status == "SUSPENDED"
    assert await getattr(store, take_back)("later")
    record = store.get_run("later")
    assert (record.status, record.error) == ("QUEUED", None)
    assert (record.due_ms, record.priority) == (NOW + 5, 3)
    assert (record.key, record.expires_ms) == ("k", NOW + 9)
    assert await claim(store, now_ms=NOW + 4) == []
    assert await claim(store, now_ms=NOW + 5) == ["urgent", "later"]


async def test_a_queued_run_expires_after_its_pause(store: Any) -> None:
    """A queued run whose latest start passes during a pause is FAILED as expired once the pause ends."""
    await submit(store, "r", expires_ms=NOW // 2)
    await store.pause("r")
    await store.unpause("r")
    assert await claim(store) == ["r"]
    session = await open_claimed(store, "r")
    assert (session.finished.status, session.finished.reason) == ("FAILED", "expired")


async def test_many_workers_claim_each_run_once(store: Any) -> None:
    """Each of many queued runs is claimed by one of several workers that ask at the same time."""
    for number in range(30):
        await submit(store, f"r{number}", key=str(number % 4) if number % 2 else None)
    rounds = [
        await asyncio.gather(*(claim(store, 4, token=f"w{worker}") for worker in range(4))) for _ in range(4)
    ]
    claimed = [run_id for one in rounds for runs in one for run_id in runs]
    while rest := await claim(store, 4):
        claimed += rest
    assert sorted(claimed) == sorted(f"r{number}" for number in range(30))


@examples(200)
@given(
    st.lists(
        st.tuples(st.integers(-1, 1), st.integers(0, 3), st.sampled_from([None, "a", "b", "c"])), max_size=20
    ),
    st.dictionaries(st.sampled_from([None, "a", "b"]), st.integers(1, 3), max_size=3),
    st.integers(1, 25),
    st.none() | st.integers(1, 10),
    st.none() | st.integers(1, 3),
)
def test_what_is_chosen(
    queued: list[tuple[int, int, str | None]],
    live: dict[str | None, int],
    limit: int,
    max_runs: int | None,
    per_key: int | None,
) -> None:
    """No limit is passed, no run precedes a lower priority or an earlier run of its key, no place is free."""
    candidates = [Candidate(i, str(i), "p", *one) for i, one in enumerate(queued)]
    request = ClaimRequest("t", 1.0, limit, 0, {"p": RunLimits(max_runs, per_key)})
    chosen = choose(candidates, {"p": live}, request)
    assert len(chosen) <= limit
    assert [one.priority for one in chosen] == sorted(one.priority for one in chosen)
    running = {key: live.get(key, 0) + sum(one.key == key for one in chosen) for key in (None, "a", "b", "c")}
    if max_runs is not None:
        assert not chosen or sum(live.values()) + len(chosen) <= max_runs
    for key in ("a", "b", "c"):
        of_key = [one for one in chosen if one.key == key]
        assert not of_key or per_key is None or running[key] <= per_key
        left = [one for one in candidates if one.key == key and one not in chosen]
        assert all((a.priority, a.due_ms) <= (b.priority, b.due_ms) for a in of_key for b in left)
    left = [one for one in candidates if one not in chosen]
    if left and len(chosen) < limit and (max_runs is None or sum(live.values()) + len(chosen) < max_runs):
        assert per_key is not None
        assert all(one.key is not None and running[one.key] >= per_key for one in left)


@pytest.mark.parametrize("kind", ON_SERVERS)
async def test_listeners_learn_of_due_runs(kind: str) -> None:
    """Another process that listens learns at once of a submitted or due run; others poll."""
    with place(kind) as where, opened(kind, where) as store, opened(kind, where) as other:
        await submit(store, "first")  # Creates the tables.
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        listener = other.listen(lambda: loop.call_soon_threadsafe(news.set))
        try:
            async with asyncio.timeout(20):
                while not news.is_set():  # Until it is connected.
                    await submit(store, f"r{loop.time()}")
                    await asyncio.sleep(0.01)
                await store.pause("first")
                await asyncio.sleep(0.1)
                news.clear()
                await store.unpause("first")
                await news.wait()
        finally:
            listener.close()


async def test_a_lost_run_that_is_given_back(store: Any) -> None:
    """A run without owner that a worker cannot continue is hidden for a while, and takes no place."""
    await submit(store, "r")
    await claim(store)
    session = await open_claimed(store, "r", lease_seconds=0.1)
    session.abandon()
    del session
    async with asyncio.timeout(10):
        while await claim(store) != ["r"]:
            pass
    await store.postpone("r", "t", 1 << 60)
    assert await claim(store) == []
    await submit(store, "s")
    assert await claim(store, p=RunLimits(max_runs=1)) == ["s"]


async def test_a_budget_of_a_queued_run_outlives_its_first_owner(store: Any) -> None:
    """A budget set while the run was queued holds for every owner of the run, not only for the first."""
    await submit(store, "r")
    assert await store.set_budget("r", {"max_tokens_total": 5})
    await claim(store)
    for _ in range(2):
        session = await open_claimed(store, "r")
        assert session.control.budget == {"max_tokens_total": 5}
        await finish(session, "INTERRUPTED")
        assert await claim(store) == ["r"]


async def test_runs_that_are_opened_together(store: Any) -> None:
    """Claimed runs that are opened at once have all that is stored of each."""
    run_ids = [f"r{n}" for n in range(8)]
    for n, run_id in enumerate(run_ids):
        await submit(store, run_id, n=n)
        await settled(store.set_budget(run_id, {"max_tokens_total": n}))
    assert sorted(await claim(store)) == run_ids
    gate = threading.Event()
    if hasattr(store, "post"):
        store.post(lambda rows: gate.wait(10))  # What comes meanwhile is performed together.
    operations = [settled(store.attribute("r3", {"target": "here"}))]
    operations += [open_claimed(store, run_id, n=n) for n, run_id in enumerate(run_ids)]
    waiting = asyncio.gather(*operations)
    await asyncio.sleep(0.05)
    gate.set()
    _, *sessions = await waiting
    for n, session in enumerate(sessions):
        assert session.control.budget == {"max_tokens_total": n}
        assert session.attribution == ({"target": "here"} if n == 3 else {})
        await finish(session)
