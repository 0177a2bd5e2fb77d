"""Google ADK: real agents and runners with and without the guard, with a fake model and no network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.adk.agents import LiveRequestQueue, LlmAgent, SequentialAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.models.base_llm_connection import BaseLlmConnection
from google.adk.runners import InMemoryRunner, Runner
from google.adk.sessions import InMemorySessionService
from google.adk.tools import AgentTool, FunctionTool
from google.adk.tools.base_tool import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.genai import types
from pydantic import BaseModel, PrivateAttr
from tests.frameworks.contract import CALL, City, EmitsDeltas, FrameworkContract, Weather, weather
from tests.frameworks.kit import Seen, fifty_at_once, guard_of, holds, lines_of, result_of, spent

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, RunStatus
from stroma.adapters import Guard, UnknownNode, what_stopped
from stroma.adapters.google_adk import attach, each_run

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["run_async", "run"]


class Script(BaseLlm):
    """Answers: a text, or (tool name, arguments); exceptions are raised. A list is a stream of parts."""

    _answers: list[Any] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=10)
    _cached: dict[str, int] = PrivateAttr(default_factory=dict)

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
        for name, count in self._cached.items():  # As ADK's own models set what the class does not have.
            object.__setattr__(usage, name, count)
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
    """What stopped an agent, whatever its runner makes of that: some releases lose that of a thread."""
    with contextlib.suppress(Exception):
        ask(agent, kind, guard)
    return guard.stopped.exception


@holds("sync and async")
class TestGoogleADK(EmitsDeltas, FrameworkContract):
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


@pytest.mark.parametrize(
    ("name", "cost"), [("cached_content_token_count", 0.10), ("cache_creation_input_tokens", 1.25)]
)
def test_cached_tokens_have_their_price(name: str, cost: float) -> None:
    """What a model of ADK says that it read from a cache, or wrote to it."""
    script, guard = Script.of("x", tokens=1_000_001), guard_of()
    script.model, script._cached = "claude-haiku-4-5", {name: 1_000_000}
    ask(agent_of(script, guard), "run_async", guard)
    assert result_of(guard).total_cost_usd == pytest.approx(cost + 0.000_005)


def test_a_function_tool_is_a_step_and_is_declared_as_it_was() -> None:
    """A FunctionTool like the function that it is made of."""
    plain, guarded, guard = Script.of(CALL, "It is 4 C"), Script.of(CALL, "It is 4 C"), guard_of()
    ask(agent_of(plain, tools=[FunctionTool(weather)]))
    contracts = {"weather": (City, Weather)}
    ask(agent_of(guarded, guard, [FunctionTool(weather)], contracts=contracts), guard=guard)
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
    """Those of an MCP server: tried again, judged by contracts; a contract of none of them is an error."""
    entry, guard = Kept([TimeoutError()]), guard_of()
    contracts = {"kept": (Anything, Weather)}
    agent = agent_of(Script.of(("kept", {}), "done"), guard, [Toolset(entry), weather], contracts=contracts)
    assert ask(agent, "run_async", guard) == "done"
    assert entry.calls == 2
    assert lines_of(guard) == ["model success 10", "kept failure", "kept success", "model success 10"]

    class Strict(BaseModel):
        kelvin: int

    guard = guard_of()
    contracts = {"kept": (Anything, Strict)}
    agent = agent_of(Script.of(("kept", {}), "done"), guard, [Toolset(Kept([]))], contracts=contracts)
    result = failed(agent, "run_async", guard)
    assert isinstance(result, ContractViolation)
    assert (result.node_id, result.direction) == ("kept", "output")

    guard = guard_of()
    agent = agent_of(Script.of("x"), guard, [Toolset(Kept([]))], contracts={"kpet": (Anything, Weather)})
    with pytest.raises(UnknownNode, match=r"unknown tool 'kpet'; .* 'kept'"):
        ask(agent, "run_async", guard)


class Provider(Script):
    """Calls its tools at once, then answers; writes each request into a ledger of tokens."""

    _ledger: list[int] = PrivateAttr(default_factory=list)

    @classmethod
    def with_ledger(cls, ledger: list[int]) -> Provider:
        instance = cls(model="gemini-2.0-flash")
        instance._ledger = ledger
        return instance

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        tokens = 10 + len(self._ledger) % 7
        self._ledger.append(tokens)
        await asyncio.sleep(0)
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=tokens - 1, candidates_token_count=1, total_token_count=tokens
        )
        parts = [types.Part(text="It is 4 C")]
        last = llm_request.contents[-1].parts or []
        if llm_request.tools_dict and not any(part.function_response for part in last):
            calls = [
                types.FunctionCall(
                    name=name, args={"city": "Oslo"} if name == "weather" else {"request": "x"}
                )
                for name in llm_request.tools_dict
                if name != "transfer_to_agent"
            ]
            parts = [types.Part(function_call=call) for call in calls]
        elif stream:
            yield LlmResponse(content=_content(types.Part(text="It is")), partial=True)
        yield LlmResponse(content=types.Content(role="model", parts=parts), usage_metadata=usage)


def team(ledger: list[int]) -> Any:
    """Return agents in a row: one calls a function and two agents at once, one has the class's model."""
    experts = [
        LlmAgent(name=name, description=name, model=Provider.with_ledger(ledger))
        for name in ("north", "south")
    ]
    toolbox = [weather, *(AgentTool(expert) for expert in experts)]
    first = LlmAgent(name="first", model=Provider.with_ledger(ledger), tools=toolbox)
    return SequentialAgent(name="team", sub_agents=[first, LlmAgent(name="second")])


