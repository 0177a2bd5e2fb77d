"""Errors of stores: which are retried, which end the run, and what they cannot undo."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.event_log import Between, Journal
from tests.engine.gated_journal import GatedJournal
from tests.kit import (
    Loose,
    Num,
    SimpleStore,
    node,
    noting,
    quick,
    quick_without_retries,
    record_node_hooks,
    same,
)

from stroma import (
    BudgetExceeded,
    ExecutionBudget,
    ExecutionResult,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StoreError,
    map_over,
)


async def test_what_a_store_without_a_journal_cannot_do() -> None:
    """fork, recover, signal and cancel say which kind of store they need."""
    runner = quick_without_retries(store=SimpleStore())
    calls = [
        lambda: runner.fork("r", [node("a", same)], at="a"),
        lambda: runner.recover([node("a", same)]),
        lambda: runner.signal("r", 1),
        lambda: runner.cancel("r"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="has no journal"):
            await call()


@pytest.mark.core
async def test_a_store_that_cannot_be_opened_is_an_error_of_run(tmp_path: Path) -> None:
    """A store that cannot be opened is a StoreError of run(): no node is called, no hook is told."""
    events: list[str] = []

    tell = noting(events, lambda *_: "hook")

    async def func(state: Num) -> Any:
        events.append("node")
        return state

    store = SQLiteStore(tmp_path)  # A directory.
    hooks = NodeHooks(on_run_start=tell, on_run_end=tell, on_node_start=tell)
    with pytest.raises(StoreError):
        await quick(store=store, hooks=hooks).run([node("a", func)], Num())
    assert events == []


async def test_a_run_whose_input_cannot_be_stored_starts_and_ends(tmp_path: Path) -> None:
    """on_run_end has its on_run_start, also in a run whose initial state no store can keep."""
    seen: list[str] = []

    start = noting(seen, lambda *_: "start")
    end = noting(seen, lambda *_: "end")
    store = SQLiteStore(tmp_path / "runs.db")
    runner = quick(store=store, hooks=NodeHooks(on_run_start=start, on_run_end=end))
    result = await runner.run([node("a", lambda state: {"n": 1})], Loose(anything=threading.Lock()))
    assert (result.status, seen) == (RunStatus.FAILED, ["start", "end"])


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, BaseException, ValueError])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_a_store_that_raises_odd_things_has_refused(kind: type[BaseException], is_async: bool) -> None:
    """Whatever a store raises at a commit but KeyboardInterrupt and SystemExit: PARTIAL, hooks pair."""

    class Refusing(SimpleStore):
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            raise kind("no")

    class Later(Refusing):
        async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            raise kind("no")

    seen: list[str] = []

    end = noting(seen, lambda *_: "run end")
    runner = quick(store=Later() if is_async else Refusing(), hooks=record_node_hooks(seen, on_run_end=end))
    result = await runner.run([node("a", same)], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.reason == "store"
    assert seen == ["start", "failure", "run end"]


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    from stroma.engine import commit as _commit

    monkeypatch.setattr(_commit, "_STORE_DELAYS", tuple(0 for _ in _commit._STORE_DELAYS))


@pytest.mark.core
@pytest.mark.parametrize("error", [OSError, StoreError, TypeError, TimeoutError])
async def test_a_store_that_stays_down_stops_the_run(error: type[Exception], no_delays: None) -> None:
    """G5: a store that stays down makes the attempt fail and the run PARTIAL, without another call."""
    store = GatedJournal(error("the disk is full"))
    seen: list[str] = []
    runner = quick(store=store, hooks=record_node_hooks(seen))
    result = await runner.run([node("a", lambda state: ({"n": 7}, 5)), node("b", same)], Num())
    (event,) = result.trace
    assert result.status is RunStatus.PARTIAL
    assert (event.outcome, event.output_state) == ("failure", None)
    assert isinstance(result.failure.exception, StoreError)
    assert "the disk is full" in result.failure.message
    assert (result.total_tokens, seen) == (5, ["start", "failure"])


@pytest.mark.parametrize(("refusals", "status"), [(2, RunStatus.COMPLETED), (99, RunStatus.PARTIAL)])
async def test_a_simple_store_is_tried_again(refusals: int, status: RunStatus, no_delays: None) -> None:
    """G5: a custom sync store that raises at save is tried again, and the node is called once either way."""
    left = [OSError("no space left on device")] * refusals
    calls: list[int] = []

    class Refusing(SimpleStore):
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            if left:
                raise left.pop()

    def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}

    result = await quick(store=Refusing()).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (status, 1)


async def _boom(*_: Any) -> None:
    raise RuntimeError("hook")


@pytest.mark.core
@pytest.mark.parametrize("spoiler", ["hook", "budget", "store", "later-node"])
async def test_committed_nodes_are_not_run_again_on_resume(spoiler: str, no_delays: None) -> None:
    """G5: after a hook, budget, store or later node complained, a resume runs no committed node again."""
    store = GatedJournal()
    store.gate.set()
    calls: list[int] = []
    broken = [True]

    async def first(state: Num) -> Any:
        calls.append(1)
        return {"n": 1}, 5

    async def second(state: Num) -> Any:
        if spoiler == "later-node" and broken:
            broken.clear()
            raise BudgetExceeded("tokens", 1, 2, "mine")
        if spoiler == "store" and broken:
            broken.clear()
            store.error = OSError("the disk is full")
        return {"n": 2}

    spoiled: dict[str, Any] = {}
    if spoiler == "hook":
        spoiled["hooks"] = NodeHooks(on_node_start=_boom, on_node_success=_boom, on_node_failure=_boom)
    if spoiler == "budget":
        spoiled["budget"] = ExecutionBudget(max_tokens_total=4)
    nodes = [node("first", first), node("second", second)]
    await quick_without_retries(store=store, run_id="r", **spoiled).run(nodes, Num())
    store.error = None
    result = await quick_without_retries(store=store, run_id="r", resume=True).run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert len(calls) == 1


async def _pay_five_times(store: Any) -> tuple[list[ExecutionResult], int]:
    """Run and resume a node that uses 5 tokens, under a budget of 12. Return the results, and the calls."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return state, 5

    budget = ExecutionBudget(max_tokens_total=12)
    runner = quick_without_retries(store=store, run_id="r", resume=True, budget=budget)
    return [await runner.run([node("a", func)], Num()) for _ in range(5)], len(calls)


