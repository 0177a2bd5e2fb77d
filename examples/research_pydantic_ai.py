"""A durable research agent of Pydantic AI: two sub-agents in parallel, an approval, one effect, and live text.

    python examples/research_pydantic_ai.py

Needs `pip install "stroma-runner[pydantic-ai]"`, and neither a key nor a network: its models are functions.
`research_run.py` says how workers and a page run it. Prints:

> lead.model
> reader.model
> reader.model
> reader.search
> reader.search
> reader.model
> reader.model
> lead.model
> approval of publish_report({"text":"14 pages on the food of otters, 15 pages on the homes of otters"}): yes
> lead.publish_report
> lead.model It is |published as number 1|
> It is published as number 1; the web has ['14 pages on the food of otters, 15 pages on the homes of otters']
"""

import json
from collections.abc import AsyncIterator

from pydantic_ai import Agent
from pydantic_ai.messages import (
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from research_run import Question, Report, main, publish, was_published

from stroma import Flow, current_node, stroma_flow
from stroma.adapters.pydantic_ai import StromaDurability, ToolApproval

Answer = AsyncIterator[str | DeltaToolCalls]


def call(number: int, tool: str, **arguments: str) -> DeltaToolCalls:
    return {number: DeltaToolCall(tool, json.dumps(arguments), tool_call_id=f"{tool}-{number}")}


def prompt_of(messages: list[ModelMessage]) -> str:
    return next(str(part.content) for part in messages[0].parts if isinstance(part, UserPromptPart))


def results(messages: list[ModelMessage]) -> list[str]:
    parts = [part for message in messages for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, ToolReturnPart)]


async def lead_model(messages: list[ModelMessage], info: AgentInfo) -> Answer:
    topic, known = prompt_of(messages), results(messages)
    if not known:
        yield call(0, "look_into", aspect=f"food of {topic}")
        yield call(1, "look_into", aspect=f"homes of {topic}")
    elif len(known) == 2:
        yield call(0, "publish_report", text=", ".join(known))
    else:
        yield "It is "
        yield known[-1]


def reader_model(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    found = results(messages)
    search = ToolCallPart("search", {"query": prompt_of(messages)})
    return ModelResponse(parts=[TextPart(found[0]) if found else search])


reader = Agent(FunctionModel(reader_model), name="reader", capabilities=[StromaDurability()])
streamed = StromaDurability(stream=True)
lead = Agent(FunctionModel(stream_function=lead_model), name="lead", capabilities=[streamed])


@reader.tool_plain
async def search(query: str) -> str:
    return f"{len(query)} pages on the {query}"


@lead.tool_plain(metadata={"stroma": False})  # Its requests and tools are steps.
async def look_into(aspect: str) -> str:
    return (await reader.run(aspect)).output


@lead.tool_plain(requires_approval=True, metadata={"stroma": {"effect": True, "reconcile": was_published}})
async def publish_report(text: str) -> str:
    return publish(text, current_node().idempotency_key)


@stroma_flow("research", input=Question, output=Report)
async def research(flow: Flow, question: Question) -> Report:
    return Report(text=(await lead.run(question.topic)).output)


if __name__ == "__main__":
    main(research, ToolApproval(approved=True))
