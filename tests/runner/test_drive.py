"""``runner.drive``: continue one run of a store, with its outcome as a value; over every store."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, Text, World
from tests.kit import Num, cancel, cancel_after, node, quick_on, same
from tests.shared_stores import STORES

from stroma import ExecutionResult, Flow, Pipeline, RunStatus, StoreError, stroma_flow
from stroma.runner.drive import Blocked, Busy, DriveOutcome, Ended, Suspended, Yielded

store = store_fixture(*STORES)


def _result(outcome: DriveOutcome) -> ExecutionResult:
    assert isinstance(outcome, Ended)
    assert outcome.result is not None
    return outcome.result


async def _interrupt(store: Any, world: World, pipeline: Pipeline, call: str) -> None:
    """Run a pipeline until a call, and shut its runner down."""
    runner = quick_on(store)
    run = asyncio.ensure_future(runner.run(pipeline, Num(), run_id="r"))
    world.dies_in = call
    await world.dies.wait()
    await runner.shutdown(drain_seconds=0)
    assert (await run).status is RunStatus.INTERRUPTED
    world.dies_in = None
    world.dies.clear()


async def test_an_interrupted_run_is_driven_to_its_end(store: Any) -> None:
    """drive() continues an interrupted run after its last commit; later calls return the same status."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "b 1")
    ended = await quick_on(store).drive("r", pipelines=[pipeline])
    assert ended == Ended("r", RunStatus.RESUMED)
    assert _result(ended).output == Num(n=2)
    assert world.calls == ["a 0", "b 1", "b 1"]
    again = await quick_on(store).drive("r", pipelines=[pipeline])
    assert isinstance(again, Ended)
    assert (again, again.result) == (Ended("r", RunStatus.RESUMED), None)
    assert isinstance(again.status, RunStatus)
    assert world.calls == ["a 0", "b 1", "b 1"]


async def test_a_failure_is_an_end(store: Any) -> None:
    """A run that fails while it is driven is Ended with its status, and its failure is in the result."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "b 1")
    world.failing.add("b")
    ended = await quick_on(store).drive("r", pipelines=[pipeline])
    failure = _result(ended).failure
    assert (ended, failure.message) == (Ended("r", RunStatus.PARTIAL), "b 1 failed")


async def test_a_suspended_run(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """drive() returns when a sleeping run is due, and the questions of a run that waits for an answer."""
    clock = Clock(monkeypatch)

    @stroma_flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        await flow.sleep(hours=1)
        return await flow.wait_for(Text, reason="Well?")

    runner = quick_on(store)
    await runner.run(ask, Num(), run_id="r")
    due = datetime.fromtimestamp(clock.ms / 1000, UTC) + timedelta(hours=1)
    assert await runner.drive("r", pipelines=[ask]) == Suspended("r", due)
    clock.pass_by(hours=1)
    asked = await runner.drive("r", pipelines=[ask])
    assert isinstance(asked, Suspended)
    assert asked.result is not None
    assert (asked.until, [question.reason for question in asked.questions]) == (None, ["Well?"])
    assert await runner.drive("r", pipelines=[ask]) == asked
    await runner.signal("r", Text(text="yes"))
    ended = await runner.drive("r", pipelines=[ask])
    assert _result(ended).output == Text(text="yes")


async def test_a_paused_run_stays_paused(store: Any) -> None:
    """drive() leaves a paused run alone, until somebody takes the pause back."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "b 1")
    runner = quick_on(store)
    await runner.pause("r")
    assert await runner.drive("r", pipelines=[pipeline]) == Suspended("r", None)
    await runner.unpause("r")
    assert await runner.drive("r", pipelines=[pipeline]) == Ended("r", RunStatus.RESUMED)


async def test_a_run_with_an_owner_is_busy(store: Any) -> None:
    """A run that another call owns is Busy until the end of its lease, and is not disturbed."""
    world = World()
    pipeline = Pipeline("p", [world.step("a")])
    world.dies_in = "a 0"
    run = asyncio.ensure_future(quick_on(store).run(pipeline, Num(), run_id="r"))
    await world.dies.wait()
    busy = await quick_on(store).drive("r", pipelines=[pipeline])
    assert isinstance(busy, Busy)
    assert busy.owner
    if busy.until is not None:  # A store in memory has no leases.
        assert busy.until > datetime.now(UTC) + timedelta(seconds=20)
    await cancel(run)
    assert world.calls == ["a 0"]


