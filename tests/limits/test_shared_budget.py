"""Budgets that several runs share: what is spent under them, by whom, and latecomers."""

import asyncio
import copy
import json
import math
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import context_of, environment, failing_with, noting
from tests.limits.budget_helper import CONTRACT, RESERVE_CENTS, State, budget, spend
from tests.shared_stores import IN_PROCESS, SHARED, STORES, opened, place, store_of

from stroma import (
    AsyncInMemoryStore,
    FailureClass,
    NodeHooks,
    RunConfig,
    RunStatus,
    SharedBudget,
    SharedBudgetExceeded,
    SQLiteStore,
    StoreError,
    StromaRunner,
    Suspend,
    Usage,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.adapters import Guard
from stroma.limits.budget_state import (
    BudgetTerms,
    CallRequest,
    CallUsage,
    Refusal,
    read_account,
    renew_calls,
    reserve,
    settle,
    window,
)
from stroma.limits.reservations import RENEWER


def node(
    node_id: str = "call", *, cents: int = 10, before: Callable[[State], Any] | None = None
) -> tuple[Any, list[int]]:
    """A node whose call costs so many cents, and its calls. ``before`` may raise, or return an awaitable."""
    calls: list[int] = []

    @stroma_node(node_id, input=State, output=State)
    async def call(state: State) -> Any:
        calls.append(cents)
        current_node().report_usage(input_tokens=cents, model="cents")
        if before is not None:
            waits = before(state)
            if waits is not None:
                await waits
        return {"n": state.n + 1}

    return call, calls


store = store_fixture(*STORES)


def cents(usd: float) -> float:
    return round(usd * 100, 6)


@pytest.mark.core
async def test_a_hundred_runs_at_once(store: Any) -> None:
    """100 runs at once, in one process, spend no more than the limit, and as much of it as fits."""
    result = await spend(store, 1, 100)
    outcome = await budget(store).state()
    assert result["cents"] == cents(outcome.spent_usd)
    assert 1000 - RESERVE_CENTS < result["cents"] <= 1000
    assert set(result["statuses"]) <= {"COMPLETED", "PARTIAL"}
    assert (outcome.calls, outcome.reserved_usd) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_four_processes(kind: str) -> None:
    """4 processes of 50 runs each never spend more than the limit, and their spend is what the store says."""
    with place(kind) as where:
        command = [sys.executable, "-m", "tests.limits.budget_helper", kind, where, "spend"]
        running = [start(*command, str(seed), "50") for seed in range(4)]
        results = together(running)
        with opened(kind, where) as store:
            outcome = asyncio.run(budget(store).state())
        total = sum(result["cents"] for result in results)
        assert total == cents(outcome.spent_usd)
        assert 1000 - RESERVE_CENTS < total <= 1000
        assert (outcome.calls, outcome.reserved_usd) == (0, 0)
        statuses = [status for result in results for status in result["statuses"]]
        assert len(statuses) == 200
        assert "PARTIAL" in statuses
        assert set(statuses) <= {"COMPLETED", "PARTIAL"}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_a_process_that_is_killed(kind: str) -> None:
    """kill -9 leaves a reservation that counts until its lease ends, and not after that."""
    with place(kind) as where:
        with opened(kind, where) as store:
            process = start(sys.executable, "-m", "tests.limits.budget_helper", kind, where, "hang", "6")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "calling\n"
            began = time.monotonic()
            # It is kept up as long as the process lives.
            while time.monotonic() < began + 7.5:
                assert cents(_state(store).reserved_usd) == RESERVE_CENTS
                time.sleep(0.1)
            process.kill()
            process.wait()
            assert cents(_state(store).reserved_usd) == RESERVE_CENTS
            deadline = time.monotonic() + 30
            while _state(store).calls:
                assert time.monotonic() < deadline, "the reservation outlives its lease"
                time.sleep(0.1)
            assert (_state(store).reserved_usd, _state(store).spent_usd) == (0, 0)
        process.communicate()


def together(running: list[subprocess.Popen[str]]) -> list[Any]:
    """What processes come to that begin at the same moment."""
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.communicate(timeout=100)[0]) for process in running]


