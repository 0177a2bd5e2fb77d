"""LangChain 1.x agents: real ones with and without the middleware, with a fake model and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from tests.frameworks.contract import CALL, FrameworkContract, Weather, weather
from tests.frameworks.kit import Seen, guard_of, holds, lines_of, result_of
from tests.frameworks.langchain.fakes import Script

from stroma import BudgetExceeded, ExecutionBudget, RunStatus
from stroma.adapters import Guard
from stroma.adapters.langchain import StromaMiddleware

KINDS = ["invoke", "ainvoke", "stream", "astream"]


def tool_of(func: Any = weather) -> Any:
    return tool("weather")(func)


def ask(agent: Any, kind: str = "invoke", config: Any = None, given: Any = None) -> Any:
    given = {"messages": [("user", "hello")]} if given is None else given

    async def main() -> Any:
        if kind == "ainvoke":
            return await agent.ainvoke(given, config)
        return [part async for part in agent.astream(given, config, stream_mode="values")][-1]

    if kind == "invoke":
        return agent.invoke(given, config)
    return (
        list(agent.stream(given, config, stream_mode="values"))[-1]
        if kind == "stream"
        else asyncio.run(main())
    )


def last(result: Any) -> Any:
    return result["messages"][-1].content.strip()


def agent_of(
    script: Script, guard: Guard | None = None, tools: Any = None, contracts: Any = None, **options: Any
) -> Any:
    """Return a bare agent, or one whose calls are runs of a guard."""
    tools = [tool_of()] if tools is None else list(tools)
    if guard is None:
        return create_agent(script, tools, **options)
    middleware = StromaMiddleware(guard, tools=contracts)
    return middleware.attach(create_agent(script, tools, middleware=[middleware], **options))


@holds("sync and async")
class TestLangChain(FrameworkContract):
    KINDS = KINDS
    STEPS = ("model success 10", "weather success", "model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(answers=list(answers), break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, guard, [tool_of(tool)], contracts=contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return last(ask(program, kind))

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        agent = self.program(script, guard)
        for part, _ in agent.stream({"messages": [("user", "x")]}, stream_mode="messages"):
            if part.content:
                seen.append(part.content.strip())

    def requests(self, script: Script) -> list[list[tuple[str, Any]]]:
        return [[(message.type, message.content) for message in messages] for messages in script.asked]


def test_what_other_middleware_asks_of_a_model_is_counted() -> None:
    """A summary is paid for like an answer."""
    guard = guard_of()
    summaries = Script(answers=["short"], tokens=7)
    middleware = StromaMiddleware(guard)
    summarize = SummarizationMiddleware(summaries, trigger=("messages", 2), keep=("messages", 1))
    agent = middleware.attach(create_agent(Script(answers=["done"]), [], middleware=[summarize, middleware]))
    ask(agent, given={"messages": [("user", "one"), ("ai", "two"), ("user", "three")]})
    assert lines_of(guard) == ["SummarizationMiddleware.before_model success 7", "model success 10"]


@pytest.mark.parametrize("kind", ["invoke", "ainvoke"])
def test_sub_agents_are_counted_where_they_are_asked(kind: str) -> None:
    """An agent that is called in a tool: with the middleware its steps are inside, without it its tokens count all the same."""
    for with_middleware in (True, False):
        guard = guard_of()
        inner = StromaMiddleware(guard)
        sub = create_agent(
            Script(answers=[CALL, "deep"], tokens=7),
            [tool_of()],
            middleware=[inner] if with_middleware else [],
        )

        @tool
        def ask_other() -> str:
            """Ask the other one."""
            return last(sub.invoke({"messages": [("user", "x")]}))  # noqa: B023

        agent = agent_of(Script(answers=[("ask_other", {}), "done"]), guard, [ask_other])
        assert last(ask(agent, kind)) == "done"
        inside = ["  model success 7", "  weather success", "  model success 7"] if with_middleware else []
        used = "" if with_middleware else " 14"
        expected = ["model success 10", f"ask_other success{used}", *inside, "model success 10"]
        assert lines_of(guard) == expected
        assert result_of(guard).total_tokens == 34


def test_a_sub_agent_that_goes_round_for_ever_is_stopped() -> None:
    """The limit holds inside an agent that has no middleware of ours."""
    script = Script(answers=[CALL] * 100)
    sub = create_agent(script, [tool_of()])

    @tool
    def ask_other() -> str:
        """Ask the other one."""
        return last(sub.invoke({"messages": [("user", "x")]}, {"recursion_limit": 500}))

    guard = guard_of(budget=ExecutionBudget(max_tokens_total=45))
    with pytest.raises(BudgetExceeded):
        ask(agent_of(Script(answers=[("ask_other", {}), "done"]), guard, [ask_other]))
    assert len(script.asked) == 4
    assert result_of(guard).total_tokens == 50


def test_hooks_of_a_sub_agent_have_the_tool_as_parent() -> None:
    seen = Seen()
    guard = guard_of(seen)
    sub = create_agent(Script(answers=["deep"]), [], middleware=[StromaMiddleware(guard)])

    @tool
    def other() -> str:
        """Ask the other one."""
        return last(sub.invoke({"messages": [("user", "x")]}))

    ask(agent_of(Script(answers=[TimeoutError(), ("other", {}), "done"]), guard, [other]))
    assert seen.lines == [
        "run start",
        "start model",
        "failure model",
        "retry model",
        "start model",
        "success model",
        "start other",
        "start model < other",
        "success model < other",
        "success other",
        "start model",
        "success model",
        "run end COMPLETED",
    ]


def test_what_the_framework_tells_the_model_of_a_failed_tool_is_told() -> None:
    """Arguments that do not fit are a message for the model: no retry, no result to hold a contract against."""
    script = Script(answers=[("weather", {"town": 1}), CALL, "done"])
    guard = guard_of()
    agent = agent_of(script, guard, contracts={"weather": (BaseModelOfAnything, Weather)})
    assert last(ask(agent)) == "done"
    assert "error" in str(script.asked[1][-1].content).lower()
    assert lines_of(guard) == [
        "model success 10", "weather failure", "model success 10", "weather success", "model success 10",
    ]  # fmt: skip
    assert guard.stopped is None


class BaseModelOfAnything(BaseModel):
    pass


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_interrupts_and_commands_of_tools_pass_untouched(kind: str) -> None:
    """interrupt() in a tool waits under the agent's checkpointer, and Command(resume=) goes on."""
    calls: list[int] = []

    @tool
    def buy() -> str:
        """Asks first."""
        calls.append(1)
        return f"{interrupt('may I?')} bought"

    guard = guard_of()
    agent = agent_of(Script(answers=[("buy", {}), "done"]), guard, [buy], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    ask(agent, kind, config)
    assert [i.value for i in agent.get_state(config).tasks[0].interrupts] == ["may I?"]
    assert result_of(guard).status is RunStatus.SUSPENDED
    assert result_of(guard).suspended == ["may I?"]
    result = ask(agent, kind, config, Command(resume="yes"))
    assert (last(result), result["messages"][-2].content, len(calls)) == ("done", "yes bought", 2)
    assert result_of(guard).status is RunStatus.COMPLETED
