"""Pydantic AI: real agents with and without the capability, with its own function model and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.exceptions import ApprovalRequired, UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults
from pydantic_ai.usage import RequestUsage
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import UnknownNode
from stroma.adapters.pydantic_ai import StromaCapability

KINDS = ["run_sync", "run", "run_stream"]


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class Answer(BaseModel):
    text: str


class Script:
    """A model that answers what it is told to, one answer per request; what is an exception, it raises."""

    def __init__(self, *answers: Any, tokens: int = 10) -> None:
        self.answers = list(answers)
        self.tokens = tokens
        self.asked: list[list[ModelMessage]] = []

    def _next(self, messages: list[ModelMessage]) -> Any:
        self.asked.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _whole(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        answer = self._next(messages)
        part = TextPart(answer) if isinstance(answer, str) else ToolCallPart(*answer)
        usage = RequestUsage(input_tokens=self.tokens - 1, output_tokens=1)
        return ModelResponse(parts=[part], usage=usage, model_name="gpt-4o")

    async def _parts(self, messages: list[ModelMessage], info: AgentInfo) -> Any:
        answer = self._next(messages)
        if isinstance(answer, str):
            for word in answer.split():
                yield word + " "
        else:
            yield {0: DeltaToolCall(name=answer[0], json_args=answer[1], tool_call_id="1")}

    @property
    def model(self) -> FunctionModel:
        return FunctionModel(self._whole, stream_function=self._parts, model_name="gpt-4o")


def ask(agent: Agent[Any, Any], kind: str = "run", **options: Any) -> Any:
    async def main() -> Any:
        if kind == "run":
            return (await agent.run("hello", **options)).output
        async with agent.run_stream("hello", **options) as result:
            return await result.get_output()

    output = agent.run_sync("hello", **options).output if kind == "run_sync" else asyncio.run(main())
    return output.strip() if isinstance(output, str) else output


def weather_agent(
    script: Script, capability: StromaCapability | None = None, **options: Any
) -> Agent[None, Any]:
    agent = Agent(
        script.model, name="forecaster", capabilities=[] if capability is None else [capability], **options
    )

    @agent.tool_plain
    def weather(city: str) -> Any:
        return {"celsius": len(city)}

    return agent


CALL = ("weather", '{"city": "Oslo"}')


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    """Model, tool, model: the answer and the messages are those of the bare agent, each part is a step."""
    plain, guarded = Script(CALL, "It is 4 C"), Script(CALL, "It is 4 C")
    guard = guard_of()
    capability = StromaCapability(guard, tools={"weather": (City, Weather)})
    assert ask(weather_agent(guarded, capability), kind) == ask(weather_agent(plain), kind) == "It is 4 C"
    assert [len(messages) for messages in guarded.asked] == [len(messages) for messages in plain.asked]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.COMPLETED
    lines = [line.removesuffix(" 10") for line in tree(guard.last.result)]
    if kind != "run_stream":
        assert lines == ["forecaster success", "  model success", "  weather success", "  model success"]
        assert guard.last.result.total_tokens == 20
        assert guard.last.result.total_cost_usd > 0
    else:
        assert [line.split()[0] for line in lines] == ["forecaster", "model", "weather", "model"]


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_tool(kind: str) -> None:
    """G1: what a model passes to a tool, and what the tool returns, is held to the tool's contract."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        agent = weather_agent(Script(CALL, "It is 4 C"), StromaCapability(guard, tools={"weather": contract}))
        with pytest.raises(ContractViolation) as caught:
            ask(agent, kind)
        assert (caught.value.node_id, caught.value.direction) == ("weather", direction)
        assert guard.stopped is not None
        assert guard.stopped.exception is caught.value
        assert guard.last is not None
        assert guard.last.result is not None
        assert guard.last.result.status is RunStatus.FAILED


