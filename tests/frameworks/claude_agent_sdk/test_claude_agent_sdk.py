"""Claude Agent SDK: real queries and tools with and without the guard, over a fake transport."""

import asyncio
import json
from typing import Any

import pytest
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ClaudeSDKError,
    PermissionResultDeny,
    ResultMessage,
    create_sdk_mcp_server,
    query,
    tool,
)
from pydantic import BaseModel
from tests.frameworks.claude_agent_sdk.fakes import Partial, Script
from tests.frameworks.contract import FrameworkContract, weather
from tests.frameworks.kit import (
    PAID,
    Seen,
    changed_until_detached,
    emitted_by,
    fifty_at_once,
    guard_of,
    holds,
    lines_of,
    pay,
    result_of,
    spent,
    tree,
)

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, FailureClass, RunStatus
from stroma.adapters import Guard
from stroma.adapters.claude_agent_sdk import guarded_query, guarded_tools


class City(BaseModel):
    city: str


class Cold(BaseModel):
    frost: int


def tool_of(func: Any = weather) -> Any:
    @tool("weather", "The weather of a city.", {"city": str})
    async def tool_function(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": json.dumps(func(**arguments))}]}

    return tool_function


def ask(script: Any, guard: Guard | None = None, tools: Any = None, contracts: Any = None) -> list[Any]:
    """Return the messages of a query."""
    tools = [tool_of()] if tools is None else tools
    own = list(tools) if guard is None else guarded_tools(guard, list(tools), contracts)
    options = ClaudeAgentOptions(mcp_servers={"own": create_sdk_mcp_server("own", tools=own)})
    call: Any = query if guard is None else guarded_query(guard)

    async def main() -> list[Any]:
        return [message async for message in call(prompt="hello", options=options, transport=script)]

    return asyncio.run(main())


class TestClaudeAgentSDK(FrameworkContract):
    """Its model is asked by another program: the whole query is one step; its tokens are known at its end."""

    KINDS = ("query",)
    STEPS = ("query success 10", "  weather success")
    TOKENS = 10
    MODEL = None

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return script, [tool_of(tool)], contracts

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        script, tools, contracts = program
        *answers, ended = ask(script, guard, tools, contracts)
        assert isinstance(ended, ResultMessage)
        (answer,) = answers
        assert isinstance(answer, AssistantMessage)
        (block,) = answer.content
        return block.text

    def requests(self, script: Script) -> list[Any]:
        return script.messages

    #: Tested below: the requests of the model are not seen.
    test_a_transient_failure_of_the_model_is_retried = None
    test_a_terminal_failure_of_the_model_is_not_retried = None

    @holds("budget")
    def test_the_budget_stops_the_program_to_the_token(self, metered: str) -> None:
        """The query after the one that crosses the limit is refused, and nothing is started for it."""
        guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
        second, third = Script("two"), Script("three")

        async def main() -> None:
            async with guard.run():
                for script in (Script("one"), second, third):
                    async for _ in guarded_query(guard)(prompt="x", transport=script):
                        pass

        with pytest.raises(BudgetExceeded) as caught:
            asyncio.run(main())
        assert (caught.value.actual, caught.value.limit) == (20, 15)
        assert third.script == ["three"]
        assert (result_of(guard).total_tokens, result_of(guard).status) == (20, RunStatus.PARTIAL)
        assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)

    @holds("streams")
    def test_a_stream_is_not_retried_after_its_first_part(self) -> None:
        """A message is a part."""
        seen: list[Any] = []
        script, guard = Script("one", ConnectionError("lost"), "two"), guard_of()

        async def main() -> None:
            async for message in guarded_query(guard)(prompt="x", transport=script):
                seen.append(message)

        with pytest.raises(Exception, match="lost"):
            asyncio.run(main())
        assert [type(message) for message in seen] == [AssistantMessage]
        assert script.script == ["two"]
        assert lines_of(guard) == ["query failure"]


def test_the_text_of_partial_messages_is_emitted() -> None:
    """With ``include_partial_messages``: each part of the answer once, none of subagents or whole ones."""

    def partial(text: str, **about: Any) -> Partial:
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        return Partial({"uuid": "1", "session_id": "s", "event": delta, **about})

    start = Partial({"uuid": "1", "session_id": "s", "event": {"type": "message_start"}})
    script = Script(start, partial("It "), partial("sub", parent_tool_use_id="1"), partial("is"), "It is")
    expected = [("delta", "It "), ("delta", "is")]
    parts = list(script.script)
    assert emitted_by(lambda: ask(script, guard_of())) == expected

    async def client() -> None:
        async with ClaudeSDKClient(transport=Script(*parts)) as session:
            await session.query("hello")
            async for _ in session.receive_response():
                pass

    assert emitted_by(lambda: asyncio.run(client())) == expected


