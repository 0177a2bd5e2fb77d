"""Durable agents of the OpenAI Agents SDK, killed at random records: in one process, and with SIGKILL."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, function_tool, set_tracing_disabled
from pydantic import BaseModel
from tests.docs.blocks import ROOT, blocks
from tests.flows.program_world import Kills
from tests.frameworks.durable_kit import Bill, ledger_of, run_in_lives
from tests.frameworks.kit import answer
from tests.frameworks.openai_agents.test_durable_agents import Fake, asks, outputs_of, says
from tests.kit import Num, retry_policies
from tests.shared_stores import store_of

from stroma import Flow, NotDone, RunStatus, SQLiteStore, StromaRunner, current_node, stroma_flow
from stroma.adapters.openai_agents import DurableRunner, ToolApproval
from stroma.engine.interceptors import INTERCEPTORS

set_tracing_disabled(True)
#: The last life in which a process may be killed.
LAST_DEATH = 12


class Report(BaseModel):
    text: str
    tokens: int
    items: int


class Research(Bill):
    """Thirteen requests: searches in parallel, an agent as a tool, a charge that needs approval, and a
    handoff to who answers.

    ``side``: a file that outlives the process.
    """

    def __init__(self, *, streamed: bool, side: Path | None = None) -> None:
        super().__init__()
        self.streamed, self.side = streamed, side
        if side is not None and side.exists():
            for line in side.read_text("utf-8").splitlines():
                what, _, key = line.partition("|")
                self._note(what, key)

    def pay(self, what: str, key: str = "") -> None:
        """Note a call, also for other processes; with the key of a charge."""
        self._note(what, key)
        if self.side is not None:
            with self.side.open("a", encoding="utf-8") as file:
                file.write(f"{what}|{key}\n")

    def _note(self, what: str, key: str) -> None:
        self.calls.append(what)
        if key:
            self.charges[key] = 500

    def flow(self) -> Any:
        @function_tool
        async def search(what: str) -> str:
            self.pay(f"search {what}")
            return f"found {what}"

        @function_tool
        def look_up(topic: str) -> str:
            self.pay(f"look up {topic}")
            return topic

        @function_tool(needs_approval=True)
        async def charge(cents: int) -> int:
            self.pay(f"charge {cents}", current_node().idempotency_key)
            return cents

        writer: Agent[Any] = Agent(name="writer", model=Fake(self._write), tools=[look_up])
        closer: Agent[Any] = Agent(name="closer", model=Fake(self._close))
        lead: Agent[Any] = Agent(
            name="lead",
            model=Fake(self._lead),
            tools=[search, charge, writer.as_tool("write", "Write.")],
            handoffs=[closer],
        )
        runner = DurableRunner(
            tools={"charge": {"effect": True, "reconcile": lambda _, key: self.charges.get(key, NotDone())}}
        )

        @stroma_flow("research", input=Num, output=Report)
        async def research(flow: Flow, state: Num) -> Report:
            result: Any
            if self.streamed:
                result = runner.run_streamed(lead, f"go {state.n}", max_turns=20)
                async for _ in result.stream_events():
                    pass
            else:
                result = await runner.run(lead, f"go {state.n}", max_turns=20)
            tokens = result.context_wrapper.usage.total_tokens
            return Report(text=result.final_output, tokens=tokens, items=len(result.new_items))

        return research

    def _lead(self, items: Any) -> list[Any]:
        done = len(outputs_of(items))
        self.pay(f"lead {done}")
        if done < 10:
            return asks(*(("search", {"what": f"{done}{side}"}, f"s{done}{side}") for side in "ab"))
        if done == 10:
            return asks(*(("write", {"input": topic}, f"w{topic}") for topic in ("one", "two")))
        return asks(("charge", {"cents": 500}, "c")) if done == 12 else asks(("transfer_to_closer", {}, "h"))

    def _write(self, items: Any) -> list[Any]:
        topic = items[0]["content"] if isinstance(items, list) else items
        self.pay(f"writer {topic} {len(outputs_of(items))}")
        return says(f"{topic} written") if outputs_of(items) else asks(("look_up", {"topic": topic}, topic))

    def _close(self, items: Any) -> list[Any]:
        self.pay("closer")
        return says(f"the end of {len(outputs_of(items))}")


async def _approve(runner: StromaRunner, result: Any) -> None:
    for question in result.questions:
        await runner.signal("r", ToolApproval(approved=True), question=question.id)


def _runner_on(store: Any) -> StromaRunner:
    return StromaRunner.quick(
        store=store,
        run_id="r",
        resume=True,
        max_recoveries=1000,
        if_running="take_over",
        policy_map=retry_policies(5),
    )


async def _undisturbed(streamed: bool) -> tuple[Research, Any]:
    world = Research(streamed=streamed)
    with store_of("memory") as store:
        result, _ = await run_in_lives(None, lambda: _runner_on(store), world.flow(), Num(), _approve)
    assert world.repeated() == 0
    assert len([call for call in world.calls if call.startswith(("lead", "writer", "closer"))]) == 13
    return world, result


def _check(world: Research, result: Any, store: Any, plain: tuple[Research, Any]) -> None:
    """Raise AssertionError unless a killed agent has the answer and the bill of an undisturbed one."""
    assert result.status in (RunStatus.COMPLETED, RunStatus.RESUMED), result.failure
    assert result.final_state == plain[1].final_state
    assert list(world.charges.values()) == [500]
    assert set(world.calls) == set(plain[0].calls)
    recorded, attempted = ledger_of(store)
    assert recorded == attempted >= plain[1].final_state.tokens


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_killed_agents_end_as_undisturbed_ones(kind: str, streamed: bool) -> None:
    """G5, G13: Killed at random records, the agents have the answer, the items and the bill that they have
    undisturbed; what was called again was in flight, and the charge is made once."""
    plain, total = await _undisturbed(streamed), 0
    for seed in range(int(os.environ.get("STROMA_PROGRAMS", "4"))):
        with store_of(kind) as store:
            world, chance = Research(streamed=streamed), random.Random(f"{kind} {seed}")
            result, deaths = await run_in_lives(
                chance,
                lambda store=store: _runner_on(store),
                world.flow(),
                Num(),
                _approve,  # type: ignore[misc]
            )
            _check(world, result, store, plain)
            # Each death repeats at most what was in flight: two searches, or two writers.
            assert world.repeated() <= 2 * deaths
            total += deaths
    assert total


def live(folder: str, seed: str, life: str) -> None:
    """One life of a process that runs the agents, and may kill itself at a random record."""
    if int(life) < LAST_DEATH:
        INTERCEPTORS.insert(0, Kills(random.Random(f"{seed} {life}"), kill=True))

    async def main(store: SQLiteStore) -> None:
        world = Research(streamed=int(seed) % 2 == 1, side=Path(folder, "paid"))
        result, _ = await run_in_lives(None, lambda: _runner_on(store), world.flow(), Num(), _approve)
        INTERCEPTORS.clear()
        plain = await _undisturbed(world.streamed)
        _check(world, result, store, plain)
        answer(folder, f"{world.repeated()}")

    with SQLiteStore(Path(folder, "r.db")) as store:
        asyncio.run(main(store))


def _lives(function: str, folder: Path, seed: int) -> int:
    """Call a function of this module in one process after the other, until one ends by itself. Return how
    many were killed."""
    program = f"import sys; from {__name__} import {function}; {function}(*sys.argv[1:])"
    for life in range(LAST_DEATH + 1):
        command = [sys.executable, "-W", "ignore", "-c", program, str(folder), str(seed), str(life)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, cwd=ROOT)
        if done.returncode == 0:
            return life
        assert done.returncode == -signal.SIGKILL, (seed, life, done.returncode, done.stderr)
    raise AssertionError("the agents do not end")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_agents_survive_sigkill(seed: int, tmp_path: Path) -> None:
    """G5, G13: The same for processes that are killed with SIGKILL, over SQLite."""
    deaths = _lives("live", tmp_path, seed)
    assert int((tmp_path / "answer").read_text("utf-8")) <= 2 * deaths


def live_of_page(folder: str, seed: str, life: str) -> None:
    """One life of the flow of the page, in a folder."""
    os.chdir(folder)
    ((_, code),) = [block for block in blocks(PAGE.read_text("utf-8")) if "DurableRunner" in block[1]]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code.replace("asyncio.run(main())", ""), str(PAGE), "exec"), names)
    kills = Kills(random.Random(), kill=True)
    kills.left = int(seed) * (int(life) + 1)
    INTERCEPTORS.insert(0, kills)

    async def main() -> str:
        while True:
            runner = StromaRunner.quick(
                store="sqlite:///tickets.db",
                run_id="r",
                resume=True,
                if_running="take_over",
                max_recoveries=1000,
            )
            result = await runner.run(names["support"], names["Ticket"](text="a refund, please"))
            if not result.suspended:
                return str(result.output.text)
            await _approve(runner, result)

    answer(folder, asyncio.run(main()))


PAGE = ROOT / "docs" / "adapters" / "openai_agents.md"


@pytest.mark.timeout(300)
def test_the_example_of_the_page_survives_sigkill(tmp_path: Path) -> None:
    """The flow that the page shows ends with the answer that it shows, whatever its processes die of."""
    assert _lives("live_of_page", tmp_path, 3) > 0
    assert (tmp_path / "answer").read_text("utf-8") in PAGE.read_text("utf-8")