def test_an_answer_that_breaks_the_contract_is_told_to_the_model_and_then_fails() -> None:
    """The model is asked again with what was wrong, as often as the agent allows; then the run fails."""
    script = Script(("final_result", '{"text": "no"}'), ("final_result", '{"text": "long enough"}'))

    class Long(BaseModel):
        text: str

        def __init__(self, **data: Any) -> None:
            super().__init__(**data)

    from pydantic import Field

    class Wanted(BaseModel):
        text: str = Field(min_length=5)

    guard = guard_of()
    agent = weather_agent(script, StromaCapability(guard, output=Wanted), output_type=Long)
    assert ask(agent).text == "long enough"
    assert "at least 5 characters" in str(script.asked[1])
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 20
    script = Script(*[("final_result", '{"text": "no"}')] * 2)
    agent = weather_agent(script, StromaCapability(guard, output=Wanted), output_type=Long)
    with pytest.raises(UnexpectedModelBehavior):
        ask(agent)
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 20
    assert guard.last.result.status is not RunStatus.COMPLETED


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_of_models_and_tools_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    """G3: the request or the tool alone is made again, not the agent's run around it."""
    script = Script(TimeoutError("slow"), CALL, ConnectionError("gone"), "It is 4 C")
    guard = guard_of()
    assert ask(weather_agent(script, StromaCapability(guard)), kind) == "It is 4 C"
    assert len(script.asked) == 4
    script = Script(*[TimeoutError("slow")] * 9)
    with pytest.raises(TimeoutError):
        ask(weather_agent(script, StromaCapability(guard)), kind)
    assert len(script.asked) == 3
    script = Script(PermissionError("no"))
    terminal = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PermissionError):
        ask(weather_agent(script, StromaCapability(terminal)), kind)
    assert len(script.asked) == 1
    assert terminal.stopped is not None
    assert terminal.stopped.node_id == "model"
    flaky = [TimeoutError(), TimeoutError()]
    agent = Agent(Script(("flaky", "{}"), "done").model, capabilities=[StromaCapability(guard)])

    @agent.tool_plain(name="flaky")
    def tool() -> str:
        pay()
        if flaky:
            raise flaky.pop()
        return "fine"

    assert ask(agent, kind) == "done"
    assert not flaky
    # Of the whole run: a stream of the framework's own function model says what it likes.
    used = [event.usage.tokens for event in result_of(guard).trace.walk() if event.node_id == "flaky"]
    assert used == [PAID] * 3