def start(*command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def _state(store: Any) -> Any:
    result = asyncio.run(budget(store).state())
    assert result is not None
    return result


@pytest.mark.core
def test_leases_are_kept_up() -> None:
    """What calls hold is renewed despite errors and long leases of others, a gate's at once."""
    report: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def fails(tokens: list[str]) -> None:
        raise RuntimeError("no")

    RENEWER.add("long", 1e12, fails)
    RENEWER.add("bad", 0.05, fails)
    for token in ("a", "b"):
        RENEWER.add(token, 0.05, report.put)
    try:
        renewed = [report.get(timeout=30) for _ in range(6)]
        assert {token for tokens in renewed for token in tokens} == {"a", "b"}
        RENEWER.remove("a")
        while "a" in report.get(timeout=30):
            pass
        assert {tuple(report.get(timeout=30)) for _ in range(3)} == {("b",)}
    finally:
        for token in ("long", "bad", "a", "b"):
            RENEWER.remove(token)


async def test_what_is_only_reserved_is_waited_for(store: Any) -> None:
    """A call waits while calls in flight may leave room for it; waiting is told, and kept in the trace."""
    shared = SharedBudget("team", max_cost_usd=1, store=store, reserve_usd=0.6)
    free, events = asyncio.Event(), list[Any]()

    async def on_wait(*arguments: Any) -> None:
        events.append(arguments)
        free.set()

    first, _ = node(before=lambda state: free.wait())
    second, calls = node(cents=20)
    runner = StromaRunner.quick(shared_budgets=shared, hooks=NodeHooks(on_node_wait=on_wait))
    running = asyncio.create_task(runner.run([first], State(), run_id="1"))
    while (outcome := await shared.state()) is None or not outcome.calls:
        await asyncio.sleep(0.005)
    result = await runner.run([second], State(), run_id="2")
    await running
    assert (result.status, len(calls)) == (RunStatus.COMPLETED, 1)
    assert events == [("2", "call", "budget 'team': reserved", 0.0)]
    (mark,) = result.trace.marks
    assert (mark.kind, mark.reason, mark.node_id, mark.attempt) == ("wait", events[0][2], "call", 1)
    assert mark.waited_ms > 0
    assert pickle.loads(pickle.dumps(result.trace)).marks == result.trace.marks


async def test_a_call_that_waited_too_long(store: Any) -> None:
    """It is refused as one that has no room, and holds nothing."""
    shared = SharedBudget("team", max_cost_usd=1, store=store, reserve_usd=0.6, max_wait_seconds=0.05)
    free = asyncio.Event()
    first, _ = node(before=lambda state: free.wait())
    second, calls = node()
    runner = StromaRunner.quick(shared_budgets=shared)
    running = asyncio.create_task(runner.run([first], State()))
    while (outcome := await shared.state()) is None or not outcome.calls:
        await asyncio.sleep(0.005)
    results = await asyncio.gather(*(runner.run([second], State()) for _ in range(3)))
    for result in results:
        assert (result.status, calls) == (RunStatus.PARTIAL, [])
        error = result.failure.exception
        assert isinstance(error, SharedBudgetExceeded)
        assert (error.reserved, error.actual, error.requested) == (0.6, 0, 0.6)
        assert [mark.kind for mark in result.trace.marks] == ["wait", "refused"]
    assert (await _settled(shared)).reserved_usd == 0.6
    free.set()
    await running
    assert (await _settled(shared)).reserved_usd == 0


async def _settled(shared: SharedBudget) -> Any:
    """The state once nothing is under way that nobody waits for."""
    await shared.store.change_cell("other", renew_calls("other", [], 1))
    return await shared.state()


@pytest.mark.core
async def test_the_first_call_of_an_unknown_node_goes_alone(store: Any) -> None:
    """Without an estimate the first call reserves what is left; later ones what calls of the node took."""
    shared = SharedBudget("team", max_cost_usd=1, store=store)
    at_once, most, starts = 0, list[int](), list[float]()

    async def watch() -> None:
        nonlocal at_once
        at_once += 1
        most.append(at_once)
        outcome = await shared.state()
        starts.append(cents(outcome.reserved_usd))
        at_once -= 1

    call, calls = node(cents=10, before=lambda state: watch())
    runner = StromaRunner.quick(shared_budgets=shared)
    results = await asyncio.gather(*(runner.run([call], State()) for _ in range(12)))
    assert (most[0], starts[0]) == (1, 100)
    assert max(starts[1:]) <= 90
    assert len(calls) == 10
    assert sorted(str(result.status) for result in results) == ["COMPLETED"] * 10 + ["PARTIAL"] * 2


async def test_a_run_that_is_refused_goes_on_later(tmp_path: Path) -> None:
    """It ends as PARTIAL with what it has, and a resume under a higher limit calls only what is left."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        first, calls = node("first", cents=60)
        second, later = node("second", cents=60)
        low = SharedBudget("team", max_cost_usd=1, per="day", store=store, reserve_usd=0.6)
        runner = StromaRunner.quick(store=store, shared_budgets=low)
        result = await runner.run([first, second], State(), run_id="r")
        assert (result.status, result.final_state, later) == (RunStatus.PARTIAL, State(n=1), [])
        assert (result.failure.failure_class, result.failure.reason) == (FailureClass.RECOVERABLE, "budget")
        message = str(result.failure.exception)
        assert (
            "shared budget 'team' has no room for a call of node 'second': max_cost_usd is $1, $0.6 spent"
            in message
        )
        assert "UTC, when it begins anew, or raise max_cost_usd" in message
        assert len(result.trace) == 1
        again = pickle.loads(pickle.dumps(result.failure.exception))
        assert (str(again), type(again)) == (message, SharedBudgetExceeded)
        high = SharedBudget("team", max_cost_usd=2, per="day", store=store, reserve_usd=0.6)
        runner = StromaRunner.quick(store=store, shared_budgets=high)
        result = await runner.run([first, second], State(), run_id="r", resume=True)
        assert (result.status, calls, later) == (RunStatus.RESUMED, [60], [60])
        outcome = await high.state()
        assert cents(outcome.spent_usd) == 120


@pytest.mark.core
async def test_a_cancelled_call_counts_and_holds_nothing(store: Any) -> None:
    """What it had reported is spent, and its reservation is given back; so is that of one that waited."""
    shared = SharedBudget("team", max_cost_usd=1, store=store, reserve_usd=0.6)
    started = asyncio.Event()
    call, _ = node(cents=7, before=lambda state: started.set() or asyncio.sleep(3600))
    waiting, calls = node()
    report = asyncio.Event()

    async def on_wait(*_: Any) -> None:
        report.set()

    runner = StromaRunner.quick(shared_budgets=shared, hooks=NodeHooks(on_node_wait=on_wait))
    running = asyncio.create_task(runner.run([call], State()))
    await started.wait()
    other = asyncio.create_task(runner.run([waiting], State()))
    await report.wait()
    other.cancel()
    running.cancel()
    assert all(
        isinstance(error, asyncio.CancelledError)
        for error in await asyncio.gather(running, other, return_exceptions=True)
    )
    result = await _settled(shared)
    assert (cents(result.spent_usd), result.calls, result.reserved_usd, calls) == (7, 0, 0, [])


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 5, 8])
async def test_cancelled_at_any_step(store: Any, delay: int) -> None:
    """Whenever a run is cancelled, nothing stays reserved."""
    shared = SharedBudget("team", max_cost_usd=1, store=store, reserve_usd=0.6)
    call, _ = node(before=lambda state: asyncio.sleep(0))
    task = asyncio.create_task(StromaRunner.quick(shared_budgets=shared).run([call, call], State()))
    for _ in range(delay):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    result = await _settled(shared)
    assert result is None or (result.calls, result.reserved_usd) == (0, 0)


@pytest.mark.core
async def test_a_run_that_is_closed_holds_nothing() -> None:
    """A coroutine that is thrown away gives back what it reserved, and counts what it reported."""
    shared = SharedBudget("team", max_cost_usd=1, store=AsyncInMemoryStore(), reserve_usd=0.6)
    call, calls = node(cents=7, before=lambda state: asyncio.sleep(3600))
    run = StromaRunner.quick(shared_budgets=shared).run([call], State())
    step = run.__await__()
    while not calls:
        next(step)
    run.close()
    result = await shared.state()
    assert result.calls == 0


async def test_what_waits_for_a_person_is_settled() -> None:
    """A suspended attempt holds nothing meanwhile."""
    shared = SharedBudget("team", max_cost_usd=1, store=AsyncInMemoryStore(), reserve_usd=0.6)

    def ask(state: State) -> None:
        raise Suspend("may I?")

    call, _ = node(cents=5, before=ask)
    result = await StromaRunner.quick(shared_budgets=shared).run([call], State())
    outcome = await shared.state()
    assert (result.status, outcome.calls, cents(outcome.spent_usd)) == (RunStatus.SUSPENDED, 0, 5)


@pytest.mark.core
async def test_limits_of_single_nodes() -> None:
    """A node's own limit refuses it alone; the message names it."""
    shared = SharedBudget(
        "team",
        max_cost_usd=10,
        store=AsyncInMemoryStore(),
        reserve_usd=0.1,
        max_cost_usd_by_node={"dear": 0.25},
    )
    dear, calls = node("dear")
    cheap, others = node("cheap")
    runner = StromaRunner.quick(shared_budgets=shared)
    for _ in range(4):
        await runner.run([cheap], State())
    results = [await runner.run([dear], State()) for _ in range(4)]
    assert [str(result.status) for result in results] == ["COMPLETED"] * 2 + ["PARTIAL"] * 2
    assert (len(calls), len(others)) == (2, 4)
    assert "max_cost_usd_by_node of node 'dear' is $0.25, $0.2 spent" in results[-1].failure.message  # type: ignore[union-attr]


async def test_only_the_nodes_that_are_named() -> None:
    """With nodes=, all others neither reserve nor spend."""
    shared = SharedBudget(
        "team", max_cost_usd=0.1, store=AsyncInMemoryStore(), reserve_usd=0.1, nodes=["dear"]
    )
    dear, calls = node("dear")
    cheap, others = node("cheap")
    runner = StromaRunner.quick(shared_budgets=shared)
    result = await runner.run([cheap, dear, cheap, dear], State())
    assert (result.status, len(calls), len(others)) == (RunStatus.PARTIAL, 1, 2)
    outcome = await shared.state()
    assert dict(outcome.by_node) == {"dear": (0.1, 10)}


async def test_children_of_groups(store: Any) -> None:
    """Children of groups and items reserve each for itself; their group does not."""
    shared = SharedBudget("team", max_cost_usd=0.5, store=store, reserve_usd=0.1)
    call, calls = node("call")
    other, _ = node("other")
    runner = StromaRunner.quick(shared_budgets=shared)
    assert (await runner.run([parallel(call, other)], State())).status is RunStatus.COMPLETED

    @stroma_node("item", input=State, output=State)
    async def item(state: State) -> Any:
        calls.append(10)
        return {"n": state.n}, 10, "cents"

    many = map_over("items", item, into="out", max_concurrency=4)
    result = await runner.run([many], ItemStates(items=[State(n=n) for n in range(6)]))
    assert result.status is RunStatus.PARTIAL
    outcome = await _settled(shared)
    assert cents(outcome.spent_usd) == 50
    assert (len(calls), outcome.calls) == (4, 0)


class ItemStates(BaseModel):
    items: list[State] = []
    out: list[State] = []


async def test_several_budgets() -> None:
    """A run may spend from several; what one of them refuses takes nothing from the others."""
    store = AsyncInMemoryStore()
    company = SharedBudget("company", max_cost_usd=1, store=store, reserve_usd=0.1)
    team = SharedBudget("team", max_cost_usd=0.2, store=store, reserve_usd=0.1)
    call, calls = node()
    runner = StromaRunner.quick(shared_budgets=[team, company])
    result = await runner.run([call, call, call], State())
    assert (result.status, len(calls)) == (RunStatus.PARTIAL, 2)
    for shared in (company, team):
        outcome = await shared.state()
        assert (cents(outcome.spent_usd), outcome.calls) == (20, 0)


async def test_plain_code_with_steps() -> None:
    """execute_step spends from it too."""
    shared = SharedBudget("team", max_cost_usd=0.1, store=AsyncInMemoryStore(), reserve_usd=0.1)
    runner = StromaRunner.quick(shared_budgets=shared)
    call, calls = node()
    ctx = context_of(runner)
    result = await execute_step("call", call, State(), ctx, contract=CONTRACT)
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, State(n=1))
    result = await execute_step("call", call, State(), ctx, contract=CONTRACT)
    assert (result.status, len(calls)) == (RunStatus.PARTIAL, 1)
    assert isinstance(result.failure.exception, SharedBudgetExceeded)


