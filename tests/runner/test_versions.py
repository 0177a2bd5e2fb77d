"""Versions of pipelines, and runs that code of another version, or changed code, cannot continue."""

import asyncio
import logging
import re
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, Text, World
from tests.kit import Num, node, noting, quick_on
from tests.runner.serving import Serving
from tests.shared_stores import ON_SERVERS, STORES, store_of

from stroma import Flow, NodeHooks, Pipeline, PipelineChanged, RunStatus, Suspend, stroma_flow
from stroma.checkpoint.queue import BlockedMark, ServedCode, block
from stroma.checkpoint.records import RunQuery
from stroma.runner.drive import Blocked, Suspended
from stroma.runner.pipeline import code_of

store = store_fixture(*STORES)


def _flow(world: World, *before: str, **options: Any) -> Any:
    """Return a flow of at most three steps, an hour of sleep, and a last step."""
    first, second, third = [*map(world.step, before), None, None, None][:3]
    last = world.step("last")

    async def body(flow: Flow, state: Num) -> Num:
        for step in (first, second, third):
            state = state if step is None else await flow.step(step, state)
        await flow.sleep(hours=1)
        return await flow.step(last, state)

    return stroma_flow("f", input=Num, output=Num, **options)(body)


def _stored(store: Any, run_id: str) -> Any:
    """Return all that a store has of a run."""
    record = store.get_run(run_id)
    figures = (record.status, record.error, record.due_ms, record.updated_ms, record.nodes, record.blocked)
    return figures, store.attempts(run_id), store.waiting(run_id)


async def test_a_run_keeps_the_version_that_it_began_with(store: Any, clock: Clock) -> None:
    """flow.version is the version with which the run began, also in later code that accepts it."""
    world = World()
    a, b, last = (world.step(name) for name in ("a", "b", "last"))

    def build(version: str, *accepts: str) -> Any:
        @stroma_flow("f", input=Num, output=Num, version=version, accepts=accepts)
        async def f(flow: Flow, state: Num) -> Num:
            world.calls.append(f"version {flow.version}")
            state = await flow.step(a, state)
            if flow.version != "1":
                state = await flow.step(b, state)
            await flow.sleep(hours=1)
            return await flow.step(last, state)

        return f

    old, new = build("1"), build("2", "1")
    await quick_on(store).run(old, Num(), run_id="first")
    await quick_on(store).submit(new, Num(), run_id="second")
    assert [store.get_run(name).version for name in ("first", "second")] == ["1", "2"]
    world.calls.clear()
    async with Serving(quick_on(store), new) as serving:
        await serving.until(1)
        clock.pass_by(hours=2)
        await serving.until(2)
        while len(serving.outcomes["second"]) < 2:
            await asyncio.sleep(0.01)
    assert [serving.statuses(name)[-1] for name in ("first", "second")] == ["RESUMED", "RESUMED"]
    assert world.calls.count("version 1") == 1
    assert world.calls.count("b 1") == 1
    assert [store.get_run(name).version for name in ("first", "second")] == ["1", "2"]


