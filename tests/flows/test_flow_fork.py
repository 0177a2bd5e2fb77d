"""Forks of a flow at one of its calls."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, runner_on
from tests.kit import Num
from tests.shared_stores import STORES

from stroma import CheckpointNotFound, Flow, Pipeline, RunStatus, StepFailed, stroma_flow

pytestmark = pytest.mark.asyncio
store = store_fixture(*STORES)


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


async def test_mistakes(store: Any) -> None:
    """An unknown call, and a state for a call, are refused before anything is stored."""
    _, f = world_of_calls()
    runner = runner_on(store)
    await runner.run(f, Num())
    with pytest.raises(CheckpointNotFound, match="has no end of a call 'wriet'"):
        await runner.fork("r", f, at="wriet", new_run_id="fork")
    with pytest.raises(ValueError, match="is a call of a flow, which makes its inputs"):
        await runner.fork("r", f, at="add", state=Num(), new_run_id="fork")
    with pytest.raises(CheckpointNotFound):
        await runner.resume(f, "fork")
