"""Mistakes in flows: each has a message that names the fix."""

import asyncio
import functools
import random
import threading
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
from pydantic import BaseModel, create_model
from tests.flows.steps import Text, World
from tests.kit import NEVER, Num, context_of, failing_with, node, quick, returning

from stroma import (
    ContractViolation,
    Flow,
    PipelineChanged,
    Question,
    RunStatus,
    StromaRunner,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
)

world = World()
add = world.step("add")


def a_flow(body: Any, output: type[BaseModel] = Num) -> Any:
    return stroma_flow("f", input=Num, output=output)(body)


async def test_a_wrong_output_class() -> None:
    """A flow that returns another class than its output is FAILED, and says which it must return."""

    async def body(flow: Flow, state: Num) -> Num:
        return Text(text="x")

    result = await quick().run(a_flow(body), Num())
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert isinstance(result.failure.exception, ContractViolation)
    assert "flow 'f' must return a Num, got Text" in result.failure.message


class Both(BaseModel):
    n: int
    text: str


async def test_the_output_of_a_group_is_an_output() -> None:
    """A flow may return the output of parallel or map_over, whose fields its output model validates."""
    group = parallel(add, node("say", returning({"text": "x"}), output=Text))

    async def body(flow: Flow, state: Num) -> Any:
        return await flow.step(group, state)

    result = await quick().run(a_flow(body, Both), Num())
    assert (result.status, result.output) == (RunStatus.COMPLETED, Both(n=1, text="x"))
    missing = create_model("Missing", more=(int, ...))
    result = await quick().run(a_flow(body, missing), Num())
    assert result.failure.message == "Contract violation for 'f' (output): more: Field required"


async def test_an_invalid_input() -> None:
    """Input that breaks the contract of the flow is FAILED before the body is called."""

    async def body(flow: Flow, state: Any) -> Num:
        raise AssertionError

    class Needed(BaseModel):
        needed: int

    result = await quick().run(stroma_flow("f", input=Needed, output=Num)(body), Text(text="x"))
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert "Contract violation for 'f' (input): needed" in result.failure.message


async def test_a_step_that_is_never_awaited() -> None:
    """Python's warning names the step that was not awaited."""

    async def body(flow: Flow, state: Num) -> Num:
        flow.step(add, state)
        return state

    with pytest.warns(RuntimeWarning, match=r"flow\.step\(add\).* was never awaited"):
        result = await quick().run(a_flow(body), Num())
    assert result.status is RunStatus.COMPLETED


async def test_a_flow_used_outside_of_its_body() -> None:
    """After the end of the flow, in a node and in another thread, its methods name where to call them."""
    kept: list[Flow] = []
    said: list[str] = []

    async def inside(state: Num) -> Num:
        try:
            await kept[0].step(add, state)
        except RuntimeError as error:
            said.append(str(error))
        return state

    def call(flow: Flow, state: Num) -> None:
        try:
            flow.step(add, state)
        except RuntimeError as error:
            said.append(str(error))

    within = node("inside", inside)

    async def body(flow: Flow, state: Num) -> Num:
        kept.append(flow)
        state = await flow.step(within, state)
        thread = threading.Thread(target=call, args=(flow, state))
        thread.start()
        thread.join()
        return state

    assert (await quick().run(a_flow(body), Num())).status is RunStatus.COMPLETED
    assert (
        "flow.step was called inside node 'inside'; return the data, and make the call in the flow" in said[0]
    )
    assert "in another thread or event loop" in said[1]
    with pytest.raises(RuntimeError, match="after flow 'f' had ended"):
        kept[0].step(add, Num())


async def test_wrong_arguments() -> None:
    """What is no node, no model, a flow in the place of a node, and a key used twice are refused by name."""
    said: list[str] = []

    async def inner(flow: Flow, state: Num) -> Num:
        return state

    other = a_flow(inner)

    async def body(flow: Flow, state: Num) -> Num:
        wrong: list[Any] = [
            lambda: flow.step(len, state),
            lambda: flow.step(add, {"n": 1}),
            lambda: flow.step(other, state),
            lambda: flow.step([add, add], state),
            lambda: flow.run(add, state),
            lambda: flow.map(add, [1]),
            lambda: flow.map([add, add], [state]),
            lambda: flow.wait_for(int, reason="x"),
            lambda: flow.wait_for(Num, reason=None),
            lambda: flow.sleep(1, until=datetime.now()),
            lambda: flow.sleep(until=datetime.now()),
            lambda: flow.sleep(days=10_000_000),
            lambda: flow.sleep(float("nan")),
            lambda: asyncio.get_running_loop().call_later(float("nan"), print),
            lambda: flow.receive(Num, timeout=float("nan")),
            lambda: flow.receive(str),
            lambda: flow.receive(Text, topic="\0"),
            lambda: flow.step(add, state, key=5),  # type: ignore[arg-type]
        ]
        for call in wrong:
            try:
                call()
            except (TypeError, ValueError) as error:
                said.append(str(error))
        await flow.step(add, state, key="k")
        with pytest.raises(ValueError, match="key='k' is used by two calls"):
            flow.step(add, state, key="k")
        return state

    assert (await quick().run(a_flow(body), Num())).status is RunStatus.COMPLETED
    expected = [
        "is not a stroma node; decorate it",
        "the input of step 'add' must be a pydantic model, got dict",
        "'f' is a flow; call it with flow.run",
        "flow.step takes one node, got a list of 2",
        "call a node with flow.step",
        "each item of 'add' must be a pydantic model, got int",
        "flow.map takes one node, got a list of 2; only map_over takes several nodes: use "
        "flow.step(map_over(...), state)",
        "flow.wait_for takes a pydantic model",
        "the reason of flow.wait_for must be a string, got None",
        "pass a duration or until=, not both",
        "until must have a time zone",
        "a wait must be from 0 to 100,000,000,000 seconds, got 864000000000",
        "a wait must be from 0 to 100,000,000,000 seconds, got nan",
        "a timer must have a time, got nan",
        "a wait must be from 0 to 100,000,000,000 seconds, got nan",
        "flow.receive takes a pydantic model",
        "topic",
        "key must be a string, got 5",
    ]
    assert len(said) == len(expected)
    for text, part in zip(said, expected, strict=True):
        assert part in text


