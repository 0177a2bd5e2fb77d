"""Flows that are resumed: what was recorded holds, whatever order things finish in, and changes are found."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, run_of, runner_on
from tests.kit import NEVER, Num, node, noting, quick, words
from tests.kit import Item as Page
from tests.shared_stores import IN_PROCESS, STORES

from stroma import (
    ExecutionBudget,
    Flow,
    InMemoryStore,
    ItemFailure,
    NodeHooks,
    Pipeline,
    PipelineChanged,
    RunStatus,
    SQLiteStore,
    StepFailed,
    StromaRunner,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
)
from stroma.engine import attempt
from stroma.testing import assert_resumable, crash_at

store = store_fixture(*STORES)


async def test_committed_steps_are_not_called_again(store: Any) -> None:
    """G5: A resumed flow gets recorded outputs, calls on_node_skipped for them, and continues the keys."""
    world = World()
    add, skipped = world.step("add"), []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        for _ in range(4):
            state = await flow.step(add, state)
        return state

    skip = noting(skipped, lambda _run, node_id, output: (node_id, output["n"]))
    run = run_of(f, store, hooks=NodeHooks(on_node_skipped=skip))
    await world.live(run, "add 2")
    world.calls.clear()
    result = await world.live(run)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=4))
    assert world.calls == ["add 2", "add 3"]
    assert skipped == [("add", 1), ("add", 2)]
    assert [event.branch for event in result.trace] == ["add#2", "add#3"]
    assert all(len(keys) == 1 for keys in world.keys.values())
    assert len(set.union(*world.keys.values())) == 4


async def test_a_caught_failure_is_replayed(store: Any) -> None:
    """A failure that the body has caught is raised again from the journal, with the same fields."""
    world = World()
    world.failing.add("bad")
    bad, good, last = world.step("bad"), world.step("good"), world.step("last")
    seen: list[Any] = []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            state = await flow.step(bad, state)
        except StepFailed as error:
            failure = error.failure
            seen.append(
                (failure.failure_class, failure.message, failure.node_id, failure.attempt, str(error))
            )
            state = await flow.step(good, state)
        return await flow.step(last, state)

    run = run_of(f, store)
    await world.live(run, "last 1")
    world.calls.clear()
    world.failing.clear()
    result = await world.live(run)
    assert (result.status, result.final_state, world.calls) == (RunStatus.RESUMED, Num(n=2), ["last 1"])
    assert seen[0] == seen[1]


async def test_a_failure_that_ended_the_run_is_retried(store: Any) -> None:
    """A resume tries the step again whose failure escaped the body, and no other one."""
    world = World()
    world.failing |= {"bad 1", "worse"}
    bad, worse, good = world.step("bad"), world.step("worse"), world.step("good")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(good, state)
        try:
            await flow.step(worse, state)
        except StepFailed:
            state = await flow.step(good, state)
        return await flow.step(bad, Num(n=1))

    run = run_of(f, store)
    assert (await world.live(run)).status is RunStatus.PARTIAL
    world.calls.clear()
    world.failing.clear()
    result = await world.live(run)
    assert (result.status, result.final_state, world.calls) == (RunStatus.RESUMED, Num(n=2), ["bad 1"])


async def test_a_cleanup_after_the_failure_need_not_come_again(store: Any) -> None:
    """Steps that followed a failure which is retried are no change of the body if they do not come now."""
    world = World()
    world.failing.add("bad")
    bad, clean, last = world.step("bad"), world.step("clean"), world.step("last")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            state = await flow.step(bad, state)
        except StepFailed:
            await flow.step(clean, state)
            raise
        return await flow.step(last, state)

    run = run_of(f, store)
    assert (await world.live(run)).status is RunStatus.PARTIAL
    world.failing.clear()
    await world.live(run, "last 1")
    result = await world.live(run)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["bad 0", "clean 0", "bad 0", "last 1", "last 1"]


async def test_an_error_of_the_body_is_fixed_and_resumed(store: Any) -> None:
    """An exception of the body is a failure like a node's; with the body fixed, the resume continues."""
    world = World()
    add, broken = world.step("add"), [True]

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        if broken[0]:
            raise KeyError("oops")
        return await flow.step(add, state)

    run = run_of(f, store)
    first = await world.live(run)
    assert (first.status, first.failure.node_id) == (RunStatus.PARTIAL, "f")
    assert isinstance(first.failure.exception, KeyError)
    broken[0] = False
    result = await world.live(run)
    assert (result.status, world.calls) == (RunStatus.RESUMED, ["add 0", "add 1"])


