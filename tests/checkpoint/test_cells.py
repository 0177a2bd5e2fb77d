"""Cells: what runs and processes share through a store, over every store."""

from __future__ import annotations

import asyncio
import os
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from tests.kit import ended, read_line, start_python
from tests.limits.budget_machine import BudgetMachine, RateMachine
from tests.servers import proxied, shared_redis
from tests.servers_postgres import Proxy as PostgresProxy
from tests.servers_postgres import shared_postgres
from tests.shared_stores import DURABLE, SHARED, STORES, opened, place, store_of
from tests.store_suite.cells import CellStoreTests, count
from tests.tiers import SLOW_PARAMETERS, examples

from stroma.checkpoint import CellStore, PostgresStore, RedisStore
from stroma.limits.reservations import ProcessCells


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
