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
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree
from tests.frameworks.langchain.fakes import Script

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import Guard, UnknownNode
from stroma.adapters.langchain import StromaMiddleware

KINDS = ["invoke", "ainvoke", "stream", "astream"]
CALL = ("weather", {"city": "Oslo"})


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


@tool
def weather(city: str) -> dict[str, int]:
    """The weather of a city."""
    return {"celsius": len(city)}


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


def agent_of(script: Script, guard: Guard | None = None, tools: Any = (weather,), **options: Any) -> Any:
    """A bare agent, or one whose calls are runs of a guard."""
    if guard is None:
        return create_agent(script, list(tools), **options)
    middleware = StromaMiddleware(guard, tools=options.pop("contracts", None))
    return middleware.attach(create_agent(script, list(tools), middleware=[middleware], **options))


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    plain, guarded = Script(answers=[CALL, "It is 4 C"]), Script(answers=[CALL, "It is 4 C"])
    guard = guard_of()
    agent = agent_of(guarded, guard, contracts={"weather": (City, Weather)})
    expected, got = ask(agent_of(plain), kind), ask(agent, kind)
    assert last(expected) == last(got) == "It is 4 C"
    assert [m.type for m in got["messages"]] == [m.type for m in expected["messages"]]
    assert lines_of(guard) == ["model success 10", "weather success", "model success 10"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_cost_usd > 0


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_tool(kind: str) -> None:
    """G1, for what a model passes to a tool and for what the tool returns."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        agent = agent_of(Script(answers=[CALL, "done"]), guard, contracts={"weather": contract})
        with pytest.raises(ContractViolation) as caught:
            ask(agent, kind)
        assert (caught.value.node_id, caught.value.direction) == ("weather", direction)
        assert guard.stopped is not None
        assert guard.stopped.exception is caught.value


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    """G3, for models and tools."""
    script = Script(answers=[TimeoutError("slow"), ("flaky", {}), ConnectionError("gone"), "done"])
    errors: list[Exception] = [TimeoutError(), TimeoutError()]

    @tool
    def flaky() -> str:
        """Fails twice."""
        pay()
        if errors:
            raise errors.pop()
        return "fine"

    guard = guard_of()
    assert last(ask(agent_of(script, guard, [flaky]), kind)) == "done"
    assert (len(script.asked), len(errors)) == (4, 0)
    assert result_of(guard).total_tokens == 20 + 3 * PAID
    script = Script(answers=[PermissionError("no"), "never"])
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PermissionError):
        ask(agent_of(script, guard), kind)
    assert len(script.asked) == 1
    assert guard.stopped is not None
    assert guard.stopped.node_id == "model"


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_agent_to_the_token(kind: str) -> None:
    script = Script(answers=[CALL] * 9)
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    with pytest.raises(BudgetExceeded) as caught:
        ask(agent_of(script, guard), kind)
    assert (caught.value.actual, caught.value.limit, len(script.asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (30, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


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
            Script(answers=[CALL, "deep"], tokens=7), [weather], middleware=[inner] if with_middleware else []
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
        assert guard.last is not None
        assert guard.last.result is not None
        assert guard.last.result.total_tokens == 34


def test_a_sub_agent_that_goes_round_for_ever_is_stopped() -> None:
    """The limit holds inside an agent that has no middleware of ours."""
    script = Script(answers=[CALL] * 100)
    sub = create_agent(script, [weather])

    @tool
    def ask_other() -> str:
        """Ask the other one."""
        return last(sub.invoke({"messages": [("user", "x")]}, {"recursion_limit": 500}))

    guard = guard_of(budget=ExecutionBudget(max_tokens_total=45))
    with pytest.raises(BudgetExceeded):
        ask(agent_of(Script(answers=[("ask_other", {}), "done"]), guard, [ask_other]))
    assert len(script.asked) == 4
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 50


@holds("hooks")
def test_hooks_fire_in_order_with_the_right_parents() -> None:
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
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.SUSPENDED
    assert guard.last.result.suspended == ["may I?"]
    result = ask(agent, kind, config, Command(resume="yes"))
    assert (last(result), result["messages"][-2].content, len(calls)) == ("done", "yes bought", 2)
    assert guard.last.result.status is RunStatus.COMPLETED


@holds("streams")
def test_a_stream_is_not_retried_after_its_first_token() -> None:
    """Rule 9: tokens that somebody has seen are not made a second time."""
    guard = guard_of()
    script = Script(answers=["one two three", "again"], break_after=2)
    agent = agent_of(script, guard)
    seen: list[str] = []
    with pytest.raises(TimeoutError, match="lost"):
        for part, _ in agent.stream({"messages": [("user", "x")]}, stream_mode="messages"):
            seen.append(part.content)
    assert [word.strip() for word in seen] == ["one", "two"]
    assert len(script.asked) == 1
    script = Script(answers=[TimeoutError(), "one two"])
    parts = agent_of(script, guard).stream({"messages": [("user", "x")]}, stream_mode="messages")
    assert [part.content.strip() for part, _ in parts][:2] == ["one", "two"]


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        ask(agent_of(Script(answers=["x"]), guard_of(), contracts={"wether": (City, Weather)}))


@holds("journal")
def test_a_call_of_an_agent_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        ask(agent_of(Script(answers=[CALL, "done"]), guard_of(store=store)))
        (run,) = store.list_runs()
        assert (run.status, run.tokens) == ("COMPLETED", 20)
        assert [a.node_id for a in store.attempts(run.run_id)] == ["model", "weather", "model"]
