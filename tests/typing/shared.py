"""What runs share, as a user writes it, with the types that it has."""

from typing import assert_type

from stroma import (
    AsyncInMemoryStore,
    Breaker,
    BudgetState,
    InMemoryStore,
    Limit,
    NodeHooks,
    RedisStore,
    RunConfig,
    SharedBudget,
    SharedBudgetExceeded,
    SQLiteStore,
    StromaRunner,
    TraceMark,
    open_store,
)
from stroma.checkpoint import CellStore, PostgresStore

STORES: list[CellStore] = [
    InMemoryStore(),
    AsyncInMemoryStore(),
    SQLiteStore("runs.db"),
    open_store("runs.db"),
]


def servers(postgres: PostgresStore, redis: RedisStore) -> list[CellStore]:
    return [postgres, redis]


team = SharedBudget(
    "team-a",
    max_cost_usd=50,
    per="day",
    store=SQLiteStore("runs.db"),
    reserve_usd={"draft": 0.1},
    max_cost_usd_by_node={"draft": 10},
)
by_url = SharedBudget("company", max_tokens=1_000_000, store="sqlite:///runs.db", reserve_tokens=500)
wrong = SharedBudget("team-b", max_cost_usd=1, per="week")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def on_node_wait(run_id: str, node_id: str, reason: str, seconds: float) -> None: ...


async def on_circuit_change(run_id: str, key: str, state: str) -> None: ...


async def on_limit_cooldown(run_id: str, limit: str, seconds: float) -> None: ...


config = RunConfig(
    shared_budgets=[team, by_url],
    limits={"llm": Limit(requests_per_minute=600, tokens_per_minute=100_000, concurrent=20)},
    node_limits={"draft": "llm"},
    breaker=Breaker(failure_rate=0.5),
    hooks=NodeHooks(
        on_node_wait=on_node_wait, on_circuit_change=on_circuit_change, on_limit_cooldown=on_limit_cooldown
    ),
)
one = RunConfig(shared_budgets=team)
runner = StromaRunner.quick(shared_budgets=team, breaker=Breaker())


async def look(error: SharedBudgetExceeded, mark: TraceMark) -> None:
    assert_type(await team.state(), BudgetState | None)
    assert_type(error.reserved, float)
    assert_type(mark.waited_ms, float)
