"""Flows: what a body sees of its steps, and what a run is with them. Over every store where stores matter."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, run_of, runner_on
from tests.kit import NEVER, ONCE, Num, computing, failing_with, node, noting, quick
from tests.shared_stores import STORES

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    Flow,
    NodeHooks,
    Pipeline,
    RunStatus,
    StepFailed,
    StromaRunner,
    current_node,
    stroma_flow,
)

store = store_fixture(*STORES)


async def test_a_flow_decides_in_plain_python() -> None:
    """A body goes on by what its steps return; the output is the run's final state."""
    world = World()
    add, double = world.step("add"), world.step("double", lambda n: 2 * n)

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        while state.n < 5:
            state = await flow.step(add, state)
        if state.n % 2:
            state = await flow.step(double, state)
        return Text(text=str(state.n))

    result = await quick().run(f, Num(n=3))
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Text(text="10"))
    assert result.output == Text(text="10")
    assert world.calls == ["add 3", "add 4", "double 5"]
    assert [(event.node_id, event.branch) for event in result.trace] == [
        ("add", "add#0"),
        ("add", "add#1"),
        ("double", "double#2"),
    ]
    assert all(not event.children for event in result.trace)


async def test_each_step_is_a_full_node() -> None:
    """Steps have hooks, retries, usage and a place in the trace; a flow itself calls no hook of nodes."""
    seen: list[str] = []

    async def start(_run: str, node_id: str, _state: dict[str, Any]) -> None:
        here = current_node()
        assert here.group is None
        seen.append(f"start {node_id} {here.attempt}")

    success = noting(seen, lambda _run, node_id, _state, tokens: f"success {node_id} {tokens}")
    failure = noting(seen, lambda _run, node_id, *_: f"failure {node_id}")
    failed = False

    async def ask(state: Num) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise ValueError("not yet")
        return {"n": 7}, 10, 5, "gpt-4o"

    asked = node("ask", ask)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return await flow.step(asked, state)

    hooks = NodeHooks(on_node_start=start, on_node_success=success, on_node_failure=failure)
    result = await quick(hooks=hooks, policy_map=ONCE).run(f, Num())
    assert result.final_state == Num(n=7)
    assert seen == ["start ask 1", "failure ask", "start ask 2", "success ask 15"]
    assert result.total_tokens == 15
    assert result.total_cost_usd > 0
    assert [event.outcome for event in result.trace] == ["failure", "success"]


async def test_a_failed_step_is_an_exception_of_the_body() -> None:
    """StepFailed comes after the last attempt and has the failure; uncaught, it is the failure of the run."""
    world = World()
    world.failing.add("bad")
    bad, good = world.step("bad"), world.step("good")
    caught: list[StepFailed] = []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.step(bad, state)
        except StepFailed as error:
            caught.append(error)
        state = await flow.step(good, state)
        if state.n > 1:
            await flow.step(bad, state)
        return state

    assert (await quick(policy_map=ONCE).run(f, Num())).status is RunStatus.COMPLETED
    assert world.calls == ["bad 0", "bad 0", "good 0"]
    (error,) = caught
    assert (error.failure.node_id, error.failure.attempt, error.failure.message) == ("bad", 2, "bad 0 failed")
    assert (error.path, str(error)) == (("f", "bad"), "step 'bad' failed: ValueError: bad 0 failed")
    assert isinstance(error.__cause__, ValueError)
    result = await quick(policy_map=ONCE).run(f, Num(n=1))
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert (result.failure.node_id, result.failure.message) == ("bad", "bad 2 failed")
    with pytest.raises(ValueError, match="bad 2 failed"):
        _ = result.output


async def test_the_first_failure_of_a_group_is_that_of_the_run() -> None:
    """An ExceptionGroup of a TaskGroup hides no failure: status and failure are the first failed step's."""
    world = World()
    world.turns["slow"] = 50
    never, slow = node("never", failing_with(NotImplementedError, "never")), world.step("slow")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async with asyncio.TaskGroup() as group:
            group.create_task(flow.step(slow, state))
            group.create_task(flow.step(never, state))
        return state

    result = await quick(policy_map=NEVER).run(f, Num())
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert (result.failure.node_id, result.failure.reason) == ("never", "bug")
    outcomes = {event.node_id: event.outcome for event in result.trace}
    assert outcomes == {"never": "failure", "slow": "cancelled"}


