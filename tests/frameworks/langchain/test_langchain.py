"""LangChain 1.x agents: real ones with and without the middleware, with a fake model and no network."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, SummarizationMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from tests.frameworks.contract import CALL, EmitsDeltas, FrameworkContract, Weather, weather
from tests.frameworks.kit import emitted_by, fifty_at_once, guard_of, holds, lines_of, result_of
from tests.frameworks.langchain.fakes import Script

from stroma import KNOWN_MODELS, BudgetExceeded, ExecutionBudget, RunStatus, Usage, current_node
from stroma.adapters import Guard
from stroma.adapters.langchain import StromaMiddleware
from stroma.adapters.langgraph import attach

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


def ask_in_a_node(model: Any, guard: Guard, times: int = 1) -> None:
    """Call a graph with one node, which asks a model."""
    graph = StateGraph(MessagesState)
    graph.add_node("ask", lambda _: {"messages": [model.invoke("x") for _ in range(times)]})
    graph.add_edge(START, "ask")
    attach(graph.compile(), guard).invoke({"messages": []})


@holds("sync and async")
class TestLangChain(EmitsDeltas, FrameworkContract):
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


def test_the_text_of_typed_events_is_emitted() -> None:
    """LangChain's newer events of a stream have their text emitted like tokens; no attempt follows."""

    def ask(_: Any) -> Any:
        for _event in Script(answers=["one two"]).stream_events("x", version="v3"):
            pass
        return {"messages": []}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    attached = attach(graph.compile(), guard_of())
    assert emitted_by(lambda: attached.invoke({"messages": []})) == [("delta", "one "), ("delta", "two ")]


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
    """An agent called in a tool has its steps inside with the middleware; its tokens count without it."""
    for with_middleware in (True, False):
        guard = guard_of()
        inner = StromaMiddleware(guard)
        around = [inner] if with_middleware else []
        sub = create_agent(Script(answers=[CALL, "deep"], tokens=7), [tool_of()], middleware=around)

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


def test_a_cached_prompt_counts_at_its_own_price() -> None:
    """A call is refused for what the step has spent, and cached tokens cost less than others."""
    sub = create_agent(Script(answers=["deep"]), [])

    @tool
    def ask_other() -> str:
        """Ask the other one."""
        # 1.25 USD; not cached, it would be 2.50.
        current_node().report_usage(Usage(1_000_000, cached_input_tokens=1_000_000, model="gpt-4o"))
        return last(sub.invoke({"messages": [("user", "x")]}))

    guard = guard_of(budget=ExecutionBudget(max_cost_usd=2))
    assert last(ask(agent_of(Script(answers=[("ask_other", {}), "done"]), guard, [ask_other]))) == "done"
    assert result_of(guard).total_cost_usd == pytest.approx(1.25, abs=0.001)


FLEX = {"flex_cache_read": 600_000, "flex": 400_000}


@pytest.mark.parametrize(
    ("details", "metadata", "cost"),
    [
        # Anthropic names the kinds of writes beside a sum of 0; releases before had the sum as well.
        ({"cache_creation": 0, "ephemeral_5m_input_tokens": 1_000_000}, {"model": "claude-haiku-4-5"}, 1.25),
        ({"cache_creation": 0, "ephemeral_1h_input_tokens": 1_000_000}, {"model": "claude-haiku-4-5"}, 2.00),
        (
            {"cache_creation": 1_000_000, "ephemeral_1h_input_tokens": 1_000_000},
            {"model": "claude-haiku-4-5"},
            2.00,
        ),
        ({"cache_read": 1_000_000}, {"model": "claude-haiku-4-5"}, 0.10),
        # OpenAI's tiers have names of their own.
        (FLEX, {"model_name": "gpt-5", "service_tier": "flex"}, 0.25 + 0.0375),
        ({}, {"model_name": "gpt-5", "service_tier": "priority"}, 2.50),
        ({}, {"model": "claude-haiku-4-5", "usage": {"service_tier": "batch"}}, 0.50),
    ],
)
def test_caches_and_tiers_have_their_prices(details: Any, metadata: Any, cost: float) -> None:
    """What a message says of a cache and of the tier of its call counts, in the names of each provider."""
    used: Any = {"input_tokens": 1_000_000, "output_tokens": 0, "total_tokens": 1_000_000}
    counts = {**used, "input_token_details": details}
    message = AIMessage("x", usage_metadata=counts, response_metadata=metadata)
    ask_in_a_node(GenericFakeChatModel(messages=iter([message])), guard := guard_of())
    assert result_of(guard).total_tokens == 1_000_000
    assert result_of(guard).total_cost_usd == pytest.approx(cost)


def test_an_answer_from_the_cache_of_langchain_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The provider is asked once, and is paid once."""
    script, guard = (
        Script(answers=["x"], cache=InMemoryCache()),
        guard_of(budget=ExecutionBudget(max_tokens_total=15)),
    )
    ask_in_a_node(script, guard, times=3)
    assert (len(script.asked), lines_of(guard)) == (1, ["ask success 10"])
    assert "does not say what it used" not in caplog.text


def test_a_call_at_exactly_the_limit_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls of 0.10 USD are within 0.30 USD, although their sum as binary fractions is above it."""
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o", (1000.0, 1000.0))
    script, guard = Script(answers=["x"] * 4, tokens=100), guard_of(budget=ExecutionBudget(max_cost_usd=0.3))
    with pytest.raises(BudgetExceeded):
        ask_in_a_node(script, guard, times=4)
    assert (len(script.asked), lines_of(guard)) == (4, ["ask failure 400"])


