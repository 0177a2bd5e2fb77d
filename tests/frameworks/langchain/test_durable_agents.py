"""Agents of LangChain in a flow: model calls, tools and hooks of middleware are steps of it."""

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain.tools import ToolRuntime, tool
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.graph import StateGraph
from pydantic import BaseModel, JsonValue
from tests.frameworks.langchain.fakes import Script
from tests.kit import NEVER, Num

from stroma import Flow, InMemoryStore, RunStatus, StromaRunner, stroma_flow
from stroma.adapters.langgraph import attach, durable
from stroma.testing import assert_resumable


class Answer(BaseModel):
    value: JsonValue = None


class City(BaseModel):
    name: str


class Rounds(Script):
    """Answers by the number of answers so far; a list is calls of tools."""

    def _next(self, messages: Any) -> AIMessage:
        number = sum(isinstance(message, AIMessage) for message in messages)
        answer = self.answers[number]
        calls = [
            {"name": name, "args": arguments, "id": f"{number} {index}", "type": "tool_call"}
            for index, (name, arguments) in enumerate(answer if isinstance(answer, list) else ())
        ]
        return AIMessage(
            "" if calls else answer,
            tool_calls=calls,
            usage_metadata={"input_tokens": self.tokens - 1, "output_tokens": 1, "total_tokens": self.tokens},
            response_metadata={"model_name": "gpt-4o"},
        )


class Clerk:
    """An agent with tools side by side, one of them approved by a person, and an answer of a class."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def agent(self, **options: Any) -> Any:
        @tool
        async def price(item: str, runtime: ToolRuntime) -> int:
            """The price of an item."""
            self.calls.append(f"price {item} after {len(runtime.state['messages'])}")
            return len(item)

        @tool
        def refund(cents: int) -> str:
            """Refund some cents."""
            self.calls.append(f"refund {cents}")
            return f"refunded {cents}"

        model = Rounds(
            answers=[
                [("price", {"item": "tea"}), ("price", {"item": "salt"})],
                [("refund", {"cents": 500})],
                [("City", {"name": "Rome"})],
            ]
        )
        schema = ToolStrategy(City)
        return create_agent(model, [price, refund], name="clerk", response_format=schema, **options)

    def flow(self, **options: Any) -> Any:
        agent = durable(self.agent(**options))

        @stroma_flow("f", input=Num, output=Answer)
        async def f(flow: Flow, state: Num) -> Answer:
            result = await agent.ainvoke({"messages": [{"role": "user", "content": "hi"}]})
            assert result["structured_response"] == City(name="Rome")
            return Answer(value=[shown(message) for message in result["messages"]])

        return f


def shown(message: BaseMessage) -> str:
    return f"{message.type} {message.content}"


async def test_model_calls_and_tools_are_steps() -> None:
    """G12: Each call of model and tool is a step with its usage; the answer is of its class."""
    clerk, store = Clerk(), InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(clerk.flow(), Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    plain = await Clerk().agent().ainvoke({"messages": [{"role": "user", "content": "hi"}]})
    assert result.output.value == [shown(message) for message in plain["messages"]]
    steps = [one.node_id for one in store.attempts("r") if one.node_id != "f"]
    assert steps == [
        "clerk.model",
        "clerk.tools.price",
        "clerk.tools.price",
        "clerk.model",
        "clerk.tools.refund",
        "clerk.model",
    ]
    assert result.total_tokens == 30
    assert clerk.calls == ["price tea after 2", "price salt after 2", "refund 500"]


async def test_an_agent_survives_death_at_every_boundary() -> None:
    """G5: Killed at any record, the agent resumes with the same answer; no ended call is repeated."""
    runner = StromaRunner.quick(policy_map=NEVER)
    found = await assert_resumable(Clerk().flow(), Num(), runner=runner, processes=False)
    assert len(found.boundaries) > 15


async def test_an_approval_of_middleware_is_a_question_of_the_flow() -> None:
    """The decisions of a person reach HumanInTheLoopMiddleware through the flow, without a checkpointer."""
    clerk = Clerk()
    flow = clerk.flow(middleware=[HumanInTheLoopMiddleware(interrupt_on={"refund": True})])
    runner = StromaRunner.quick(store=InMemoryStore(), run_id="r", resume=True)
    result = await runner.run(flow, Num())
    assert result.status is RunStatus.SUSPENDED, result.failure
    assert '"name": "refund", "args": {"cents": 500}' in result.suspended[0]
    edited = {"name": "refund", "args": {"cents": 400}}
    await runner.signal("r", {"decisions": [{"type": "edit", "edited_action": edited}]})
    result = await runner.run(flow, Num())
    assert result.status is RunStatus.RESUMED, result.failure
    assert clerk.calls == ["price tea after 2", "price salt after 2", "refund 400"]


async def test_agents_are_nodes_of_graphs() -> None:
    """An agent that is a node of a durable graph has steps of its own, behind the name of the node."""
    clerk, store = Clerk(), InMemoryStore()
    inner = clerk.agent()
    builder: Any = StateGraph(inner.builder.state_schema)
    builder.add_node("ask", inner)
    builder.set_entry_point("ask")
    graph = durable(builder.compile())

    @stroma_flow("f", input=Num, output=Answer)
    async def f(flow: Flow, state: Num) -> Answer:
        result = await graph.ainvoke({"messages": [("user", "hi")]})
        return Answer(value=shown(result["messages"][-1]))

    result = await StromaRunner.quick(store=store, run_id="r").run(f, Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    node_ids = {one.node_id for one in store.attempts("r")}
    assert node_ids == {"f", "ask.model", "ask.tools.price", "ask.tools.refund"}


async def test_a_guarded_agent_is_refused() -> None:
    """An agent with a guard is refused, whose steps would be those of a run of their own."""
    from stroma.adapters import Guard

    with pytest.raises(TypeError, match="without a guard"):
        durable(attach(Clerk().agent(), Guard()))
