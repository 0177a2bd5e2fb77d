"""Flows that every driver must do the same with."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from tests.flows.steps import Text, World
from tests.kit import NEVER, THRICE, Num, node

from stroma import (
    ExecutionBudget,
    Flow,
    FlowFunction,
    Pipeline,
    RunStatus,
    StepFailed,
    current_node,
    map_over,
    parallel,
    stroma_flow,
)


class Nums(BaseModel):
    numbers: list[Num]


class Left(BaseModel):
    left: int


class Right(BaseModel):
    right: int


@dataclass
class FlowScenario:
    """What is run, and what becomes of it. ``make`` is called for each run.

    Attributes:
        answers: what people say, one after each suspension: the answer, and the text of its question.
        is_race: which call is made by which task differs from run to run.
    """

    make: Callable[[World], Any]
    output: dict[str, Any] | None
    calls: list[str]
    status: RunStatus = RunStatus.COMPLETED
    config: dict[str, Any] = field(default_factory=lambda: {"policy_map": NEVER})
    failing: set[str] = field(default_factory=set)
    reason: str | None = None
    answers: list[tuple[BaseModel, str | None]] = field(default_factory=list)
    state: BaseModel = field(default_factory=lambda: Num(n=0))
    is_race: bool = False


NumNode = Callable[[Num], Coroutine[Any, Any, Num]]
Body = Callable[[Flow, Any], Any]


def a_flow(body: Body, output: type[BaseModel] = Num, **options: Any) -> FlowFunction[Any, Any]:
    return stroma_flow("f", input=Num, output=output, **options)(body)


def a_body(body: Callable[[World, Flow, Any], Any]) -> Callable[[World], FlowFunction[Any, Any]]:
    """Make a flow of a body for each world."""

    def made(world: World) -> FlowFunction[Any, Any]:
        async def of_world(flow: Flow, state: Num) -> Any:
            return await body(world, flow, state)

        return a_flow(of_world)

    return made


@a_body
async def no_step(world: World, flow: Flow, state: Num) -> Num:
    return Num(n=7)


@a_body
async def loop(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    while state.n < 4:
        state = await flow.step(add, state)
    return state


@a_body
async def caught(world: World, flow: Flow, state: Num) -> Num:
    add, bad = world.step("add"), world.step("bad")
    try:
        return await flow.step(bad, state)
    except StepFailed as error:
        if error.path != ("f", "bad") or error.failure.node_id != "bad":
            return Num(n=-1)
        return await flow.step(add, Num(n=len(error.failure.message)))


@a_body
async def uncaught(world: World, flow: Flow, state: Num) -> Num:
    add, bad = world.step("add"), world.step("bad")
    return await flow.step(bad, await flow.step(add, state))


def retried(world: World) -> Any:
    async def flaky(state: Num) -> Num:
        here = current_node()
        world.calls.append(f"flaky {here.attempt}")
        if here.attempt < 3:
            raise ValueError("not yet")
        return Num(n=here.attempt)

    flaky_node: NumNode = node("flaky", flaky)

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.step(flaky_node, state)

    return a_flow(body)


def task_group(world: World) -> Any:
    add = world.step("add")

    async def line(flow: Flow, n: int) -> Num:
        return await flow.step(add, await flow.step(add, Num(n=n)))

    async def body(flow: Flow, state: Num) -> Num:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(line(flow, n)) for n in (0, 10, 20)]
        return Num(n=sum(task.result().n for task in tasks))

    return a_flow(body)


@a_body
async def gather_with_failures(world: World, flow: Flow, state: Num) -> Num:
    add, bad = world.step("add"), world.step("bad")
    found = await asyncio.gather(flow.step(add, state), flow.step(bad, state), return_exceptions=True)
    return Num(n=sum(isinstance(one, StepFailed) for one in found))


def failing_task_group(world: World) -> Any:
    bad = world.step("bad")

    async def endless(state: Num) -> Num:
        world.calls.append(f"slow {state.n}")
        await asyncio.Event().wait()
        return state

    slow = node("slow", endless)

    async def body(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(flow.step(slow, Num(n=1)))
                group.create_task(flow.step(bad, state))
                group.create_task(flow.step(slow, Num(n=2)))
        except* StepFailed as errors:
            found = len(errors.exceptions)
        return Num(n=found)

    return a_flow(body)


def first_completed(world: World) -> Any:
    quick, has_first = world.step("quick"), threading.Event()

    async def later(state: Num) -> Num:
        world.calls.append(f"slow {state.n}")
        assert await asyncio.to_thread(has_first.wait, 20)
        return Num(n=state.n + 1)

    slow = node("slow", later)

    async def body(flow: Flow, state: Num) -> Num:
        slow_call = asyncio.create_task(flow.step(slow, Num(n=10)))
        tasks = [slow_call, asyncio.create_task(flow.step(quick, Num(n=1)))]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        has_first.set()
        first = sorted(task.result().n for task in done)[0]
        rest = [await task for task in tasks if task in waiting]
        return Num(n=first * 100 + sum(one.n for one in rest))

    return a_flow(body)


@a_body
async def queue(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    pending: asyncio.Queue[int] = asyncio.Queue()
    for n in range(5):
        pending.put_nowait(n)
    found: list[int] = []

    async def work() -> None:
        while not pending.empty():
            found.append((await flow.step(add, Num(n=pending.get_nowait()))).n)

    await asyncio.gather(work(), work())
    return Num(n=sum(found))


@a_body
async def mapped(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    found = await flow.map(add, [Num(n=n) for n in range(4)])
    return Num(n=sum(one.n for one in found))


@a_body
async def empty_map(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    return Num(n=len(await flow.map(add, [])))


def bounded_map(world: World) -> Any:
    live: list[int] = []

    async def busy(state: Num) -> Num:
        live.append(1)
        assert len(live) <= 2
        await asyncio.sleep(0.01)
        live.pop()
        world.calls.append(f"busy {state.n}")
        return state

    busy_node: NumNode = node("busy", busy)

    async def body(flow: Flow, state: Num) -> Num:
        found = await flow.map(busy_node, [Num(n=n) for n in range(5)], max_concurrency=2)
        return Num(n=sum(one.n for one in found))

    return a_flow(body)


@a_body
async def failing_map(world: World, flow: Flow, state: Num) -> Num:
    add, bad = world.step("add"), world.step("bad")
    try:
        await flow.map(bad, [Num(n=1)])
    except StepFailed as error:
        return await flow.step(add, Num(n=len(error.path)))
    return state


def bounded_flow(world: World) -> Any:
    live: list[int] = []

    async def busy(state: Num) -> Num:
        live.append(1)
        assert len(live) <= 1
        await asyncio.sleep(0.01)
        live.pop()
        world.calls.append(f"busy {state.n}")
        return state

    busy_node: NumNode = node("busy", busy)

    async def body(flow: Flow, state: Num) -> Num:
        found = await asyncio.gather(*(flow.step(busy_node, Num(n=n)) for n in range(3)))
        return Num(n=sum(one.n for one in found))

    return a_flow(body, max_concurrency=1)


def child_flow(world: World) -> Any:
    add = world.step("add")

    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(add, state))

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.run(child, state))

    return a_flow(body)


def failing_child(world: World) -> Any:
    add, bad = world.step("add"), world.step("bad")

    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(bad, await flow.step(add, state))

    async def body(flow: Flow, state: Num) -> Num:
        try:
            return await flow.run(child, state)
        except StepFailed as error:
            return Num(n=9 if error.path == ("f", "child", "bad") else -1)

    return a_flow(body)


def child_raises(world: World) -> Any:
    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        raise KeyError("no such key")

    async def body(flow: Flow, state: Num) -> Num:
        try:
            return await flow.run(child, state)
        except StepFailed as error:
            return Num(n=len(error.path))

    return a_flow(body)


def two_children(world: World) -> Any:
    add = world.step("add")

    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    async def body(flow: Flow, state: Num) -> Num:
        one, two = await asyncio.gather(flow.run(child, Num(n=1)), flow.run(child, Num(n=5)))
        return Num(n=one.n * 10 + two.n)

    return a_flow(body)


def pipeline_inside(world: World) -> Any:
    add, double = world.step("add"), world.step("double", lambda n: n * 2)
    inside = Pipeline("inside", [add, double])

    async def body(flow: Flow, state: Num) -> Num:
        found: Num = await flow.run(inside, state)
        return found

    return a_flow(body)


def parallel_inside(world: World) -> Any:
    async def left(state: Num) -> Left:
        world.calls.append("left")
        return Left(left=state.n + 1)

    async def right(state: Num) -> Right:
        world.calls.append("right")
        return Right(right=state.n + 2)

    both = parallel(node("left", left, output=Left), node("right", right, output=Right))
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        merged = await flow.step(both, state)
        return await flow.step(add, Num(n=merged.left * 10 + merged.right))

    return a_flow(body)


def map_over_several_inside(world: World) -> Any:
    each = map_over("numbers", [world.step("add"), world.step("double")], into="numbers", max_concurrency=1)

    async def body(flow: Flow, state: Num) -> Num:
        found = await flow.step(each, Nums(numbers=[Num(n=1), Num(n=2)]))
        return Num(n=sum(one.n for one in found.numbers))

    return a_flow(body)


@a_body
async def slept(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    state = await flow.step(add, state)
    before = flow.now()
    await flow.sleep(0.05)
    assert (flow.now() - before).total_seconds() >= 0.05
    return await flow.step(add, state)


@a_body
async def slept_side_by_side(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    step = asyncio.ensure_future(flow.step(add, state))
    await asyncio.gather(flow.sleep(0.02), flow.sleep(0.05), step)
    return step.result()


@a_body
async def timeout_of_a_sleep(world: World, flow: Flow, state: Num) -> Num:
    try:
        async with asyncio.timeout(0.02):
            await flow.sleep(30)
    except TimeoutError:
        return Num(n=1)
    return state


@a_body
async def values(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    first = (flow.random(), flow.uuid(), flow.random())
    assert 0 <= first[0] < 1
    assert first[0] != first[2]
    assert first[1].version == 4
    found = await flow.step(add, state)
    await flow.sleep(0.01)
    world.keys.setdefault("values", set()).add(repr(first))
    assert len(world.keys["values"]) == 1
    return found


@a_body
async def keyed(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    found = await asyncio.gather(*(flow.step(add, Num(n=n), key=f"page {n}/é") for n in range(3)))
    return Num(n=sum(one.n for one in found))


@a_body
async def body_raises(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    await flow.step(add, state)
    raise NotImplementedError("the rest")


@a_body
async def wrong_output(world: World, flow: Flow, state: Num) -> Any:
    return Text(text="no number")


@a_body
async def wrong_input_of_a_step(world: World, flow: Flow, state: Num) -> Any:
    add = world.step("add")
    try:
        return await flow.step(add, Text(text="no number"))
    except StepFailed as error:
        return Num(n=int(error.failure.reason == "contract"))


def over_budget(world: World) -> Any:
    async def costly(state: Num) -> Any:
        world.calls.append("costly")
        return {"n": state.n + 1}, 60

    costly_node = node("costly", costly)

    async def body(flow: Flow, state: Num) -> Num:
        for _ in range(5):
            try:
                state = await flow.step(costly_node, state)
            except Exception:  # The end by a budget passes it.
                world.calls.append("caught")
        return state

    return a_flow(body)


@a_body
async def finally_step(world: World, flow: Flow, state: Num) -> Num:
    add, bad, clean = world.step("add"), world.step("bad"), world.step("clean")
    try:
        return await flow.step(bad, await flow.step(add, state))
    finally:
        await flow.step(clean, state)


@a_body
async def asked(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    state = await flow.step(add, state)
    answer = await flow.wait_for(Text, reason="Send it?")
    assert answer.text == "yes"
    return await flow.step(add, state)


@a_body
async def asked_twice(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    first = await flow.wait_for(Num, reason="how many?")
    second = await flow.wait_for(Num, reason="and more?", key="more")
    return await flow.step(add, Num(n=first.n * 10 + second.n))


@a_body
async def asked_side_by_side(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    one, two, made = await asyncio.gather(
        flow.wait_for(Num, reason="one?", key="one"),
        flow.wait_for(Num, reason="two?", key="two"),
        flow.step(add, state),
    )
    return Num(n=one.n * 100 + two.n * 10 + made.n)


@a_body
async def asked_in_vain(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    try:
        await flow.wait_for(Text, reason="Send it?", timeout=0.05)
    except TimeoutError:
        return await flow.step(add, state)
    return state


def asked_by_a_child(world: World) -> Any:
    add = world.step("add")

    @stroma_flow("child", input=Num, output=Num)
    async def child(flow: Flow, state: Num) -> Num:
        answer = await flow.wait_for(Num, reason="child?")
        return await flow.step(add, answer)

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.run(child, await flow.step(add, state))

    return a_flow(body)


def asked_by_a_step(world: World) -> Any:
    async def approve(state: Num) -> Num:
        world.calls.append("approve")
        return current_node().wait_for(Num, reason="really?")

    approve_node = node("approve", approve)
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        return await flow.step(add, await flow.step(approve_node, state))

    return a_flow(body)


@a_body
async def asked_after_a_cancelled_question(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    for _ in range(2):
        first = asyncio.ensure_future(flow.wait_for(Num, reason="never?", key=f"never {_}"))
        await flow.step(add, state)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    return await flow.step(add, await flow.wait_for(Num, reason="how many?"))


@a_body
async def asked_before_a_sleep(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    answer = await flow.wait_for(Num, reason="how many?")
    await flow.sleep(0.02)
    return await flow.step(add, answer)


def in_a_pipeline(world: World) -> Any:
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        for _ in range(2):
            state = await flow.step(add, state)
        return state

    return [add, a_flow(body), add]


@a_body
async def same_node_twice_at_once(world: World, flow: Flow, state: Num) -> Num:
    add = world.step("add")
    calls = [flow.step(add, Num(n=n)) for n in (3, 1, 2)]
    found = await asyncio.gather(*calls)
    return Num(n=int("".join(str(one.n) for one in found)))


FLOW_SCENARIOS: dict[str, FlowScenario] = {
    "no step": FlowScenario(no_step, {"n": 7}, []),
    "loop": FlowScenario(loop, {"n": 4}, ["add 0", "add 1", "add 2", "add 3"]),
    "failure that is caught": FlowScenario(caught, {"n": 13}, ["bad 0", "add 12"], failing={"bad"}),
    "failure that is not": FlowScenario(
        uncaught, None, ["add 0", "bad 1"], RunStatus.PARTIAL, failing={"bad"}
    ),
    "retries": FlowScenario(
        retried, {"n": 3}, ["flaky 1", "flaky 2", "flaky 3"], config={"policy_map": THRICE}
    ),
    "task group": FlowScenario(
        task_group, {"n": 36}, ["add 0", "add 1", "add 10", "add 11", "add 20", "add 21"]
    ),
    "gather that returns failures": FlowScenario(
        gather_with_failures, {"n": 1}, ["add 0", "bad 0"], failing={"bad"}
    ),
    "task group that fails": FlowScenario(
        failing_task_group, {"n": 1}, ["slow 1", "bad 0", "slow 2"], failing={"bad"}
    ),
    "first of two": FlowScenario(first_completed, {"n": 211}, ["slow 10", "quick 1"]),
    "workers on a queue": FlowScenario(queue, {"n": 15}, [f"add {n}" for n in range(5)], is_race=True),
    "map": FlowScenario(mapped, {"n": 10}, [f"add {n}" for n in range(4)]),
    "map of nothing": FlowScenario(empty_map, {"n": 0}, []),
    "bounded map": FlowScenario(bounded_map, {"n": 10}, [f"busy {n}" for n in range(5)]),
    "map that fails": FlowScenario(failing_map, {"n": 3}, ["bad 1", "add 2"], failing={"bad"}),
    "bounded flow": FlowScenario(bounded_flow, {"n": 3}, [f"busy {n}" for n in range(3)]),
    "flow inside": FlowScenario(child_flow, {"n": 3}, ["add 0", "add 1", "add 2"]),
    "flow inside that fails": FlowScenario(failing_child, {"n": 9}, ["add 0", "bad 1"], failing={"bad"}),
    "flow inside that raises": FlowScenario(child_raises, {"n": 2}, []),
    "flows inside at once": FlowScenario(two_children, {"n": 26}, ["add 1", "add 5"]),
    "pipeline inside": FlowScenario(pipeline_inside, {"n": 2}, ["add 0", "double 1"]),
    "parallel as a step": FlowScenario(parallel_inside, {"n": 13}, ["left", "right", "add 12"]),
    "map_over of several nodes as a step": FlowScenario(
        map_over_several_inside, {"n": 7}, ["add 1", "double 2", "add 2", "double 3"]
    ),
    "sleep": FlowScenario(slept, {"n": 2}, ["add 0", "add 1"]),
    "sleeps at once": FlowScenario(slept_side_by_side, {"n": 1}, ["add 0"]),
    "time limit around a sleep": FlowScenario(timeout_of_a_sleep, {"n": 1}, []),
    "keys": FlowScenario(keyed, {"n": 6}, ["add 0", "add 1", "add 2"]),
    "body that raises": FlowScenario(body_raises, None, ["add 0"], RunStatus.FAILED, reason="bug"),
    "output of another class": FlowScenario(wrong_output, None, [], RunStatus.FAILED, reason="contract"),
    "input of another class": FlowScenario(wrong_input_of_a_step, {"n": 1}, []),
    "budget": FlowScenario(
        over_budget,
        None,
        ["costly", "costly"],
        RunStatus.PARTIAL,
        config={"policy_map": NEVER, "budget": ExecutionBudget(max_tokens_total=100)},
        reason="budget",
    ),
    "finally": FlowScenario(
        finally_step, None, ["add 0", "bad 1", "clean 0"], RunStatus.PARTIAL, failing={"bad"}
    ),
    "question": FlowScenario(
        asked, {"n": 2}, ["add 0", "add 1"], RunStatus.RESUMED, answers=[(Text(text="yes"), None)]
    ),
    "two questions": FlowScenario(
        asked_twice,
        {"n": 43},
        ["add 42"],
        RunStatus.RESUMED,
        answers=[(Num(n=4), None), (Num(n=2), "and more?")],
    ),
    "questions at once": FlowScenario(
        asked_side_by_side,
        {"n": 231},
        ["add 0"],
        RunStatus.RESUMED,
        answers=[(Num(n=3), "two?"), (Num(n=2), "one?")],
    ),
    "question in vain": FlowScenario(asked_in_vain, {"n": 1}, ["add 0"]),
    "question of a flow inside": FlowScenario(
        asked_by_a_child, {"n": 6}, ["add 0", "add 5"], RunStatus.RESUMED, answers=[(Num(n=5), None)]
    ),
    "question after cancelled ones": FlowScenario(
        asked_after_a_cancelled_question,
        {"n": 6},
        ["add 0", "add 0", "add 5"],
        RunStatus.RESUMED,
        answers=[(Num(n=5), None)],
    ),
    "question of a step": FlowScenario(
        asked_by_a_step,
        {"n": 6},
        ["add 0", "add 5", "approve", "approve"],
        RunStatus.RESUMED,
        answers=[(Num(n=5), None)],
    ),
    "question before a sleep": FlowScenario(
        asked_before_a_sleep, {"n": 6}, ["add 5"], RunStatus.RESUMED, answers=[(Num(n=5), None)]
    ),
    "recorded values": FlowScenario(values, {"n": 1}, ["add 0"]),
    "flow between nodes": FlowScenario(in_a_pipeline, {"n": 4}, ["add 0", "add 1", "add 2", "add 3"]),
    "calls before they are awaited": FlowScenario(
        same_node_twice_at_once, {"n": 423}, ["add 3", "add 1", "add 2"]
    ),
}
