"""Durations, deadlines and waits, by a clock that only moves where a test says so: each figure is exact."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import NEVER, ONCE, Many, Num, cancel, here, node, noting

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    current_run,
    map_over,
    parallel,
)
from stroma.contracts.node import Group
from stroma.testing import FakeClock


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock() as instance:
        yield instance


def taking(clock: FakeClock, node_id: str, ms: float, *raises: BaseException, waits: bool = True) -> Any:
    """A node that takes so long: it waits, or blocks the loop; raises these in its first attempts."""
    left = list(raises)

    async def func(state: Num) -> Any:
        await spend(clock, ms, waits)
        if left:
            raise left.pop(0)
        return state

    return node(node_id, func)


async def spend(clock: FakeClock, ms: float, waits: bool = True) -> None:
    if waits:
        await asyncio.sleep(ms / 1000)
    else:
        clock.advance(ms / 1000)


def forever(node_id: str) -> Any:
    async def func(state: Num) -> Any:
        await asyncio.sleep(10**6)

    return node(node_id, func)


class Watch:
    """What the hooks find: how long each attempt took, and what the whole run used."""

    def __init__(self, clock: FakeClock, hook_ms: float = 0.0) -> None:
        self.clock = clock
        self.hook_ms = hook_ms
        self.took: dict[str, list[float]] = {}
        self.latency = -1.0

    def hooks(self) -> NodeHooks:
        async def start(*_: Any) -> None:
            self.clock.advance(self.hook_ms / 1000)

        async def end(run_id: str, node_id: str, *_: Any) -> None:
            here = current_node()
            assert here.duration_ms is not None
            assert here.function_ms is not None
            assert here.duration_ms == here.function_ms or here.kind == "group"
            self.took.setdefault(node_id, []).append(round(here.function_ms, 1))
            self.clock.advance(self.hook_ms / 1000)

        async def run_end(*_: Any) -> None:
            run = current_run()
            self.latency = round(run.cost_tracker.used("latency"), 1)

        return NodeHooks(
            on_node_start=start,
            on_node_success=end,
            on_node_failure=end,
            on_node_cancelled=end,
            on_node_suspended=end,
            on_run_end=run_end,
        )


async def run(
    watch: Watch, nodes: list[Any], state: BaseModel | None = None, **config: Any
) -> ExecutionResult:
    config = {"policy_map": NEVER, "hooks": watch.hooks(), "hook_timeout_ms": None, **config}
    return await StromaRunner.quick(**config).run(nodes, state or Num())


def shapes(clock: FakeClock) -> dict[str, tuple[list[Any], dict[str, list[float]], float]]:
    """Nodes, what each of their attempts takes in ms, and the latency of the run."""

    def take(node_id: str, ms: float, *raises: BaseException, waits: bool = True) -> Any:
        return taking(clock, node_id, ms, *raises, waits=waits)

    async def bad(state: Num) -> Any:
        clock.advance(0.04)
        return {"n": "none"}

    async def paid(state: Num) -> Any:
        clock.advance(0.03)
        return {"n": 1}, 7

    two, three = take("a", 200), take("b", 300)
    return {
        "in turn": ([two, three], {"a": [200], "b": [300]}, 500),
        "blocking": ([take("a", 200, waits=False)], {"a": [200]}, 200),
        "with usage": ([node("a", paid)], {"a": [30]}, 30),
        "side by side": ([parallel(two, three)], {"a": [200], "b": [300], "parallel(a, b)": [300]}, 300),
        "one by one": (
            [parallel(two, three, max_concurrency=1)],
            {"a": [200], "b": [300], "parallel(a, b)": [500]},
            500,
        ),
        "nested": (
            [
                parallel(two, parallel(three, take("c", 50), max_concurrency=1), max_concurrency=1),
                take("d", 1),
            ],
            {
                "a": [200],
                "b": [300],
                "c": [50],
                "parallel(b, c)": [350],
                "parallel(a, parallel(b, c))": [550],
                "d": [1],
            },
            551,
        ),
        "tried again": ([take("a", 100, ConnectionError("down"))], {"a": [100, 100]}, 200),
        "a child is tried again": (
            [parallel(take("a", 100, ConnectionError("down")))],
            {"a": [100, 100], "parallel(a)": [200]},
            200,
        ),
        "given up": ([take("a", 100, ValueError("1"), ValueError("2"))], {"a": [100, 100]}, 200),
        "bad output": ([node("a", bad)], {"a": [40]}, 40),
        "suspended": ([take("a", 60, Suspend("may I?"))], {"a": [60]}, 60),
        "suspended inside": (
            [parallel(take("a", 60, Suspend("may I?")), three, max_concurrency=1)],
            {"a": [60], "b": [300], "parallel(a, b)": [360]},
            360,
        ),
        "failed inside": (
            [parallel(two, take("b", 20, ValueError("1"), ValueError("2")), max_concurrency=1)],
            {"a": [200], "b": [20, 20], "parallel(a, b)": [240]},
            240,
        ),
        "without a contract": ([_bare(clock, "a", 70)], {"a": [70]}, 70),
    }


def _bare(clock: FakeClock, node_id: str, ms: float) -> Any:
    async def func(state: Any) -> Any:
        clock.advance(ms / 1000)
        return "done"

    func._stroma_node_id = node_id
    return func


NAMES = list(shapes(FakeClock()))


@pytest.mark.parametrize("hook_ms", [0.0, 1000.0])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("name", NAMES)
async def test_how_long_it_took(name: str, limited: bool, hook_ms: float, clock: FakeClock) -> None:
    """A function ran for what it took, a group for what those in it took; neither hooks nor waits count."""
    if hook_ms and name == "side by side":
        return  # There the hooks of one child block the function of the other.
    watch = Watch(clock, hook_ms)
    nodes, took, latency = shapes(clock)[name]
    budget = ExecutionBudget(max_latency_ms=10**6) if limited else ExecutionBudget()
    slow = {kind: FailurePolicy(max_retries=1, backoff_seconds=9, jitter=False) for kind in FailureClass}
    store = AsyncInMemoryStore()
    result = await run(watch, nodes, budget=budget, policy_map=slow, store=store, run_id="r")
    assert watch.took == took
    assert watch.latency == latency
    entries: dict[str, list[float]] = {}
    for attempt in store.attempts("r"):
        entries.setdefault(attempt.node_id, []).append(round(attempt.function_ms, 1))
    assert entries == took
    traced: dict[str, list[int]] = {}
    for event in result.trace.walk():
        traced.setdefault(event.node_id, []).append(event.function_ms or 0)
    # Whole milliseconds that are over.
    assert traced.keys() == took.keys()
    assert all(
        ms - 1 <= report <= ms for name in took for report, ms in zip(traced[name], took[name], strict=True)
    )


async def test_each_attempt_of_a_group_takes_its_own_time(clock: FakeClock) -> None:
    """A group that is tried again takes what ran in that attempt, and so does what the deadline goes by."""
    for budget in (ExecutionBudget(), ExecutionBudget(max_latency_ms=1000)):
        nodes, watch = [parallel(taking(clock, "a", 100, ConnectionError("down")))], Watch(clock)
        await run(watch, nodes, node_policies={"parallel(a)": ONCE}, budget=budget)
        assert watch.took == {"a": [100, 100], "parallel(a)": [100, 100]}
        assert watch.latency == 200


async def test_how_long_items_took(clock: FakeClock) -> None:
    """A map takes what its items took together, one by one; each item what it took itself."""
    watch = Watch(clock)
    mapped = map_over("items", taking(clock, "each", 80), into="made", max_concurrency=1)
    await run(watch, [mapped], Many(items=[Num(), Num()]))
    assert watch.took == {"each": [80, 80], "map_over(items, each)": [160]}
    assert watch.latency == 160


async def test_how_long_a_cancelled_attempt_took(clock: FakeClock) -> None:
    """It is told, kept, and counts, for a node, and for a group what ran in it."""
    for nodes, took in (
        ([forever("a")], {"a": [250.0]}),
        (
            [parallel(taking(clock, "b", 50), forever("a"), max_concurrency=1)],
            {"b": [50.0], "a": [200.0], "parallel(b, a)": [250.0]},
        ),
    ):
        watch, store = Watch(clock), AsyncInMemoryStore()
        task = asyncio.create_task(run(watch, nodes, store=store, run_id="r"))
        await asyncio.sleep(0.25)
        await cancel(task)
        assert watch.took == took
        assert watch.latency == 250
        assert {row.node_id: [round(row.duration_ms, 1)] for row in store.attempts("r")} == took


@pytest.mark.core
async def test_when_attempts_began(clock: FakeClock) -> None:
    """The trace, the journal and the hooks of the end say when the function was called, not its hooks."""
    began: list[int] = []

    async def start(*_: Any) -> None:
        clock.advance(5)

    async def success(*_: Any) -> None:
        here = current_node()
        assert here.started_ns is not None
        began.append(here.started_ns)

    store, first = AsyncInMemoryStore(), clock.now()
    runner = StromaRunner.quick(store=store, hooks=NodeHooks(on_node_start=start, on_node_success=success))
    result = await runner.run([taking(clock, "a", 200), taking(clock, "b", 300)], Num(), run_id="r")
    starts = [(event.timestamp_utc - first).total_seconds() for event in result.trace]
    assert starts == pytest.approx([5.0, 10.2], abs=0.001)
    assert [row.started_ns / 1e9 - first.timestamp() for row in store.attempts("r")] == pytest.approx(
        [5.0, 10.2], abs=0.001
    )
    assert [ns / 1e9 - first.timestamp() for ns in began] == pytest.approx([5.0, 10.2], abs=0.001)


LIMIT = ExecutionBudget(max_latency_ms=1000)


def deadlines(clock: FakeClock) -> dict[str, tuple[list[Any], str, float]]:
    """Nodes, which of them meets the deadline, and when, in s."""
    fails = ConnectionError("down")

    async def late(state: Num) -> Any:
        await asyncio.sleep(0.3)
        if here().attempt == 1:
            raise fails
        await asyncio.sleep(10**6)

    one_by_one: Any = {"max_concurrency": 1}
    return {
        "at once": ([forever("x")], "x", 1.0),
        "after another": ([taking(clock, "a", 400), forever("x")], "x", 1.0),
        "in a group": ([parallel(taking(clock, "a", 400), forever("x"), **one_by_one)], "x", 1.0),
        "beside another": ([parallel(taking(clock, "a", 400), forever("x"))], "x", 1.0),
        "after a group": ([parallel(taking(clock, "a", 400)), forever("x")], "x", 1.0),
        "in a group after another": ([taking(clock, "a", 400), parallel(forever("x"))], "x", 1.0),
        "deep": (
            [
                parallel(
                    taking(clock, "a", 400),
                    parallel(taking(clock, "b", 100), forever("x"), **one_by_one),
                    **one_by_one,
                )
            ],
            "x",
            1.0,
        ),
        "deeper": ([parallel(parallel(parallel(forever("x"))))], "x", 1.0),
        "behind a wait": ([node("x", late)], "x", 1.0 + 9.0),
        "in a group behind a wait": ([parallel(node("x", late))], "x", 1.0 + 9.0),
    }


def groups_in(nodes: Iterable[Any]) -> list[str]:
    groups = [node for node in nodes if isinstance(node, Group)]
    return [group.node_id for group in groups] + [
        one for group in groups for one in groups_in(group.children)
    ]


DEADLINES = list(deadlines(FakeClock()))


@pytest.mark.core
@pytest.mark.parametrize("name", DEADLINES)
async def test_the_deadline_is_met(name: str, clock: FakeClock) -> None:
    """The function in flight is cut off once the run's functions took so long; waits do not count; nothing is
    retried, whatever the policies of nodes and groups say."""
    nodes, late, elapsed = deadlines(clock)[name]
    slow = {kind: FailurePolicy(max_retries=5, backoff_seconds=9, jitter=False) for kind in FailureClass}
    watch, begin = Watch(clock), clock.elapsed
    own = dict.fromkeys(groups_in(nodes), slow)
    result = await run(watch, nodes, budget=LIMIT, policy_map=slow, node_policies=own)
    assert clock.elapsed - begin == pytest.approx(elapsed, abs=0.001)
    assert result.status is RunStatus.PARTIAL
    error = result.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert (error.dimension, error.limit, error.node_id) == ("latency", 1000, late)
    assert float(error.actual) == pytest.approx(1000, abs=0.0005)
    assert float(error.actual) >= 1000
    assert watch.latency == pytest.approx(1000, abs=0.1)
    (failed,) = [e for e in result.trace.walk() if e.node_id == late and e.reason == "budget"]
    assert failed.failure is FailureClass.RECOVERABLE


@pytest.mark.parametrize(
    ("own_ms", "error", "elapsed"),
    [
        (600, TimeoutError, 0.6),
        (599, TimeoutError, 0.599),
        (1000, TimeoutError, 1.0),
        (1001, BudgetExceeded, 1.0),
    ],
)
async def test_the_nearer_of_two_limits(
    own_ms: int, error: type[Exception], elapsed: float, clock: FakeClock
) -> None:
    """Of a node's timeout and the run's deadline the nearer ends it and is named; if equal, the node's."""
    result = await run(Watch(clock), [forever("x")], budget=LIMIT, node_timeouts={"x": own_ms})
    assert isinstance(result.failure.exception, error)
    assert clock.elapsed == pytest.approx(elapsed, abs=0.001)
    if error is TimeoutError:
        assert (
            result.failure.message
            == f"node 'x' did not end within {own_ms} ms; raise node_timeouts['x'], or make the call shorter"
        )


