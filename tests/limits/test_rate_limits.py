"""Limits: how many calls begin, how many are in flight, and how those wait that have no turn yet."""

import asyncio
import copy
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import TWICE, failing_with, noting
from tests.limits.budget_helper import State
from tests.limits.test_shared_budget import start, together
from tests.shared_stores import ON_SERVERS, SHARED, STORES, place

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    Limit,
    LimitError,
    NodeHooks,
    RunConfig,
    RunStatus,
    SharedBudget,
    StoreError,
    StromaRunner,
    WaitedTooLong,
    parallel,
    stroma_node,
)
from stroma.failures.errors import Wait
from stroma.limits import rate_state as rates

NAMES = (f"limit-{n}" for n in itertools.count())
NOW = 1_900_000_000_000


store = store_fixture(*STORES)


def node(
    node_id: str = "call", *, tokens: int = 0, during: Callable[[], Any] | None = None
) -> tuple[Any, list[int]]:
    calls: list[int] = []

    @stroma_node(node_id, input=State, output=State)
    async def call(state: State) -> Any:
        calls.append(state.n)
        if during is not None:
            await during()
        return ({"n": state.n + 1}, tokens) if tokens else {"n": state.n + 1}

    return call, calls


def runner_of(limit: Limit, **options: Any) -> StromaRunner:
    """A runner whose nodes "call" are under a limit that no other test has."""
    name = next(NAMES)
    return StromaRunner.quick(limits={name: limit}, node_limits={"call": name}, **options)


class Clocked:
    """A limit's cell at a time of our own."""

    def __init__(self, **figures: int) -> None:
        self.rates = rates.RateLimits(
            "llm", figures.get("requests"), figures.get("tokens"), figures.get("concurrent")
        )
        self.data: bytes | None = None
        self.now = NOW
        self.count = 0

    def change(self, change: Any) -> Any:
        data, report = change(self.data, self.now)
        self.data = self.data if data is None else data
        return report

    def ask(self, tokens: int | None = None, node: str = "a") -> Any:
        self.count += 1
        return self.change(rates.acquire(self.rates, str(self.count), node, tokens, 30_000))

    def leave(self, number: int, tokens: int, **options: Any) -> None:
        self.change(rates.release_call("llm", str(number), tokens, rates.CallReport(**options), learns=True))


@pytest.mark.core
def test_requests_of_any_minute() -> None:
    """However they are spread, no 60 seconds see more requests than the limit, and it is used to the full."""
    limit, starts = Clocked(requests=10), list[int]()
    for step in itertools.cycle((0, 0, 0, 700, 1_300, 9_000, 1)):
        limit.now += step
        report = limit.ask()
        if report is None:
            starts.append(limit.now)
        else:
            assert report.reason == "requests_per_minute"
            limit.now += report.ms
            assert limit.ask() is None
            starts.append(limit.now)
        if len(starts) > 300:
            break
    for first in starts:
        assert sum(first <= at < first + 60_000 for at in starts) <= 10
    # One second of 61 is lost to counting in seconds.
    assert len(starts) * 6_300 >= starts[-1] - starts[0]


def test_the_wait_that_is_told_is_enough() -> None:
    """Who comes back after it finds room, who comes a second earlier does not."""
    limit = Clocked(requests=2)
    assert limit.ask() is limit.ask() is None
    report = limit.ask()
    limit.now += report.ms - 1
    assert limit.ask() is not None
    limit.now += 1
    assert limit.ask() is None
    limit = Clocked(tokens=100)
    assert limit.ask(50) is None
    limit.now += 1_000
    assert limit.ask(49) is None
    limit.now += limit.ask(52).ms  # Without the first 50, one token is still too much.
    assert limit.ask(52) is None


@pytest.mark.core
def test_tokens_count_as_reserved_and_then_as_used() -> None:
    """A call in flight counts for what it may take, one that has ended for what it took."""
    limit = Clocked(tokens=100)
    assert limit.ask(60) is None
    assert limit.ask(60) == Wait("tokens_per_minute", 61_000)
    limit.leave(1, 10)
    assert limit.ask(60) is None
    assert limit.ask(31).reason == "tokens_per_minute"
    assert limit.ask(30) is None


