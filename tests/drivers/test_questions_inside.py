"""A step inside a node asks a person: there is one question, and its answer reaches the step that asked."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from tests.drivers.conftest import LocalDriver, TemporalDriver
from tests.kit import NEVER, THRICE, Num, node

from stroma import Flow, NodeHooks, RunStatus, Suspend, current_node, current_run, parallel, stroma_flow
from stroma.adapters import Guard
from stroma.checkpoint import Waiting
from stroma.checkpoint.entries import UnknownCall
from stroma.drivers.remote.questions import answer_of, waiting_of
from stroma.drivers.remote.wire import clip

Calls = list[str]


class Approval(BaseModel):
    approved: bool


def agent(node_id: str, calls: Calls, *, raised: bool = False, questions: int = 1) -> Any:
    """Return a node that calls a guarded agent, whose tool asks questions one after another."""

    async def func(state: Num) -> Any:
        guard = Guard(current_run())

        @guard.step(f"tool-{node_id}")
        async def tool(number: int) -> bool:
            calls.append(f"{node_id}{number}")
            reason = f"may {node_id} do {number}?"
            if raised and current_node().signal is None:
                raise Suspend(reason, schema=Approval)
            return current_node().wait_for(Approval, reason=reason).approved

        @guard.step("model")
        async def model(_: int) -> int:
            return sum([await tool(number) for number in range(questions)])

        return {"n": state.n + await model(state.n)}

    return node(node_id, func)


@pytest.fixture(params=["local", pytest.param("temporal", marks=pytest.mark.slow)])
def driver(request: pytest.FixtureRequest) -> Any:
    return LocalDriver() if request.param == "local" else request.getfixturevalue("temporal")


@pytest.mark.parametrize("raised", [False, True])
async def test_a_step_inside_a_node_asks_once(driver: LocalDriver | TemporalDriver, raised: bool) -> None:
    """The nodes and steps around it wait with it: they ask nothing themselves, and have not failed."""
    calls, failed = Calls(), list[Any]()

    async def fails(*about: Any) -> None:
        failed.append(about)

    hooks = NodeHooks(on_node_failure=fails)
    async with driver.bind([agent("a", calls, raised=raised)], hooks=hooks) as bound:
        first = await bound.run(Num(n=1), run_id="asks-inside" + str(raised))
        assert (first.status, first.suspended) == (RunStatus.SUSPENDED, ["may a do 0?"])
        await bound.runner.signal(first.run_id, {"approved": True})
        done = await bound.go_on(Num(n=1), first.run_id)
    assert done.final_state == Num(n=2)
    assert calls == ["a0", "a0"]
    assert not failed


async def test_steps_inside_a_node_ask_one_after_another(driver: LocalDriver | TemporalDriver) -> None:
    """An answer is there for every later attempt: the first question is not asked again for the sake of the second."""
    calls: Calls = []
    async with driver.bind([agent("a", calls, questions=3)]) as bound:
        result = await bound.run(Num(n=1), run_id="asks-thrice")
        for number in range(3):
            assert result.suspended == [f"may a do {number}?"]
            await bound.runner.signal(result.run_id, {"approved": True})
            result = await bound.go_on(Num(n=1), result.run_id)
    assert result.final_state == Num(n=4)


async def test_steps_inside_a_group_ask(driver: LocalDriver | TemporalDriver) -> None:
    """Each answer reaches the step that it is for."""
    calls: Calls = []
    async with driver.bind([parallel(agent("a", calls), agent("b", calls))]) as bound:
        result = await bound.run(Num(n=1), run_id="asks-in-a-group")
        assert sorted(result.suspended) == ["may a do 0?", "may b do 0?"]
        await bound.runner.signal(result.run_id, {"approved": True}, node_id="tool-b")
        await bound.runner.signal(result.run_id, {"approved": False}, node_id="tool-a")
        result = await bound.go_on(Num(n=1), result.run_id)
    assert result.status is RunStatus.RESUMED
    assert Num.model_validate(result.final_state.model_dump()) == Num(n=2)  # That of the last node.


async def test_steps_inside_the_steps_of_a_flow_ask(driver: LocalDriver | TemporalDriver) -> None:
    """A flow waits with the step of a step, and goes on with the answer."""
    calls: Calls = []
    asks = agent("a", calls)

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.step(asks, await flow.step(asks, state))

    async with driver.bind([stroma_flow("flow", input=Num, output=Num)(body)]) as bound:
        result = await bound.run(Num(n=1), run_id="asks-in-a-flow")
        for _ in range(2):
            assert result.suspended == ["may a do 0?"]
            await bound.runner.signal(result.run_id, {"approved": True})
            result = await bound.go_on(Num(n=1), result.run_id)
    assert result.final_state == Num(n=3)


@pytest.mark.parametrize("fails_first", [True, False])
async def test_another_attempt_of_the_node_does_not_ask_again(
    driver: LocalDriver | TemporalDriver, fails_first: bool
) -> None:
    """The answer to a step is that to the same step of every attempt, whichever of them has asked."""
    calls: Calls = []

    async def func(state: Num) -> Any:
        guard, attempt = Guard(current_run()), current_node().attempt
        calls.append(f"a{attempt}")

        @guard.step("tool")
        async def tool(number: int) -> bool:
            return current_node().wait_for(Approval, reason=f"may I do {number}?").approved

        if fails_first and calls == ["a1"]:
            raise ConnectionError
        done = await tool(1) + await tool(2)
        if not fails_first and attempt == 1:
            raise ConnectionError
        return {"n": state.n + done}

    async with driver.bind([node("a", func)], policy_map=THRICE) as bound:
        result = await bound.run(Num(n=1), run_id=f"asks-in-attempts-{fails_first}")
        for number in (1, 2):
            assert result.suspended == [f"may I do {number}?"]
            await bound.runner.signal(result.run_id, {"approved": True})
            result = await bound.go_on(Num(n=1), result.run_id)
    assert result.final_state == Num(n=3)


class Wrapped(Exception):
    """What a framework raises in place of an exception of its tools."""


@pytest.mark.parametrize("wrapping", ["from", "while", "group", "twice"])
async def test_a_question_that_a_framework_wraps_is_no_failure(
    driver: LocalDriver | TemporalDriver, wrapping: str
) -> None:
    """Whatever comes out of the node because a step inside of it asks: the node waits, and is not tried again."""
    calls: Calls = []

    async def func(state: Num) -> Any:
        calls.append("a")
        guard = Guard(current_run())

        @guard.step("tool")
        async def tool() -> bool:
            return current_node().wait_for(Approval, reason="may I?").approved

        try:
            return {"n": state.n + await tool()}
        except Suspend as question:
            if wrapping == "from":
                raise Wrapped from question
            if wrapping == "while":
                raise Wrapped  # noqa: B904
            if wrapping == "group":
                raise ExceptionGroup("tools", [question]) from None
            raise Wrapped from ExceptionGroup("tools", [question])

    async with driver.bind([node("a", func)]) as bound:
        result = await bound.run(Num(n=1), run_id="asks-wrapped-" + wrapping)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["may I?"])
        await bound.runner.signal(result.run_id, {"approved": True})
        result = await bound.go_on(Num(n=1), result.run_id)
    assert (result.final_state, calls) == (Num(n=2), ["a", "a"])


@pytest.mark.parametrize("grouped", [False, True])
async def test_what_fails_beside_a_question_is_a_failure(
    driver: LocalDriver | TemporalDriver, grouped: bool
) -> None:
    """A node that handles the question and fails later, or for another reason too, has failed."""

    async def func(state: Num) -> Any:
        guard = Guard(current_run())

        @guard.step("tool")
        async def tool() -> bool:
            return current_node().wait_for(Approval, reason="may I?").approved

        error: Exception = AssertionError()
        try:
            await tool()
        except Suspend as question:
            error = ExceptionGroup("tools", [question, ValueError("odd")]) if grouped else ValueError("odd")
        raise error

    async with driver.bind([node("a", func)], policy_map=NEVER) as bound:
        result = await bound.run(Num(n=1), run_id=f"fails-beside-{grouped}")
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None


@pytest.mark.parametrize("length", [3, 100_000])
def test_an_answer_names_its_question_as_the_run_does(length: int) -> None:
    """An answer about a call of an effect is accepted for that call only: the message in it is not shortened again."""
    call = UnknownCall("key", 1, clip("x" * length))
    question = answer_of(Waiting(0, "", "charge", "effect", "", None, call))
    answer = answer_of(waiting_of(question)._replace(payload=b"{}"))
    assert answer == {**question, "payload": "{}"}