@pytest.mark.core
async def test_the_timeout_of_a_group_is_its_own(clock: FakeClock) -> None:
    """It bounds the whole group, waits and hooks of its children included, a deadline only its children."""
    nodes = [parallel(taking(clock, "a", 400), forever("x"), max_concurrency=1)]
    result = await run(Watch(clock), nodes, budget=LIMIT, node_timeouts={"parallel(a, x)": 700})
    assert (
        result.failure.message
        == "node 'parallel(a, x)' did not end within 700 ms; raise node_timeouts['parallel(a, x)'], or make "
        "the call shorter"
    )
    assert clock.elapsed == pytest.approx(0.7, abs=0.001)
    ends = [(e.node_id, e.outcome) for e in result.trace.walk()]
    assert ends == [("parallel(a, x)", "failure"), ("a", "success"), ("x", "cancelled")]


async def test_a_timeout_is_each_attempts_own(clock: FakeClock) -> None:
    """Each attempt has the whole of it; hooks and waits between attempts are not in it."""
    watch = Watch(clock, hook_ms=5000)
    slow = {kind: FailurePolicy(max_retries=1, backoff_seconds=9, jitter=False) for kind in FailureClass}
    result = await run(watch, [forever("x")], node_timeouts={"x": 300}, policy_map=slow)
    assert watch.took == {"x": [300, 300]}
    assert result.failure.reason == "timeout"
    assert clock.waits == [9.0]


