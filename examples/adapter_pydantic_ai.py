"""An agent whose provider fails once and whose first answer breaks a contract: both are mended, and both are paid for.

    python examples/adapter_pydantic_ai.py

Needs `pip install "stroma-runner[pydantic-ai]"`, and neither a key nor a network. Prints:

> 4 degrees
> model: failure, success, success
> 80 tokens
"""

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage

from stroma import StromaRunner
from stroma.adapters import Guard
from stroma.adapters.pydantic_ai import StromaCapability


class Weather(BaseModel):
    celsius: int


class Plausible(BaseModel):
    celsius: int = Field(ge=-90, le=60)


answers = [-300, 4]
calls = 0


def provider(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    global calls
    calls += 1
    if calls == 1:
        raise ConnectionError("gone")
    answer = ToolCallPart("final_result", {"celsius": answers.pop(0)})
    return ModelResponse(parts=[answer], usage=RequestUsage(input_tokens=30, output_tokens=10))


guard = Guard(StromaRunner.quick())
agent = Agent(
    FunctionModel(provider), output_type=Weather, capabilities=[StromaCapability(guard, output=Plausible)]
)
print(f"> {agent.run_sync('How warm is it?').output.celsius} degrees")

assert guard.last is not None
result = guard.last.result
print("> model:", ", ".join(event.outcome for event in result.trace.walk() if event.node_id == "model"))
print(f"> {result.total_tokens} tokens")