def test_what_the_framework_tells_the_model_of_a_failed_tool_is_told() -> None:
    """Arguments that do not fit are a message for the model: no retry, no result for a contract."""
    script = Script(answers=[("weather", {"town": 1}), CALL, "done"])
    guard = guard_of()
    agent = agent_of(script, guard, contracts={"weather": (BaseModelOfAnything, Weather)})
    assert last(ask(agent)) == "done"
    assert "error" in str(script.asked[1][-1].content).lower()
    assert lines_of(guard) == [
        "model success 10",
        "weather failure",
        "model success 10",
        "weather success",
        "model success 10",
    ]
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


class Ledger:
    """What the fake provider has charged for, in all models that write to it."""

    def __init__(self) -> None:
        self.models: list[Script] = []

    def model(self, *answers: Any, tokens: int = 10) -> Script:
        self.models.append(Script(answers=list(answers), tokens=tokens))
        return self.models[-1]

    @property
    def tokens(self) -> int:
        return sum(model.tokens * len(model.asked) for model in self.models)


def realistic(ledger: Ledger, guard: Guard) -> Any:
    """Tools, sub-agents with and without the middleware, summaries, a chain in a tool."""
    deep = create_agent(ledger.model("deepest", tokens=3), [], name="deep")
    chain = ledger.model("chained", tokens=5)

    @tool
    def ask_deep() -> str:
        """Ask another agent, and a model."""
        return last(deep.invoke({"messages": [("user", "x")]})) + str(chain.invoke("y").content)

    inner = agent_of(ledger.model(("ask_deep", {}), "deep", tokens=7), guard, [ask_deep])

    @tool
    def ask_inner() -> str:
        """Ask an agent."""
        return str(last(inner.invoke({"messages": [("user", "x")]})))

    middleware = StromaMiddleware(guard)
    summarize = SummarizationMiddleware(
        ledger.model("short", "short", tokens=2), trigger=("messages", 3), keep=("messages", 1)
    )
    model = ledger.model(("ask_inner", {}), CALL, "done")
    agent = create_agent(model, [ask_inner, tool_of()], middleware=[summarize, middleware])
    return middleware.attach(agent)


@pytest.mark.parametrize("kind", KINDS)
def test_all_spend_is_that_of_the_provider_s_ledger(kind: str) -> None:
    """Tools, sub-agents, summaries and models in tools, streamed or not: to the provider's token."""
    ledger, guard = Ledger(), guard_of()
    assert last(ask(realistic(ledger, guard), kind)) == "done"
    assert result_of(guard).total_tokens == ledger.tokens > 3 * 10 + 2 * 7 + 3 + 5


def test_fifty_runs_at_once_are_counted_apart() -> None:
    """Each run of fifty at the same time has its own spend, as the provider charged it."""
    guard = guard_of()

    async def one(n: int) -> None:
        ledger = Ledger()
        agent = agent_of(ledger.model(CALL, "done", tokens=n + 1), guard)
        async with guard.run() as run:
            await agent.ainvoke({"messages": [("user", "hello")]})
        assert run.result.total_tokens == ledger.tokens == 2 * (n + 1)

    fifty_at_once(one)


@pytest.mark.parametrize("kind", KINDS)
def test_an_approval_by_middleware_suspends_and_goes_on(kind: str, tmp_path: Path) -> None:
    """HumanInTheLoopMiddleware is SUSPENDED; its decisions come as a Command."""
    script, config = Script(answers=[CALL, "done"]), {"configurable": {"thread_id": "1"}}
    decision = {"decisions": [{"type": "approve"}]}
    saver, calls = InMemorySaver(), list[str]()

    def agent(guard: Guard) -> Any:
        middleware = StromaMiddleware(guard)
        person = HumanInTheLoopMiddleware(interrupt_on={"weather": True})

        def station(city: str) -> Any:
            """Return the weather of a city."""
            calls.append(city)
            return weather(city)

        made = create_agent(script, [tool_of(station)], middleware=[person, middleware], checkpointer=saver)
        return middleware.attach(made)

    guards = [guard_of(store=str(tmp_path / "r.db"), run_id="r", resume=True) for _ in range(2)]
    ask(agent(guards[0]), kind, config)
    assert (result_of(guards[0]).status, calls) == (RunStatus.SUSPENDED, [])
    command: Any = Command(resume=decision)
    graph, result = agent(guards[1]), None
    if kind in ("invoke", "stream"):
        result = graph.invoke(command, config)
    else:
        result = asyncio.run(graph.ainvoke(command, config))
    assert (last(result), calls) == ("done", ["Oslo"])
    assert result_of(guards[1]).status is RunStatus.RESUMED
