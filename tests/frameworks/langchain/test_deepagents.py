"""Deep Agents: sub-agents of all kinds are counted and limited; the published adapter works."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from deepagents import create_deep_agent
from langchain_core.tools import tool as make_tool
from tests.frameworks.contract import City, FrameworkContract, Weather, weather
from tests.frameworks.kit import AT_ONCE, guard_of, holds, lines_of, result_of
from tests.frameworks.langchain.fakes import Script

from stroma import (
    BudgetExceeded,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    InMemoryStore,
    NodeContract,
    RunStatus,
    StromaRunner,
)
from stroma.adapters import DeepAgentsAdapter, FrameworkAdapter, Guard, stroma_deepagents_node
from stroma.adapters.langchain import StromaMiddleware

TASK = ("task", {"description": "look", "subagent_type": "general-purpose"})
ASKED = {"messages": [("user", "hello")]}


def call(agent: Any, kind: str) -> Any:
    return agent.invoke(ASKED) if kind == "invoke" else asyncio.run(agent.ainvoke(ASKED))


def deep(script: Script, guard: Guard, **options: Any) -> Any:
    middleware = StromaMiddleware(guard)
    return middleware.attach(create_deep_agent(script, middleware=[middleware], **options))


@holds("sync and async")
class TestDeepAgents(FrameworkContract):
    KINDS = ("invoke", "ainvoke")
    STEPS = ("model success 10", "weather success", "model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(answers=list(answers), break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        tools = [make_tool("weather")(tool)]
        if guard is None:
            return create_deep_agent(script, tools=tools)
        middleware = StromaMiddleware(guard, tools=contracts)
        return middleware.attach(create_deep_agent(script, middleware=[middleware], tools=tools))

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return call(program, kind)["messages"][-1].content

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        for part, _ in self.program(script, guard).stream(ASKED, stream_mode="messages"):
            if part.content:
                seen.append(part.content.strip())

    def requests(self, script: Script) -> list[list[str]]:
        return [[message.type for message in messages] for messages in script.asked]

    def own(self, lines: Sequence[str]) -> list[str]:
        return [line for line in lines if "iddleware" not in line]


@pytest.mark.parametrize("kind", ["invoke", "ainvoke"])
def test_the_general_purpose_sub_agent_is_counted(kind: str) -> None:
    """It is made by the framework and has no middleware of ours: 40 tokens of 40 all the same."""
    script = Script(answers=[TASK, "looked", "done"])
    bare = Script(answers=[TASK, "looked", "done"])
    guard = guard_of()
    result = call(deep(script, guard), kind)
    assert (
        result["messages"][-1].content
        == call(create_deep_agent(bare), kind)["messages"][-1].content
        == "done"
    )
    assert result_of(guard).total_tokens == 30
    lines = [line for line in lines_of(guard) if "iddleware" not in line]
    assert lines == ["model success 10", "task success 10", "model success 10"]


@pytest.mark.parametrize("kind", ["invoke", "ainvoke"])
def test_the_budget_stops_a_sub_agent_to_the_token(kind: str) -> None:
    """The first call of a model after the limit is crossed is refused, wherever it would be made."""
    script = Script(answers=[TASK, *[("write_todos", {"todos": []})] * 50])
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=35))
    with pytest.raises(BudgetExceeded):
        call(deep(script, guard), kind)
    assert len(script.asked) == 4
    assert result_of(guard).total_tokens == 40
    assert result_of(guard).status is RunStatus.PARTIAL
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


WEATHER = NodeContract(node_id="weather", input_schema=City, output_schema=Weather)


@pytest.mark.parametrize(("kind", "asynchronous"), [("invoke", False), ("ainvoke", False), ("ainvoke", True)])
def test_code_against_the_published_names_works(kind: str, asynchronous: bool) -> None:
    """DeepAgentsAdapter(registry, store).wrap(agent) on a real agent: marked tools hold contracts."""
    answers: list[Any] = [{"celsius": 4}, {"celsius": "cold"}]

    @stroma_deepagents_node("weather", WEATHER)
    def station(city: str) -> Any:
        """The weather of a city."""
        return answers.pop(0)

    @stroma_deepagents_node("weather", WEATHER)
    async def astation(city: str) -> Any:
        """The weather of a city."""
        return answers.pop(0)

    name = "astation" if asynchronous else "station"
    ask = (name, {"city": "Oslo"})
    script = Script(answers=[ask, "done", ask, "done"])
    store = InMemoryStore()
    adapter = DeepAgentsAdapter(ContractRegistry(), store, StromaRunner.quick(policy_map=AT_ONCE))
    assert isinstance(adapter, FrameworkAdapter)
    agent = adapter.wrap(create_deep_agent(script, tools=[astation if asynchronous else station]))
    assert call(agent, kind)["messages"][-1].content == "done"
    assert adapter.cost_tracker.total_tokens == 20
    assert [run.status for run in store.list_runs()] == ["COMPLETED"]
    with pytest.raises(ContractViolation) as caught:
        call(agent, kind)
    assert (caught.value.node_id, caught.value.direction) == ("weather", "output")


def test_an_agent_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="stroma_deepagents_node"):
        DeepAgentsAdapter(ContractRegistry()).wrap(create_deep_agent(Script(answers=[])))
    marked = DeepAgentsAdapter(ContractRegistry()).node_decorator("weather", WEATHER)(lambda city: city)
    assert marked._stroma_node_id == "weather"
