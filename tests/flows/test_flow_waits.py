"""Flows that wait: for a time, or for the answer of a person, over every store."""

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, Text, World, run_of, runner_on
from tests.kit import Num, computing, here, node
from tests.shared_stores import STORES

from stroma import Flow, NodeContract, RunStatus, StoreError, current_node, stroma_flow, stroma_node
from stroma.checkpoint.flow_notes import LAST_MS

store = store_fixture(*STORES)


async def test_a_long_sleep_suspends_the_run(store: Any, clock: Clock) -> None:
    """The run is SUSPENDED until the recorded time, whatever process looks at it, and goes on from there."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        await flow.sleep(hours=1)
        return await flow.step(add, state)

    first = await runner_on(store).run(f, Num())
    assert (first.status, first.failure) == (RunStatus.SUSPENDED, None)
    assert first.suspended == ["sleeping until 2027-01-15T09:00:00+00:00"]
    assert store.get_run("r").status == "SUSPENDED"
    clock.pass_by(minutes=50)
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    clock.pass_by(minutes=10)
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["add 0", "add 1"]


@pytest.mark.parametrize("seconds", [1e13, 1e300, math.inf])
async def test_a_wait_beyond_the_calendar(store: Any, seconds: float) -> None:
    """A wait that ends after the last datetime suspends the run, whose end is recorded."""

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await asyncio.sleep(seconds)
        return state

    result = await runner_on(store).run(f, Num())
    assert (result.status, result.suspended) == ("SUSPENDED", ["sleeping until 9999-12-31T23:59:59+00:00"])
    assert (store.get_run("r").status, store.get_run("r").due_ms) == ("SUSPENDED", LAST_MS)


async def test_a_short_sleep_stays_in_the_process(store: Any) -> None:
    """Up to inline_wait_seconds a flow waits in place; ``until`` may be past, and the trace shows it."""

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await flow.sleep(0.3)
        await flow.sleep(until=datetime(2020, 1, 1, tzinfo=UTC))
        return state

    result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.COMPLETED
    assert [mark.kind for mark in result.trace.marks] == ["slept", "slept"]
    result = await runner_on(store, run_id="s", inline_wait_seconds=0).run(f, Num())
    assert result.status is RunStatus.SUSPENDED


async def test_an_answer_resumes_a_flow(store: Any) -> None:
    """wait_for suspends the run, also inside ``except Exception``, and returns the answer in any process."""
    world = World()
    add, seen = world.step("add"), []

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        state = await flow.step(add, state)
        try:
            answer = await flow.wait_for(Text, reason="Send it?")
        except Exception:
            seen.append("caught")
            raise
        state = await flow.step(add, state)
        return Text(text=f"{answer.text} {state.n}")

    first = await runner_on(store).run(f, Num())
    assert (first.status, first.suspended) == (RunStatus.SUSPENDED, ["Send it?"])
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Text(text="yes"))
    with pytest.raises(StoreError):
        await runner_on(store).signal("r", Text(text="no"))
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Text(text="yes 2"))
    assert (world.calls, seen) == (["add 0", "add 1"], [])


async def test_answers_reach_the_question_that_they_are_for(store: Any) -> None:
    """Of several open questions, each gets its own answer, in any order; steps beside them finish first."""
    world = World()
    add = world.step("add")
    world.turns["add"] = 30

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        async with asyncio.TaskGroup() as group:
            one = group.create_task(flow.wait_for(Text, reason="one?", key="one"))
            two = group.create_task(flow.wait_for(Text, reason="two?", key="two"))
            made = group.create_task(flow.step(add, state))
        return Text(text=f"{one.result().text} {two.result().text} {made.result().n}")

    first = await runner_on(store).run(f, Num())
    assert (first.status, sorted(first.suspended)) == (RunStatus.SUSPENDED, ["one?", "two?"])
    ids = {one.reason: one.id for one in first.questions}
    with pytest.raises(ValueError, match="2 open questions; pass question="):
        await runner_on(store).signal("r", Text(text="x"))
    await runner_on(store).signal("r", Text(text="B"), question=ids["two?"])
    assert (await runner_on(store).run(f, Num())).suspended == ["one?"]
    await runner_on(store).signal("r", Text(text="A"), question=ids["one?"])
    result = await runner_on(store).run(f, Num())
    assert result.final_state == Text(text="A B 1")
    assert world.calls == ["add 0"]


async def test_a_question_expires(store: Any, clock: Clock) -> None:
    """After its timeout a question is a TimeoutError, on replay too, and takes no answer any more."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.wait_for(Text, reason="Well?", timeout=timedelta(days=7))
        except TimeoutError:
            state = await flow.step(add, state)
        return await flow.step(add, state)

    run = run_of(f, store)
    assert (await run()).status is RunStatus.SUSPENDED
    clock.pass_by(days=8)
    await world.live(run, "add 1")
    with pytest.raises(StoreError):
        await runner_on(store).signal("r", Text(text="late"))
    clock.pass_by(days=-8)
    result = await world.live(run)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["add 0", "add 1", "add 1"]


