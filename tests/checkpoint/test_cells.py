"""What runs and processes share through a store, and what of it counts after a process was killed."""

import asyncio
import json
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit import Num, ended, read_line, start_python
from tests.limits.budget_machine import BudgetMachine, RateMachine
from tests.servers import proxied, shared_redis
from tests.servers_postgres import Proxy as PostgresProxy
from tests.servers_postgres import shared_postgres
from tests.shared_stores import DURABLE, SHARED, STORES, opened, place, store_of
from tests.store_suite.cells import CellStoreTests, count
from tests.tiers import SLOW_PARAMETERS, examples

from stroma import SharedBudget, StromaRunner, current_node, parallel, stroma_node
from stroma.checkpoint import CellStore, PostgresStore, RedisStore
from stroma.limits.reservations import ProcessCells
from stroma.limits.shared_budget import read_budget


@pytest.mark.core
class TestCells(CellStoreTests):
    """All that every store with cells must do."""

    @pytest.fixture(params=STORES)
    def store(self, request: pytest.FixtureRequest) -> Iterator[Any]:
        with store_of(request.param) as store:
            assert isinstance(store, CellStore)
            yield store


_COUNTER = textwrap.dedent(
    """
    import asyncio, sys
    from tests.shared_stores import opened
    from tests.store_suite.cells import count

    async def main():
        with opened(sys.argv[1], sys.argv[2]) as store:
            print("ready", flush=True)
            sys.stdin.readline()
            for _ in range(10):
                print(*await asyncio.gather(*(store.change_cell("n", count) for _ in range(5))), flush=True)

    asyncio.run(main())
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_processes_change_one_cell(kind: str) -> None:
    """Of 3 processes that change a cell 50 times each, every change builds on the one before."""
    with place(kind) as where:
        running = [start_python(kind, where, code=_COUNTER) for _ in range(3)]
        for process in running:
            assert read_line(process) == "ready"
        for process in running:  # All at once.
            process.stdin.write("\n")
            process.stdin.flush()
        events = [n for process in running for n in map(int, ended(process, timeout=90).split())]
        assert sorted(events) == list(range(1, 151))


@pytest.mark.slow
async def test_a_change_whose_answer_is_lost_on_redis() -> None:
    """A change that was done, and whose reply never came, is not done again."""
    server = shared_redis()
    server.execute("FLUSHALL")
    lost: list[bytes] = []
    with proxied(server) as proxy:

        def answers(data: bytes) -> bool:
            return len(lost) != 1 or bool(
                lost.append(data)
            )  # The reply to what was just sent is thrown away, once.

        def asks(data: bytes) -> bool:
            if b"write_cell" in data and not lost:
                lost.append(data)
            return True

        proxy.on_request, proxy.on_reply = asks, answers
        async with RedisStore(proxy.url) as store:
            assert await store.change_cell("n", count) == 1
            assert len(lost) == 2
            assert store.read_cell("n")[0] == b"1"


@pytest.mark.slow
async def test_a_change_whose_answer_is_lost_on_postgres() -> None:
    """A change may be asked again: what tells whether the first answer counted is in the cell."""
    server = shared_postgres()
    schema = f"lost_{os.getpid()}"
    seen: list[bytes | None] = []

    def once(data: bytes | None, now: int) -> tuple[bytes | None, str]:
        seen.append(data)
        return (None, "again") if data else (b"done", "first")

    with PostgresProxy(server, lambda data: b"COMMIT" in data and len(seen) == 1) as proxy:
        async with PostgresStore(proxy.dsn, schema=schema) as store:
            assert await store.change_cell("a", once) == "again"
            assert (seen, proxy.lost) == ([None, b"done"], 1)
    server.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.mark.parametrize("kind", DURABLE)
async def test_a_cell_outlives_its_store(kind: str) -> None:
    """Another store object at the same place finds what the first one put."""
    with place(kind) as where:
        with opened(kind, where) as store:
            await asyncio.wait_for(store.change_cell("a", lambda data, now: (b"kept", None)), 30)
        with opened(kind, where) as store:
            assert store.read_cell("a")[0] == b"kept"


def _machine(base: type[Any], kind: str, count: int) -> Any:
    class Machine(base):
        def make_store(self) -> Any:
            self.place = None if kind in ("memory", "process") else place(kind)
            if kind == "process":
                return ProcessCells()
            return opened(kind, "" if self.place is None else self.place.__enter__())

        def teardown(self) -> None:
            super().teardown()
            if self.place is not None:
                self.place.__exit__(None, None, None)

    case = pytest.mark.slow(Machine.TestCase) if kind in SLOW_PARAMETERS else Machine.TestCase
    case.settings = examples(count, stateful_step_count=40)
    return case


TestBudgetInProcess = _machine(BudgetMachine, "process", 200)
TestBudgetInMemory = _machine(BudgetMachine, "memory", 200)
TestBudgetInSqlite = _machine(BudgetMachine, "sqlite", 15)
TestBudgetInRedis = _machine(BudgetMachine, "redis", 15)
TestBudgetInPostgres = _machine(BudgetMachine, "postgres", 8)
TestRatesInProcess = _machine(RateMachine, "process", 200)
TestRatesInMemory = _machine(RateMachine, "memory", 200)
TestRatesInSqlite = _machine(RateMachine, "sqlite", 10)
TestRatesInRedis = _machine(RateMachine, "redis", 10)
TestRatesInPostgres = _machine(RateMachine, "postgres", 5)


Dying = Callable[..., list[str]]


@pytest.fixture
def dying(journal: tuple[str, str], tmp_path: Path) -> Dying:
    """Runs a process of tests.checkpoint.dying_helper to its end; the statuses that it printed."""

    def run(**wish: Any) -> list[str]:
        wish = {"calls": str(tmp_path / "calls"), **wish}
        process = start_python("-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish))
        return ended(process, -9 if wish.get("die") else 0).split()

    return run


def spent(kind: str, where: str) -> tuple[int, int]:
    """(spent, reserved) tokens of the budget."""
    with opened(kind, where) as store:
        result = read_budget(store, "team")
    return result.spent_tokens, result.reserved_tokens


def journaled(kind: str, where: str) -> int:
    with opened(kind, where) as store:
        return sum(run.tokens for run in store.list_runs())


def calls(tmp_path: Path) -> int:
    return (tmp_path / "calls").read_text().count("call")


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.parametrize("when", ["success", "failure"])
def test_a_process_killed_behind_its_commit(dying: Dying, journal: tuple[str, str], when: str) -> None:
    """If budget and journal share a store, usage is counted by the transaction that records it."""
    dying(run_id="r", die=when, budget=[*journal, 500], fails=1 if when == "failure" else 0)
    assert spent(*journal) == (100, 0)
    assert journaled(*journal) == 100


@pytest.mark.kills
@pytest.mark.slow
def test_killed_again_and_again(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """However often commits are followed by kills, no call is made beyond a shared budget."""
    for number in range(3):
        dying(run_id=f"r{number}", die="success", budget=[*journal, 300])
    assert dying(run_id="r3", budget=[*journal, 300]) == ["PARTIAL"]
    assert dying(recover=True, budget=[*journal, 300]) == ["RESUMED"] * 3
    assert (spent(*journal), journaled(*journal), calls(tmp_path)) == ((300, 0), 300, 3)


@pytest.mark.kills
@pytest.mark.slow
def test_killed_in_the_call(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """A call that no journal has is given back when its lease has ended."""
    dying(run_id="r", die="node", budget=[*journal, 100])
    assert spent(*journal) == (0, 100)
    assert dying(run_id="s", budget=[*journal, 100]) == ["COMPLETED"]
    assert (spent(*journal), calls(tmp_path)) == ((100, 0), 2)


@pytest.mark.kills
@pytest.mark.slow
def test_another_store(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """A budget in another store misses only the attempt of a process that was killed behind its record."""
    budget = ["sqlite", str(tmp_path / "budget.db")]
    dying(run_id="r", die="failure", fails=1, retries=3, budget=[*budget, 500])
    assert spent(*budget) == (0, 100)
    assert dying(recover=True, retries=3, budget=[*budget, 500]) == ["RESUMED"]
    assert (spent(*budget)[0], journaled(*journal)) == (100, 200)


def node(node_id: str, tokens: int) -> Any:
    @stroma_node(node_id, input=Num, output=Num)
    async def call(state: Num) -> Any:
        current_node().report_usage(input_tokens=tokens)
        return {"n": tokens}

    return call


@pytest.mark.parametrize("kind", SHARED)
async def test_children_and_two_budgets(kind: str) -> None:
    """Children of a group settle each of several budgets with their own commits, and all is counted once."""
    with store_of(kind) as store:
        budgets = [SharedBudget(name, max_tokens=1000, store=store, reserve_tokens=10) for name in ("b", "a")]
        runner = StromaRunner.quick(store=store, shared_budgets=budgets)
        children = [node(f"n{size}", size) for size in (1, 20, 300)]
        result = await runner.run([parallel(*children), node("last", 7)], Num(), run_id="r")
        assert result.status == "COMPLETED", result.failure
        for budget in budgets:
            match = await budget.state()
            assert (match.spent_tokens, match.reserved_tokens) == (328, 0)


@pytest.mark.parametrize("kind", SHARED)
async def test_a_damaged_budget_costs_no_output(kind: str) -> None:
    """A budget that is damaged while a call is in flight does not keep the output from being committed."""
    with store_of(kind) as store:
        budget = SharedBudget("team", max_tokens=1000, store=store, reserve_tokens=10)

        @stroma_node("breaks", input=Num, output=Num)
        async def breaks(state: Num) -> Any:
            await store.change_cell(budget.cell, lambda data, now: (b"{", None))
            return {"n": 5}

        runner = StromaRunner.quick(store=store, shared_budgets=budget)
        result = await runner.run([breaks], Num(), run_id="r")
        assert (result.status, result.final_state) == ("COMPLETED", Num(n=5))
        assert store.get_run("r").nodes == 1
