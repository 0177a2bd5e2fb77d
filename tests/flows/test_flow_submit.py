"""``flow.submit``: a flow that submits runs of their own; over every store."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import World
from tests.kit import NEVER, Num
from tests.shared_stores import STORES

from stroma import AsyncInMemoryStore, Flow, Pipeline, StepFailed, StromaRunner, parallel
from stroma.checkpoint.records import RunQuery

store = store_fixture(*STORES)


def _runner(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(**{"store": store, "policy_map": NEVER, "tags": ("mine",), **config})


def _ids(store: Any) -> set[str]:
    """Return the ids of the runs that wait for a worker."""
    return {one.run_id for one in store.run_page(RunQuery(statuses=("QUEUED",))).runs}


async def test_a_flow_submits_runs(store: Any) -> None:
    """Each call submits a run of its own, with its place in the queue, whatever becomes of the flow."""
    world, ids = World(), list[str]()
    child = Pipeline("child", [world.step("work")])
    runner = _runner(store)

    @runner.flow("parent", input=Num, output=Num)
    async def parent(flow: Flow, state: Num) -> Num:
        ids.append(await flow.submit(child, Num(n=1), priority=-2, key="k"))
        ids.extend(await asyncio.gather(*(flow.submit(child, Num(n=n)) for n in (2, 3))))
        ids.append(await flow.submit(child, Num(n=4), run_id="own"))
        return state

    result = await runner.run(parent, Num(n=9), run_id="p")
    assert (result.status, result.output) == ("COMPLETED", Num(n=9))
    assert (len(set(ids)), ids[3], _ids(store)) == (4, "own", set(ids))
    record = store.get_run(ids[0])
    assert (record.pipeline, record.priority, record.key, record.tags) == ("child", -2, "k", ("mine",))
    served = asyncio.ensure_future(runner.serve(child, poll_seconds=0.02))
    ends = [await runner.handle(run_id, child).result(timeout=20) for run_id in ids]
    await runner.shutdown()
    await served
    assert [one.output for one in ends] == [Num(n=n + 1) for n in (1, 2, 3, 4)]


@pytest.mark.core
@pytest.mark.parametrize("dies_in", ["before", "after", "submission"])
async def test_a_crash_submits_no_others(store: Any, dies_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow whose process dies around a submission has submitted one run, with the same id."""
    world, ids = World(), list[str]()
    before, after = world.step("before"), world.step("after")
    child = Pipeline("child", [world.step("work")])
    submit = store.submit

    async def die_after_it(*values: Any) -> bool:
        is_new: bool = await submit(*values)
        if world.dies_in == "submission":
            world.dies.set()
            await asyncio.Event().wait()
        return is_new

    monkeypatch.setattr(store, "submit", die_after_it)

    async def live(dies_in: str | None) -> Any:
        runner = _runner(store)

        @runner.flow("parent", input=Num, output=Num)
        async def parent(flow: Flow, state: Num) -> Num:
            state = await flow.step(before, state)
            ids.append(await flow.submit(child, state))
            return await flow.step(after, state)

        return await world.live(lambda: runner.run(parent, Num(n=1), run_id="p", resume=True), dies_in)

    assert await live({"before": "before 1", "after": "after 2"}.get(dies_in, dies_in)) is None
    assert len(_ids(store)) == (dies_in != "before")
    result = await live(None)
    assert (result.status, result.output, len(set(ids))) == ("RESUMED", Num(n=3), 1)
    assert _ids(store) == set(ids)


async def test_a_submission_that_fails(store: Any) -> None:
    """An id of another run and an input that breaks the contract are StepFailed; wrong keywords are not."""
    world = World()
    child = Pipeline("child", [world.step("work")])
    runner = _runner(store)
    await runner.submit(child, Num(n=1), run_id="taken")

    @runner.flow("parent", input=Num, output=Num)
    async def parent(flow: Flow, state: Num) -> Num:
        with pytest.raises(StepFailed) as failed:
            await flow.submit(child, Num(n=2), run_id="taken")
        assert failed.value.failure.node_id == "submit child"
        with pytest.raises(ValueError, match="priority"):
            await flow.submit(child, state, priority=10**12)
        with pytest.raises(ValueError, match="run id"):
            await flow.submit(child, state, run_id="")
        with pytest.raises(TypeError, match="pydantic model"):
            await flow.submit(child, {"n": 1})
        with pytest.raises(TypeError, match="takes a flow or a Pipeline"):
            await flow.submit(world.step("x"), state)
        with pytest.raises(TypeError, match="starts with"):
            await flow.submit(Pipeline("group", [parallel(world.step("a"), world.step("b"))]), state)
        return state

    assert (await runner.run(parent, Num(n=9))).output == Num(n=9)
    assert _ids(store) == {"taken"}


async def test_a_flow_submits_itself() -> None:
    """A flow can submit a later run of itself."""
    runner = _runner(AsyncInMemoryStore())

    @runner.flow("again", input=Num, output=Num)
    async def again(flow: Flow, state: Num) -> Num:
        await flow.submit(again, Num(n=state.n + 1), delay=60)
        return state

    await runner.run(again, Num(n=1))
    assert len(_ids(runner.checkpoint_manager.store)) == 1