async def test_a_node_that_blocked_past_the_deadline(clock: FakeClock) -> None:
    """What it returned is kept, and the run ends with what it really used."""
    nodes = [taking(clock, "a", 2500, waits=False), taking(clock, "b", 1)]
    result = await run(Watch(clock), nodes, Num(n=3), budget=LIMIT)
    assert (result.status, result.final_state, len(result.trace)) == (RunStatus.PARTIAL, Num(n=3), 1)
    error = result.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert float(error.actual) == pytest.approx(2500, abs=0.0005)


async def test_a_child_is_not_called_once_its_group_took_too_long(clock: FakeClock) -> None:
    """Time that the functions of a group took counts before the group ended: the next child is not called."""
    nodes = [parallel(taking(clock, "a", 1500, waits=False), taking(clock, "b", 1), max_concurrency=1)]
    watch = Watch(clock)
    result = await run(watch, nodes, budget=LIMIT)
    assert watch.took.keys() == {"a", "parallel(a, b)"}
    error = result.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert (error.dimension, error.limit, error.node_id) == ("latency", 1000, "b")
    assert float(error.actual) == pytest.approx(1500, abs=0.0005)
    assert result.status is RunStatus.PARTIAL


async def test_what_was_used_before_a_resume_counts(clock: FakeClock) -> None:
    """The deadline of a run that goes on is what its first part has left."""
    store = AsyncInMemoryStore()
    nodes = [taking(clock, "a", 400), taking(clock, "x", 1, ConnectionError("down"))]
    await run(Watch(clock), nodes, budget=LIMIT, store=store, run_id="r")
    begin = clock.elapsed
    nodes = [taking(clock, "a", 400), forever("x")]
    result = await run(Watch(clock), nodes, budget=LIMIT, store=store, run_id="r", resume=True)
    assert clock.elapsed - begin == pytest.approx(0.599, abs=0.001)
    assert result.failure.reason == "budget"