@pytest.mark.parametrize("dies_in", ["one", "two"])
async def test_values_are_the_same_on_replay(dies_in: str, store: Any) -> None:
    """flow.now(), random() and uuid() return the same on resume, also if the death cut off the next call."""
    world = World()
    steps = {node_id: world.step(node_id) for node_id in ("one", "two")}
    seen: dict[str, list[Any]] = {"one": [], "two": []}

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        for node_id, step in steps.items():
            seen[node_id].append((flow.now(), flow.random(), flow.uuid(), flow.random(), flow.uuid()))
            state = await flow.step(step, state)
        return state

    run = run_of(f, store)
    with crash_at("after_node", dies_in):
        await run()
    await asyncio.sleep(0.01)
    await world.live(run)
    assert seen[dies_in][0] == seen[dies_in][1]
    assert all(len(set(values[0])) == 5 for values in seen.values())
    assert 0 <= seen["one"][0][1] < 1
    assert seen["one"][0][2].version == 4


async def test_a_restart_has_other_random_values(store: Any) -> None:
    """Another execution of the same run id has other random values, and no records of the last one."""
    world = World()
    add, seen = world.step("add"), []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        seen.append(flow.uuid())
        return await flow.step(add, state)

    for _ in range(2):
        assert (await runner_on(store, resume=False).run(f, Num())).status is RunStatus.COMPLETED
    assert len(set(seen)) == 2
    assert world.calls == ["add 0", "add 0"]


async def test_a_cancelled_step_is_cancelled_again(store: Any) -> None:
    """A step that the body gave up on neither runs nor returns on replay: the body gives up on it again."""
    world = World()
    world.turns["slow"] = 10**6
    slow, last = world.step("slow"), world.step("last")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.timeout(0.2):
                await flow.step(slow, state)
        except TimeoutError:
            state = await flow.step(last, Num(n=5))
        return await flow.step(last, state)

    run = run_of(f, store)
    await world.live(run, "last 6")
    assert world.calls == ["slow 0", "last 5", "last 6"]
    result = await world.live(run)
    assert (result.status, result.final_state, world.calls[3:]) == (RunStatus.RESUMED, Num(n=7), ["last 6"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("input", "makes step 'b' (call 2) with other values of 'n'"),
        ("removed", "makes step 'c' (call 2) now, and step 'b' (call 2) is recorded"),
        ("last removed", "flow 'f' does not make step 'c' (call 3), which is recorded"),
        (
            "raised",
            "flow 'f' raised ValueError: no c, and does not make step 'c' (call 3), which is recorded",
        ),
        ("inserted", "makes step 'd' (call 2) now, and step 'b' (call 2) is recorded"),
        ("node", "has the output of node 'b', but the pipeline has 'd' there"),
    ],
)
async def test_a_changed_flow_is_refused(
    store: Any, caplog: pytest.LogCaptureFixture, change: str, said: str
) -> None:
    """A body that differs from its recording is refused before anything is called, with the difference."""
    world = World()
    a, b, c, d = (world.step(name) for name in "abcd")
    changed = [False]

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        now = change if changed[0] else ""
        state = await flow.step(a, state)
        if now == "inserted":
            state = await flow.step(d, state)
        if now == "input":
            state = Num(n=9)
        if now == "node":
            state = await flow.step(d, state, key="k")
        elif now == "removed":
            state = Num(n=2)
        else:
            state = await flow.step(b, state, key="k" if change == "node" else None)
        if now == "raised":
            raise ValueError("no c")
        if now != "last removed":
            state = await flow.step(c, state)
        return await flow.step(d, state) if now != "last removed" else state

    run = run_of(f, store)
    await world.live(run, "d 3")
    world.calls.clear()
    changed[0] = True
    with pytest.raises(PipelineChanged, match=re.escape(said)):
        await world.live(run)
    assert world.calls == []
    assert "raised" not in caplog.text  # The message has it already, and a worker tries again and again.
    changed[0] = False
    assert (await world.live(run)).final_state == Num(n=4)


