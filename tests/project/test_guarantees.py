"""The guarantees of DESIGN section 2: each test names its own in its docstring."""

import ast
import asyncio
import datetime as dt
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, RootModel
from tests.kit import NEVER, ONCE, THRICE, Num, Text, node
from tests.tiers import examples

import stroma
from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ContractViolation,
    CorruptCheckpoint,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    HookError,
    InMemoryStore,
    NodeContext,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StoreError,
    StromaRunner,
    classify,
    current_node,
    current_node_or_none,
    current_run,
    execute_step,
    map_over,
    parallel,
)
from stroma.checkpoint import Committed, PriorUsage, RunRequest, Session, StepCall, resolve_schema
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.copying import pickle_data
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.snapshots import PickledSnapshot
from stroma.cost import CostTracker
from stroma.engine.tasks import TICK_SECONDS, LoopTicks
from stroma.trace.events import AttemptRow

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS
SOURCE = Path(stroma.__file__).parent
EXAMPLES = examples(60)


quick = partial(StromaRunner.quick, policy_map=THRICE)


class Deep(BaseModel):
    items: list[Num]
    table: dict[str, list[int]] = {}


class Loose(BaseModel):
    anything: Any = None


def giving(output: Any) -> tuple[Any, list[Any]]:
    """A node's function that returns a value, and the list of its inputs."""
    calls: list[Any] = []

    async def func(state: Any) -> Any:
        calls.append(state)
        return output

    return func, calls


class Pairs:
    """Hooks that note each start and each end of an attempt, by its place."""

    def __init__(self, pause: int = 0) -> None:
        self.starts: Counter[tuple[Any, ...]] = Counter()
        self.ends: Counter[tuple[Any, ...]] = Counter()
        self.order: list[str] = []
        self.pause = pause
        self.hooks = NodeHooks(
            on_node_start=self.start,
            on_node_success=self.success,
            on_node_failure=self.failure,
            on_node_cancelled=self.cancelled,
        )

    def _note(self, what: Counter[tuple[Any, ...]], word: str, node_id: str) -> None:
        run = current_node()
        assert run.node_id == node_id
        what[run.run_id, run.position, run.branch, run.attempt] += 1
        self.order.append(f"{word} {node_id}")

    async def _suspend(self) -> None:
        for _ in range(self.pause):
            await asyncio.sleep(0)

    async def start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        self._note(self.starts, "start", node_id)
        await self._suspend()

    async def success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        self._note(self.ends, "success", node_id)
        await self._suspend()

    async def failure(self, run_id: str, node_id: str, exc: Exception, kind: FailureClass) -> None:
        self._note(self.ends, "failure", node_id)
        await self._suspend()

    async def cancelled(self, run_id: str, node_id: str) -> None:
        self._note(self.ends, "cancelled", node_id)
        await self._suspend()

    def check(self) -> None:
        assert self.starts == self.ends
        assert set(self.starts.values()) <= {1}


class Suspending:
    """A journal store in memory whose every call suspends a few times, before and after it did its work.

    ``kept`` lists (node id, position, branch) of each commit that the inner store has; ``refusals`` is how
    many more commits it refuses.
    """

    def __init__(self, pauses: int = 2, refusals: int = 0, error: type[Exception] = OSError) -> None:
        self.inner = AsyncInMemoryStore()
        self.save, self.load, self.delete = self.inner.save, self.inner.load, self.inner.delete
        self.pauses = pauses
        self.refusals = refusals
        self.error = error
        self.commits: list[tuple[str, int, str]] = []

    async def pause(self) -> None:
        for _ in range(self.pauses):
            await asyncio.sleep(0)

    async def open_run(self, request: RunRequest) -> Session:
        await self.pause()
        session = self.inner.open_run(request)
        await self.pause()
        return _SuspendingSession(self, session)


class _SuspendingSession(NullSession):
    def __init__(self, store: Suspending, inner: Session) -> None:
        self.store = store
        self.inner = inner
        self.address, self.epoch, self.charges = inner.address, inner.epoch, inner.charges
        self.places, self.tried, self.note_call = inner.places, inner.tried, inner.note_call
        self.execution: int = inner.execution
        self.continued: bool = inner.continued
        self.finished = inner.finished
        self.abandon = inner.abandon
        self.restored: Mapping[tuple[int, str], Committed] = inner.restored
        self.prior: PriorUsage = inner.prior

    async def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        await self.store.pause()
        if output is not None and self.store.refusals > 0:
            self.store.refusals -= 1
            raise self.store.error("the disk is full")
        assert self.inner.record(row, schema, output, call) is None
        if output is not None:
            self.store.commits.append((row.node_id, row.position, row.branch))
        await self.store.pause()

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> Awaitable[None] | None:
        async def work() -> None:
            await self.store.pause()
            self.inner.end(status, error)

        return work()


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    from stroma.engine import commit as _commit

    monkeypatch.setattr(_commit, "_STORE_DELAYS", tuple(0 for _ in _commit._STORE_DELAYS))


# ---------------------------------------------------------------------- G1


def _mutated() -> Any:
    model = Deep(items=[Num(n=1)])
    model.items[0].n = "bad"  # type: ignore[assignment]
    return model


def _mutated_top() -> Any:
    model = Deep(items=[Num(n=1)])
    model.items = "bad"  # type: ignore[assignment]
    return model


def _missing() -> Any:
    model = Deep(items=[])
    del model.items
    return model


