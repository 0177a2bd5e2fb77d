"""Pydantic AI: real agents with and without the capability, with its own function model and no network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
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
from tests.frameworks.contract import FrameworkContract, weather
from tests.frameworks.kit import guard_of, holds, lines_of, result_of

from stroma import RunStatus
from stroma.adapters import Guard
from stroma.adapters.pydantic_ai import StromaCapability


class Script:
    """A model that answers what it is told to, one answer per request; what is an exception, it raises."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        self.answers = list(answers)
        self.tokens = tokens
        self.break_after = break_after
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
            for n, word in enumerate(answer.split()):
                if n == self.break_after:
                    raise TimeoutError("lost")
                yield word + " "
        else:
            yield {0: DeltaToolCall(name=answer[0], json_args=json.dumps(answer[1]), tool_call_id="1")}

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


def agent_of(
    script: Script,
    capability: StromaCapability | None = None,
    tool: Callable[..., Any] = weather,
    **options: Any,
) -> Agent[None, Any]:
    agent: Agent[None, Any] = Agent(
        script.model, name="forecaster", capabilities=[] if capability is None else [capability], **options
    )
    agent.tool_plain(name="weather")(tool)
    return agent


@holds("sync and async")
class TestPydanticAI(FrameworkContract):
    KINDS = ("run_sync", "run", "run_stream")
    #: The framework's own function model guesses what its streams use.
    METERED = ("run_sync", "run")
    STEPS = ("forecaster success", "  model success 10", "  weather success", "  model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers, break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, None if guard is None else StromaCapability(guard, tools=contracts), tool)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind)

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        async def main() -> None:
            async with self.program(script, guard).run_stream("hello") as result:
                async for word in result.stream_text(delta=True, debounce_by=None):
                    seen.append(word.strip())

        asyncio.run(main())

    def requests(self, script: Script) -> list[int]:
        return [len(messages) for messages in script.asked]


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
    agent = agent_of(script, StromaCapability(guard, output=Wanted), output_type=Long)
    assert ask(agent).text == "long enough"
    assert "at least 5 characters" in str(script.asked[1])
    assert result_of(guard).total_tokens == 20
    script = Script(*[("final_result", '{"text": "no"}')] * 2)
    agent = agent_of(script, StromaCapability(guard, output=Wanted), output_type=Long)
    with pytest.raises(UnexpectedModelBehavior):
        ask(agent)
    assert result_of(guard).total_tokens == 20
    assert result_of(guard).status is not RunStatus.COMPLETED


def test_agents_inside_tools_of_agents_count_once() -> None:
    """A sub-agent is a step inside the tool that asks it, and its tokens are in the bill of the run."""
    guard = guard_of()
    inner = Agent(Script("deep", tokens=7).model, name="inner", capabilities=[StromaCapability(guard)])
    outer = Agent(Script(("ask", "{}"), "done").model, name="outer", capabilities=[StromaCapability(guard)])

    @outer.tool
    async def ask(ctx: RunContext[None]) -> str:
        return (await inner.run("x", usage=ctx.usage)).output

    assert asyncio.run(outer.run("hello")).output == "done"
    assert lines_of(guard) == [
        "outer success",
        "  model success 10",
        "  ask success",
        "    inner success",
        "      model success 7",
        "  model success 10",
    ]
    assert result_of(guard).total_tokens == 27


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
    assert result_of(guard).status is RunStatus.SUSPENDED
    approved = DeferredToolResults(approvals={first.output.approvals[0].tool_call_id: True})
    second = asyncio.run(agent.run(message_history=first.all_messages(), deferred_tool_results=approved))
    assert (second.output, calls) == ("bought", [False, True])
    assert result_of(guard).status is RunStatus.COMPLETED


def test_the_framework_s_own_test_model_calls_every_tool_once() -> None:
    """TestModel, which is what users test their agents with, sees no difference."""
    guard = guard_of()
    results = [
        Agent(TestModel(), capabilities=capabilities, tools=[_double]).run_sync("x").output
        for capabilities in ([], [StromaCapability(guard)])
    ]
    assert results[0] == results[1]
    assert result_of(guard).total_tokens > 0


def _double(n: int) -> int:
    return 2 * n
