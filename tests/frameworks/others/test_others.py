"""Frameworks without an adapter: models and tools as steps by the guard alone, as its page says."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import agno.agent
import agno.models.base
import agno.models.response
import instructor
import pytest
import smolagents
import strands
import strands.models
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from smolagents.models import (
    ChatMessage,
    ChatMessageToolCall,
    ChatMessageToolCallFunction,
    MessageRole,
    TokenUsage,
)
from tests.frameworks.kit import Seen, guard_of, lines_of, result_of, spent
from tests.kit import Text

from stroma import BudgetExceeded, ExecutionBudget, Usage, usage_from
from stroma.adapters import Guard, what_stopped

pytestmark = pytest.mark.filterwarnings("ignore")


class Ledger:
    """The tokens of each request of a provider, which fails as often as it is told."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.tokens = list(errors), list[int]()

    def pay(self) -> int:
        if self.errors:
            raise self.errors.pop()
        self.tokens.append(10 + len(self.tokens) % 7)
        return self.tokens[-1]


def smol(guard: Guard, ledger: Ledger) -> Any:
    class Fake(smolagents.Model):
        @guard.step("model", usage=lambda m: Usage(m.token_usage.input_tokens, m.token_usage.output_tokens))
        def generate(self, messages: Any, **_: Any) -> ChatMessage:
            used = ledger.pay()
            name, arguments = "weather", {"city": "Oslo"}
            if any(message.role == MessageRole.TOOL_RESPONSE for message in messages):
                name, arguments = "final_answer", {"answer": "It is 4 C"}
            call = ChatMessageToolCall(ChatMessageToolCallFunction(arguments, name), "1", "function")
            usage = TokenUsage(used - 1, 1)
            return ChatMessage(MessageRole.ASSISTANT, content="", tool_calls=[call], token_usage=usage)

    class Weather(smolagents.Tool):
        name, description, output_type = "weather", "The weather of a city.", "string"
        inputs: ClassVar[Any] = {"city": {"type": "string", "description": "a city"}}

        def forward(self, city: str) -> str:
            return f"{len(city)} C"

    tool = Weather()
    tool.forward = guard.step("weather")(tool.forward)
    return lambda: smolagents.ToolCallingAgent([tool], Fake(), verbosity_level=0).run("How warm is it?")


