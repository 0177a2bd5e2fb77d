"""Durable research agents of the OpenAI Agents SDK: two sub-agents in parallel, an approval, one effect, live text.

    python examples/research_openai_agents.py

Needs `pip install "stroma-runner[openai-agents]"`, and neither a key nor a network: its models are fakes.
`research_run.py` says how workers and a page run it. Prints:

> lead.model
> reader.model
> reader.model
> reader.search
> reader.search
> reader.model
> reader.model
> lead.model
> approval of publish_report({"text": "14 pages on the food of otters, 15 pages on the homes of otters"}): yes
> lead.publish_report
> lead.model It |is |published |as |number |1|
> It is published as number 1; the web has ['14 pages on the food of otters, 15 pages on the homes of otters']
"""

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from agents import Agent, Model, ModelResponse, Usage, function_tool, set_tracing_disabled
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
)
from research_run import Question, Report, main, publish, was_published

from stroma import Flow, current_node, stroma_flow
from stroma.adapters.openai_agents import DurableRunner, ToolApproval

set_tracing_disabled(True)
#: Text, or calls of tools: names and arguments.
Answer = str | list[tuple[str, dict[str, str]]]


class FakeModel(Model):
    """Answers what a function makes of the prompt and of what tools have returned."""

    model = "gpt-4.1"

    def __init__(self, respond: Callable[[str, list[str]], Answer]) -> None:
        self.respond = respond

    def output(self, input: Any) -> list[Any]:
        items = [{"content": input}] if isinstance(input, str) else input
        results = [item["output"] for item in items if item.get("type") == "function_call_output"]
        answer = self.respond(items[0]["content"], results)
        if isinstance(answer, str):
            part = ResponseOutputText(text=answer, type="output_text", annotations=[])
            return [
                ResponseOutputMessage(
                    id="m", content=[part], role="assistant", status="completed", type="message"
                )
            ]
        return [
            ResponseFunctionToolCall(
                name=name, arguments=json.dumps(arguments), call_id=f"{name}-{n}", type="function_call"
            )
            for n, (name, arguments) in enumerate(answer)
        ]

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        return ModelResponse(output=self.output(input), usage=Usage(), response_id=None)

    async def stream_response(
        self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        output = self.output(input)
        parts = output[0].content if isinstance(output[0], ResponseOutputMessage) else []
        text = "".join(part.text for part in parts if isinstance(part, ResponseOutputText))
        for word in re.findall(r"\S+\s*", text):
            yield ResponseTextDeltaEvent.model_construct(
                type="response.output_text.delta", delta=word, item_id="m", output_index=0, content_index=0
            )
        response = OpenAIResponse.model_construct(id="r", output=output, usage=None)
        yield ResponseCompletedEvent(response=response, sequence_number=9, type="response.completed")


def lead_answers(topic: str, known: list[str]) -> Answer:
    if not known:
        return [("look_into", {"input": f"{what} of {topic}"}) for what in ("food", "homes")]
    if len(known) == 2:
        return [("publish_report", {"text": ", ".join(known)})]
    return f"It is {known[-1]}"


def reader_answers(aspect: str, found: list[str]) -> Answer:
    return found[0] if found else [("search", {"query": aspect})]


@function_tool
async def search(query: str) -> str:
    return f"{len(query)} pages on the {query}"


@function_tool(needs_approval=True)
async def publish_report(text: str) -> str:
    return publish(text, current_node().idempotency_key)


reader: Agent[None] = Agent(name="reader", model=FakeModel(reader_answers), tools=[search])
look_into = reader.as_tool("look_into", "Look into an aspect.")
lead: Agent[None] = Agent(name="lead", model=FakeModel(lead_answers), tools=[look_into, publish_report])
agents = DurableRunner(tools={"publish_report": {"effect": True, "reconcile": was_published}})


@stroma_flow("research", input=Question, output=Report)
async def research(flow: Flow, question: Question) -> Report:
    result = agents.run_streamed(lead, question.topic)
    async for _ in result.stream_events():
        pass
    return Report(text=result.final_output)


if __name__ == "__main__":
    main(research, ToolApproval(approved=True))
