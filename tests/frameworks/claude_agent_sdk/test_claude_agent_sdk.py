"""Claude Agent SDK: real queries and tools with and without the guard, over a fake transport and no network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    PermissionResultDeny,
    ResultMessage,
    create_sdk_mcp_server,
    query,
    tool,
)
from pydantic import BaseModel
from tests.frameworks.claude_agent_sdk.fakes import Script
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import Guard, UnknownNode
from stroma.adapters.claude_agent_sdk import guarded_query, guarded_tools

CALL = ("weather", {"city": "Oslo"})


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


@tool("weather", "The weather of a city.", {"city": str})
async def weather(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": json.dumps({"celsius": len(arguments["city"])})}]}


def ask(script: Any, guard: Guard | None = None, tools: Any = (weather,), contracts: Any = None) -> list[Any]:
    """The messages of a query."""
    own = list(tools) if guard is None else guarded_tools(guard, list(tools), contracts)
    options = ClaudeAgentOptions(mcp_servers={"own": create_sdk_mcp_server("own", tools=own)})
    call: Any = query if guard is None else guarded_query(guard)

    async def main() -> list[Any]:
        return [message async for message in call(prompt="hello", options=options, transport=script)]

    return asyncio.run(main())


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


@holds("same answer")
def test_a_query_gives_the_same_messages_with_and_without_the_guard() -> None:
    plain, guarded, guard = Script(CALL, "It is 4 C"), Script(CALL, "It is 4 C"), guard_of()
    expected, got = ask(plain), ask(guarded, guard, contracts={"weather": (City, Weather)})
    assert got == expected
    assert [type(message) for message in got] == [AssistantMessage, ResultMessage]
    assert guarded.told == plain.told
    assert lines_of(guard) == ["query success 10", "  weather success"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.COMPLETED
    assert guard.last.result.total_cost_usd > 0


@holds("violations")
def test_violations_are_caught_at_their_tool() -> None:
    """G1: the SDK tells the model of what a tool raises; the query ends with it all the same."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        with pytest.raises(ContractViolation) as caught:
            ask(Script(CALL, "It is 4 C"), guard, contracts={"weather": contract})
        assert (caught.value.node_id, caught.value.direction) == ("weather", direction)
        assert guard.stopped is not None
        assert guard.stopped.exception is caught.value


@holds("retries", "failed attempts")
def test_transient_failures_of_tools_are_retried_and_terminal_ones_are_not() -> None:
    errors: list[Exception] = [TimeoutError(), TimeoutError()]
    calls: list[int] = []

    @tool("flaky", "Fails twice.", {})
    async def flaky(arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        pay()
        if errors:
            raise errors.pop()
        return {"content": [{"type": "text", "text": "fine"}]}

    guard = guard_of()
    ask(Script(("flaky", {}), "done"), guard, [flaky])
    assert len(calls) == 3
    assert lines_of(guard) == [
        "query success 10",
        *[f"  flaky failure {PAID}"] * 2,
        f"  flaky success {PAID}",
    ]
    assert result_of(guard).total_tokens == 10 + 3 * PAID
    errors.append(PermissionError("no"))
    calls.clear()
    ask(Script(("flaky", {}), "done"), guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL]), [flaky])
    assert len(calls) == 1


def test_a_query_that_cannot_begin_is_retried_as_its_class_says() -> None:
    """Before its first message nothing was handed on."""
    guard = guard_of()
    with pytest.raises(ConnectionError):
        ask(Script(fails=ConnectionError("gone")), guard)
    assert lines_of(guard) == ["query failure"] * 3


@holds("budget")
def test_the_budget_stops_further_queries_to_the_token() -> None:
    """A query's tokens are known when it ends: the next one is refused, and nothing is started for it."""
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
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (20, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@holds("hooks")
def test_hooks_fire_in_order_with_the_right_parents() -> None:
    seen = Seen()
    ask(Script(CALL, "It is 4 C"), guard_of(seen))
    assert seen.lines == [
        "run start",
        "start query",
        "start weather < query",
        "success weather < query",
        "success query",
        "run end COMPLETED",
    ]


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        guarded_tools(guard_of(), [weather], {"wether": (City, Weather)})


@holds("journal")
def test_a_query_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        ask(Script(CALL, "done"), guard_of(store=store))
        (record,) = store.list_runs()
        assert (record.status, record.tokens) == ("COMPLETED", 10)
        assert [a.node_id for a in store.attempts(record.run_id)] == ["query", "weather"]


@holds("streams")
def test_a_query_is_not_retried_after_its_first_message() -> None:
    seen: list[Any] = []
    script = Script("one", ConnectionError("lost"), "two")

    async def main() -> None:
        async for message in guarded_query(guard)(prompt="x", transport=script):
            seen.append(message)

    guard = guard_of()
    with pytest.raises(Exception, match="lost"):
        asyncio.run(main())
    assert [type(message) for message in seen] == [AssistantMessage]
    assert script.script == ["two"]
    assert lines_of(guard) == ["query failure"]


@tool("refuses", "Says no, in the SDK's own way.", {})
async def refuses(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": "no"}], "is_error": True}


@holds("control flow")
def test_what_the_sdk_decides_passes_untouched() -> None:
    """A tool that says so itself has not failed; a permission that is denied is told to the program; both as ever."""
    asked: list[str] = []

    async def deny(name: str, _: Any, __: Any) -> PermissionResultDeny:
        asked.append(name)
        return PermissionResultDeny(message="not that")

    async def prompt() -> Any:
        yield {
            "type": "user",
            "message": {"role": "user", "content": "x"},
            "parent_tool_use_id": None,
            "session_id": "s",
        }

    async def main(call: Any, own: Any, script: Any) -> list[Any]:
        options = ClaudeAgentOptions(
            mcp_servers={"own": create_sdk_mcp_server("own", tools=own)}, can_use_tool=deny
        )
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
    got = asyncio.run(main(guarded_query(guard), guarded_tools(guard, [refuses]), guarded))
    assert got == expected
    assert guarded.told == plain.told
    assert asked == ["Bash", "Bash"]
    assert "not that" in json.dumps(guarded.told[-1])
    assert guard.stopped is None
    assert lines_of(guard) == ["query success 10", "  refuses success"]


@holds("control flow")
def test_a_reader_that_has_enough_ends_the_query() -> None:
    """Who leaves the loop early ends the run, and nothing of it has failed."""
    guard = guard_of()

    async def main() -> None:
        messages = guarded_query(guard)(prompt="x", transport=Script("one", "two"))
        async for _ in messages:
            break
        await messages.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    assert result_of(guard).status is RunStatus.CANCELLED
    assert lines_of(guard) == ["query cancelled"]