def strands_agent(guard: Guard, ledger: Ledger) -> Any:
    class Fake(strands.models.Model):
        @guard.step("model", usage=lambda parts: usage_from(parts[-1]["metadata"]))
        async def stream(self, messages: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
            used = ledger.pay()
            yield {"messageStart": {"role": "assistant"}}
            if len(messages) == 1:
                yield {"contentBlockStart": {"start": {"toolUse": {"name": "weather", "toolUseId": "1"}}}}
                yield {"contentBlockDelta": {"delta": {"toolUse": {"input": json.dumps({"city": "Oslo"})}}}}
            else:
                yield {"contentBlockStart": {"start": {}}}
                yield {"contentBlockDelta": {"delta": {"text": "It is 4 C"}}}
            yield {"contentBlockStop": {}}
            yield {"messageStop": {"stopReason": "tool_use" if len(messages) == 1 else "end_turn"}}
            usage = {"inputTokens": used - 1, "outputTokens": 1, "totalTokens": used}
            yield {"metadata": {"usage": usage, "metrics": {"latencyMs": 1}}}

        def get_config(self) -> Any:
            return {}

        def update_config(self, **_: Any) -> None:
            return None

        def structured_output(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    @strands.tool
    @guard.step("weather")
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"{len(city)} C"

    return lambda: str(
        strands.Agent(Fake(), tools=[weather], callback_handler=None)("How warm is it?")
    ).strip()


def agno_agent(guard: Guard, ledger: Ledger) -> Any:
    class Fake(agno.models.base.Model):
        @guard.step(
            "model", usage=lambda r: Usage(r.response_usage.input_tokens, r.response_usage.output_tokens)
        )
        def invoke(self, *_: Any, messages: Any = None, **__: Any) -> Any:
            used = ledger.pay()
            response = agno.models.response.ModelResponse(role="assistant", content="It is 4 C")
            response.response_usage = agno.models.base.MessageMetrics(
                input_tokens=used - 1, output_tokens=1, total_tokens=used
            )
            if not any(message.role == "tool" for message in messages or ()):
                function = {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}
                response.content = None
                response.tool_calls = [{"id": "1", "type": "function", "function": function}]
            return response

        async def ainvoke(self, *args: Any, **kwargs: Any) -> Any:
            return self.invoke(*args, **kwargs)

        def invoke_stream(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        def ainvoke_stream(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        def _parse_provider_response(self, response: Any, **_: Any) -> Any:
            return response

        def _parse_provider_response_delta(self, response: Any) -> Any:
            return response

    @guard.step("weather")
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"{len(city)} C"

    agent = agno.agent.Agent(model=Fake(id="fake"), tools=[weather], telemetry=False)
    return lambda: agent.run("How warm is it?").content


def instructed(guard: Guard, ledger: Ledger) -> Any:
    @guard.step("model", usage=usage_from)
    def create(*_: Any, **__: Any) -> ChatCompletion:
        used = ledger.pay()
        text = (
            '{"text": "It is 4 C"}' if len(ledger.tokens) % 2 == 0 else '{"txet": ""}'
        )  # Asked for once more.
        message = ChatCompletionMessage(content=text, role="assistant")
        usage = CompletionUsage(prompt_tokens=used - 1, completion_tokens=1, total_tokens=used)
        return ChatCompletion(
            id="1",
            choices=[Choice(finish_reason="stop", index=0, message=message)],
            created=0,
            model="fake",
            object="chat.completion",
            usage=usage,
        )

    asks: Any = instructor.patch(create=create, mode=instructor.Mode.JSON)
    messages = [{"role": "user", "content": "How warm is it?"}]
    return lambda: asks(response_model=Text, messages=messages, max_retries=3).text


MADE = [smol, strands_agent, agno_agent, instructed]


def steps_of(make: Any) -> list[str]:
    return ["model", "model"] if make is instructed else ["model", "weather", "model"]


@pytest.mark.parametrize("make", MADE)
def test_models_and_tools_are_steps(make: Any) -> None:
    """A request that failed is made again alone, and each token counts once."""
    guard, ledger = guard_of(), Ledger(TimeoutError("slow"))
    call = make(guard, ledger)
    with guard.run():
        assert call() == "It is 4 C"
    outcomes = [line.split()[:2] for line in lines_of(guard)]
    assert outcomes == [["model", "failure"], *([name, "success"] for name in steps_of(make))]
    assert result_of(guard).total_tokens == sum(ledger.tokens)


@pytest.mark.parametrize("make", MADE)
def test_the_budget_stops_the_program(make: Any) -> None:
    """Whatever the framework makes of the error: no further request, and the guard says why."""
    guard, ledger = guard_of(budget=ExecutionBudget(max_tokens_total=15)), Ledger()
    call = make(guard, ledger)
    error: BaseException | None = None
    try:
        with guard.run():
            call()
            call()
    except Exception as raised:
        error = raised
    assert error is None or isinstance(what_stopped(error), BudgetExceeded)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)
    assert len(ledger.tokens) == 2


@pytest.mark.parametrize("make", MADE)
def test_fifty_runs_at_once_spend_what_the_provider_has_counted(make: Any) -> None:
    """Each in its own run, to the token."""
    seen, ledgers = Seen(), [Ledger() for _ in range(50)]
    guard = guard_of(seen)

    def one(ledger: Ledger) -> Any:
        with guard.run():
            return make(guard, ledger)()

    async def main() -> Any:
        return await asyncio.gather(*(asyncio.to_thread(one, ledger) for ledger in ledgers))

    assert set(asyncio.run(main())) == {"It is 4 C"}
    assert spent(seen, guard) == (50, sum(sum(ledger.tokens) for ledger in ledgers))
