"""Graphs of LangGraph in a flow: each node and each call of a tool is a step of it."""

import asyncio
import dataclasses
import inspect
import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.message import add_messages, push_message
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel, JsonValue
from tests.frameworks.body_kit import answer_in_rounds, survive
from tests.kit import NEVER, Item, Num

from stroma import (
    ExecutionBudget,
    FailurePolicy,
    Flow,
    InMemoryStore,
    NotDone,
    RunStatus,
    StromaRunner,
    current_node,
    stroma_flow,
)
from stroma.adapters import UnknownNode
from stroma.adapters.langgraph import InterruptAnswer, durable
from stroma.contracts.examples import example_of
from stroma.runner.flows.flow import current_flow


class Answer(BaseModel):
    value: JsonValue = None


class State(TypedDict, total=False):
    n: int
    log: Annotated[list[str], operator.add]


class World:
    """A graph with branches side by side, a plain node, a conditional edge and a loop, with its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def builder(self) -> Any:
        builder = StateGraph(State)

        def branch(name: str) -> Any:
            async def call(state: State) -> Any:
                self.calls.append(name)
                await asyncio.sleep(0)
                return {"log": [name]}

            return call

        def count(state: State) -> Any:
            self.calls.append("count")
            return {"n": state["n"] + 1, "log": ["count"]}

        def again(state: State) -> str:
            return "left" if state["n"] < 2 else END

        builder.add_node("start", branch("start"))
        for name in ("left", "right"):
            builder.add_node(name, branch(name))
        builder.add_node("count", count)
        builder.add_edge(START, "start")
        builder.add_conditional_edges("start", lambda _: ["left", "right"])
        builder.add_edge(["left", "right"], "count")
        builder.add_conditional_edges("count", again, {"left": "start", END: END})
        return builder


def flow_of(graph: Any, given: Any, **options: Any) -> Any:
    """A flow that calls a graph and returns its state, with messages as text."""

    @stroma_flow("f", input=Num, output=Answer)
    async def f(flow: Flow, state: Num) -> Answer:
        return Answer(value=shown(await graph.ainvoke(given, **options)))

    return f


def shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    if isinstance(value, BaseMessage):
        return value.content
    return (
        shown(vars(value))
        if isinstance(value, BaseModel)
        else sorted(value)
        if isinstance(value, set)
        else value
    )


async def run(flow: Any, **config: Any) -> Any:
    result = await StromaRunner.quick(**config).run(flow, Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    return result.output.value


def steps_of(store: InMemoryStore, run_id: str = "r") -> list[str]:
    return [one.node_id for one in store.attempts(run_id) if one.node_id != "f"]


def graph_of(*nodes: Any, schema: Any = State, **options: Any) -> Any:
    """A graph of nodes one after the other: functions, or pairs of a name and a graph."""
    named = [node if isinstance(node, tuple) else (node.__name__, node) for node in nodes]
    builder = StateGraph(schema)
    builder.add_sequence(named)
    builder.add_edge(START, named[0][0])
    return builder.compile(**options)


def answers(*parts: Any) -> Any:
    """A chat model with these answers, each of 12 tokens."""
    usage: Any = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    return GenericFakeChatModel(
        messages=iter(
            [
                AIMessage(part, usage_metadata=usage)
                if isinstance(part, str)
                else AIMessage("", tool_calls=part, usage_metadata=usage)
                for part in parts
            ]
        )
    )


async def test_nodes_are_steps_and_survive_death_at_every_boundary() -> None:
    """G5, G12: Each call of a node is a step; killed at any record, in branches and loops, none that ended is
    repeated."""
    world, store = World(), InMemoryStore()
    flow = flow_of(durable(world.builder().compile()), {"n": 0, "log": []})
    value = await run(flow, store=store, run_id="r")
    assert value == {"n": 2, "log": 2 * ["start", "left", "right", "count"]}
    assert steps_of(store) == world.calls == 2 * ["start", "left", "right", "count"]
    assert await survive(flow) > 20


async def test_outside_of_a_flow_it_is_the_graph_as_it_was() -> None:
    """Outside of flows, and in a plain step, the graph has its checkpointer, interrupts and threads."""

    def ask(state: State) -> Any:
        return {"log": [interrupt("why?")]}

    graph = durable(graph_of(ask, checkpointer=InMemorySaver()))
    config: Any = {"configurable": {"thread_id": "1"}}
    assert [one.value for one in graph.invoke({"log": []}, config)["__interrupt__"]] == ["why?"]
    assert graph.invoke(Command(resume="so"), config) == {"log": ["so"]}
    assert await graph.aget_state(config) is not None
    plain = durable(World().builder().compile())
    assert await plain.ainvoke({"n": 1, "log": []}) == {"n": 2, "log": ["start", "left", "right", "count"]}


async def test_ids_have_the_names_of_graphs() -> None:
    """The name of a graph is in front of its nodes' ids, and a subgraph's before those inside."""

    def inner(state: State) -> Any:
        return {"n": state["n"] + 1}

    def outer(state: State) -> Any:
        return {"n": state["n"] * 10}

    store = InMemoryStore()
    graph = durable(graph_of(outer, ("sub", graph_of(inner)), name="g"))
    value = await run(flow_of(graph, {"n": 1}), store=store, run_id="r")
    assert value == {"n": 11, "log": []}
    assert steps_of(store) == ["g.outer", "g.sub.inner"]


async def test_a_durable_graph_is_a_node_of_another_one() -> None:
    """A durable graph inside another one has its own options and ids, and its thread keeps its event loop."""

    def pure(state: State) -> Any:
        return {"n": state["n"] + 1}

    def work(state: State) -> Any:
        return {"n": state["n"] * 10}

    inner = durable(graph_of(pure, work, name="inner"), {"pure": False})

    async def calls(state: State) -> Any:
        return await inner.ainvoke({"n": state["n"]})

    store, policy = InMemoryStore(), asyncio.get_event_loop_policy()
    graph = durable(graph_of(("sub", inner), calls), {"calls": False})
    assert await run(flow_of(graph, {"n": 1}), store=store, run_id="r") == {"n": 210, "log": []}
    assert steps_of(store) == ["inner.work", "inner.work"]
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        assert policy.get_event_loop() is loop
    finally:
        asyncio._set_running_loop(loop)


async def test_sends_and_commands_cross() -> None:
    """What a node returns is stored whole: a Command with an update, Sends, a Command to the outer graph."""

    def plan(state: State) -> Any:
        return Command(update={"log": ["plan"]}, goto=[Send("work", {"n": n}) for n in range(3)])

    def work(state: State) -> Any:
        return {"log": [f"work {state['n']}"]}

    def leave(state: State) -> Any:
        return Command(graph=Command.PARENT, goto="last", update={"log": ["left"]})

    def last(state: State) -> Any:
        return {"log": ["last"]}

    builder = StateGraph(State)
    builder.add_node("plan", plan, destinations=("work",))
    builder.add_node("work", work)
    builder.add_node("sub", graph_of(leave))
    builder.add_node("last", last)
    builder.add_edge(START, "plan")
    builder.add_edge("work", "sub")
    flow = flow_of(durable(builder.compile()), {"log": []})
    value = await run(flow)
    assert value == {"log": ["plan", "work 0", "work 1", "work 2", "left", "last"]}
    await survive(flow)


class Plan(BaseModel):
    topic: str
    parts: set[str] = set()


@dataclasses.dataclass
class Typed:
    plan: Plan | None = None
    done: Annotated[list[tuple[str, int]], operator.add] = dataclasses.field(default_factory=list)


async def test_models_and_dataclasses_cross() -> None:
    """State of a dataclass, with models, sets and tuples in it, is the same for a node and after it."""

    def plan(state: Typed) -> Any:
        return {"plan": Plan(topic="tea", parts={"b", "a"})}

    def work(state: Typed) -> Any:
        assert isinstance(state, Typed)
        assert state.plan == Plan(topic="tea", parts={"a", "b"})
        return {"done": [(state.plan.topic, 1)]}

    def check(state: Typed) -> str:
        assert isinstance(state.plan, Plan)
        assert state.done == [("tea", 1)]
        return END

    builder = graph_of(plan, work, schema=Typed).builder
    builder.add_conditional_edges("work", check)
    flow = flow_of(durable(builder.compile()), Typed())
    assert await run(flow) == {"plan": {"topic": "tea", "parts": ["a", "b"]}, "done": [["tea", 1]]}
    await survive(flow)


async def test_a_node_cannot_change_what_only_a_replay_would_not_see() -> None:
    """A node gets a copy of its state: what it changes in place is not in the state, live as on replay."""

    def spoil(state: State) -> Any:
        state["log"].append("spoilt")
        return {"n": 1}

    flow = flow_of(durable(graph_of(spoil)), {"log": ["a"]})
    assert await run(flow) == {"n": 1, "log": ["a"]}


async def test_what_cannot_be_stored_names_the_node() -> None:
    """A value without a form in JSON, in state or update, fails with the node, the type and the place."""

    class Client:
        pass

    def connect(state: State) -> Any:
        return {"log": [Client()]}

    result = await StromaRunner.quick(policy_map=NEVER).run(flow_of(durable(graph_of(connect)), {}), Num())
    assert "node 'connect' returns a" in result.failure.message
    assert "Client in ['log'][0], which cannot be stored" in result.failure.message
    result = await StromaRunner.quick().run(flow_of(durable(graph_of(connect)), {"log": [Client()]}), Num())
    assert "node 'connect' takes a" in result.failure.message


async def test_a_node_that_is_no_step_is_code_of_the_body() -> None:
    """With False a node, plain or async, runs in the body, and may call steps of the flow itself."""

    def pure(state: State) -> Any:
        assert current_flow() is not None
        return {"log": ["pure"]}

    async def own(state: State) -> Any:
        flow = current_flow()
        return {"log": [flow.now().isoformat() and "own"]}

    store = InMemoryStore()
    graph = durable(graph_of(pure, own), {"pure": False, "own": False})
    assert await run(flow_of(graph, {}), store=store, run_id="r") == {"log": ["pure", "own"]}
    assert steps_of(store) == []


async def test_it_is_refused_where_it_could_not_be_right() -> None:
    """Wrong objects, ids and options are refused at once; checkpointers, breakpoints and plain calls too."""

    @entrypoint()
    def program(n: int) -> int:
        return n

    def node(state: State) -> Any:
        return {}

    for wrong in (StateGraph(State), program):
        with pytest.raises(TypeError, match="takes a compiled StateGraph"):
            durable(wrong)
    with pytest.raises(UnknownNode, match="unknown node 'nod'; known: 'node'"):
        durable(graph_of(node), {"nod": False})
    wrong_options: Any = {"node": {"efect": True}}
    with pytest.raises(TypeError, match="unknown options \\['efect'\\]"):
        durable(graph_of(node), wrong_options)
    for graph in (graph_of(node, checkpointer=InMemorySaver()), graph_of(node, interrupt_before=["node"])):
        result = await StromaRunner.quick().run(flow_of(durable(graph), {}), Num())
        assert "has a checkpointer, interrupt_before or interrupt_after" in result.failure.message
    plain = durable(graph_of(node))

    @stroma_flow("f", input=Num, output=Answer)
    async def f(flow: Flow, state: Num) -> Answer:
        return Answer(value=plain.invoke({}))

    result = await StromaRunner.quick().run(f, Num())
    assert "use ainvoke()" in result.failure.message


async def test_a_node_that_fails_is_retried_as_a_step_is() -> None:
    """Failures are retried by the policy of the step, not by one of the graph; the flow gets a StepFailed."""
    calls: list[str] = []

    def flaky(state: State) -> Any:
        calls.append("flaky")
        raise ConnectionError("connection reset by peer")

    builder = StateGraph(State)
    builder.add_node("flaky", flaky, retry_policy=RetryPolicy(max_attempts=5))
    builder.add_edge(START, "flaky")
    at_once = {"RECOVERABLE": FailurePolicy(max_retries=2, backoff_seconds=0)}
    result = await StromaRunner.quick(policy_map=at_once).run(flow_of(durable(builder.compile()), {}), Num())
    assert (result.failure.node_id, len(calls)) == ("flaky", 3)


class Logged(BaseModel):
    log: list[str]


async def test_nodes_have_contracts() -> None:
    """G1: A state or an update that its schema refuses is a violation at its node; the next attempt knows."""
    told: list[str] = []

    def log(state: State) -> Any:
        failure = current_node().last_failure
        told.append("" if failure is None else failure.as_prompt())
        return {"log": ["fine"] if failure else "no list"}

    graph = durable(graph_of(log), {"log": {"input": Item, "output": Logged}})
    result = await StromaRunner.quick(contract_retries={"log": 1}).run(flow_of(graph, {"n": 1}), Num())
    assert result.output == Answer(value={"n": 1, "log": ["fine"]}), result.failure
    assert told[0] == ""
    assert "- log: Input should be" in told[1]
    result = await StromaRunner.quick().run(flow_of(graph, {"n": "x"}), Num())
    assert (result.failure.node_id, "(input)" in result.failure.message) == ("log", True)


async def test_usage_of_a_node_is_reported_once() -> None:
    """G4: The tokens of the models that a node calls are those of its step, and count against the budget."""
    model = answers("one", "two", "three")

    async def twice(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"]), model.invoke(state["messages"])]}

    store = InMemoryStore()
    flow = flow_of(durable(graph_of(twice, schema=MessagesState)), {"messages": [("user", "hi")]})
    assert await run(flow, store=store, run_id="r") == {"messages": ["hi", "one", "two"]}
    assert [one.tokens for one in store.attempts("r") if one.node_id == "twice"] == [24]
    usage = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    model.messages = iter([AIMessage("x", usage_metadata=usage)] * 2)
    budget = ExecutionBudget(max_tokens_total=5)
    result = await StromaRunner.quick(budget=budget).run(flow, Num())
    assert result.failure.reason == "budget"


async def test_messages_have_the_same_ids_on_replay() -> None:
    """G5: Ids that reducers give are the same on replay: a node removes and replaces earlier messages."""
    seen: list[str] = []

    def answer(state: MessagesState) -> Any:
        return {"messages": [("ai", "draft"), {"role": "ai", "content": "other"}]}

    def edit(state: MessagesState) -> Any:
        first, draft, other = state["messages"]
        assert None not in (first.id, draft.id, other.id)
        seen.append(str(first.id))
        return {"messages": [RemoveMessage(str(first.id)), AIMessage("final", id=draft.id)]}

    def last(state: MessagesState) -> Any:
        return {"messages": [AIMessage(f"last of {len(state['messages'])}")]}

    graph = durable(graph_of(answer, edit, last, schema=MessagesState))
    flow = flow_of(graph, {"messages": [{"role": "user", "content": "hi"}]})
    assert await run(flow) == {"messages": ["final", "other", "last of 2"]}
    await survive(flow)


async def test_delta_channels_have_the_same_ids_on_replay() -> None:
    """G5: So are the ids of a DeltaChannel, whose messages get theirs before the reducer."""
    delta = pytest.importorskip("langgraph.channels.delta")

    def reduce(messages: list[Any], writes: list[Any]) -> Any:
        for write in writes:
            messages = add_messages(messages, write)
        return messages

    fields: Any = {"messages": Annotated[list[Any], delta.DeltaChannel(reduce)]}
    schema = TypedDict("schema", fields)

    def answer(state: Any) -> Any:
        return {"messages": [("ai", f"answer to {state['messages'][0].content}")]}

    def remove(state: Any) -> Any:
        return {"messages": [RemoveMessage(state["messages"][0].id)]}

    graph = durable(graph_of(answer, remove, schema=schema))
    flow = flow_of(graph, {"messages": [{"role": "user", "content": "hi"}]})
    assert await run(flow) == {"messages": ["answer to hi"]}
    await survive(flow)


async def test_policies_and_timeouts_go_by_the_ids_of_steps() -> None:
    """A policy and a timeout for the id of a node hold for its step."""
    calls: list[str] = []

    async def slow(state: State) -> Any:
        calls.append("slow")
        await asyncio.sleep(60)

    never = {"RECOVERABLE": FailurePolicy(max_retries=0), "AMBIGUOUS": FailurePolicy(max_retries=0)}
    runner = StromaRunner.quick(node_timeouts={"g.slow": 1}, node_policies={"g.slow": never})
    result = await runner.run(flow_of(durable(graph_of(slow, name="g")), {}), Num())
    assert (result.failure.node_id, result.failure.reason, calls) == ("g.slow", "timeout", ["slow"])


async def test_messages_that_a_node_pushes_are_in_the_state() -> None:
    """push_message() in a node writes to the state, also where the node is not called again."""

    def push(state: MessagesState) -> Any:
        push_message(AIMessage("pushed", id="1"))
        return {"messages": [AIMessage("returned")]}

    flow = flow_of(durable(graph_of(push, schema=MessagesState)), {"messages": [("user", "hi")]})
    assert await run(flow) == {"messages": ["hi", "pushed", "returned"]}
    await survive(flow)


async def test_an_effect_is_asked_about_before_it_is_called_again() -> None:
    """G13: The call of an effect cut off by its process's death is looked up with its state and key."""
    booked: dict[str, int] = {}
    asked: list[Any] = []
    is_dying = [True]

    async def charge(state: State) -> Any:
        booked[current_node().idempotency_key] = state["n"]
        if is_dying.pop():
            raise ConnectionResetError("connection reset by peer")
        return {"log": ["charged"]}

    def look(state: Any, key: str) -> Any:
        asked.append(state)
        return {"log": ["found"]} if key in booked else NotDone()

    graph = durable(graph_of(charge), {"charge": {"effect": True, "reconcile": look}})
    value = await run(flow_of(graph, {"n": 500, "log": []}))
    assert value == {"n": 500, "log": ["found"]}
    assert asked == [{"n": 500, "log": []}]
    assert list(booked.values()) == [500]