async def test_wrong_definitions() -> None:
    """A function that cannot be the body of a flow is refused when it is decorated."""

    async def generator(flow: Flow, state: Num) -> AsyncIterator[Num]:
        yield state

    def plain(flow: Flow, state: Num) -> Num:
        return state

    async def short(flow: Flow) -> Num:
        return Num()

    async def long(flow: Flow, state: Num, extra: int) -> Num:
        return state

    async def bare(flow, state):
        return state

    async def body(flow: Flow, state: Num) -> Text:
        return Text()

    for function, options, said in (
        (generator, {}, "is an async generator"),
        (plain, {}, "must be an `async def` function"),
        (short, {}, r"^flow 'f' is called with \(flow, state\), and .* takes \(flow: .*; define it with"),
        (long, {}, r"^flow 'f' is called with \(flow, state\), and .* takes \(flow: .*, extra: int\)"),
        (bare, {}, "has no input model; annotate the parameter with one, or pass input="),
        (body, {"input": Num, "output": Num}, "has output=Num, and its function is annotated with Text"),
        (body, {"input": Text, "output": Text}, "has input=Text, and its function is annotated with Num"),
    ):
        with pytest.raises(TypeError, match=said):
            stroma_flow("f", **options)(function)

    async def method(cls: type, flow: Flow, state: Num) -> Num:
        return state

    decorators: list[Any] = [stroma_flow, stroma_flow("f", input=Num, output=Num)]
    for decorate in decorators:
        with pytest.raises(
            TypeError, match=r"is marked inside its class; mark a bound method, as in runner.f"
        ):
            decorate(classmethod(method))


def test_the_name_of_a_flow() -> None:
    """A flow is named by the first argument, by ``name=``, or as its function."""

    async def body(flow: Flow, state: Num) -> Num:
        return state

    for decorate in (stroma_flow, StromaRunner.quick().flow):
        assert decorate("f")(body).name == decorate(name="f")(body).name == "f"
        assert decorate(body).name == "body"


async def test_execute_step_inside_of_a_body_names_the_step() -> None:
    """A body that calls execute_step() is FAILED with the call that a resume does not repeat."""

    async def body(flow: Flow, state: Num) -> Num:
        return (await execute_step("add", add, state, current_run())).output

    result = await quick().run(a_flow(body), Num())
    assert (result.status, result.failure.message) == (
        RunStatus.FAILED,
        "the body of a flow called execute_step(), which each resume would call again; use await "
        "flow.step(node, state)",
    )


@pytest.mark.parametrize("call", ["run", "run_sync", "submit"])
async def test_a_run_inside_of_a_body_names_the_step(call: str) -> None:
    """A body that starts another run is FAILED with the calls that a resume does not repeat."""
    runner = quick()

    async def body(flow: Flow, state: Num) -> Num:
        started = getattr(runner, call)(a_flow(body) if call == "submit" else [add], state)
        return (await started).output

    result = await runner.run(a_flow(body), Num())
    assert result.failure is not None
    assert result.status is RunStatus.FAILED
    assert f"the body of a flow called runner.{call}()" in result.failure.message
    assert f"use await flow.{'submit' if call == 'submit' else 'step'}(" in result.failure.message


async def test_a_flow_in_the_place_of_a_node() -> None:
    """A flow called by hand, in a group or by execute_step says how it is run."""

    async def body(flow: Flow, state: Num) -> Num:
        return state

    f = a_flow(body)
    with pytest.raises(TypeError, match=r"run it with `await runner.run\(f, state\)`"):
        await f(Num(), Num())
    with pytest.raises(TypeError, match="flow 'f' cannot be in a group"):
        parallel(f)
    with pytest.raises(TypeError, match="flow 'f' cannot be in a group"):
        map_over("items", f, into="done")

    runner = quick(policy_map=NEVER)
    ctx = context_of(runner)
    result = await execute_step("x", f, Num(), ctx)
    assert result.failure is not None
    assert "run it with" in result.failure.message


