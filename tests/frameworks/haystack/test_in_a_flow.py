"""Pipelines and agents of Haystack in the body of a flow: generators and async tools call steps."""

from typing import Any

import haystack
import pytest
from haystack import component
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.tools import Tool
from tests.frameworks.body_kit import Steps, ended_in_a_flow, run_in_a_flow

AsyncPipeline: Any = getattr(haystack, "AsyncPipeline", haystack.Pipeline)


def respond(messages: list[Any]) -> Any:
    message = ChatMessage.from_assistant("done")
    if "weather" in str(messages) and len(messages) == 1:
        calls = [
            ToolCall(tool_name="weather", arguments={"city": city}, id=city) for city in ("Oslo", "Rome")
        ]
        message = ChatMessage.from_assistant(tool_calls=calls)
    return message.to_dict()


@component
class Generator:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools: Any = None) -> Any:
        raise AssertionError("it is awaited")

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage], tools: Any = None) -> Any:
        response = await self.steps.ask([message.to_dict() for message in messages])
        return {"replies": [ChatMessage.from_dict(response)]}


@component
class Ask:
    @component.output_types(messages=list[ChatMessage])
    def run(self, text: str) -> Any:
        return {"messages": [ChatMessage.from_user(text)]}

    @component.output_types(messages=list[ChatMessage])
    async def run_async(self, text: str) -> Any:
        return self.run(text)


@component
class PlainAsk:
    @component.output_types(messages=list[ChatMessage])
    def run(self, text: str) -> Any:
        return {"messages": [ChatMessage.from_user(text)]}


def pipeline(steps: Steps, ask: Any) -> Any:
    whole = AsyncPipeline()
    whole.add_component("ask", ask)
    for name in ("left", "right"):
        whole.add_component(name, Generator(steps))
        whole.connect("ask.messages", f"{name}.messages")
    return whole


async def test_a_pipeline_resumes() -> None:
    """G5: A pipeline of ``run_async`` components resumes at every record, with generators side by side."""

    async def body(steps: Steps) -> Any:
        result = await pipeline(steps, Ask()).run_async({"ask": {"text": "hi"}})
        return [result[name]["replies"][0].text for name in ("left", "right")]

    response, made = await run_in_a_flow(body, respond)
    assert (response, made) == (["done", "done"], ["model", "model"])


@pytest.mark.skipif(not hasattr(Tool, "invoke_async"), reason="async tools are of newer releases")
async def test_an_agent_resumes() -> None:
    """G5: So does an agent whose tools are async functions."""

    async def body(steps: Steps) -> Any:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        options: Any = {"function": None, "async_function": steps.weather}
        weather = Tool(name="weather", description="w", parameters=schema, **options)
        agent = Agent(chat_generator=Generator(steps), tools=[weather])
        return (await agent.run_async([ChatMessage.from_user("weather?")]))["messages"][-1].text

    response, made = await run_in_a_flow(body, respond)
    assert (response, made) == ("done", ["model", "weather", "weather", "model"])


async def test_a_plain_component_is_refused() -> None:
    """A component without ``run_async`` would run in a thread: the body refuses it."""

    async def body(steps: Steps) -> Any:
        return await pipeline(steps, PlainAsk()).run_async({"ask": {"text": "hi"}})

    assert "the body of a flow waits for its steps" in await ended_in_a_flow(body)
