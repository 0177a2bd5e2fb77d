"""Flows that every driver must do the same with."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from tests.flows.steps import Text, World
from tests.kit import NEVER, THRICE, Num, node, recording

from stroma import (
    ExecutionBudget,
    Flow,
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


FLOW_SCENARIOS: dict[str, FlowScenario] = {}


def scenario(
    name: str,
    output: dict[str, Any] | None,
    calls: str = "",
    status: RunStatus = RunStatus.COMPLETED,
    *,
    bound: int | None = None,
    around: Callable[[Any, Any], Any] = lambda flow, add: flow,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a scenario of a body, whose further arguments are the world and a step.

    ``calls``: those of steps, separated by commas. ``bound``: of the flow's concurrency. ``around``: makes
    what is run of the flow and the step.
    """

    def add_scenario(body: Callable[..., Any]) -> Callable[..., Any]:
        def make(world: World) -> Any:
            add = world.step("add")

            async def of_world(flow: Flow, state: Num) -> Any:
                return await body(flow, state, world, add)

            limits = {} if bound is None else {"max_concurrency": bound}
            return around(stroma_flow("f", input=Num, output=Num, **limits)(of_world), add)

        FLOW_SCENARIOS[name] = FlowScenario(
            make, output, calls.split(", ") if calls else [], status, **options
        )
        return body

    return add_scenario


def child_of(body: Callable[[Flow, Num], Any]) -> Any:
    """Return a flow that others run."""
    return stroma_flow("child", input=Num, output=Num)(body)


@scenario("no step", {"n": 7})
async def no_step(flow: Flow, state: Num, *_: Any) -> Num:
    return Num(n=7)


@scenario("loop", {"n": 4}, "add 0, add 1, add 2, add 3")
async def loop(flow: Flow, state: Num, world: World, add: Any) -> Num:
    while state.n < 4:
        state = await flow.step(add, state)
    return state


@scenario("failure that is caught", {"n": 13}, "bad 0, add 12", failing={"bad"})
async def caught(flow: Flow, state: Num, world: World, add: Any) -> Num:
    try:
        return await flow.step(world.step("bad"), state)
    except StepFailed as error:
        if error.path != ("f", "bad") or error.failure.node_id != "bad":
            return Num(n=-1)
        return await flow.step(add, Num(n=len(error.failure.message)))


@scenario("failure that is not", None, "add 0, bad 1", RunStatus.PARTIAL, failing={"bad"})
async def uncaught(flow: Flow, state: Num, world: World, add: Any) -> Num:
    return await flow.step(world.step("bad"), await flow.step(add, state))


@scenario("retries", {"n": 3}, "flaky 1, flaky 2, flaky 3", config={"policy_map": THRICE})
async def retried(flow: Flow, state: Num, world: World, _: Any) -> Num:
    async def flaky(state: Num) -> Num:
        here = current_node()
        world.calls.append(f"flaky {here.attempt}")
        if here.attempt < 3:
            raise ValueError("not yet")
        return Num(n=here.attempt)

    return await flow.step(node("flaky", flaky), state)


@scenario("task group", {"n": 36}, "add 0, add 1, add 10, add 11, add 20, add 21")
async def task_group(flow: Flow, state: Num, world: World, add: Any) -> Num:
    async def line(n: int) -> Num:
        return await flow.step(add, await flow.step(add, Num(n=n)))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(line(n)) for n in (0, 10, 20)]
    return Num(n=sum(task.result().n for task in tasks))


@scenario("gather that returns failures", {"n": 1}, "add 0, bad 0", failing={"bad"})
async def gather_with_failures(flow: Flow, state: Num, world: World, add: Any) -> Num:
    calls = flow.step(add, state), flow.step(world.step("bad"), state)
    return Num(
        n=sum(isinstance(one, StepFailed) for one in await asyncio.gather(*calls, return_exceptions=True))
    )


@scenario("task group that fails", {"n": 1}, "slow 1, bad 0, slow 2", failing={"bad"})
async def failing_task_group(flow: Flow, state: Num, world: World, _: Any) -> Num:
    async def endless(state: Num) -> None:
        world.calls.append(f"slow {state.n}")
        await asyncio.Event().wait()

    slow = node("slow", endless)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(flow.step(slow, Num(n=1)))
            group.create_task(flow.step(world.step("bad"), state))
            group.create_task(flow.step(slow, Num(n=2)))
    except* StepFailed as errors:
        found = len(errors.exceptions)
    return Num(n=found)


