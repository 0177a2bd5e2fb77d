"""Agents of Agent Framework in the body of a flow, unmodified: client and tools call steps of it."""

import json
from importlib.metadata import version
from typing import Any

import pytest
from agent_framework import (
    Agent,
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    Content,
    FunctionInvocationLayer,
    Message,
    WorkflowBuilder,
    WorkflowContext,
    executor,
    tool,
)
from tests.frameworks.body_kit import Steps, run_in_a_flow


def respond(messages: list[Any]) -> Any:
    contents = [Content.from_text("done")]
    if messages[-1]["role"] == "user":
        contents = [
            Content.from_function_call(city, "weather", arguments=json.dumps({"city": city}))
            for city in ("Oslo", "Rome")
        ]
    return ChatResponse(messages=[Message("assistant", contents)], response_id="1").to_dict()


def agent(steps: Steps, **options: Any) -> Agent:
    class Client(FunctionInvocationLayer, ChatMiddlewareLayer, BaseChatClient):
        async def _inner_get_response(
            self, *, messages: Any, stream: bool, options: Any, **kwargs: Any
        ) -> Any:
            plain = [message.to_dict() for message in messages]
            for message in plain:
                for content in message["contents"]:
                    content.pop("id", None)  # It is new in each process.
            return ChatResponse.from_dict(await steps.ask(plain))

    @tool(**{"approval_mode": "never_require", **options})
    async def weather(city: str) -> int:
        """The weather of a city."""
        return await steps.weather(city)

    return Agent(Client(), tools=[weather], name="a")


async def test_an_agent_with_a_session_resumes() -> None:
    """G5: An agent whose client and async tools call steps resumes at every record, with a session."""

    async def body(steps: Steps) -> Any:
        asked = agent(steps)
        session = asked.create_session()
        return [(await asked.run(text, session=session)).text for text in ("hi", "again")]

    response, made = await run_in_a_flow(body, respond)
    assert response == ["done", "done"]
    assert made == 2 * ["model", "weather", "weather", "model"]


async def test_a_workflow_resumes() -> None:
    """G5: So does a workflow whose executors ask an agent."""

    async def body(steps: Steps) -> Any:
        @executor(id="upper")
        async def upper(text: str, ctx: WorkflowContext[str]) -> None:
            await ctx.send_message(text.upper())

        @executor(id="ask")
        async def ask(text: str, ctx: WorkflowContext[str, str]) -> None:
            await ctx.yield_output(text + (await agent(steps).run(text)).text)

        workflow = WorkflowBuilder(start_executor=upper).add_edge(upper, ask).build()
        return (await workflow.run("hi")).get_outputs()

    assert (await run_in_a_flow(body, respond))[0] == ["HIdone"]


async def test_an_approval_is_answered_in_the_body() -> None:
    """G5: A tool that needs approval returns to the body, which may ask and continue with the answer."""

    async def body(steps: Steps) -> Any:
        asked = agent(steps, approval_mode="always_require")
        session = asked.create_session()
        response = await asked.run("hi", session=session)
        requests = response.user_input_requests
        answers = [request.to_function_approval_response(True) for request in requests]
        return [len(requests), (await asked.run(Message("user", answers), session=session)).text]

    response, made = await run_in_a_flow(body, respond)
    assert response == [2, "done"]
    assert made == ["model", "weather", "weather", "model"]


@pytest.mark.skipif(
    version("agent-framework-core").startswith("1.0."), reason="it runs plain tools on the event loop"
)
async def test_a_plain_tool_is_refused_and_the_model_gets_the_error() -> None:
    """A plain tool would run in a thread: the body refuses it; the framework hands the error to the model."""

    async def body(steps: Steps) -> Any:
        @tool(approval_mode="never_require")
        def weather(city: str) -> int:
            """The weather of a city."""
            return 3

        client = agent(steps).client
        response = await Agent(client, tools=[weather], name="a").run("hi")
        results = [content for message in response.messages for content in message.contents]
        return [one.exception is not None for one in results if one.type == "function_result"]

    assert (await run_in_a_flow(body, respond))[0] == [True, True]
