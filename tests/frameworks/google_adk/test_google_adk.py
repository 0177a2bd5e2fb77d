"""Google ADK: real agents and runners with and without the guard, with a fake model and no network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import InMemoryRunner
from google.adk.tools import AgentTool, FunctionTool
from google.adk.tools.base_tool import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.genai import types
from pydantic import BaseModel, PrivateAttr
from tests.frameworks.contract import CALL, City, FrameworkContract, Weather, weather
from tests.frameworks.kit import guard_of, holds, lines_of

from stroma import ContractViolation
from stroma.adapters import Guard, UnknownNode
from stroma.adapters.google_adk import attach, each_run

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["run_async", "run"]


class Script(BaseLlm):
    """Answers: a text, or (tool name, arguments); what is an exception, it raises. A list is a stream of parts."""

    _answers: list[Any] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=10)

    @classmethod
    def of(cls, *answers: Any, tokens: int = 10) -> Script:
        instance = cls(model="gemini-2.0-flash")
        instance._answers, instance._tokens = list(answers), tokens
        return instance

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        self._asked.append(llm_request)
        answer = self._answers.pop(0)
        for part in answer if isinstance(answer, list) else [answer]:
            if isinstance(part, Exception):
                raise part
            if part is not answer:
                yield LlmResponse(content=_content(types.Part(text=part)), partial=True)
        whole = " ".join(answer) if isinstance(answer, list) else answer
        if isinstance(whole, tuple):
            call = types.Part(function_call=types.FunctionCall(name=whole[0], args=whole[1]))
            content = _content(call)
        else:
            content = _content(types.Part(text=whole))
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=self._tokens - 1, candidates_token_count=1, total_token_count=self._tokens
        )
        yield LlmResponse(content=content, usage_metadata=usage)


def _content(part: types.Part) -> types.Content:
    return types.Content(role="model", parts=[part])


def agent_of(script: Script, guard: Guard | None = None, tools: Any = (weather,), **options: Any) -> Any:
    contracts = options.pop("contracts", None)
    agent = LlmAgent(name="forecaster", model=script, tools=list(tools), **options)
    return agent if guard is None else attach(agent, guard, contracts)


def ask(agent: Any, kind: str = "run_async", guard: Guard | None = None, seen: Any = None) -> str:
    """Return the text of the last event that has one; ``seen`` gets those of the parts of a stream."""
    runner = InMemoryRunner(agent, app_name="test")
    if guard is not None:
        assert each_run(each_run(runner, guard), guard) is runner
    session = asyncio.run(runner.session_service.create_session(app_name="test", user_id="u"))
    message = types.Content(role="user", parts=[types.Part(text="hello")])
    inputs: Any = {"user_id": "u", "session_id": session.id, "new_message": message}
    texts: list[str] = []

    def note(event: Any) -> None:
        if event.content and event.content.parts and event.content.parts[0].text:
            texts.append(event.content.parts[0].text)
            if seen is not None and event.partial:
                seen.append(texts[-1])

    async def main() -> None:
        async for event in runner.run_async(**inputs):
            note(event)

    if kind == "run_async":
        asyncio.run(main())
    else:
        for event in runner.run(**inputs):
            note(event)
    return str(texts[-1])


def failed(agent: Any, kind: str, guard: Guard) -> BaseException:
    """What stopped an agent, whatever its runner makes of that: that of a thread tells nobody in some releases."""
    with contextlib.suppress(Exception):
        ask(agent, kind, guard)
    assert guard.stopped is not None
    return guard.stopped.exception


@holds("sync and async")
class TestGoogleADK(FrameworkContract):
    KINDS = KINDS
    STEPS = ("model success 10", "weather success", "model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        if break_after is None:
            return Script.of(*answers)
        first, *more = answers
        return Script.of([*first.split()[:break_after], TimeoutError("lost")], *more)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, guard, [tool], contracts=contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind, guard)

    def stopped(self, program: Any, kind: str, guard: Guard) -> BaseException:
        return failed(program, kind, guard) if kind == "run" else super().stopped(program, kind, guard)

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        script._answers = [each.split() if isinstance(each, str) else each for each in script._answers]
        ask(agent_of(script, guard), "run_async", guard, seen)

    def requests(self, script: Script) -> list[Any]:
        return [request.config.tools for request in script._asked]


def test_a_function_tool_is_a_step_and_is_declared_as_it_was() -> None:
    """A FunctionTool like the function that it is made of."""
    plain, guarded, guard = Script.of(CALL, "It is 4 C"), Script.of(CALL, "It is 4 C"), guard_of()
    ask(agent_of(plain, tools=[FunctionTool(weather)]))
    ask(
        agent_of(guarded, guard, [FunctionTool(weather)], contracts={"weather": (City, Weather)}), guard=guard
    )
    assert guarded._asked[0].config.tools == plain._asked[0].config.tools
    assert lines_of(guard) == ["model success 10", "weather success", "model success 10"]


@holds("control flow")
def test_sub_agents_and_agents_in_tools_are_guarded() -> None:
    """A transfer and an agent tool: their models are steps of the same run."""
    guard = guard_of()
    other = LlmAgent(name="other", description="other", model=Script.of("from other", tokens=7))
    transfer = ("transfer_to_agent", {"agent_name": "other"})
    assert (
        ask(agent_of(Script.of(transfer), guard, (), sub_agents=[other]), "run_async", guard) == "from other"
    )
    assert lines_of(guard) == ["model success 10", "model success 7"]
    inner = LlmAgent(name="inner", description="inner", model=Script.of("deep", tokens=5))
    script = Script.of(("inner", {"request": "x"}), "done")
    assert ask(agent_of(script, guard, [AgentTool(inner)]), "run_async", guard) == "done"
    assert lines_of(guard) == ["model success 10", "model success 5", "model success 10"]


class Kept(BaseTool):
    """A tool that is no function, as those of MCP servers are."""

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__(name="kept", description="Looks it up.")
        self.errors, self.calls = errors, 0

    def _get_declaration(self) -> Any:
        return types.FunctionDeclaration(name="kept", description="Looks it up.")

    async def run_async(self, *, args: dict[str, Any], tool_context: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop()
        return {"celsius": 4}


class Toolset(BaseToolset):
    def __init__(self, *tools: Any) -> None:
        super().__init__()
        self.tools = list(tools)

    async def get_tools(self, readonly_context: Any = None) -> list[Any]:
        return self.tools

    async def close(self) -> None:
        return None


class Anything(BaseModel):
    pass


def test_tools_of_toolsets_are_steps() -> None:
    """Those of an MCP server, say: tried again, judged by their contracts, and a contract of none of them is an error."""
    entry, guard = Kept([TimeoutError()]), guard_of()
    agent = agent_of(
        Script.of(("kept", {}), "done"),
        guard,
        [Toolset(entry), weather],
        contracts={"kept": (Anything, Weather)},
    )
    assert ask(agent, "run_async", guard) == "done"
    assert entry.calls == 2
    assert lines_of(guard) == ["model success 10", "kept failure", "kept success", "model success 10"]

    class Strict(BaseModel):
        kelvin: int

    guard = guard_of()
    agent = agent_of(
        Script.of(("kept", {}), "done"), guard, [Toolset(Kept([]))], contracts={"kept": (Anything, Strict)}
    )
    result = failed(agent, "run_async", guard)
    assert isinstance(result, ContractViolation)
    assert (result.node_id, result.direction) == ("kept", "output")

    guard = guard_of()
    agent = agent_of(Script.of("x"), guard, [Toolset(Kept([]))], contracts={"kpet": (Anything, Weather)})
    with pytest.raises(UnknownNode, match=r"unknown tool 'kpet'; .* 'kept'"):
        ask(agent, "run_async", guard)
