"""Rules that no test about a larger matter happens to hold."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator, model_validator
from tests.kit import NEVER, Num, node, quick

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    CorruptCheckpoint,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeHooks,
    PipelineChanged,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StoreError,
    parallel,
)
from stroma.checkpoint import Fenced, RunRequest, Session, StepCall
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.schema import Schema, schema_of
from stroma.cost import KNOWN_MODELS, CostTracker, estimate_cost_usd
from stroma.trace import ExecutionTrace, TraceEvent
from stroma.trace.events import AttemptRow


class Loose(BaseModel):
    anything: Any = None


class Journal:
    """A journal store whose commits wait for ``gate``, and which refuses them with ``error`` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.inner = AsyncInMemoryStore()
        self.save, self.load, self.delete = self.inner.save, self.inner.load, self.inner.delete
        self.error = error
        self.late: list[Exception] = []  # with which the next commits are refused once the gate is open
        self.tries = 0
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()

    def open_run(self, request: RunRequest) -> Session:
        store, session = self, self.inner.open_run(request)

        class Held(NullSession):
            execution, continued = session.execution, session.continued
            finished, abandon = session.finished, session.abandon
            restored, prior = session.restored, session.prior
            address, epoch, charges = session.address, session.epoch, session.charges
            places, tried, note_call = session.places, session.tried, session.note_call

            def record(
                self,
                row: AttemptRow,
                schema: Schema | None,
                output: BaseModel | None,
                call: StepCall | None = None,
            ) -> Awaitable[None] | None:
                if output is None:
                    return session.record(row, schema, output, call)
                return self.commit(row, schema, output)

            async def commit(self, row: AttemptRow, schema: Schema | None, output: BaseModel) -> None:
                store.tries += 1
                store.waiting.set()
                if store.error is not None:
                    raise store.error
                await store.gate.wait()
                if store.late:
                    raise store.late.pop()
                session.record(row, schema, output, None)

            def end(self, status: str, error: str | None) -> Awaitable[None] | None:
                return session.end(status, error)

        return Held()


@pytest.mark.core
async def test_a_cancellation_during_the_commit_comes_out_after_it() -> None:
    """A run that is cancelled while the store keeps its last output keeps it, and is cancelled all the same."""
    store = Journal()

    async def func(state: Num) -> Any:
        return {"n": 7}

    run = asyncio.create_task(quick(store=store, run_id="r").run([node("a", func)], Num()))
    await store.waiting.wait()
    run.cancel()
    await asyncio.sleep(0)
    assert not run.done()
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert await store.load("r", "a") == Num(n=7)


@pytest.mark.core
@pytest.mark.parametrize("transient", [True, False])
async def test_a_cancellation_during_a_commit_that_is_refused_comes_out(transient: bool) -> None:
    """A run that is cancelled while the store is about to refuse its output is cancelled all the same, and goes no further."""
    store = Journal()
    refusal = StoreError("not now")
    refusal.transient = transient
    store.late.append(refusal)
    calls: list[str] = []

    def func(name: str) -> Any:
        async def call(state: Num) -> Any:
            calls.append(name)
            return {"n": 7}

        return node(name, call)

    run = asyncio.create_task(quick(store=store, run_id="r").run([func("a"), func("b")], Num()))
    await store.waiting.wait()
    run.cancel()
    await asyncio.sleep(0)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert calls == ["a"]
    assert await store.load("r", "a") == (Num(n=7) if transient else None)
    assert store.inner.get_run("r").status == "CANCELLED"  # type: ignore[union-attr]