async def test_a_call_inside_another_one(store: Any) -> None:
    """It takes what the call around it has reserved, where there is no other room, without a wait."""
    shared = SharedBudget("team", max_cost_usd=1, store=store, max_wait_seconds=20)
    call, calls = node("call", cents=10)
    seen: list[float] = []

    async def nested(state: State) -> None:
        for _ in range(2):
            result = await execute_step("call", call, state, current_run(), contract=CONTRACT)
            assert result.status is RunStatus.COMPLETED, result.failure
            outcome = await shared.state()
            seen.append(cents(outcome.spent_usd + outcome.reserved_usd))

    outer, _ = node("outer", cents=5, before=nested)
    runner = StromaRunner.quick(shared_budgets=shared)
    result = await runner.run([outer], State())
    assert (result.status, calls, result.trace.marks) == (RunStatus.COMPLETED, [10, 10], [])
    assert seen == [10, 20]
    outcome = await _settled(shared)
    assert (cents(outcome.spent_usd), outcome.reserved_usd, outcome.calls) == (25, 0, 0)


@pytest.mark.parametrize("how", ["run", "guard"])
async def test_a_run_inside_a_call(how: str) -> None:
    """A run of its own, and a guarded function of sync code, are inside the call as well."""
    shared = SharedBudget("team", max_cost_usd=1, store=AsyncInMemoryStore(), max_wait_seconds=20)
    runner = StromaRunner.quick(shared_budgets=shared)
    call, calls = node("call")
    guard = Guard(runner)
    model = guard.wrap("model", lambda: calls.append(10), usage=lambda _: Usage(10, model="cents"))

    async def nested(state: State) -> None:
        if how == "run":
            await runner.run([call], state)
        else:
            await asyncio.to_thread(guard.wrap("agent", model))

    outer, _ = node("outer", cents=5, before=nested)
    result = await runner.run([outer], State())
    assert (result.status, calls) == (RunStatus.COMPLETED, [10])
    outcome = await _settled(shared)
    assert (cents(outcome.spent_usd), outcome.reserved_usd, outcome.calls) == (15, 0, 0)


