"""A realistic durable graph of LangGraph, killed at random records: in one process, and with SIGKILL in
many."""

from __future__ import annotations

import asyncio
import operator
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, RemoveMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel
from tests.flows.program_world import Kills
from tests.frameworks.durable_kit import Bill, ledger_of, run_in_lives
from tests.kit import Num, retry_policies
from tests.shared_stores import store_of
from typing_extensions import TypedDict

from stroma import (
    Flow,
    InMemoryStore,
    NotDone,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    current_node,
    stroma_flow,
)
from stroma.adapters.langgraph import InterruptAnswer, durable
from stroma.engine.interceptors import INTERCEPTORS

ROUNDS = int(os.environ.get("STROMA_PROGRAMS", "6"))


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
    """A loop of a plan, searches sent side by side and a subgraph; then a charge that somebody approves, and
    an answer."""

    def note(self, call: str) -> None:
        """Note a call that is paid for."""
        self.calls.append(call)
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
            self.note(f"read {state['topic']}")
            return {"notes": [state["topic"]]}

        def sum_up(state: Part) -> Any:
            self.note(f"sum up {state['topic']}")
            return Command(
                graph=Command.PARENT,
                goto="tidy",
                update={"findings": [Finding(text=state["topic"], tags={"a", "b"})]},
            )

        builder = StateGraph(Part)
        builder.add_sequence([read, sum_up])
        builder.add_edge(START, "read")
        return builder.compile()

    async def plan(self, state: State) -> Any:
        self.note(f"plan {state['rounds']}")
        return {"messages": [("ai", f"plan {state['rounds']}")], "rounds": state["rounds"] + 1}

    def searches(self, state: State) -> Any:
        found: list[Any] = [Send("search", {"rounds": f"{state['rounds']}{side}"}) for side in "ab"]
        return [*found, Send("deepen", {"topic": f"topic {state['rounds']}", "notes": []})]

    async def search(self, state: Any) -> Any:
        self.note(f"search {state['rounds']}")
        await asyncio.sleep(0)
        return {"findings": [Finding(text=state["rounds"], tags={"x", "y", "z"})]}

    def tidy(self, state: State) -> Any:
        """Remove the plan, by the id that a reducer gave it."""
        self.calls.append(f"tidy {state['rounds']} {len(state['findings'])}")
        return {
            "messages": [RemoveMessage(str(state["messages"][-1].id)), AIMessage(f"round {state['rounds']}")]
        }

    def approve(self, state: State) -> Any:
        answer = interrupt({"charge": 500})
        return Command(goto="charge" if answer == "yes" else END)

    async def charge(self, state: State) -> Any:
        self.note("charge 500")
        self.charges[current_node().idempotency_key] = 500
        return {"paid": 500}

    def look(self, state: Any, key: str) -> Any:
        return {"paid": self.charges[key]} if key in self.charges else NotDone()

    def write(self, state: State) -> Any:
        self.note("write")
        return {"messages": [AIMessage("the end")]}


async def _approve(runner: StromaRunner, result: Any) -> None:
    for question in result.questions:
        await runner.signal("r", InterruptAnswer("yes"), question=question.id)


def _runner_on(store: Any) -> StromaRunner:
    return StromaRunner.quick(
        store=store,
        run_id="r",
        resume=True,
        max_recoveries=1000,
        if_running="take_over",
        policy_map=retry_policies(5),
    )


async def _undisturbed() -> tuple[Any, Research]:
    plain, store = Research(), InMemoryStore()
    result, _ = await run_in_lives(None, lambda: _runner_on(store), plain.flow(), Num(), _approve)
    assert result.final_state.paid == 500, result.failure
    return result, plain


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_killed_graph_ends_as_an_undisturbed_one(kind: str) -> None:
    """G5, G13: Killed at random records, the graph has the state and the bill that it has undisturbed; what
    was called again was in flight, and the charge is made once."""
    undisturbed, plain = await _undisturbed()
    assert plain.repeated() == 0
    total = 0
    for seed in range(ROUNDS):
        with store_of(kind) as opened:
            world, chance = Research(), random.Random(f"{kind} {seed}")
            result, deaths = await run_in_lives(
                chance,
                lambda opened=opened: _runner_on(opened),
                world.flow(),
                Num(),
                _approve,  # type: ignore[misc]
            )
            assert result.status in (RunStatus.COMPLETED, RunStatus.RESUMED), (seed, result.failure)
            assert result.final_state == undisturbed.final_state
            assert list(world.charges.values()) == [500]
            assert set(world.calls) == set(plain.calls)
            assert world.repeated() <= 3 * deaths  # Each death repeats at most what was in flight.
            recorded, attempted = ledger_of(opened)
            assert recorded == attempted >= undisturbed.total_tokens
            total += deaths
    assert total


class _Filed(Research):
    """Its bill is in files, so that it outlives the process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.calls, self.charges = _Lines(folder / "calls"), _Booked(folder / "charges")


class _Lines(list[str]):
    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path.read_text("utf-8").splitlines() if path.exists() else ())

    def append(self, line: str) -> None:
        super().append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class _Booked(dict[str, int]):
    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(line.rsplit(" ", 1) for line in _Lines(path))  # type: ignore[misc]

    def __setitem__(self, key: str, cents: int) -> None:
        super().__setitem__(key, cents)
        _Lines(self.path).append(f"{key} {cents}")


async def live(folder: str, seed: str, life: str) -> None:
    """One life of a process: run the flow, or resume it, until it ends or kills itself."""
    kills = Kills(random.Random(f"{seed} {life}"), kill=True) if int(life) < 12 else None
    if kills is not None:
        INTERCEPTORS.insert(0, kills)
    world = _Filed(Path(folder))
    with SQLiteStore(Path(folder, "runs.db")) as store:
        runner = _runner_on(store)
        result: Any = await runner.run(world.flow(), Num())
        if result.status == RunStatus.SUSPENDED:
            await _approve(runner, result)
            result = await runner.run(world.flow(), Num())
    Path(folder, "answer").write_text(result.output.model_dump_json(), "utf-8")


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_graphs_survive_sigkill(tmp_path: Path) -> None:
    """G5, G13: The same for processes that are killed with SIGKILL, with another order of sets in each."""
    undisturbed, plain = await _undisturbed()
    program = (
        "import asyncio, sys; from tests.frameworks.langgraph.test_durable_kills import live; "
        "asyncio.run(live(*sys.argv[1:]))"
    )
    total = 0
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for life in range(30):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program, str(folder), str(seed), str(life)],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
                cwd=Path(__file__).parents[3],
                env={**os.environ, "PYTHONHASHSEED": str(life)},
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            total += 1
        bill = _Filed(folder)
        assert Report.model_validate_json((folder / "answer").read_text("utf-8")) == undisturbed.final_state
        assert list(bill.charges.values()) == ["500"]
        assert set(bill.calls) == set(plain.calls)
        assert bill.repeated() <= 3 * life
    assert total