async def test_a_crossed_budget_ends_a_flow_whatever_it_catches(store: Any) -> None:
    """After the attempt that crosses a limit nothing is called, siblings finish, and the run is PARTIAL."""
    calls: list[str] = []

    async def ask(state: Num) -> Any:
        calls.append(f"ask {state.n}")
        for _ in range(state.n):
            await asyncio.sleep(0.001)
        return {"n": state.n}, 100

    asked = node("ask", ask)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await flow.step(asked, Num(n=1))
        tasks = [asyncio.create_task(flow.step(asked, Num(n=n))) for n in (2, 30)]
        while True:
            try:
                await asyncio.gather(*tasks)
                await flow.step(asked, Num(n=5))
            except Exception:
                calls.append("caught")

    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=150), run_id="r")
    result = await runner.run(f, Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert "budget" in result.failure.message.lower()
    assert calls == ["ask 1", "ask 2", "ask 30"]
    assert [event.outcome for event in result.trace] == ["success", "failure", "failure"]
    assert sorted(at.branch for at in store.attempts("r") if at.output is not None) == [
        "ask#0",
        "ask#1",
        "ask#2",
    ]


async def test_steps_at_once_share_the_clock() -> None:
    """Steps side by side take the latency budget once, as long as the slowest of them."""

    async def wait(state: Num) -> Num:
        await asyncio.sleep(0.05)
        return state

    waits = node("wait", wait)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await asyncio.gather(*(flow.step(waits, state) for _ in range(5)))
        return state

    from stroma.testing import FakeClock

    with FakeClock():
        result = await quick(budget=ExecutionBudget(max_latency_ms=80)).run(f, Num())
    assert result.status is RunStatus.COMPLETED, result.failure


async def test_map_runs_a_node_on_each_item(store: Any) -> None:
    """The outputs are in the order of the items; after a crash only the items without a commit are run."""
    world = World()
    double = world.step("double", lambda n: 2 * n)
    world.turns["double 0"] = 9

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        found = await flow.map(double, [Num(n=n) for n in range(4)], max_concurrency=2)
        return Text(text=str([one.n for one in found]))

    run = run_of(f, store)
    await world.live(run, "double 3")
    assert len(world.calls) == 4
    before, world.calls[:] = set(world.calls), []
    result = await world.live(run)
    assert result.final_state == Text(text="[0, 2, 4, 6]")
    assert "double 3" in world.calls
    assert set(world.calls) <= before
    assert len(world.calls) <= 2
    assert all(len(keys) == 1 for keys in world.keys.values())


async def test_a_failed_item_ends_a_map(store: Any) -> None:
    """The first item that fails cancels the others; its StepFailed can be caught, on replay as well."""
    world = World()
    world.failing.add("item 1")
    item, last = world.step("item"), world.step("last")

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        try:
            await flow.map(item, [Num(n=n) for n in range(3)])
            found = "none"
        except StepFailed as error:
            found = error.failure.message
        await flow.step(last, state)
        return Text(text=found)

    run = run_of(f, store)
    await world.live(run, "last 0")
    world.calls.clear()
    world.failing.clear()
    result = await world.live(run)
    # The failure was not stored by then: it is by the commit that follows it.
    assert result.final_state in (Text(text="item 1 failed"), Text(text="none"))


async def test_flows_and_pipelines_run_inside_a_flow(store: Any) -> None:
    """A flow or Pipeline inside has the same trace and budget; finished, it is not looked into again."""
    world = World()
    add, double = world.step("add"), world.step("double", lambda n: 2 * n)

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        return await flow.step(add, state)

    @stroma_flow("outer", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        state = await flow.run(inner, state)
        state = await flow.run(Pipeline("p", [add, double]), state)
        return await flow.run(inner, state)

    run = run_of(outer, store)
    await world.live(run, "add 6")
    assert world.calls == ["add 0", "add 1", "add 2", "double 3", "add 6"]
    world.calls.clear()
    result = await world.live(run)
    assert world.calls == ["add 6", "add 7"]
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=8))
    assert [event.branch for event in result.trace] == ["inner#2.add#0", "inner#2.add#1"]