@pytest.mark.parametrize("reserve_usd", [None, 0.5])
async def test_calls_inside_others_do_not_wait_for_each_other(reserve_usd: float | None) -> None:
    """Calls with the whole budget reserved give it to inner ones, which pass calls that have not begun."""
    shared = SharedBudget(
        "team", max_cost_usd=1, store=AsyncInMemoryStore(), reserve_usd=reserve_usd, max_wait_seconds=20
    )
    call, calls = node("call", cents=10, before=lambda state: asyncio.sleep(0.01))

    async def nested(state: State) -> None:
        await asyncio.sleep(0.05)  # All runs have begun, or wait.
        result = await execute_step("call", call, state, current_run(), contract=CONTRACT)
        assert result.status is RunStatus.COMPLETED, result.failure

    outer, _ = node("outer", cents=0, before=nested)
    runner = StromaRunner.quick(shared_budgets=shared)
    results = await asyncio.gather(*(runner.run([outer], State()) for _ in range(4)))
    assert [result.status for result in results] == [RunStatus.COMPLETED] * 4
    assert len(calls) == 4
    outcome = await _settled(shared)
    assert (cents(outcome.spent_usd), outcome.reserved_usd, outcome.calls) == (40, 0, 0)


@pytest.mark.core
async def test_tokens() -> None:
    """max_tokens counts input and output; the run that has no room says so in tokens."""
    shared = SharedBudget("team", max_tokens=25, store=AsyncInMemoryStore(), reserve_tokens=10)
    call, calls = node(cents=10)
    runner = StromaRunner.quick(shared_budgets=shared)
    result = await runner.run([call, call, call], State())
    assert (result.status, len(calls)) == (RunStatus.PARTIAL, 2)
    assert "max_tokens is 25 tokens, 20 spent" in result.failure.message


