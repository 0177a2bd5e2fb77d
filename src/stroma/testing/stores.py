"""What every journal store must do, as tests to inherit."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel

from stroma.checkpoint import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    Committed,
    CorruptCheckpoint,
    Fenced,
    InMemoryStore,
    PipelineChanged,
    RunBusy,
    RunExists,
    RunQuery,
    RunRequest,
    StepCall,
    StoreError,
    Waiting,
)
from stroma.checkpoint.protocols import OF_MAP
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.restore import read_output
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure
from stroma.trace.events import AttemptRow, AttemptUsage, Failed

__all__ = ["JournalStoreTests", "State", "begin", "commit", "fail", "finish", "restored", "row"]

_STARTS = itertools.count(1_700_000_000_000_000_000, 1_000_000)

#: How often two clients do the same at one moment.
_ROUNDS = 20

#: Ids that are hard to keep apart, to quote or to order.
HARD_IDS = (
    "a", "a:b", "a:", ":b", "*", "?", "[a]", "/", "..", "a/b", "a\nb", " ", "a ", "'", '"', "%", "_", "\\", "{a}", "}{",
    "é", "e\u0301", "🦜", "\u00a0", "A", "last", "\x7f", "\ufffe", "\U0010ffff", "x" * 3000, "x" * 2999 + "y",
)  # fmt: skip


class State(BaseModel):
    text: str = ""
    n: int = 0
    value: float = 0.0
    data: bytes = b""


class Other(BaseModel):
    other: list[int] = []


def row(
    position: int = 0,
    node: str = "node",
    *,
    attempt: int = 1,
    branch: str = "",
    tokens: int = 0,
    cost: float = 0.0,
    ms: int = 0,
    failure: FailureClass | None = None,
    message: str = "",
    output: Any = None,
    schema: Schema | None = None,
) -> AttemptRow:
    """One attempt as the engine records it; each call has a later start. ``schema``: of its output, State's if not given."""
    reads = schema or schema_of(State)
    return AttemptRow(
        node, attempt, next(_STARTS), ms * 1_000_000, (), output, "success" if failure is None else "failure",
        None if failure is None else Failed(failure, message, None, "ValueError"),
        AttemptUsage(tokens, tokens // 2, cost, "model" if tokens else None), position, branch, None,
        (reads, reads, None), None, ms * 1_000_000,
    )  # fmt: skip


async def _asks(store: Any, run_id: str) -> Waiting:
    """A run that is SUSPENDED: what its node at position 1 waits for."""
    asked = Waiting(1, "", "ask", "may I?", "module:Model")
    session = await begin(store, run_id)
    await commit(session, 0, State(n=1))
    await settled(session.suspend(row(1, "ask"), asked))
    await finish(session, "SUSPENDED", "may I?")
    return asked


async def _texts(session: Any, position: int, branches: list[str]) -> dict[str, str]:
    """The texts of the states that are committed in some branches."""
    kept = session.committed(position, branches)
    found = await kept if inspect.isawaitable(kept) else kept
    read = {branch: read_output(schema_of(State), commit, None) for branch, commit in found.items()}
    return {branch: state.text for branch, state in read.items() if isinstance(state, State)}


async def begin(store: Any, run_id: str = "run", state: BaseModel | None = None, **request: Any) -> Any:
    """Open a run; the keywords are fields of RunRequest."""
    state = State() if state is None else state
    opened = store.open_run(RunRequest(run_id, "pipeline", state, schema_of(type(state)), **request))
    return await settled(opened)


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def commit(session: Any, position: int, state: BaseModel, node: str = "node", **facts: Any) -> None:
    """Record an attempt that committed a state."""
    schema = schema_of(type(state))
    attempt = row(position, node, output=schema.snapshot(state), schema=schema, **facts)
    await settled(session.record(attempt, schema, state))


async def fail(session: Any, position: int, node: str = "node", **facts: Any) -> None:
    """Record an attempt that failed."""
    facts.setdefault("failure", FailureClass.RECOVERABLE)
    await settled(session.record(row(position, node, **facts), None, None))


async def finish(session: Any, status: str = "COMPLETED", error: str | None = None) -> None:
    await settled(session.end(status, error))


def restored(session: Any, model: type[BaseModel] = State) -> dict[tuple[int, str], BaseModel]:
    """What a session found committed."""
    return {at: schema_of(model).restore(found.output) for at, found in session.restored.items()}


class JournalStoreTests:
    """Inherit, and give a fixture ``store`` that makes a new store of yours, empty, for each test::

        class TestMyStore(JournalStoreTests):
            @pytest.fixture
            async def store(self):
                async with MyStore(...) as store:
                    yield store

    A store that processes can share gives a fixture ``other`` too: a second client of the same data.
    pytest-asyncio must be in auto mode, or your class be marked ``asyncio``.
    """

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError("give a fixture `store` that makes an empty store")

    @pytest.fixture
    def other(self, store: Any) -> Any:
        """Another client of the same data, as another process has one; override it if yours can be shared."""
        return store

    # ------------------------------------------------------------------ executions

    async def test_a_new_run(self, store: Any) -> None:
        """A run id that was never used begins execution 1, with nothing in it."""
        session = await begin(store)
        assert (session.execution, session.continued, session.finished) == (1, False, None)
        assert (dict(session.restored), session.prior.tokens, session.prior.cost_usd) == ({}, 0, 0.0)
        run = store.get_run("run")
        assert (run.status, run.pipeline, run.execution, run.nodes) == ("RUNNING", "pipeline", 1, 0)

    async def test_commits_come_back(self, store: Any) -> None:
        """A resume finds every commit by its position and branch, as it was, and nothing else."""
        session = await begin(store)
        states = {
            (0, ""): State(text="é🦜\u2028\x00", n=2**70, value=float("inf"), data=b"\x00\xff"),
            (1, "0"): State(n=-1),
            (1, "0.1"): State(text="x" * 10_000),
            (1, ""): State(),
            (7, ""): State(value=-0.0),
        }
        for (position, branch), state in states.items():
            await commit(session, position, state, f"n{position}", branch=branch)
        await fail(session, 8)
        await finish(session, "PARTIAL", "gave up")
        again = await begin(store, if_exists="resume")
        assert (again.execution, again.continued) == (1, True)
        assert restored(again) == states
        assert {at: found.node_id for at, found in again.restored.items()} == {
            (position, branch): f"n{position}" for position, branch in states
        }
        assert {found.contract for found in again.restored.values()} == {schema_of(State).fingerprint}

    async def test_all_usage_counts(self, store: Any) -> None:
        """What an execution used is the sum over its attempts, failed ones too; a group's children add no latency."""
        session = await begin(store)
        await fail(session, 0, tokens=3, cost=0.1, ms=10)
        await commit(session, 0, State(), tokens=5, cost=0.2, ms=20, attempt=2)
        await commit(session, 1, State(), tokens=7, cost=1e-12, ms=40, branch="0")
        await finish(session, "PARTIAL")
        prior = (await begin(store, if_exists="resume")).prior
        assert (prior.tokens, prior.latency_ms) == (15, 30.0)
        assert abs(prior.cost_usd - 0.300000000001) < 1e-13
        run = store.get_run("run")
        assert (run.tokens, round(run.cost_usd, 9), run.nodes) == (15, 0.3, 1)

    async def test_an_attempt_that_is_sent_again_counts_once(self, store: Any) -> None:
        """The acknowledgement of a commit may be lost; sending it again changes nothing."""
        session = await begin(store)
        attempt = row(0, tokens=5, cost=1.0, output=("", 1, 0.0, b""))
        failed = row(1, tokens=2, failure=FailureClass.AMBIGUOUS)
        schema = schema_of(State)
        for _ in range(3):
            await settled(session.record(attempt, schema, State(n=1)))
            await settled(session.record(failed, None, None))
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert (again.prior.tokens, again.prior.cost_usd) == (7, 1.0)
        assert restored(again) == {(0, ""): State(n=1)}
        assert [a.attempt for a in store.attempts("run")] == [1, 1]

    async def test_a_restart_is_a_new_execution(self, store: Any) -> None:
        """Opening a run again begins an execution with commits and totals of its own."""
        first = await begin(store)
        await commit(first, 0, State(n=1), tokens=10, cost=0.5)
        await finish(first)
        second = await begin(store, state=State(text="other"))
        assert (second.execution, second.continued, dict(second.restored)) == (2, False, {})
        assert (second.prior.tokens, store.get_run("run").tokens) == (0, 0)
        await finish(second, "CANCELLED")
        third = await begin(store, state=State(text="other"), if_exists="resume")
        assert (third.execution, dict(third.restored)) == (2, {})

    async def test_discarded_commits_are_gone_and_paid_for(self, store: Any) -> None:
        """``discard_from`` forgets the outputs from a position on; what they cost stays in the books."""
        session = await begin(store)
        for position in range(4):
            await commit(session, position, State(n=position), tokens=1)
        await finish(session)
        again = await begin(store, if_exists="resume", discard_from=2, state=State(text="any input will do"))
        assert restored(again) == {(0, ""): State(n=0), (1, ""): State(n=1)}
        assert again.prior.tokens == 4
        await commit(again, 2, State(n=20), tokens=1)
        await finish(again)
        last = await begin(store, if_exists="resume")
        assert restored(last)[2, ""] == State(n=20)
        assert sorted(last.restored) == [(0, ""), (1, ""), (2, "")]
        assert len(store.attempts("run")) == 5

    async def test_a_request_that_is_refused_changes_nothing(self, store: Any) -> None:
        """What ``accept`` raises comes out, and the run is as it was."""
        session = await begin(store)
        await commit(session, 0, State(n=1))
        await finish(session, "PARTIAL", "why")

        def refuse(position: int, branch: str, committed: Committed) -> None:
            assert (position, branch, committed.node_id) == (0, "", "node")
            raise PipelineChanged("this is refused; give another")

        for discard_from in (None, 1):
            with pytest.raises(PipelineChanged, match="this is refused"):
                await begin(store, if_exists="resume", accept=refuse, discard_from=discard_from)
        run = store.get_run("run")
        assert (run.status, run.error, run.execution, run.nodes) == ("PARTIAL", "why", 1, 1)
        assert len((await begin(store, if_exists="resume")).restored) == 1

    async def test_another_input_is_refused(self, store: Any) -> None:
        """A run is continued with the input it was begun with, or not at all."""
        await finish(await begin(store, state=State(n=1)), "PARTIAL")
        for other in (State(n=2), Other()):
            with pytest.raises(PipelineChanged, match="started with another input"):
                await begin(store, if_exists="resume", state=other)
        assert (await begin(store, if_exists="resume", state=State(n=1))).continued

    async def test_steps_of_plain_code(self, store: Any) -> None:
        """Which call of its id a step was, and what it was given, comes back."""
        session = await begin(store)
        schema = schema_of(State)
        for position, call in enumerate((StepCall(0, b"{}"), StepCall(1, None), None)):
            await settled(session.record(row(position, output=("", 0, 0.0, b"")), schema, State(), call))
        await finish(session)
        again = await begin(store, if_exists="resume")
        assert [again.restored[i, ""].step for i in range(3)] == [StepCall(0, b"{}"), StepCall(1, None), None]

    async def test_places_of_plain_code(self, store: Any) -> None:
        """The identity of a step is kept with its first attempt, or the first one inside it, whatever became of that."""
        session = await begin(store)
        assert session.places == {}
        for position, identity in ((4, "a#0"), (2, "1/a#0"), (3, "b#0@77")):
            session.note_call(position, identity)
        await commit(session, 4, State())
        await commit(session, 3, State(), branch="0")
        await settled(session.record(row(2), None, None))
        assert {a.position: a.identity for a in store.attempts("run")} == {4: "a#0", 2: "1/a#0", 3: "b#0@77"}
        assert store.attempts("run")[1].idempotency_key("run", 1) == "run:1:b#0@77:0"
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert dict(again.places) == {"a#0": 4, "1/a#0": 2, "b#0@77": 3}
        await commit(again, 2, State())
        assert {a.identity for a in store.attempts_at("run", 2)} == {"1/a#0"}
        await commit(again, 3, State())
        await finish(again)
        await settled(store.fork("run", "fork", 4))
        assert dict((await begin(store, "fork", if_exists="resume")).places) == {"1/a#0": 2, "b#0@77": 3}
        assert (await begin(store)).places == {}

    # ------------------------------------------------------------------ many items

    async def test_items_are_read_a_few_at_a_time(self, store: Any) -> None:
        """What is apart is not restored at once; committed() gives it, also what was committed since."""
        session = await begin(store)
        await commit(session, 0, State(n=7))
        for branch in ("0", "1", "10", "1.0", "2.1"):
            await commit(session, 1, State(text=branch), branch=branch)
        await commit(session, 2, State(n=9), branch="1")
        assert await _texts(session, 1, ["10", "0", "3", ""]) == {"10": "10", "0": "0"}
        assert await _texts(session, 1, []) == {}
        await finish(session, "PARTIAL")
        for apart, there in (
            (((1, ""),), {(0, ""), (2, "1")}),
            (((1, "1."), (2, "")), {(0, ""), (1, "0"), (1, "1"), (1, "10"), (1, "2.1"), (1, "3")}),
        ):
            again = await begin(store, if_exists="resume", lazily_loaded=apart)
            assert again.restored.keys() == there
            assert await _texts(again, 1, ["1", "1.0", "2.1"]) == {"1": "1", "1.0": "1.0", "2.1": "2.1"}
            await commit(again, 1, State(text="since"), branch="3")
            assert await _texts(again, 1, ["3"]) == {"3": "since"}
            await finish(again, "PARTIAL")
        anew = await begin(store)
        assert await _texts(anew, 1, ["0", "1"]) == {}

    async def test_failed_items_and_what_follows_them_are_forgotten_if_asked(self, store: Any) -> None:
        """retry_failed discards what comes after a map whose items failed, and restores neither it nor those."""
        session = await begin(store)
        failed = ItemFailure(index=1, node_id="node", failure_class=FailureClass.TERMINAL, message="no")
        await commit(session, 0, State(n=1))
        await commit(session, 1, State(n=2), branch="0")
        late = row(1, branch="1")
        await settled(session.record(late, schema_of(ItemFailure), failed, StepCall(0, b"item x")))
        await settled(session.record(row(1), schema_of(State), State(), StepCall(1, OF_MAP + b"2")))
        await commit(session, 2, State(n=3))
        await finish(session)
        kept = await begin(store, if_exists="resume")
        assert kept.restored.keys() == {(0, ""), (1, "0"), (1, "1"), (1, ""), (2, "")}
        assert (kept.restored[1, "1"].is_failed_item, kept.restored[1, "0"].is_failed_item) == (True, False)
        assert [kept.restored[at].failed_items for at in ((1, ""), (1, "1"), (0, ""))] == [1, 0, 0]
        await finish(kept)
        again = await begin(store, if_exists="resume", retry_failed=True)
        assert again.restored.keys() == {(0, ""), (1, "0")}
        await finish(again, "PARTIAL")
        last = await begin(store, if_exists="resume")
        assert last.restored.keys() == {(0, ""), (1, "0"), (1, "1"), (1, "")}

    async def test_the_items_of_a_map_are_read(self, store: Any) -> None:
        """map_items() gives what a map committed of its items, in order, once it is committed itself."""
        session = await begin(store)
        for index in (2, 0, 1, 10):
            await commit(session, 0, State(n=index), branch=f"1.{index}")
        with pytest.raises(CheckpointNotFound, match="has no completed map 'map'"):
            await asyncio.to_thread(store.map_items, "run", "map", 0, 10)
        made = row(0, "map", branch="1")
        await settled(session.record(made, schema_of(State), State(), StepCall(0, OF_MAP + b"3")))
        for first, count, there in ((0, 9, [0, 1, 2]), (1, 1, [1]), (3, 5, [])):
            found = await asyncio.to_thread(store.map_items, "run", "map", first, count)
            assert [index for index, _ in found] == there
            assert [read_output(schema_of(State), kept, None) for _, kept in found] == [
                State(n=index) for index in there
            ]

    # ------------------------------------------------------------------ one owner

    async def test_a_run_has_one_owner(self, store: Any) -> None:
        """While somebody holds a run, others are told who, and whether their input is the same."""
        session = await begin(store, state=State(n=1))
        for way in ("restart", "resume", "return", "error"):
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
        """A stale owner's commits, failures and its end are refused, and leave no trace."""
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
        """Deleting a run fences its owner off, also from a new run of the same id."""
        stale = await begin(store)
        await commit(stale, 0, State(n=1))
        await settled(store.delete("run"))
        assert store.get_run("run") is None
        assert store.attempts("run") == []
        with pytest.raises(Fenced):
            await commit(stale, 1, State())
        fresh = await begin(store)
        assert (fresh.execution, dict(fresh.restored)) == (1, {})
        with pytest.raises(Fenced):
            await commit(stale, 1, State())
        assert store.get_run("run").nodes == 0

    async def test_an_owner_that_gives_up_without_a_word(self, store: Any) -> None:
        """A session that is abandoned in this process keeps nobody out of the run."""
        session = await begin(store)
        await commit(session, 0, State(n=1))
        session.abandon()
        assert store.get_run("run").holder is None
        assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=1)}

    async def test_plain_code_takes_over_from_itself(self, store: Any) -> None:
        """What does not say when its run ends keeps nobody of the same process out of it."""
        stale = await begin(store, ends=False)
        await commit(stale, 0, State(n=1))
        assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=1)}
        with pytest.raises(Fenced):
            await commit(stale, 1, State())

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

    async def test_what_a_run_that_was_waited_for_came_to(self, store: Any) -> None:
        """Whoever attached gets the end of the run, whatever it is; a run that nobody ended is theirs to continue."""
        session = await begin(store)
        await finish(session, "FAILED", "it broke")
        attached = await begin(store, if_exists="attach")
        assert attached.finished[:2] == ("FAILED", "it broke")
        (await begin(store)).abandon()
        attached = await begin(store, if_exists="attach")
        assert (attached.finished, attached.continued) == (None, True)

    # ------------------------------------------------------------------ asked from elsewhere

    async def test_what_nodes_wait_for(self, store: Any) -> None:
        """A question is kept with its attempt, an answer with its question; both belong to the execution."""
        session = await begin(store)
        asked = Waiting(1, "0.2", "ask é", "may I?", "module:Model")
        await commit(session, 0, State(n=1))
        await settled(session.suspend(row(1, "ask é", branch="0.2", tokens=3), asked))
        await finish(session, "SUSPENDED", "may I?")
        assert store.waiting("run") == [asked]
        assert [a.tokens for a in store.attempts("run")] == [0, 3]
        with pytest.raises(StoreError, match="no longer waiting for an answer"):
            await settled(store.signal("run", asked._replace(position=0, payload=b"1")))
        for _ in range(2):  # The same answer once more is no other one.
            await settled(store.signal("run", asked._replace(payload=b'{"yes":"\xc3\xa9"}')))
        with pytest.raises(StoreError, match="no longer waiting for an answer"):
            await settled(store.signal("run", asked._replace(payload=b'{"yes":"no"}')))
        again = await begin(store, if_exists="resume")
        assert again.waiting == {(1, "0.2"): asked._replace(payload=b'{"yes":"\xc3\xa9"}')}
        assert restored(again) == {(0, ""): State(n=1)}
        await settled(again.suspend(row(1, "ask é", branch="0.2"), asked._replace(reason="and now?")))
        await finish(again, "SUSPENDED")
        assert [(w.reason, w.payload) for w in store.waiting("run")] == [("and now?", None)]
        earlier = await begin(store, if_exists="resume", discard_from=1)
        assert dict(earlier.waiting) == {}
        await settled(earlier.suspend(row(1, "ask é"), asked))
        await finish(earlier, "SUSPENDED")
        assert dict((await begin(store)).waiting) == {}
        assert store.waiting("run") == []
        with pytest.raises(StoreError, match="no longer waiting for an answer"):
            await settled(store.signal("run", asked._replace(payload=b"1")))
        assert store.waiting("run") == []

    async def test_a_stale_owner_asks_nothing(self, store: Any) -> None:
        """A question of somebody who was taken over from is refused."""
        stale = await begin(store)
        await begin(store, if_running="take_over")
        with pytest.raises(Fenced):
            await settled(stale.suspend(row(0), Waiting(0, "", "node", "may I?", "")))
        assert store.waiting("run") == []
        with pytest.raises(CheckpointNotFound):
            await settled(store.signal("unknown", Waiting(0, "", "node", "may I?", "", b"1")))

    async def test_the_trace_context_belongs_to_the_execution(self, store: Any) -> None:
        """What the first process noted is told to those who go on, and to no other execution."""
        first = await begin(store)
        assert first.traceparent is None
        first.note_traceparent("00-" + "a" * 32 + "-" + "b" * 16 + "-01")
        await commit(first, 0, State())
        await finish(first, "PARTIAL")
        again = await begin(store, if_exists="resume")
        assert again.traceparent == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        assert restored(again) == {(0, ""): State()}
        await finish(again)
        assert (await begin(store)).traceparent is None

    async def test_end_hooks_are_due_until_they_are_delivered(self, store: Any) -> None:
        """Attempts whose hooks may not have been told are handed to those who go on, and to nobody once they were."""
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
            assert [(r.position, r.branch, r.node_id) for r in due] == [
                (0, "", "node"),
                (1, "0.2", "b é"),
                (2, "", "c"),
            ]
            assert [(usage.tokens, usage.cost_usd) for usage in usages] == [(3, 0.0), (5, 0.25), (0, 0.0)]
            again.delivered(due[1])
            await commit(again, 3, State())  # What is posted before is done before.
            again.abandon()
            third = await begin(store, if_exists="resume", deliver=True)
            assert [r.position for r in third.undelivered] == [0, 2, 3]
            third.abandon()
        assert list((await begin(store, deliver=True)).undelivered) == []
        assert (
            list((await begin(store, if_exists="resume", if_running="take_over", deliver=True)).undelivered)
            == []
        )

    async def test_a_held_run_is_asked_to_end(self, store: Any) -> None:
        """cancel() reaches whoever holds the run, once; the next owner is not told."""
        session = await begin(store)
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        session.on_cancel = lambda: loop.call_soon_threadsafe(asked.set)
        assert await settled(store.cancel("run")) is True
        await asyncio.wait_for(asked.wait(), 10)
        await finish(session, "CANCELLED")
        again = await begin(store, if_exists="resume")
        told: list[int] = []
        again.on_cancel = lambda: told.append(1)
        await asyncio.sleep(1.5)
        assert told == []

    async def test_a_failure_that_a_retry_has_fixed(self, store: Any) -> None:
        """While a run runs or waits, its cause is no failure that a later attempt at its place has fixed."""
        session = await begin(store)
        await fail(session, 0, message="first")
        assert store.get_run("run").cause.message == "first"
        await commit(session, 0, State(), attempt=2)
        assert store.get_run("run").cause is None
        await fail(session, 1, branch="0", message="second")
        assert store.get_run("run").cause.message == "second"
        waits = Waiting(1, "0", "node", "why", "")
        asked = row(1, branch="0", attempt=2)
        await settled(session.suspend(asked._replace(outcome="suspended"), waits))
        await finish(session, "SUSPENDED", "why")
        record = store.get_run("run")
        assert (record.cause, record.failures) == (None, 2)

    async def test_a_cancel_outlives_its_owner(self, store: Any) -> None:
        """Where cancel() was acknowledged and the owner died or stopped before it knew, whoever goes on finds it CANCELLED."""
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
            assert again.finished is not None
            assert again.finished.status == "CANCELLED"
            await finish(again, "COMPLETED")
            assert store.get_run(run_id).status == "CANCELLED"
            assert restored(again) == {(0, ""): State(n=1)}
            with pytest.raises(Fenced):
                await commit(session, 1, State())
            # It was cancelled once: who then asks for more gets it.
            more = await begin(store, run_id, if_exists="resume")
            assert (more.finished, more.continued) == (None, True)
            more.abandon()

    async def test_a_cancel_of_an_execution_is_none_of_the_next(self, store: Any) -> None:
        """A cancel() that came too late, or concerned an execution that is begun anew, ends nothing later."""
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
        """cancel() marks a run that was interrupted, leaves one that has ended, and knows no other."""
        with pytest.raises(CheckpointNotFound):
            await settled(store.cancel("run"))
        await finish(await begin(store), "INTERRUPTED")
        assert await settled(store.cancel("run")) is True
        assert store.get_run("run").status == "CANCELLED"
        assert await settled(store.cancel("run")) is False
        await finish(await begin(store), "COMPLETED")
        assert await settled(store.cancel("run")) is False
        assert store.get_run("run").status == "COMPLETED"

    async def test_forks(self, store: Any) -> None:
        """A fork has what its parent committed before a position, at no cost, and leaves the parent as it is."""
        session = await begin(store, state=State(n=-1))
        for position in range(4):
            await commit(session, position, State(n=position), f"n{position}", tokens=5)
        await commit(session, 2, State(n=20), "child", branch="0")
        await finish(session)
        before = store.get_run("run")
        schema = schema_of(State)
        await settled(store.fork("run", "f", 3, edited=(schema, State(n=99))))
        assert store.get_run("run") == before
        made = store.get_run("f")
        assert (made.parent, made.execution, made.status, made.tokens, made.nodes, made.holder) == (
            "run", 1, "INTERRUPTED", 0, 3, None,
        )  # fmt: skip
        session = await begin(store, "f", State(n=-1), if_exists="resume")
        assert restored(session) == {
            (0, ""): State(n=0), (1, ""): State(n=1), (2, ""): State(n=99), (2, "0"): State(n=20),
        }  # fmt: skip
        await settled(store.fork("run", "g", 0, state=(schema, State(n=5))))
        assert (await begin(store, "g", State(n=5), if_exists="resume")).continued
        with pytest.raises(CheckpointNotFound):
            await settled(store.fork("unknown", "h", 1))
        with pytest.raises(RunExists):
            await settled(store.fork("run", "f", 1))

    # ------------------------------------------------------------------ side by side

    async def test_runs_side_by_side(self, store: Any) -> None:
        """Many runs at once keep their commits apart, and lose none."""

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
        """Where the store has a clock of its own, a caller whose clock is wrong deletes nothing before its time."""
        if not hasattr(store, "gc"):
            pytest.skip("this store collects no runs")
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

    async def test_a_run_that_is_taken_up_is_not_collected(self, store: Any) -> None:
        """Of a gc() and a resume at one moment: the run is gone before it is taken up, or it is whole and stays."""

        async def collect() -> None:
            if hasattr(store, "gc"):  # A store whose runs end with the process collects none.
                await settled(store.gc(keep_for=timedelta(0), unfinished=True))

        for i in range(20):
            session = await begin(store, "run", State(n=i))
            await commit(session, 0, State(n=i))
            await finish(session, "INTERRUPTED")
            await asyncio.sleep(0.002)  # By its clock, that was before now.
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
        """A commit whose caller was cancelled is kept whole or not at all; sent again it is there once."""
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

    # ------------------------------------------------------------------ two clients at once

    async def test_one_of_two_owners_at_once(self, store: Any, other: Any) -> None:
        """Of two clients that open a run at the same moment one gets it, and what that one commits is kept."""
        for i in range(_ROUNDS):
            opening = (begin(store, f"run {i}"), begin(other, f"run {i}"))
            got = await asyncio.gather(*opening, return_exceptions=True)
            won = [session for session in got if not isinstance(session, BaseException)]
            assert len(won) == 1, got
            assert [type(e) for e in got if isinstance(e, BaseException)] == [RunBusy]
            await commit(won[0], 0, State(n=i))
            await finish(won[0])
            assert other.get_run(f"run {i}").execution == 1

    async def test_one_of_two_answers_at_once(self, store: Any, other: Any) -> None:
        """Of two answers at the same moment one is accepted, the other refused; the one that was accepted is kept."""
        for i in range(_ROUNDS):
            asked = await _asks(store, f"run {i}")
            given = (b'{"by":"ada"}', b'{"by":"bob"}')
            sent = [
                settled(client.signal(f"run {i}", asked._replace(payload=answer)))
                for client, answer in zip((store, other), given, strict=True)
            ]
            got = await asyncio.gather(*sent, return_exceptions=True)
            accepted = [answer for answer, told in zip(given, got, strict=True) if told is None]
            assert len(accepted) == 1, got
            assert all(told is None or isinstance(told, StoreError) for told in got)
            assert [w.payload for w in store.waiting(f"run {i}")] == accepted

    async def test_an_answer_and_a_resume_at_once(self, store: Any, other: Any) -> None:
        """An answer that is accepted while a run is resumed is there for it, or for the next one."""
        for i in range(_ROUNDS):
            run_id = f"run {i}"
            asked = await _asks(store, run_id)
            answer = asked._replace(payload=b"1")
            work = (settled(other.signal(run_id, answer)), begin(store, run_id, if_exists="resume"))
            _, session = await asyncio.gather(*work)
            if session.waiting[1, ""].payload is None:
                await settled(session.suspend(row(1, "ask"), asked))
            await finish(session, "SUSPENDED")
            assert store.waiting(run_id) == [answer]

    async def test_an_answer_before_the_question_is_asked_again(self, store: Any, other: Any) -> None:
        """An answer that comes while a resumed run is on its way to its question is not lost when it asks that again."""
        asked = await _asks(store, "run")
        session = await begin(store, if_exists="resume")
        await settled(other.signal("run", asked._replace(payload=b"1")))
        await settled(session.suspend(row(1, "ask"), asked))
        await finish(session, "SUSPENDED")
        again = await begin(store, if_exists="resume")
        assert again.waiting[1, ""].payload == b"1"
        # It has seen that one: what it asks now is another question.
        await settled(again.suspend(row(1, "ask"), asked._replace(reason="and now?")))
        assert [(w.reason, w.payload) for w in store.waiting("run")] == [("and now?", None)]

    async def test_one_of_two_cancels_at_once(self, store: Any, other: Any) -> None:
        """Of two that cancel an interrupted run at the same moment one does it, the other is told that it has ended."""
        for i in range(_ROUNDS):
            await finish(await begin(store, f"run {i}"), "INTERRUPTED")
            work = [settled(client.cancel(f"run {i}")) for client in (store, other)]
            assert sorted(await asyncio.gather(*work)) == [False, True]
            assert store.get_run(f"run {i}").status == "CANCELLED"

    async def test_a_cancel_and_a_resume_at_once(self, store: Any, other: Any) -> None:
        """A run that is resumed and cancelled at the same moment is never marked as ended under its new owner."""
        for i in range(_ROUNDS):
            await finish(await begin(store, f"run {i}"), "INTERRUPTED")
            work = (begin(store, f"run {i}", if_exists="resume"), settled(other.cancel(f"run {i}")))
            session, _ = await asyncio.gather(*work)
            assert store.get_run(f"run {i}").status == "RUNNING"
            await commit(session, 0, State())
            await finish(session)

    async def test_a_cancel_and_an_end_at_once(self, store: Any, other: Any) -> None:
        """A run that has ended is not CANCELLED afterwards: a cancel at that moment reached its owner, or came too late."""
        for i in range(_ROUNDS):
            session = await begin(store, f"run {i}")
            await asyncio.gather(finish(session), settled(other.cancel(f"run {i}")))
            assert store.get_run(f"run {i}").status == "COMPLETED"

    async def test_one_of_two_forks_at_once(self, store: Any, other: Any) -> None:
        """Of two forks with one id at the same moment one is made, whole."""
        session = await begin(store)
        for position in range(3):
            await commit(session, position, State(n=position))
        await finish(session)
        for i in range(_ROUNDS):
            work = [
                settled(client.fork("run", f"fork {i}", 2 + n)) for n, client in enumerate((store, other))
            ]
            got = await asyncio.gather(*work, return_exceptions=True)
            assert [type(e) for e in got if e is not None] == [RunExists]
            made = await begin(store, f"fork {i}", if_exists="resume")
            assert len(made.restored) == (2 if got[0] is None else 3)
            await finish(made)

    async def test_a_deletion_and_a_commit_at_once(self, store: Any, other: Any) -> None:
        """A commit of a run that is deleted at the same moment leaves nothing behind."""
        for i in range(_ROUNDS):
            session = await begin(store)
            work = (commit(session, 0, State(n=i)), settled(other.delete("run")))
            got = await asyncio.gather(*work, return_exceptions=True)
            assert got[0] is None or isinstance(got[0], Fenced)
            assert (store.get_run("run"), store.attempts("run")) == (None, [])
            fresh = await begin(store)
            assert (fresh.execution, dict(fresh.restored)) == (1, {})
            await settled(store.delete("run"))

    # ------------------------------------------------------------------ ids and texts

    async def test_any_text_is_an_id(self, store: Any) -> None:
        """Any text is a run id and a node id, and no two of them meet."""
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
        """Messages may hold what no encoding knows; the attempt is kept all the same."""
        session = await begin(store)
        await fail(session, 0, message="bad \ud800 \0 é", failure=FailureClass.TERMINAL)
        await finish(session, "FAILED", "bad \ud800 \0 é")
        (kept,) = store.attempts("run")
        assert (kept.failure_class, kept.outcome) == ("TERMINAL", "failure")
        assert "é" in kept.message
        assert "é" in store.get_run("run").error

    # ------------------------------------------------------------------ reading

    async def test_runs_are_listed(self, store: Any) -> None:
        """list_runs gives the runs begun last first, by pipeline and status, and no more than asked for."""
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
        """run_page gives the runs of which all that is asked holds, the one begun last first, and the same page by page."""
        if not hasattr(store, "run_page"):
            pytest.skip("this store lists runs without pages")
        for i in range(9):
            session = await begin(store, f"run-{i}", tags=("all", "é 1", *(["odd"] if i % 2 else [])))
            if i % 3 == 0:
                await fail(session, 0, "a", message="Too BUSY", failure=FailureClass.RECOVERABLE)
                await fail(session, 0, f"n{i}", message="no", failure=FailureClass.TERMINAL)
                await finish(session, "FAILED" if i else "PARTIAL", f"Error {i}")
            elif i % 3 == 1:
                await finish(session)
            await asyncio.sleep(0.002)

        def found(limit: int = 2, **asked: Any) -> list[int]:
            told: list[int] = []
            after = None
            while True:
                page = store.run_page(RunQuery(**asked), limit=limit, after=after)
                assert len(page.runs) <= limit
                told += [int(run.run_id[4:]) for run in page.runs]
                if page.next is None:
                    return told
                assert page.next != after
                after = page.next

        for limit in (1, 2, 3, 50):
            assert found(limit) == [8, 7, 6, 5, 4, 3, 2, 1, 0]
            assert found(limit, statuses=("FAILED", "PARTIAL")) == [6, 3, 0]
            assert found(limit, statuses=("FAILED", "RUNNING")) == [8, 6, 5, 3, 2]
            assert found(limit, tag="odd") == [7, 5, 3, 1]
            assert found(limit, tag="odd", statuses=("FAILED",)) == [3]
            assert found(limit, failure_class="TERMINAL", tag="all") == [6, 3, 0]
            assert found(limit, failure_class="TERMINAL", node="n3") == [3]
            assert found(limit, failure_class="RECOVERABLE", node="n3") == []
            if not _has_codec(store):  # What it hides cannot be searched.
                assert found(limit, text="ERROR 3") == [3]
            assert found(limit, text="RUN-", statuses=("COMPLETED",)) == [7, 4, 1]
            assert found(limit, pipeline="pipeline", tag="é 1", text="pipe") == list(range(8, -1, -1))
        assert (
            found(pipeline="another") == found(tag="od") == found(text="%") == found(failure_class="x") == []
        )
        third = store.get_run("run-3")
        assert found(since_ms=third.started_ms) == [8, 7, 6, 5, 4, 3]
        assert found(since_ms=third.started_ms, statuses=("FAILED",), failure_class="TERMINAL") == [6, 3]
        assert third.tags == ("all", "odd", "é 1")
        assert (third.failures, store.get_run("run-1").failures) == (2, 0)
        assert third.cause[:5] == ("n3", 0, "", 1, "TERMINAL")
        assert store.get_run("run-1").cause is None
        for wrong in ("", "x", "1", "1.", ".1", "-1.1", "1e3.x", "9" * 99 + ".1", "²."):
            with pytest.raises(ValueError, match="not where a page ended"):
                store.run_page(after=wrong)

    async def test_runs_are_looked_at_some_at_a_time(
        self, store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A page that looked at a part of the runs may be short or empty, and says where to go on; none is left out."""
        if not hasattr(store, "run_page"):
            pytest.skip("this store lists runs without pages")
        for i in range(11):
            session = await begin(store, f"run-{i}", tags=("odd",) if i % 2 else ())
            if i % 5 == 0:
                await fail(session, 0, "a", failure=FailureClass.TERMINAL)
            await finish(session, "FAILED" if i % 3 == 0 else "COMPLETED", "x" if i % 5 == 0 else None)
            await asyncio.sleep(0.002)
        asked = (
            RunQuery(failure_class="TERMINAL"), RunQuery(text="run-1"), RunQuery(text="nowhere"), RunQuery(node="a", tag="odd"),
            RunQuery(statuses=("FAILED", "COMPLETED"), failure_class="TERMINAL"), RunQuery(statuses=("FAILED",), text="x"),
        )  # fmt: skip

        def found(query: RunQuery, limit: int) -> list[str]:
            told: list[str] = []
            page = store.run_page(query, limit=limit)
            while True:
                told += [run.run_id for run in page.runs]
                if page.next is None:
                    return told
                page = store.run_page(query, limit=limit, after=page.next)

        known = [found(query, 50) for query in asked]
        assert known[0] == ["run-10", "run-5", "run-0"]
        for look_at in (1, 2, 3, 11):
            monkeypatch.setattr("stroma.checkpoint.durable.reader._LOOK_AT", look_at)
            for limit in (1, 2, 50):
                assert [found(query, limit) for query in asked] == known, (look_at, limit)

    async def test_tags_belong_to_an_execution(self, store: Any) -> None:
        """A run that is begun again has the tags it is given then; one that goes on has them beside those it had."""
        if not hasattr(store, "run_page"):
            pytest.skip("this store lists runs without pages")
        await finish(await begin(store, tags=("a", "b", "a")), "PARTIAL")
        await finish(await begin(store, if_exists="resume", tags=("c", "b")), "PARTIAL")
        assert store.get_run("run").tags == ("a", "b", "c")
        await finish(await begin(store, tags=("d",)))
        assert store.get_run("run").tags == ("d",)
        assert store.run_page(RunQuery(tag="a")).runs == []
        assert len(store.run_page(RunQuery(tag="d")).runs) == 1
        await settled(store.delete("run"))
        assert store.run_page(RunQuery(tag="d")).runs == []
        await finish(await begin(store))
        assert store.get_run("run").tags == ()

    async def test_the_cause_of_a_group_is_its_child(self, store: Any) -> None:
        """The cause of a failure is the child whose failure became the group's, at any depth; not a sibling's."""
        if not hasattr(store, "run_page"):
            pytest.skip("this store lists runs without pages")
        session = await begin(store)
        outer, inner = (
            row(1, "outer", ms=90, failure=FailureClass.TERMINAL, message="why"),
            row(1, "inner", branch="1", ms=50, failure=FailureClass.TERMINAL, message="why"),
        )
        await fail(session, 1, "sibling", branch="0", ms=20, message="other")
        await fail(session, 1, "child", branch="1.0", ms=20, failure=FailureClass.TERMINAL, message="why")
        for ended in (inner, outer):
            await settled(session.record(ended, None, None))
        await finish(session, "FAILED", "why")
        cause = store.get_run("run").cause
        assert (cause.node_id, cause.position, cause.branch) == ("child", 1, "1.0")
        assert (cause.error_type, cause.message, cause.text) == ("ValueError", "why", "ValueError: why")

    async def test_history_page_by_page(self, store: Any) -> None:
        """attempt_page tells what attempts() does, some at a time and without outputs; output_of gives one of these."""
        if not hasattr(store, "attempt_page"):
            pytest.skip("this store tells history as a whole")
        session = await begin(store)
        for i in range(5):
            await fail(session, i, f"n{i}")
            await commit(session, i, State(n=i), f"n{i}", attempt=2)
            await commit(session, i, State(text="x" * i), "child", branch=f"{i}:é")
        all_of_them = store.attempts("run")
        for limit in (1, 4, 15, 100):
            told: list[Any] = []
            after = None
            while True:
                page = store.attempt_page("run", limit=limit, after=after)
                told += page.attempts
                after = page.next
                if after is None:
                    break
                assert len(page.attempts) == limit
            assert [a.output for a in told] == [None] * 15
            # As they are stored: a codec may make them larger.
            sizes = [a.output_bytes for a in all_of_them]
            assert [a.output_bytes for a in told] == sizes
            assert [size is None for size in sizes] == [a.output is None for a in all_of_them]
            assert [
                replace(a, output=b.output) for a, b in zip(told, all_of_them, strict=True)
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
            with pytest.raises(ValueError, match="not where a page ended"):
                store.attempt_page("run", after=wrong)

    async def test_attempts_are_summed_up(self, store: Any) -> None:
        """tally() sums the attempts of the runs begun since, by pipeline, node, model and class, and what they wasted."""
        if not hasattr(store, "tally"):
            pytest.skip("this store sums nothing up")
        for name in ("one", "two"):
            session = await begin(store, name)
            await fail(session, 0, "n", tokens=4, cost=0.25, ms=7, failure=FailureClass.TERMINAL)
            await commit(session, 0, State(n=1), "n", attempt=2, tokens=4, cost=0.5, ms=9)
            await finish(session)
        found = sorted(store.tally(0, 10**15), key=lambda one: one.failure_class or "")
        assert [(t.bucket, t.pipeline, t.node_id, t.model, t.failure_class, t.attempts) for t in found] == [
            (0, "pipeline", "n", "model", None, 2), (0, "pipeline", "n", "model", "TERMINAL", 2),
        ]  # fmt: skip
        assert [(t.tokens, t.cost_pico, t.wasted_pico, t.duration_ns, t.longest_ns) for t in found] == [
            (8, 10**12, 0, 18_000_000, 9_000_000), (8, 5 * 10**11, 5 * 10**11, 14_000_000, 7_000_000),
        ]  # fmt: skip
        assert sum(t.attempts for t in store.tally(0, 10**15, runs=1)) == 2
        assert store.tally(store.get_run("two").started_ms + 1, 1000) == []

    async def test_where_attempts_failed(self, store: Any) -> None:
        """trouble_of tells where the last failed attempt at a place failed, and forgets it with the execution."""
        if not hasattr(store, "trouble_of"):
            pytest.skip("this store keeps no tracebacks")
        session = await begin(store)
        for number in (1, 2):
            failed = row(3, "n", branch="1", attempt=number, failure=FailureClass.AMBIGUOUS)
            data = b'[[["flow.py", %d, "work", "raise it"]], [["lib.py", 1, "call", ""]]]' % number
            session.record_failure_site(3, "1", number, failed.started_ns, partial(bytes, data))
            await settled(session.record(failed, None, None))
        found = store.trouble_of("run", 3, "1")
        if _has_codec(store):
            assert found is None, "lines of source are not kept beside what a codec hides"
            return
        assert found is not None
        assert (found.attempt, found.started_ns) == (2, failed.started_ns)
        assert found.own == (("flow.py", 2, "work", "raise it"),)
        assert found.others == (("lib.py", 1, "call", ""),)
        assert store.trouble_of("run", 3) is store.trouble_of("nobody", 3, "1") is None
        await finish(session, "FAILED")
        await begin(store)
        assert store.trouble_of("run", 3, "1") is None

    async def test_what_it_says_of_itself(self, store: Any) -> None:
        """facts() names the system and the formats, and by whose clock leases go."""
        if not hasattr(store, "facts"):
            pytest.skip("this store says nothing of itself")
        await begin(store)
        facts = store.facts()
        assert facts.system
        assert facts.format == facts.writes >= 1
        assert facts.clock_ms is None or abs(facts.clock_ms - time.time() * 1000) < 3_600_000

    async def test_runs_are_found_by_their_beginning(self, store: Any) -> None:
        """find_run gives the ids that begin with a text, newest first; a whole id stands alone; "last" is the newest."""
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
        """attempts() tells every attempt with what it used and committed, and the type of its exception; a group before its children."""
        session = await begin(store)
        await fail(session, 0, "a", tokens=4, cost=0.25, ms=7, message="no")
        await commit(session, 0, State(n=1), "a", attempt=2)
        group = row(1, "g", output=("", 3, 0.0, b""))  # It began before its children.
        await commit(session, 1, State(n=2), "b", branch="0")
        await settled(session.record(group, schema_of(State), State(n=3)))
        told = store.attempts("run")
        assert [(a.node_id, a.branch, a.attempt) for a in told] == [
            ("a", "", 1),
            ("a", "", 2),
            ("g", "", 1),
            ("b", "0", 1),
        ]
        first = told[0]
        assert (first.tokens, first.output_tokens, first.cost_usd, first.duration_ms) == (4, 2, 0.25, 7.0)
        assert (first.outcome, first.failure_class, first.message, first.error_type, first.model) == (
            "failure", "RECOVERABLE", "no", "ValueError", "model",
        )  # fmt: skip
        outputs = [None if a.output is None else schema_of(State).decode(a.output) for a in told]
        assert outputs == [None, State(n=1), State(n=3), State(n=2)]

    async def test_the_input_is_kept(self, store: Any) -> None:
        """input_of gives the input of the last execution; a run that is not there is CheckpointNotFound."""
        await finish(await begin(store, state=State(n=1)))
        await finish(await begin(store, state=State(text="é")))
        assert schema_of(State).decode(store.input_of("run")) == State(text="é")
        with pytest.raises(CheckpointNotFound, match="no run 'other'"):
            store.input_of("other")

    # ------------------------------------------------------------------ the simple protocol

    async def test_states_are_saved_and_loaded(self, store: Any) -> None:
        """save, load, load_typed and delete keep the last state of a node of a run."""
        assert await settled(store.load("run", "a")) is None
        await settled(store.save("run", "a", State(n=1)))
        await settled(store.save("run", "a", State(n=2)))
        await settled(store.save("run", "b", State(n=3)))
        assert await settled(store.load("run", "a")) == State(n=2)
        assert await settled(store.load_typed("run", "b", State)) == State(n=3)
        assert store.get_run("run") is None
        await settled(store.delete("run"))
        assert await settled(store.load("run", "a")) is None

    async def test_committed_outputs_are_loaded_by_node(self, store: Any) -> None:
        """load() gives the newest of what a node committed in the last execution and what was saved."""
        session = await begin(store)
        await commit(session, 0, State(n=1), "a")
        await commit(session, 1, State(n=2), "a")
        assert await settled(store.load_typed("run", "a", State)) == State(n=2)
        await settled(store.save("run", "a", State(n=3)))
        assert await settled(store.load_typed("run", "a", State)) == State(n=3)

    async def test_a_state_of_another_class_is_corrupt(self, store: Any) -> None:
        """What does not satisfy the schema it is read with is CorruptCheckpoint."""
        await settled(store.save("run", "a", State(text="x")))

        class Strict(BaseModel):
            number: int

        with pytest.raises(CorruptCheckpoint, match=r"'a'.*'run'"):
            await settled(store.load_typed("run", "a", Strict))
        with pytest.raises(TypeError, match="schema must be a BaseModel type"):
            await settled(store.load_typed("run", "a", int))


def _has_codec(store: Any) -> bool:
    return getattr(getattr(store, "_payloads", None), "codec", None) is not None