BROKEN = {
    "dict": {"items": [{"n": "bad"}]},
    "constructed": Deep.model_construct(items=[{"n": "bad"}]),
    "constructed-empty": Deep.model_construct(),
    "constructed-child": Deep.model_construct(items=[Num.model_construct(n="bad")]),
    "mutated-child": _mutated(),
    "mutated": _mutated_top(),
    "deleted": _missing(),
    "another-class": Text(text="x"),
    "appended": Deep.model_construct(items=[Num(), None]),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in-a-group"])
async def test_g1_broken_output_stops_at_its_boundary(name: str, grouped: bool) -> None:
    """G1: output that failed its contract is never committed, never traced as output, never handed on."""
    func, calls = giving(BROKEN[name])
    after, others = giving({"n": 1})
    store = InMemoryStore()
    pairs = Pairs()
    bad = node("bad", func, Num, Deep)
    result = await quick(store=store, run_id="r", hooks=pairs.hooks).run(
        [parallel(bad) if grouped else bad, node("after", after, Deep, Num)], Num(n=3)
    )
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert isinstance(result.failure.exception, ContractViolation)
    assert (len(calls), others) == (1, [])
    assert [event.output_state for event in result.trace.walk()] == [None] * (2 if grouped else 1)
    assert store.load("r", "bad") is None
    assert result.final_state == Num(n=3)
    assert not any("success" in line for line in pairs.order)


@pytest.mark.parametrize(
    "state",
    [Num.model_construct(n="bad"), Text.model_construct(), Text(text="x"), Loose(anything=1)],
    ids=["constructed", "empty", "another-class", "loose"],
)
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in-a-group"])
async def test_g1_a_function_sees_only_valid_input(state: BaseModel, grouped: bool) -> None:
    """G1: a node's function is not called on input that fails its input contract."""

    class Needs(BaseModel):
        n: int

    func, calls = giving({"n": 1})
    bare = node("a", func, Needs, Num)
    result = await quick().run([parallel(bare) if grouped else bare], state)
    assert result.status is RunStatus.FAILED
    assert calls == []


async def test_g1_input_is_of_the_inputs_class() -> None:
    """G1: a node gets an instance of its own input class, validated, even if the state before is of a
    subclass."""

    class Sub(Num):
        secret: str = "s"

    func, calls = giving({"n": 1})
    await quick().run([node("a", func)], Sub(n=2))
    assert type(calls[0]) is Num
    assert calls == [Num(n=2)]


async def test_g1_a_state_changed_between_nodes_is_validated_again() -> None:
    """G1: what an earlier node does to the object it returned does not reach the next node unvalidated."""
    entries: list[Num] = []

    async def first(state: Num) -> Num:
        entries.append(Num(n=1))
        return entries[0]

    async def spoil(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        entries[0].n = "bad"  # type: ignore[assignment]

    func, calls = giving({"n": 2})
    result = await quick(hooks=NodeHooks(on_node_success=spoil)).run(
        [node("a", first), node("b", func)], Num()
    )
    assert result.status is RunStatus.COMPLETED
    assert calls == [Num(n=1)]


# ---------------------------------------------------------------------- G2


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Prickly(Exception):
    @property
    def status_code(self) -> int:
        raise RuntimeError("no")

    @property
    def response(self) -> Any:
        raise KeyError("no")


class Odd(BaseException):
    pass


class Lying(Exception):
    status_code = "429"
    headers = 5
    response = 7
    body = 5


def answers_nonsense(exc: Exception, context: NodeContext) -> Any:
    return "PERHAPS"


def raises(exc: Exception, context: NodeContext) -> Any:
    raise ValueError("the classifier is broken")


def raises_base(exc: Exception, context: NodeContext) -> Any:
    raise Mute


@pytest.mark.parametrize(
    "make",
    [ValueError, Mute, Prickly, Lying, lambda: ExceptionGroup("g", [Mute()])],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize(
    "classifiers", [[], [raises], [answers_nonsense], [raises_base, raises, answers_nonsense]], ids=len
)
@pytest.mark.parametrize("sync", [False, True], ids=["async", "thread"])
async def test_g2_every_exception_gets_one_class(make: Any, classifiers: list[Any], sync: bool) -> None:
    """G2: every exception gets exactly one failure class, whatever classifiers and the exception itself
    do."""
    events: list[Any] = []
    error: BaseException = make()

    async def tell(run_id: str, node_id: str, exc: Exception, kind: FailureClass) -> None:
        events.append((exc, kind))

    async def func(state: Num) -> Any:
        raise error

    def func_sync(state: Num) -> Any:
        raise error

    runner = quick(policy_map=ONCE, classifiers=classifiers, hooks=NodeHooks(on_node_failure=tell))
    result = await runner.run([node("a", func_sync if sync else func)], Num())
    assert result.status is RunStatus.PARTIAL
    assert [event.failure for event in result.trace] == [A, A]
    assert events == [(error, A)] * 2
    assert all(isinstance(event.failure_message, str) and event.failure_message for event in result.trace)
    assert result.trace.to_json()


def test_g2_a_good_classifier_is_heard_past_a_bad_one(caplog: pytest.LogCaptureFixture) -> None:
    """G2: a classifier that raises is logged and skipped, and the next is asked."""
    context = NodeContext("a", 1, "r")
    assert classify(ValueError(), context, [raises, answers_nonsense, lambda e, c: T]) is T
    assert classify(Mute(), context, [raises]) is A
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 3


# ---------------------------------------------------------------------- G3


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", [R, A])
async def test_g3_n_retries_are_n_attempts_after_the_first(n: int, kind: FailureClass) -> None:
    """G3: max_retries=N means N attempts after the first, for every class that may retry."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ValueError

    policies = {kind: FailurePolicy(max_retries=n, backoff_seconds=0)}
    result = await quick(policy_map=policies, classifiers=[lambda e, c: kind]).run([node("a", func)], Num())
    assert result.status is RunStatus.PARTIAL
    assert len(calls) == n + 1
    assert [event.attempt for event in result.trace] == list(range(1, n + 2))


async def test_g3_terminal_never_retries() -> None:
    """G3: TERMINAL never retries, whatever its policy says."""
    func, calls = giving(None)
    policies = {T: FailurePolicy(max_retries=9, backoff_seconds=0)}
    for own in ({}, {"a": policies}):
        result = await quick(policy_map=policies, node_policies=own).run([node("a", func)], Num())
        assert result.status is RunStatus.FAILED
    assert len(calls) == 2


@EXAMPLES
@given(
    kinds=st.lists(st.sampled_from([R, A, T]), max_size=8),
    recoverable=st.integers(0, 5),
    ambiguous=st.integers(0, 5),
)
def test_g3_mixed_classes_share_one_count(
    kinds: list[FailureClass], recoverable: int, ambiguous: int
) -> None:
    """G3: one count serves all classes; the policy of the last failure's class decides whether another
    attempt follows."""
    allowed = {R: recoverable, A: ambiguous, T: 0}
    expected: list[FailureClass] = []
    for retries, kind in enumerate(kinds):
        expected.append(kind)
        if retries >= allowed[kind]:
            break
    succeeds = len(expected) == len(kinds) and (not kinds or len(kinds) - 1 < allowed[kinds[-1]])

    left = list(kinds)

    async def func(state: Num) -> Any:
        if left:
            raise LookupError(left.pop(0))
        return {"n": 1}

    runner = quick(
        policy_map={c: FailurePolicy(max_retries=k, backoff_seconds=0) for c, k in allowed.items()},
        classifiers=[lambda e, c: e.args[0]],
    )
    result = runner.run_sync([node("a", func)], Num())
    assert [event.failure for event in result.trace] == expected + [None] * succeeds
    if succeeds:
        assert result.status is RunStatus.COMPLETED
    else:
        assert result.status is (RunStatus.FAILED if expected[-1] is T else RunStatus.PARTIAL)


async def test_g3_retry_after_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: a server's Retry-After is obeyed: the delay before the next attempt is at least that long."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("stroma.engine.loop.sleep", sleep)
    busy = type("Busy", (Exception,), {"status_code": 429, "headers": {"Retry-After": "11"}})
    left = [busy(), busy()]

    async def func(state: Num) -> Any:
        if left:
            raise left.pop()
        return {"n": 1}

    result = await quick().run([node("a", func)], Num())
    assert (result.status, waits) == (RunStatus.COMPLETED, [11, 11])


# ---------------------------------------------------------------------- G4


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


async def _boom(*_: Any) -> None:
    raise RuntimeError("hook")


async def test_g4_an_output_over_budget_is_committed() -> None:
    """G4: an output is committed before the budget check can lose it."""
    store = InMemoryStore()
    func, _ = giving(({"n": 7}, 11))
    result = await quick(store=store, run_id="r", budget=ExecutionBudget(max_tokens_total=10)).run(
        [node("a", func)], Num()
    )
    assert result.status is RunStatus.PARTIAL
    assert store.load("r", "a") == Num(n=7) == result.final_state


async def test_g4_an_output_is_committed_when_its_hook_is_called() -> None:
    """G4: when the success hook runs the output is in the store and in the trace."""
    store = InMemoryStore()
    runner = quick(store=store, run_id="r")
    seen: list[Any] = []

    async def look(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        run = current_node()
        seen.append((store.load("r", "a"), len(run.ctx.trace)))

    func, _ = giving({"n": 7})
    await runner.with_hooks(NodeHooks(on_node_success=look)).run([node("a", func)], Num())
    assert seen == [(Num(n=7), 1)]


async def test_g4_a_cancellation_just_before_the_return_loses_nothing() -> None:
    """G4: a node that was cancelled after its last await still has its output committed; then the run is
    cancelled."""
    store = Suspending()

    async def func(state: Num) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return {"n": 7}, 5, 1, "a-model-never-seen-before"

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(quick(store=store, run_id="r").run([node("a", func)], Num()))
    assert store.commits == [("a", 0, "")]
    assert await store.load("r", "a") == Num(n=7)
    again, calls = giving({"n": 8})
    result = await quick(store=store, run_id="r", resume=True).run([node("a", again)], Num())
    assert (result.status, result.final_state, calls) == (RunStatus.RESUMED, Num(n=7), [])


async def test_g4_an_output_that_comes_after_the_deadline_is_kept() -> None:
    """G4: a node that blocks past the latency limit and returns has its output committed, as an attempt over
    budget."""

    async def func(state: Num) -> Any:
        time.sleep(0.03)
        return {"n": 7}

    result = await quick(budget=ExecutionBudget(max_latency_ms=10)).run([node("a", func)], Num())
    (event,) = result.trace
    assert result.status is RunStatus.PARTIAL
    assert (event.output_state, event.failure) == ({"n": 7}, R)
    assert result.final_state == Num(n=7)


@pytest.mark.parametrize("tail", [False, True], ids=["node", "group"])
async def test_g4_g5_g9_cancelled_at_every_await(tail: bool) -> None:
    """G4, G5, G9: cancelled at any await, what is committed stays, is not run again on resume, and hooks stay
    paired."""
    counts: Counter[str] = Counter()
    finished: Counter[str] = Counter()

    def step(name: str) -> Any:
        async def func(state: Num) -> Any:
            counts[name] += 1
            await asyncio.sleep(0)
            finished[name] += 1
            return {"n": state.n + 1}, 1

        return node(name, func)

    nodes = [step("a"), parallel(step("b"), step("c")) if tail else step("b"), step("d")]
    at = 0
    completed = False
    while not completed:
        counts.clear()
        finished.clear()
        pairs = Pairs(pause=1)
        store = Suspending(pauses=1)
        runner = quick(store=store, run_id="r", resume=True, hooks=pairs.hooks)
        task = asyncio.create_task(runner.run(nodes, Num()))
        for _ in range(at):
            await asyncio.sleep(0)
        task.cancel()
        try:
            first = await task
            completed = True
            assert first.status is RunStatus.COMPLETED
        except asyncio.CancelledError:
            pass
        pairs.check()
        entries = list(store.commits)
        # Whatever returned is committed: nothing that was paid for is lost on the way.
        assert sorted(name for name, _, _ in entries if name in "abcd") == sorted(finished.elements())
        before = counts.copy()
        again = Pairs(pause=1)
        result = await runner.with_hooks(again.hooks).run(nodes, Num())
        again.check()
        assert result.status is RunStatus.RESUMED or not before
        assert result.final_state == Num(n=3)
        for name, _, _ in entries:
            assert counts[name] == before[name]
        assert all(n == 1 for n in Counter(store.commits).values())
        assert sorted({name for name, _, _ in store.commits if name in "abcd"}) == sorted(finished)
        assert all(task is asyncio.current_task() for task in asyncio.all_tasks())
        at += 1
    assert at > 20


# ---------------------------------------------------------------------- G5


@pytest.mark.parametrize("refusals", [1, 2, 3])
async def test_g5_a_refused_commit_is_tried_again_without_the_node(refusals: int, no_delays: None) -> None:
    """G5: a store that fails at commit is tried again; the node is not called again and the run completes."""
    store = Suspending(refusals=refusals)
    func, calls = giving({"n": 7})
    pairs = Pairs()
    result = await quick(store=store, hooks=pairs.hooks).run([node("a", func)], Num())
    assert (result.status, len(calls), store.commits) == (RunStatus.COMPLETED, 1, [("a", 0, "")])
    assert len(result.trace) == 1
    pairs.check()


@pytest.mark.parametrize("error", [OSError, StoreError, TypeError, TimeoutError])
async def test_g5_a_store_that_stays_down_stops_the_run(error: type[Exception], no_delays: None) -> None:
    """G5: a store that stays down makes the attempt a failed event and the run PARTIAL; the node is not
    called again."""
    store = Suspending(refusals=10**6, error=error)
    func, calls = giving(({"n": 7}, 5))
    after, others = giving({"n": 8})
    pairs = Pairs()
    result = await quick(store=store, hooks=pairs.hooks).run([node("a", func), node("b", after)], Num())
    (event,) = result.trace
    assert (result.status, len(calls), others) == (RunStatus.PARTIAL, 1, [])
    assert (event.outcome, event.output_state) == ("failure", None)
    assert result.failure is not None
    assert isinstance(result.failure.exception, StoreError)
    assert "the disk is full" in result.failure.message
    assert result.total_tokens == 5
    assert pairs.order == ["start a", "failure a"]


class Refusing:
    """A sync store of the simple protocol that raises on save."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.saved: dict[tuple[str, str], BaseModel] = {}

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError("no space left on device")
        self.saved[run_id, node_id] = state

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self.saved.get((run_id, node_id))

    def delete(self, run_id: str) -> None:
        self.saved.clear()


@pytest.mark.parametrize(("refusals", "status"), [(2, RunStatus.COMPLETED), (99, RunStatus.PARTIAL)])
async def test_g5_a_simple_sync_store_that_raises(refusals: int, status: RunStatus, no_delays: None) -> None:
    """G5: a custom sync store that raises at save is tried again, and the node is called once either way."""
    func, calls = giving({"n": 7})
    result = await quick(store=Refusing(refusals)).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (status, 1)


async def test_g5_what_cannot_be_stored_is_not_bought_again() -> None:
    """G5: output that no store can keep is refused by name; the node is called once."""

    class Journal(Suspending):
        async def open_run(self, request: RunRequest) -> Session:
            session = await super().open_run(request)

            class Encoding(_SuspendingSession):
                async def record(
                    self,
                    row: AttemptRow,
                    schema: Schema | None,
                    output: BaseModel | None,
                    call: StepCall | None = None,
                ) -> None:
                    if schema is not None and output is not None:
                        schema.encode(output)
                    await super().record(row, schema, output, call)

            return Encoding(self, session.inner)  # type: ignore[attr-defined]

    func, calls = giving({"anything": {"lock": threading.Lock()}})
    result = await quick(store=Journal()).run([node("a", func, Num, Loose)], Num())
    assert result.failure is not None
    assert "cannot be serialised" in result.failure.message
    assert "Loose.anything.lock" in result.failure.message
    assert len(calls) == 1


@pytest.mark.parametrize("spoiler", ["hook", "budget", "store", "later-node"])
async def test_g5_committed_nodes_are_not_run_again_on_resume(spoiler: str, no_delays: None) -> None:
    """G5: after a hook, a budget, a store or a later node complained, a resume does not run committed nodes
    again."""
    store = Suspending()
    first, calls = giving(({"n": 1}, 5))
    broken = [True]

    async def second(state: Num) -> Any:
        if spoiler == "later-node" and broken:
            broken.clear()
            raise BudgetExceeded("tokens", 1, 2, "mine")
        if spoiler == "store" and broken:
            broken.clear()
            store.refusals = 99
        return {"n": 2}

    config: dict[str, Any] = {
        "store": store,
        "run_id": "r",
        "policy_map": {R: FailurePolicy(max_retries=0)},
    }
    if spoiler == "hook":
        config["hooks"] = NodeHooks(on_node_start=_boom, on_node_success=_boom, on_node_failure=_boom)
    if spoiler == "budget":
        config["budget"] = ExecutionBudget(max_tokens_total=4)
    nodes = [node("first", first), node("second", second)]
    await quick(**config).run(nodes, Num())
    store.refusals = 0
    config.pop("hooks", None)
    config.pop("budget", None)
    result = await quick(**config, resume=True).run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert len(calls) == 1


# ---------------------------------------------------------------------- G6


@EXAMPLES
@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    limit=st.integers(0, 120),
)
def test_g6_the_run_stops_before_the_next_call(steps: list[list[tuple[int, bool]]], limit: int) -> None:
    """G6: all usage counts, of failed attempts too, and no call is made once a limit is crossed."""
    spent: list[int] = []

    def step(number: int, attempts: list[tuple[int, bool]]) -> Any:
        left = list(attempts)

        async def func(state: Num) -> Any:
            assert sum(spent) <= limit
            tokens, fails = left.pop(0) if left else (0, False)
            spent.append(tokens)
            run = current_node()
            if fails:
                run.report_usage(input_tokens=tokens)
                raise ValueError
            return state, tokens

        return node(f"n{number}", func)

    runner = quick(budget=ExecutionBudget(max_tokens_total=limit))
    result = runner.run_sync([step(i, a) for i, a in enumerate(steps)], Num())
    assert result.total_tokens == sum(spent)
    assert len(result.trace) == len(spent)
    assert [event.usage.tokens for event in result.trace] == spent
    assert (result.status is RunStatus.PARTIAL) == (sum(spent) > limit)


async def test_g6_usage_counts_across_resumes() -> None:
    """G6: under resume=True the budget remembers what earlier calls spent, in failed and cancelled attempts
    too."""
    store = AsyncInMemoryStore()
    inside = asyncio.Event()
    mode = ["cancel"]
    calls: list[str] = []

    async def first(state: Num) -> Any:
        calls.append("first")
        return state, 10

    async def second(state: Num) -> Any:
        calls.append(f"second {mode[0]}")
        run = current_node()
        run.report_usage(input_tokens=20)
        if mode[0] == "cancel":
            inside.set()
            await asyncio.Event().wait()
        if mode[0] == "fail":
            raise ValueError
        return state

    nodes = [node("first", first), node("second", second)]
    policies = {A: FailurePolicy(max_retries=0)}
    runner = quick(store=store, run_id="r", resume=True, policy_map=policies).with_budget(tokens=69)
    task = asyncio.create_task(runner.run(nodes, Num()))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mode[0] = "fail"
    failed = await runner.run(nodes, Num())
    assert (failed.status, failed.total_tokens) == (RunStatus.PARTIAL, 20)
    mode[0] = "ok"
    over = await runner.run(nodes, Num())  # 10 + 20 + 20 + 20
    assert (over.status, over.total_tokens) == (RunStatus.PARTIAL, 20)
    assert over.failure is not None
    assert isinstance(over.failure.exception, BudgetExceeded)
    assert over.failure.exception.actual == 70
    assert calls == ["first", "second cancel", "second fail", "second ok"]


async def test_g6_a_spent_budget_stops_a_resume_before_its_first_call() -> None:
    """G6: resuming a run that went over its limit makes no call while the limit stands, and goes on when it
    is raised."""
    func, calls = giving(({"n": 1}, 50))
    after, others = giving(({"n": 2}, 1))
    runner = quick(run_id="r", resume=True).with_budget(tokens=49)
    nodes = [node("a", func), node("b", after)]
    for _ in range(3):
        result = await runner.run(nodes, Num())
        assert (result.status, result.final_state) == (RunStatus.PARTIAL, Num(n=1))
    assert (len(calls), others) == (1, [])
    result = await runner.with_budget(tokens=51).run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))