async def test_a_budget_of_nothing() -> None:
    """0 means spend nothing: no call is made."""
    shared = SharedBudget("team", max_cost_usd=0, store=AsyncInMemoryStore())
    call, calls = node()
    result = await StromaRunner.quick(shared_budgets=shared).run([call], State())
    assert (result.status, calls) == (RunStatus.PARTIAL, [])


async def test_a_run_without_any_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a shared budget, limit or breaker no attempt waits for its turn."""
    from stroma.engine import admission

    monkeypatch.setattr(admission, "admit", failing_with(AssertionError, "asked"))
    call, _ = node()
    assert (await StromaRunner.quick().run([call], State())).status is RunStatus.COMPLETED


@pytest.mark.core
async def test_the_warning_at_80_percent(store: Any) -> None:
    """on_budget_warning is told once in a window, by the call that reaches 80 %, with the budget's name."""
    shared = SharedBudget("team", max_cost_usd=1, max_tokens=1000, per="month", store=store, reserve_usd=0.1)
    events: list[Any] = []

    warn = noting(events, lambda *arguments: arguments)
    call, _ = node(cents=10)
    runner = StromaRunner.quick(shared_budgets=shared, hooks=NodeHooks(on_budget_warning=warn))
    for number in range(11):
        await runner.run([call], State(), run_id=str(number))
    assert events == [("7", "team:cost", 0.8, 1.0)]


