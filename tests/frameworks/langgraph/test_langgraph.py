"""LangGraph: real graphs with and without the guard, sync and async, with fake models and no network."""

import asyncio
import contextvars
import gc
import inspect
import operator
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict
from unittest.mock import MagicMock

import pytest
from langchain_core.runnables import RunnableConfig, RunnablePassthrough
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy, Send, StreamWriter, interrupt
from pydantic import BaseModel
from tests.frameworks.contract import ANSWER, EmitsDeltas, FrameworkContract, terminal, weather
from tests.frameworks.kit import AT_ONCE, fifty_at_once, guard_of, holds, lines_of, result_of
from tests.frameworks.langchain.fakes import Script
from tests.kit import Text, Words

from stroma import (
    BudgetExceeded,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    NodeContract,
    RunStatus,
    StromaRunner,
)
from stroma.adapters import FrameworkAdapter, Guard, LangGraphAdapter, stroma_langgraph_node
from stroma.adapters.langgraph import attach

KINDS = ["invoke", "ainvoke", "stream", "astream"]


class State(TypedDict, total=False):
    text: str
    words: Annotated[list[str], operator.add]
    total: int


class Total(BaseModel):
    total: int


def call(graph: Any, kind: str, given: Any, config: Any = None) -> Any:
    """Call a graph in one of its ways; streams give their last state."""

    async def acall() -> Any:
        if kind == "ainvoke":
            return await graph.ainvoke(given, config)
        return [part async for part in graph.astream(given, config, stream_mode="values")][-1]

    if kind == "invoke":
        return graph.invoke(given, config)
    if kind == "stream":
        return list(graph.stream(given, config, stream_mode="values"))[-1]
    return asyncio.run(acall())


def split(state: State) -> Any:
    return {"words": state["text"].split()}


def count(state: State) -> Any:
    return {"total": len(state["words"])}


def chain(schema: Any = State, **nodes: Any) -> Any:
    """Return the builder of a graph of nodes one after the other."""
    builder = StateGraph(schema)
    builder.add_sequence(list(nodes.items()))
    builder.add_edge(START, next(iter(nodes)))
    return builder


def line(first: Any = split, second: Any = count) -> Any:
    return chain(split=first, count=second)


class Forecast(TypedDict, total=False):
    city: str
    celsius: int
    text: str


def forecast(first: Any, second: Any) -> Any:
    return chain(Forecast, weather=first, tell=second)


