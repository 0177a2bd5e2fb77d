"""Tests of ids, listings, history pages and the simple protocol."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel
from tests.store_suite.helpers import (
    HARD_IDS,
    State,
    begin,
    commit,
    fail,
    finish,
    has_codec,
    restored,
    row,
    settled,
)

from stroma.checkpoint import CheckpointNotFound, CorruptCheckpoint, RunQuery, StepCall
from stroma.contracts.schema import schema_of
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure
from stroma.trace.events import COLLECTED
from stroma.trace.rejected import Complaint, RejectedOutput


class ReadingTests:
    """Tests of ids, listings, history pages and the simple protocol."""

    async def test_any_text_is_an_id(self, store: Any) -> None:
        """Any text is a valid run id and node id, and no two of them collide."""
        for i, run_id in enumerate(HARD_IDS):
            session = await begin(store, run_id, State(n=i))
            await commit(session, 0, State(n=i), HARD_IDS[-1 - i])
            await finish(session)
        for i, run_id in enumerate(HARD_IDS):
            again = await begin(store, run_id, State(n=i), if_exists="resume")
            assert restored(again) == {(0, ""): State(n=i)}
            assert again.restored[0, ""].node_id == HARD_IDS[-1 - i]
            assert store.get_run(run_id).run_id == run_id
            assert [a.node_id for a in store.attempts(run_id)] == [HARD_IDS[-1 - i]]
        assert sorted(r.run_id for r in store.list_runs(limit=100)) == sorted(HARD_IDS)
        assert sorted(r.run_id for r in store.list_runs(limit=100, pipeline="pipeline")) == sorted(HARD_IDS)

    async def test_pairs_of_ids_do_not_meet(self, store: Any) -> None:
        """("a", "b:c") and ("a:b", "c") are two places."""
        pairs = [(run, node) for run in ("a", "a:b", "a:b:c") for node in ("c", "b:c", ":", "b")]
        for i, (run_id, node_id) in enumerate(pairs):
            await settled(store.save(run_id, node_id, State(n=i)))
        for i, pair in enumerate(pairs):
            assert await settled(store.load_typed(*pair, State)) == State(n=i)

    @pytest.mark.parametrize("wrong", ["", "a\0b", "\ud800"], ids=["empty", "NUL", "surrogate"])
    async def test_what_is_no_id(self, store: Any, wrong: str) -> None:
        """The empty text, a NUL and lone surrogates are refused everywhere."""
        calls: tuple[Callable[[], Any], ...] = (
            lambda: store.get_run(wrong),
            lambda: store.attempts(wrong),
            lambda: store.input_of(wrong),
            lambda: store.save(wrong, "node", State()),
            lambda: store.save("run", wrong, State()),
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"run id|node id"):
                await settled(call())

    async def test_any_text_can_be_said(self, store: Any) -> None:
        """Messages may contain text that no encoding supports; the attempt is stored."""
        session = await begin(store)
        await fail(session, 0, message="bad \ud800 \0 é", failure=FailureClass.TERMINAL)
        await finish(session, "FAILED", "bad \ud800 \0 é")
        (attempt,) = store.attempts("run")
        assert (attempt.failure_class, attempt.outcome) == ("TERMINAL", "failure")
        assert "é" in attempt.message
        assert "é" in store.get_run("run").error

    async def test_runs_are_listed(self, store: Any) -> None:
        """list_runs returns the newest runs first, by pipeline and status, up to the limit."""
        for i in range(6):
            session = await begin(store, f"run-{i}")
            await asyncio.sleep(0.002)
            if i % 2:
                await finish(session, "FAILED", f"error {i}")
        assert [r.run_id for r in store.list_runs()] == [f"run-{i}" for i in range(5, -1, -1)]
        assert [r.run_id for r in store.list_runs(limit=2)] == ["run-5", "run-4"]
        assert [r.run_id for r in store.list_runs(status="FAILED")] == ["run-5", "run-3", "run-1"]
        assert [r.error for r in store.list_runs(status="FAILED", limit=1)] == ["error 5"]
        assert store.list_runs(pipeline="another") == []
        assert len(store.list_runs(pipeline="pipeline")) == 6

    async def test_runs_are_asked_for(self, store: Any) -> None:
        """run_page returns the runs that match all filters, newest first, and the same page by page."""
        for i in range(9):
            session = await begin(store, f"run-{i}", tags=("all", "é 1", *(["odd"] if i % 2 else [])))
            if i % 3 == 0:
                await fail(session, 0, "a", message="Too BUSY", failure=FailureClass.RECOVERABLE)
                cause = await fail(session, 0, f"n{i}", message="no", failure=FailureClass.TERMINAL)
                await finish(session, "FAILED" if i else "PARTIAL", f"Error {i}", cause)
            elif i % 3 == 1:
                await finish(session)
            await asyncio.sleep(0.002)

        def matches(limit: int = 2, **filters: Any) -> list[int]:
            listed: list[int] = []
            after = None
            while True:
                page = store.run_page(RunQuery(**filters), limit=limit, after=after)
                assert len(page.runs) <= limit
                listed += [int(run.run_id[4:]) for run in page.runs]
                if page.next is None:
                    return listed
                assert page.next != after
                after = page.next

        for limit in (1, 2, 3, 50):
            assert matches(limit) == [8, 7, 6, 5, 4, 3, 2, 1, 0]
            assert matches(limit, statuses=("FAILED", "PARTIAL")) == [6, 3, 0]
            assert matches(limit, statuses=("FAILED", "RUNNING")) == [8, 6, 5, 3, 2]
            assert matches(limit, tag="odd") == [7, 5, 3, 1]
            assert matches(limit, tag="odd", statuses=("FAILED",)) == [3]
            assert matches(limit, failure_class="TERMINAL", tag="all") == [6, 3, 0]
            assert matches(limit, failure_class="TERMINAL", node="n3") == [3]
            assert matches(limit, failure_class="RECOVERABLE", node="n3") == []
            if not has_codec(store):  # Encrypted text cannot be searched.
                assert matches(limit, text="ERROR 6") == [6]
            assert matches(limit, text="RUN-", statuses=("COMPLETED",)) == [7, 4, 1]
            assert matches(limit, pipeline="pipeline", tag="é 1", text="pipe") == list(range(8, -1, -1))
        assert (
            matches(pipeline="another")
            == matches(tag="od")
            == matches(text="%")
            == matches(failure_class="x")
            == []
        )
        third = store.get_run("run-3")
        assert matches(since_ms=third.started_ms) == [8, 7, 6, 5, 4, 3]
        assert matches(since_ms=third.started_ms, statuses=("FAILED",), failure_class="TERMINAL") == [6, 3]
        assert third.tags == ("all", "odd", "é 1")
        assert (third.failures, store.get_run("run-1").failures) == (2, 0)
        assert third.cause.node_id == "n3"
        assert store.get_run("run-1").cause is None
        for wrong in ("", "x", "1", "1.", ".1", "-1.1", "1e3.x", "9" * 99 + ".1", "²."):
            with pytest.raises(ValueError, match="must be the `next` of a page"):
                store.run_page(after=wrong)

    async def test_runs_are_looked_at_in_parts(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A page of a partial scan may be short or empty and has a cursor; no run is skipped."""
        for i in range(11):
            session = await begin(store, f"run-{i}", tags=("odd",) if i % 2 else ())
            if i % 5 == 0:
                await fail(session, 0, "a", failure=FailureClass.TERMINAL)
            await finish(session, "FAILED" if i % 3 == 0 else "COMPLETED", "x" if i % 5 == 0 else None)
            await asyncio.sleep(0.002)
        queries = (
            RunQuery(failure_class="TERMINAL"),
            RunQuery(text="run-1"),
            RunQuery(text="nowhere"),
            RunQuery(node="a", tag="odd"),
            RunQuery(statuses=("FAILED", "COMPLETED"), failure_class="TERMINAL"),
            RunQuery(statuses=("FAILED",), text="x"),
        )

        def matches(query: RunQuery, limit: int) -> list[str]:
            listed: list[str] = []
            page = store.run_page(query, limit=limit)
            while True:
                listed += [run.run_id for run in page.runs]
                if page.next is None:
                    return listed
                page = store.run_page(query, limit=limit, after=page.next)

        known = [matches(query, 50) for query in queries]
        assert known[0] == ["run-10", "run-5", "run-0"]
        for look_at in (1, 2, 3, 11):
            monkeypatch.setattr("stroma.checkpoint.durable.reader._MAX_FILTERED", look_at)
            for limit in (1, 2, 50):
                assert [matches(query, limit) for query in queries] == known, (look_at, limit)

    async def test_tags_belong_to_an_execution(self, store: Any) -> None:
        """A restarted run has the new tags; a resumed run has them in addition to its own."""
        await finish(await begin(store, tags=("a", "b", "a")), "PARTIAL")
        await finish(await begin(store, if_exists="resume", tags=("c", "b")), "PARTIAL")
        assert store.get_run("run").tags == ("a", "b", "c")
        await finish(await begin(store, tags=("d",)))
        assert store.get_run("run").tags == ("d",)
        for unknown in ("a", "\ud800"):
            assert store.run_page(RunQuery(tag=unknown)).runs == []
        assert len(store.run_page(RunQuery(tag="d")).runs) == 1
        await settled(store.delete("run"))
        assert store.run_page(RunQuery(tag="d")).runs == []
        await finish(await begin(store))
        assert store.get_run("run").tags == ()

    async def test_the_cause_is_the_recorded_attempt(self, store: Any) -> None:
        """The cause of a failed run is the attempt that stopped it, not another one with its text."""
        session = await begin(store)
        stopped = await fail(session, 1, "item", branch="1.1", ms=20, message="why")
        for attempt in range(1, 4):
            await fail(session, 1, "item", branch="0.1", attempt=attempt, ms=20, message="why")
        await fail(session, 1, "item", branch="1.1", attempt=1, ms=20, message="why")
        await fail(session, 1, "map", ms=90, message="why")
        await finish(session, "PARTIAL", "BudgetExceeded: x; the last failure: ValueError: why", stopped)
        record = store.get_run("run")
        cause = record.cause
        assert (cause.node_id, cause.position, cause.branch, cause.attempt) == ("item", 1, "1.1", 1)
        assert (cause.error_type, cause.message, cause.text) == ("ValueError", "why", "ValueError: why")
        (listed,) = store.run_page(RunQuery()).runs
        assert (listed.cause, record.failures) == (cause, 6)

    async def test_the_cause_may_be_an_early_failure(self, store: Any) -> None:
        """The cause is found however many other attempts failed after it."""
        session = await begin(store)
        stopped = await fail(session, 0, "first", branch="a:#0", message="first")
        for i in range(30):
            await fail(session, 0, "later", branch=f"b#{i}", message="later")
        await finish(session, "FAILED", "ValueError: first", stopped)
        assert store.get_run("run").cause.branch == "a:#0"

    async def test_the_cause_ends_with_its_execution(self, store: Any) -> None:
        """A resumed or restarted run has the cause of its own end, or none; a claim given back keeps it."""
        session = await begin(store)
        await finish(session, "FAILED", "x", await fail(session, 0, "first", message="why"))
        await settled((await begin(store, if_exists="resume")).give_back())
        assert store.get_run("run").cause.node_id == "first"
        await finish(await begin(store, if_exists="resume"), "FAILED", "ValueError: raised by the body")
        assert store.get_run("run").cause is None
        await finish(await begin(store, if_exists="restart"), "PARTIAL", "ValueError: why")
        assert store.get_run("run").cause is None

    async def test_history_page_by_page(self, store: Any) -> None:
        """attempt_page returns the rows of attempts() in pages, without outputs; output_of returns one."""
        session = await begin(store)
        for i in range(5):
            await fail(session, i, f"n{i}")
            await commit(session, i, State(n=i), f"n{i}", attempt=2)
            await commit(session, i, State(text="x" * i), "child", branch=f"{i}:é")
        all_of_them = store.attempts("run")
        for limit in (1, 4, 15, 100):
            listed: list[Any] = []
            after = None
            while True:
                page = store.attempt_page("run", limit=limit, after=after)
                listed += page.attempts
                after = page.next
                if after is None:
                    break
                assert len(page.attempts) == limit
            assert [a.output for a in listed] == [None] * 15
            # Stored size: a codec may enlarge it.
            sizes = [a.output_bytes for a in all_of_them]
            assert [a.output_bytes for a in listed] == sizes
            assert [size is None for size in sizes] == [a.output is None for a in all_of_them]
            assert [
                replace(a, output=b.output) for a, b in zip(listed, all_of_them, strict=True)
            ] == all_of_them
        assert [a.attempt for a in store.attempts_at("run", 3)] == [1, 2]
        assert [a.node_id for a in store.attempts_at("run", 3, "3:é")] == ["child"]
        assert store.attempts_at("run", 3, "3:") == store.attempts_at("nobody", 0) == []
        assert schema_of(State).decode(store.output_of("run", 3)) == State(n=3)
        assert schema_of(State).decode(store.output_of("run", 3, "3:é")) == State(text="xxx")
        assert (
            store.output_of("run", 9)
            is store.output_of("run", 3, "x")
            is store.output_of("nobody", 0)
            is None
        )
        assert store.attempt_page("nobody") == ([], None)
        for wrong in ("", "x", "1:2:3", "a:0:0:0:"):
            with pytest.raises(ValueError, match="must be the `next` of a page"):
                store.attempt_page("run", after=wrong)

    async def test_attempts_are_summed_up(self, store: Any) -> None:
        """tally() sums attempts and their waste since a time by pipeline, node, model, class and duration."""
        for name in ("one", "two"):
            session = await begin(store, name)
            await fail(session, 0, "n", tokens=4, cost=0.25, ms=7, failure=FailureClass.TERMINAL)
            await commit(session, 0, State(n=1), "n", attempt=2, tokens=4, cost=0.5, ms=9)
            await finish(session)
        tallies = sorted(store.tally(0, 10**15), key=lambda one: one.failure_class or "")
        assert [(t.bucket, t.pipeline, t.node_id, t.model, t.failure_class, t.attempts) for t in tallies] == [
            (0, "pipeline", "n", "model", None, 2),
            (0, "pipeline", "n", "model", "TERMINAL", 2),
        ]
        assert [(t.tokens, t.cost_pico, t.wasted_pico, t.duration_ns, t.longest_ns) for t in tallies] == [
            (8, 10**12, 0, 18_000_000, 9_000_000),
            (8, 5 * 10**11, 5 * 10**11, 14_000_000, 7_000_000),
        ]
        assert [t.digits for t in tallies] == [790, 770]  # 9 and 7 ms: seven digits, the first two of them.
        assert sum(t.attempts for t in store.tally(0, 10**15, runs=1)) == 2
        assert store.tally(store.get_run("two").started_ms + 1, 1000) == []

    async def test_a_collected_failure_is_not_an_attempt(self, store: Any) -> None:
        """The commit of an item that failed is not listed, counted or summed up beside its failed attempt."""
        session = await begin(store)
        await fail(session, 0, "n", branch="1", failure=FailureClass.TERMINAL)
        collected = row(0, "n", branch="1")._replace(outcome=COLLECTED)
        item = ItemFailure(index=1, node_id="n", failure_class=FailureClass.TERMINAL, message="no")
        await settled(session.record(collected, schema_of(ItemFailure), item, StepCall(0, b"item")))
        await finish(session)
        for attempts in (
            store.attempts("run"),
            store.attempt_page("run").attempts,
            store.attempts_at("run", 0, "1"),
        ):
            assert [(one.branch, one.outcome) for one in attempts] == [("1", "failure")]
        assert [(one.failure_class, one.attempts) for one in store.tally(0, 10**15)] == [("TERMINAL", 1)]
        assert (store.get_run("run").failures, store.get_run("run").commits) == (1, 1)
        again = await begin(store, if_exists="resume")
        assert again.restored[0, "1"].is_failed_item
        await finish(again)

    async def test_where_attempts_failed(self, store: Any) -> None:
        """failure_site_of returns the site of the last failure at a place, until the execution is removed."""
        session = await begin(store)
        for number in (1, 2):
            failed = row(3, "n", branch="1", attempt=number, failure=FailureClass.AMBIGUOUS)
            data = b'[[["flow.py", %d, "work", "raise it"]], [["lib.py", 1, "call", ""]]]' % number
            session.record_failure_site(3, "1", number, failed.started_ns, partial(bytes, data))
            await settled(session.record(failed, None, None))
        site = store.failure_site_of("run", 3, "1")
        if has_codec(store):
            assert site is None, "source lines must not be stored beside encrypted payloads"
            return
        assert (site.attempt, site.started_ns) == (2, failed.started_ns)
        assert site.own == (("flow.py", 2, "work", "raise it"),)
        assert site.others == (("lib.py", 1, "call", ""),)
        assert store.failure_site_of("run", 3) is store.failure_site_of("nobody", 3, "1") is None
        await finish(session, "FAILED")
        await begin(store)
        assert store.failure_site_of("run", 3, "1") is None

    async def test_rejected_outputs(self, store: Any) -> None:
        """rejected_of returns the output that broke its contract in each attempt until it is removed."""
        session = await begin(store)
        rows = [row(3, "n", branch="1", attempt=n, failure=FailureClass.TERMINAL) for n in (1, 2, 3)]
        for failed in rows[:2]:
            output = RejectedOutput(failed.attempt, False, (Complaint(("a", 0), "é\ud800\0"),), 4)
            session.record_rejected(3, "1", failed.started_ns, output.encode())
            await settled(session.record(failed, None, None))
        await settled(session.record(rows[2], None, None))
        for number, failed in enumerate(rows[:2], 1):
            stored = store.rejected_of("run", 3, "1", failed.started_ns)
            assert stored == RejectedOutput(number, False, (Complaint(("a", 0), "é\ud800\0"),), 4)
        first = rows[0].started_ns
        assert store.rejected_of("run", 3, "1", rows[2].started_ns) is None
        assert store.rejected_of("run", 3, "", first) is store.rejected_of("nobody", 3, "1", first) is None
        await finish(session, "FAILED")
        await finish(await begin(store, if_exists="resume"))
        assert store.rejected_of("run", 3, "1", first) is not None
        await begin(store)
        assert store.rejected_of("run", 3, "1", first) is None

    async def test_what_it_says_of_itself(self, store: Any) -> None:
        """facts() names the system, the formats, and the clock of leases."""
        await begin(store)
        facts = store.facts()
        assert facts.system
        assert facts.format >= 1
        assert facts.clock_ms is None or abs(facts.clock_ms - time.time() * 1000) < 3_600_000

    async def test_runs_are_found_by_their_beginning(self, store: Any) -> None:
        """find_run returns ids with a prefix, newest first; a complete id matches only itself."""
        for run_id in ("ab", "abc", "abd", "b", "a%", "a_", "A", "é"):
            await finish(await begin(store, run_id))
            await asyncio.sleep(0.002)
        assert store.find_run("ab") == ["ab"]
        assert store.find_run("abc") == ["abc"]
        assert store.find_run("a") == ["a_", "a%", "abd", "abc", "ab"]
        assert store.find_run("a", limit=2) == ["a_", "a%"]
        assert store.find_run("a%") == ["a%"]
        assert (store.find_run("zz"), store.find_run("last")) == ([], ["é"])

    async def test_history_is_told_in_order(self, store: Any) -> None:
        """attempts() returns every attempt with usage, output and exception type, groups first."""
        session = await begin(store)
        await fail(session, 0, "a", tokens=4, cost=0.25, ms=7, message="no")
        await commit(session, 0, State(n=1), "a", attempt=2)
        group = row(1, "g", output=("", 3, 0.0, b""))  # a group starts before its children
        await commit(session, 1, State(n=2), "b", branch="0")
        await settled(session.record(group, schema_of(State), State(n=3)))
        listed = store.attempts("run")
        places = [(a.node_id, a.branch, a.attempt) for a in listed]
        assert places == [("a", "", 1), ("a", "", 2), ("g", "", 1), ("b", "0", 1)]
        first = listed[0]
        assert (first.tokens, first.output_tokens, first.cost_usd, first.duration_ms) == (4, 2, 0.25, 7.0)
        assert (first.outcome, first.failure_class, first.message) == ("failure", "RECOVERABLE", "no")
        assert (first.error_type, first.model) == ("ValueError", "model")
        outputs = [None if a.output is None else schema_of(State).decode(a.output) for a in listed]
        assert outputs == [None, State(n=1), State(n=3), State(n=2)]

    async def test_the_input_is_kept(self, store: Any) -> None:
        """input_of returns the input of the last execution, or raises CheckpointNotFound for unknown runs."""
        await finish(await begin(store, state=State(n=1)))
        await finish(await begin(store, state=State(text="é")))
        assert schema_of(State).decode(store.input_of("run")) == State(text="é")
        with pytest.raises(CheckpointNotFound, match="no run 'other'"):
            store.input_of("other")

    async def test_states_are_saved_and_loaded(self, store: Any) -> None:
        """save, load, load_typed and delete keep the last state of a node of a run."""
        assert await settled(store.load("run", "a")) is None
        await settled(store.save("run", "a", State(n=1)))
        await settled(store.save("run", "a", State(n=2)))
        await settled(store.save("run", "b", State(n=3)))
        assert await settled(store.load("run", "a")) == State(n=2)
        assert await settled(store.load_typed("run", "b", State)) == State(n=3)
        assert store.get_run("run") is None
        session = await begin(store, if_exists="resume")
        assert (session.execution, session.continued, dict(session.restored)) == (1, False, {})
        session.abandon()
        assert await settled(store.load("run", "a")) == State(n=2)
        await settled(store.delete("run"))
        assert await settled(store.load("run", "a")) is None

    async def test_committed_outputs_are_loaded_by_node(self, store: Any) -> None:
        """load() returns the newest of the commits of the last execution and the saved states."""
        session = await begin(store)
        await commit(session, 0, State(n=1), "a")
        await commit(session, 1, State(n=2), "a")
        assert await settled(store.load_typed("run", "a", State)) == State(n=2)
        await settled(store.save("run", "a", State(n=3)))
        assert await settled(store.load_typed("run", "a", State)) == State(n=3)

    async def test_a_state_of_another_class_is_corrupt(self, store: Any) -> None:
        """A state that does not satisfy the schema it is read with is CorruptCheckpoint."""
        await settled(store.save("run", "a", State(text="x")))

        class Strict(BaseModel):
            number: int

        with pytest.raises(CorruptCheckpoint, match=r"'a'.*'run'"):
            await settled(store.load_typed("run", "a", Strict))
        with pytest.raises(TypeError, match="schema must be a BaseModel type"):
            await settled(store.load_typed("run", "a", int))
        with pytest.raises(TypeError, match="a state must be a pydantic model, got dict"):
            await settled(store.save("run", "a", {"text": "x"}))