async def test_an_interrupt_is_a_question_of_the_flow() -> None:
    """Each node's question suspends the run; interrupt() returns the answers, without a checkpointer."""
    calls: list[str] = []

    def ask(state: State) -> Any:
        calls.append("ask")
        first = interrupt("first?")
        second = interrupt({"q": "second?"})
        return {"log": [f"{first} {second}"]}

    def beside(state: State) -> Any:
        calls.append("beside")
        return {"log": ["beside"]}

    builder = StateGraph(State)
    for node in (ask, beside):
        builder.add_node(node)
        builder.add_edge(START, node.__name__)
    flow = flow_of(durable(builder.compile()), {})
    asked, output = await answer_in_rounds(flow, [InterruptAnswer("a")], [{"b": 1}])
    assert asked == [["first?"], ['{"q": "second?"}']]
    assert output.value == {"log": ["a {'b': 1}", "beside"]}
    assert calls == ["ask", "beside", "ask", "ask"]


async def test_interrupts_of_graphs_inside_reach_the_flow() -> None:
    """A subgraph that is a node asks as the graph does; so does one called by a node, which restarts."""

    def ask(state: State) -> Any:
        return {"log": [interrupt("sure?")]}

    inner = graph_of(ask)

    async def calls(state: State) -> Any:
        return {"log": (await inner.ainvoke({"log": []}))["log"]}

    flow = flow_of(durable(graph_of(("sub", graph_of(ask)), calls)), {})
    asked, output = await answer_in_rounds(flow, [InterruptAnswer("yes")], [InterruptAnswer("no")])
    assert (asked, output.value) == (2 * [["sure?"]], {"log": ["yes", "no"]})