@pytest.mark.core
async def test_a_store_that_never_answers_does_not_hold_a_cancelled_run_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cancelled run waits for the commit in flight, but not for ever: then it is cancelled, and can be resumed."""
    monkeypatch.setattr("stroma.engine.tasks.LAST_SECONDS", 0.05)
    store = Journal()
    calls = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}

    run = asyncio.create_task(quick(store=store, run_id="r").run([node("a", func)], Num()))
    await store.waiting.wait()
    run.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await run
    assert store.tries == 1
    assert store.inner.get_run("r").status == "CANCELLED"  # type: ignore[union-attr]
    store.gate.set()
    result = await quick(store=store, run_id="r", resume=True).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.RESUMED, 2)


@pytest.mark.core
async def test_a_lasting_refusal_of_the_store_is_not_tried_again() -> None:
    """An error of a store that says that trying again will not help is told at once, and the run is PARTIAL."""

    class Lasting(StoreError):
        transient = False

    store = Journal(Lasting("the file is gone"))
    calls = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}

    result = await quick(store=store).run([node("a", func)], Num())
    assert (result.status, len(calls), store.tries) == (RunStatus.PARTIAL, 1, 1)
    assert result.failure is not None
    assert result.failure.message == "the file is gone"


@pytest.mark.core
async def test_only_sets_that_saw_the_start_see_the_end() -> None:
    """A set whose own start is not async is not told that the node was cancelled, nor is any set after it."""
    seen: list[str] = []

    def watch(name: str, **others: Any) -> NodeHooks:
        async def start(*_: Any) -> None:
            seen.append(f"{name} start")

        async def cancelled(*_: Any) -> None:
            seen.append(f"{name} cancelled")

        return NodeHooks(**{"on_node_start": start, "on_node_cancelled": cancelled, **others})

    def not_async(*_: Any) -> None: ...

    async def func(state: Num) -> Any:
        raise AssertionError("not reached")

    sets = [watch("first"), watch("second", on_node_start=not_async), watch("third")]
    with pytest.raises(TypeError, match="on_node_start"):
        await quick(hooks=sets).run([node("a", func)], Num())
    assert seen == ["first start", "first cancelled"]


@pytest.mark.core
async def test_waits_between_attempts_are_in_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is longer than max_latency_ms takes nothing from it."""

    async def no_wait(seconds: float) -> None:
        assert seconds == 30

    monkeypatch.setattr("stroma.engine.loop.sleep", no_wait)
    calls = []

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise TimeoutError
        return {"n": 1}

    policies = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=30, jitter=False)}
    runner = quick(policy_map=policies, budget=ExecutionBudget(max_latency_ms=20_000))
    result = await runner.run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.COMPLETED, 2)


@pytest.mark.core
async def test_children_that_wait_are_not_called_after_a_crossed_limit() -> None:
    """A child that waits for its turn when a limit is crossed is not begun: no event, no call, no hook."""
    seen: list[str] = []

    def child(name: str, tokens: int) -> Any:
        async def func(state: Num) -> Any:
            seen.append(name)
            return {"n": 1}, tokens

        return node(name, func)

    refused: list[str] = []

    def classify(error: Exception, context: Any) -> None:
        # Every child that is begun and refused for the budget is classified; one that is not begun is not.
        if isinstance(error, BudgetExceeded):
            refused.append(context.node_id)

    group = parallel(child("dear", 11), child("queued", 1), child("last", 1), max_concurrency=1)
    runner = quick(budget=ExecutionBudget(max_tokens_total=10), classifiers=[classify])
    result = await runner.run([group], Num())
    assert (result.status, seen, refused) == (RunStatus.PARTIAL, ["dear"], ["dear"])


@pytest.mark.core
async def test_a_validator_cannot_change_the_state_it_reads() -> None:
    """A validator that takes values out of the dict it is given changes nothing of the state before it."""

    class Greedy(BaseModel):
        n: int = 0

        @model_validator(mode="before")
        @classmethod
        def take(cls, data: Any) -> Any:
            return {"n": data.pop("n") + 1}

    async def func(state: Greedy) -> Any:
        return {"n": state.n}

    initial = Num(n=1)
    result = await quick().run([node("a", func, Greedy)], initial)
    assert (result.final_state, initial.__dict__) == (Num(n=2), {"n": 1})


