"""Microsoft Agent Framework: real agents with and without the guard, with a fake client and no network."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from agent_framework import (
    Agent,
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    FunctionInvocationLayer,
    FunctionMiddleware,
    Message,
    MiddlewareTermination,
    ResponseStream,
    tool,
)
from tests.frameworks.contract import ANSWER, CALL, City, EmitsDeltas, FrameworkContract, Strict, weather
from tests.frameworks.kit import Seen, changed_until_detached, guard_of, holds, lines_of, result_of, spent

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, RunStatus, SQLiteStore
from stroma.adapters import Guard
from stroma.adapters.agent_framework import stroma_middleware

KINDS = ["run", "stream"]


class Script(FunctionInvocationLayer, ChatMiddlewareLayer, BaseChatClient):
    """Answers: a text, or (tool name, JSON arguments); what is an exception, it raises."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        super().__init__()
        self.answers, self.tokens, self.break_after = list(answers), tokens, break_after
        self.asked: list[Any] = []
        self.usage: Any = {"input_token_count": self.tokens - 1, "output_token_count": 1}

    def _next(self, messages: Any) -> Any:
        self.asked.append(list(messages))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return Content.from_function_call(f"call{len(self.asked)}", answer[0], arguments=_json(answer[1]))
        return Content.from_text(answer)

    def _inner_get_response(self, *, messages: Any, stream: bool, options: Any, **_: Any) -> Any:
        usage = self.usage

        async def whole() -> Any:
            message = Message("assistant", [self._next(messages)])
            return ChatResponse(messages=[message], response_id="1", model="gpt-4o", usage_details=usage)

        async def parts() -> Any:
            content = self._next(messages)
            words = content.text.split() if content.type == "text" else [None]
            for n, word in enumerate(words):
                if n == self.break_after:
                    raise TimeoutError("lost")
                part = content if word is None else Content.from_text(word + " ")
                yield ChatResponseUpdate(contents=[part], role="assistant", model="gpt-4o")
            yield ChatResponseUpdate(contents=[Content.from_usage(usage)], role="assistant", model="gpt-4o")

        return ResponseStream(parts(), finalizer=ChatResponse.from_updates) if stream else whole()


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def tool_of(func: Any = weather) -> Any:
    return tool(name="weather", approval_mode="never_require")(func)


def agent_of(script: Script, guard: Guard | None = None, tools: Any = None, contracts: Any = None) -> Any:
    middleware = None if guard is None else stroma_middleware(guard, contracts)
    own = [tool_of()] if tools is None else list(tools)
    return Agent(script, name="forecaster", tools=own, middleware=middleware)


def ask(agent: Any, kind: str = "run", seen: Any = None) -> str:
    async def main() -> str:
        if kind == "run":
            return str((await agent.run("hello")).text).strip()
        stream = agent.run("hello", stream=True)
        async for part in stream:
            if seen is not None and part.text:
                seen.append(part.text.strip())
        return str((await stream.get_final_response()).text).strip()

    return asyncio.run(main())