@holds("sync and async")
class TestLangGraph(EmitsDeltas, FrameworkContract):
    KINDS = KINDS
    GOOD = (ANSWER,)
    STEPS = ("weather success", "tell success 10")
    TOKENS = 10
    MODEL = "tell"
    UNKNOWN = r"unknown node 'wether'; .* 'tell', 'weather'"

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(answers=list(answers), break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        builder = forecast(
            lambda state: tool(state["city"]), lambda state: {"text": script.invoke("x").content.strip()}
        )
        return (builder if guard is None else attach(builder, guard, contracts)).compile()

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return call(program, kind, {"city": "Oslo"})["text"]

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """A subgraph that is a node, killed in its second node."""

        def first(state: State) -> Any:
            return {"words": ["one"]}

        def second(state: State) -> Any:
            die()
            return {"words": ["two"]}

        builder = chain(sub=attach(line(first, second), guard).compile())
        return str(call(attach(builder, guard).compile(), "invoke", {"text": "a"})["words"])

    def endless(self, guard: Guard) -> tuple[Any, Script]:
        """The limit is looked at before each call of a model, and not only between nodes."""
        script = self.script(*["more"] * 9)

        def loop(state: Forecast) -> Any:
            while True:
                script.invoke("x")

        return attach(forecast(lambda state: {}, loop), guard).compile(), script

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        for part, _ in self.program(script, guard).stream({"city": "Oslo"}, stream_mode="messages"):
            if part.content:
                seen.append(part.content.strip())


def test_a_retry_gets_what_the_first_attempt_got() -> None:
    """A node that changes its state before it fails finds it as it was, when it is called again."""
    seen: list[Any] = []

    def eats(state: State) -> Any:
        seen.append(list(state["words"]))
        state["words"].clear()
        if len(seen) == 1:
            raise TimeoutError
        return {"total": len(seen[-1])}

    graph = attach(chain(eats=eats), guard_of()).compile()
    assert graph.invoke({"words": ["a", "b"]})["total"] == 2
    assert seen == [["a", "b"], ["a", "b"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_subgraph_that_is_a_node_is_a_step_with_steps(kind: str) -> None:
    """A compiled graph as a node: its nodes are children, LangGraph finds it, and its updates stream."""
    guard = guard_of()
    graph = attach(chain(sub=attach(line(), guard).compile()), guard).compile()
    assert call(graph, kind, {"text": "a b"})["total"] == 2
    assert lines_of(guard) == ["sub success", "  split success", "  count success"]
    assert [name for name, _ in graph.get_subgraphs()] == ["sub"]
    parts = list(graph.stream({"text": "a"}, stream_mode="updates", subgraphs=True))
    assert [list(update) for _, update in parts] == [["split"], ["count"], ["sub"]]


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_waits_and_goes_on_under_the_checkpointer_of_the_graph(kind: str) -> None:
    """interrupt() and Command(resume=...) pass untouched; the run is SUSPENDED, nothing is retried."""

    def ask(state: State) -> Any:
        calls.append(1)
        return {"words": [interrupt("which word?")]}

    def build(guarded: Any) -> Any:
        return guarded(line(ask)).compile(checkpointer=InMemorySaver())

    guard, seen = guard_of(), []
    answers = []
    for guarded in (lambda b: b, lambda b: attach(b, guard, {"split": (Text, Words)})):
        calls: list[int] = []
        graph, config = build(guarded), {"configurable": {"thread_id": "1"}}
        call(graph, kind, {"text": "a"}, config)
        seen.append([i.value for i in graph.get_state(config).tasks[0].interrupts])
        if guarded.__code__.co_names:
            assert result_of(guard).status is RunStatus.SUSPENDED
            assert result_of(guard).suspended == ["which word?"]
            assert guard.stopped is None
        answers.append(call(graph, kind, Command(resume="this one"), config))
        assert len(calls) == 2
    assert seen == [["which word?"], ["which word?"]]
    assert answers[0] == answers[1]
    assert answers[0]["words"] == ["this one"]
    assert result_of(guard).status is RunStatus.COMPLETED


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_commands_and_sends_steer_as_they_did(kind: str) -> None:
    """Command(goto, update), Send with its own input, Command to a parent; contracts see the updates."""

    def start(state: State) -> Any:
        sends = [Send("count", {"words": ["x"] * n}) for n in (1, 2)]
        return Command(update={"words": ["start"]}, goto=sends)

    def fork(state: State) -> Any:
        return {"words": [str(len(state["words"]))]}

    def build(guarded: Any) -> Any:
        builder = StateGraph(State)
        builder.add_node("split", start, destinations=("count",))
        builder.add_node("count", fork)
        builder.add_edge(START, "split")
        return guarded(builder).compile()

    guard = guard_of()
    plain = call(build(lambda b: b), kind, {"text": "a"})
    contracts = {"split": (Text, Words), "count": (Words, Words)}
    guarded = call(build(lambda b: attach(b, guard, contracts)), kind, {"text": "a"})
    assert plain == guarded
    assert sorted(guarded["words"]) == ["1", "2", "start"]
    assert sorted(lines_of(guard)) == ["count success", "count success", "split success"]


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_a_handoff_to_the_parent_graph_is_a_success_of_both(kind: str) -> None:
    """Command(graph=PARENT) is an exception inside LangGraph: it passes once, as a return."""
    calls: list[int] = []

    def leave(state: State) -> Any:
        calls.append(1)
        return Command(graph=Command.PARENT, goto="count", update={"words": ["from below"]})

    def build(guarded: Any) -> Any:
        builder = StateGraph(State)
        builder.add_node("sub", guarded(chain(leave=leave)).compile(), destinations=("count",))
        builder.add_node("count", count)
        builder.add_edge(START, "sub")
        return guarded(builder).compile()

    guard = guard_of()
    plain = call(build(lambda b: b), kind, {"text": "a"})
    assert call(build(lambda b: attach(b, guard)), kind, {"text": "a"}) == plain
    assert plain["total"] == 1
    assert len(calls) == 2
    assert lines_of(guard) == ["sub success", "  leave success", "count success"]


def test_the_recursion_limit_is_not_retried() -> None:
    """A graph that goes round for ever stops once, inside another one too."""
    rounds: list[int] = []

    def around(state: State) -> Any:
        rounds.append(1)

    graph = chain(around=around).add_edge("around", "around").compile()
    builder = chain(sub=lambda state: graph.invoke(state, {"recursion_limit": 3}))
    with pytest.raises(GraphRecursionError):
        attach(builder, guard_of()).compile().invoke({"text": "a"})
    assert len(rounds) == 3


@pytest.mark.parametrize("kind", ["invoke", "ainvoke"])
def test_what_a_node_is_given_by_the_framework_reaches_it(kind: str) -> None:
    """Config, runtime context, the store's place and the stream writer are injected as without the guard."""
    got: list[Any] = []

    def node(
        state: State, config: RunnableConfig, runtime: Runtime[dict[str, str]], writer: StreamWriter
    ) -> Any:
        got.append((config["configurable"]["user"], runtime.context["who"], callable(writer)))
        return {"total": 1}

    builder = StateGraph(State, context_schema=dict)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    graph = attach(builder, guard_of()).compile()
    config = {"configurable": {"user": "u"}}

    answer = getattr(graph, kind)({"text": "a"}, config, context={"who": "me"})
    if kind == "ainvoke":
        asyncio.run(answer)
    assert got == [("u", "me", True)]


@holds("streams")
def test_streams_stream() -> None:
    """Tokens of a model, custom parts and updates come as they are made, in every mode, sync and async."""

    def node(state: State, writer: StreamWriter) -> Any:
        writer({"custom": 1})
        return {"words": [Script(answers=["answer 0"]).invoke("x").content]}

    def parts(graph: Any) -> Any:
        return [
            (mode, part if mode != "messages" else part[0].content)
            for mode, part in graph.stream({"text": "a"}, stream_mode=["custom", "messages", "updates"])
        ]

    guard = guard_of()
    graph = attach(chain(node=node), guard).compile()
    assert parts(graph) == parts(chain(node=node).compile())
    assert result_of(guard).total_tokens == 10
    stream = graph.stream({"text": "a"}, stream_mode="updates")
    next(stream)
    stream.close()
    assert result_of(guard).status is RunStatus.CANCELLED


def test_parallel_nodes_and_their_retry_policies() -> None:
    """Nodes side by side are steps side by side; LangGraph's own retry calls a step again."""
    calls: list[int] = []

    def flaky(state: State) -> Any:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionError
        return {"words": ["flaky"]}

    builder = StateGraph(State)
    policy = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False)
    builder.add_node("flaky", flaky, retry_policy=policy)
    builder.add_node("other", lambda state: {"words": ["other"]})
    builder.add_edge(START, "flaky")
    builder.add_edge(START, "other")
    guard = guard_of()
    assert sorted(attach(builder, guard).compile().invoke({"text": "a"})["words"]) == ["flaky", "other"]
    assert sorted(lines_of(guard)) == sorted(["flaky failure"] * 3 + ["flaky success", "other success"])


@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_a_graph_has_one_guard_and_one_set_of_contracts(when: str) -> None:
    """Attached before it is compiled, after it, or both, it is guarded once, and so is a copy with another
    config; another guard, and other contracts, are refused."""
    guard, contracts = guard_of(), {"split": (Text, Words)}
    graph = attach(line().compile() if when == "after" else line(), guard, contracts)
    if when == "twice":
        graph = attach(graph.compile(), guard)
    assert attach(graph, guard, contracts) is graph
    copy = (graph.compile() if when == "before" else graph).with_config({"tags": ["copy"]})
    assert type(copy).__name__ == "CompiledStateGraph"
    assert copy.invoke({"text": "a b"})["total"] == 2
    assert lines_of(guard) == ["split success", "count success"]
    with pytest.raises(ValueError, match="another guard"):
        attach(graph, guard_of())
    for others in ({"split": (Text, Text)}, {"count": (Words, Total)}):
        with pytest.raises(ValueError, match="already attached to this guard, with another contract or"):
            attach(graph, guard, others)


def fresh() -> Any:
    """A function that no other test has marked."""
    return lambda state: split(state)


SPLIT = NodeContract(node_id="splitter", input_schema=Text, output_schema=Words)


@pytest.mark.parametrize(
    ("kind", "asynchronous"), [(kind, False) for kind in KINDS] + [("ainvoke", True), ("astream", True)]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_code_against_the_published_names_works(kind: str, when: str, asynchronous: bool) -> None:
    """LangGraphAdapter(registry).wrap(graph) and the decorator: on real graphs, whatever key a node has."""
    bad: list[bool] = []

    @stroma_langgraph_node("splitter", SPLIT)
    async def anode(state: State) -> Any:
        return {"words": 7} if bad else {"words": state["text"].split()}

    @stroma_langgraph_node("splitter", SPLIT)
    def node(state: State) -> Any:
        return {"words": 7} if bad else {"words": state["text"].split()}

    adapter = LangGraphAdapter(ContractRegistry(), StromaRunner.quick(policy_map=AT_ONCE))
    assert isinstance(adapter, FrameworkAdapter)
    builder = line(anode if asynchronous else node)
    graph = adapter.wrap(builder).compile() if when == "before" else adapter.wrap(builder.compile())
    assert call(graph, kind, {"text": "a b"})["total"] == 2
    bad.append(True)
    with pytest.raises(ContractViolation) as caught:
        call(graph, kind, {"text": "a b"})
    assert caught.value.node_id == "splitter"
    assert lines_of(adapter.guard) == ["splitter failure"]


def test_the_registry_of_the_adapter_wins_over_the_marker() -> None:
    registry = ContractRegistry()
    registry.register(NodeContract(node_id="splitter", input_schema=Total, output_schema=Words))
    graph = LangGraphAdapter(registry).wrap(line(stroma_langgraph_node("splitter", SPLIT)(fresh()))).compile()
    with pytest.raises(ContractViolation, match="total"):
        graph.invoke({"text": "a"})


def test_a_graph_without_marked_nodes_is_an_error() -> None:
    adapter = LangGraphAdapter(ContractRegistry())
    with pytest.raises(ValueError, match="stroma_langgraph_node"):
        adapter.wrap(line().compile())
    assert adapter.node_decorator("splitter", SPLIT)(fresh())._stroma_node_id == "splitter"


@holds("control flow")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_tasks_of_the_functional_api_are_steps(asynchronous: bool) -> None:
    """A function guarded below @task is a step, tried again there; interrupts and checkpointer stay."""
    guard, calls = guard_of(), []

    def work(text: str) -> int:
        calls.append(text)
        if len(calls) == 1:
            raise TimeoutError("slow")
        return len(text)

    async def awork(text: str) -> int:
        return work(text)

    counting: Any = task(guard.wrap("count", awork if asynchronous else work))

    def whole(text: str) -> Any:
        return [counting(text).result(), interrupt("right?")]

    async def awhole(text: str) -> Any:
        return [await counting(text), interrupt("right?")]

    graph: Any = entrypoint(checkpointer=InMemorySaver())(awhole if asynchronous else whole)
    config: Any = {"configurable": {"thread_id": "t"}}

    def ask(value: Any) -> Any:
        with guard.run():
            return asyncio.run(graph.ainvoke(value, config)) if asynchronous else graph.invoke(value, config)

    assert [one.value for one in ask("four")["__interrupt__"]] == ["right?"]
    assert lines_of(guard) == ["count failure", "count success"]
    assert ask(Command(resume="yes")) == [4, "yes"]
    assert calls == ["four", "four"], "the checkpointer of the graph has what its task returned"
    assert result_of(guard).status is RunStatus.COMPLETED


def test_an_entrypoint_is_not_attached_in_silence() -> None:
    """It counts its tasks as it runs, and cannot be called again: the error says where the guard goes."""

    @entrypoint()
    def whole(text: str) -> str:
        return text

    with pytest.raises(ValueError, match=r"below @task: task\(guard.wrap"):
        attach(whole, guard_of())


def asks(question: str) -> Any:
    def ask(state: State) -> Any:
        return {"words": [interrupt(question)]}

    return ask


def resumable(folder: Path) -> Guard:
    budget = ExecutionBudget(max_tokens_total=25)
    return guard_of(
        store=str(folder / "r.db"), run_id="r", resume=True, budget=budget, classifiers=[terminal]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_goes_on_under_one_run_id(kind: str, tmp_path: Path) -> None:
    """``Command(resume=...)`` and ``invoke(None)`` continue the run and its budget under ``resume=True``."""

    def tired(state: State) -> Any:
        Script(answers=["x"]).invoke("x")
        if not failed:
            failed.append(1)
            raise PermissionError("no")
        return {"total": len(state["words"])}

    failed: list[int] = []
    saver, config = InMemorySaver(), {"configurable": {"thread_id": "1"}}

    def graph_of(guard: Guard) -> Any:
        return attach(line(asks("which?"), tired), guard).compile(checkpointer=saver)

    guards = [resumable(tmp_path) for _ in range(4)]
    call(graph_of(guards[0]), kind, {"text": "a"}, config)
    assert result_of(guards[0]).status is RunStatus.SUSPENDED
    with pytest.raises(PermissionError):
        call(graph_of(guards[1]), kind, Command(resume="this"), config)
    assert call(graph_of(guards[2]), kind, None, config)["total"] == 1
    assert (result_of(guards[2]).status, result_of(guards[2]).total_tokens) == (RunStatus.RESUMED, 10)
    with pytest.raises(BudgetExceeded) as caught:
        call(graph_of(guards[3]), kind, Command(update={"words": ["b"]}, goto="count"), config)
    assert caught.value.actual == 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["interrupt_before", "interrupt_after"])
def test_an_interrupt_before_or_after_a_node_is_suspended(kind: str, where: str) -> None:
    """Waiting for a person is SUSPENDED, whichever way LangGraph says it; ``invoke(None)`` goes on."""
    node = "count" if where == "interrupt_before" else "split"
    guard, config = guard_of(), {"configurable": {"thread_id": "1"}}
    graph = attach(line(), guard).compile(checkpointer=InMemorySaver(), **{where: [node]})
    call(graph, kind, {"text": "a b"}, config)
    assert (result_of(guard).status, result_of(guard).suspended) == (RunStatus.SUSPENDED, ["before 'count'"])
    assert call(graph, kind, None, config)["total"] == 2
    assert result_of(guard).status is RunStatus.COMPLETED
    assert lines_of(guard) == ["count success"]


def test_nodes_that_are_added_after_attach_are_guarded() -> None:
    """What is added to a graph later is a step like the others when it is compiled."""
    guard = guard_of()
    builder = attach(line(), guard)
    builder.add_node("later", lambda state: {"total": 7})
    builder.add_edge("count", "later")
    assert builder.compile().invoke({"text": "a b"})["total"] == 7
    assert lines_of(guard) == ["split success", "count success", "later success"]


def test_marked_nodes_that_are_added_after_wrap_are_guarded() -> None:
    """The same for the published adapter, whose other nodes stay as they are."""
    adapter = LangGraphAdapter(ContractRegistry(), StromaRunner.quick(policy_map=AT_ONCE))
    builder = adapter.wrap(line(stroma_langgraph_node("splitter", SPLIT)(fresh())))
    later = NodeContract(node_id="late", input_schema=Words, output_schema=Total)
    builder.add_node("later", stroma_langgraph_node("late", later)(lambda state: {"total": 7}))
    builder.add_edge("count", "later")
    assert builder.compile().invoke({"text": "a b"})["total"] == 7
    assert lines_of(adapter.guard) == ["splitter success", "late success"]


def test_a_graph_is_drawn_as_without_the_guard() -> None:
    """It has the same nodes and subgraphs, also where a node is an object with every attribute."""

    def build(guarded: Any) -> Any:
        builder = chain(
            sub=chain(inner=split).compile(),
            model=Script(answers=[]),
            mock=MagicMock(__name__="mock"),
            chain=RunnablePassthrough.assign(total=lambda state: 1),
        )
        return guarded(builder.compile())

    plain, guarded = build(lambda g: g), build(lambda g: attach(g, guard_of()))
    for xray in (False, True):
        graphs = [graph.get_graph(xray=xray) for graph in (plain, guarded)]
        assert graphs[0].draw_mermaid() == graphs[1].draw_mermaid()


def test_a_guard_is_freed_with_its_graph() -> None:
    """Nothing in the process holds a guard, or what its last run has raised, once its graph is gone."""
    guard = guard_of()
    attach(line(), guard).compile().invoke({"text": "a"})
    freed = weakref.ref(guard)
    del guard
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_may_be_a_list(kind: str) -> None:
    """A graph's state need not be a dict: nodes return lists, values, or commands among them."""

    def build(guarded: Any) -> Any:
        nodes = {"a": lambda state: ["x"], "b": lambda state: [Command(update=["y"]), ["z"]]}
        return guarded(chain(Annotated[list, operator.add], **nodes)).compile()

    guard = guard_of()
    plain = call(build(lambda b: b), kind, [])
    assert call(build(lambda b: attach(b, guard)), kind, []) == plain == ["x", "y", "z"]
    assert lines_of(guard) == ["a success", "b success"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_models_that_edges_call_are_counted(kind: str, when: str) -> None:
    """A model that routes is called in no node: its tokens count, and the budget stops it."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=35))
    llm, calls = Script(answers=["x"] * 9), list[str]()

    def route(state: State) -> str:
        calls.append(llm.invoke("where?").content)
        return "again"

    async def aroute(state: State) -> str:
        calls.append((await llm.ainvoke("where?")).content)
        return "again"

    builder = chain(again=lambda state: {"words": [str(llm.invoke("x").content)]})
    builder.add_conditional_edges("again", aroute if kind.startswith("a") else route, ["again"])
    if when == "before":
        graph = attach(builder, guard).compile()
    else:
        graph = attach(builder.compile(), guard)
    with pytest.raises(BudgetExceeded) as caught:
        call(graph, kind, {"text": "a"})
    assert (caught.value.actual, len(calls)) == (40, 2)
    assert result_of(guard).total_tokens == 40
    assert result_of(guard).total_cost_usd > 0
    assert result_of(guard).status is RunStatus.PARTIAL


@pytest.mark.skipif(
    "error_handler" not in inspect.signature(StateGraph.add_node).parameters, reason="new in LangGraph 1.2"
)
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_error_handlers_call_are_counted(kind: str) -> None:
    """The handler of a node's errors is no step, and its tokens count in the run."""
    guard, llm = guard_of(policy_map={}), Script(answers=["x"])

    def fails(state: State) -> Any:
        raise ValueError("no")

    options: Any = {"error_handler": lambda state: {"words": [str(llm.invoke("x").content)]}}
    builder = StateGraph(State)
    builder.add_node("fails", fails, **options)
    builder.add_edge(START, "fails")
    call(attach(builder.compile(), guard), kind, {"text": "a"})
    assert result_of(guard).total_tokens == 10


@pytest.mark.parametrize("kind", KINDS)
def test_all_spend_is_that_of_the_provider_s_ledger(kind: str) -> None:
    """Parallel nodes, a subgraph, a router, a threaded model, failed attempts: to the token."""
    guard, llms = guard_of(), [Script(answers=["x"] * 9, tokens=tokens) for tokens in (3, 5, 7, 11, 13)]
    failures = [TimeoutError()]

    def asking(llm: Any) -> Any:
        return lambda state: {"words": [str(llm.invoke("x").content)]}

    sub = chain(inner=asking(llms[0])).compile()

    def calls_sub(state: State) -> Any:
        llms[1].invoke("y")
        answer = sub.invoke({"text": "x"})
        if failures:
            raise failures.pop()
        return {"words": answer["words"]}

    def thread(state: State) -> Any:
        with ThreadPoolExecutor() as pool:
            context = contextvars.copy_context()
            return {"words": [str(pool.submit(context.run, llms[3].invoke, "x").result().content)]}

    def route(state: State) -> str:
        llms[4].invoke("where?")
        return "last"

    builder = StateGraph(State)
    for name, node in {"sub": sub, "calls": calls_sub, "b": thread, "last": asking(llms[2])}.items():
        builder.add_node(name, node)
    for name in ("sub", "calls", "b"):
        builder.add_edge(START, name)
    builder.add_conditional_edges("b", route, ["last"])
    call(attach(builder, guard).compile(), kind, {"text": "a"})
    ledger = sum(llm.tokens * len(llm.asked) for llm in llms)
    assert result_of(guard).total_tokens == ledger == 3 * 3 + 2 * 5 + 7 + 11 + 13
    assert {"calls failure 8", "calls success 8"} <= set(lines_of(guard))


def test_fifty_runs_at_once_are_counted_apart() -> None:
    """Each run of fifty at the same time has its own spend, as the provider charged it."""
    guard = guard_of()

    async def one(n: int) -> None:
        llm = Script(answers=["x"] * 2, tokens=n + 1)

        async def asks(state: State) -> Any:
            return {"words": [str((await llm.ainvoke("x")).content)]}

        async with guard.run() as run:
            await attach(line(asks, asks), guard).compile().ainvoke({"text": "a"})
        assert run.result.total_tokens == llm.tokens * len(llm.asked) == 2 * (n + 1)

    fifty_at_once(one)