def test_the_first_call_takes_what_is_left_of_the_minute() -> None:
    """Of a node that nobody knows anything of, the first call goes alone; then what it took is reserved."""
    limit = Clocked(tokens=100)
    assert limit.ask() is None
    assert limit.ask(1, node="b").reason == "tokens_per_minute"
    limit.leave(1, 40)
    assert limit.ask() is None
    assert limit.ask().reason == "tokens_per_minute"
    assert limit.ask(20, node="b") is None


def test_a_call_that_was_not_made_counts_for_nothing() -> None:
    """It gives back its request and its tokens."""
    limit = Clocked(requests=1, tokens=100)
    assert limit.ask(60) is None
    limit.leave(1, 0, began=False)
    assert limit.ask(60) is None


def test_an_answer_that_was_lost() -> None:
    """Asked again under the same token, a call is let pass once."""
    limit = Clocked(requests=5, concurrent=1)
    change = rates.acquire(limit.rates, "x", "a", None, 30_000)
    assert limit.change(change) is limit.change(change) is None
    assert json.loads(limit.data or b"")["slots"] == [[NOW // 1000, 1, 0]]


@pytest.mark.core
def test_places_of_the_dead() -> None:
    """A place is free once its lease has ended, and not before."""
    limit = Clocked(concurrent=1)
    assert limit.ask() is None
    limit.now += 29_999
    assert limit.ask() == Wait("concurrent", None)
    limit.change(rates.renew_calls("llm", ["1"], 30_000))
    limit.now += 29_999
    assert limit.ask() == Wait("concurrent", None)
    limit.now += 1
    assert limit.ask() is None


@pytest.mark.parametrize("back", [500, 5_000, 70_000, 10**9])
def test_a_clock_that_is_set_back(back: int) -> None:
    """Nobody waits longer than a minute or two for it, and a small step lets nobody pass too early."""
    limit = Clocked(requests=1)
    assert limit.ask() is None
    limit.now -= back
    report = limit.ask()
    if back <= 60_000:
        assert report.ms <= 61_000 + back
        limit.now += report.ms
        assert limit.ask() is None
    else:
        assert report is None


@pytest.mark.core
async def test_no_more_at_once_than_may(store: Any) -> None:
    """concurrent= bounds the calls in flight of all runs; all get their turn, in order."""
    at_once, most = 0, 0
    full = asyncio.Event()

    async def during() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 3:
            full.set()
        await full.wait()  # The first ones; those that follow may have the place to themselves.
        await asyncio.sleep(0.002)
        at_once -= 1

    call, calls = node(during=during)
    runner = runner_of(Limit(concurrent=3, store=store))
    results = await asyncio.gather(*(runner.run([call], State(n=n)) for n in range(20)))
    assert {result.status for result in results} == {RunStatus.COMPLETED}
    assert most == 3
    assert sorted(calls[:3]) == [0, 1, 2]
    assert calls[3:] == sorted(calls[3:])


def test_event_loops_of_one_process() -> None:
    """Without a store, runs of all threads of the process share a limit by its name."""
    name, lock = next(NAMES), threading.Lock()
    at_once, most = 0, list[int]()

    async def during() -> None:
        nonlocal at_once
        with lock:
            at_once += 1
            most.append(at_once)
        await asyncio.sleep(0.005)
        with lock:
            at_once -= 1

    call, calls = node(during=during)

    def work() -> None:
        runner = StromaRunner.quick(limits={name: Limit(concurrent=2)}, node_limits={"call": name})

        async def go() -> None:
            await asyncio.gather(*(runner.run([call], State()) for _ in range(5)))

        asyncio.run(go())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(calls)) == (2, 15)


async def test_which_nodes_go_by_a_limit() -> None:
    """Those that node_limits names, and one whose own id is the limit's name; all others go by none."""
    starts, free = list[str](), asyncio.Event()

    def hold(name: str) -> Callable[[], Any]:
        async def during() -> None:
            starts.append(name)
            await free.wait()

        return during

    named, _ = node("draft", during=hold("draft"))
    own, _ = node("llm", during=hold("llm"))
    other, _ = node("parse", during=hold("parse"))
    limits = {"llm": Limit(concurrent=1, store=AsyncInMemoryStore())}
    runner = StromaRunner.quick(limits=limits, node_limits={"draft": "llm"})
    report = asyncio.Event()

    async def wait(*_: Any) -> None:
        report.set()

    running = [asyncio.create_task(runner.run([n], State())) for n in (named, other)]
    while len(starts) < 2:
        await asyncio.sleep(0)
    watched = StromaRunner.quick(limits=runner.config.limits, hooks=NodeHooks(on_node_wait=wait))
    running.append(asyncio.create_task(watched.run([own], State())))
    await report.wait()
    assert sorted(starts) == ["draft", "parse"]
    free.set()
    assert {(await run).status for run in running} == {RunStatus.COMPLETED}


async def test_every_attempt_is_a_request() -> None:
    """A retry waits for its turn like any other attempt; a group does not, its children do."""
    tries = []

    async def during() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("no")

    call, _ = node(during=during)
    limit = Limit(requests_per_minute=4, max_wait_seconds=0.01)
    runner = runner_of(limit, policy_map=TWICE)
    result = await runner.run([parallel(call)], State())
    assert (result.status, len(tries)) == (RunStatus.COMPLETED, 3)
    assert (await runner.run([call], State())).status is RunStatus.COMPLETED
    result = await runner.run([call], State())
    assert (result.status, len(tries)) == (RunStatus.PARTIAL, 4)


async def test_a_wait_is_told_and_kept() -> None:
    """on_node_wait hears of it when it begins, the trace has it with its reason, apart from the node."""
    events: list[Any] = []

    call, calls = node()
    limit = Limit(requests_per_minute=1, max_wait_seconds=0.05)
    runner = runner_of(limit, hooks=NodeHooks(on_node_wait=noting(events, lambda *arguments: arguments)))
    (name,) = runner.config.limits
    await runner.run([call], State(), run_id="1")
    result = await runner.run([call], State(), run_id="2")
    ((run_id, node_id, reason, seconds),) = events
    assert (run_id, node_id, reason) == ("2", "call", f"limit '{name}': requests_per_minute")
    assert 59 < seconds <= 61
    assert (result.status, len(calls), len(result.trace)) == (RunStatus.PARTIAL, 1, 0)
    assert (result.failure.failure_class, result.failure.reason) == (FailureClass.RECOVERABLE, "limit")
    assert isinstance(result.failure.exception, WaitedTooLong)
    assert (
        f"node 'call' waited 0.05 s at limit '{name}' for its turn (requests_per_minute=1)"
        in result.failure.message
    )
    assert result.trace.marks[0].reason == reason
    assert [mark.kind for mark in result.trace.marks] == ["wait", "refused"]
    assert result.trace.marks[0].waited_ms >= 50


@pytest.mark.core
async def test_a_wait_ends_with_the_latency_budget() -> None:
    """Who has no time left to wait is told that, as a budget that is spent."""
    call, calls = node()
    runner = runner_of(Limit(requests_per_minute=1), budget=ExecutionBudget(max_latency_ms=80))
    assert (await runner.run([call], State())).status is RunStatus.COMPLETED
    result = await runner.run([call], State())
    assert (result.status, len(calls)) == (RunStatus.PARTIAL, 1)
    error = result.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert (error.dimension, error.limit) == ("latency", 80)
    assert error.actual >= 80


async def test_a_wait_can_be_cancelled(store: Any) -> None:
    """Cancelled while it waits, a run holds no place and those behind it get their turn."""
    free, waits = asyncio.Event(), asyncio.Semaphore(0)

    async def wait(*_: Any) -> None:
        waits.release()

    call, calls = node(during=free.wait)
    runner = runner_of(Limit(concurrent=1, store=store), hooks=NodeHooks(on_node_wait=wait))
    first = asyncio.create_task(runner.run([call], State(n=0)))
    while not calls:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(runner.run([call], State(n=n))) for n in (1, 2)]
    for _ in others:
        await waits.acquire()
    others[0].cancel()
    assert isinstance((await asyncio.gather(others[0], return_exceptions=True))[0], asyncio.CancelledError)
    free.set()
    assert (await first).status is (await others[1]).status is RunStatus.COMPLETED
    assert calls == [0, 2]


