"""A realistic durable graph of LangGraph, killed at random records: in one process or many."""

import asyncio
import operator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, RemoveMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel
from tests.frameworks.durable_kit import (
    KINDS,
    Bill,
    approve_with,
    kill_at_random_records,
    kill_workers,
    live,
    run_lives,
)
from tests.kit import Num
from tests.shared_stores import SHARED
from typing_extensions import TypedDict

from stroma import Flow, NotDone, current_node, stroma_flow
from stroma.adapters.langgraph import InterruptAnswer, durable


class Finding(BaseModel):
    text: str
    tags: set[str]


class State(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    findings: Annotated[list[Finding], operator.add]
    rounds: int
    paid: int


class Part(TypedDict, total=False):
    topic: str
    notes: Annotated[list[str], operator.add]


class Report(BaseModel):
    text: list[str]
    paid: int


class Research(Bill):
    """A loop of a plan, parallel searches and a subgraph; then an approved charge, and an answer."""

    def pay(self, what: str, key: str = "") -> None:
        """Note a call, and use some tokens in the step here."""
        super().pay(what, key)
        current_node().report_usage(input_tokens=7)

    def flow(self) -> Any:
        graph = self.graph()

        @stroma_flow("research", input=Num, output=Report)
        async def research(flow: Flow, state: Num) -> Report:
            given: Any = {"messages": [{"role": "user", "content": "go"}], "rounds": 0}
            states = [state async for state in graph.astream(given, stream_mode="values")]
            result: Any = states[-1]
            texts = [f"{one.type} {one.content}" for one in result["messages"]]
            found = [f"{one.text} {sorted(one.tags)}" for one in result["findings"]]
            return Report(text=texts + found, paid=result["paid"])

        return research

    def graph(self) -> Any:
        builder = StateGraph(State)
        for node in (self.plan, self.search, self.tidy, self.approve, self.charge, self.write):
            builder.add_node(node.__name__, node)
        builder.add_node("deepen", self.part())
        builder.add_edge(START, "plan")
        builder.add_conditional_edges("plan", self.searches)
        builder.add_edge("search", "tidy")
        builder.add_edge("deepen", "tidy")
        builder.add_conditional_edges("tidy", lambda state: "plan" if state["rounds"] < 3 else "approve")
        builder.add_edge("charge", "write")
        return durable(
            builder.compile(), {"charge": {"effect": True, "reconcile": self.look}, "approve": False}
        )

    def part(self) -> Any:
        async def read(state: Part) -> Any:
            self.pay(f"read {state['topic']}")
            return {"notes": [state["topic"]]}

        def sum_up(state: Part) -> Any:
            self.pay(f"sum up {state['topic']}")
            update = {"findings": [Finding(text=state["topic"], tags={"a", "b"})]}
            return Command(graph=Command.PARENT, goto="tidy", update=update)

        builder = StateGraph(Part)
        builder.add_sequence([read, sum_up])
        builder.add_edge(START, "read")
        return builder.compile()

    async def plan(self, state: State) -> Any:
        self.pay(f"plan {state['rounds']}")
        return {"messages": [("ai", f"plan {state['rounds']}")], "rounds": state["rounds"] + 1}

    def searches(self, state: State) -> Any:
        found: list[Any] = [Send("search", {"rounds": f"{state['rounds']}{side}"}) for side in "ab"]
        return [*found, Send("deepen", {"topic": f"topic {state['rounds']}", "notes": []})]

    async def search(self, state: Any) -> Any:
        self.pay(f"search {state['rounds']}")
        await asyncio.sleep(0)
        return {"findings": [Finding(text=state["rounds"], tags={"x", "y", "z"})]}

    def tidy(self, state: State) -> Any:
        """Remove the plan, by the id that a reducer gave it."""
        super().pay(f"tidy {state['rounds']} {len(state['findings'])}")
        return {
            "messages": [RemoveMessage(str(state["messages"][-1].id)), AIMessage(f"round {state['rounds']}")]
        }

    def approve(self, state: State) -> Any:
        answer = interrupt({"charge": 500})
        return Command(goto="charge" if answer == "yes" else END)

    async def charge(self, state: State) -> Any:
        self.pay("charge 500", current_node().idempotency_key)
        return {"paid": 500}

    def look(self, state: Any, key: str) -> Any:
        return {"paid": self.charges[key]} if key in self.charges else NotDone()

    def write(self, state: State) -> Any:
        self.pay("write")
        return {"messages": [AIMessage("the end")]}


approve = approve_with(InterruptAnswer("yes"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_graph_ends_as_an_undisturbed_one(kind: str) -> None:
    """G5, G13: Killed at random records, the graph has the state and bill of an undisturbed one."""
    await kill_at_random_records(kind, Research, approve, in_flight=3)


def live_on(folder: str, seed: str, life: str) -> None:
    """One life of a process that runs the graph."""
    asyncio.run(live(Research, approve, folder, seed, life))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_graphs_survive_sigkill(seed: int, tmp_path: Path) -> None:
    """G5, G13: The same for processes that are killed with SIGKILL, with another order of sets in each."""
    deaths = run_lives(live_on, tmp_path, seed)
    assert int((tmp_path / "answer").read_text("utf-8")) <= 3 * deaths


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", SHARED)
def test_workers_finish_the_graphs_of_killed_ones(kind: str) -> None:
    """G5, G13: A worker that is killed with SIGKILL is replaced, and no ended node is called again."""
    kill_workers(kind, Research, approve, in_flight=3)