async def test_g6_usage_of_all_children_counts() -> None:
    """G6: usage of children that failed or were cancelled beside a failing sibling counts."""
    ready = asyncio.Event()

    async def waits(state: Num) -> Any:
        run = current_node()
        run.report_usage(input_tokens=3)
        ready.set()
        await asyncio.Event().wait()

    async def fails(state: Num) -> Any:
        await ready.wait()
        run = current_node()
        run.report_usage(input_tokens=4)
        raise ValueError

    policies = {A: FailurePolicy(max_retries=0)}
    result = await quick(policy_map=policies).run([parallel(node("w", waits), node("f", fails))], Num())
    assert result.total_tokens == 7
    assert sum(event.usage.tokens for event in result.trace.walk()) == 7


# ---------------------------------------------------------------------- G7


class Flat(BaseModel):
    n: int = 1
    text: str = "a"


class Nested(BaseModel):
    items: list[dict[str, list[int]]] = [{"a": [1]}]
    child: Num = Num(n=1)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int = 1


class Anything(BaseModel):
    value: Any = None


class Rooted(RootModel[list[Any]]):
    pass


class Holder:
    """A plain object under Any."""

    def __init__(self) -> None:
        self.inside = [1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holder) and self.inside == other.inside

    __hash__ = None


def _change(value: Any, seen: set[int]) -> None:
    """Change everything that can be changed in a value."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BaseModel):
        for part in [*vars(value).values(), *(value.__pydantic_extra__ or {}).values()]:
            _change(part, seen)
        for name in vars(value):
            object.__setattr__(value, name, "changed")
    elif isinstance(value, Holder):
        value.inside.append("changed")  # type: ignore[arg-type]
    elif isinstance(value, dict):
        for part in value.values():
            _change(part, seen)
        value["changed"] = "changed"
    elif isinstance(value, list):
        for part in value:
            _change(part, seen)
        value.append("changed")


STATES: dict[str, Any] = {
    "flat": lambda: Flat(n=2, text="b"),
    "nested": lambda: Nested(items=[{"b": [2]}], child=Num(n=2)),
    "open": lambda: Open(n=2, more={"deep": [1]}),
    "any-list": lambda: Anything(value=[1, {"a": [2]}]),
    "any-model": lambda: Anything(value=[Num(n=5)]),
    "any-object": lambda: Anything(value=Holder()),
    "root": lambda: Rooted([1, [2, {"a": 3}]]),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("as_dict", [False, True], ids=["model", "dict"])
async def test_g7_later_changes_do_not_rewrite_history(name: str, as_dict: bool) -> None:
    """G7: events stay as they were, whatever nodes do afterwards to the inputs and outputs that they kept."""
    make = STATES[name]
    cls = type(make())
    entries: list[Any] = []
    seen: list[Any] = []

    async def func(state: Any) -> Any:
        run = current_node()
        seen.append(schema_of(cls).state(state))
        entries.append(state)
        output = make()
        if as_dict:
            output = output.root if isinstance(output, RootModel) else schema_of(cls).state(output)
        entries.append(output)
        if run.position == 1 and run.attempt == 1:
            _change(entries, set())
            raise ValueError
        return output

    async def spoil(*arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, dict):
                _change(argument, set())
        run = current_node_or_none()
        if run is not None and run.position > 0:
            _change(entries, set())

    hooks = NodeHooks(on_node_start=spoil, on_node_success=spoil, on_node_failure=spoil)
    initial = make()
    want = schema_of(cls).state(make())
    # Hooks of position 0 leave `kept` alone: the first node's output must still be what it returned.
    result = await quick(hooks=[hooks, hooks]).run([node("a", func, cls, cls)] * 3, initial)
    _change(entries, set())
    _change(initial, set())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == [want] * 4
    events = list(result.trace)
    assert [event.attempt for event in events] == [1, 1, 2, 1]
    assert [event.input_state for event in events] == [want] * 4
    assert [event.output_state for event in events] == [want, None, want, want]
    assert schema_of(cls).state(result.final_state) == want  # type: ignore[arg-type]


async def test_g7_one_event_per_attempt() -> None:
    """G7: the trace has exactly one event per attempt: successful, failed, over budget, cancelled."""
    calls: list[int] = []
    inside = asyncio.Event()
    traces: list[Any] = []

    async def end(run_id: str, result: ExecutionResult) -> None:
        traces.append(result.trace)

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) in (2, 3):
            raise TimeoutError
        if len(calls) == 5:
            inside.set()
            await asyncio.Event().wait()
        return state

    task = asyncio.create_task(quick(hooks=NodeHooks(on_run_end=end)).run([node("a", func)] * 9, Num()))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (trace,) = traces
    assert [(e.position, e.attempt, e.outcome) for e in trace] == [
        (0, 1, "success"),
        (1, 1, "failure"),
        (1, 2, "failure"),
        (1, 3, "success"),
        (2, 1, "cancelled"),
    ]


async def test_g7_the_trace_is_complete_when_a_hook_looks() -> None:
    """G7: when an end hook runs its event is in the trace already, children of groups included."""
    lengths: list[Any] = []

    async def look(*_: Any) -> None:
        run = current_node()
        lengths.append((run.node_id, len(run.rows)))

    good, _ = giving({"n": 1})
    bad, _ = giving(None)
    hooks = NodeHooks(on_node_success=look, on_node_failure=look)
    await quick(hooks=hooks).run([node("a", good), parallel(node("b", good)), node("c", bad)], Num())
    assert lengths == [("a", 1), ("b", 1), ("parallel(b)", 2), ("c", 3)]


# ---------------------------------------------------------------------- G8

HOOKS = ["on_run_start", "on_node_start", "on_node_success", "on_node_failure", "on_node_retry", "on_run_end"]
ERRORS = [ValueError, asyncio.CancelledError, TimeoutError, Odd, StoreError, ContractViolation]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", ERRORS)
async def test_g8_a_raising_hook_changes_nothing(hook: str, error: Any) -> None:
    """G8: a hook that raises anything costs no result, no retry and no event; it is listed in hook_errors."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise TimeoutError
        return {"n": 1}, 5

    async def bad(*_: Any) -> None:
        raise error("a", "output", {}, []) if error is ContractViolation else error()

    result = await quick(hooks=NodeHooks(**{hook: bad})).run([node("a", func)], Num())
    assert (result.status, result.final_state, len(calls)) == (RunStatus.COMPLETED, Num(n=1), 2)
    assert [event.failure for event in result.trace] == [R, None]
    assert result.total_tokens == 5
    expected = 2 if hook == "on_node_start" else 1
    assert [(f.hook, type(f.exception)) for f in result.hook_errors] == [(hook, error)] * expected


