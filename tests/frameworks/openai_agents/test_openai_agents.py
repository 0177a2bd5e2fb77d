"""OpenAI Agents SDK: real agents with and without the guard, with a fake model and no network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    Model,
    ModelProvider,
    ModelResponse,
    RunConfig,
    Runner,
    Usage,
    UserError,
    function_tool,
    input_guardrail,
    set_tracing_disabled,
)
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from tests.frameworks.contract import CALL, City, FrameworkContract, Weather, weather
from tests.frameworks.kit import guard_of, holds, lines_of, result_of

from stroma import BudgetExceeded, ExecutionBudget, RunStatus
from stroma.adapters import Guard, what_stopped
from stroma.adapters.openai_agents import GuardedModel, GuardedProvider, GuardedRunner, attach

set_tracing_disabled(True)
KINDS = ["run", "run_sync", "streamed"]


class Script(Model):
    """Answers: a text, or (tool name, JSON arguments); what is an exception, it raises. Streams break where they are told to."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        self.model = "gpt-4o"
        self.answers = list(answers)
        self.tokens = tokens
        self.break_after = break_after
        self.asked: list[Any] = []

    def _next(self, given: Any) -> Any:
        self.asked.append(given)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return ResponseFunctionToolCall(
                name=answer[0],
                arguments=answer[1] if isinstance(answer[1], str) else json.dumps(answer[1]),
                call_id=f"call{self.tokens}-{len(self.asked)}",
                type="function_call",
            )
        text = ResponseOutputText(text=answer, type="output_text", annotations=[])
        return ResponseOutputMessage(
            id="1", content=[text], role="assistant", status="completed", type="message"
        )

    async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:
        usage = Usage(requests=1, input_tokens=self.tokens - 1, output_tokens=1, total_tokens=self.tokens)
        return ModelResponse(output=[self._next(input)], usage=usage, response_id=None)

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> Any:
        item = self._next(input)
        words = item.content[0].text.split() if isinstance(item, ResponseOutputMessage) else []
        for n, word in enumerate(words):
            if n == self.break_after:
                raise TimeoutError("lost")
            yield ResponseTextDeltaEvent(
                content_index=0, delta=word, item_id="1", output_index=0, sequence_number=n, logprobs=[],
                type="response.output_text.delta",
            )  # fmt: skip
        usage = ResponseUsage(
            input_tokens=self.tokens - 1, output_tokens=1, total_tokens=self.tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        )  # fmt: skip
        response = Response(
            id="r", created_at=0, model="gpt-4o", object="response", output=[item], tool_choice="auto", tools=[],
            parallel_tool_calls=False, usage=usage,
        )  # fmt: skip
        yield ResponseCompletedEvent(response=response, sequence_number=9, type="response.completed")


def tool_of(tool: Any = weather) -> Any:
    return function_tool(tool, name_override="weather")


def agent_of(
    script: Model, guard: Guard | None = None, tools: Any = None, contracts: Any = None, **options: Any
) -> Agent[Any]:
    own = [tool_of()] if tools is None else list(tools)
    agent = Agent(name="forecaster", model=script, tools=own, **options)
    return agent if guard is None else attach(agent, guard, contracts)


def ask(agent: Agent[Any], kind: str, guard: Guard | None = None) -> Any:
    async def streamed() -> Any:
        result = Runner.run_streamed(agent, "hello")
        async for _ in result.stream_events():
            pass
        return result.final_output

    async def guarded() -> Any:
        if guard is None:
            return await streamed()
        async with guard.run():
            return await streamed()

    runner: Any = Runner if guard is None else GuardedRunner(guard)
    if kind == "run_sync":
        return runner.run_sync(agent, "hello").final_output
    return (
        asyncio.run(guarded()) if kind == "streamed" else asyncio.run(runner.run(agent, "hello")).final_output
    )


@holds("sync and async")
class TestOpenAIAgents(FrameworkContract):
    KINDS = KINDS
    STEPS = ("forecaster success", "  model success 10", "  weather success", "  model success 10")
    #: The SDK wraps what a tool raises.
    WRAPPERS = (UserError,)

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers, break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, guard, [tool_of(tool)], contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind, guard)

    def steps(self, kind: str) -> Sequence[str]:
        """Return those of a stream without the step of the agent: its run is opened by the test."""
        return [line.strip() for line in self.STEPS[1:]] if kind == "streamed" else self.STEPS

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        async def main() -> None:
            async with guard.run():
                result = Runner.run_streamed(agent_of(script, guard), "hello")
                async for event in result.stream_events():
                    if event.type == "raw_response_event" and hasattr(event.data, "delta"):
                        seen.append(event.data.delta)

        asyncio.run(main())

    def requests(self, script: Script) -> list[str]:
        return [str(value) for value in script.asked]