@pytest.mark.core
@pytest.mark.parametrize("refuses_rows", [False, True])
async def test_usage_of_an_output_that_the_store_refuses_counts(refuses_rows: bool, no_delays: None) -> None:
    """G6: The usage of an attempt whose output the store refuses counts in each resume, up to the budget.

    The output is sent four times and its usage once, since each may take as long as the store is waited for.
    """
    refused: list[int] = []

    def between(session: Any) -> Any:
        def record(row: Any, schema: Any, output: Any, step: Any) -> Any:
            if output is not None or refuses_rows:
                refused.append(1)
                raise StoreError("AccessDenied")
            return session.record(row, schema, output, step)

        return Between(session, record=record)

    results, calls = await _pay_five_times(Journal(between))
    assert ({one.status for one in results}, calls) == ({RunStatus.PARTIAL}, 3)
    assert results[-1].total.tokens == 15
    assert len(refused) == calls * (5 if refuses_rows else 4)


async def test_a_failure_of_an_item_that_the_store_refuses_stops_the_map(no_delays: None) -> None:
    """A map that cannot record the failure of an item ends PARTIAL with the error of the store."""

    def between(session: Any) -> Any:
        async def refuse() -> None:
            raise StoreError("AccessDenied")

        def record(row: Any, *output: Any) -> Any:
            return refuse() if row.outcome == "collected" else session.record(row, *output)

        return Between(session, record=record)

    async def fail(state: Num) -> Any:
        raise ValueError("no")

    work = map_over(lambda state: [state], node("a", fail), into="made", on_item_failure="collect")
    result = await quick_without_retries(store=Journal(between)).run([work], Num())
    assert (result.status, result.failure.reason) == (RunStatus.PARTIAL, "store")


async def test_an_output_that_was_stored_after_all_counts_once(tmp_path: Path, no_delays: None) -> None:
    """G6: A commit that the store made and answered with an error counts once, and its output is restored."""

    class Unsure(SQLiteStore):
        async def open_run(self, request: Any) -> Any:
            session = await super().open_run(request)

            async def record(row: Any, schema: Any, output: Any, step: Any) -> None:
                await session.record(row, schema, output, step)
                if output is not None:
                    raise StoreError("the connection was lost")

            return Between(session, record=record)

    results, calls = await _pay_five_times(Unsure(tmp_path / "runs.db"))
    assert ([one.status for one in results], calls) == ([RunStatus.PARTIAL, *[RunStatus.RESUMED] * 4], 1)
    assert results[-1].total.tokens == 5