async def test_a_long_run_yields_at_a_step_boundary(store: Any) -> None:
    """After max_seconds the run ends at the next step boundary, finished steps committed, due at once."""
    world = World()

    async def slow(state: Num) -> Num:
        world.calls.append(f"slow {state.n}")
        await asyncio.sleep(0.02)
        return Num(n=state.n + 1)

    pipeline = Pipeline("p", [world.step("a"), *(node(f"slow{i}", slow) for i in range(3))])
    await _interrupt(store, world, pipeline, "a 0")
    world.calls.clear()
    runner = quick_on(store)
    outcomes = [await runner.drive("r", pipelines=[pipeline], max_seconds=0.01)]
    while outcomes[-1] == Yielded("r"):
        outcomes.append(await runner.drive("r", pipelines=[pipeline], max_seconds=0.01))
    assert (outcomes[0], outcomes[-1]) == (Yielded("r"), Ended("r", RunStatus.RESUMED))
    assert world.calls == ["a 0", "slow 1", "slow 2", "slow 3"]


async def test_a_shutdown_yields(store: Any) -> None:
    """A shutdown of the runner ends the run at the next step boundary; drive() returns Yielded."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "a 0")
    runner = quick_on(store)
    world.dies_in = "a 0"
    driving = asyncio.ensure_future(runner.drive("r", pipelines=[pipeline]))
    await world.dies.wait()
    await runner.shutdown(drain_seconds=0)
    assert await driving == Yielded("r")


async def test_code_that_does_not_fit_is_blocked(store: Any) -> None:
    """A pipeline that is not served, changed nodes, and an input that no longer fits are Blocked."""
    world = World()
    a, b = world.step("a"), world.step("b")
    await _interrupt(store, world, Pipeline("p", [a, b]), "b 1")
    runner = quick_on(store)
    unknown = await runner.drive("r")
    assert isinstance(unknown, Blocked)
    assert "'p' is not served here" in unknown.reason
    changed = await runner.drive("r", pipelines=[Pipeline("p", [world.step("other"), b])])
    assert isinstance(changed, Blocked)
    assert changed.reason.startswith("at position 0 it has the output of node 'a'")  # The run is named once.
    other_input = await runner.drive("r", pipelines=[Pipeline("p", [node("a", same, input=Text)])])
    assert isinstance(other_input, Blocked)
    record = store.get_run("r")
    assert (record.status, record.holder) == ("INTERRUPTED", None)
    assert await runner.drive("r", pipelines=[Pipeline("p", [a, b])]) == Ended("r", RunStatus.RESUMED)


async def test_flows_of_the_runner_are_known(store: Any) -> None:
    """drive() finds the flows that the runner has registered; a list with one name twice is refused."""
    runner = quick_on(store)

    @runner.flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        return await flow.wait_for(Text, reason="Well?")

    await runner.run(ask, Num(), run_id="r")
    await runner.signal("r", Text(text="yes"))
    assert await runner.drive("r") == Ended("r", RunStatus.RESUMED)
    twins = [Pipeline("p", []), Pipeline("p", [])]
    with pytest.raises(ValueError, match="two pipelines have the name 'p'"):
        await runner.drive("r", pipelines=twins)


async def test_a_failing_store_leaves_the_run_to_others(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails in a driven run is an exception; the run stays INTERRUPTED for a later call."""
    world, clock = World(), Clock(monkeypatch)
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "b 1")
    kind = type(await _session_of(store, "other"))
    record = kind.record

    def refuse(session: Any, row: Any, *arguments: Any, **options: Any) -> Any:
        error = StoreError("the disk is full")
        error.transient = False
        raise error

    monkeypatch.setattr(kind, "record", refuse)
    with pytest.raises(StoreError, match="the disk is full"):
        await quick_on(store).drive("r", pipelines=[pipeline])
    monkeypatch.setattr(kind, "record", record)
    assert store.get_run("r").status == "INTERRUPTED"
    due = datetime.fromtimestamp(clock.ms / 1000, UTC) + timedelta(seconds=5)
    assert await quick_on(store).drive("r", pipelines=[pipeline]) == Suspended("r", due)
    clock.pass_by(seconds=5)
    assert await quick_on(store).drive("r", pipelines=[pipeline]) == Ended("r", RunStatus.RESUMED)


async def _session_of(store: Any, run_id: str) -> Any:
    from tests.store_suite.helpers import begin

    session = await begin(store, run_id)
    session.abandon()
    return session


async def test_a_cancelled_call_leaves_the_run_to_others(store: Any) -> None:
    """Cancelling the task that drives a run leaves it INTERRUPTED and due, so the next call continues it."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    await _interrupt(store, world, pipeline, "a 0")
    world.dies_in = "b 1"
    await cancel_after(quick_on(store).drive("r", pipelines=[pipeline]), world.dies)
    world.dies_in = None
    assert store.get_run("r").status == "INTERRUPTED"
    assert await quick_on(store).drive("r", pipelines=[pipeline]) == Ended("r", RunStatus.RESUMED)
