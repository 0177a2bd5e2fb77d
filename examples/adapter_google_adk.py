"""Two agents under one budget: the limit holds whichever of them is asked.

    python examples/adapter_google_adk.py

Needs `pip install "stroma-runner[google-adk]"`, and neither a key nor a network. Prints:

> stopped at 120 of 100 tokens
> 3 model calls
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from google.adk.agents import LlmAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import InMemoryRunner
from google.genai import types

from stroma import BudgetExceeded, ExecutionBudget, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.google_adk import attach, each_run


class FakeModel(BaseLlm):
    """Hands everything to the other agent, for ever."""

    other: str

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        call = types.FunctionCall(name="transfer_to_agent", args={"agent_name": self.other})
        used = types.GenerateContentResponseUsageMetadata(prompt_token_count=30, candidates_token_count=10)
        content = types.Content(role="model", parts=[types.Part(function_call=call)])
        yield LlmResponse(content=content, usage_metadata=used)


guard = Guard(StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=100)))
pong = LlmAgent(name="pong", description="pong", model=FakeModel(model="fake", other="ping"))
ping = LlmAgent(name="ping", model=FakeModel(model="fake", other="pong"), sub_agents=[pong])
runner: Any = each_run(InMemoryRunner(attach(ping, guard), app_name="app"), guard)


async def main() -> None:
    session = await runner.session_service.create_session(app_name="app", user_id="me")
    asked = types.Content(role="user", parts=[types.Part(text="play")])
    async for _ in runner.run_async(user_id="me", session_id=session.id, new_message=asked):
        pass


try:
    asyncio.run(main())
except BudgetExceeded as error:
    print(f"> stopped at {error.actual:.0f} of {error.limit:.0f} tokens")
assert guard.last is not None
print(f"> {sum(event.node_id == 'model' for event in guard.last.ctx.trace.walk())} model calls")
