"""Tests of executions: commits, usage, restarts, plain steps, maps and forks."""

import asyncio
from typing import Any

import pytest
from tests.store_suite.helpers import (
    Other,
    State,
    begin,
    commit,
    fail,
    finish,
    read_texts,
    restored,
    row,
    settled,
)

from stroma.checkpoint import CheckpointNotFound, Committed, PipelineChanged, RunExists, StepCall
from stroma.checkpoint.entries import OF_MAP, RunControl
from stroma.checkpoint.identity import idempotency_key
from stroma.contracts.schema import schema_of
from stroma.engine.restore import read_output
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure


class ExecutionTests:
    """Tests of executions: commits, usage, restarts, plain steps, maps and forks."""

    async def test_a_new_run(self, store: Any) -> None:
        """A new run id starts execution 1, without commits."""
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
        assert {at: items.node_id for at, items in again.restored.items()} == {
            (position, branch): f"n{position}" for position, branch in states
        }
        assert {items.contract for items in again.restored.values()} == {schema_of(State).fingerprint}

    async def test_all_usage_counts(self, store: Any) -> None:
        """The usage of an execution is the sum over its attempts, failed ones too; children add no time."""
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
        """Restarting a run starts an execution with its own commits and totals."""
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
        """``discard_from`` discards the outputs from a position on; their cost still counts."""
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
        """An exception of ``accept`` propagates, and the run is not changed."""
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
        """A run is resumed with its first input, or not at all."""
        await finish(await begin(store, state=State(n=1)), "PARTIAL")
        for other in (State(n=2), Other()):
            with pytest.raises(PipelineChanged, match="started with another input"):
                await begin(store, if_exists="resume", state=other)
        assert (await begin(store, if_exists="resume", state=State(n=1))).continued

    async def test_steps_of_plain_code(self, store: Any) -> None:
        """The call number and input of a step are restored."""
        session = await begin(store)
        schema = schema_of(State)
        for position, call in enumerate((StepCall(0, b"{}"), StepCall(1, None), None)):
            await settled(session.record(row(position, output=("", 0, 0.0, b"")), schema, State(), call))
        await finish(session)
        again = await begin(store, if_exists="resume")
        assert [again.restored[i, ""].step for i in range(3)] == [StepCall(0, b"{}"), StepCall(1, None), None]

    async def test_places_of_plain_code(self, store: Any) -> None:
        """The identity of a step is stored with its first attempt or the first inside it, in any outcome."""
        session = await begin(store)
        assert session.places == {}
        for position, identity in ((4, "a#0"), (2, "1/a#0"), (3, "b#0@77")):
            session.note_call(position, identity)
        await commit(session, 4, State())
        await commit(session, 3, State(), branch="0")
        await settled(session.record(row(2), None, None))
        assert {a.position: a.identity for a in store.attempts("run")} == {4: "a#0", 2: "1/a#0", 3: "b#0@77"}
        assert store.attempts("run")[1].idempotency_key("run", 1) == idempotency_key("run", 1, "b#0@77", "0")
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

    async def test_items_are_read_a_few_at_a_time(self, store: Any) -> None:
        """Lazily loaded outputs are not restored at once; committed() returns them, also later ones."""
        session = await begin(store)
        await commit(session, 0, State(n=7))
        for branch in ("0", "1", "10", "1.0", "2.1"):
            await commit(session, 1, State(text=branch), branch=branch)
        await commit(session, 2, State(n=9), branch="1")
        assert await read_texts(session, 1, ["10", "0", "3", ""]) == {"10": "10", "0": "0"}
        assert await read_texts(session, 1, []) == {}
        await finish(session, "PARTIAL")
        for apart, there in (
            (((1, ""),), {(0, ""), (2, "1")}),
            (((1, "1."), (2, "")), {(0, ""), (1, "0"), (1, "1"), (1, "10"), (1, "2.1"), (1, "3")}),
        ):
            again = await begin(store, if_exists="resume", lazily_loaded=apart)
            assert again.restored.keys() == there
            assert await read_texts(again, 1, ["1", "1.0", "2.1"]) == {"1": "1", "1.0": "1.0", "2.1": "2.1"}
            await commit(again, 1, State(text="since"), branch="3")
            assert await read_texts(again, 1, ["3"]) == {"3": "since"}
            await finish(again, "PARTIAL")
        anew = await begin(store)
        assert await read_texts(anew, 1, ["0", "1"]) == {}

    async def test_failed_items_and_what_follows_them_are_forgotten_if_asked(self, store: Any) -> None:
        """retry_failed discards failed items, their map and everything after it, also for later processes."""
        session = await begin(store)
        failed = ItemFailure(index=1, node_id="node", failure_class=FailureClass.TERMINAL, message="no")
        await commit(session, 0, State(n=1))
        await commit(session, 1, State(n=2), branch="0")
        late = row(1, branch="1")
        await settled(session.record(late, schema_of(ItemFailure), failed, StepCall(0, b"item x")))
        await settled(session.record(row(1), schema_of(State), State(), StepCall(1, OF_MAP + b"2")))
        await commit(session, 2, State(n=3))
        await finish(session)
        resumed = await begin(store, if_exists="resume")
        assert resumed.restored.keys() == {(0, ""), (1, "0"), (1, "1"), (1, ""), (2, "")}
        assert resumed.restored[1, "1"].is_failed_item is True
        assert resumed.restored[1, "0"].is_failed_item is False
        assert [resumed.restored[at].failed_items for at in ((1, ""), (1, "1"), (0, ""))] == [1, 0, 0]
        await finish(resumed)
        again = await begin(store, if_exists="resume", retry_failed=True)
        assert again.restored.keys() == {(0, ""), (1, "0")}
        await finish(again, "PARTIAL")
        last = await begin(store, if_exists="resume")
        assert last.restored.keys() == {(0, ""), (1, "0")}

    async def test_failed_items_that_are_not_loaded_are_forgotten(self, store: Any) -> None:
        """retry_failed discards failed items of lazily loaded maps, but no failed item inside a flow."""
        session, schema = await begin(store), schema_of(ItemFailure)
        failed = ItemFailure(index=1, node_id="node", failure_class=FailureClass.TERMINAL, message="no")
        for position, branch in ((0, "1"), (0, "10"), (1, "map#0.1")):
            await settled(
                session.record(row(position, branch=branch), schema, failed, StepCall(0, b"item x"))
            )
        await commit(session, 0, State(n=1, text="failed item"), branch="0")
        await finish(session, "PARTIAL")
        again = await begin(store, if_exists="resume", retry_failed=True, lazily_loaded=((0, ""),))
        await finish(again, "PARTIAL")
        last = await begin(store, if_exists="resume")
        assert last.restored.keys() == {(0, "0"), (1, "map#0.1")}

    @pytest.mark.parametrize(
        "request_of", [{"if_exists": "resume", "due_ms": 1 << 60}, {"if_exists": "read"}]
    )
    async def test_a_run_that_was_deleted_is_not_begun(self, store: Any, request_of: Any) -> None:
        """A run that is deleted after a dispatcher or a reader has found it does not begin again."""
        await finish(await begin(store), "PARTIAL")
        await settled(store.delete("run"))
        with pytest.raises(CheckpointNotFound, match="run 'run' was deleted"):
            await begin(store, **request_of)
        assert store.list_runs() == []

    async def test_the_items_of_a_map_are_read(self, store: Any) -> None:
        """map_items() returns the committed items of a map, in order, once the map is committed."""
        session = await begin(store)
        for index in (2, 0, 1, 10, 9, 11):
            await commit(session, 0, State(n=20 - index), branch=f"1.{index}")
        with pytest.raises(CheckpointNotFound, match="has no completed map 'map'"):
            await asyncio.to_thread(store.map_items, "run", "map", 0, 10)
        map_row = row(0, "map", branch="1")
        await settled(session.record(map_row, schema_of(State), State(), StepCall(0, OF_MAP + b"11")))
        for first, count, there in ((0, 20, [0, 1, 2, 9, 10]), (1, 1, [1]), (11, 5, [])):
            items = await asyncio.to_thread(store.map_items, "run", "map", first, count)
            assert [index for index, _ in items] == there
            assert [read_output(schema_of(State), resumed, None) for _, resumed in items] == [
                State(n=20 - index) for index in there
            ]

    async def test_a_fork_has_the_items_of_its_maps(self, store: Any) -> None:
        """A fork has items and failed items of each map before its position whose output is not replaced."""
        session, schema = await begin(store), schema_of(State)
        for index in range(2):
            await commit(session, 0, State(n=index), branch=str(index))
        await settled(session.record(row(0, "map"), schema, State(), StepCall(1, OF_MAP + b"2")))
        await commit(session, 1, State())
        await finish(session)
        await settled(store.fork("run", "fork", 1))
        items = await asyncio.to_thread(store.map_items, "fork", "map", 0, 9)
        assert [index for index, _ in items] == [0, 1]
        fork = await begin(store, "fork", if_exists="resume")
        assert fork.restored[0, ""].failed_items == 1
        await settled(store.fork("run", "edited", 1, edited=(schema, State(n=9))))
        with pytest.raises(CheckpointNotFound, match="has no completed map 'map'"):
            await asyncio.to_thread(store.map_items, "edited", "map", 0, 9)

    async def test_a_fork_has_no_requests(self, store: Any) -> None:
        """A fork of a paused run is not paused, and has its own budget."""
        await commit(await begin(store), 0, State())
        await settled(store.set_budget("run", {"max_cost_usd": 1.0}))
        await settled(store.pause("run"))
        await settled(store.fork("run", "fork", 1))
        session = await begin(store, "fork", if_exists="resume", due_ms=1 << 60)
        assert (session.continued, session.control) == (True, RunControl())

    async def test_forks(self, store: Any) -> None:
        """A fork has the commits of its parent before a position at no cost, and leaves the parent alone."""
        session = await begin(store, state=State(n=-1))
        for position in range(4):
            await commit(session, position, State(n=position), f"n{position}", tokens=5)
        await commit(session, 2, State(n=20), "child", branch="0")
        await finish(session)
        before = store.get_run("run")
        schema = schema_of(State)
        await settled(store.fork("run", "f", 3, edited=(schema, State(n=99))))
        assert store.get_run("run") == before
        fork = store.get_run("f")
        assert (fork.parent, fork.execution, fork.status, fork.tokens) == ("run", 1, "INTERRUPTED", 0)
        assert (fork.nodes, fork.holder) == (3, None)
        session = await begin(store, "f", State(n=-1), if_exists="resume")
        states = {(0, ""): State(n=0), (1, ""): State(n=1), (2, ""): State(n=99), (2, "0"): State(n=20)}
        assert restored(session) == states
        await settled(store.fork("run", "g", 0, state=(schema, State(n=5))))
        assert (await begin(store, "g", State(n=5), if_exists="resume")).continued
        with pytest.raises(RunExists):
            await settled(store.fork("run", "f", 1))

    async def test_what_can_be_forked(self, store: Any) -> None:
        """A fork is made of the last execution before a position after an output, into a free id."""
        await finish(await begin(store), "FAILED")
        session = await begin(store, state=State(n=5))
        await commit(session, 0, State(n=50))
        await commit(session, 1, State(n=51), branch="0")
        for run_id in ("saved", "f"):
            await settled(store.save(run_id, "n", State(n=7)))
        for source, before in (("unknown", 0), ("saved", 0), ("run", 3)):
            with pytest.raises(CheckpointNotFound):
                await settled(store.fork(source, "h", before))
        with pytest.raises(CheckpointNotFound, match=r"no output at position 1.*fork at an earlier node"):
            await settled(store.fork("run", "h", 2))  # A group of which only a child is committed.
        assert store.get_run("h") is None
        await settled(store.fork("run", "f", 1))
        assert await settled(store.load("f", "n")) == State(n=7)
        fork = await begin(store, "f", State(n=5), if_exists="resume")
        assert (restored(fork), fork.prior.tokens) == ({(0, ""): State(n=50)}, 0)
