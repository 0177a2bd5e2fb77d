"""An agent whose client fails once and whose tool breaks its contract: retried, and stopped, with the right bill.

    python examples/adapter_agent_framework.py

Needs `pip install "stroma-runner[agent-framework]"`, and neither a key nor a network. Prints:

> Contract violation for 'weather' (output): celsius: Input should be less than or equal to 60
> model failure, model success, weather failure
> 40 tokens
"""

import asyncio
from typing import Any

from agent_framework import (
    Agent,
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    Content,
    FunctionInvocationLayer,
    Message,
    tool,
)
from pydantic import BaseModel, Field

from stroma import ContractViolation, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.agent_framework import stroma_middleware


class City(BaseModel):
    city: str


class Plausible(BaseModel):
    celsius: int = Field(ge=-90, le=60)


@tool(approval_mode="never_require")
def weather(city: str) -> dict[str, int]:
    """The weather of a city."""
    return {"celsius": 300}


answers: list[Any] = [
    ConnectionError("gone"),
    Content.from_function_call("1", "weather", arguments='{"city": "Oslo"}'),
]


class FakeClient(FunctionInvocationLayer, ChatMiddlewareLayer, BaseChatClient):  # type: ignore[misc]
    async def _inner_get_response(self, *, messages: Any, stream: bool, options: Any, **kwargs: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        used: Any = {"input_token_count": 30, "output_token_count": 10}
        return ChatResponse(messages=[Message("assistant", [answer])], response_id="1", usage_details=used)


guard = Guard(StromaRunner.quick())
agent = Agent(
    FakeClient(), tools=[weather], middleware=stroma_middleware(guard, {"weather": (City, Plausible)})
)
try:
    asyncio.run(agent.run("How warm is it?"))
except ContractViolation as error:
    print(">", error)
assert guard.last is not None
inside = list(guard.last.ctx.trace.walk())[1:]  # Behind the agent's own step.
print(">", ", ".join(f"{event.node_id} {event.outcome}" for event in inside))
print(f"> {guard.last.ctx.cost_tracker.total_tokens} tokens")