async def test_a_failed_flow_inside_is_a_failed_step() -> None:
    """The failure of a flow inside is a StepFailed whose path names the flows around the step."""
    world = World()
    world.failing.add("bad")
    bad = world.step("bad")
    paths: list[tuple[str, ...]] = []

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(bad, state)

    @stroma_flow("broken", input=Num, output=Num)
    async def broken(flow: Flow, state: Num) -> Num:
        raise KeyError("of the body")

    @stroma_flow("outer", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        for one in (inner, broken):
            try:
                await flow.run(one, state)
            except StepFailed as error:
                paths.append(error.path)
        return state

    assert (await quick(policy_map=NEVER).run(outer, Num())).status is RunStatus.COMPLETED
    assert paths == [("outer", "inner", "bad"), ("outer", "broken")]


async def test_a_flow_is_a_node_of_a_pipeline(store: Any) -> None:
    """In a list a flow takes the output before it and hands on its own; finished, a resume skips it."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        return await flow.step(add, state)

    run = run_of(Pipeline("p", [add, f, add]), store)
    await world.live(run, "add 3")
    world.calls.clear()
    result = await world.live(run)
    assert world.calls == ["add 3"]
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=4))


async def test_every_way_to_run_takes_a_flow(store: Any) -> None:
    """run, run_many, stream, resume, recover and fork take a flow; a finished one returns without a call."""
    world = World()
    add = world.step("add")
    runner = StromaRunner.quick(store=store, policy_map=NEVER)

    @runner.flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        return await flow.step(add, state)

    first = await runner.run(f, Num(), run_id="a")
    assert first.final_state == Num(n=2)
    many = await runner.run_many(f, [Num(n=1), Num(n=2)])
    assert [one.final_state for one in many if not isinstance(one, Exception)] == [Num(n=3), Num(n=4)]
    async with runner.stream(f, Num()) as stream:
        kinds = [event.kind async for event in stream]
    assert kinds.count("node_success") == 2 or len(kinds) > 2
    world.calls.clear()
    again = await runner.run(f, Num(), run_id="a", if_exists="return")
    assert (again.status, again.final_state, world.calls) == (RunStatus.COMPLETED, Num(n=2), [])
    forked = await runner.fork("a", f, at="f", new_run_id="b")
    assert (forked.final_state, world.calls) == (Num(n=2), ["add 0", "add 1"])

    async def run() -> Any:
        return await runner.run(f, Num(n=7), run_id="c")

    await world.live(run, "add 8")
    world.calls.clear()
    resumed = await world.live(lambda: runner.resume(f, "c"))
    assert (resumed.status, resumed.final_state, world.calls) == (RunStatus.RESUMED, Num(n=9), ["add 8"])
    assert store.get_run("c").pipeline == "f"
    assert await runner.recover(f) == {}


def test_a_flow_runs_without_an_event_loop() -> None:
    """run_sync takes a flow."""
    world = World()
    add = world.step("add")

    @stroma_flow("f")
    async def f(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    assert quick().run_sync(f, Num()).final_state == Num(n=1)


async def test_mutating_an_output_changes_nothing_recorded() -> None:
    """What a body does to an output is in neither the trace nor the journal."""

    class Items(BaseModel):
        items: list[int] = []

    make = computing(lambda _: Items(items=[1, 2]))
    made, used = node("make", make, Num, Items), node("use", make, Items, Items)

    @stroma_flow("f", input=Num, output=Items)
    async def f(flow: Flow, state: Num) -> Items:
        found = await flow.step(made, state)
        found.items.append(3)
        await flow.step(used, found)
        found.items.append(4)
        return found

    result = await quick().run(f, Num())
    assert result.output == Items(items=[1, 2, 3, 4])
    first, second = result.trace
    assert first.output_state == {"items": [1, 2]}
    assert second.input_state == {"items": [1, 2, 3]}


async def test_open_calls_end_with_the_flow(caplog: pytest.LogCaptureFixture) -> None:
    """Steps that are under way when the body returns are cancelled and awaited, with a warning."""
    world = World()
    world.turns["slow"] = 1000
    slow, quick_one = world.step("slow"), world.step("quick")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        task = asyncio.create_task(flow.step(slow, state))
        await flow.step(quick_one, state)
        assert not task.done()
        return state

    result = await quick().run(f, Num())
    assert result.status is RunStatus.COMPLETED
    assert [event.outcome for event in result.trace] == ["success", "cancelled"]
    assert "flow 'f' ended while 1 of its tasks were under way" in caplog.text


async def test_a_cancelled_run_cancels_its_steps(store: Any) -> None:
    """Cancelling the task of a run ends the body and its steps, and the run can be resumed."""
    world = World()
    add = world.step("add")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            state = await flow.step(add, state)
            return await flow.step(add, state)
        except Exception:
            world.calls.append("caught")
            raise

    run = run_of(f, store)
    assert await world.live(run, "add 1") is None
    assert world.calls == ["add 0", "add 1"]
    assert store.get_run("r").status == "CANCELLED"
    result = await world.live(run)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["add 0", "add 1", "add 1"]


async def test_a_shutdown_starts_no_further_step(store: Any) -> None:
    """A drained run ends after its present step as INTERRUPTED, and goes on from there."""
    world = World()
    add = world.step("add")
    runner = StromaRunner.quick(store=store, policy_map=NEVER, run_id="r", resume=True)
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def wait(state: Num) -> Num:
        begun.set()
        await goes_on.wait()
        return state

    waits = node("wait", wait)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(waits, state)
        return await flow.step(add, state)

    under_way = asyncio.ensure_future(runner.run(f, Num()))
    await begun.wait()
    ending = asyncio.ensure_future(runner.shutdown())
    await asyncio.sleep(0)
    goes_on.set()
    await ending
    assert (await under_way).status is RunStatus.INTERRUPTED
    assert world.calls == []
    again = await runner_on(store).run(f, Num())
    assert (again.status, again.final_state, world.calls) == (RunStatus.RESUMED, Num(n=1), ["add 0"])


async def test_policies_and_timeouts_hold_for_steps(caplog: pytest.LogCaptureFixture) -> None:
    """What a config says of a node by its id holds where it is a step, without a warning of an unknown id."""
    calls = 0

    async def slow(state: Num) -> Num:
        nonlocal calls
        calls += 1
        if calls < 3:
            await asyncio.sleep(10)
        return state

    slowly = node("slow", slow)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return await flow.step(slowly, state)

    thrice = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0)}
    runner = quick(policy_map=NEVER, node_policies={"slow": thrice}, node_timeouts={"slow": 5})
    result = await runner.run(f, Num())
    assert (result.status, calls) == (RunStatus.COMPLETED, 3)
    assert "names 'slow'" not in caplog.text
