"""What a resume tries again of a failed flow, and what it leaves alone; calls while a flow is ending."""

import asyncio
import gc
import weakref
from typing import Any

import pytest
from tests.flows.steps import World, run_of, runner_on
from tests.kit import Num, failing_with, node
from tests.shared_stores import IN_PROCESS, store_of

from stroma import Flow, NodeHooks, Pipeline, RunStatus, StepFailed, current_run, parallel, stroma_flow
from stroma.checkpoint import InMemoryStore


class Answer(Num):
    pass


async def test_a_cleanup_leaves_cancelled_siblings_to_the_resume() -> None:
    """A resume runs the siblings that a failure cancelled, though a ``finally`` made a step after that."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    world.turns.update({"slow": 10**6, "bad": 20})
    bad, slow, clean = world.step("bad"), world.step("slow"), world.step("clean")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(flow.step(one, state)) for one in (slow, bad)]
        finally:
            await flow.step(clean, state)
        return tasks[0].result()

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    world.turns.clear()
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=1))
    assert world.calls == ["slow 0", "bad 0", "clean 0", "slow 0", "bad 0"]


async def test_the_cause_is_the_failure_that_the_body_raised() -> None:
    """The cause of a failed flow is the step whose failure it raised, not one that it caught."""
    store, call = InMemoryStore(), failing_with(ValueError, "down")
    first, fallback = node("first", call), node("fallback", call)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            return await flow.step(first, state)
        except StepFailed as error:
            try:
                return await flow.step(fallback, state)
            except StepFailed:
                raise error from None

    assert (await runner_on(store).run(f, Num(), run_id="r")).status is RunStatus.PARTIAL
    assert store.get_run("r").cause.node_id == "first"


@pytest.mark.parametrize("way", ["map", "gather", "raises the first"])
async def test_siblings_that_failed_too_are_tried_again(way: str) -> None:
    """Where several fail, a resume tries all of them again, also if the body gathered all and raised one."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    bad = world.step("bad")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        items = [Num(n=n) for n in range(3)]
        if way == "map":
            outputs: list[Num] = await flow.map(bad, items)
            return outputs[-1]
        outcomes: list[Any] = await asyncio.gather(
            *(flow.step(bad, item) for item in items), return_exceptions=way == "raises the first"
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes[-1]

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    world.calls.clear()
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    assert world.calls == ["bad 0", "bad 1", "bad 2"]


@pytest.mark.parametrize("way", ["flow", "map", "pipeline"])
async def test_a_failure_inside_that_is_raised_later_is_tried_again(way: str) -> None:
    """A failure out of an inner flow, map or pipeline that a later process raises goes with its cause."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    bad = world.step("bad")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(bad, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        failed = None
        try:
            if way == "map":
                await flow.map(bad, [state])
            else:
                await flow.run(inner if way == "flow" else Pipeline("p", [bad]), state)
        except StepFailed as error:
            failed = error
        await flow.wait_for(Answer, reason="Give up?")
        if failed is not None:
            raise failed
        return state

    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Answer(n=1))
    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    assert (await runner_on(store).run(f, Num())).status is RunStatus.RESUMED
    assert world.calls == ["bad 0", "bad 0"]


async def test_a_slow_replay_is_not_taken_for_a_flow_at_rest() -> None:
    """A flow is not suspended while a recorded output is read back: the steps after it are made first."""
    world, store = World(), InMemoryStore()
    add, last = world.step("add"), world.step("last")
    is_read = asyncio.Event()

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def chain() -> Num:
            return await flow.step(last, await flow.step(add, state))

        found: Any = await asyncio.gather(chain(), flow.wait_for(Answer, reason="Go on?"))
        return Num(n=found[0].n)

    async def slow(*_: Any) -> None:
        asyncio.get_running_loop().call_later(0.02, is_read.set)
        await is_read.wait()

    run = run_of(f, store, hooks=NodeHooks(on_node_skipped=slow))
    await world.live(run, "last 1")
    assert (await world.live(run)).status is RunStatus.SUSPENDED
    assert world.calls == ["add 0", "last 1", "last 1"]


async def test_a_step_that_was_made_before_is_not_called_in_the_tear_down() -> None:
    """A ``finally`` that awaits a step made before the run was suspended does not call it."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        later = flow.step(add, state)
        try:
            await flow.wait_for(Answer, reason="Go on?")
        finally:
            await later
        return state

    result = await runner_on(InMemoryStore()).run(f, Num())
    assert (result.status, world.calls) == (RunStatus.SUSPENDED, [])


async def test_tasks_that_had_not_begun_are_not_called(caplog: pytest.LogCaptureFixture) -> None:
    """Calls in tasks that the body left alone, and that had not begun when it returned, are not made."""
    world = World()
    add = world.step("add")
    tasks: list[asyncio.Task[Any]] = []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        tasks.extend(
            asyncio.ensure_future(call)
            for call in (flow.step(add, state), flow.map(add, [state]), flow.sleep(0.01))
        )
        return state

    result = await runner_on(InMemoryStore()).run(f, Num())
    assert (result.status, world.calls, len(result.trace)) == (RunStatus.COMPLETED, [], 0)
    assert all(task.cancelled() for task in tasks)
    assert "flow 'f' ended while 4 of its tasks were under way" in caplog.text


@pytest.mark.parametrize("way", ["map", "flow", "pipeline"])
async def test_the_bound_of_a_flow_holds_for_what_it_runs_inside(way: str) -> None:
    """``max_concurrency=`` of a flow bounds items of its maps and steps of flows and pipelines inside."""
    at_work: list[int] = []
    world = World()
    peak = 0

    add = world.step("add", lambda n: n)
    call = world._call

    async def counted(what: str) -> None:
        nonlocal peak
        at_work.append(1)
        peak = max(peak, len(at_work))
        await call(what)
        at_work.pop()

    world._call = counted

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    @stroma_flow("f", input=Num, output=Num, max_concurrency=2)
    async def f(flow: Flow, state: Num) -> Num:
        items = [Num(n=n) for n in range(8)]
        if way == "map":
            outputs: list[Num] = await flow.map(add, items, max_concurrency=4)
            return outputs[-1]
        inside = inner if way == "flow" else Pipeline("p", [add])
        outputs = await asyncio.gather(*(flow.run(inside, item) for item in items))
        return outputs[-1]

    result = await runner_on(InMemoryStore()).run(f, Num())
    assert (result.status, len(world.calls), peak) == (RunStatus.COMPLETED, 8, 2)


async def test_what_followed_a_retried_failure_is_not_called_again() -> None:
    """G5: A resume after a failure returns the steps that ended after it from the journal."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    bad, add = world.step("bad"), world.step("add", lambda n: n)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def loop() -> Num:
            done = Num()
            for n in range(50):
                done = await flow.step(add, Num(n=n))
            return done

        outcomes: Any = await asyncio.gather(flow.step(bad, state), loop(), return_exceptions=True)
        if isinstance(outcomes[0], BaseException):
            raise outcomes[0]
        assert isinstance(outcomes[1], Num)
        return outcomes[1]

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    calls = len(world.calls)
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=49))
    assert world.calls[calls:] == ["bad 0"]


@pytest.mark.parametrize("kind", IN_PROCESS)
async def test_a_failure_beside_a_question_is_the_end_of_the_run(kind: str) -> None:
    """A flow that fails while its open question is looked up is FAILED or PARTIAL, not SUSPENDED."""
    world = World()
    bad = world.step("bad")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async with asyncio.TaskGroup() as group:
            group.create_task(flow.wait_for(Answer, reason="Go on?"))
            failing = group.create_task(flow.step(bad, state))
        return failing.result()

    world.failing.add("bad")
    for turns in range(0, 60, 5):
        world.turns["bad"] = turns
        with store_of(kind) as store:
            assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL


async def test_a_step_that_is_queued_gets_the_state_it_was_called_with() -> None:
    """A body that changes a state while its step waits for ``max_concurrency`` changes no input or replay."""
    world, store = World(), InMemoryStore()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num, max_concurrency=1)
    async def f(flow: Flow, state: Num) -> Num:
        queued = Num(n=1)
        tasks = [asyncio.create_task(flow.step(add, one)) for one in (state, queued)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        queued.n = 9
        outputs = await asyncio.gather(*tasks)
        await flow.wait_for(Answer, reason="Go on?")
        return outputs[1]

    world.turns["add"] = 20
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Answer())
    result = await runner_on(store).run(f, Num())
    assert (result.final_state, world.calls) == (Num(n=2), ["add 0", "add 1"])


async def test_a_call_with_another_input_after_a_retried_failure_is_made_anew() -> None:
    """What was recorded behind a failure is not the result of a call with another input, whatever calls."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    bad, add, child = world.step("bad"), world.step("add"), world.step("child")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def both(state: Num) -> Num:
            one = await flow.run(inner, state)
            other = await flow.step(parallel(child), state)
            await flow.map(add, [state] * min(3, state.n))
            await flow.run(Pipeline("p", [add, child]), state)
            return Num(n=one.n * 10 + other.n)

        try:
            await flow.step(bad, state)
        except StepFailed:
            await both(Num(n=5))
            raise
        return await both(Num(n=1))

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=22))
    assert world.calls[-5:] == ["add 1", "child 1", "add 1", "add 1", "child 2"]


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("way", ["flow", "inner"])
@pytest.mark.parametrize("is_fixed", [True, False])
async def test_a_cleanup_after_an_error_of_the_body_does_not_hinder_the_resume(
    kind: str, way: str, is_fixed: bool
) -> None:
    """A resume runs siblings again that the body's own exception cancelled, despite a ``finally``'s step."""
    world = World()
    world.turns["slow"] = 10**6
    first, slow, clean = world.step("first"), world.step("slow"), world.step("clean")
    is_raising = True

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(flow.step(slow, state))
                await flow.step(first, state)
                if is_raising:
                    raise ValueError("a bug of the body")
        finally:
            await flow.step(clean, state)
        return task.result()

    @stroma_flow("f", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        return await flow.run(inner, state)

    f = inner if way == "flow" else outer
    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is not RunStatus.COMPLETED
        assert sorted(world.calls[:2]) == ["first 0", "slow 0"]
        assert world.calls[2:] == ["clean 0"]
        is_raising = not is_fixed
        if is_fixed:
            world.turns.clear()
        result = await runner_on(store).run(f, Num())
        assert result.failure is None or result.failure.reason != "changed", result.failure
        assert world.calls[3:] in ([], ["slow 0"])
        if is_fixed:
            assert (result.final_state, world.calls[3:]) == (Num(n=1), ["slow 0"])


async def test_an_error_of_the_body_leaves_an_earlier_timeout_alone() -> None:
    """A step that a timeout cancelled, with the body going on, stays cancelled after the body raises."""
    world, store = World(), InMemoryStore()
    world.turns["slow"] = 10**6
    slow, add, clean = world.step("slow"), world.step("add"), world.step("clean")
    is_raising = True

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.timeout(0.1):
                await flow.step(slow, state)
        except TimeoutError:
            state = await flow.step(add, state)
        try:
            if is_raising:
                raise ValueError("a bug of the body")
        finally:
            state = await flow.step(clean, state)
        return state

    assert (await runner_on(store).run(f, Num())).status is not RunStatus.COMPLETED
    is_raising = False
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["slow 0", "add 0", "clean 1"]


@pytest.mark.parametrize("kind", IN_PROCESS)
async def test_a_step_with_another_input_after_a_retried_failure_has_another_key(kind: str) -> None:
    """What a step did for one input, after a failure, and does for another one once that is retried, has two
    idempotency keys; the resumes after that return both steps from the journal."""
    world = World()
    world.failing.add("bad")
    bad, pay = world.step("bad"), world.step("pay")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        amount, failed = Num(n=1), None
        try:
            await flow.step(bad, state)
        except StepFailed as error:
            amount, failed = Num(n=5), error
        paid = await flow.step(pay, amount)
        if failed is not None:
            raise failed
        await flow.wait_for(Answer, reason="Go on?")
        return await flow.step(pay, paid)

    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
        world.failing.clear()
        for _ in range(3):
            assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
        await runner_on(store).signal("r", Answer())
        result = await runner_on(store).run(f, Num())
        assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    assert world.calls == ["bad 0", "pay 5", "bad 0", "pay 1", "pay 2"]
    assert len({key for what in ("pay 5", "pay 1", "pay 2") for key in world.keys[what]}) == 3


async def test_a_flow_that_has_ended_is_freed_at_once() -> None:
    """A run of a flow that nobody references is freed without garbage collection: its trace may be large."""
    runs: list[weakref.ref[Any]] = []

    async def note(state: Num) -> Num:
        runs.append(weakref.ref(current_run()))
        return state

    add = node("add", note)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await asyncio.gather(flow.step(add, state), flow.sleep(0.001))
        return await flow.step(add, state)

    gc.collect()
    gc.disable()
    try:
        await runner_on(None).run(f, Num())
        assert [one() for one in runs] == [None, None]
    finally:
        gc.enable()