async def test_each_child_gets_the_state_that_a_validator_of_its_sibling_read() -> None:
    """Children whose validators take values out of what they read do not take them from one another."""

    class Greedy(BaseModel):
        n: int = 0

        @model_validator(mode="before")
        @classmethod
        def take(cls, data: Any) -> Any:
            return {"n": data.pop("n", -100)}

        @field_validator("n")
        @classmethod
        def known(cls, value: int) -> int:
            return value

    def child(name: str) -> Any:
        async def func(state: Greedy) -> Any:
            return {"n": state.n}

        return node(name, func, Greedy)

    result = await quick().run([parallel(child("a"), child("b"))], Num(n=3))
    assert [event.output_state for event in result.trace.walk()] == [{"n": 3}] * 3


@pytest.mark.core
async def test_diff_sees_children() -> None:
    """What differs inside a group is a difference, although the group's own states are equal."""

    async def trace(inner: int) -> ExecutionTrace:
        async def first(state: Num) -> Any:
            return {"n": inner}

        async def second(state: Num) -> Any:
            return {"n": 1}

        return (await quick().run([parallel(node("a", first), node("b", second))], Num())).trace

    one, same, other = await trace(1), await trace(1), await trace(2)
    assert one.diff(same) == []
    (line,) = one.diff(other)
    assert line.startswith("Difference for parallel(a, b) attempt 1: children ")


TAGGED = [
    {"$f": "nan"},
    {"$t": [1, 2]},
    {"$": 1},
    {"$c": {"$c": 1}},
    {"a": {"$d": [[1, 2]]}},
    [{"$u": "no uuid"}],
    {1: {"$b": ""}},
]


@pytest.mark.core
@pytest.mark.parametrize("value", TAGGED, ids=str)
def test_keys_that_look_like_tags_come_back(value: Any) -> None:
    """A dict whose keys look like the marks of the stored form comes back as the dict that it was."""
    schema = schema_of(Loose)
    assert schema.decode(schema.encode(Loose(anything=value))) == Loose(anything=value)


CONTAINERS = [
    (1, 2), [(1,), [2]], {1, 2}, frozenset({"a"}), {(1, 2): [3]}, {1: "int", "1": "text"}, b"\xff", bytearray(b"x"),
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("value", CONTAINERS, ids=repr)
def test_containers_under_any_come_back_as_they_were(value: Any) -> None:
    """A container under Any comes back as one of its type with contents of theirs."""
    schema = schema_of(Loose)
    found = schema.decode(schema.encode(Loose(anything=value))).anything  # type: ignore[attr-defined]
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value) or isinstance(value, (set, frozenset))


@pytest.mark.slow
def test_equal_sets_are_stored_as_equal_bytes() -> None:
    """A set is stored as the same bytes in every process, however its hashes fall."""
    code = """
from typing import Any
from pydantic import BaseModel
from stroma.contracts.schema import schema_of
class Loose(BaseModel):
    anything: Any = None
names = {f"name {i}" for i in range(50)}
print(schema_of(Loose).encode(Loose(anything=[names, frozenset(names)])).hex())
"""
    stored = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(stored) == 1