@pytest.mark.parametrize("hook", HOOKS)
async def test_g8_a_hook_that_hangs_delays_by_its_limit(hook: str) -> None:
    """G8: a hook that never returns delays the run by its time limit, and changes nothing."""
    left = [TimeoutError()]

    async def func(state: Num) -> Any:
        if left:
            raise left.pop()
        return {"n": 1}

    began = time.perf_counter()
    result = await quick(hooks=NodeHooks(**{hook: _never}), hook_timeout_ms=20).run([node("a", func)], Num())
    assert result.status is RunStatus.COMPLETED
    assert time.perf_counter() - began < 2
    assert {f.hook for f in result.hook_errors} == {hook}
    assert "20 ms" in str(result.hook_errors[0].exception)


async def test_g8_a_hook_that_blocks_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """G8: a hook that blocks the event loop past its limit cannot be interrupted; it is named in a
    warning."""

    async def blocks(*_: Any) -> None:
        time.sleep(0.05)

    func, _ = giving({"n": 1})
    result = await quick(hooks=NodeHooks(on_node_start=blocks), hook_timeout_ms=10).run(
        [node("a", func)], Num()
    )
    assert result.status is RunStatus.COMPLETED
    texts = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("on_node_start" in text and "blocks" in text for text in texts), texts