@pytest.mark.core
@pytest.mark.parametrize("outer", [None, 10_000])
async def test_the_deadline_of_a_run_inside_is_not_the_runs(outer: int | None, clock: FakeClock) -> None:
    """A node that runs a pipeline that meets its deadline has failed: it is retried as policies say."""
    calls: list[int] = []

    async def inside(state: Num) -> Any:
        calls.append(1)
        inner = StromaRunner.quick(budget=ExecutionBudget(max_latency_ms=100), policy_map=NEVER)
        result = await inner.run([forever("x")], state)
        result.raise_for_status()

    budget = ExecutionBudget(max_latency_ms=outer)
    result = await run(Watch(clock), [node("a", inside)], budget=budget, policy_map=ONCE)
    assert len(calls) == 2
    assert result.failure.reason == "budget"
    assert clock.elapsed == pytest.approx(0.2, abs=0.001)


async def test_a_classifier_may_end_the_run_for_a_deadline(clock: FakeClock) -> None:
    """What a classifier says of it decides whether the run is FAILED or PARTIAL; it is never called again."""
    messages = [lambda error, _: FailureClass.TERMINAL]
    result = await run(Watch(clock), [forever("x")], budget=LIMIT, classifiers=messages, policy_map=ONCE)
    assert (result.status, len(result.trace)) == (RunStatus.FAILED, 1)