@pytest.mark.core
def test_output_tokens_cost_the_output_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price is (input, output) in dollars per million tokens."""
    monkeypatch.setitem(KNOWN_MODELS, "a-model-of-ours", (2.0, 10.0))
    assert estimate_cost_usd("a-model-of-ours", 1_000_000) == 2
    assert estimate_cost_usd("a-model-of-ours", 0, 1_000_000) == 10
    assert estimate_cost_usd("a-model-of-ours", 500_000, 100_000) == 2


@pytest.mark.core
def test_a_million_small_costs_are_summed_exactly() -> None:
    """The total of a million times a tenth of a cent is a thousand dollars, beside one large cost, too."""
    tracker = CostTracker()
    tracker.spend(0, 1e9)
    for _ in range(1_000_000):
        tracker.spend(1, 0.001)
    assert tracker.total_tokens == 1_000_000
    assert tracker.total_cost_usd == 1e9 + 1000


# ---------------------------------------------------------------------- limits of time


@pytest.mark.core
async def test_a_node_is_cut_off_at_its_timeout() -> None:
    """A node that takes longer than its timeout is not waited for."""
    finished: list[str] = []

    async def func(state: Num) -> Any:
        await asyncio.sleep(1)
        finished.append("node")
        return {"n": 1}

    runner = quick(node_timeouts={"a": 20}, policy_map=NEVER)
    result = await runner.run([node("a", func)], Num())
    assert (result.status, finished) == (RunStatus.PARTIAL, [])
    assert result.failure is not None
    assert str(result.failure.exception) == "node 'a' did not end within 20 ms (node_timeouts)"


@pytest.mark.core
async def test_a_group_is_cut_off_at_its_timeout() -> None:
    """A timeout under a group's id ends the children that are in flight."""
    finished: list[str] = []

    def child(name: str, seconds: float) -> Any:
        async def func(state: Num) -> Any:
            await asyncio.sleep(seconds)
            finished.append(name)
            return {"n": 1}

        return node(name, func)

    group = parallel(child("quick", 0), child("slow", 1))
    result = await quick(node_timeouts={"parallel(quick, slow)": 50}).run([group], Num())
    assert (result.status, finished) == (RunStatus.PARTIAL, ["quick"])


@pytest.mark.core
async def test_a_node_is_cut_off_when_the_latency_is_spent() -> None:
    """The latency budget is a deadline for the function in flight, which then fails for the budget."""
    finished: list[str] = []

    async def func(state: Num) -> Any:
        await asyncio.sleep(1)
        finished.append("node")
        return {"n": 1}

    result = await quick(budget=ExecutionBudget(max_latency_ms=30)).run([node("a", func)], Num())
    assert (result.status, finished) == (RunStatus.PARTIAL, [])
    assert result.failure is not None
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert result.failure.exception.dimension == "latency"


@pytest.mark.core
async def test_a_hook_is_cut_off_at_its_time_limit() -> None:
    """A hook that awaits longer than its time limit is not waited for, and is listed."""
    finished: list[str] = []

    async def hook(*_: Any) -> None:
        await asyncio.sleep(1)
        finished.append("hook")

    async def func(state: Num) -> Any:
        return {"n": 1}

    runner = quick(hooks=NodeHooks(on_node_success=hook), hook_timeout_ms=20)
    result = await runner.run([node("a", func)], Num())
    assert (result.status, finished) == (RunStatus.COMPLETED, [])
    assert [failure.hook for failure in result.hook_errors] == ["on_node_success"]


@pytest.mark.core
async def test_a_failing_child_ends_its_siblings() -> None:
    """When a child has failed for good its siblings are cancelled, and the run does not wait for what they await."""
    finished: list[str] = []

    async def slow(state: Num) -> Any:
        await asyncio.sleep(1)
        finished.append("slow")
        return {"n": 1}

    async def fails(state: Num) -> Any:
        await asyncio.sleep(0)
        raise LookupError("no such thing")

    runner = quick(classifiers=[lambda error, context: FailureClass.TERMINAL])
    result = await runner.run([parallel(node("slow", slow), node("fails", fails))], Num())
    assert (result.status, finished) == (RunStatus.FAILED, [])
    assert {event.node_id: event.outcome for event in result.trace.walk() if event.branch} == {
        "slow": "cancelled",
        "fails": "failure",
    }


