"""Agents of Google ADK in the body of a flow, unmodified: their model and their tools call steps of it."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from google.adk.agents import LlmAgent, ParallelAgent, SequentialAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import InMemoryRunner
from google.genai import types
from tests.frameworks.body_kit import Steps, run_in_a_flow


def respond(messages: list[Any]) -> Any:
    parts = [types.Part(text="done")]
    if len(messages) == 1:
        parts = [
            types.Part(function_call=types.FunctionCall(name="weather", args={"city": city}))
            for city in ("Oslo", "Rome")
        ]
    content = types.Content(role="model", parts=parts)
    return LlmResponse(content=content).model_dump(mode="json", exclude_none=True)


def agent(steps: Steps, name: str) -> LlmAgent:
    class Model(BaseLlm):
        async def generate_content_async(
            self, llm_request: LlmRequest, stream: bool = False
        ) -> AsyncGenerator[LlmResponse, None]:
            contents = [one.model_dump(mode="json", exclude_none=True) for one in llm_request.contents]
            yield LlmResponse.model_validate(await steps.ask(contents))

    return LlmAgent(name=name, model=Model(model="fake"), tools=[steps.weather])


async def answers(root: Any) -> list[str]:
    runner: Any = InMemoryRunner(root, app_name="app")
    session = await runner.session_service.create_session(app_name="app", user_id="me")
    asked = types.Content(role="user", parts=[types.Part(text="hi")])
    return [
        part.text
        async for event in runner.run_async(user_id="me", session_id=session.id, new_message=asked)
        for part in (event.content.parts if event.content else ())
        if part.text
    ]


@pytest.mark.filterwarnings("ignore:.*Agent is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["one", "sequential", "parallel"])
async def test_agents_resume(kind: str) -> None:
    """G5: Agents whose models and async tools call steps resume at every record, also side by side."""

    async def body(steps: Steps) -> Any:
        first, second = agent(steps, "first"), agent(steps, "second")
        if kind == "one":
            return await answers(first)
        around: Any = SequentialAgent if kind == "sequential" else ParallelAgent
        return await answers(around(name="both", sub_agents=[first, second]))

    response, made = await run_in_a_flow(body, respond)
    assert response == (["done"] if kind == "one" else ["done", "done"])
    assert made.count("weather") == (4 if kind == "parallel" else 2)


async def test_workflows_resume() -> None:
    """G5: So does a workflow of nodes of ADK, with agents side by side."""
    workflow = pytest.importorskip("google.adk.workflow")

    async def body(steps: Steps) -> Any:
        left, right, last = (agent(steps, name) for name in ("left", "right", "last"))
        edges = [(workflow.START, (left, right), workflow.JoinNode(name="both"), last)]
        return await answers(workflow.Workflow(name="whole", edges=edges))

    response, made = await run_in_a_flow(body, respond)
    assert response == ["done"] * 3
    assert made[:2] == ["model", "model"]


async def test_a_plain_tool_is_code_of_the_body() -> None:
    """A plain tool runs in the body: it is not recorded, and is called again on a resume."""
    calls: list[str] = []

    async def body(steps: Steps) -> Any:
        def weather(city: str) -> int:
            """The weather of a city."""
            calls.append(city)
            return len(city)

        plain = agent(steps, "first")
        return await answers(LlmAgent(name="plain", model=plain.model, tools=[weather]))

    response, made = await run_in_a_flow(body, respond)
    assert (response, made) == (["done"], ["model", "model"])
    assert len(calls) > 2