@scenario("first of two", {"n": 211}, "slow 10, quick 1")
async def first_completed(flow: Flow, state: Num, world: World, _: Any) -> Num:
    has_first = threading.Event()

    async def later(state: Num) -> Num:
        world.calls.append(f"slow {state.n}")
        assert await asyncio.to_thread(has_first.wait, 20)
        return Num(n=state.n + 1)

    slow_call = asyncio.create_task(flow.step(node("slow", later), Num(n=10)))
    tasks = [slow_call, asyncio.create_task(flow.step(world.step("quick"), Num(n=1)))]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    has_first.set()
    first = sorted(task.result().n for task in done)[0]
    rest = [await task for task in tasks if task in waiting]
    return Num(n=first * 100 + sum(one.n for one in rest))


@scenario("workers on a queue", {"n": 15}, "add 0, add 1, add 2, add 3, add 4", is_race=True)
async def queue(flow: Flow, state: Num, world: World, add: Any) -> Num:
    pending: asyncio.Queue[int] = asyncio.Queue()
    for n in range(5):
        pending.put_nowait(n)
    found: list[int] = []

    async def work() -> None:
        while not pending.empty():
            found.append((await flow.step(add, Num(n=pending.get_nowait()))).n)

    await asyncio.gather(work(), work())
    return Num(n=sum(found))


@scenario("map", {"n": 10}, "add 0, add 1, add 2, add 3")
async def mapped(flow: Flow, state: Num, world: World, add: Any) -> Num:
    found = await flow.map(add, [Num(n=n) for n in range(4)])
    return Num(n=sum(one.n for one in found))


@scenario("map of nothing", {"n": 0})
async def empty_map(flow: Flow, state: Num, world: World, add: Any) -> Num:
    return Num(n=len(await flow.map(add, [])))


def busy_node(world: World, most: int) -> Any:
    """Return a node of which at most so many calls are in flight."""
    live: list[int] = []

    async def busy(state: Num) -> Num:
        live.append(1)
        assert len(live) <= most
        await asyncio.sleep(0.01)
        live.pop()
        world.calls.append(f"busy {state.n}")
        return state

    return node("busy", busy)


@scenario("bounded map", {"n": 10}, "busy 0, busy 1, busy 2, busy 3, busy 4")
async def bounded_map(flow: Flow, state: Num, world: World, _: Any) -> Num:
    found = await flow.map(busy_node(world, 2), [Num(n=n) for n in range(5)], max_concurrency=2)
    return Num(n=sum(one.n for one in found))


@scenario("map that fails", {"n": 3}, "bad 1, add 2", failing={"bad"})
async def failing_map(flow: Flow, state: Num, world: World, add: Any) -> Num:
    try:
        await flow.map(world.step("bad"), [Num(n=1)])
    except StepFailed as error:
        return await flow.step(add, Num(n=len(error.path)))
    return state


@scenario("bounded flow", {"n": 3}, "busy 0, busy 1, busy 2", bound=1)
async def bounded_flow(flow: Flow, state: Num, world: World, _: Any) -> Num:
    busy = busy_node(world, 1)
    found = await asyncio.gather(*(flow.step(busy, Num(n=n)) for n in range(3)))
    return Num(n=sum(one.n for one in found))


@scenario("flow inside", {"n": 3}, "add 0, add 1, add 2")
async def child_flow(flow: Flow, state: Num, world: World, add: Any) -> Num:
    @child_of
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(add, state))

    return await flow.step(add, await flow.run(child, state))


@scenario("flow inside that fails", {"n": 9}, "add 0, bad 1", failing={"bad"})
async def failing_child(flow: Flow, state: Num, world: World, add: Any) -> Num:
    @child_of
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(world.step("bad"), await flow.step(add, state))

    try:
        return await flow.run(child, state)
    except StepFailed as error:
        return Num(n=9 if error.path == ("f", "child", "bad") else -1)


@scenario("flow inside that raises", {"n": 2})
async def child_raises(flow: Flow, state: Num, *_: Any) -> Num:
    @child_of
    async def child(flow: Flow, state: Num) -> Num:
        raise KeyError("no such key")

    try:
        return await flow.run(child, state)
    except StepFailed as error:
        return Num(n=len(error.path))


@scenario("flows inside at once", {"n": 26}, "add 1, add 5")
async def two_children(flow: Flow, state: Num, world: World, add: Any) -> Num:
    @child_of
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    one, two = await asyncio.gather(flow.run(child, Num(n=1)), flow.run(child, Num(n=5)))
    return Num(n=one.n * 10 + two.n)