@holds("budget")
@pytest.mark.parametrize("kind", ["run_sync", "run"])
def test_the_budget_stops_the_agent_to_the_token(kind: str) -> None:
    """The request that crosses the limit is the last; a tool is not called after it."""
    script = Script(*[CALL] * 9)
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    with pytest.raises(BudgetExceeded) as caught:
        ask(weather_agent(script, StromaCapability(guard)), kind)
    assert (caught.value.actual, caught.value.limit, len(script.asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 30
    assert guard.last.result.status is RunStatus.PARTIAL
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)
    assert [line.strip() for line in tree(guard.last.result)].count("weather success") == 2


def test_agents_inside_tools_of_agents_count_once() -> None:
    """A sub-agent is a step inside the tool that asks it, and its tokens are in the bill of the run."""
    guard = guard_of()
    inner = Agent(Script("deep", tokens=7).model, name="inner", capabilities=[StromaCapability(guard)])
    outer = Agent(Script(("ask", "{}"), "done").model, name="outer", capabilities=[StromaCapability(guard)])

    @outer.tool
    async def ask(ctx: RunContext[None]) -> str:
        return (await inner.run("x", usage=ctx.usage)).output

    assert asyncio.run(outer.run("hello")).output == "done"
    assert guard.last is not None
    assert guard.last.result is not None
    assert tree(guard.last.result) == [
        "outer success",
        "  model success 10",
        "  ask success",
        "    inner success",
        "      model success 7",
        "  model success 10",
    ]
    assert guard.last.result.total_tokens == 27


@holds("hooks")
def test_hooks_fire_in_order_with_the_right_parents() -> None:
    seen = Seen()
    script = Script(TimeoutError(), CALL, "It is 4 C")
    ask(weather_agent(script, StromaCapability(guard_of(seen))))
    assert seen.lines == [
        "run start",
        "start forecaster",
        "start model < forecaster",
        "failure model < forecaster",
        "retry model < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "start weather < forecaster",
        "success weather < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "success forecaster",
        "run end COMPLETED",
    ]


@holds("control flow")
def test_model_retry_goes_to_the_model_and_is_no_second_call() -> None:
    """ModelRetry is the framework's: the tool is called once for each time that the model calls it."""
    calls: list[int] = []
    script = Script(("pick", "{}"), ("pick", "{}"), "done")
    guard = guard_of()
    agent = Agent(script.model, capabilities=[StromaCapability(guard)])

    @agent.tool_plain
    def pick() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise ModelRetry("another one")
        return "picked"

    assert ask(agent) == "done"
    assert len(calls) == 2
    assert "another one" in str(script.asked[1])
    assert guard.stopped is None


@holds("control flow")
def test_a_tool_that_waits_for_approval_suspends() -> None:
    """ApprovalRequired passes untouched; the run is SUSPENDED, and goes on with the framework's own results."""
    calls: list[bool] = []
    script = Script(("buy", "{}"), "bought")
    guard = guard_of()
    agent: Agent[None, Any] = Agent(
        script.model, output_type=[str, DeferredToolRequests], capabilities=[StromaCapability(guard)]
    )

    @agent.tool
    def buy(ctx: RunContext[None]) -> str:
        calls.append(ctx.tool_call_approved)
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        return "ok"

    first = asyncio.run(agent.run("hello"))
    assert isinstance(first.output, DeferredToolRequests)
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.SUSPENDED
    approved = DeferredToolResults(approvals={first.output.approvals[0].tool_call_id: True})
    second = asyncio.run(agent.run(message_history=first.all_messages(), deferred_tool_results=approved))
    assert (second.output, calls) == ("bought", [False, True])
    assert guard.last.result.status is RunStatus.COMPLETED


@holds("streams")
def test_a_stream_is_handed_on_as_it_comes_and_not_retried_after_its_first_part() -> None:
    """Rule 9: what fails after the first part fails; the words come one by one."""
    starts: list[int] = []

    async def parts(messages: list[ModelMessage], info: AgentInfo) -> Any:
        starts.append(1)
        yield "one "
        yield "two "
        if len(starts) > 1:
            raise TimeoutError("lost")

    guard = guard_of()
    agent = Agent(FunctionModel(stream_function=parts), capabilities=[StromaCapability(guard)])

    async def main() -> list[str]:
        async with agent.run_stream("hello") as result:
            return [word async for word in result.stream_text(delta=True, debounce_by=None)]

    assert asyncio.run(main()) == ["one ", "two "]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens > 0
    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert len(starts) == 2


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    capability = StromaCapability(guard_of(), tools={"wether": (City, Weather)})
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        ask(weather_agent(Script("x"), capability))


def test_the_framework_s_own_test_model_calls_every_tool_once() -> None:
    """TestModel, which is what users test their agents with, sees no difference."""
    guard = guard_of()
    results = [
        Agent(TestModel(), capabilities=capabilities, tools=[_double]).run_sync("x").output
        for capabilities in ([], [StromaCapability(guard)])
    ]
    assert results[0] == results[1]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens > 0


def _double(n: int) -> int:
    return 2 * n


@holds("journal")
def test_a_run_of_an_agent_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        ask(weather_agent(Script(CALL, "It is 4 C"), StromaCapability(guard_of(store=store))))
        (run,) = store.list_runs()
        assert (run.status, run.tokens) == ("COMPLETED", 20)
        nodes = [attempt.node_id for attempt in store.attempts(run.run_id)]
        assert nodes == ["forecaster", "model", "weather", "model"]