@pytest.mark.core
async def test_a_limit_and_a_budget_are_given_back() -> None:
    """A call that waits at a limit, or is cancelled there, leaves nothing reserved in a budget."""
    store = AsyncInMemoryStore()
    shared = SharedBudget("team", max_tokens=10, store=store, reserve_tokens=4)
    free, report = asyncio.Event(), asyncio.Event()

    async def wait(*_: Any) -> None:
        report.set()

    call, _ = node(during=free.wait)
    hooks = NodeHooks(on_node_wait=wait)
    runner = runner_of(Limit(concurrent=1, store=store), shared_budgets=shared, hooks=hooks)
    first = asyncio.create_task(runner.run([call], State()))
    second = asyncio.create_task(runner.run([call], State()))
    await report.wait()
    state = await shared.state()
    assert state.reserved_tokens == 4
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    state = await shared.state()
    assert (state.reserved_tokens, state.calls) == (4, 1)
    free.set()
    assert (await first).status is RunStatus.COMPLETED


@pytest.mark.core
async def test_nobody_overtakes_those_who_wait() -> None:
    """A call for which there would be room waits behind one that came before and needs more."""
    free = asyncio.Event()
    report: asyncio.Queue[str] = asyncio.Queue()

    async def wait(run_id: str, *_: Any) -> None:
        report.put_nowait(run_id)

    store, name = AsyncInMemoryStore(), next(NAMES)
    first, _ = node("first", during=free.wait)
    large, larges = node("large")
    small, smalls = node("small")
    sizes = {"first": 50, "large": 60, "small": 10}
    shared = SharedBudget("team", max_tokens=100, store=store, reserve_tokens=sizes)
    runner = StromaRunner.quick(shared_budgets=shared, hooks=NodeHooks(on_node_wait=wait), pipeline=name)
    running = [asyncio.create_task(runner.run([first], State(), run_id="first"))]
    await asyncio.sleep(0)
    while (state := await shared.state()) is None or not state.calls:
        await asyncio.sleep(0)
    running.append(asyncio.create_task(runner.run([large], State(), run_id="large")))
    assert await report.get() == "large"
    running.append(asyncio.create_task(runner.run([small], State(), run_id="small")))
    assert await report.get() == "small"
    assert larges == smalls == []
    free.set()
    assert {(await run).status for run in running} == {RunStatus.COMPLETED}