@pytest.mark.parametrize("store", IN_PROCESS, indirect=True)
@pytest.mark.parametrize("way", ["flow", "pipeline", "map", "timeout", "error", "error inside"])
async def test_a_refused_resume_records_nothing_of_what_it_did_not_call(store: Any, way: str) -> None:
    """A changed body that is refused leaves the run as it was: with the code restored, it is resumed."""
    world = World()
    a, b, c = (world.step(name) for name in "abc")
    is_changed = False

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(c, state)

    @stroma_flow("outer", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        state = await flow.step(a, state)
        if is_changed:
            task = asyncio.ensure_future(flow.run(inner, state))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            raise KeyError("a bug of the new code")
        return await flow.step(b, await flow.step(b, state))

    async def do_more(flow: Flow, state: Num) -> None:
        if way in ("flow", "error"):
            await flow.run(inner, state)
        elif way == "pipeline":
            await flow.run(Pipeline("p", [c]), state)
        elif way == "map":
            await flow.map(c, [state])
        elif way == "timeout":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(flow.step(c, state), 0.01)

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("a bug of the new code")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        if is_changed:
            work = do_more(flow, state)
            await (asyncio.gather(work, fail()) if way == "error" else work)
            state = Num(n=5) if way == "timeout" else state
        if way == "error inside":
            return await flow.run(outer, state)
        state = await flow.step(b, await flow.step(a, state))
        return await flow.step(b, state)

    run = run_of(f, store)
    await world.live(run, "b 2")
    world.calls.clear()
    is_changed = True
    begin = time.monotonic()
    with pytest.raises(PipelineChanged):
        await world.live(run)
    assert world.calls == []
    assert time.monotonic() - begin < 20
    is_changed = False
    result = await world.live(run)
    assert result.status is RunStatus.RESUMED, result.failure


async def test_steps_that_a_node_calls_do_not_number_the_tasks_of_the_body() -> None:
    """Tasks that a body starts after a node called steps of its own have the same identities on replay."""
    world = World()
    add = world.step("add")

    async def call_inside(state: Num) -> Num:
        ctx = current_run()
        assert ctx is not None
        inside = await execute_step("inside", world.step("inside"), state, ctx)
        assert isinstance(inside.final_state, Num)
        return inside.final_state

    calls = node("calls", call_inside)

    async def twice(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(add, state))

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(calls, state)
        one, two = await asyncio.gather(twice(flow, state), twice(flow, state))
        return await flow.step(add, Num(n=one.n + two.n))

    await assert_resumable(f, Num(), runner=quick(policy_map=NEVER), processes=False)
    result = await quick().run(f, Num())
    assert [event.branch for event in result.trace] == words("calls#0 add#1 add#2 add#3 add#4 add#5")


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_flow_survives_death_at_every_boundary() -> None:
    """G5: assert_resumable takes a flow, with loops, tasks, failures, a map, and flows inside."""
    world = World()
    add, double, bad = world.step("add"), world.step("double", lambda n: 2 * n), world.step("bad")
    world.failing.add("bad")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(double, await flow.step(add, state))

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        while state.n < 3:
            state = await flow.step(add, state)
        async with asyncio.TaskGroup() as group:
            x = group.create_task(flow.step(double, state))
            y = group.create_task(flow.step(add, state))
        try:
            await flow.step(bad, state)
        except StepFailed as error:
            state = Num(n=len(error.failure.message))
        items = await flow.map(double, [Num(n=n) for n in range(3)], max_concurrency=2)
        child = await flow.run(inner, x.result())
        await flow.sleep(hours=1, minutes=-59)
        return Text(text=f"{state.n} {x.result().n} {y.result().n} {[one.n for one in items]} {child.n}")

    found = await assert_resumable(f, Num(), runner=quick(policy_map=NEVER), processes=False)
    assert len(found.boundaries) > 30


async def test_a_long_flow_resumes_quickly(tmp_path: Any) -> None:
    """A long flow resumes in time linear in its steps: what is recorded is read once."""
    world = World()
    world.turns["add"] = 0
    add, count = world.step("add"), 2000

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        for _ in range(count):
            state = await flow.step(add, state)
        return state

    async with SQLiteStore(tmp_path / "runs.db", synchronous="normal") as store:
        run = run_of(f, store)
        await world.live(run, f"add {count - 1}")
        begin = time.process_time()
        result = await world.live(run)
        took = time.process_time() - begin
    assert result.final_state == Num(n=count)
    assert len(world.calls) == count + 1
    assert took < 10


@pytest.mark.parametrize("way", ["sleep", "timeout", "timer", "flow sleep"])
@pytest.mark.parametrize("store", IN_PROCESS, indirect=True)
async def test_a_wait_of_the_body_beside_a_live_step_is_no_change(store: Any, way: str) -> None:
    """A branch that waits for a time before its recorded call is not taken for one that does not come."""
    world = World()
    quick_one, after, held = world.step("quick"), world.step("after"), world.step("held")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def waits_first() -> Num:
            if way == "sleep":
                await asyncio.sleep(0.3)
            elif way == "timeout":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await asyncio.Event().wait()
            elif way == "timer":
                event = asyncio.Event()
                asyncio.get_running_loop().call_later(0.3, event.set)
                await event.wait()
            else:
                await flow.sleep(0.3)
            return await flow.step(after, state)

        async with asyncio.TaskGroup() as group:
            group.create_task(waits_first())
            first = await flow.step(quick_one, state)
            return await flow.step(held, first)

    run = run_of(f, store)
    world.turns["held"] = 10**7
    life = asyncio.ensure_future(run())
    while "after 0" not in world.calls or "held 1" not in world.calls:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    life.cancel()
    await asyncio.wait([life])
    world.turns.clear()
    world.calls.clear()
    result = await run()
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2)), result.failure
    assert world.calls == ["held 1"]