async def test_a_worker_takes_the_versions_that_it_serves(
    store: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of a version that is not served is left alone, whatever it awaits; the worker counts them."""
    world = World()
    old, new = _flow(world, "a", version="1"), _flow(world, "a", "b", version="2")
    for run_id in ("s1", "s2"):
        await quick_on(store).run(old, Num(), run_id=run_id)
    await quick_on(store).submit(old, Num(), run_id="q1")
    await quick_on(store).submit(old, Num(), run_id="k1", key="customer")
    await quick_on(store).submit(new, Num(), run_id="q2")
    clock.pass_by(hours=2)
    before = [_stored(store, run_id) for run_id in ("s1", "s2", "q1", "k1")]
    with caplog.at_level(logging.WARNING, "stroma"):
        async with Serving(quick_on(store), new) as serving:
            await serving.until(1)
            await asyncio.sleep(0.1)
    assert list(serving.outcomes) == ["q2"]
    assert [_stored(store, run_id) for run_id in ("s1", "s2", "q1", "k1")] == before
    assert "4 runs wait for f version 1, which is not served here" in caplog.text
    assert store.queue_figures({"f": ServedCode(("2",))}, clock.ms)["f"].queued == 0
    assert store.queue_figures({"f": ServedCode(("1",))}, clock.ms)["f"].queued == 2
    async with Serving(quick_on(store), old) as serving:
        await serving.until(4)
    assert serving.statuses("s1") == serving.statuses("s2") == ["RESUMED"]


async def test_a_person_cannot_resume_a_run_of_another_version(store: Any) -> None:
    """resume() of a run whose version the code does not accept is PipelineChanged with both names."""
    world = World()
    await quick_on(store).run(_flow(world, "a", version="1"), Num(), run_id="r")
    before = _stored(store, "r")
    for other in (_flow(world, "a", version="2"), _flow(world, "a"), Pipeline("f", _flow(world, "a").nodes)):
        with pytest.raises(
            PipelineChanged, match="started with version '1' of pipeline 'f', and this code serves"
        ):
            await quick_on(store).resume(other, "r")
    assert _stored(store, "r") == before
    changed = await quick_on(store, allow_changes=True).resume(_flow(world, "a", version="2"), "r")
    assert (changed.status, store.get_run("r").version) == (RunStatus.SUSPENDED, "1")


async def test_a_run_without_a_version_is_continued_by_code_with_one(store: Any, clock: Clock) -> None:
    """A run from before the flow had versions has flow.version None; any code that fits continues it."""
    world = World()
    await quick_on(store).run(_flow(world, "a"), Num(), run_id="r")
    clock.pass_by(hours=2)
    async with Serving(quick_on(store), _flow(world, "a", version="2")) as serving:
        await serving.until(1)
    assert serving.statuses("r") == ["RESUMED"]
    assert store.get_run("r").version is None


async def test_recover_takes_served_versions_only(store: Any) -> None:
    """recover() leaves interrupted runs of other versions alone."""
    world = World()
    runner = quick_on(store, inline_wait_seconds=1e6)
    runs = [
        asyncio.ensure_future(runner.run(_flow(world, "a", version=version), Num(), run_id=version))
        for version in ("1", "2")
    ]
    while len(world.calls) < 2:
        await asyncio.sleep(0.01)
    await runner.shutdown()
    assert {(await run).status for run in runs} == {RunStatus.INTERRUPTED}
    outcomes = await quick_on(store).recover(_flow(world, version="2"))
    assert list(outcomes) == ["2"]


async def test_a_restart_has_the_version_of_the_code(store: Any) -> None:
    """A new execution of a run has the version of the code that begins it."""
    world = World()
    await quick_on(store).run(_flow(world, version="1"), Num(), run_id="r")
    await quick_on(store).run(_flow(world, version="2"), Num(), run_id="r", if_exists="restart")
    assert store.get_run("r").version == "2"


async def test_a_list_may_have_a_version(store: Any) -> None:
    """A Pipeline with a version is continued by one that serves it."""
    world = World()
    old, new = (Pipeline("p", [world.step("a")], version=version) for version in ("1", "2"))
    await quick_on(store).submit(old, Num(), run_id="r")
    assert isinstance(await quick_on(store).drive("r", pipelines=[new]), Blocked)
    accepting = Pipeline("p", [world.step("a")], version="2", accepts=("1",))
    assert (await quick_on(store).drive("r", pipelines=[accepting])).status == "COMPLETED"


def test_what_a_version_may_be() -> None:
    """A version is a short text without spaces; accepts= needs one, and is a sequence of versions."""
    for bad in ("", "a b", "a\n", "x" * 101, 2):
        with pytest.raises(ValueError, match="a version must have 1 to 100 printable"):
            Pipeline("p", [], version=bad)
    with pytest.raises(ValueError, match="accepts needs version="):
        Pipeline("p", [], accepts=("1",))
    with pytest.raises(TypeError, match=r"pass \('1',\)"):
        Pipeline("p", [], version="2", accepts="1")
    pipeline = Pipeline("p", [], version="2", accepts=("1", "2"), max_runs=3)
    assert (pipeline.version, pipeline.versions) == ("2", ("2", "1"))
    other = pipeline.with_config(quick_on(None).config)
    assert (other.versions, other.limits) == (pipeline.versions, pipeline.limits)


async def test_a_worker_gives_a_run_back_that_its_code_does_not_fit(store: Any, clock: Clock) -> None:
    """A replay that differs leaves the run as it was and marks it; code that fits continues it at once."""
    world, ends = World(), list[str]()

    note = noting(ends, lambda run_id, result: run_id)
    old, new = _flow(world, "a", "b"), _flow(world, "a", "audit", "b")
    await quick_on(store).run(old, Num(), run_id="r")
    clock.pass_by(hours=2)
    before, calls = _stored(store, "r"), list(world.calls)
    async with Serving(quick_on(store, hooks=NodeHooks(on_run_end=note)), new) as serving:
        await serving.until(1)
    (outcome,) = serving.outcomes["r"]
    assert isinstance(outcome, PipelineChanged)
    mark = store.get_run("r").blocked
    assert mark == BlockedMark(str(outcome), clock.ms, clock.ms + 1000, (code_of(new).name,))
    (figures, *rest), (old_figures, *old_rest) = _stored(store, "r"), before
    assert (figures[:-1], rest) == (old_figures[:-1], old_rest)
    assert (world.calls, ends) == (calls, [])
    figure = store.queue_figures({"f": ServedCode()}, clock.ms)["f"]
    assert (figure.queued, figure.oldest_due_ms, figure.blocked) == (0, None, 1)
    assert figure.oldest_blocked_ms == clock.ms
    assert [one.run_id for one in store.run_page(RunQuery(blocked=True)).runs] == ["r"]
    async with Serving(quick_on(store), old) as serving:
        await serving.until(1)
    assert serving.statuses("r") == ["RESUMED"]
    assert store.get_run("r").blocked is None
    assert store.run_page(RunQuery(blocked=True)).runs == []
    assert store.queue_figures({"f": ServedCode()}, clock.ms)["f"].blocked == 0


async def test_a_blocked_run_is_tried_again_after_a_growing_time(store: Any, clock: Clock) -> None:
    """The store keeps when code may try a blocked run again; the wait doubles each time."""
    world = World()
    old, new = _flow(world, "a"), _flow(world, "b")
    await quick_on(store).run(old, Num(), run_id="r")
    clock.pass_by(hours=2)
    since = clock.ms
    for seconds in (0, 1, 2, 4):
        clock.ms = since + 1000 * seconds
        if seconds:
            clock.ms -= 1
            async with Serving(quick_on(store), new) as serving:
                await asyncio.sleep(0.05)
            assert serving.outcomes == {}
            clock.ms += 1
        async with Serving(quick_on(store), new) as serving:  # Another worker each time.
            await serving.until(1)
        mark = store.get_run("r").blocked
        assert (mark.since_ms, mark.until_ms) == (since, clock.ms + 1000 * max(seconds, 1))


def test_marks_of_blocked_runs() -> None:
    """Each code is in a mark once, the last one last; tries are 1 s to 5 min apart."""
    mark = block(None, "x", "A", 10_000)
    assert mark == BlockedMark("x", 10_000, 11_000, ("A",))
    mark = block(mark, "y", "B", 10_500)
    assert mark == BlockedMark("y", 10_000, 11_500, ("A", "B"))
    assert block(mark, "z", "A", 99_000_000) == BlockedMark("z", 10_000, 99_300_000, ("B", "A"))
    for number in range(30):
        mark = block(mark, "x", str(number), 20_000)
    assert len(mark.codes) == 20


async def test_a_resume_that_a_person_calls_writes_nothing(store: Any) -> None:
    """resume() with changed code raises PipelineChanged; the run has no mark, and is as it was."""
    world, ends = World(), list[str]()

    note = noting(ends, lambda run_id, result: run_id)
    await quick_on(store).run(_flow(world, "a", "b"), Num(), run_id="r")
    before = _stored(store, "r")
    with pytest.raises(PipelineChanged, match="cannot be resumed"):
        await quick_on(store, hooks=NodeHooks(on_run_end=note)).resume(_flow(world, "b"), "r")
    assert (_stored(store, "r"), ends) == (before, [])


async def test_an_open_question_outlives_code_that_does_not_fit(store: Any) -> None:
    """A question keeps its answer while the run is blocked, and code that fits takes it."""
    world = World()
    a, b = world.step("a"), world.step("b")

    def build(first: Any) -> Any:
        @stroma_flow("f", input=Num, output=Text)
        async def f(flow: Flow, state: Num) -> Text:
            await flow.step(first, state)
            return await flow.wait_for(Text, reason="Send it?")

        return f

    old, new = build(a), build(b)
    runner = quick_on(store)
    assert isinstance(
        await runner.drive((await runner.submit(old, Num())).run_id, pipelines=[old]), Suspended
    )
    (run_id,) = [one.run_id for one in store.list_runs()]
    await runner.signal(run_id, Text(text="yes"))
    waiting = store.waiting(run_id)
    blocked = await runner.drive(run_id, pipelines=[new])
    assert isinstance(blocked, Blocked)
    assert store.waiting(run_id) == waiting
    assert store.get_run(run_id).status == "SUSPENDED"
    ended = await runner.drive(run_id, pipelines=[old])
    assert ended.result.output == Text(text="yes")


@pytest.mark.parametrize("way", ["renamed", "inserted", "waiting", "removed"])
async def test_a_changed_list_blocks_its_run(store: Any, way: str) -> None:
    """A list that changed at the node that waits for an answer, or before it, is refused; the run stays."""
    world = World()
    a, b, last = (world.step(name) for name in ("a", "b", "last"))

    async def ask(state: Num) -> Num:
        if not store.waiting("r"):
            raise Suspend("Really?", schema=Num)
        return state

    question, other = node("ask", ask), node("other", ask)
    nodes = {
        "renamed": [b, question, last],
        "inserted": [b, a, question, last],
        "waiting": [a, other, last],
        "removed": [a],
    }[way]
    old, new = Pipeline("p", [a, question, last]), Pipeline("p", nodes)
    runner = quick_on(store)
    await runner.run(old, Num(), run_id="r")
    await runner.signal("r", Num(n=5))
    before, calls = _stored(store, "r"), list(world.calls)
    said = {
        "renamed": "(recorded: 'a'; the pipeline has 'b', 'ask', 'last')",
        "inserted": "(recorded: 'a'; the pipeline has 'b', 'a', 'ask', 'last')",
        "waiting": "(recorded: 'a', 'ask'; the pipeline has 'a', 'other', 'last')",
        "removed": "(recorded: 'a', 'ask'; the pipeline has 'a')",
    }[way]
    with pytest.raises(PipelineChanged, match=re.escape(said)):
        await runner.resume(new, "r")
    assert _stored(store, "r") == before
    blocked = await runner.drive("r", pipelines=[new])
    assert isinstance(blocked, Blocked)
    assert store.get_run("r").blocked.message == blocked.reason
    assert _stored(store, "r")[1:] == before[1:]
    assert world.calls == calls
    assert (await runner.drive("r", pipelines=[old])).status == "RESUMED"


async def test_a_death_is_counted_once_however_often_code_does_not_fit(
    store: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is given back counts as no death of its owner: max_recoveries is not used up."""
    world = World()
    old, new = _flow(world, "a"), _flow(world, "b")
    await quick_on(store).run(old, Num(), run_id="r")
    clock.pass_by(hours=2)
    for _ in range(5):
        assert isinstance(await quick_on(store, max_recoveries=2).drive("r", pipelines=[new]), Blocked)
    assert "could not be given back" not in caplog.text
    assert (await quick_on(store, max_recoveries=2).drive("r", pipelines=[old])).status == "RESUMED"


@pytest.mark.nightly
@pytest.mark.parametrize("directions", ["forwards", "backwards"])
@pytest.mark.parametrize("kind", ON_SERVERS)
async def test_two_hundred_runs_outlive_a_deploy(kind: str, directions: str) -> None:
    """Of 200 sleeping and waiting runs, workers of two versions of the code end all, in any order."""
    with store_of(kind) as store:
        await _deploy(store, directions, 200)


@pytest.mark.parametrize("directions", ["forwards", "backwards"])
async def test_workers_of_two_versions_of_the_code_end_all_runs(store: Any, directions: str) -> None:
    """While workers of old and new code run side by side, runs of both end, and none is FAILED."""
    await _deploy(store, directions, 8)


async def _deploy(store: Any, directions: str, count: int) -> None:
    world = World()
    a, b, audit, last = (world.step(name) for name in ("a", "b", "audit", "last"))

    def build(is_new: bool) -> Any:
        async def old_body(flow: Flow, state: Num) -> Num:
            state = await flow.step(a, state)
            if state.n % 2:
                await flow.sleep(0.2)
            else:
                await flow.wait_for(Text, reason="Go on?")
            return await flow.step(last, state)

        async def new_body(flow: Flow, state: Num) -> Num:
            state = await flow.step(b, await flow.step(audit, state))
            if state.n % 2:
                await flow.sleep(0.2)
            else:
                await flow.wait_for(Text, reason="Go on?")
            return await flow.step(last, state)

        return stroma_flow("f", input=Num, output=Num)(new_body if is_new else old_body)

    old, new = build(False), build(True)
    before, after = (old, new) if directions == "forwards" else (new, old)
    starter = quick_on(store, inline_wait_seconds=0)
    for number in range(count):
        await starter.run(before, Num(n=number), run_id=f"r{number}")
    for number in range(count, count + 2):
        await starter.run(after, Num(n=number), run_id=f"r{number}")
    runners = [quick_on(store, inline_wait_seconds=0) for _ in range(2)]
    async with Serving(runners[0], before), Serving(runners[1], after):
        for waiting in [one.run_id for one in store.list_runs(limit=1000) if store.waiting(one.run_id)]:
            await starter.signal(waiting, Text(text="yes"))
        async with asyncio.timeout(30 + count):
            while (statuses := {one.status for one in store.list_runs(limit=1000)}) != {"RESUMED"}:
                assert "FAILED" not in statuses
                await asyncio.sleep(0.05)
    assert all(one.blocked is None for one in store.list_runs())