async def test_g8_each_set_gets_its_own_dict() -> None:
    """G8: a hook that changes its dict changes neither the other sets' nor the next node's input."""
    seen: list[Any] = []

    async def spoil(run_id: str, node_id: str, state: dict[str, Any], *_: Any) -> None:
        seen.append({k: list(v) for k, v in state.items() if k == "items"})
        state["items"].clear()
        state.clear()

    async def same(state: Deep) -> Any:
        assert state.items == [Num(n=1)]
        return state

    hooks = NodeHooks(on_node_start=spoil, on_node_success=spoil)
    result = await quick(hooks=[hooks, hooks]).run([node("a", same, Deep, Deep)] * 2, Deep(items=[Num(n=1)]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == [{"items": [{"n": 1}]}] * 8


async def test_g8_the_run_end_hook_cannot_change_the_outcome() -> None:
    """G8: what on_run_end does to the result it is given does not reach the caller's."""

    async def spoil(run_id: str, result: ExecutionResult) -> None:
        result.status = RunStatus.FAILED
        result.total_tokens = -1
        result.hook_errors.append("nonsense")  # type: ignore[arg-type]
        assert isinstance(result.final_state, Num)
        result.final_state.n = 99
        result.final_state = None

    func, _ = giving(({"n": 1}, 5))
    result = await quick(hooks=NodeHooks(on_run_end=spoil)).run([node("a", func)], Num())
    assert (result.status, result.final_state, result.total_tokens) == (RunStatus.COMPLETED, Num(n=1), 5)
    assert result.hook_errors == []


@pytest.mark.parametrize("hook", HOOKS)
async def test_g8_a_hook_that_is_not_async_is_a_type_error(hook: str) -> None:
    """G8: a hook that is not async raises a TypeError that names it, at its call at the latest; trace and
    journal are up to date."""
    store = InMemoryStore()
    left = [TimeoutError()]

    async def func(state: Num) -> Any:
        if left:
            raise left.pop()
        return {"n": 1}

    def plain_function(*_: Any) -> Any:
        return len(_)

    runner = quick(hooks=NodeHooks(**{hook: plain_function}), store=store, run_id="r")
    with pytest.raises(TypeError, match=hook) as raised:
        await runner.run([node("a", func)], Num())
    assert "plain_function" in str(raised.value)
    result = raised.value.result  # type: ignore[attr-defined]
    assert isinstance(result, ExecutionResult)
    assert len(result.trace) == {"on_node_failure": 1, "on_node_retry": 1, "on_node_start": 1}.get(
        hook, 0 if hook == "on_run_start" else 2
    )
    if hook in ("on_node_success", "on_run_end"):
        assert store.load("r", "a") == Num(n=1)


async def test_g8_hook_errors_can_be_raised_after_the_run() -> None:
    """G8: hook_errors="raise" raises a HookError once the trace is complete, with the result on it."""
    func, calls = giving({"n": 1})
    with pytest.raises(HookError) as raised:
        await quick(hooks=NodeHooks(on_node_start=_boom), hook_errors="raise").run(
            [node("a", func), node("b", func)], Num()
        )
    assert raised.value.result.status is RunStatus.COMPLETED
    assert (len(calls), len(raised.value.result.trace)) == (2, 2)
    assert isinstance(raised.value.__cause__, RuntimeError)


# ---------------------------------------------------------------------- G9


async def test_g9_every_start_has_one_end_in_every_kind_of_attempt() -> None:
    """G9: success, failure, timeout, violation, over budget, sibling's failure: each start has exactly one
    end."""
    gate = asyncio.Event()

    async def hang(state: Num) -> Any:
        gate.set()
        await asyncio.Event().wait()

    async def fails(state: Num) -> Any:
        await gate.wait()
        raise ValueError

    good, _ = giving(({"n": 1}, 6))
    bad, _ = giving(None)
    pairs = Pairs()
    runner = quick(hooks=[pairs.hooks, NodeHooks(on_node_start=_boom)], policy_map=NEVER)
    await runner.run([node("good", good), node("bad", bad)], Num())
    await runner.run([parallel(node("hang", hang), node("fails", fails))], Num())
    await runner.with_node_timeouts({"hang": 10, "parallel(hang2)": 10}).run([node("hang", hang)], Num())
    await runner.run([parallel(node("hang2", hang))], Num())
    await runner.with_budget(tokens=5).run([node("good", good)], Num())
    await runner.with_budget(latency_ms=5).run([node("late", hang)], Num())
    pairs.check()
    assert Counter(line.split()[0] for line in pairs.order) == {
        "start": 10,
        "success": 1,
        "failure": 7,
        "cancelled": 2,
    }


async def test_g9_a_second_set_that_is_not_async_ends_the_first() -> None:
    """G9: if the second set's start is not async, the first, which saw the start, gets on_node_cancelled."""
    pairs = Pairs()
    third = Pairs()

    def plain(*_: Any) -> Any:
        return len(_)

    func, calls = giving({"n": 1})
    second = NodeHooks(on_node_start=plain, on_node_cancelled=third.hooks.on_node_cancelled)
    with pytest.raises(TypeError):
        await quick(hooks=[pairs.hooks, second, third.hooks]).run([node("a", func)], Num())
    assert pairs.order == ["start a", "cancelled a"]
    assert third.order == []
    assert calls == []


@pytest.mark.parametrize("where", ["start", "function"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in-a-group"])
def test_g9_an_interrupt_ends_what_it_began(where: str, kind: Any, grouped: bool) -> None:
    """G9: a KeyboardInterrupt or SystemExit inside a start hook or a function leaves no start without its
    end."""
    pairs = Pairs()

    async def stop(*_: Any) -> Any:
        raise kind

    func, _ = giving({"n": 1})
    body = node("a", stop if where == "function" else func)
    sets = [pairs.hooks, NodeHooks(on_node_start=stop)] if where == "start" else [pairs.hooks]
    with pytest.raises(kind):
        quick(hooks=sets).run_sync([parallel(body, node("b", func)) if grouped else body], Num())
    gc.collect()  # A coroutine that was never awaited would complain here.
    pairs.check()
    assert "cancelled a" in pairs.order or (grouped and where == "start")


async def test_g9_no_start_for_input_that_was_refused() -> None:
    """G9: bad input has a failure without a start, so starts and ends are counted the same only for real
    attempts."""
    pairs = Pairs()
    func, _ = giving({"n": 1})
    await quick(hooks=pairs.hooks).run([node("a", func, Text, Num)], Num())
    assert pairs.order == ["failure a"]


# ---------------------------------------------------------------------- G11


def test_g11_no_module_of_ours_can_execute_data() -> None:
    """G11: nothing in the package unpickles, evaluates or imports by a name that could come from a store."""
    forbidden = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "runpy"}
    own_names = SOURCE / "_utils" / "lazy.py"  # Loads what packages of ours name in tables of theirs.
    for path in SOURCE.rglob("*.py"):
        inside = path.relative_to(SOURCE).parts
        # Copies of plain data are made by way of pickle, of what the same process has just packed; see below.
        copies = {"pickle"} if path == SOURCE / "contracts" / "copying.py" else set()
        if (
            path == SOURCE / "_utils" / "secrets.py"
        ):  # Asks if values are plain by writing them, and reads nothing.
            copies = {"marshal"}
            assert "marshal.load" not in path.read_text()
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.Import):
                assert not {a.name.split(".")[0] for a in item.names} & (forbidden - copies), path
            elif isinstance(item, ast.ImportFrom):
                assert (item.module or "").split(".")[0] not in forbidden, path
            elif isinstance(item, ast.Call) and isinstance(item.func, ast.Name):
                assert item.func.id not in {"eval", "exec", "__import__", "compile"}, f"{path}:{item.lineno}"
            elif isinstance(item, ast.Attribute) and item.attr == "import_module":
                # The command line imports what its user names on the command line.
                assert path == own_names or inside[0] in ("cli", "demo", "__main__.py"), path


def test_g11_only_plain_data_is_pickled() -> None:
    """G11: the pickles of copies and snapshots name no class but those of plain values, and no store receives
    one."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    plain = {
        "a": [1, 2.5, None, True, b"x", "y", (1, {2}), frozenset({3})],
        "at": moment,
        "id": uuid.UUID(int=1),
    }
    pickled = pickle_data(plain)
    assert pickled is not None
    assert pickle.loads(pickled) == plain

    class Mine:
        def __reduce__(self) -> Any:
            return (os.system, ("false",))

    for foreign in (Mine(), Mine, os.system, OrderedDict(a=1), Num(n=1), FailureClass.TERMINAL, range(3)):
        assert pickle_data(foreign) is None
        assert pickle_data({"a": [foreign]}) is None

    class Open(BaseModel):
        held: dict[str, Any]

    schema = schema_of(Open)
    state = Open(held=plain)
    assert isinstance(schema.snapshot(state), PickledSnapshot), "bytes would be stored"
    assert schema.encode(state).startswith(b"[")
    assert schema.restore(schema.snapshot(state)) == state


def _cold(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_g11_a_schema_reference_imports_nothing() -> None:
    """G11: resolving a stored schema reference imports no module, not even through a module that loads
    lazily."""
    code = """
import sys
import concurrent.futures
import stroma.checkpoint as checkpoint
before = set(sys.modules)
for ref in ("antigravity:x", "concurrent.futures:ProcessPoolExecutor", "concurrent.futures.process:X", "stroma:parallel",
            "os.path:join", "this", "", ":", "a:b:c", "xmlrpc.client:ServerProxy"):
    try:
        checkpoint.resolve_schema(ref)
    except (LookupError, TypeError):
        continue
    print("resolved", ref)
print(sorted(set(sys.modules) - before))
"""
    assert _cold(code) == "[]"


def test_g11_a_schema_reference_is_a_model_or_an_error() -> None:
    """G11: what is resolved is a model class among imported modules; anything else is an error."""
    assert resolve_schema(f"{Num.__module__}:Num") is Num
    for ref in ("os:system", "builtins:eval", "subprocess:Popen"):
        with pytest.raises(TypeError, match="resolved schema is not a BaseModel"):
            resolve_schema(ref)


HOSTILE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    b'{"py/object": "os.system"}',
    b'{"n": "x"}',
    b'["stroma/1",',
    b'["stroma/1",]',
    b'["stroma/1"]',
    b'["stroma/1",{"n":{"$x":"os.system"}}]',
    b'["stroma/1",{"n":{"$c":{"n":"x"}}}]',
    b'["stroma/1",{"n":{"$u":"not a uuid"}}]',
    b'["stroma/1",{"n":{"$dt":[]}}]',
    b'["stroma/1",{"n":{"$d":[["a"]]}}]',
    b'["stroma/1",{"n":{"$s":[[1]]}}]',
    b'["stroma/1",{"n":{"$dtz":["2026-01-01T00:00:00","../../etc/passwd",0]}}]',
    b'["stroma/1",' + b'{"$c":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
    b"[" * 100_000,
    b'{"n": 1e999}',
    b"\xff\xfe",
]


class Exact(BaseModel):
    n: int


@pytest.mark.parametrize("data", HOSTILE, ids=lambda d: repr(d[:40]))
async def test_g11_hostile_stored_data_is_an_error(data: bytes) -> None:
    """G11: what is read back is validated by the caller's schema: anything else is CorruptCheckpoint, nothing
    runs."""

    class Tampered(AsyncInMemoryStore):
        def open_run(self, request: RunRequest) -> Any:
            session = super().open_run(request)
            session.restored = {
                key: Committed(c.node_id, data, c.contract) for key, c in session.restored.items()
            }
            return session

    func, calls = giving({"n": 1})
    runner = quick(store=Tampered(), run_id="r", resume=True)
    nodes = [node("a", func, Num, Exact), node("b", func, Num, Exact)]
    await runner.run(nodes, Num())
    with pytest.raises(CorruptCheckpoint, match="'a'"):
        await runner.run(nodes, Num())
    assert len(calls) == 2


# ---------------------------------------------------------------------- G12


def _count_states(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    counted: list[Any] = []
    original = Schema.state

    def state(self: Schema, model: BaseModel) -> dict[str, Any]:
        counted.append(model)
        return original(self, model)

    monkeypatch.setattr(Schema, "state", state)
    return counted


@pytest.mark.parametrize("name", ["flat", "nested", "open", "any-list", "root"])
async def test_g12_no_hooks_no_dump_of_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: without hooks no state is dumped for them; with one, as often as it is called."""
    make = STATES[name]
    cls = type(make())
    nodes = [node(f"n{i}", giving(make())[0], cls, cls) for i in range(10)]
    counted = _count_states(monkeypatch)
    await quick().run(nodes, make())
    assert counted == []
    await quick(hooks=NodeHooks(on_run_end=_quiet, on_node_failure=_quiet)).run(nodes, make())
    assert counted == []
    await quick(hooks=NodeHooks(on_node_start=_quiet)).run(nodes, make())
    assert len(counted) == 10


async def _quiet(*_: Any) -> None:
    return None


async def test_g12_no_budget_no_summing(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: without a budget no total is compared with anything."""
    compared: list[Any] = []
    original = CostTracker.exceeded

    def exceeded(self: CostTracker, budget: ExecutionBudget, node_id: str) -> BudgetExceeded | None:
        compared.append(node_id)
        return original(self, budget, node_id)

    monkeypatch.setattr(CostTracker, "exceeded", exceeded)
    nodes = [node("a", giving(({"n": 1}, 5))[0])] * 5
    await quick().run(nodes, Num())
    assert compared == []
    await quick(budget=ExecutionBudget(max_tokens_total=100)).run(nodes, Num())
    assert len(compared) >= 5


async def test_g12_no_timers_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: without timeouts, and with hooks that do not suspend, no timer is armed but one that notices a
    blocked event loop."""
    loop = asyncio.get_running_loop()
    armed: list[Any] = []
    original = loop.call_at

    def call_at(when: float, callback: Any, *rest: Any, **more: Any) -> Any:
        armed.append(callback)
        return original(when, callback, *rest, **more)

    monkeypatch.setattr(loop, "call_at", call_at)
    nodes = [node("a", giving({"n": 1})[0])] * 5
    begin = loop.time()
    await quick(hooks=NodeHooks(on_node_start=_quiet, on_node_success=_quiet)).run(nodes, Num())
    at_most = 1 + (loop.time() - begin) / TICK_SECONDS
    assert len(armed) <= at_most
    assert all(isinstance(callback.__self__, LoopTicks) for callback in armed)
    armed.clear()
    await quick(node_timeouts={"a": 10_000}).run(nodes, Num())
    assert len([one for one in armed if not isinstance(getattr(one, "__self__", None), LoopTicks)]) == 5


@pytest.mark.parametrize("kind", ["plain", "watched", "retried", "group"])
async def test_g12_no_run_waits_for_the_collector(kind: str) -> None:
    """G12: what a run owned goes with the last reference to it, failures and their tracebacks included."""
    owned: list[weakref.ref[Any]] = []

    async def work(state: Num) -> dict[str, int]:
        owned.append(weakref.ref(current_run()))
        if kind == "retried" and len(owned) % 2:
            raise ValueError("not yet")
        return {"n": state.n + 1}

    hooks = NodeHooks(on_node_start=_quiet, on_node_success=_quiet) if kind == "watched" else NodeHooks()
    nodes = [node("a", work), node("b", work)]
    gc.collect()
    gc.disable()
    try:
        runner = quick(hooks=hooks, policy_map=THRICE)
        result = await runner.run([parallel(*nodes)] if kind == "group" else nodes, Num())
        assert result.status is RunStatus.COMPLETED
        del result
        assert len(owned) == (4 if kind == "retried" else 2)
        assert [ref() for ref in owned] == [None] * len(owned)
    finally:
        gc.enable()


def _calls_of_a_run(runner: StromaRunner, nodes: list[Any]) -> int:
    """How many Python functions a run of nodes calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    async def main() -> None:
        sys.setprofile(profile)
        try:
            await runner.run(nodes, Num())
        finally:
            sys.setprofile(None)

    gc.collect()
    gc.disable()  # Finalizers of other tests' garbage would be counted.
    try:
        asyncio.run(main())
    finally:
        gc.enable()
    return count


@pytest.mark.parametrize("kind", ["plain", "hooks", "budget", "resume", "group"])
def test_g12_cost_per_node_does_not_grow(kind: str) -> None:
    """G12: a node costs the same number of calls in a run of 400 nodes as in one of 100."""
    hooks = NodeHooks(on_node_start=_quiet, on_node_success=_quiet)
    config: dict[str, Any] = {
        "plain": {},
        "hooks": {"hooks": hooks},
        "budget": {"budget": ExecutionBudget(max_tokens_total=10**9, max_cost_usd=1e9)},
        "resume": {"resume": True},
        "group": {},
    }[kind]

    def measure(n: int) -> int:
        func, _ = giving(({"n": 1}, 5))
        nodes = [node(f"n{i}", func) for i in range(n)]
        return _calls_of_a_run(quick(**config), [parallel(*nodes)] if kind == "group" else nodes)

    measure(100)
    few, many, more = measure(100), measure(400), measure(700)
    assert (more - many) / 300 <= (many - few) / 300 * 1.02


# ---------------------------------------------------------------------- one place that calls


def test_only_the_engine_calls_a_nodes_function() -> None:
    """Only `engine/attempt.py` calls a node's function, but for a group that is called directly, and a place
    that it asks."""
    findings: set[tuple[str, str]] = set()
    # Stores and traces never see a node; a guard makes a node of its own around what it calls.
    apart = ("adapters", "checkpoint", "cli", "demo", "testing", "trace")
    core = [p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE).parts[0] not in apart]
    for path in core:
        tree = ast.parse(path.read_text())
        for outer in ast.walk(tree):
            if not isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for item in ast.walk(outer):
                if isinstance(item, ast.Attribute) and item.attr in ("func", "call"):
                    findings.add((path.relative_to(SOURCE).as_posix(), outer.name))
    callers = {(module, name) for module, name in findings if module != "engine/attempt.py"}
    assert callers == {
        ("runner/sequence.py", "check_owners"),  # It names a function.
        ("runner/groups.py", "_call_directly"),
        ("engine/deadlines.py", "call_in_time"),  # It puts the interceptors of tests around the call.
        ("hooks/sets.py", "_function_of"),  # It unwraps partials.
        ("contracts/contract.py", "of"),  # It unwraps partials.
        ("contracts/node.py", "call"),
        ("contracts/node.py", "gives_coroutine"),  # It unwraps partials.
        ("contracts/node.py", "find_node"),  # It asks whose function it is.
        ("runner/code.py", "_parts_of"),  # It reads the code of a flow.
        ("engine/placed_calls.py", "call_at_place"),  # It asks the place for the call.
        ("drivers/temporal/worker.py", "stroma_worker"),  # It registers the activity of a place.
        ("drivers/temporal/place.py", "_answer"),  # A place makes the call for the engine.
    }


async def test_at_run_time_the_engine_stands_behind_every_node() -> None:
    """In every way of running, the nearest frame of ours below a node's function is the engine's."""
    modules: list[str] = []

    def note(state: Num) -> dict[str, Any]:
        frame = sys._getframe(1)
        while frame.f_back is not None:
            module = str(frame.f_globals["__name__"])
            if module.startswith("stroma") and module != "stroma.contracts.node":
                modules.append(module)
                break
            frame = frame.f_back
        return {"n": 1}

    async def note_async(state: Num) -> dict[str, Any]:
        return note(state)

    class Items(BaseModel):
        items: list[Num]

    sync, awaited = node("sync", note), node("async", note_async)
    runner = quick()
    await runner.run([sync, awaited, parallel(sync, awaited, parallel(awaited))], Num())
    await runner.run([map_over("items", awaited, into="out")], Items(items=[Num()]))
    ctx = ReliabilityContext.for_run(RunConfig(), runner.registry, runner.checkpoint_manager)
    await execute_step("step", note_async, Num(), ctx)
    await runner.with_node_timeouts({"async": 1000}).run([awaited], Num())
    # A sync node stands on a thread's own stack, which the engine began in _tasks.
    own = {"stroma.engine.attempt", "stroma.engine.deadlines", "stroma.engine.tasks"}
    assert (len(modules), set(modules)) == (8, own)
    modules.clear()
    await parallel(awaited)(Num())
    assert modules == ["stroma.runner.groups"]