@pytest.mark.core
async def test_a_limit_that_can_never_be_met() -> None:
    """A call that takes more tokens than a minute has is a terminal error once known."""
    call, calls = node(tokens=500)
    runner = runner_of(Limit(tokens_per_minute=100))
    assert (await runner.run([call], State())).status is RunStatus.COMPLETED
    result = await runner.run([call], State())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
    assert isinstance(result.failure.exception, LimitError)
    assert (result.failure.failure_class, result.failure.reason) == (FailureClass.TERMINAL, "limit")
    assert (
        "one call of node 'call' needs 500 tokens, more than tokens_per_minute=100" in result.failure.message
    )


def test_one_call_that_was_too_large() -> None:
    """It does not keep the others from being made: they take the whole minute until smaller ones come."""
    limit = Clocked(tokens=100)
    for number, took in ((1, 20), (2, 500)):
        assert limit.ask() is None
        limit.leave(number, took)
        limit.now += 61_000
    assert limit.ask() is None
    assert json.loads(limit.data or b"")["holds"]["3"][3] == 100
    limit.leave(3, 20)
    assert limit.ask(1, node="b") is None


def test_calls_that_are_made_smaller() -> None:
    """After the error the next call is made as if nobody knew anything of the node."""
    limit = Clocked(tokens=100)
    assert limit.ask() is None
    limit.leave(1, 500)
    limit.now += 61_000
    assert limit.ask() == rates.TooLarge(500)
    assert limit.ask() is None


