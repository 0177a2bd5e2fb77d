"""Tests of ownership: leases, fencing, and concurrent clients."""

import asyncio
import inspect
import time
from datetime import timedelta
from typing import Any

import pytest
from tests.store_suite.helpers import (
    ROUNDS,
    State,
    begin,
    commit,
    fail,
    finish,
    restored,
    row,
    settled,
    suspend_run,
)

from stroma.checkpoint import CheckpointLost, Fenced, PipelineChanged, RunBusy, RunExists, StoreError
from stroma.checkpoint.entries import Waiting, effect_note
from stroma.contracts.schema import schema_of


class OwnershipTests:
    """Tests of ownership: leases, fencing, and concurrent clients."""

    async def test_a_run_has_one_owner(self, store: Any) -> None:
        """RunBusy names the owner of a run, and says if the input is the same."""
        session = await begin(store, state=State(n=1))
        for way in ("new", "restart", "resume", "return", "error"):
            for n in (1, 2):
                with pytest.raises(RunBusy) as busy:
                    await begin(store, state=State(n=n), if_exists=way)
                assert busy.value.same_input is (n == 1)
                assert busy.value.holder == store.get_run("run").holder is not None
                assert busy.value.left_seconds > 0
        await commit(session, 0, State())
        await finish(session)
        assert store.get_run("run").holder is None
        assert (await begin(store, state=State(n=1), if_exists="resume")).continued

    async def test_many_at_once_have_one_owner(self, store: Any) -> None:
        """Of many requests for a run at the same moment one gets it."""
        got = await asyncio.gather(*(begin(store) for _ in range(20)), return_exceptions=True)
        won = [session for session in got if not isinstance(session, BaseException)]
        assert len(won) == 1
        assert all(isinstance(e, RunBusy) for e in got if isinstance(e, BaseException))
        assert (won[0].execution, store.get_run("run").execution) == (1, 1)

    async def test_whoever_is_taken_over_from_can_write_nothing(self, store: Any) -> None:
        """Commits, failures and the end of a stale owner are rejected and change nothing."""
        stale = await begin(store)
        await commit(stale, 0, State(n=1), tokens=1)
        owner = await begin(store, if_exists="resume", if_running="take_over")
        assert restored(owner) == {(0, ""): State(n=1)}
        for late in (commit(stale, 1, State(n=2), tokens=10), fail(stale, 1, tokens=10), finish(stale)):
            with pytest.raises(Fenced):
                await late
        await commit(owner, 1, State(n=3), tokens=2)
        await finish(owner)
        run = store.get_run("run")
        assert (run.status, run.tokens, run.nodes) == ("COMPLETED", 3, 2)
        assert restored(await begin(store, if_exists="resume"))[1, ""] == State(n=3)

    async def test_a_deleted_run_is_nobodys(self, store: Any) -> None:
        """Deleting a run fences its owner, also from a new run of the same id."""
        stale = await begin(store)
        await commit(stale, 0, State(n=1))
        await settled(store.delete("run"))
        assert store.get_run("run") is None
        assert store.attempts("run") == []
        with pytest.raises(CheckpointLost):
            await commit(stale, 1, State())
        fresh = await begin(store)
        assert (fresh.execution, dict(fresh.restored)) == (1, {})
        with pytest.raises(Fenced):
            await commit(stale, 1, State())
        assert store.get_run("run").nodes == 0

    async def test_an_owner_that_gives_up_without_a_word(self, store: Any) -> None:
        """An abandoned session does not block the run."""
        session = await begin(store)
        await commit(session, 0, State(n=1))
        session.abandon()
        assert store.get_run("run").holder is None
        assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=1)}

    async def test_plain_code_takes_over_from_itself(self, store: Any) -> None:
        """A run without a recorded end does not block its own process."""
        stale = await begin(store, ends=False)
        await commit(stale, 0, State(n=1))
        assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=1)}
        with pytest.raises(Fenced):
            await commit(stale, 1, State())

    async def test_plain_code_is_cancelled(self, store: Any) -> None:
        """A run without a recorded end is CANCELLED at once in its own process; later calls are stored."""
        session = await begin(store, ends=False)
        await commit(session, 0, State(n=1))
        assert await settled(store.cancel("run")) is True
        await commit(session, 1, State(n=2))
        assert store.get_run("run").status == "CANCELLED"
        again = await begin(store, if_exists="resume")
        assert restored(again) == {(0, ""): State(n=1), (1, ""): State(n=2)}

    async def test_what_becomes_of_a_run_that_exists(self, store: Any) -> None:
        """if_exists: "error" refuses, "return" leaves a finished run alone and continues any other."""
        session = await begin(store, if_exists="error")
        await commit(session, 0, State(n=1))
        await finish(session, "PARTIAL", "why")
        with pytest.raises(RunExists, match="PARTIAL"):
            await begin(store, if_exists="error")
        again = await begin(store, if_exists="return")
        assert (again.continued, again.finished) == (True, None)
        await finish(again, "RESUMED")
        before = store.get_run("run")
        done = await begin(store, if_exists="return")
        assert (done.continued, done.finished.status) == (False, "RESUMED")
        assert restored(done) == {(0, ""): State(n=1)}
        assert store.get_run("run") == before
        with pytest.raises(PipelineChanged):
            await begin(store, if_exists="return", state=State(n=5))

    async def test_a_run_that_has_not_ended_does_not_begin_anew(self, store: Any) -> None:
        """By default it is RunExists with the count of what would be discarded; "restart" discards it."""
        question = Waiting(1, "", "ask", "may I?", "")
        for run_id, status in (("s", "SUSPENDED"), ("i", "INTERRUPTED"), ("r", "RUNNING")):
            session = await begin(store, run_id)
            await commit(session, 0, State(n=1))
            await settled(session.suspend(row(1, "ask"), question))
            if status == "RUNNING":
                session.abandon()
            else:
                await finish(session, status)
            before = store.get_run(run_id)
            with pytest.raises(
                RunExists, match=rf"{status}.*1 committed node, 1 open question;.* resume=True"
            ):
                await begin(store, run_id, State(n=5))
            await settled(store.signal(run_id, question._replace(payload=b"1")))
            with pytest.raises(RunExists, match="1 answered question"):
                await begin(store, run_id, if_running="take_over")
            assert store.get_run(run_id).status == before.status
            anew = await begin(store, run_id, if_exists="restart")
            assert (anew.execution, restored(anew), dict(anew.waiting)) == (2, {}, {})

    async def test_a_run_that_has_ended_begins_anew(self, store: Any) -> None:
        """By default a run that ended, whichever way, begins another execution."""
        for number, status in enumerate(("COMPLETED", "FAILED", "PARTIAL", "CANCELLED", "RESUMED"), 1):
            session = await begin(store, state=State(n=number))
            assert (session.execution, session.continued) == (number, False)
            await commit(session, 0, State(n=number))
            await finish(session, status)

    async def test_a_run_that_called_an_effect_does_not_begin_anew(self, store: Any) -> None:
        """By default it is RunExists, however the run ended, also after a restart without calls."""
        session = await begin(store)
        session.note(effect_note(0, ""), b"call 1")
        session.mark_effect("charge")
        await settled(session.flush())
        await commit(session, 0, State(n=1))
        await finish(session)
        for _ in range(2):
            with pytest.raises(RunExists, match=r"recorded effect \(COMPLETED\).*effect of 'charge' again"):
                await begin(store)
            anew = await begin(store, if_exists="restart")
            assert dict(anew.notes) == {}
            await finish(anew)
        assert (await begin(store, if_exists="resume")).continued
        await settled(store.delete("run"))
        assert not (await begin(store)).continued

    async def test_what_a_run_that_was_waited_for_came_to(self, store: Any) -> None:
        """A client that attached gets the end of the run, or may resume a run without an end."""
        session = await begin(store)
        await finish(session, "FAILED", "it broke")
        attached = await begin(store, if_exists="attach")
        assert attached.finished[:2] == ("FAILED", "it broke")
        (await begin(store)).abandon()
        attached = await begin(store, if_exists="attach")
        assert (attached.finished, attached.continued) == (None, True)

    async def test_runs_side_by_side(self, store: Any) -> None:
        """Concurrent runs neither mix nor lose commits."""

        async def one(i: int) -> None:
            session = await begin(store, f"run {i}", State(n=i))
            for position in range(5):
                await commit(session, position, State(n=100 * i + position), tokens=i)
            await finish(session)

        await asyncio.gather(*(one(i) for i in range(40)))
        for i in range(40):
            again = await begin(store, f"run {i}", State(n=i), if_exists="resume")
            assert restored(again) == {(p, ""): State(n=100 * i + p) for p in range(5)}
            assert again.prior.tokens == 5 * i

    async def test_retention_goes_by_the_clock_of_the_store(
        self, store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A store with a clock of its own deletes nothing early because of a wrong clock of a caller."""
        await finish(await begin(store))
        if store.facts().clock_ms is None:
            pytest.skip("this store goes by the clock of its machine")
        wrong, right = 400 * 86_400 * 10**9, time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: right() + wrong)
        monkeypatch.setattr(time, "time", lambda: (right() + wrong) / 1e9)
        await settled(store.gc(keep_for=timedelta(days=30)))
        assert store.get_run("run").status == "COMPLETED"
        monkeypatch.setattr(time, "time_ns", lambda: right() - wrong)
        await asyncio.sleep(0.01)
        await settled(store.gc(keep_for=timedelta(0)))
        assert store.get_run("run") is None

    async def test_only_what_has_ended_is_collected(self, store: Any) -> None:
        """gc() deletes runs that ended; resumable ones only if told to, and never one that is in progress."""
        held = await begin(store, "held")
        await finish(await begin(store, "failed"), "FAILED")
        await finish(await begin(store, "partial"), "PARTIAL")
        assert (await settled(store.gc(keep_for=timedelta(hours=1), unfinished=True))).runs == 0
        await asyncio.sleep(0.002)  # later, by the clock of the store
        assert (await settled(store.gc(keep_for=timedelta(0)))).runs == 1
        assert {run.run_id for run in store.list_runs()} == {"held", "partial"}
        assert (await settled(store.gc(keep_for=timedelta(0), unfinished=True))).runs == 1
        await commit(held, 0, State())

    async def test_a_run_that_is_taken_up_is_not_collected(self, store: Any) -> None:
        """Of a concurrent gc() and resume one wins: the run is deleted first, or stays complete."""

        async def collect() -> None:
            await settled(store.gc(keep_for=timedelta(0), unfinished=True))

        for i in range(20):
            session = await begin(store, "run", State(n=i))
            await commit(session, 0, State(n=i))
            await finish(session, "INTERRUPTED")
            await asyncio.sleep(0.002)  # earlier, by the clock of the store
            taking = begin(store, "run", State(n=i), if_exists="resume")
            work = (taking, collect()) if i % 2 else (collect(), taking)
            again = (await asyncio.gather(*work))[0 if i % 2 else 1]
            assert restored(again) in ({}, {(0, ""): State(n=i)})
            await collect()
            await commit(again, 1, State(n=i))
            assert store.get_run("run").holder is not None
            await finish(again)

    async def test_branches_side_by_side(self, store: Any) -> None:
        """The children of a group may commit at the same moment."""
        session = await begin(store)
        await asyncio.gather(*(commit(session, 0, State(n=i), branch=str(i)) for i in range(50)))
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert restored(again) == {(0, str(i)): State(n=i) for i in range(50)}

    async def test_a_cancelled_commit_is_all_or_nothing(self, store: Any) -> None:
        """A commit whose caller was cancelled is stored whole or not at all; sent again, once."""
        session = await begin(store)
        schema = schema_of(State)
        for position in range(20):
            attempt = row(position, tokens=1, output=("", position, 0.0, b""))
            pending = session.record(attempt, schema, State(n=position))
            if inspect.isawaitable(pending):
                task = asyncio.ensure_future(pending)
                for _ in range(position % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await settled(session.record(attempt, schema, State(n=position)))
        await finish(session)
        again = await begin(store, if_exists="resume")
        assert restored(again) == {(p, ""): State(n=p) for p in range(20)}
        assert again.prior.tokens == 20

    async def test_one_of_two_owners_at_once(self, store: Any, other: Any) -> None:
        """Of two clients that open a run at the same moment one gets it, and its commits are stored."""
        for i in range(ROUNDS):
            opening = (begin(store, f"run {i}"), begin(other, f"run {i}"))
            got = await asyncio.gather(*opening, return_exceptions=True)
            won = [session for session in got if not isinstance(session, BaseException)]
            assert len(won) == 1, got
            assert [type(e) for e in got if isinstance(e, BaseException)] == [RunBusy]
            await commit(won[0], 0, State(n=i))
            await finish(won[0])
            assert other.get_run(f"run {i}").execution == 1

    async def test_one_of_two_answers_at_once(self, store: Any, other: Any) -> None:
        """Of two answers at the same moment one is accepted and stored, the other rejected."""
        for i in range(ROUNDS):
            question = await suspend_run(store, f"run {i}")
            answers = (b'{"by":"ada"}', b'{"by":"bob"}')
            sent = [
                settled(client.signal(f"run {i}", question._replace(payload=answer)))
                for client, answer in zip((store, other), answers, strict=True)
            ]
            got = await asyncio.gather(*sent, return_exceptions=True)
            accepted = [answer for answer, error in zip(answers, got, strict=True) if error is None]
            assert len(accepted) == 1, got
            assert all(error is None or isinstance(error, StoreError) for error in got)
            assert [w.payload for w in store.waiting(f"run {i}")] == accepted

    async def test_an_answer_and_a_resume_at_once(self, store: Any, other: Any) -> None:
        """An answer accepted while a run is resumed reaches that resume or the next one."""
        for i in range(ROUNDS):
            run_id = f"run {i}"
            question = await suspend_run(store, run_id)
            answer = question._replace(payload=b"1")
            work = (settled(other.signal(run_id, answer)), begin(store, run_id, if_exists="resume"))
            _, session = await asyncio.gather(*work)
            if session.waiting[1, ""].payload is None:
                await settled(session.suspend(row(1, "ask"), question))
            await finish(session, "SUSPENDED")
            (stored,) = store.waiting(run_id)
            assert stored._replace(answered_ms=0) == answer

    async def test_an_answer_before_the_question_is_asked_again(self, store: Any, other: Any) -> None:
        """An answer that arrives before a resumed run reaches its question again is not lost."""
        question = await suspend_run(store, "run")
        session = await begin(store, if_exists="resume")
        await settled(other.signal("run", question._replace(payload=b"1")))
        await settled(session.suspend(row(1, "ask"), question))
        await finish(session, "SUSPENDED")
        again = await begin(store, if_exists="resume")
        assert again.waiting[1, ""].payload == b"1"
        # That answer was read: this is another question.
        await settled(again.suspend(row(1, "ask"), question._replace(reason="and now?", number=1)))
        assert [(w.reason, w.payload) for w in store.waiting("run")] == [("and now?", None)]

    async def test_one_of_two_cancels_at_once(self, store: Any, other: Any) -> None:
        """Of two concurrent cancels of an interrupted run one succeeds, the other says that it has ended."""
        for i in range(ROUNDS):
            await finish(await begin(store, f"run {i}"), "INTERRUPTED")
            work = [settled(client.cancel(f"run {i}")) for client in (store, other)]
            assert sorted(await asyncio.gather(*work)) == [False, True]
            assert store.get_run(f"run {i}").status == "CANCELLED"

    async def test_a_cancel_and_a_resume_at_once(self, store: Any, other: Any) -> None:
        """A run resumed and cancelled at once is never marked as ended under its new owner."""
        for i in range(ROUNDS):
            await finish(await begin(store, f"run {i}"), "INTERRUPTED")
            work = (begin(store, f"run {i}", if_exists="resume"), settled(other.cancel(f"run {i}")))
            session, _ = await asyncio.gather(*work)
            assert store.get_run(f"run {i}").status == "RUNNING"
            await commit(session, 0, State())
            await finish(session)

    async def test_a_cancel_and_an_end_at_once(self, store: Any, other: Any) -> None:
        """A run that has ended is not CANCELLED afterwards: the cancel reached its owner or came too late."""
        for i in range(ROUNDS):
            session = await begin(store, f"run {i}")
            await asyncio.gather(finish(session), settled(other.cancel(f"run {i}")))
            assert store.get_run(f"run {i}").status == "COMPLETED"

    async def test_one_of_two_forks_at_once(self, store: Any, other: Any) -> None:
        """Of two concurrent forks with one id one is created, completely."""
        session = await begin(store)
        for position in range(3):
            await commit(session, position, State(n=position))
        await finish(session)
        for i in range(ROUNDS):
            work = [
                settled(client.fork("run", f"fork {i}", 2 + n)) for n, client in enumerate((store, other))
            ]
            got = await asyncio.gather(*work, return_exceptions=True)
            assert [type(e) for e in got if e is not None] == [RunExists]
            fork = await begin(store, f"fork {i}", if_exists="resume")
            assert len(fork.restored) == (2 if got[0] is None else 3)
            await finish(fork)

    async def test_a_deletion_and_a_commit_at_once(self, store: Any, other: Any) -> None:
        """A commit of a run that is deleted at the same moment leaves nothing behind."""
        for i in range(ROUNDS):
            session = await begin(store)
            work = (commit(session, 0, State(n=i)), settled(other.delete("run")))
            got = await asyncio.gather(*work, return_exceptions=True)
            assert got[0] is None or isinstance(got[0], CheckpointLost)
            assert (store.get_run("run"), store.attempts("run")) == (None, [])
            fresh = await begin(store)
            assert (fresh.execution, dict(fresh.restored)) == (1, {})
            await settled(store.delete("run"))
