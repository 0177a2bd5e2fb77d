"""Rules that ``./dev mutants`` breaks and that no test about a larger matter happens to hold."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable
from typing import Any

import pytest
from pydantic import BaseModel, field_validator, model_validator

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeHooks,
    RunStatus,
    StoreError,
    StromaRunner,
    parallel,
    stroma_node,
)
from stroma.checkpoint import RunRequest, Session
from stroma.cost import KNOWN_MODELS, CostTracker, estimate_cost_usd
from stroma.schemas import Schema, schema_of
from stroma.trace import ExecutionTrace, Row

FAST = {kind: FailurePolicy(max_retries=2, backoff_seconds=0) for kind in FailureClass}


class Num(BaseModel):
    n: int = 0


class Loose(BaseModel):
    anything: Any = None


def quick(**config: Any) -> StromaRunner:
    config.setdefault("policy_map", FAST)
    return StromaRunner.quick(**config)


def node(node_id: str, func: Any, given: type[BaseModel] = Num, promised: type[BaseModel] = Num) -> Any:
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=node_id, input_schema=given, output_schema=promised
    )
    return stroma_node(node_id, contract)(func)


class Journal:
    """A journal store whose commits wait for ``gate``, and which refuses them with ``error`` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.inner = AsyncInMemoryStore()
        self.save, self.load, self.delete = self.inner.save, self.inner.load, self.inner.delete
        self.error = error
        self.tries = 0
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()

    def open_run(self, request: RunRequest) -> Session:
        store, session = self, self.inner.open_run(request)

        class Held:
            execution, continued = session.execution, session.continued
            restored, prior = session.restored, session.prior

            def record(
                self, row: Row, schema: Schema | None, output: BaseModel | None
            ) -> Awaitable[None] | None:
                if output is None:
                    return session.record(row, schema, output)
                return self.commit(row, schema, output)

            async def commit(self, row: Row, schema: Schema | None, output: BaseModel) -> None:
                store.tries += 1
                store.waiting.set()
                if store.error is not None:
                    raise store.error
                await store.gate.wait()
                session.record(row, schema, output)

            def end(self, status: str, error: str | None) -> Awaitable[None] | None:
                return session.end(status, error)

        return Held()


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


async def test_waits_between_attempts_are_in_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is longer than max_latency_ms takes nothing from it."""

    async def no_wait(seconds: float) -> None:
        assert seconds == 30

    monkeypatch.setattr("stroma._engine.sleep", no_wait)
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


@pytest.mark.parametrize("value", TAGGED, ids=str)
def test_keys_that_look_like_tags_come_back(value: Any) -> None:
    """A dict whose keys look like the marks of the stored form comes back as the dict that it was."""
    schema = schema_of(Loose)
    assert schema.decode(schema.encode(Loose(anything=value))) == Loose(anything=value)


CONTAINERS = [
    (1, 2), [(1,), [2]], {1, 2}, frozenset({"a"}), {(1, 2): [3]}, {1: "int", "1": "text"}, b"\xff", bytearray(b"x"),
]  # fmt: skip


@pytest.mark.parametrize("value", CONTAINERS, ids=repr)
def test_containers_under_any_come_back_as_they_were(value: Any) -> None:
    """A container under Any comes back as one of its type with contents of theirs."""
    schema = schema_of(Loose)
    found = schema.decode(schema.encode(Loose(anything=value))).anything  # type: ignore[attr-defined]
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value) or isinstance(value, (set, frozenset))


def test_equal_sets_are_stored_as_equal_bytes() -> None:
    """A set is stored as the same bytes in every process, however its hashes fall."""
    code = """
from typing import Any
from pydantic import BaseModel
from stroma.schemas import schema_of
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


def test_output_tokens_cost_the_output_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price is (input, output) in dollars per million tokens."""
    monkeypatch.setitem(KNOWN_MODELS, "a-model-of-ours", (2.0, 10.0))
    assert estimate_cost_usd("a-model-of-ours", 1_000_000) == 2
    assert estimate_cost_usd("a-model-of-ours", 0, 1_000_000) == 10
    assert estimate_cost_usd("a-model-of-ours", 500_000, 100_000) == 2


def test_a_million_small_costs_are_summed_exactly() -> None:
    """The total of a million times a tenth of a cent is a thousand dollars, beside one large cost, too."""
    tracker = CostTracker()
    tracker.spend(0, 1e9)
    for _ in range(1_000_000):
        tracker.spend(1, 0.001)
    assert tracker.total_tokens == 1_000_000
    assert tracker.total_cost_usd == 1e9 + 1000