async def test_a_limit_and_a_budget_do_not_wait_for_each_other() -> None:
    """Runs under both all come through."""
    store = AsyncInMemoryStore()
    shared = SharedBudget("team", max_tokens=1000, store=store, reserve_tokens=400)
    call, calls = node(tokens=10, during=lambda: asyncio.sleep(0))
    runner = runner_of(Limit(concurrent=2, store=store), shared_budgets=shared)
    results = await asyncio.gather(*(runner.run([call, call], State()) for _ in range(15)))
    assert {result.status for result in results} == {RunStatus.COMPLETED}
    assert len(calls) == 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_processes_share_the_places(kind: str) -> None:
    """With a store, no more calls are in flight in all processes together than may be."""
    with place(kind) as where:
        results = _processes(kind, where, {"concurrent": 2}, 3, 6)
    calls = [tuple(call) for result in results for call in result["calls"]]
    assert [status for result in results for status in result["statuses"]] == ["COMPLETED"] * 18
    for begin, _ in calls:
        assert sum(other <= begin < end for other, end in calls) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["sqlite", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ON_SERVERS)]
)
def test_processes_share_the_requests(kind: str) -> None:
    """With a store, all processes together begin no more calls in a minute than the limit."""
    with place(kind) as where:
        results = _processes(kind, where, {"requests_per_minute": 7, "max_wait_seconds": 0.5}, 3, 5)
    statuses = [status for result in results for status in result["statuses"]]
    assert sorted(statuses) == ["COMPLETED"] * 7 + ["PARTIAL"] * 8


def _processes(kind: str, where: str, options: dict[str, Any], processes: int, runs: int) -> list[Any]:
    command = [
        sys.executable,
        "-m",
        "tests.limits.budget_helper",
        kind,
        where,
        "limited",
        json.dumps(options),
    ]
    return together([start(*command, str(runs)) for _ in range(processes)])