async def test_a_renamed_step_is_found_while_other_tasks_of_the_loop_are_at_work() -> None:
    """A step that has another node now is found when it is called, whatever else the event loop does."""
    world, store = World(), InMemoryStore()
    old, new, last = world.step("old"), world.step("new"), world.step("last")
    name = old

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        queue: asyncio.Queue[Num] = asyncio.Queue()

        async def produce() -> None:
            await queue.put(await flow.step(name, state))

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            got = await queue.get()
        return await flow.step(last, got)

    run = run_of(f, store)
    await world.live(run, "last 1")
    name = new
    other = asyncio.ensure_future(asyncio.sleep(60))
    message = re.escape("makes step 'new' (call 1) now, and step 'old' (call 1) is recorded")
    with pytest.raises(PipelineChanged, match=message):
        await run()
    other.cancel()
    assert world.calls == ["old 0", "last 1"]


@pytest.mark.parametrize("way", ["fewer", "others", "not made"])
@pytest.mark.parametrize("store", IN_PROCESS, indirect=True)
async def test_other_inputs_of_what_is_made_of_steps_are_found(store: Any, way: str) -> None:
    """A recorded item that a map lacks, one with another input, and a flow that is not run are changes."""
    world = World()
    add, last = world.step("add"), world.step("last")
    is_changed = False

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        await flow.step(add, Num())
        return await flow.step(last, Num())

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        if way == "not made" and is_changed:
            return state
        if way == "not made":
            return await flow.run(inner, Num(n=4))
        items = [Num(n=n) for n in range(3)]
        if is_changed:
            items = items[:2] if way == "fewer" else [Num(n=7), *items[1:]]
        await flow.map(add, items)
        return await flow.step(last, Num())

    run = run_of(f, store)
    await world.live(run, "last 0")
    is_changed = True
    world.calls.clear()
    expected = {
        "fewer": "does not make the item at index 2 of map over 'add' (call 1)",
        "others": "makes the item at index 0 of map over 'add' (call 1) with",
        "not made": "does not make step 'add' (call 1) of step 'inner' (call 1)",
    }
    with pytest.raises(PipelineChanged, match=re.escape(expected[way])):
        await run()
    assert world.calls == []