@scenario("pipeline inside", {"n": 2}, "add 0, double 1")
async def pipeline_inside(flow: Flow, state: Num, world: World, add: Any) -> Any:
    return await flow.run(Pipeline("inside", [add, world.step("double", lambda n: n * 2)]), state)


@scenario("parallel as a step", {"n": 13}, "left, right, add 12")
async def parallel_inside(flow: Flow, state: Num, world: World, add: Any) -> Num:
    left = recording(world.calls, "left", lambda state: Left(left=state.n + 1))
    right = recording(world.calls, "right", lambda state: Right(right=state.n + 2))
    both = parallel(node("left", left, output=Left), node("right", right, output=Right))
    merged = await flow.step(both, state)
    return await flow.step(add, Num(n=merged.left * 10 + merged.right))


@scenario("map_over of several nodes as a step", {"n": 7}, "add 1, double 2, add 2, double 3")
async def map_over_several_inside(flow: Flow, state: Num, world: World, add: Any) -> Num:
    each = map_over("numbers", [add, world.step("double")], into="numbers", max_concurrency=1)
    found = await flow.step(each, Nums(numbers=[Num(n=1), Num(n=2)]))
    return Num(n=sum(one.n for one in found.numbers))


@scenario("sleep", {"n": 2}, "add 0, add 1")
async def slept(flow: Flow, state: Num, world: World, add: Any) -> Num:
    state = await flow.step(add, state)
    before = flow.now()
    await flow.sleep(0.05)
    assert (flow.now() - before).total_seconds() >= 0.05
    return await flow.step(add, state)


@scenario("sleeps at once", {"n": 1}, "add 0")
async def slept_side_by_side(flow: Flow, state: Num, world: World, add: Any) -> Num:
    step = asyncio.ensure_future(flow.step(add, state))
    await asyncio.gather(flow.sleep(0.02), flow.sleep(0.05), step)
    return step.result()


@scenario("time limit around a sleep", {"n": 1})
async def timeout_of_a_sleep(flow: Flow, state: Num, *_: Any) -> Num:
    try:
        async with asyncio.timeout(0.02):
            await flow.sleep(30)
    except TimeoutError:
        return Num(n=1)
    return state


@scenario("recorded values", {"n": 1}, "add 0")
async def values(flow: Flow, state: Num, world: World, add: Any) -> Num:
    first = (flow.random(), flow.uuid(), flow.random())
    assert 0 <= first[0] < 1
    assert first[0] != first[2]
    assert first[1].version == 4
    found = await flow.step(add, state)
    await flow.sleep(0.01)
    world.keys.setdefault("values", set()).add(repr(first))
    assert len(world.keys["values"]) == 1
    return found


@scenario("keys", {"n": 6}, "add 0, add 1, add 2")
async def keyed(flow: Flow, state: Num, world: World, add: Any) -> Num:
    found = await asyncio.gather(*(flow.step(add, Num(n=n), key=f"page {n}/é") for n in range(3)))
    return Num(n=sum(one.n for one in found))


@scenario("body that raises", None, "add 0", RunStatus.FAILED, reason="bug")
async def body_raises(flow: Flow, state: Num, world: World, add: Any) -> Num:
    await flow.step(add, state)
    raise NotImplementedError("the rest")


@scenario("output of another class", None, "", RunStatus.FAILED, reason="contract")
async def wrong_output(flow: Flow, state: Num, *_: Any) -> Any:
    return Text(text="no number")


@scenario("input of another class", {"n": 1})
async def wrong_input_of_a_step(flow: Flow, state: Num, world: World, add: Any) -> Any:
    try:
        return await flow.step(add, Text(text="no number"))
    except StepFailed as error:
        return Num(n=int(error.failure.reason == "contract"))


@scenario(
    "budget",
    None,
    "costly, costly",
    RunStatus.PARTIAL,
    config={"policy_map": NEVER, "budget": ExecutionBudget(max_tokens_total=100)},
    reason="budget",
)
async def over_budget(flow: Flow, state: Num, world: World, _: Any) -> Num:
    costly = node("costly", recording(world.calls, "costly", lambda state: ({"n": state.n + 1}, 60)))
    for _ in range(5):
        try:
            state = await flow.step(costly, state)
        except Exception:  # The end by a budget passes it.
            world.calls.append("caught")
    return state