async def test_a_flow_may_be_called_as_a_part_of_another() -> None:
    """Called with the flow of another body, a flow is a part of that body."""

    async def part(flow: Flow, state: Num) -> Num:
        return await flow.step(add, state)

    inner = a_flow(part)

    async def body(flow: Flow, state: Num) -> Num:
        return await inner(flow, await inner(flow, state))

    result = await quick().run(a_flow(body), Num())
    assert [event.branch for event in result.trace] == ["add#0", "add#1"]


@pytest.mark.parametrize("way", ["time", "datetime", "random", "calls"])
async def test_what_is_not_deterministic_is_found(way: str) -> None:
    """check_deterministic finds a branch that the time, or chance, decides."""
    lives = [0]

    async def body(flow: Flow, state: Num) -> Num:
        lives[0] += 1
        if way == "time":
            chosen = int(time.time() // 3600 % 24)
        elif way == "datetime":
            chosen = datetime.now().hour
        elif way == "random":
            chosen = random.randrange(10**9)
        else:
            chosen = 0
            for _ in range(lives[0]):
                await flow.step(add, state)
        return await flow.step(add, Num(n=chosen))

    with pytest.raises(PipelineChanged, match="A flow may depend only on its input, its steps"):
        await quick().check_deterministic(a_flow(body), Num())


async def test_what_is_not_deterministic_is_found_in_a_flow_inside() -> None:
    """check_deterministic looks at flows inside, and at what they make in tasks of their own."""

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        hour = datetime.now().hour
        one, _ = await asyncio.gather(flow.step(add, Num(n=hour)), flow.step(add, state))
        return one

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.run(inner, await flow.step(add, state))

    with pytest.raises(
        PipelineChanged,
        match=r"makes step 'add' \(call 1\) of step 'inner' \(call 2\) with other values of 'n'",
    ):
        await quick().check_deterministic(a_flow(body), Num())


async def test_what_is_deterministic_passes() -> None:
    """check_deterministic returns the result of a flow that depends on steps and recorded values alone."""

    async def body(flow: Flow, state: Num) -> Num:
        if flow.now().hour % 2 and flow.random() < 0.5:
            state = await flow.step(add, state)
        found = await asyncio.gather(*(flow.step(add, Num(n=n)) for n in range(5)))
        return await flow.step(add, Num(n=len({str(flow.uuid()) for _ in found})))

    result = await StromaRunner.quick().check_deterministic(a_flow(body), Num())
    assert result.output == Num(n=6)


async def test_a_flow_that_waits_is_checked_to_its_end() -> None:
    """check_deterministic answers questions in order and lets timers pass: it replays code behind waits."""

    async def body(flow: Flow, state: Num) -> Num:
        one = await flow.wait_for(Num, reason="one?")
        await flow.sleep(days=3)
        two = await flow.wait_for(Num, reason="two?", timeout=3600)
        if time.time() // 3600 % 24 == two.n:
            await flow.step(add, two)
        return await flow.step(add, Num(n=10 * one.n + two.n))

    runner = quick()
    result = await runner.check_deterministic(a_flow(body), Num(), answers=[Num(n=2), Num(n=40)])
    assert result.output == Num(n=61)
    hour = int(time.time() // 3600 % 24)
    with pytest.raises(PipelineChanged, match="A flow may depend only on its input, its steps"):
        await runner.check_deterministic(a_flow(body), Num(), answers=[Num(), Num(n=hour)])

    def answer(question: Question) -> Num | None:
        return Num(n=3) if question.reason == "one?" else None

    late = await runner.check_deterministic(a_flow(body), Num(), answers=answer)
    assert late.failure is not None
    assert late.failure.message == "no answer came in time: two?"
    with pytest.raises(ValueError, match=r"flow 'f' does not end: nobody answers 'one\?'; .* answers="):
        await runner.check_deterministic(a_flow(body), Num())


async def test_a_deterministic_flow_may_fail() -> None:
    """check_deterministic returns the result of a flow that makes the call again which had failed."""
    broken = node("broken", failing_with(PermissionError, "no"))

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.step(broken, await flow.step(add, state))

    result = await quick().check_deterministic(a_flow(body), Num())
    assert result.failure is not None
    assert result.failure.node_id == "broken"


def test_a_decorator_that_supplies_an_argument_of_a_body() -> None:
    """A body is called as its decorator says, which may supply further arguments of the function."""

    def with_amount(func: Any) -> Any:
        @functools.wraps(func)
        async def wrapper(flow: Flow, state: Num) -> Any:
            return await func(flow, state, 5)

        return wrapper

    @stroma_flow
    @with_amount
    async def body(flow: Flow, state: Num, amount: int) -> Num:
        return Num(n=state.n + amount)

    assert quick().run_sync(body, Num(n=1)).final_state == Num(n=6)