async def test_waits_between_attempts(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """They grow as the policy says, are told to the hook, and written to the log in seconds."""
    events: list[tuple[int, float]] = []

    retry = noting(events, lambda run_id, node_id, attempt, delay, kind: (attempt, delay))
    policy = FailurePolicy(max_retries=3, backoff_seconds=0.5, multiplier=3, jitter=False)
    errors = [ConnectionError("down") for _ in range(3)]
    policies = {FailureClass.RECOVERABLE: policy}
    runner = StromaRunner.quick(policy_map=policies, hooks=NodeHooks(on_node_retry=retry))
    with caplog.at_level("INFO", logger="stroma"):
        result = await runner.run([taking(clock, "a", 0, *errors)], Num())
    assert result.status is RunStatus.COMPLETED
    assert clock.waits == [0.5, 1.5, 4.5]
    assert events == [(2, 0.5), (3, 1.5), (4, 4.5)]
    messages = [r.getMessage() for r in caplog.records if "follows" in r.getMessage()]
    assert messages == [
        f"run {result.run_id!r}: node 'a': attempt {number} follows in {seconds} s"
        for number, seconds in ((2, "0.500"), (3, "1.500"), (4, "4.500"))
    ]
    assert clock.elapsed == pytest.approx(6.5, abs=0.001)