@scenario("finally", None, "add 0, bad 1, clean 0", RunStatus.PARTIAL, failing={"bad"})
async def finally_step(flow: Flow, state: Num, world: World, add: Any) -> Num:
    try:
        return await flow.step(world.step("bad"), await flow.step(add, state))
    finally:
        await flow.step(world.step("clean"), state)


@scenario("question", {"n": 2}, "add 0, add 1", RunStatus.RESUMED, answers=[(Text(text="yes"), None)])
async def asked(flow: Flow, state: Num, world: World, add: Any) -> Num:
    state = await flow.step(add, state)
    answer = await flow.wait_for(Text, reason="Send it?")
    assert answer.text == "yes"
    return await flow.step(add, state)


MORE = [(Num(n=4), None), (Num(n=2), "and more?")]


@scenario("two questions", {"n": 43}, "add 42", RunStatus.RESUMED, answers=MORE)
async def asked_twice(flow: Flow, state: Num, world: World, add: Any) -> Num:
    first = await flow.wait_for(Num, reason="how many?")
    second = await flow.wait_for(Num, reason="and more?", key="more")
    return await flow.step(add, Num(n=first.n * 10 + second.n))


TURNED = [(Num(n=3), "two?"), (Num(n=2), "one?")]


@scenario("questions at once", {"n": 231}, "add 0", RunStatus.RESUMED, answers=TURNED)
async def asked_side_by_side(flow: Flow, state: Num, world: World, add: Any) -> Num:
    one, two, made = await asyncio.gather(
        flow.wait_for(Num, reason="one?", key="one"),
        flow.wait_for(Num, reason="two?", key="two"),
        flow.step(add, state),
    )
    return Num(n=one.n * 100 + two.n * 10 + made.n)


@scenario("question in vain", {"n": 1}, "add 0")
async def asked_in_vain(flow: Flow, state: Num, world: World, add: Any) -> Num:
    try:
        await flow.wait_for(Text, reason="Send it?", timeout=0.05)
    except TimeoutError:
        return await flow.step(add, state)
    return state


FIVE = [(Num(n=5), None)]


@scenario("question of a flow inside", {"n": 6}, "add 0, add 5", RunStatus.RESUMED, answers=FIVE)
async def asked_by_a_child(flow: Flow, state: Num, world: World, add: Any) -> Num:
    @child_of
    async def child(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.wait_for(Num, reason="child?"))

    return await flow.run(child, await flow.step(add, state))


@scenario("question of a step", {"n": 6}, "add 0, add 5, approve, approve", RunStatus.RESUMED, answers=FIVE)
async def asked_by_a_step(flow: Flow, state: Num, world: World, add: Any) -> Num:
    approve = recording(world.calls, "approve", lambda _: current_node().wait_for(Num, reason="really?"))
    state = await flow.step(add, state)
    return await flow.step(add, await flow.step(node("approve", approve), state))


@scenario("question after cancelled ones", {"n": 6}, "add 0, add 0, add 5", RunStatus.RESUMED, answers=FIVE)
async def asked_after_a_cancelled_question(flow: Flow, state: Num, world: World, add: Any) -> Num:
    for _ in range(2):
        first = asyncio.ensure_future(flow.wait_for(Num, reason="never?", key=f"never {_}"))
        await flow.step(add, state)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    return await flow.step(add, await flow.wait_for(Num, reason="how many?"))


@scenario("question before a sleep", {"n": 6}, "add 5", RunStatus.RESUMED, answers=FIVE)
async def asked_before_a_sleep(flow: Flow, state: Num, world: World, add: Any) -> Num:
    answer = await flow.wait_for(Num, reason="how many?")
    await flow.sleep(0.02)
    return await flow.step(add, answer)


@scenario(
    "flow between nodes", {"n": 4}, "add 0, add 1, add 2, add 3", around=lambda flow, add: [add, flow, add]
)
async def in_a_pipeline(flow: Flow, state: Num, world: World, add: Any) -> Num:
    for _ in range(2):
        state = await flow.step(add, state)
    return state


@scenario("calls before they are awaited", {"n": 423}, "add 3, add 1, add 2")
async def same_node_twice_at_once(flow: Flow, state: Num, world: World, add: Any) -> Num:
    found = await asyncio.gather(*[flow.step(add, Num(n=n)) for n in (3, 1, 2)])
    return Num(n=int("".join(str(one.n) for one in found)))