async def test_questions_of_side_by_side_nodes_are_open_at_once() -> None:
    """Each node asks for itself: several questions are open at once, each with its own answer."""

    def ask(state: State) -> Any:
        number = state["n"]
        answer = interrupt(f"what of {number}?")
        return {"log": [f"{number} {answer}"]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_conditional_edges(START, lambda _: [Send("ask", {"n": n}) for n in range(3)])
    flow = flow_of(durable(builder.compile()), {"log": []})
    asked, output = await answer_in_rounds(flow, [InterruptAnswer(answer) for answer in "abc"])
    assert asked == [["what of 0?", "what of 1?", "what of 2?"]]
    assert output.value == {"log": ["0 a", "1 b", "2 c"]}


@pytest.mark.skipif(
    "response_schema" not in inspect.signature(interrupt).parameters, reason="of newer releases"
)
async def test_an_answer_that_its_schema_refuses_is_asked_for_again() -> None:
    """An answer that does not fit ``response_schema=`` leaves the question open with the reason, always."""

    def ask(state: State) -> Any:
        first = interrupt("how many?", response_schema=Item)
        second = interrupt("and now?", response_schema=Item)
        return {"n": first.n + second.n}

    flow, answers = flow_of(durable(graph_of(ask)), {}), ({"n": "many"}, {"n": 2}, {"m": 1}, {"n": 5})
    asked, output = await answer_in_rounds(flow, *([answer] for answer in answers))
    assert output.value == {"n": 7, "log": []}
    assert [question.splitlines()[0] for (question,) in asked] == [
        "how many?",
        "how many? (the last answer was refused: 1 validation error for Item",
        "and now?",
        "and now? (the last answer was refused: 1 validation error for Item",
    ]


async def test_streams_have_parts_of_every_kind() -> None:
    """astream() gives updates, custom parts and messages as steps ended."""
    model = answers("hello world")

    def write(state: MessagesState) -> Any:
        get_stream_writer()({"progress": 1})
        return {"messages": [model.invoke(state["messages"])]}

    async def after(state: MessagesState, runtime: Runtime[None]) -> Any:
        runtime.stream_writer({"progress": 2})
        return {}

    graph = durable(graph_of(write, after, schema=MessagesState))

    @stroma_flow("f", input=Num, output=Answer)
    async def f(flow: Flow, state: Num) -> Answer:
        given: Any = {"messages": [("user", "hi")]}
        parts: list[Any] = []
        async for mode, part in graph.astream(given, stream_mode=["updates", "custom", "messages"]):
            parts.append([mode, shown(part[0] if mode == "messages" else part)])
        return Answer(value=parts)

    assert await run(f) == [
        ["custom", {"progress": 1}],
        ["messages", "hello world"],
        ["updates", {"write": {"messages": ["hello world"]}}],
        ["custom", {"progress": 2}],
        ["updates", {"after": None}],
    ]


async def test_readers_of_a_run_see_deltas_of_models() -> None:
    """What models stream and what nodes write to the custom stream is emitted to readers at once."""
    model = answers("hello world")

    async def write(state: MessagesState) -> Any:
        get_stream_writer()("begun")
        return {"messages": [await model.ainvoke(state["messages"])]}

    flow = flow_of(durable(graph_of(write, schema=MessagesState)), {"messages": [("user", "hi")]})
    events = [
        (event.name, event.data)
        async for event in StromaRunner.quick().stream(flow, Num())
        if event.kind == "node_event"
    ]
    assert events[0] == ("custom", "begun")
    assert "".join(data for name, data in events[1:]) == "hello world"


class Shop:
    """An agent of a model and tools, as the tutorials of LangGraph have it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked: list[Any] = []
        self.is_dying = self.asks = False

    def answer(self, state: MessagesState) -> Any:
        self.calls.append("model")
        returned = [message.content for message in state["messages"] if isinstance(message, ToolMessage)]
        if len(returned) == 2:
            return {"messages": [AIMessage(f"done {sorted(map(str, returned))}")]}
        calls: Any = [
            {"name": "price", "args": {"item": item}, "id": f"call {item}", "type": "tool_call"}
            for item in ("tea", "salt")
        ]
        return {"messages": [AIMessage("", tool_calls=calls)]}

    def graph(self, nodes: Any = None, *, handle_tool_errors: bool = False) -> Any:
        prebuilt = pytest.importorskip("langgraph.prebuilt", exc_type=ImportError)

        @tool
        async def price(item: str) -> int:
            """The price of an item."""
            self.calls.append(f"price {item}")
            if self.is_dying and item == "tea":
                self.is_dying = False
                raise ConnectionResetError("connection reset by peer")
            answer: int = interrupt(f"price of {item}?") if self.asks else len(item)
            return answer

        builder = StateGraph(MessagesState)
        builder.add_node("model", self.answer)
        builder.add_node("tools", prebuilt.ToolNode([price], handle_tool_errors=handle_tool_errors))
        builder.add_edge(START, "model")
        builder.add_conditional_edges("model", prebuilt.tools_condition)
        builder.add_edge("tools", "model")
        return durable(builder.compile(), nodes)


async def test_each_call_of_a_tool_is_a_step() -> None:
    """G5: The calls of a node of tools are parallel steps; after a death ended ones are not repeated."""
    shop, store = Shop(), InMemoryStore()
    flow = flow_of(shop.graph(), {"messages": [("user", "hi")]})
    value = await run(flow, store=store, run_id="r")
    assert value["messages"][-1] == "done ['3', '4']"
    assert steps_of(store) == ["model", "tools.price", "tools.price", "model"]
    await survive(flow)


async def test_a_tool_that_is_an_effect_is_asked_about() -> None:
    """G13: ``reconcile`` of a tool gets its arguments, and what it returns is what the model gets."""
    shop = Shop()
    shop.is_dying = True

    def look(arguments: Any, key: str) -> Any:
        shop.asked.append(arguments)
        return 99

    graph = shop.graph({"tools.price": {"effect": True, "reconcile": look}})
    value = await run(flow_of(graph, {"messages": [("user", "hi")]}))
    assert value["messages"][-1] == "done ['4', '99']"
    assert shop.asked == [{"item": "tea"}]


@pytest.mark.parametrize("effect", ["charge", "tools.price"])
async def test_a_person_states_the_result_of_an_effect(effect: str) -> None:
    """G13: Without ``reconcile`` a person states what the node or tool returned, and nothing empty."""
    shop = Shop()
    shop.is_dying, options = True, {effect: {"effect": True}}

    async def charge(state: State) -> Any:
        raise ConnectionResetError("connection reset by peer")

    is_tool = effect != "charge"
    graph = shop.graph(options) if is_tool else durable(graph_of(charge), options)
    flow = flow_of(graph, {"messages": [("user", "hi")]} if is_tool else {"n": 1, "log": []})
    runner = StromaRunner.quick(store=InMemoryStore(), policy_map=NEVER)
    (question,) = (await runner.run(flow, Num(), run_id="r")).questions
    assert example_of(question.schema) == {"result": None}
    with pytest.raises(ValueError, match='the statement needs "result"'):
        await runner.signal("r", {}, question=question.id)
    result: Any = 99 if is_tool else {"log": ["stated"]}
    await runner.signal("r", {"result": result}, question=question.id)
    value = (await runner.resume(flow, "r")).output.value
    assert value["messages"][-1] == "done ['4', '99']" if is_tool else value["log"] == ["stated"]


@pytest.mark.parametrize("node", ["tools", "tools.price"])
async def test_an_effect_whose_errors_go_to_the_model_is_refused(node: str) -> None:
    """G13: The model would call it again after a lost connection, whatever became of the call."""
    Shop().graph(handle_tool_errors=True)
    with pytest.raises(TypeError, match="create its ToolNode without handle_tool_errors"):
        Shop().graph({node: {"effect": True}}, handle_tool_errors=True)


async def test_tools_ask_for_themselves() -> None:
    """A tool that calls interrupt() asks for its own call alone, and is repeated with the answer."""
    shop = Shop()
    shop.asks = True
    flow = flow_of(shop.graph(), {"messages": [("user", "hi")]})
    asked, output = await answer_in_rounds(flow, [InterruptAnswer(30), InterruptAnswer(40)])
    assert asked == [["price of tea?", "price of salt?"]]
    assert output.value["messages"][-1] == "done ['30', '40']"
    assert shop.calls == ["model", "price tea", "price salt", "price tea", "price salt", "model"]


async def test_a_graph_is_cancelled_by_a_timeout_of_the_body() -> None:
    """G5: A timeout around a graph is durable, and its nodes in flight are given up, live as on replay."""

    async def wait(state: State) -> Any:
        await asyncio.sleep(0.02 if state["n"] == 0 else 60)
        return {"n": state["n"] + 1}

    def again(state: State) -> str:
        return "wait"

    builder = StateGraph(State)
    builder.add_node(wait)
    builder.add_edge(START, "wait")
    builder.add_conditional_edges("wait", again)
    graph, other = durable(builder.compile()), durable(World().builder().compile())

    @stroma_flow("f", input=Num, output=Answer)
    async def f(flow: Flow, state: Num) -> Answer:
        try:
            async with asyncio.timeout(0.5):
                await graph.ainvoke({"n": 0})
        except TimeoutError:
            return Answer(value=shown(await other.ainvoke({"n": 1, "log": []})))
        return Answer()

    assert await run(f) == {"n": 2, "log": ["start", "left", "right", "count"]}
    await survive(f)
