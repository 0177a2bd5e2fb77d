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
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import Guard, UnknownNode, what_stopped
from stroma.adapters.google_adk import attach, each_run

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["run_async", "run"]
CALL = ("weather", {"city": "Oslo"})


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class Script(BaseLlm):
    """Answers: a text, or (tool name, arguments); what is an exception, it raises. A list is a stream of parts."""

    _answers: list[Any] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=10)

    @classmethod
    def of(cls, *answers: Any, tokens: int = 10) -> Script:
        made = cls(model="gemini-2.0-flash")
        made._answers, made._tokens = list(answers), tokens
        return made

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


def weather(city: str) -> dict[str, Any]:
    """The weather of a city."""
    return {"celsius": len(city)}


def agent_of(script: Script, guard: Guard | None = None, tools: Any = (weather,), **options: Any) -> Any:
    contracts = options.pop("contracts", None)
    agent = LlmAgent(name="forecaster", model=script, tools=list(tools), **options)
    return agent if guard is None else attach(agent, guard, contracts)


def ask(agent: Any, kind: str = "run_async", guard: Guard | None = None, seen: Any = None) -> str:
    """The text of the last event that has one."""
    runner = InMemoryRunner(agent, app_name="test")
    if guard is not None:
        assert each_run(each_run(runner, guard), guard) is runner
    session = asyncio.run(runner.session_service.create_session(app_name="test", user_id="u"))
    message = types.Content(role="user", parts=[types.Part(text="hello")])
    given: Any = {"user_id": "u", "session_id": session.id, "new_message": message}
    texts = [] if seen is None else seen

    def note(event: Any) -> None:
        if event.content and event.content.parts and event.content.parts[0].text:
            texts.append(event.content.parts[0].text)

    async def main() -> None:
        async for event in runner.run_async(**given):
            note(event)

    if kind == "run_async":
        asyncio.run(main())
    else:
        for event in runner.run(**given):
            note(event)
    return str(texts[-1])


def failed(agent: Any, kind: str, guard: Guard) -> BaseException:
    """What stopped an agent, whatever its runner makes of that: that of a thread tells nobody in some releases."""
    with contextlib.suppress(Exception):
        ask(agent, kind, guard)
    assert guard.stopped is not None
    return guard.stopped.exception


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda func: func, FunctionTool], ids=["function", "FunctionTool"])
def test_an_agent_gives_the_same_answer_with_and_without_the_guard(kind: str, make: Any) -> None:
    plain, guarded, guard = Script.of(CALL, "It is 4 C"), Script.of(CALL, "It is 4 C"), guard_of()
    expected = ask(agent_of(plain, tools=[weather]), kind)
    agent = agent_of(guarded, guard, [make(weather)], contracts={"weather": (City, Weather)})
    assert ask(agent, kind, guard) == expected == "It is 4 C"
    declared = [request.config.tools for request in (plain._asked[0], guarded._asked[0])]
    assert declared[0] == declared[1]
    assert lines_of(guard) == ["model success 10", "weather success", "model success 10"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 20
    assert guard.last.result.total_cost_usd > 0
    assert guard.last.result.status is RunStatus.COMPLETED


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_tool(kind: str) -> None:
    """G1."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        agent = agent_of(Script.of(CALL, "done"), guard, contracts={"weather": contract})
        found = failed(agent, kind, guard)
        assert isinstance(found, ContractViolation)
        assert (found.node_id, found.direction) == ("weather", direction)
        agent = agent_of(Script.of(CALL, "done"), guard_of(), contracts={"weather": contract})
        with pytest.raises(Exception) as caught:  # A release may wrap it.
            ask(agent, "run_async", guard)
        assert isinstance(what_stopped(caught.value), ContractViolation)


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    script = Script.of(TimeoutError("slow"), ("flaky", {}), ConnectionError("gone"), "done")
    errors: list[Exception] = [TimeoutError(), TimeoutError()]

    async def flaky() -> str:
        """Fails twice."""
        pay()
        if errors:
            raise errors.pop()
        return "fine"

    guard = guard_of()
    assert ask(agent_of(script, guard, [flaky]), kind, guard) == "done"
    assert (len(script._asked), len(errors)) == (4, 0)
    assert result_of(guard).total_tokens == 20 + 3 * PAID
    script = Script.of(PermissionError("no"), "never")
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    assert isinstance(failed(agent_of(script, guard), kind, guard), PermissionError)
    assert len(script._asked) == 1
    assert guard.stopped is not None
    assert guard.stopped.node_id == "model"


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_agent_to_the_token(kind: str) -> None:
    script = Script.of(*[CALL] * 9)
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    found = failed(agent_of(script, guard), kind, guard)
    assert isinstance(found, BudgetExceeded)
    assert (found.actual, found.limit, len(script._asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (30, RunStatus.PARTIAL)


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


@holds("hooks")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_in_order(kind: str) -> None:
    seen = Seen()
    guard = guard_of(seen)
    ask(agent_of(Script.of(TimeoutError(), CALL, "done"), guard), kind, guard)
    assert seen.lines == [
        "run start",
        "start model",
        "failure model",
        "retry model",
        "start model",
        "success model",
        "start weather",
        "success weather",
        "start model",
        "success model",
        "run end COMPLETED",
    ]


@holds("streams")
def test_a_stream_is_not_retried_after_its_first_part() -> None:
    """Rule 9."""
    guard, seen = guard_of(), []
    script = Script.of(["one", "two", TimeoutError("lost")], "again")
    with pytest.raises(TimeoutError, match="lost"):
        ask(agent_of(script, guard), "run_async", guard, seen)
    assert len(script._asked) == 1


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        agent_of(Script.of(), guard_of(), contracts={"wether": (City, Weather)})


@holds("journal")
def test_a_run_of_an_agent_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store)
        ask(agent_of(Script.of(CALL, "done"), guard), "run_async", guard)
        (record,) = store.list_runs()
        assert (record.status, record.tokens) == ("COMPLETED", 20)
        assert [a.node_id for a in store.attempts(record.run_id)] == ["model", "weather", "model"]


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
    kept, guard = Kept([TimeoutError()]), guard_of()
    agent = agent_of(
        Script.of(("kept", {}), "done"),
        guard,
        [Toolset(kept), weather],
        contracts={"kept": (Anything, Weather)},
    )
    assert ask(agent, "run_async", guard) == "done"
    assert kept.calls == 2
    assert lines_of(guard) == ["model success 10", "kept failure", "kept success", "model success 10"]

    class Strict(BaseModel):
        kelvin: int

    guard = guard_of()
    agent = agent_of(
        Script.of(("kept", {}), "done"), guard, [Toolset(Kept([]))], contracts={"kept": (Anything, Strict)}
    )
    found = failed(agent, "run_async", guard)
    assert isinstance(found, ContractViolation)
    assert (found.node_id, found.direction) == ("kept", "output")

    guard = guard_of()
    agent = agent_of(Script.of("x"), guard, [Toolset(Kept([]))], contracts={"kpet": (Anything, Weather)})
    with pytest.raises(UnknownNode, match=r"no tool 'kpet' .* 'kept'"):
        ask(agent, "run_async", guard)