@pytest.fixture
def default_model(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ledger of the model that agents without one have."""
    ledger: list[int] = []
    monkeypatch.setattr(LlmAgent, "_default_model", Provider.with_ledger(ledger))
    return ledger


def test_fifty_teams_at_once_spend_what_the_provider_has_counted(default_model: list[int]) -> None:
    """All spend is counted, to the token: tools, agents as tools, streams, and the class's default model."""
    plain, plain_default = list[int](), default_model
    expected = ask(team(plain))
    plain += plain_default
    plain_default.clear()
    ledger, seen = list[int](), Seen()
    guard = guard_of(seen)
    runner = each_run(InMemoryRunner(attach(team(ledger), guard), app_name="test"), guard)
    message = types.Content(role="user", parts=[types.Part(text="hello")])
    texts: list[str] = []

    async def one() -> None:
        session = await runner.session_service.create_session(app_name="test", user_id="u")
        last = None
        async for event in runner.run_async(
            user_id="u",
            session_id=session.id,
            new_message=message,
            run_config=RunConfig(streaming_mode=StreamingMode.SSE),
        ):
            last = event
        texts.append(last.content.parts[0].text)

    fifty_at_once(lambda _: one())
    ledger += default_model
    assert texts == [expected] * 50
    assert (len(ledger), spent(seen, guard)) == (50 * len(plain), (50, sum(ledger)))
    assert {len(result.trace) for result in seen.results} == {6}


def test_the_class_s_model_is_guarded_for_the_agent_alone(default_model: list[int]) -> None:
    """Another agent with the same default is none of the guard's."""
    guard = guard_of()
    agent = attach(LlmAgent(name="one"), guard)
    ask(LlmAgent(name="other"))
    assert guard.last is None
    assert ask(agent, guard=guard) == "It is 4 C"
    assert lines_of(guard) == ["model success 11"]
    assert attach(LlmAgent(name="third"), guard_of()).model is not agent.model


def test_a_copy_of_a_model_is_guarded_and_calls_itself() -> None:
    """Copies rebind: a model's copy answers for itself, as a step of the same guard."""
    guard = guard_of()
    script = Script.of("one")
    attach(agent_of(script), guard)
    copied = script.model_copy(update={"model": "gemini-2.5-pro"})
    copied._answers = ["two"]
    assert ask(LlmAgent(name="other", model=copied), guard=guard) == "two"
    assert lines_of(guard) == ["model success 10"]
    assert script._answers == ["one"]


def test_what_is_added_later_is_guarded() -> None:
    """A tool and a sub-agent that come after attach() are steps of the next run."""
    guard = guard_of()
    agent = agent_of(Script.of(CALL, "done"), guard, ())
    agent.tools.append(weather)
    assert ask(agent, guard=guard) == "done"
    assert lines_of(guard) == ["model success 10", "weather success", "model success 10"]


class Connection(BaseLlmConnection):
    """A live connection: it answers what it is sent, and bills each answer."""

    def __init__(self, answers: list[Any], billed: list[int]) -> None:
        self.answers, self.billed = answers, billed
        self.sent = asyncio.Queue[None]()

    async def send_history(self, history: list[types.Content]) -> None:
        self.sent.put_nowait(None)

    async def send_content(self, content: types.Content) -> None:
        self.sent.put_nowait(None)

    async def send_realtime(self, blob: Any) -> None:
        raise NotImplementedError

    async def receive(self) -> AsyncGenerator[LlmResponse, None]:
        await self.sent.get()
        answer = self.answers.pop(0)
        self.billed.append(10 + len(self.billed))
        # Older releases name the tokens of an answer otherwise: the total alone has them.
        counted = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=self.billed[-1] - 1, total_token_count=self.billed[-1]
        )
        yield LlmResponse(usage_metadata=counted)
        if isinstance(answer, tuple):
            call = types.FunctionCall(name=answer[0], args=answer[1], id=f"c{len(self.billed)}")
            yield LlmResponse(content=_content(types.Part(function_call=call)))
        else:
            yield LlmResponse(content=_content(types.Part(text=answer)))
            yield LlmResponse(turn_complete=True)

    async def close(self) -> None:
        pass


