"""A turn of an agent that calls three tools, fails after one took effect, and is tried again as a whole."""

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import THRICE

from stroma import NotDone, RunStatus, SQLiteStore, StromaRunner, current_node, current_run, execute_step

TOOLS = ("refund", "mark", "notify")


class Order(BaseModel):
    number: int


class Done(BaseModel):
    tool: str


class Provider:
    """Other people's systems, whose books survive the process. They know nothing of idempotency.

    ``deadly``: the (tool, order) whose first call takes effect and is never answered: it times out, or the
        process dies.
    """

    def __init__(self, books: Path, deadly: set[tuple[str, int]], *, kills: bool) -> None:
        self._books, self._deadly, self._kills = books, deadly, kills

    def entries(self) -> Counter[str]:
        """Return how often each call took effect, by tool and idempotency key."""
        return Counter(self._books.read_text().split()) if self._books.exists() else Counter()

    async def call(self, tool: str, order: int, key: str) -> dict[str, str]:
        with self._books.open("a") as file:
            file.write(f"{tool}@{key}\n")
        if (tool, order) in self._deadly and self.entries()[f"{tool}@{key}"] == 1:
            if self._kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise TimeoutError("no answer")
        return {"tool": tool}


def agent(store: Any, provider: Provider) -> tuple[StromaRunner, Any]:
    """Return a runner, and a node whose turn calls the tools one after the other."""
    runner = StromaRunner.quick(store=store, policy_map=THRICE)

    def tool(name: str) -> Any:
        async def call(order: Order) -> dict[str, str]:
            here = current_node()
            return await provider.call(name, order.number, here.idempotency_key)

        async def look(order: Order, key: str) -> Any:
            return {"tool": name} if provider.entries()[f"{name}@{key}"] else NotDone()

        return runner.node(name, input=Order, output=Done, effect=True, reconcile=look)(call)

    tools = {name: tool(name) for name in TOOLS}
    turns: Counter[int] = Counter()

    @runner.node("turn", input=Order, output=Done)
    async def turn(order: Order) -> Done:
        run = current_run()
        assert run is not None
        for name, function in tools.items():
            await execute_step(name, function, order, run)
        turns[order.number] += 1
        if turns[order.number] == 1:
            raise ConnectionResetError("the model's provider hung up at the end of the turn")
        return Done(tool="all")

    return runner, turn


async def test_a_turn_that_is_tried_again_repeats_no_tool_that_took_effect(tmp_path: Path) -> None:
    """G13. Of 200 turns whose tools time out after taking effect, and are tried again, none acts twice."""
    draw = random.Random(1)
    deadly = {(tool, number) for number in range(200) for tool in TOOLS if draw.random() < 0.5}
    provider = Provider(tmp_path / "books", deadly, kills=False)
    with SQLiteStore(tmp_path / "runs.db", synchronous="normal") as store:
        runner, turn = agent(store, provider)
        for number in range(200):
            result = await runner.run([turn], Order(number=number), run_id=f"order-{number}")
            assert result.status is RunStatus.COMPLETED
    entries = provider.entries()
    assert len(entries) == 200 * len(TOOLS)
    assert set(entries.values()) == {1}, "0 duplicates, and nothing is lost"


@pytest.mark.slow
def test_a_turn_of_a_killed_process_repeats_no_tool_that_took_effect(tmp_path: Path) -> None:
    """G13. Of 9 turns whose process is killed after a tool acted and before it answered, none acts twice."""
    deadly = {(TOOLS[number % 3], number) for number in range(9)}
    provider = Provider(tmp_path / "books", deadly, kills=True)

    def process() -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 1
        try:
            asyncio.run(turns())
            code = 0
        finally:
            os._exit(code)

    async def turns() -> None:
        with SQLiteStore(tmp_path / "runs.db") as store:
            runner, turn = agent(store, provider)
            for number in range(9):
                run_id = f"order-{number}"
                result = await runner.run([turn], Order(number=number), run_id=run_id, if_exists="return")
                assert result.status in (RunStatus.COMPLETED, RunStatus.RESUMED), result

    codes = [process() for _ in range(10)]
    assert codes == [-signal.SIGKILL] * 9 + [0]
    entries = provider.entries()
    assert len(entries) == 9 * len(TOOLS)
    assert set(entries.values()) == {1}, "0 duplicates, and nothing is lost"