def test_a_query_that_cannot_begin_is_retried_as_its_class_says() -> None:
    """Before its first message nothing was handed on."""
    guard = guard_of()
    with pytest.raises(ConnectionError):
        ask(Script(fails=ConnectionError("gone")), guard)
    assert lines_of(guard) == ["query failure"] * 3


@tool("refuses", "Says no, in the SDK's own way.", {})
async def refuses(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": "no"}], "is_error": True}


class Nothing(BaseModel):
    pass


@holds("control flow")
@pytest.mark.parametrize("contracts", [None, {"refuses": (Nothing, City)}])
def test_what_the_sdk_decides_passes_untouched(contracts: Any) -> None:
    """An error answer of a tool reaches the model, also under a contract; so does a denied permission."""
    requests: list[str] = []

    async def deny(name: str, _: Any, __: Any) -> PermissionResultDeny:
        requests.append(name)
        return PermissionResultDeny(message="not that")

    async def prompt() -> Any:
        yield {
            "type": "user",
            "message": {"role": "user", "content": "x"},
            "parent_tool_use_id": None,
            "session_id": "s",
        }

    async def main(call: Any, own: Any, script: Any) -> list[Any]:
        servers = {"own": create_sdk_mcp_server("own", tools=own)}
        options = ClaudeAgentOptions(mcp_servers=servers, can_use_tool=deny)
        return [message async for message in call(prompt=prompt(), options=options, transport=script)]

    wants = {
        "subtype": "can_use_tool",
        "tool_name": "Bash",
        "input": {"command": "rm"},
        "permission_suggestions": [],
    }
    plain, guarded, guard = (
        Script(("refuses", {}), wants, "done"),
        Script(("refuses", {}), wants, "done"),
        guard_of(),
    )
    expected = asyncio.run(main(query, [refuses], plain))
    got = asyncio.run(main(guarded_query(guard), guarded_tools(guard, [refuses], contracts), guarded))
    assert got == expected
    assert guarded.messages == plain.messages
    assert requests == ["Bash", "Bash"]
    assert "not that" in json.dumps(guarded.messages[-1])
    assert guard.stopped is None
    assert lines_of(guard) == ["query success 10", "  refuses failure"]


@holds("control flow")
def test_a_reader_that_has_enough_ends_the_query() -> None:
    """Who leaves the loop early ends the run, and nothing of it has failed."""
    guard = guard_of()

    async def main() -> None:
        messages = guarded_query(guard)(prompt="x", transport=Script("one", "two"))
        async for _ in messages:
            break
        await messages.aclose()

    asyncio.run(main())
    assert result_of(guard).status is RunStatus.CANCELLED
    assert lines_of(guard) == ["query cancelled"]


def test_what_the_program_says_it_cost_is_what_it_cost() -> None:
    """``total_cost_usd`` is the truth where it is given, and a limit on the cost holds to it."""
    guard = guard_of(budget=ExecutionBudget(max_cost_usd=0.15))

    async def main() -> None:
        async with guard.run():
            for _ in range(3):
                async for _ in guarded_query(guard)(prompt="x", transport=Script("one")):
                    pass

    with pytest.raises(BudgetExceeded):
        asyncio.run(main())
    assert result_of(guard).total_cost_usd == pytest.approx(0.2)


def test_tokens_of_all_models_count() -> None:
    """Those of agents inside the program, too, which its ``usage`` leaves out."""
    counts = {"inputTokens": 5, "outputTokens": 2, "cacheReadInputTokens": 3, "cacheCreationInputTokens": 1}
    script, guard = Script("one"), guard_of()
    script.by_model = {"claude-sonnet-4-5": counts, "claude-haiku-4-5": counts}
    ask(script, guard)
    (event,) = result_of(guard).trace
    assert (event.usage.tokens, event.usage.output_tokens, event.usage.cached_input_tokens) == (22, 4, 6)
    assert result_of(guard).total_cost_usd == pytest.approx(0.1)


def test_fifty_queries_at_once_spend_what_the_program_says() -> None:
    """Each in its own run, with a tool that uses a model beside it."""
    seen = Seen()
    guard = guard_of(seen)

    def asking(city: str) -> dict[str, int]:
        pay()
        return weather(city)

    async def one() -> None:
        options = ClaudeAgentOptions(
            mcp_servers={"own": create_sdk_mcp_server("own", tools=guarded_tools(guard, [tool_of(asking)]))}
        )
        script = Script(("weather", {"city": "Oslo"}), "done")
        async for _ in guarded_query(guard)(prompt="x", options=options, transport=script):
            pass

    fifty_at_once(lambda _: one())
    assert spent(seen, guard) == (50, 50 * (10 + PAID))
    assert {tuple(tree(result)) for result in seen.results} == {("query success 10", "  weather success 5")}


@pytest.mark.parametrize(
    ("end", "failure_class", "reason"),
    [
        ({"subtype": "error_during_execution"}, FailureClass.AMBIGUOUS, None),
        ({"subtype": "error_max_turns", "errors": ["too many turns"]}, FailureClass.AMBIGUOUS, None),
        ({"result": "API Error: 529 overloaded"}, FailureClass.RECOVERABLE, "overloaded"),
        ({"result": "API Error: 401 no key"}, FailureClass.TERMINAL, None),
        ({"result": "API Error: 429", "api_error_status": 429}, FailureClass.RECOVERABLE, "rate_limit"),
    ],
)
def test_an_error_result_is_a_failure_of_the_query(
    end: dict[str, Any], failure_class: FailureClass, reason: str | None
) -> None:
    """A result with ``is_error`` is handed on, then raised; its step has failed, and its usage counts."""
    script, guard, seen = Script("one"), guard_of(), []
    script.end = {"is_error": True, **end}

    async def main() -> None:
        async for message in guarded_query(guard)(prompt="x", transport=script):
            seen.append(type(message))

    with pytest.raises(ClaudeSDKError, match="returned an error result"):
        asyncio.run(main())
    assert seen == [AssistantMessage, ResultMessage]
    result = result_of(guard)
    assert result.status in (RunStatus.FAILED, RunStatus.PARTIAL)
    assert (lines_of(guard), result.total_tokens) == (["query failure 10"], 10)
    failure = guard.stopped
    assert failure.failure_class is failure_class
    assert reason is None or failure.reason == reason


def test_a_broken_contract_of_the_last_tool_is_raised_at_the_end() -> None:
    """A program that is silent after the tool ends the query with the violation, and nothing is left."""

    class Silent(Script):
        async def _play(self) -> None:
            if self.messages:
                await self._out.put(None)
            else:
                await super()._play()

    guard = guard_of()
    with pytest.raises(ContractViolation):
        ask(Silent(("weather", {"city": "Oslo"})), guard, contracts={"weather": (City, Cold)})
    assert result_of(guard).status is RunStatus.FAILED
    assert guard.last is not None
    assert guard.last.fatal is None


async def _converse(guard: Guard, script: Script, turns: int = 1) -> None:
    script.is_session = True
    async with guard.run():
        client = ClaudeSDKClient(options=ClaudeAgentOptions(), transport=script)
        await client.connect()
        try:
            for turn in range(1, turns + 1):
                script.script.append("hi")
                script.end = {"total_cost_usd": 0.1 * turn}
                await client.query("?")
                async for _ in client.receive_response():
                    pass
        finally:
            await client.disconnect()


def test_the_client_counts_in_the_run_around_it() -> None:
    """``ClaudeSDKClient`` in ``guard.run()`` counts tokens by turn, and the session's dollars once."""
    guard = guard_of()
    asyncio.run(_converse(guard, Script(), turns=3))
    result = result_of(guard)
    assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 30)
    assert result.total_cost_usd == pytest.approx(0.3)


@pytest.mark.parametrize("budget", [ExecutionBudget(max_tokens_total=15), ExecutionBudget(max_cost_usd=0.15)])
def test_a_budget_stops_the_client(budget: ExecutionBudget) -> None:
    """The result that takes the run over its limit raises BudgetExceeded in place of it."""
    guard = guard_of(budget=budget)
    with pytest.raises(BudgetExceeded):
        asyncio.run(_converse(guard, Script(), turns=3))
    assert (result_of(guard).status, result_of(guard).total_tokens) == (RunStatus.PARTIAL, 20)


def test_detach_restores_the_classes_of_the_framework() -> None:
    """An import changes none of them; attaching does, until no guard needs it."""
    changed = changed_until_detached(
        "from stroma.adapters.claude_agent_sdk import guarded_query", "guarded_query(guard)"
    )
    assert changed == ["receive_messages"]