@pytest.mark.core
async def test_the_time_of_hooks_counts_for_no_later_node() -> None:
    """A success hook that takes longer than max_latency_ms leaves the latency budget to the nodes."""

    async def hook(*_: Any) -> None:
        await asyncio.sleep(0.06)

    async def func(state: Num) -> Any:
        return {"n": state.n + 1}

    runner = quick(hooks=NodeHooks(on_node_success=hook), budget=ExecutionBudget(max_latency_ms=50))
    result = await runner.run([node("a", func), node("b", func)], Num())
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=2))


@pytest.mark.core
async def test_a_cancelled_attempt_is_no_failure() -> None:
    """A cancelled attempt is one event with the outcome "cancelled", without class and message."""
    inside = asyncio.Event()
    ended: list[Any] = []

    async def func(state: Num) -> Any:
        inside.set()
        await asyncio.Event().wait()

    async def end(run_id: str, result: Any) -> None:
        ended.append(result)

    run = asyncio.create_task(quick(hooks=NodeHooks(on_run_end=end)).run([node("a", func)], Num()))
    await inside.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    (result,) = ended
    (event,) = result.trace
    assert (event.outcome, event.failure, event.failure_message) == ("cancelled", None, None)
    assert result.trace.failures() == []


@pytest.mark.core
@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0, False), (None, "None")], ids=repr)
def test_diff_tells_apart_what_python_takes_for_equal(one: Any, other: Any) -> None:
    """1, 1.0 and True are equal to Python and not to whoever reads the states."""

    def trace(value: Any) -> ExecutionTrace:
        made = ExecutionTrace()
        now = datetime(2026, 1, 1, tzinfo=UTC)
        made.append(TraceEvent("a", "r", 1, now, {"value": value}, {}, 0))
        return made

    assert trace(one).diff(trace(one)) == []
    assert len(trace(one).diff(trace(other))) == 1


# ---------------------------------------------------------------------- runs inside of nodes


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "status", "attempts"),
    [
        (PipelineChanged, RunStatus.FAILED, 1),  # Another attempt would meet the same.
        (CorruptCheckpoint, RunStatus.PARTIAL, 3),
        (StoreError, RunStatus.PARTIAL, 3),
    ],
)
async def test_errors_of_a_nested_run_are_failures_of_the_node(
    kind: type[Exception], status: RunStatus, attempts: int
) -> None:
    """What a node's own run raises is a failure of the node: a result with that error, not an exception."""

    async def func(state: Num) -> Any:
        raise kind("of another run")

    result = await quick().run([node("a", func)], Num())
    assert (result.status, len(result.trace)) == (status, attempts)
    assert result.failure is not None
    assert type(result.failure.exception) is kind