@pytest.mark.core
async def test_a_store_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is made while it is."""
    store = AsyncInMemoryStore()

    monkeypatch.setattr(store, "change_cell", failing_with(StoreError, "down"))
    call, calls = node()
    result = await runner_of(Limit(concurrent=1, store=store)).run([call], State())
    assert (result.status, calls) == (RunStatus.PARTIAL, [])
    assert result.failure.reason == "store"


@pytest.mark.core
@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"{}",
        b"[]",
        b'{"format": 99}',
        b'{"format": 1, "slots": 5}',
        b'{"format": 1, "slots": [["x", 1, 1]]}',
        b'{"format": 1, "holds": {"a": []}}',
        b'{"format": 1, "slots": [], "x": 1}',
    ],
)
async def test_a_damaged_limit(data: bytes) -> None:
    """Nothing is called under a limit that cannot be read, and the failure says so."""
    store, name = AsyncInMemoryStore(), next(NAMES)
    await store.change_cell(f"limit:{name}", lambda old, now: (data, None))
    call, calls = node()
    limit = Limit(requests_per_minute=5, concurrent=5, store=store)
    result = await StromaRunner.quick(limits={name: limit}, node_limits={"call": name}).run([call], State())
    assert (result.status, calls) == (RunStatus.PARTIAL, [])
    assert result.failure.reason == "store"
    assert f"limit '{name}'" in result.failure.message


def test_the_end_of_a_call_under_a_damaged_limit() -> None:
    """A call that ends under a limit that cannot be read names the limit."""
    ended = rates.release_call("api", "token", None, rates.CallReport(), learns=False)
    for change in (ended, rates.end_lease("api", "token")):
        with pytest.raises(StoreError, match="the data of limit 'api' in the store is damaged"):
            change(b"\xff", 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Limit has no limit; pass requests_per_minute="),
        *(
            ({name: bad}, f"{name} must be an integer of at least 1, got")
            for name in ("requests_per_minute", "tokens_per_minute", "concurrent")
            for bad in (0, -1, True, 1.5, math.nan, "5", 10**40)
        ),
        ({"concurrent": 1, "reserve_tokens": 5}, "reserve_tokens needs tokens_per_minute"),
        (
            {"tokens_per_minute": 100, "reserve_tokens": 0},
            "reserve_tokens must be an integer of at least 1, got 0",
        ),
        (
            {"tokens_per_minute": 100, "reserve_tokens": 101},
            "is more than tokens_per_minute=100, so no call could be made",
        ),
        ({"concurrent": 1, "max_wait_seconds": math.nan}, "max_wait_seconds must be seconds"),
        ({"concurrent": 1, "lease_seconds": 0.01}, "lease_seconds must be at least 0.1, got 0.01"),
    ],
)
def test_a_wrong_figure(options: dict[str, Any], says: str) -> None:
    """Each is a ValueError that says what to give instead."""
    with pytest.raises(ValueError, match=says):
        Limit(**options)


def test_a_config_refuses_what_cannot_be() -> None:
    """A name that is no limit's, a wrong limit, a name that no store can keep, a store without cells."""
    limit = Limit(concurrent=1)
    with pytest.raises(ValueError, match=r"node_limits\['call'\] names an unknown limit 'lm'"):
        RunConfig(limits={"llm": limit}, node_limits={"call": "lm"})
    with pytest.raises(ValueError, match=r"limits\['llm'\] must be a Limit, got 5"):
        RunConfig(limits={"llm": 5})
    with pytest.raises(ValueError, match=r'limits must be a dict, got 5; pass {"name": Limit'):
        RunConfig(limits=5)
    for name in ("", "\0"):
        with pytest.raises(ValueError):
            RunConfig(limits={name: limit})
    with pytest.raises(TypeError, match="cannot store limit 'llm'"):
        RunConfig(limits={"llm": Limit(concurrent=1, store=5)})
    config = RunConfig(limits={"a:b*é": limit})
    assert copy.deepcopy(config).limits["a:b*é"] is limit


async def test_limits_that_no_node_uses() -> None:
    """A run whose nodes use none of the limits is a ValueError; children of groups count."""
    call, _ = node("call")  # No node of another test is named like the limit.
    limits = {"mine": Limit(concurrent=1, store=AsyncInMemoryStore())}
    with pytest.raises(
        ValueError, match=r"uses any of the limits \('mine'\); assign them with node_limits={node id: name}"
    ):
        await StromaRunner.quick(limits=limits, node_limits={"cal": "mine"}).run([call], State())
    await StromaRunner.quick(limits=limits, node_limits={"call": "mine"}).run([parallel(call)], State())


def test_event_loops_that_are_over() -> None:
    """A limit keeps nothing of them, however many there were."""
    limit = Limit(concurrent=1, store=AsyncInMemoryStore())
    call, calls = node(during=lambda: asyncio.sleep(0))
    runner = runner_of(limit)

    async def two() -> None:
        await asyncio.gather(runner.run([call], State()), runner.run([call], State()))

    for _ in range(5):
        asyncio.run(two())
    (name,) = runner.config.limits
    assert (len(calls), len(limit.named(name)._queues)) == (10, 1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_child_of_fork_begins_anew() -> None:
    """What calls of its parent hold in memory counts for the parent alone."""
    name = next(NAMES)

    async def fork() -> None:
        child = os.fork()
        if child == 0:
            state, _ = _process_cells().read_cell(f"limit:{name}")
            os._exit(0 if state is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    call, _ = node(during=fork)
    runner = StromaRunner.quick(limits={name: Limit(concurrent=1)}, node_limits={"call": name})
    assert (await runner.run([call], State())).status is RunStatus.COMPLETED
    assert _process_cells().read_cell(f"limit:{name}")[0] is not None


def _process_cells() -> Any:
    from stroma.limits import gate as _gate

    return _gate._PROCESS