class Live(Script):
    """A model with a live mode."""

    _billed: list[int] = PrivateAttr(default_factory=list)

    @contextlib.asynccontextmanager
    async def connect(self, llm_request: LlmRequest) -> AsyncIterator[Connection]:
        yield Connection(self._answers, self._billed)


async def talk(agent: Any, guard: Guard | None = None, turns: int = 1) -> list[str]:
    """Say something in the live mode, and return the texts of the agent until it has ended as many turns."""
    runner = InMemoryRunner(agent, app_name="test")
    if guard is not None:
        each_run(runner, guard)
    session = await runner.session_service.create_session(app_name="test", user_id="u")
    queue, texts = LiveRequestQueue(), list[str]()
    for _ in range(turns):
        queue.send_content(types.Content(role="user", parts=[types.Part(text="hello")]))
    live = runner.run_live(user_id="u", session_id=session.id, live_request_queue=queue)
    async with contextlib.aclosing(live) as events:
        async for event in events:
            texts += [part.text for part in (event.content and event.content.parts) or () if part.text]
            turns -= bool(event.turn_complete)
            if not turns:
                queue.close()
                break
    return texts


def test_a_live_session_is_a_run() -> None:
    """Its tools are steps, and the tokens of its model those of the provider's bill."""
    guard, model = guard_of(), Live.of(CALL, "4 C")
    plain = asyncio.run(talk(agent_of(Live.of(CALL, "4 C"))))
    assert "4 C" in plain
    assert asyncio.run(talk(agent_of(model, guard, contracts={"weather": (City, Weather)}), guard)) == plain
    assert (len(model._billed), result_of(guard).total_tokens) == (2, sum(model._billed))
    assert lines_of(guard) == ["weather success"]


def test_a_spent_budget_ends_a_live_session() -> None:
    """No answer is asked for after the one that has spent it."""
    guard, model = guard_of(budget=ExecutionBudget(max_tokens_total=15)), Live.of(*["more"] * 9)
    with pytest.raises(Exception) as caught:
        asyncio.run(talk(agent_of(model, guard), guard, 9))
    error = what_stopped(caught.value)
    assert isinstance(error, BudgetExceeded)
    assert (error.actual, model._billed) == (21, [10, 11])
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@holds("control flow")
def test_a_confirmed_run_goes_on_under_its_run_id(tmp_path: Path) -> None:
    """ADK's own response continues the run."""
    calls: list[str] = []

    def book(city: str) -> str:
        """Book a trip."""
        calls.append(city)
        return city

    service = InMemorySessionService()

    async def turn(message: Any) -> list[Any]:
        events = runner.run_async(user_id="u", session_id="s", new_message=message)
        return [event async for event in events]

    async def main() -> None:
        await service.create_session(app_name="test", user_id="u", session_id="s")
        events = await turn(types.Content(role="user", parts=[types.Part(text="hello")]))
        assert (result_of(guard).status, calls) == (RunStatus.SUSPENDED, [])
        assert result_of(guard).suspended == ["approval of book"]
        (call,) = [call for event in events for call in event.get_function_calls() if call.name != "book"]
        confirmed = types.FunctionResponse(id=call.id, name=call.name, response={"confirmed": True})
        await turn(types.Content(role="user", parts=[types.Part(function_response=confirmed)]))
        assert calls == ["Oslo"]
        assert result_of(guard).status is RunStatus.RESUMED

    script = Script.of(("book", {"city": "Oslo"}), *["done"] * 3)
    guard = guard_of(store=str(tmp_path / "r.db"), run_id="r", resume=True)
    agent = agent_of(script, guard, [FunctionTool(book, require_confirmation=True)])
    runner = each_run(Runner(app_name="test", agent=agent, session_service=service), guard)
    asyncio.run(main())