@pytest.mark.core
async def test_a_store_that_fails_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output stays committed, the run goes on, and what the call took is counted with the next one."""
    store = AsyncInMemoryStore()
    shared = SharedBudget("team", max_cost_usd=1, store=store, reserve_usd=0.1)
    call, _ = node()
    original, failing = store.change_cell, [False, True]

    async def change(name: str, change: Any) -> Any:
        if failing and failing.pop(0):
            raise StoreError("down for a moment")
        return await original(name, change)

    monkeypatch.setattr(store, "change_cell", change)
    runner = StromaRunner.quick(shared_budgets=shared)
    assert (await runner.run([call, call], State())).status is RunStatus.COMPLETED
    result = await shared.state()
    assert (cents(result.spent_usd), result.calls) == (20, 0)


@pytest.mark.parametrize(
    ("per", "start", "end"),
    [
        ("minute", "2028-02-29T23:59:00", "2028-03-01T00:00:00"),
        ("hour", "2028-02-29T23:00:00", "2028-03-01T00:00:00"),
        ("day", "2028-02-29T00:00:00", "2028-03-01T00:00:00"),
        ("month", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
    ],
)
def test_windows_are_units_of_the_calendar(per: str, start: str, end: str) -> None:
    """A window is the calendar's unit in UTC that the moment is in."""
    at = [int(datetime.fromisoformat(t).replace(tzinfo=UTC).timestamp() * 1000) for t in (start, end)]
    for now in (at[1] - 1, at[1] - 59_000):
        assert window(per, now) == (at[0], at[1])
    assert window(per, at[1])[0] == at[1]


TERMS = BudgetTerms("team", "hour", (100, None), {})
HOUR = 3_600_000
NOON = 1_900_000 * HOUR


def after(data: bytes | None, took: int, now: int, *, learns: bool = False) -> bytes | None:
    """Return the account once a call has ended that was to take nothing."""
    reserved, _ = reserve(TERMS, CallRequest("", "a", (0, None), None))(data, now)
    return settle(TERMS, [CallUsage("", "a", (took, 0), learns)])(reserved, now)[0]


def spent(data: bytes | None, now: int) -> int:
    result = read_account("team", data, now)
    return result.spent[0]


@pytest.mark.core
def test_a_new_window_begins_anew() -> None:
    """What was spent counts to the end of its window; a call in flight counts where it ends."""
    data = after(None, 70, NOON)
    assert (spent(data, NOON + HOUR - 1), spent(data, NOON + HOUR)) == (70, 0)
    data, report = reserve(TERMS, CallRequest("x", "a", (30, None), None))(data, NOON + HOUR - 1)
    assert report == (30, 0)
    data = settle(TERMS, [CallUsage("x", "a", (30, 0))])(data, NOON + HOUR)[0]
    assert (spent(data, NOON + HOUR), spent(data, NOON + 2 * HOUR)) == (30, 0)


@pytest.mark.core
def test_a_call_in_flight_holds_its_share_of_the_next_window() -> None:
    """What is reserved counts in every window until it is settled."""
    data, _ = reserve(TERMS, CallRequest("x", "a", (80, None), None))(None, NOON + HOUR - 1)
    report = reserve(TERMS, CallRequest("y", "a", (30, None), None))(data, NOON + HOUR)[1]
    assert isinstance(report, Refusal)
    assert (report.reserved, report.waits, report.ends_ms) == (80, True, NOON + 2 * HOUR)