class TestAgentFramework(EmitsDeltas, FrameworkContract):
    KINDS = KINDS
    STEPS = ("forecaster success", "  model success 10", "  weather success", "  model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers, break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, guard, [tool_of(tool)], contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind)

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        ask(agent_of(script, guard), "stream", seen)

    def requests(self, script: Script) -> list[list[str]]:
        return [[message.role for message in messages] for messages in script.asked]


@pytest.mark.skipif(not hasattr(ResponseStream, "__aexit__"), reason="this release closes no stream")
def test_a_stream_that_is_closed_closes_that_of_the_client() -> None:
    """A reader that has enough ends the step of the model, and no request goes on unread."""
    closed: list[str] = []

    class Wordy(Script):
        def _inner_get_response(self, **_: Any) -> Any:
            async def parts() -> Any:
                try:
                    for _ in range(9):
                        yield ChatResponseUpdate(contents=[Content.from_text("word ")], role="assistant")
                finally:
                    closed.append("client")

            return ResponseStream(parts(), finalizer=ChatResponse.from_updates)

    async def main() -> None:
        async with agent_of(Wordy(), guard).run("hello", stream=True) as stream:
            await anext(stream)
        assert closed == ["client"]

    guard = guard_of()
    asyncio.run(main())
    assert lines_of(guard) == ["forecaster cancelled", "  model cancelled"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_trips_inside_a_tool_stops_the_agent_too(kind: str) -> None:
    """An agent in a tool: the framework would tell the model of the error and go on spending."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    inner = agent_of(Script("deep", tokens=7), guard, ())

    @tool(approval_mode="never_require")
    async def ask_inner() -> str:
        """Ask the other one."""
        return str((await inner.run("x")).text)

    script = Script(("ask_inner", "{}"), *["more"] * 5)
    with pytest.raises(BudgetExceeded):
        ask(agent_of(script, guard, [ask_inner]), kind)
    assert len(script.asked) == 1
    assert result_of(guard).total_tokens == 17


def test_a_tool_that_fails_for_good_is_told_to_the_model_as_ever() -> None:
    calls: list[int] = []

    @tool(approval_mode="never_require")
    def broken() -> str:
        """Never works."""
        calls.append(1)
        raise LookupError("no such thing")

    for guard in (None, guard_of()):
        calls.clear()
        assert ask(agent_of(Script(("broken", "{}"), "without it"), guard, [broken])) == "without it"
        assert len(calls) == (1 if guard is None else 2)


class Cached(FunctionMiddleware):
    """Answers in place of the tool, and ends there: as the framework has it for caches and own guards."""

    async def process(self, context: Any, call_next: Any) -> None:
        context.result = {"celsius": 99}
        raise MiddlewareTermination("it is known", result=context.result)


@pytest.mark.parametrize("first", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", KINDS)
@holds("control flow")
def test_middleware_that_terminates_ends_what_is_under_way_as_ever(kind: str, first: bool) -> None:
    """Of one's own, before or after the guard's: no failure, no retry, and the answer is the same."""
    answers = []
    for guard in (None, guard_of()):
        script = Script(CALL, "It is 99 C")
        own = [] if guard is None else stroma_middleware(guard)
        middleware = [Cached(), *own] if first else [*own, Cached()]
        agent = Agent(script, name="forecaster", tools=[tool_of()], middleware=middleware)
        answers.append((ask(agent, kind), len(script.asked)))
        if guard is not None:
            assert guard.stopped is None
            assert result_of(guard).status is RunStatus.COMPLETED
            assert not [line for line in lines_of(guard) if "failure" in line]
    assert answers[0] == answers[1]


class Provider(Script):
    """Calls its tools at once, then answers; writes each request into a ledger of tokens."""

    def __init__(self, ledger: list[int]) -> None:
        super().__init__()
        self.ledger = ledger

    def _inner_get_response(self, *, messages: Any, stream: bool, options: Any, **_: Any) -> Any:
        self.tokens = 10 + len(self.ledger) % 7
        usage: Any = {"input_token_count": self.tokens - 1, "output_token_count": 1}
        self.ledger.append(self.tokens)
        contents = [Content.from_text("It is 4 C")]
        if options.get("tools") and messages[-1].role != "tool":
            contents = [
                Content.from_function_call(
                    each.name,
                    each.name,
                    arguments=_json({"city": "Oslo"} if each.name == "weather" else {"task": "x"}),
                )
                for each in options["tools"]
            ]

        async def whole() -> Any:
            await asyncio.sleep(0)
            message = Message("assistant", contents)
            return ChatResponse(messages=[message], response_id="1", model="gpt-4o", usage_details=usage)

        async def parts() -> Any:
            await asyncio.sleep(0)
            for content in (*contents, Content.from_usage(usage)):
                yield ChatResponseUpdate(contents=[content], role="assistant", model="gpt-4o")

        return ResponseStream(parts(), finalizer=ChatResponse.from_updates) if stream else whole()


def team(ledger: list[int], guard: Guard | None = None, contracts: Any = None) -> Any:
    """Return an agent with a function and two agents as tools: one has a tool, one asks an agent."""
    north = Agent(Provider(ledger), name="north", tools=[tool_of()])
    south = Agent(Provider(ledger), name="south")
    west = Agent(Provider(ledger), name="west")

    @tool(approval_mode="never_require")
    async def ask_west(task: str) -> str:
        """Ask the agent in the west."""
        return str((await west.run(task)).text)

    own = None if guard is None else stroma_middleware(guard, contracts)
    tools = [tool_of(), north.as_tool(), south.as_tool(), ask_west]
    return Agent(Provider(ledger), name="team", tools=tools, middleware=own)


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_teams_at_once_spend_what_the_provider_has_counted(kind: str) -> None:
    """All spend is counted, to the token: of an agent, and of agents as tools and in tools, in parallel."""
    plain, ledger, seen = list[int](), list[int](), Seen()
    expected = ask(team(plain), kind)
    agent = team(ledger, guard := guard_of(seen))

    async def one() -> str:
        if kind == "run":
            return str((await agent.run("hello")).text)
        stream = agent.run("hello", stream=True)
        async for _ in stream:
            pass
        return str((await stream.get_final_response()).text)

    async def main() -> list[str]:
        return await asyncio.gather(*(one() for _ in range(50)))

    assert asyncio.run(main()) == [expected] * 50
    assert (len(ledger), spent(seen, guard)) == (50 * len(plain), (50, sum(ledger)))
    for result in seen.results:
        assert sorted(event.node_id for event in result.trace.walk()) == sorted(
            ["team", *["model"] * 6, *["weather"] * 2, *["north", "south"] * 2, "ask_west", "west"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_contract_of_an_inner_agent_s_tool_holds(kind: str) -> None:
    """It is known by its name, wherever it is, and a broken one ends the outermost agent."""
    ledger, guard = list[int](), guard_of()
    inner = Agent(Provider(ledger), name="north", tools=[tool_of()])
    own = stroma_middleware(guard, {"weather": (City, Strict)})
    agent = Agent(Provider(ledger), name="outer", tools=[inner.as_tool()], middleware=own)
    with pytest.raises(ContractViolation):
        ask(agent, kind)
    assert len(ledger) == 2
    assert result_of(guard).status is RunStatus.FAILED


def test_an_agent_outside_is_left_alone() -> None:
    """What no guarded agent calls is none of the guard's."""
    guard = guard_of()
    team([], guard)
    ask(Agent(Provider([]), name="other"))
    assert guard.last is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Anthropic counts what was cached beside the input.
        ({"anthropic.cache_read_input_tokens": 4, "cache_read_input_token_count": 4}, (14, 4, 0)),
        ({"anthropic.cache_read_input_tokens": 4, "anthropic.cache_creation_input_tokens": 5}, (19, 4, 5)),
        ({"cache_read_input_token_count": 900, "cache_creation_input_token_count": 50}, (960, 900, 50)),
        ({"cache_read_input_token_count": 4, "cache_creation_input_token_count": 5}, (10, 4, 5)),
        ({"openai.cached_input_tokens": 4, "openai.cache_write_tokens": 5}, (10, 4, 5)),
    ],
)
def test_cached_tokens_are_counted_as_such(kind: str, usage: Any, expected: Any) -> None:
    """What was read from a cache and written to it, beside the input or in it, is input at its own price."""
    script, guard = Script(ANSWER), guard_of()
    script.usage = {"input_token_count": 10, **usage}
    ask(agent_of(script, guard), kind)
    (event,) = [event for event in result_of(guard).trace.walk() if event.node_id == "model"]
    used = event.usage
    assert (used.input_tokens, used.cached_input_tokens, used.cache_write_tokens) == expected


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_that_waits_for_an_approval_is_suspended(kind: str, tmp_path: Path) -> None:
    """A pending approval is SUSPENDED, and the framework's own answer to it goes on with the same run."""
    calls: list[str] = []

    @tool(approval_mode="always_require")
    def delete(path: str) -> str:
        """Deletes."""
        calls.append(path)
        return "gone"

    async def turn(agent: Any, session: Any, message: Any) -> Any:
        if kind == "run":
            return await agent.run(message, session=session)
        stream = agent.run(message, session=session, stream=True)
        async for _ in stream:
            pass
        return await stream.get_final_response()

    async def talk(agent: Any, guard: Guard) -> str:
        session = agent.create_session()
        (request,) = (await turn(agent, session, "delete a")).user_input_requests
        assert result_of(guard).status is RunStatus.SUSPENDED
        assert result_of(guard).suspended == ["approval of delete"]
        approved = request.to_function_approval_response(approved=True)
        return str((await turn(agent, session, Message("user", [approved]))).text).strip()

    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store, run_id="deletion", resume=True)
        script = Script(("delete", '{"path": "a"}'), "done")
        assert asyncio.run(talk(agent_of(script, guard, [delete]), guard)) == "done"
        assert (calls, [one.status for one in store.list_runs()]) == (["a"], ["RESUMED"])


def test_detach_restores_the_classes_of_the_framework() -> None:
    """An import changes none of them; attaching does, until no guard needs it."""
    changed = changed_until_detached(
        "from stroma.adapters.agent_framework import stroma_middleware", "stroma_middleware(guard)"
    )
    assert changed == ["run"]