async def test_a_child_that_failed_may_have_another_input_on_the_resume() -> None:
    """The input of a child flow, a pipeline or a map that failed is forgotten with its failure."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    add, bad = world.step("add"), world.step("bad")
    n, size = 1, 1

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(bad, await flow.step(add, Num()))

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await flow.run(inner, Num(n=n))
        await flow.map(bad, [Num()] * size)
        return state

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    n, world.failing = 2, {"bad 0"}
    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    size = 2
    world.failing.clear()
    result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.RESUMED, result.failure


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_steps_are_resumed_in_little_time_and_memory(tmp_path: Path) -> None:
    """A flow of 10,000 steps is resumed in under 2 s of CPU, and with under 60 MB of memory."""
    helper = Path(__file__).with_name("resume_many_helper.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def process(what: str) -> str:
        command = [sys.executable, str(helper), what, str(tmp_path / "runs.db"), "10000"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    process("record")
    seconds, megabytes = map(float, process("resume").split())
    assert seconds < 2
    assert megabytes < 60


@pytest.mark.parametrize("way", ["suspended", "killed"])
@pytest.mark.parametrize("store", IN_PROCESS, indirect=True)
async def test_the_latency_of_earlier_processes_counts(
    store: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Function time of earlier processes of a flow that has not ended counts against ``max_latency_ms``."""
    clock = 1_000_000_000
    monkeypatch.setattr(attempt, "perf_counter_ns", lambda: clock)
    world = World()

    def work(n: int) -> int:
        nonlocal clock
        clock += 100_000_000
        return n + 1

    add = world.step("add", work)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        for _ in range(3):
            state = await flow.step(add, state)
        await flow.wait_for(Text, reason="Go on?")
        return await flow.step(add, state)

    run = run_of(f, store, budget=ExecutionBudget(max_latency_ms=350))
    if way == "killed":
        await world.live(run, "add 2")
    assert (await world.live(run)).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Text(text="yes"))
    result = await run()
    assert result.failure is not None
    assert "max_latency_ms limit 350 ms" in result.failure.message


@pytest.mark.parametrize("change", ["step", "more", "question"])
async def test_a_change_before_an_open_wait_is_found(store: Any, change: str) -> None:
    """A body that makes other calls before it waits than before the suspension is refused without a call."""
    world = World()
    add, audit = world.step("add"), world.step("audit")
    is_changed = False

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        if is_changed and change == "step":
            state = await flow.step(audit, state)
        calls: list[Any] = [flow.sleep(hours=1)]
        if not (is_changed and change == "question"):
            calls.append(flow.wait_for(Text, reason="Go on?"))
        if is_changed and change == "more":
            calls.append(flow.step(audit, state))
        await asyncio.gather(*calls)
        return state

    run = run_of(f, store, inline_wait_seconds=0)
    assert (await run()).status is RunStatus.SUSPENDED
    is_changed = True
    with pytest.raises(
        PipelineChanged, match=r"(audit|wait_for).*(where|for which) it waited before|makes step 'audit'"
    ):
        (await run()).raise_for_status()
    assert world.calls == ["add 0"]
    is_changed = False
    assert (await run()).status is RunStatus.SUSPENDED


class Sizes(BaseModel):
    pages: list[Page] = []
    sizes: list[Page] = []
    sizes_failures: list[ItemFailure] = []


@pytest.mark.parametrize("way", ["alone", "in a group", "in a flow"])
async def test_failed_items_of_restored_maps_are_counted(store: Any, way: str) -> None:
    """Failed items of a map that a flow calls are counted in each result, of forks and follows as well."""

    async def size(page: Page) -> Page:
        if page.n == 2:
            raise ValueError("no such page")
        return page

    sizes = map_over(
        "pages", node("size", size, input=Page, output=Page), into="sizes", on_item_failure="collect"
    )
    called: Any = sizes if way == "alone" else parallel(sizes)

    @stroma_flow("inner", input=Sizes, output=Sizes)
    async def inner(flow: Flow, state: Sizes) -> Any:
        await flow.step(called, state)
        return state

    @stroma_flow("outer", input=Sizes, output=Sizes)
    async def outer(flow: Flow, state: Sizes) -> Any:
        await (flow.run(inner, state) if way == "in a flow" else flow.step(called, state))
        await flow.wait_for(Num, reason="go on?")
        return await flow.step(last, state)

    last = node("last", lambda state: state, input=Sizes, output=Sizes)
    runner, pages = StromaRunner.quick(store=store, policy_map=NEVER), Sizes(pages=[Page(n=2), Page(n=3)])
    first = await runner.run(outer, pages, run_id="run")
    assert (first.status, first.failed_items) == (RunStatus.SUSPENDED, 1)
    await runner.signal("run", Num())
    results = [
        await runner.run(outer, pages, run_id="run", resume=True),
        await runner.run(outer, pages, run_id="run", if_exists="return"),
        await runner.fork("run", outer, at="last", new_run_id="fork"),
    ]
    assert [(one.status, one.failed_items) for one in results] == [(RunStatus.RESUMED, 1)] * 3
    ends = [event async for event in runner.follow("run")]
    assert ends[-1].details["failed_items"] == 1