@pytest.mark.core
async def test_a_store_error_of_the_nodes_own_is_retried() -> None:
    """A node that fails because of a store of its own is tried again as for any other error."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise StoreError("my own store is away")
        return {"n": 1}

    result = await quick().run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.COMPLETED, 3)


@pytest.mark.core
async def test_the_deadline_of_a_nested_run_is_not_that_of_the_outer_one() -> None:
    """A node whose own run went over its latency budget has failed, and is tried again."""
    calls: list[int] = []

    async def slow(state: Num) -> Any:
        calls.append(1)
        await asyncio.sleep(1 if len(calls) == 1 else 0)
        return {"n": 1}

    async def outer(state: Num) -> Any:
        inner = quick(budget=ExecutionBudget(max_latency_ms=30 if not calls else 10_000))
        result = await inner.run([node("slow", slow)], Num())
        result.raise_for_status()
        return {"n": 2}

    result = await quick().run([node("outer", outer)], Num())
    assert (result.status, result.final_state, len(calls)) == (RunStatus.COMPLETED, Num(n=2), 2)


@pytest.mark.core
async def test_a_child_of_another_group_is_a_changed_pipeline() -> None:
    """A group does not take over what a child of the same id committed for another group at its position."""
    store = AsyncInMemoryStore()
    broken = [True]

    async def fine(state: Num) -> Any:
        return {"n": 1}

    async def fails(state: Num) -> Any:
        if broken:
            await asyncio.sleep(0.01)
            raise ValueError
        return {"n": 2}

    first, second, third = node("a", fine), node("b", fails), node("c", fails)
    runner = quick(store=store, run_id="r", policy_map=NEVER)
    assert (await runner.run([parallel(first, second)], Num())).status is RunStatus.PARTIAL
    broken.clear()
    with pytest.raises(PipelineChanged, match=r"parallel\(a, b\)"):
        await runner.run([parallel(first, third)], Num(), resume=True)


# ---------------------------------------------------------------------- SQLite


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(tmp_path / "runs.db") as made:
        yield made


@pytest.mark.core
async def test_bytes_that_changed_are_never_handed_out(store: SQLiteStore) -> None:
    """An output whose bytes still make sense, but are not those that were committed, is damaged."""

    async def func(state: Num) -> Any:
        return {"n": 1}

    await quick(store=store, run_id="r").run([node("a", func)], Num())
    with closing(sqlite3.connect(store.path)) as db, db:
        changed = db.execute(
            "UPDATE steps SET output = CAST(replace(CAST(output AS TEXT), '1', '7') AS BLOB)"
        )
        assert changed.rowcount == 1
        assert db.execute("SELECT typeof(output) FROM steps").fetchone() == ("blob",)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await store.load_typed("r", "a", Num)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await quick(store=store, run_id="r", resume=True).run([node("a", func)], Num())


@pytest.mark.core
async def test_a_refused_operation_leaves_nothing_behind(store: SQLiteStore) -> None:
    """What a stale session tried to keep beside another run's commits is not there, in its own execution either."""
    request = RunRequest("stale", "pipeline", Num(), schema_of(Num))
    stale = await store.open_run(request)
    await store.open_run(request._replace(if_running="take_over"))
    good = await store.open_run(request._replace(run_id="good"))

    def row(position: int) -> AttemptRow:
        return AttemptRow(
            "a",
            1,
            10**18 + position,
            5,
            (0,),
            (1,),
            "success",
            None,
            None,
            position,
            "",
            None,
            None,
            None,
            5,
        )

    pending = [(stale if i % 2 else good).record(row(i), schema_of(Num), Num(n=i), None) for i in range(6)]
    errors = await asyncio.gather(*pending, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None), Fenced] * 3
    assert [a.position for a in store.attempts("good")] == [0, 2, 4]
    assert store.attempts("stale", execution=1) == store.attempts("stale") == []


@pytest.mark.core
async def test_the_smallest_costs_are_kept_exactly(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may cost less than a millionth of a dollar: a run's cost in the store is the sum all the same."""
    monkeypatch.setitem(KNOWN_MODELS, "a-model-of-ours", (0.15, 0.6))

    async def func(state: Num) -> Any:
        return {"n": state.n + 1}, 1, 1, "a-model-of-ours"

    await quick(store=store, run_id="r").run([node("a", func)] * 10, Num())
    run = store.get_run("r")
    assert run is not None
    assert run.cost_usd == 0.000_007_5
    assert [attempt.cost_usd for attempt in store.attempts("r")] == [0.000_000_75] * 10


@pytest.mark.parametrize(
    ("kind", "misspelt"),
    [
        (ExecutionBudget, {"max_tokens": 100}),
        (FailurePolicy, {"max_retry": 0}),
        (NodeContract, {"node_id": "n", "input_schema": Num, "output_schema": Num, "upcasts": None}),
        (RunConfig, {"budgets": None}),
    ],
)
def test_a_misspelt_setting_is_refused(kind: Any, misspelt: dict[str, Any]) -> None:
    """A limit, a policy or a contract with a field that nobody knows is an error that names it, and not one without it."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted") as raised:
        kind(**misspelt)
    assert list(misspelt)[-1] in str(raised.value)
