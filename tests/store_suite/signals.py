"""Tests of signals: questions and answers, cancellation, undelivered end hooks."""

import asyncio
import time
from typing import Any

import pytest
from tests.store_suite.helpers import (
    State,
    begin,
    commit,
    due_runs,
    fail,
    finish,
    restored,
    row,
    settled,
    suspend_run,
)

from stroma.checkpoint import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    Fenced,
    InMemoryStore,
    RequestRefused,
    RunExists,
    Waiting,
)
from stroma.checkpoint.entries import NOT_DONE, RunControl, UnknownCall, effect_note
from stroma.trace.events import AttemptUsage

#: Factor of what a loaded machine may take longer.
PATIENCE = 3.0


async def _until_read(store: Any, run_id: str) -> None:
    """Wait until the owner of a run has read all requests."""
    while True:
        if not await asyncio.to_thread(store.is_request_pending, run_id):
            return
        await asyncio.sleep(0.01)


class SignalTests:
    """Tests of signals: questions and answers, cancellation, undelivered end hooks."""

    async def test_what_nodes_wait_for(self, store: Any) -> None:
        """A question is kept with its attempt, an answer with its question, both of the execution."""
        session = await begin(store)
        question = Waiting(1, "0.2", "ask é", "may I?", "module:Model")
        await commit(session, 0, State(n=1))
        await settled(session.suspend(row(1, "ask é", branch="0.2", tokens=3), question))
        await finish(session, "SUSPENDED", "may I?")
        assert store.waiting("run") == [question]
        assert [a.tokens for a in store.attempts("run")] == [0, 3]
        with pytest.raises(RequestRefused, match="has no question"):
            await settled(store.signal("run", question._replace(position=0, payload=b"1")))
        for _ in range(2):  # repeating an answer changes nothing
            await settled(store.signal("run", question._replace(payload=b'{"yes":"\xc3\xa9"}')))
        with pytest.raises(RequestRefused, match="is not open"):
            await settled(store.signal("run", question._replace(payload=b'{"yes":"no"}')))
        again = await begin(store, if_exists="resume")
        ((place, answered),) = again.waiting.items()
        assert (place, answered._replace(answered_ms=0)) == (
            (1, "0.2"),
            question._replace(payload=b'{"yes":"\xc3\xa9"}'),
        )
        assert abs(answered.answered_ms / 1000 - time.time()) < 60
        assert restored(again) == {(0, ""): State(n=1)}
        await settled(
            again.suspend(row(1, "ask é", branch="0.2"), question._replace(reason="and now?", number=1))
        )
        await finish(again, "SUSPENDED")
        assert [(w.reason, w.payload) for w in store.waiting("run")] == [("and now?", None)]
        earlier = await begin(store, if_exists="resume", discard_from=1)
        assert dict(earlier.waiting) == {}
        await settled(earlier.suspend(row(1, "ask é"), question))
        await finish(earlier, "SUSPENDED")
        assert dict((await begin(store, if_exists="restart")).waiting) == {}
        assert store.waiting("run") == []
        with pytest.raises(RequestRefused, match="has no question"):
            await settled(store.signal("run", question._replace(payload=b"1")))
        assert store.waiting("run") == []

    async def test_a_stale_owner_asks_nothing(self, store: Any) -> None:
        """A question of a stale owner is rejected."""
        stale = await begin(store)
        await begin(store, if_exists="restart", if_running="take_over")
        with pytest.raises(Fenced):
            await settled(stale.suspend(row(0), Waiting(0, "", "node", "may I?", "")))
        assert store.waiting("run") == []
        with pytest.raises(CheckpointNotFound):
            await settled(store.signal("unknown", Waiting(0, "", "node", "may I?", "", b"1")))

    async def test_a_question_about_an_effect(self, store: Any) -> None:
        """A question about a call is stored with that call; an answer to another question is refused."""
        session = await begin(store)
        call = UnknownCall("run:1:0:é", 2, "TimeoutError: \ud800 no answer")
        question = Waiting(0, "", "charge", "effect", "", None, call)
        await settled(session.suspend(row(0, "charge"), question))
        await finish(session, "SUSPENDED", "effect")
        (stored,) = store.waiting("run")
        assert (stored.reason, stored.effect[:2]) == ("effect", call[:2])
        assert "no answer" in stored.effect.cause
        with pytest.raises(RequestRefused, match="has no question"):
            await settled(store.signal("run", question._replace(number=1, payload=NOT_DONE)))
        await settled(store.signal("run", stored._replace(payload=NOT_DONE)))
        again = await begin(store, if_exists="resume")
        assert again.waiting[0, ""].payload == NOT_DONE
        await settled(
            again.suspend(row(0, "charge"), question._replace(effect=call._replace(number=3), number=1))
        )
        await finish(again, "SUSPENDED")
        assert [(w.call_number, w.payload) for w in store.waiting("run")] == [(3, None)]

    async def test_notes_of_effects_outlive_a_discard(self, store: Any) -> None:
        """Discarding a position keeps the note of its effect's calls, for its execution's owner alone."""
        key = effect_note(1, "0")
        session = await begin(store)
        await commit(session, 0, State())
        session.note(key, b"call 1")
        session.note("1:o:0:", b"other")
        await settled(session.flush())
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume", discard_from=1)
        assert dict(again.notes) == {key: b"call 1"}
        later = await begin(store, if_exists="resume", if_running="take_over")
        again.note(key, b"call 2")
        with pytest.raises(Fenced):
            await settled(again.flush())
        assert dict(later.notes) == {key: b"call 1"}
        await finish(later)
        assert dict((await begin(store)).notes) == {}

    async def test_the_trace_context_belongs_to_the_execution(self, store: Any) -> None:
        """The trace context of the first process passes to the resumed execution and to no other."""
        first = await begin(store)
        assert first.traceparent is None
        first.note_attribution({"trace": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"})
        await commit(first, 0, State())
        await finish(first, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert again.traceparent == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        assert restored(again) == {(0, ""): State()}
        await finish(again)
        assert (await begin(store)).traceparent is None

    async def test_the_attribution_belongs_to_the_execution(self, store: Any) -> None:
        """Conversation and user are passed on when the execution is resumed, and to no other execution."""
        first = await begin(store)
        assert dict(first.attribution) == {}
        first.note_attribution({"conversation": "c", "user": "u"})
        await commit(first, 0, State())
        await finish(first, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert dict(again.attribution) == {"conversation": "c", "user": "u"}
        again.note_attribution({"user": "v"})
        await finish(again, "PARTIAL")
        last = await begin(store, if_exists="resume")
        assert dict(last.attribution) == {"conversation": "c", "user": "v"}
        await finish(last)
        assert dict((await begin(store)).attribution) == {}

    async def test_end_hooks_are_due_until_they_are_delivered(self, store: Any) -> None:
        """Attempts with undelivered hooks are handed to the next owner until they are delivered."""
        first = await begin(store, deliver=True)
        assert list(first.undelivered) == []
        await commit(first, 0, State(n=1), tokens=3)
        await settled(first.record(row(1, "b é", branch="0.2", tokens=5, cost=0.25), None, None))
        await settled(first.suspend(row(2, "c"), Waiting(2, "", "c", "may I?", "")))
        first.abandon()
        if not isinstance(store, (InMemoryStore, AsyncInMemoryStore)):
            again = await begin(store, if_exists="resume", deliver=True)
            due = list(again.undelivered)
            usages = [AttemptUsage() if r.usage is None else r.usage for r in due]
            places = [(r.position, r.branch, r.node_id) for r in due]
            assert places == [(0, "", "node"), (1, "0.2", "b é"), (2, "", "c")]
            assert [(usage.tokens, usage.cost_usd) for usage in usages] == [(3, 0.0), (5, 0.25), (0, 0.0)]
            again.delivered(due[1])
            await commit(again, 3, State())  # operations are executed in order
            again.abandon()
            third = await begin(store, if_exists="resume", deliver=True)
            assert [r.position for r in third.undelivered] == [0, 2, 3]
            third.abandon()
        assert list((await begin(store, if_exists="restart", deliver=True)).undelivered) == []
        session = begin(store, if_exists="resume", if_running="take_over", deliver=True)
        assert list((await session).undelivered) == []

    async def test_a_held_run_is_asked_to_end(self, store: Any) -> None:
        """cancel() reaches the owner of the run, once; the next owner does not see it."""
        session = await begin(store)
        question = asyncio.Event()
        loop = asyncio.get_running_loop()
        session.on_control = lambda control: control.cancel and loop.call_soon_threadsafe(question.set)
        assert await settled(store.cancel("run")) is True
        await asyncio.wait_for(question.wait(), 10)
        await finish(session, "CANCELLED")
        again = await begin(store, if_exists="resume")
        calls: list[Any] = []
        again.on_control = calls.append
        await asyncio.sleep(1.5)
        assert calls == []

    async def test_a_failure_that_a_retry_has_fixed(self, store: Any) -> None:
        """While a run is running or suspended, a failure that a later attempt has fixed is not its cause."""
        session = await begin(store)
        await fail(session, 0, message="first")
        assert store.get_run("run").cause.message == "first"
        await commit(session, 0, State(), attempt=2)
        assert store.get_run("run").cause is None
        await fail(session, 1, branch="0", message="second")
        assert store.get_run("run").cause.message == "second"
        waits = Waiting(1, "0", "node", "why", "")
        question = row(1, branch="0", attempt=2)
        await settled(session.suspend(question._replace(outcome="suspended"), waits))
        await finish(session, "SUSPENDED", "why")
        record = store.get_run("run")
        assert (record.cause, record.failures) == (None, 2)

    async def test_a_cancel_outlives_its_owner(self, store: Any) -> None:
        """If the owner died after an acknowledged cancel(), the next owner sees it CANCELLED."""
        for status in (None, "INTERRUPTED", "PARTIAL", "SUSPENDED"):
            run_id = f"run {status}"
            session = await begin(store, run_id)
            await commit(session, 0, State(n=1))
            assert await settled(store.cancel(run_id)) is True
            if status is None:
                session.abandon()
            else:
                await finish(session, status)
            again = await begin(store, run_id, if_exists="resume")
            assert again.finished.status == "CANCELLED"
            await finish(again, "COMPLETED")
            assert store.get_run(run_id).status == "CANCELLED"
            assert restored(again) == {(0, ""): State(n=1)}
            with pytest.raises(Fenced):
                await commit(session, 1, State())
            # It was cancelled once: later requests succeed.
            more = await begin(store, run_id, if_exists="resume")
            assert (more.finished, more.continued) == (None, True)
            more.abandon()

    async def test_a_cancel_of_an_execution_is_none_of_the_next(self, store: Any) -> None:
        """A cancel() of an ended or restarted execution does not affect the next one."""
        session = await begin(store)
        assert await settled(store.cancel("run")) is True
        await finish(session, "COMPLETED")
        late = await begin(store, if_exists="resume")
        assert late.finished is None
        assert await settled(store.cancel("run")) is True
        late.abandon()
        anew = await begin(store, if_exists="restart")
        assert (anew.finished, anew.execution) == (None, 2)
        await finish(anew, "INTERRUPTED")
        assert (await begin(store, if_exists="resume")).finished is None

    async def test_a_run_that_nobody_holds_is_cancelled(self, store: Any) -> None:
        """cancel() marks an interrupted run, does nothing to an ended one, and raises for an unknown one."""
        with pytest.raises(CheckpointNotFound):
            await settled(store.cancel("run"))
        await finish(await begin(store), "INTERRUPTED", "why")
        assert await settled(store.cancel("run")) is True
        assert (store.get_run("run").status, store.get_run("run").error) == ("CANCELLED", None)
        assert await settled(store.cancel("run")) is False
        await finish(await begin(store), "COMPLETED")
        assert await settled(store.cancel("run")) is False
        assert store.get_run("run").status == "COMPLETED"

    async def test_requests_reach_the_owner(self, store: Any) -> None:
        """The owner reads a request within a second, with all that hold, before it is no longer pending."""
        session = await begin(store)
        seen: list[Any] = []
        session.on_control = seen.append
        for ask in (
            store.set_budget("run", {"max_cost_usd": 2.5, "max_latency_ms": 7}),
            store.pause("run"),
            store.set_budget("run", {"max_cost_usd": 3.0}),
        ):
            before, start = len(seen), time.monotonic()
            assert await settled(ask) is True
            await _until_read(store, "run")
            assert len(seen) > before
            assert time.monotonic() - start < 1.0 * PATIENCE
        assert seen[-1] == RunControl(pause=True, budget={"max_cost_usd": 3.0, "max_latency_ms": 7})
        assert [one.pause for one in seen] == [False, True, True]

    async def test_a_pause_outlives_its_owner(self, store: Any) -> None:
        """If pause() was acknowledged and the owner died, only a resume by hand continues the run."""
        for status in (None, "INTERRUPTED", "SUSPENDED"):
            for is_read in (False, True):
                run_id = f"run {status} {is_read}"
                session = await begin(store, run_id)
                await commit(session, 0, State(n=1))
                if is_read:
                    session.on_control = lambda control: None
                assert await settled(store.pause(run_id)) is True
                if is_read:
                    await _until_read(store, run_id)
                if status is None:
                    session.abandon()
                else:
                    await settled(session.end(status, "waits", 0))
                automatic_requests: list[dict[str, Any]] = [{"due_ms": 1}, {"if_exists": "attach"}]
                for automatic in automatic_requests:
                    if status is None or "due_ms" in automatic:
                        try:
                            ended = await begin(store, run_id, **{"if_exists": "resume", **automatic})
                        except RunExists:
                            continue  # It is SUSPENDED already, and not due.
                        assert ended.finished[:2] == ("SUSPENDED", "paused")
                        assert not ended.continued
                        await finish(ended, "COMPLETED")
                record = store.get_run(run_id)
                assert (record.status, record.error, record.holder) == ("SUSPENDED", "paused", None)
                assert run_id not in await due_runs(store, 1 << 60)
                with pytest.raises(Fenced):
                    await commit(session, 1, State())
                # A resume takes it back, for whoever comes later too.
                again = await begin(store, run_id, if_exists="resume")
                assert (again.finished, again.continued) == (None, True)
                assert restored(again) == {(0, ""): State(n=1)}
                await finish(again, "INTERRUPTED")
                later = await begin(store, run_id, if_exists="resume", due_ms=1)
                assert (later.finished, later.continued) == (None, True)
                later.abandon()

    async def test_a_run_that_nobody_owns_is_paused(self, store: Any) -> None:
        """pause() suspends it at once, ignores an ended one, raises for an unknown one; no answer wakes it"""
        with pytest.raises(CheckpointNotFound):
            await settled(store.pause("run"))
        await finish(await begin(store), "INTERRUPTED")
        assert await settled(store.pause("run")) is True
        assert (store.get_run("run").status, store.get_run("run").error) == ("SUSPENDED", "paused")
        assert await due_runs(store, 1 << 60) == []
        assert await settled(store.pause("run")) is True
        for status in ("COMPLETED", "FAILED", "CANCELLED", "PARTIAL"):
            await finish(await begin(store, status), status, "why")
            assert await settled(store.pause(status)) is False
            assert store.get_run(status).status == status
        question = await suspend_run(store, "asks")
        assert await settled(store.pause("asks")) is True
        await settled(store.signal("asks", question._replace(payload=b"1")))
        worker = await begin(store, "asks", if_exists="resume", due_ms=1)
        assert worker.finished[:2] == ("SUSPENDED", "paused")
        await finish(worker, "SUSPENDED")
        assert await due_runs(store, 1 << 60) == []
        again = await begin(store, "asks", if_exists="resume")
        assert again.waiting[1, ""].payload == b"1"

    async def test_a_pause_that_is_taken_back(self, store: Any) -> None:
        """unpause() makes a paused run due for a worker; it returns False for one that is not paused."""
        with pytest.raises(CheckpointNotFound):
            await settled(store.unpause("run"))
        await finish(await begin(store), "INTERRUPTED")
        assert await settled(store.unpause("run")) is False
        await settled(store.pause("run"))
        assert await settled(store.unpause("run")) is True
        assert await due_runs(store, 1) == ["run"]
        session = await begin(store, if_exists="resume", due_ms=1)
        assert session.continued
        # While its owner lives: the run is due when that has stopped.
        assert await settled(store.pause("run")) is True
        assert await settled(store.unpause("run")) is True
        await finish(session, "SUSPENDED", "paused")
        assert await due_runs(store, 1) == ["run"]
        assert (await begin(store, if_exists="resume", due_ms=1)).continued

    async def test_a_pause_of_an_ended_run(self, store: Any) -> None:
        """unpause() returns False for a run that ended after its pause, which no later resume heeds."""
        session = await begin(store, "last node")
        assert await settled(store.pause("last node")) is True
        await finish(session)
        await finish(await begin(store, "cancelled"), "INTERRUPTED")
        assert await settled(store.pause("cancelled")) is True
        assert await settled(store.cancel("cancelled")) is True
        for run_id in ("last node", "cancelled"):
            assert await settled(store.unpause(run_id)) is False
            assert await due_runs(store, 1 << 60) == []
            again = await begin(store, run_id, if_exists="resume")
            assert again.control == RunControl()

    async def test_a_budget_holds_for_the_execution(self, store: Any) -> None:
        """Limits that were set hold for all who continue the execution, and not for the next one."""
        with pytest.raises(CheckpointNotFound):
            await settled(store.set_budget("run", {"max_cost_usd": 1.0}))
        session = await begin(store)
        assert session.control.budget == {}
        for limits in ({"max_cost_usd": 1.0, "max_tokens_total": 5}, {"max_cost_usd": 2.0}):
            assert await settled(store.set_budget("run", limits)) is True
        await finish(session, "SUSPENDED", "budget")
        # Its owner may not have read them.
        assert await due_runs(store, 1) == ["run"]
        for _ in range(2):
            again = await begin(store, if_exists="resume")
            assert again.control == RunControl(budget={"max_cost_usd": 2.0, "max_tokens_total": 5})
            await finish(again, "SUSPENDED", "budget")
        assert await due_runs(store, 1 << 60) == []
        assert await settled(store.set_budget("run", {"max_cost_usd": 4.0})) is True
        assert await due_runs(store, 1) == ["run"]
        more = await begin(store, if_exists="resume", due_ms=1)
        assert more.control.budget == {"max_cost_usd": 4.0, "max_tokens_total": 5}
        await finish(more)
        assert await settled(store.set_budget("run", {"max_cost_usd": 9.0})) is False
        assert (await begin(store, if_exists="restart")).control.budget == {}

    async def test_a_budget_that_was_set_makes_a_suspended_run_due_once(self, store: Any) -> None:
        """After its budget was set, a suspended run is due once, whatever it waits for, unless paused."""
        await suspend_run(store, "asks")
        session = await begin(store, "asks", if_exists="resume")
        assert await settled(store.set_budget("asks", {"max_cost_usd": 1.0})) is True
        for _ in range(2):
            await finish(session, "SUSPENDED", "ok?")
            assert await due_runs(store, 1) == ["asks"]
            session = await begin(store, "asks", if_exists="resume")
            await finish(session, "SUSPENDED", "ok?")
            assert await due_runs(store, 1 << 60) == []
            assert await settled(store.set_budget("asks", {"max_cost_usd": 2.0})) is True
            assert await due_runs(store, 1) == ["asks"]
            session = await begin(store, "asks", if_exists="resume")
            assert await settled(store.set_budget("asks", {"max_cost_usd": 3.0})) is True
        await finish(session, "INTERRUPTED")
        assert await settled(store.pause("asks")) is True
        assert await settled(store.set_budget("asks", {"max_cost_usd": 4.0})) is True
        assert await due_runs(store, 1 << 60) == []