async def test_the_tear_down_of_a_suspended_flow_calls_nothing(store: Any) -> None:
    """A ``finally`` around a wait runs when the run is suspended, and its steps are not called."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.wait_for(Text, reason="Well?")
        finally:
            await flow.step(add, state)
        return state

    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    assert world.calls == []


async def test_a_step_may_wait_for_a_person(store: Any) -> None:
    """A node that suspends is a step that suspends its flow; siblings finish; the node gets the answer."""
    world = World()
    add = world.step("add")

    ask = computing(lambda _: here().wait_for(Text, reason="Node?"))
    asks = node("ask", ask, Num, Text)

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        answer, made = await asyncio.gather(flow.step(asks, state), flow.step(add, state))
        return Text(text=f"{answer.text} {made.n}")

    first = await runner_on(store).run(f, Num())
    assert (first.status, first.suspended) == (RunStatus.SUSPENDED, ["Node?"])
    await runner_on(store).signal("r", Text(text="yes"))
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Text(text="yes 1"))
    assert world.calls == ["add 0"]


async def test_a_shutdown_does_not_wait_for_a_sleep() -> None:
    """A flow that sleeps in the process ends at once as INTERRUPTED when the runner shuts down."""
    runner = runner_on(None)
    asleep = asyncio.Event()

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        asleep.set()
        await flow.sleep(30)
        return state

    under_way = asyncio.ensure_future(runner.run(f, Num()))
    await asleep.wait()
    async with asyncio.timeout(5):
        await runner.shutdown()
        assert (await under_way).status is RunStatus.INTERRUPTED


async def test_a_question_that_the_body_cancelled_is_closed(store: Any) -> None:
    """A question whose wait the body cancels takes no answer any more, in this process and on a resume."""
    world = World()
    world.turns["add"] = 30
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        early = asyncio.create_task(flow.wait_for(Text, reason="First?", key="first"))
        state = await flow.step(add, state)
        early.cancel()
        await asyncio.wait([early])
        answer = await flow.wait_for(Text, reason="Second?", key="second")
        return await flow.step(add, Num(n=len(answer.text)))

    first = await runner_on(store).run(f, Num())
    assert first.suspended == ["Second?"]
    with pytest.raises(StoreError):
        await runner_on(store).signal("r", Text(text="late"), question="0.!#first:1")
    again = await runner_on(store).run(f, Num())
    assert (again.status, again.suspended) == (RunStatus.SUSPENDED, ["Second?"])
    await runner_on(store).signal("r", Text(text="abc"))
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=4))
    assert world.calls == ["add 0", "add 3"]


async def test_a_question_that_a_failure_cancelled_is_asked_again(store: Any) -> None:
    """A resume that tries a failed step again asks the question beside it, which the failure had closed."""
    world = World()
    world.failing.add("bad")
    world.turns["bad"] = 30
    bad = world.step("bad")

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(flow.wait_for(Text, reason="Well?"))
            group.create_task(flow.step(bad, state))
        return answer.result()

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    second = await runner_on(store).run(f, Num())
    assert (second.status, second.suspended) == (RunStatus.SUSPENDED, ["Well?"])
    await runner_on(store).signal("r", Text(text="yes"))
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Text(text="yes"))


@pytest.mark.parametrize("again", [False, True])
async def test_a_step_that_asks_is_given_up(store: Any, clock: Clock, again: bool) -> None:
    """If the body cancels a step that asks, the question is closed: an answer to it is refused, and the run
    completes without an open question, also where another process resumes it."""

    @stroma_node("ask", NodeContract(node_id="ask", input_schema=Num, output_schema=Num))
    async def ask(state: Num) -> Num:
        current_node().wait_for(Text, reason="Send it?")
        return state

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        asking = asyncio.create_task(flow.step(ask, state))
        await flow.sleep(hours=1)
        asking.cancel()
        if again:
            await flow.sleep(hours=1)
        return state

    result = await runner_on(store).run(f, Num())
    assert result.suspended == ["Send it?"]
    (question,) = result.questions
    clock.pass_by(minutes=61)
    result = await runner_on(store).run(f, Num())
    if again:
        assert (result.status, result.questions) == (RunStatus.SUSPENDED, ())
    with pytest.raises(StoreError, match="is not open"):
        await runner_on(store).signal("r", Text(text="yes"), question=question.id)
    clock.pass_by(minutes=61)
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.questions, result.suspended) == (RunStatus.RESUMED, (), [])