@pytest.mark.core
def test_one_call_that_took_more_than_the_limit() -> None:
    """It keeps others from being made in its window alone; if every call of the node does, none is made."""
    data = None
    for took in (20, 500):
        data = after(data, took, NOON, learns=True)
    ask = CallRequest("x", "a", (None, None), None)
    assert isinstance(reserve(TERMS, ask)(data, NOON)[1], Refusal)
    assert reserve(TERMS, ask)(data, NOON + HOUR)[1] == (100, 0)
    dear = after(None, 500, NOON, learns=True)
    report = reserve(TERMS, ask)(dear, NOON + HOUR)[1]
    assert isinstance(report, Refusal)
    assert (report.requested, report.waits) == (500, False)


@pytest.mark.core
def test_a_clock_that_is_set_back() -> None:
    """Nothing spent is forgotten for that: not by a small step over the hour and back, nor by a big one."""
    data = after(after(None, 70, NOON + 5), 10, NOON - 1000)
    assert spent(data, NOON + 10) == 80
    far = after(after(None, 70, NOON + 1000 * HOUR), 10, NOON)
    assert (spent(far, NOON), spent(far, NOON + HOUR)) == (80, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "has no limit; pass max_cost_usd= or max_tokens="),
        *(
            ({"max_cost_usd": bad}, "max_cost_usd must be US dollars, 0 or more and finite")
            for bad in (-1, math.nan, math.inf, True, "5", 1e300)
        ),
        *(
            ({"max_tokens": bad}, "max_tokens must be an integer of at least 0")
            for bad in (-1, 1.5, True, math.nan, 10**40)
        ),
        *(
            ({"max_cost_usd": 1, "reserve_usd": bad}, "reserve_usd must be US dollars, more than 0")
            for bad in (0, -1, math.nan, True)
        ),
        ({"max_cost_usd": 1, "reserve_usd": {"a": 0}}, r"reserve_usd\['a'\] must be US dollars, more than 0"),
        (
            {"max_cost_usd": 1, "reserve_usd": 2},
            "must be at most the budget of 1, got .*no call could be made",
        ),
        ({"max_cost_usd": 1, "reserve_tokens": 2}, "needs a limit in the same unit"),
        ({"max_tokens": 5, "reserve_tokens": 0}, "reserve_tokens must be an integer of at least 1, got 0"),
        *(({"max_cost_usd": 1, "per": bad}, 'per must be "minute"') for bad in ("week", "", "DAY")),
        ({"max_cost_usd": 1, "lease_seconds": 0}, "lease_seconds must be"),
        ({"max_cost_usd": 1, "lease_seconds": 0.01}, "lease_seconds must be at least 0.1, got 0.01"),
        ({"max_cost_usd": 1, "max_wait_seconds": -1}, "max_wait_seconds must be seconds, 0 or more"),
        ({"max_cost_usd": 1, "max_cost_usd_by_node": {"a": -1}}, r"max_cost_usd_by_node\['a'\] must be"),
        ({"max_cost_usd": 1, "max_cost_usd_by_node": {"": 1}}, "node id"),
    ],
)
def test_a_wrong_figure(options: dict[str, Any], says: str) -> None:
    """Each is a ValueError that says what to give instead."""
    with pytest.raises(ValueError, match=says):
        SharedBudget("team", store=AsyncInMemoryStore(), **options)


@pytest.mark.parametrize("name", ["", "\0", "a\0b", "\ud800"])
def test_a_name_that_no_store_can_keep(name: str) -> None:
    """It is a ValueError at once."""
    with pytest.raises(ValueError):
        SharedBudget(name, max_cost_usd=1)


async def test_odd_names(store: Any) -> None:
    """Any legal id is the name of a budget of its own."""
    for name in ("a:b", "a", "*", "{a}", "é🦜\n", "x" * 3000, "budget:a"):
        shared = SharedBudget(name, max_cost_usd=1, store=store, reserve_usd=0.1)
        call, _ = node()
        await StromaRunner.quick(shared_budgets=shared).run([call], State())
        result = await shared.state()
        assert (result.name, cents(result.spent_usd)) == (name, 10)


