"""Flows that submit runs of their own, and forks of a flow at one of its calls."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, runner_on
from tests.kit import NEVER, Num, failing_with
from tests.shared_stores import STORES

from stroma import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    Flow,
    Pipeline,
    RunStatus,
    StepFailed,
    StromaRunner,
    parallel,
    stroma_flow,
    stroma_node,
)
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
        ids.append(await flow.submit(child, Num(n=4), run_id="own", delay=flow.now(), expires=60))
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


def world_of_calls() -> tuple[World, Any]:
    """A flow with a caught failure, a map, a child flow, a sleep, a question and two writes."""
    world = World()
    world.failing.add("bad")
    add, bad, write = (world.step(name) for name in ("add", "bad", "write"))

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(add, state))

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        began = flow.now()
        try:
            await flow.step(bad, state)
        except StepFailed:
            pass
        items = await flow.map(add, [Num(n=n) for n in range(3)])
        child = await flow.run(inner, state)
        answer = await flow.wait_for(Text, reason="Go on?")
        await flow.sleep(0.001)
        first = await flow.step(write, child)
        second = await flow.step(write, Num(n=flow.random() > 2))
        return Text(text=f"{began} {[one.n for one in items]} {answer.text} {first.n} {second.n}")

    return world, f


async def test_a_flow_is_forked_at_a_call(store: Any) -> None:
    """The fork gets what the flow got before that call ended, repeats nothing of it, and makes the call."""
    world, f = world_of_calls()
    runner = runner_on(store)
    assert (await runner.run(f, Num())).status is RunStatus.SUSPENDED
    await runner.signal("r", Text(text="yes"))
    first = await runner.run(f, Num())
    world.calls.clear()
    fork = await runner.fork("r", f, at="write", new_run_id="fork")
    assert (fork.status, fork.output.text) == (RunStatus.RESUMED, first.output.text)
    assert world.calls == ["write 2", "write 0"]
    world.calls.clear()
    assert (await runner.fork("r", f, at="write#5")).output.text == first.output.text
    assert world.calls == ["write 0"]
    world.calls.clear()
    assert (await runner.fork("r", f, at="inner#2.add#1")).status is RunStatus.SUSPENDED
    assert world.calls == ["add 1"]
    assert len(world.keys["write 2"]) == 2, "the fork has a key of its own"


async def test_a_flow_in_a_pipeline_is_forked_at_a_call(store: Any) -> None:
    """What is before the flow is restored, what is after it is called; `show` prints the place of a call."""
    world = World()
    first, add, last = (world.step(name) for name in ("first", "mail.add", "last"))

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        one, two = await asyncio.gather(flow.step(add, state), flow.step(add, Num(n=5)))
        return await flow.step(add, Num(n=one.n + two.n))

    pipeline = Pipeline("p", [first, f, last])
    runner = runner_on(store)
    assert (await runner.run(pipeline, Num())).status is RunStatus.COMPLETED
    world.calls.clear()
    assert (await runner.fork("r", pipeline, at="mail.add#2")).status is RunStatus.RESUMED
    assert world.calls == ["mail.add 8", "last 9"]


@pytest.mark.parametrize("at", ["bad", "0.inner#2.bad#1"])
async def test_the_output_of_a_call_that_failed_can_be_given(store: Any, at: str) -> None:
    """A fork has the given output of the call that stopped the flow, and calls nothing again."""
    world = World()
    add, bad = world.step("add"), world.step("bad")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(bad, await flow.step(add, state)))

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        first = await flow.step(bad, state)
        await flow.sleep(0.001)
        await flow.step(add, first)
        world.failing.add("bad")
        return await flow.run(inner, state)

    runner = runner_on(store)
    for _ in range(2):  # A resume calls it again.
        assert (await runner.run(f, Num())).status is RunStatus.PARTIAL
    world.calls.clear()
    fork = await runner.fork("r", f, at=at, output=Num(n=40), new_run_id="fork")
    assert (fork.status, fork.output, world.calls) == (RunStatus.RESUMED, Num(n=41), ["add 40"])
    forked = [one for one in store.attempts("fork") if one.outcome == "forked"]
    forked.sort(key=lambda one: one.started_ns)
    assert [one.node_id for one in forked] == ["bad", "add", "add", "bad"], "as the flow got them"
    assert [one.message for one in forked] == [None] * 3 + ["output given at the fork"]
    again = await runner.fork("fork", f, at="inner#2.add#2")
    assert (again.output, world.calls) == (Num(n=41), ["add 40"] * 2), "the fork has it as any other output"


@pytest.mark.parametrize("kind", ["map", "caught", "gathered"])
async def test_an_output_is_given_where_the_body_got_the_failure(store: Any, kind: str) -> None:
    """An item of a map, one of several tasks, and a call whose failure the body caught can be given, too."""
    world = World()
    world.failing.add("bad")
    add, bad = world.step("add"), world.step("bad")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        if kind == "map":
            return Num(n=sum(one.n for one in await flow.map(bad, [state])))
        if kind == "gathered":
            both = await asyncio.gather(flow.step(add, state), flow.step(bad, state))
            return Num(n=sum(one.n for one in both))
        try:
            return await flow.step(bad, state)
        except StepFailed:
            return await flow.step(add, state)

    runner = runner_on(store)
    await runner.run(f, Num())
    world.calls.clear()
    fork = await runner.fork("r", f, at="bad", output=Num(n=40))
    assert (fork.status, fork.output, world.calls) == (
        RunStatus.RESUMED,
        Num(n=40 + (kind == "gathered")),
        [],
    )


async def test_mistakes(store: Any) -> None:
    """An unknown call, and a state for a call, are refused before anything is stored."""
    _, f = world_of_calls()
    runner = runner_on(store)
    await runner.run(f, Num())
    with pytest.raises(CheckpointNotFound, match="has no end of a call 'wriet'"):
        await runner.fork("r", f, at="wriet", new_run_id="fork")
    with pytest.raises(ValueError, match="is a call of a flow, which makes its inputs"):
        await runner.fork("r", f, at="add", state=Num(), new_run_id="fork")

    @stroma_flow("grouped", input=Num, output=Num)
    async def grouped(flow: Flow, state: Num) -> Num:
        return await flow.step(
            parallel(stroma_node("bad", input=Num, output=Num)(failing_with(KeyError))), state
        )

    await runner_on(store, run_id="g").run(grouped, Num())
    with pytest.raises(CheckpointNotFound, match="is inside a group, so its output cannot be given"):
        await runner.fork("g", grouped, at="bad", output=Num(), new_run_id="fork")
    with pytest.raises(CheckpointNotFound):
        await runner.resume(f, "fork")