def test_a_tool_that_fails_for_good_is_told_to_the_model_as_ever() -> None:
    """The SDK makes a message of an error; with its own words, after our retries, and the agent goes on."""

    @function_tool
    def broken() -> str:
        """Never works."""
        calls.append(1)
        raise LookupError("no such thing")

    events = []
    for guard in (None, guard_of()):
        calls: list[int] = []
        script = Script(("broken", "{}"), "without it")
        assert ask(agent_of(script, guard, [broken]), "run", guard) == "without it"
        events.append(script.asked[1][-1]["output"])
        assert len(calls) == (1 if guard is None else 2)
    assert events[0] == events[1]
    assert "An error occurred while running the tool" in events[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_trips_inside_a_tool_stops_the_agent_too(kind: str) -> None:
    """An agent as a tool: the SDK would tell the model of the error and go on spending."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    inner = attach(Agent(name="inner", model=Script("deep", tokens=7)), guard)
    script = Script(("ask_inner", '{"input": "x"}'), *["more"] * 5)
    agent = agent_of(script, guard, [inner.as_tool("ask_inner", "Ask it.")])
    with pytest.raises(UserError) as caught:
        ask(agent, kind, guard)
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert len(script.asked) == 1
    assert result_of(guard).total_tokens == 17


@holds("control flow")
def test_handoffs_hand_off_and_every_agent_is_guarded() -> None:
    """The agent that is handed to is counted, its tools hold their contracts, and the answer is its own."""
    guard = guard_of()
    other = Agent(name="other", model=Script(CALL, "from other", tokens=7), tools=[tool_of()])
    agent = agent_of(
        Script(("transfer_to_other", "{}")), guard, handoffs=[other], contracts={"weather": (City, Weather)}
    )
    result = asyncio.run(GuardedRunner(guard).run(agent, "hello"))
    assert (result.final_output, result.last_agent.name) == ("from other", "other")
    assert [line.strip() for line in lines_of(guard)] == [
        "forecaster success", "model success 10", "model success 7", "weather success", "model success 7",
    ]  # fmt: skip


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_a_guardrail_that_trips_passes_untouched(kind: str) -> None:
    """Its exception is the SDK's own, once, and ends the run as FAILED."""
    trips: list[int] = []

    @input_guardrail(run_in_parallel=False)
    async def never(context: Any, agent: Any, value: Any) -> GuardrailFunctionOutput:
        trips.append(1)
        return GuardrailFunctionOutput(output_info="no", tripwire_triggered=True)

    guard = guard_of()
    with pytest.raises(InputGuardrailTripwireTriggered):
        ask(agent_of(Script("x"), guard, input_guardrails=[never]), kind, guard)
    assert len(trips) == 1
    if kind != "streamed":
        assert result_of(guard).status is RunStatus.FAILED


@holds("control flow")
def test_a_tool_that_needs_approval_suspends_and_goes_on() -> None:
    """The SDK's own interruption and state: the run is SUSPENDED until it is approved."""

    @function_tool(needs_approval=True)
    def buy() -> str:
        """Needs a yes."""
        calls.append(1)
        return "bought"

    calls: list[int] = []
    guard = guard_of()
    agent = agent_of(Script(("buy", "{}"), "done"), guard, [buy])
    runner = GuardedRunner(guard)
    result = asyncio.run(runner.run(agent, "hello"))
    assert calls == []
    assert (result_of(guard).status, result_of(guard).suspended) == (
        RunStatus.SUSPENDED,
        ["approval of buy"],
    )
    state = result.to_state()
    state.approve(result.interruptions[0])
    assert asyncio.run(runner.run(agent, state)).final_output == "done"
    assert calls == [1]
    assert result_of(guard).status is RunStatus.COMPLETED


def test_a_model_that_is_only_named_is_guarded_by_its_provider() -> None:
    script = Script("done")

    class Provider(ModelProvider):
        def get_model(self, model_name: str | None) -> Model:
            assert model_name == "mine"
            return script

    guard = guard_of()
    agent = Agent(name="named", model="mine")
    result = asyncio.run(
        GuardedRunner(guard).run(agent, "hello", run_config=RunConfig(model_provider=Provider()))
    )
    assert result.final_output == "done"
    assert lines_of(guard) == ["named success", "  model success 10"]
    guarded = GuardedProvider(guard, Provider()).get_model("mine")
    assert isinstance(guarded, GuardedModel)
    assert guarded.asked is script.asked  # type: ignore[attr-defined]