def test_a_store_that_has_no_cells() -> None:
    """A store of the simple protocol, or none at all, is a TypeError that names those that will do."""

    class Simple:
        def save(self, *_: Any) -> None: ...

    for wrong in (Simple(), 5):
        with pytest.raises(TypeError, match="cannot store budget 'team'; pass SQLiteStore, PostgresStore"):
            SharedBudget("team", max_cost_usd=1, store=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a list of node ids"):
        SharedBudget("team", max_cost_usd=1, nodes="call")


async def test_a_store_by_its_url(tmp_path: Path) -> None:
    """A path or URL opens the store; two who name the same place share what is there."""
    path = tmp_path / "shared.db"
    first = SharedBudget("team", max_cost_usd=1, store=path, reserve_usd=0.1)
    second = SharedBudget("team", max_cost_usd=1, store=f"sqlite:///{path}", reserve_usd=0.1)
    call, _ = node()
    for shared in (first, second):
        await StromaRunner.quick(shared_budgets=shared).run([call], State())
    for shared in (first, second):
        result = await shared.state()
        assert cents(result.spent_usd) == 20
    with pytest.raises(ValueError, match="mongodb"):
        SharedBudget("team", max_cost_usd=1, store="mongodb://somewhere")


@pytest.mark.core
async def test_two_processes_that_do_not_agree_on_the_window(tmp_path: Path) -> None:
    """Another per= than the one that the store has is an error of the run, and nothing is called."""
    store = SQLiteStore(tmp_path / "runs.db")
    first = SharedBudget("team", max_cost_usd=1, per="day", store=store, reserve_usd=0.1)
    call, calls = node()
    await StromaRunner.quick(shared_budgets=first).run([call], State())
    other = SharedBudget("team", max_cost_usd=1, per="hour", store=store, reserve_usd=0.1)
    result = await StromaRunner.quick(shared_budgets=other).run([call], State())
    assert (result.status, len(calls)) == (RunStatus.PARTIAL, 1)
    assert "has per='day' in this store, but per='hour' here" in result.failure.message
    await store.aclose()


ACCOUNT = {"format": 1, "per": None, "limits": [1, None], "start": 0, "spent": [0, 0], "by_node": {}}
DAMAGED = [
    b"\xff",
    b"{}",
    b"[]",
    b"5",
    b'{"format": "x"}',
    b'{"format": 99}',
    b'{"format": 1}',
    *(
        json.dumps({**ACCOUNT, **wrong}).encode()
        for wrong in (
            {"spent": "x"},
            {"spent": []},
            {"spent": [None, 0]},
            {"holds": {"a": []}},
            {"holds": [1]},
            {"other": 1},
            {"recent": [{"call": ["x"]}, {}]},
            {"start": "x"},
            {"by_node": {"call": 5}},
        )
    ),
]


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("data", DAMAGED)
async def test_a_damaged_account(data: bytes, kind: str) -> None:
    """Nothing is called under an account that cannot be read, and the failure says so."""
    with store_of(kind) as store:
        await store.change_cell("budget:team", lambda old, now: (data, None))
        shared = SharedBudget("team", max_cost_usd=1, store=store, max_cost_usd_by_node={"call": 1})
        call, calls = node()
        result = await StromaRunner.quick(shared_budgets=shared).run([call], State())
        assert (result.status, calls) == (RunStatus.PARTIAL, [])
        assert result.failure.reason == "store"
        assert "budget 'team'" in result.failure.message


async def test_the_state_of_a_damaged_account() -> None:
    """Looking at it is a StoreError too."""
    store = AsyncInMemoryStore()
    await store.change_cell("budget:team", lambda old, now: (b"5", None))
    with pytest.raises(StoreError, match="the data of budget 'team' in the store is damaged"):
        await SharedBudget("team", max_cost_usd=1, store=store).state()


def test_a_config_takes_one_or_several() -> None:
    """RunConfig(shared_budgets=) refuses others and repeated names; copies of a config share the budget."""
    shared = SharedBudget("team", max_cost_usd=1, store=AsyncInMemoryStore())
    other = SharedBudget("team", max_cost_usd=2, store=AsyncInMemoryStore())
    for wrong in ("team", 5, [1], {"a": shared}):
        with pytest.raises(ValueError, match="shared_budgets"):
            RunConfig(shared_budgets=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two budgets of one name"):
        RunConfig(shared_budgets=[shared, other])
    config = RunConfig(shared_budgets=shared)
    assert copy.deepcopy(config).budgets[0] is config.budgets[0] is shared
