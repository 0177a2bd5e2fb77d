"""Corners: two rules that meet in one run, and values that are easily lost on their way."""

import asyncio
import collections
import copy
import datetime as dt
import decimal
import enum
import ipaddress
import json
import pathlib
import pickle
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
from pydantic import (
    AliasChoices,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    IPvAnyNetwork,
    PostgresDsn,
    RedisDsn,
    TypeAdapter,
    create_model,
    field_validator,
    model_validator,
)
from tests.fixtures import store_fixture
from tests.kit import NEVER, TWICE, Num, bare, node

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    CheckpointManager,
    ContractRegistry,
    ExecutionBudget,
    FailureClass,
    InMemoryStore,
    NodeContext,
    NodeHooks,
    PipelineChanged,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    classify,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of
from stroma.cost import UsageError
from stroma.hooks.dispatch import HookNotAsync

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


class One(BaseModel):
    a: int = 0


class Two(BaseModel):
    b: int = 0


class Three(BaseModel):
    c: int = 0


quick = partial(StromaRunner.quick, policy_map=NEVER)


def context(config: RunConfig) -> ReliabilityContext:
    return ReliabilityContext.for_run(config, ContractRegistry(), CheckpointManager(AsyncInMemoryStore()))


def exactly(value: Any) -> Any:
    """A value with its types, all the way down: 1 is not True, nor 1.0."""
    if isinstance(value, BaseModel):
        return type(value), {k: exactly(v) for k, v in value.__dict__.items()}
    if isinstance(value, dict):
        return type(value), [(exactly(k), exactly(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [exactly(v) for v in value]
    return type(value), value


async def forever() -> None:
    await asyncio.Event().wait()


store = store_fixture("async-memory", "sqlite")


# ---------------------------------------------------------------------- groups: what is committed stays


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_child_cancelled_right_after_its_commit_is_not_called_again(depth: int, store: Any) -> None:
    """A child that was committed is not called again by the group's next attempt, though its sibling's failure
    cancelled it before its success hook had ended."""
    calls: collections.Counter[str] = collections.Counter()
    committed = asyncio.Event()

    async def success(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        if node_id == "a":
            committed.set()
            await forever()

    async def a(state: Num) -> Any:
        calls["a"] += 1
        return {"a": 1}, 5

    async def b(state: Num) -> Any:
        calls["b"] += 1
        await committed.wait()
        if calls["b"] == 1:
            raise ValueError("b")
        return {"b": 1}

    group = parallel(node("a", a, output=One), node("b", b, output=Two))
    for _ in range(depth - 1):
        group = parallel(group)
    runner = quick(
        store=store, hooks=NodeHooks(on_node_success=success), node_policies={group.node_id: {A: TWICE[A]}}
    )
    result = await runner.run([group], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert calls == {"a": 1, "b": 2}
    assert result.total_tokens == 5
    assert result.final_state is not None
    assert result.final_state.model_dump() == {"a": 1, "b": 1}
    assert [e.outcome for e in result.trace.walk() if e.node_id == "a"] == ["success"]


@pytest.mark.parametrize("how", ["failure", "timeout"])
async def test_a_child_interrupted_while_it_is_committed_is_not_called_again(how: str) -> None:
    """A child whose commit was under way when its group failed or timed out is kept, and is not called again."""
    calls: collections.Counter[str] = collections.Counter()
    saving, release = asyncio.Event(), asyncio.Event()

    class Slow:
        def __init__(self) -> None:
            self.inner = AsyncInMemoryStore()
            self.load, self.delete = self.inner.load, self.inner.delete

        async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            saving.set()
            await release.wait()
            await self.inner.save(run_id, node_id, state)

    async def a(state: Num) -> Any:
        calls["a"] += 1
        return {"a": 1}

    async def b(state: Num) -> Any:
        calls["b"] += 1
        if calls["b"] > 1:
            return {"b": 1}
        await saving.wait()
        try:
            if how == "timeout":
                await forever()
            asyncio.get_running_loop().call_soon(release.set)
            raise ValueError("b")
        except asyncio.CancelledError:
            release.set()
            raise

    group = parallel(node("a", a, output=One), node("b", b, output=Two))
    runner = quick(
        store=Slow(),
        node_policies={group.node_id: TWICE},
        node_timeouts={group.node_id: 50} if how == "timeout" else {},
    )
    result = await runner.run([group], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert calls == {"a": 1, "b": 2}
    first = next(iter(result.trace))
    assert first.failure is (R if how == "timeout" else A)


async def test_steps_side_by_side_do_not_forget_each_others_children() -> None:
    """Two steps of one context run at the same time: the end of one makes no child of the other's group run again."""
    calls: list[str] = []
    failed, other_done = asyncio.Event(), asyncio.Event()

    async def a(state: Num) -> Any:
        calls.append("a")
        return {"a": 1}, 3

    async def b(state: Num) -> Any:
        calls.append("b")
        if calls.count("b") == 1:
            for _ in range(20):  # a is committed by then
                await asyncio.sleep(0)
            raise ValueError("b")
        return {"b": 1}

    async def other(state: Num) -> Any:
        await failed.wait()
        return {"n": 2}, 4

    async def failure(run_id: str, node_id: str, *_: Any) -> None:
        if node_id == group.node_id:
            failed.set()
            await other_done.wait()

    async def success(run_id: str, node_id: str, *_: Any) -> None:
        if node_id == "other":
            other_done.set()

    group = parallel(bare("a", a), bare("b", b))
    ctx = context(
        RunConfig(
            policy_map=NEVER,
            node_policies={group.node_id: {A: TWICE[A]}},
            hooks=NodeHooks(on_node_failure=failure, on_node_success=success),
        )
    )
    first, second = await asyncio.gather(
        execute_step("g", group, Num(), ctx), execute_step("other", other, Num(), ctx)
    )
    assert (first.status, second.status) == (RunStatus.COMPLETED, RunStatus.COMPLETED)
    assert calls == ["a", "b", "b"]
    assert ctx.cost_tracker.total_tokens == 7
    assert second.final_state == Num(n=2)


async def test_many_steps_of_one_context_at_once(store: Any) -> None:
    """Steps begun side by side on one context open its run once, and each has a place, a key and an event of its own."""
    ctx = ReliabilityContext.for_run(RunConfig(run_id="side"), ContractRegistry(), CheckpointManager(store))
    keys: list[str] = []

    async def step(state: Num) -> Any:
        run = current_node()
        assert run is not None
        keys.append(run.idempotency_key)
        await asyncio.sleep(0)
        return {"n": state.n + 1}, 1

    results = await asyncio.gather(*(execute_step("step", step, Num(n=i), ctx) for i in range(20)))
    assert [r.final_state for r in results] == [Num(n=i + 1) for i in range(20)]
    assert len(set(keys)) == 20
    assert ctx.cost_tracker.total_tokens == 20
    assert len(ctx.trace) == 20
    assert ctx.execution == 1


async def test_a_crossed_budget_comes_before_a_siblings_failure() -> None:
    """Once a child has crossed the budget, a sibling that fails afterwards cancels nobody: children in flight finish,
    and the run stops as PARTIAL for its budget."""
    kept = InMemoryStore()
    crossed, broken, begun = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Refused(Exception):
        status_code = 401

    async def over(state: Num) -> Any:
        await begun.wait()
        return {"a": 1}, 100

    async def bad(state: Num) -> Any:
        await crossed.wait()
        raise Refused("bad key")

    async def slow(state: Num) -> Any:
        begun.set()
        await broken.wait()
        for _ in range(20):  # Time enough for a cancellation to arrive.
            await asyncio.sleep(0)
        return {"c": 1}

    async def failure(run_id: str, node_id: str, *_: Any) -> None:
        {"over": crossed, "bad": broken}.get(node_id, asyncio.Event()).set()

    group = parallel(
        node("over", over, output=One), node("bad", bad, output=Two), node("slow", slow, output=Three)
    )
    result = await quick(
        store=kept,
        run_id="r",
        budget=ExecutionBudget(max_tokens_total=10),
        hooks=NodeHooks(on_node_failure=failure),
    ).run([group], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert result.failure.exception.node_id == "over"
    assert kept.load("r", "over") == One(a=1)
    assert kept.load("r", "slow") == Three(c=1)
    (event,) = result.trace
    assert {e.node_id: e.failure for e in event.children} == {"over": R, "bad": T, "slow": R}


# ---------------------------------------------------------------------- contracts


class Bumped(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def bump(cls, value: int) -> int:
        return value + 1


class BumpedList(BaseModel):
    x: list[int]

    @field_validator("x")
    @classmethod
    def bump(cls, value: list[int]) -> list[int]:
        return [*value, len(value)]


class BumpedAny(BaseModel):
    model_config = ConfigDict(extra="allow")

    x: int
    any: Any = None

    @model_validator(mode="after")
    def bump(self) -> Any:
        self.x += 1
        return self


class BumpedBefore(BaseModel):
    x: int
    items: list[Any] = []

    @model_validator(mode="before")
    @classmethod
    def bump(cls, data: Any) -> Any:
        return {**data, "x": data["x"] + 1}


@pytest.mark.parametrize(
    ("model", "raw"),
    [
        (Bumped, {"x": 1}),
        (BumpedList, {"x": [1]}),
        (BumpedAny, {"x": 1, "any": [1], "more": {"k": [2]}}),
        (BumpedBefore, {"x": 1, "items": [[1]]}),
    ],
)
@pytest.mark.parametrize("usage", [False, True])
async def test_an_output_is_validated_once(model: type[BaseModel], raw: Any, usage: bool, store: Any) -> None:
    """A validator that changes its value runs once on what a node returned: result, hooks and trace all show the same."""
    seen: list[Any] = []

    async def success(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        seen.append(state)

    async def a(state: Num) -> Any:
        return (copy.deepcopy(raw), 5) if usage else copy.deepcopy(raw)

    runner = quick(store=store, hooks=NodeHooks(on_node_success=success))
    result = await runner.run([node("a", a, output=model)], Num())
    once = model.model_validate(copy.deepcopy(raw))
    assert result.final_state == once
    assert seen == [once.model_dump()]
    assert [e.output_state for e in result.trace] == [once.model_dump()]
    assert [e.output_state for e in result.trace] == [once.model_dump()]


class Swapped(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    id: int = Field(alias="x")
    x: int = Field(alias="y")


class SwappedDeep(BaseModel):
    first: str = Field(alias="second")
    second: str = Field(alias="first")
    items: list[float] = []


class SwappedChoices(BaseModel):
    a: bytes = Field(validation_alias=AliasChoices("b", "z"))
    b: bytes = Field(validation_alias=AliasChoices("a", "y"))


class SwappedOptional(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    a: int = Field(0, alias="b")
    b: int = Field(0, alias="c")
    inner: Swapped


ALIASED = [
    Swapped(x=1, y=2),  # type: ignore[call-arg]
    SwappedDeep(second="f", first="s", items=[0.5]),
    SwappedChoices.model_validate({"b": b"\xff", "a": b"b"}),
    SwappedOptional.model_validate({"b": 1, "c": 2, "inner": {"x": 3, "y": 4}}),
]


@pytest.mark.parametrize("value", ALIASED, ids=lambda v: type(v).__name__)
async def test_an_alias_that_is_another_fields_name(value: BaseModel, store: Any) -> None:
    """Fields whose aliases are names of other fields keep their values from node to node, in the store and on resume."""
    schema = schema_of(type(value))
    assert schema.convert(value) == value
    assert schema.decode(schema.encode(value)) == value
    assert schema.restore(schema.snapshot(value)) == value
    broken = [True]
    seen: list[Any] = []

    async def make(state: Num) -> Any:
        return value

    async def same(state: Any) -> Any:
        seen.append(state)
        if broken[0]:
            raise ValueError("later")
        return state

    kind = type(value)
    nodes = [node("make", make, output=kind), node("same", same, kind, kind)]
    runner = quick(store=store, run_id="r")
    first = await runner.run(nodes, Num())
    assert first.final_state == value
    broken[0] = False
    result = await runner.run(nodes, Num(), resume=True)
    assert result.status is RunStatus.RESUMED
    assert [*seen, result.final_state] == [value] * 3
    assert [e.output_state for e in result.trace] == [value.model_dump()]


# ---------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "tokens", [10**400, 2**63, 10**9 + 1, -(10**400)], ids=["400 digits", "2**63", "over", "below"]
)
@pytest.mark.parametrize("model", [None, "gpt-4o"])
async def test_absurd_token_counts_lose_no_output(tokens: int, model: str | None, store: Any) -> None:
    """A token count that nobody can count is a failure that names the node; its output is kept and not bought again."""
    calls: list[str] = []

    async def a(state: Num) -> Any:
        calls.append("a")
        return ({"a": 1}, tokens) if model is None else ({"a": 1}, tokens, model)

    async def b(state: One) -> Any:
        calls.append("b")
        return {"b": 1}

    nodes = [node("a", a, output=One), node("b", b, One, Two)]
    runner = quick(store=store, run_id="r", policy_map=TWICE)
    result = await runner.run(nodes, Num())
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert isinstance(result.failure.exception, UsageError)
    assert "'a'" in result.failure.message
    assert len(result.failure.message) < 200
    assert result.final_state == One(a=1)
    assert (result.total_tokens, result.total_cost_usd) == (0, 0)
    assert [e.output_state for e in result.trace] == [{"a": 1}]
    assert (await runner.run(nodes, Num(), resume=True)).final_state == Two(b=1)
    assert calls == ["a", "b"]


async def test_a_billion_tokens_can_be_counted(store: Any) -> None:
    """A billion tokens in one report are counted and priced like any other."""

    async def a(state: Num) -> Any:
        return {"a": 1}, 10**9, "gpt-4o"

    result = await quick(store=store).run([node("a", a, output=One)], Num())
    assert result.status is RunStatus.COMPLETED
    assert result.total_tokens == 10**9
    assert result.total_cost_usd == pytest.approx(2500)


async def test_an_absurd_report_is_refused_where_it_is_made() -> None:
    """report_usage() refuses what cannot be counted, at the call, and what was reported before still counts."""

    async def a(state: Num) -> Any:
        run = current_node()
        assert run is not None
        run.report_usage(input_tokens=7)
        with pytest.raises(UsageError, match="'a'"):
            run.report_usage(output_tokens=10**400)
        return {"a": 1}

    result = await quick().run([node("a", a, output=One)], Num())
    assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 7)


async def test_reported_usage_shows_at_once() -> None:
    """What a node has reported is in current_node().usage and .model at once, and adds up; each attempt starts anew."""
    seen: list[Any] = []

    async def a(state: Num) -> Any:
        run = current_node()
        assert run is not None
        seen.append((run.usage.tokens, run.usage.output_tokens, run.model))
        run.report_usage(input_tokens=7, model="gpt-4o")
        seen.append((run.usage.tokens, run.usage.output_tokens, run.model))
        run.report_usage(input_tokens=1, output_tokens=2, model="gpt-4o-mini")
        run.report_usage(output_tokens=1)
        seen.append((run.usage.tokens, run.usage.output_tokens, run.model))
        if run.attempt == 1:
            raise ValueError("half-way")
        return {"a": 1}

    result = await quick(policy_map=TWICE).run([node("a", a, output=One)], Num())
    once = [(0, 0, None), (7, 0, "gpt-4o"), (11, 3, "gpt-4o-mini")]
    assert seen == once * 2
    assert result.total_tokens == 22


# ---------------------------------------------------------------------- resume: refused, and nothing else


async def _state_of(store: Any, run_id: str) -> Any:
    """What a durable store says of a run: its row but for times of looking, its attempts and its input."""
    if not isinstance(store, SQLiteStore):
        return None
    return store.get_run(run_id), store.attempts(run_id), store.input_of(run_id)


async def _one(state: Any) -> Any:
    return {"a": 1}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", [{"resume": True}, {"resume_from": "c"}], ids=["resume", "resume_from"])
@pytest.mark.parametrize("change", ["id", "schema", "order"])
async def test_a_refused_resume_changes_nothing(
    change: str, how: dict[str, Any], finished: bool, store: Any
) -> None:
    """A resume that is refused because the pipeline changed leaves the run's status and commits as they were."""
    calls: list[str] = []
    broken = [not finished]

    def make(name: str, output: Any) -> Callable[..., Any]:
        async def func(state: Any) -> Any:
            calls.append(name)
            if name == "c" and broken[0]:
                raise ValueError("later")
            return output

        return func

    a = node("a", make("a", {"a": 1}), Num, One)
    b = node("b", make("b", {"b": 1}), One, Two)
    c = node("c", make("c", {"c": 1}), Two, Three)
    other = node("other", make("other", {"a": 1}), Num, One)
    changed = node("a", make("a", {"a": 1}), Num, create_model("One", a=(str, "")))
    nodes = {"id": [other, b, c], "schema": [changed, b, c], "order": [b, a, c]}[change]
    runner = quick(store=store, run_id="r")
    await runner.run([a, b, c], Num())
    before = await _state_of(store, "r")
    calls.clear()
    with pytest.raises(PipelineChanged):
        await runner.run(nodes, Num(), **how)
    assert calls == []
    assert await _state_of(store, "r") == before
    broken[0] = False
    result = await runner.run([a, b, c], Num(), resume=True)
    assert result.final_state == Three(c=1)
    assert calls == ([] if finished else ["c"])


class Lists(BaseModel):
    left: list[str]
    right: list[str]


class Text(BaseModel):
    t: str


async def test_a_map_over_another_field_is_another_pipeline(store: Any) -> None:
    """Outputs of one field's items are never taken for those of another field: the resume says what changed."""
    broken = [True]
    calls: list[str] = []
    left_done = asyncio.Event()

    async def up(state: Text) -> Any:
        calls.append(state.t)
        if state.t == "l2" and broken[0]:
            await left_done.wait()
            raise ValueError("no")
        return {"t": state.t.upper()}

    async def success(*_: Any) -> None:
        left_done.set()

    item = node("up", up, Text, Text)
    data = Lists(left=["l1", "l2"], right=["r1", "r2"])
    runner = quick(store=store, run_id="q", hooks=NodeHooks(on_node_success=success))
    first = await runner.run([map_over("left", item, into="left")], data)
    assert first.status is RunStatus.PARTIAL
    broken[0] = False
    calls.clear()
    with pytest.raises(PipelineChanged, match=r"map_over\(left, up\).*map_over\(right, up\)"):
        await runner.run([map_over("right", item, into="right")], data, resume=True)
    assert "r1" not in calls


@pytest.mark.parametrize("was", ["parallel", "node"])
async def test_a_child_of_another_group_is_another_pipeline(was: str, store: Any) -> None:
    """A committed child counts for the group that asked for it: in another group, or alone, it is PipelineChanged."""
    committed = asyncio.Event()

    async def fails(state: Num) -> Any:
        await committed.wait()
        raise ValueError("no")

    async def success(*_: Any) -> None:
        committed.set()

    a = node("a", _one, output=One)
    b, c = (node(name, fails, output=Two) for name in "bc")
    after = node("after", fails, One, Two)
    runner = quick(store=store, run_id="r", hooks=NodeHooks(on_node_success=success))
    first = await runner.run([parallel(a, b)] if was == "parallel" else [a, after], Num())
    assert first.status is RunStatus.PARTIAL
    changed = [parallel(a, c)] if was == "parallel" else [parallel(a), after]
    with pytest.raises(PipelineChanged, match="parallel"):
        await runner.run(changed, Num(), resume=True)


async def test_what_no_store_can_write_resumes_in_memory() -> None:
    """Without a contract a node may return anything: in memory, a lock in its output is still there on resume."""
    lock = threading.Lock()
    broken = [True]
    calls: list[str] = []
    done = asyncio.Event()

    async def a(state: Any) -> Any:
        calls.append("a")
        return {"lock": lock, "n": [1]}

    async def b(state: Any) -> Any:
        calls.append("b")
        await done.wait()
        if broken[0]:
            raise ValueError("b")
        return {"b": 1}

    async def success(*_: Any) -> None:
        done.set()

    for nodes in ([parallel(bare("a", a), bare("b", b))], [bare("a", a), bare("b", b)]):
        calls.clear()
        done.clear()
        broken[0] = True
        runner = quick(run_id="z", hooks=NodeHooks(on_node_success=success))
        assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
        broken[0] = False
        result = await runner.run(nodes, Num(), resume=True)
        assert result.status is RunStatus.RESUMED, result.failure
        assert calls == ["a", "b", "b"]
        if len(nodes) == 1:
            assert result.final_state is not None
            assert result.final_state.model_dump() == {"lock": lock, "n": [1], "b": 1}


# ---------------------------------------------------------------------- errors of nested runs


async def _unopened() -> None:
    await SQLiteStore("/dev/null/x.db").save("a", "b", Num())


async def _sync_hook() -> None:
    def start(*_: Any) -> None:
        """Not async."""

    hooks = NodeHooks(on_node_start=start)  # type: ignore[arg-type]
    await quick(hooks=hooks).run([node("i", _one, output=One)], Num())


async def _deadline() -> None:
    async def slow(state: Num) -> Any:
        await forever()

    result = await quick(budget=ExecutionBudget(max_latency_ms=1)).run([node("i", slow)], Num())
    result.raise_for_status()


NESTED = [
    (_unopened, StoreError, A),
    (_sync_hook, HookNotAsync, A),
    (_deadline, BudgetExceeded, R),
]


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize(("inner", "error", "kind"), NESTED, ids=lambda p: getattr(p, "__name__", None))
async def test_errors_of_a_run_within_a_node_are_failures_like_any_other(
    inner: Any, error: type[Exception], kind: FailureClass, budget: int | None, in_group: bool, store: Any
) -> None:
    """What a run or a store of the node's own raises is that node's failure: classified, retried, and it may recover."""
    asked: list[type[BaseException]] = []
    calls: list[int] = []
    recover_at = [99]

    async def outer(state: Num) -> Any:
        calls.append(1)
        if len(calls) < recover_at[0]:
            await inner()
        return {"a": 1}

    def look(exc: Exception, _: NodeContext) -> None:
        asked.append(type(exc))

    outer_node: Any = node("outer", outer, output=One)
    nodes = [parallel(outer_node)] if in_group else [outer_node]
    limits = ExecutionBudget(max_latency_ms=budget)
    runner = quick(store=store, policy_map=TWICE, classifiers=[look], budget=limits)
    result = await runner.run(nodes, Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert isinstance(result.failure.exception, error)
    assert result.failure.failure_class is kind
    assert len(calls) == 3
    assert len(asked) == 3
    assert all(issubclass(a, error) for a in asked)
    assert [e.failure for e in result.trace.walk() if e.node_id == "outer"] == [kind] * 3

    calls.clear()
    recover_at[0] = 3
    assert (await runner.run(nodes, Num())).status is RunStatus.COMPLETED
    assert len(calls) == 3

    calls.clear()
    recover_at[0] = 99
    result = await runner.with_classifiers([lambda exc, _: T]).run(nodes, Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)


# ---------------------------------------------------------------------- lossless, or refused by name


class Colour(enum.Enum):
    RED = "r"


class Level(enum.IntEnum):
    LOW = 1


Case = tuple[Any, Any, dict[str, Any]]
KEPT: dict[str, Case] = {
    "HttpUrl": (HttpUrl, "http://a.b/c", {}),
    "AnyUrl": (AnyUrl, "x://a", {}),
    "urls": (list[HttpUrl], ["http://a.b/c", "https://d.e/?f=%20"], {}),
    "PostgresDsn": (PostgresDsn, "postgres://u:p@h1,h2:5433/d", {}),
    "RedisDsn": (RedisDsn, "redis://h/0", {}),
    "IPv4Address": (ipaddress.IPv4Address, "1.2.3.4", {}),
    "IPv6Address": (ipaddress.IPv6Address, "::1", {}),
    "IPv4Interface": (ipaddress.IPv4Interface, "1.2.3.4/24", {}),
    "IPvAnyNetwork": (IPvAnyNetwork, "1.2.3.0/24", {}),
    "deque": (collections.deque[int], [1, 2], {}),
    "deque of paths": (collections.deque[pathlib.PurePosixPath], ["a", "b"], {}),
    "int or str keys": (dict[int | str, int], {1: 1, "1": 2}, {}),
    "int keys": (dict[int, int], {1: 1}, {}),
    "literal of bytes": (Literal[b"x"], b"x", {}),
    "literal of 1 and True": (Literal[1, "1"], "1", {}),
    "enum": (Colour, Colour.RED, {}),
    "int enum": (Level, Level.LOW, {}),
    "large int": (int, 10**4000, {}),
    "strict int": (int, 3, {"strict": True}),
    "any float": (Any, 1.0, {}),
    "decimal": (decimal.Decimal, "1.10", {}),
    "datetime": (dt.datetime, dt.datetime(2020, 1, 1, tzinfo=dt.UTC), {}),
    "longest timedelta": (dt.timedelta, dt.timedelta.max, {}),
    "lone surrogate": (str, "\ud800", {}),
}
EITHER: dict[str, Case] = {
    "enum or str": (str | Colour, Colour.RED, {}),
    "literal of an enum": (Literal[Colour.RED], Colour.RED, {}),
    "huge int": (int, 10**5000, {}),
    "huge ints": (list[int], [10**5000], {}),
    "strict enum": (Colour, Colour.RED, {"strict": True}),
    "strict path": (pathlib.Path, pathlib.Path("a"), {"strict": True}),
    "callable": (Callable[..., Any], print, {}),
    "a range": (Any, range(3), {}),
    "enum under Any": (Any, Colour.RED, {}),
}


@pytest.mark.parametrize("name", [*KEPT, *EITHER])
async def test_what_comes_back_equals_what_was_stored(name: str, store: Any) -> None:
    """A state comes back from the store as it was, or is refused with the name of its field; the trace can be read
    either way."""
    annotation, value, config = (KEPT | EITHER)[name]
    made: Any = create_model(
        "Made",
        __config__=ConfigDict(arbitrary_types_allowed=True, **config),
        value=(annotation, ...),
        deep=(list[int], []),
    )
    state = made(value=value)
    broken = [True]
    calls: list[str] = []

    async def a(_: Any) -> Any:
        calls.append("a")
        return state

    async def b(given: Any) -> Any:
        calls.append("b")
        assert exactly(given) == exactly(state)
        if broken[0]:
            raise PermissionError
        return given

    nodes = [node("a", a, output=made), node("b", b, made, made)]
    runner = quick(store=store, run_id="x")
    first = await runner.run(nodes, Num())
    events = list(first.trace)
    assert first.failure is not None
    if isinstance(first.failure.exception, NotSerialisable):
        assert name not in list(KEPT)
        assert first.status is RunStatus.FAILED
        assert first.failure.node_id == "a"
        assert calls == ["a"]
        assert "Made" in first.failure.message
        assert "cannot be serialised" in first.failure.message
        assert name in ("huge int", "huge ints") or "Made.value " in first.failure.message
        return
    assert isinstance(first.failure.exception, PermissionError), first.failure
    assert exactly(first.final_state) == exactly(state)
    assert [e.node_id for e in events] == ["a", "b"]
    assert events[0].output_state is not None
    assert exactly(events[0].output_state["value"]) == exactly(state.value)
    broken[0] = False
    result = await runner.run(nodes, Num(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert calls == ["a", "b", "b"]
    assert exactly(result.final_state) == exactly(state)
    assert len(list(result.trace)) == 1


# ---------------------------------------------------------------------- the context dict while a fallback is due


class User(BaseModel):
    user: str


async def in_node(runner: StromaRunner, look: Callable[[Any], Any]) -> Any:
    """What ``look`` makes of the context dict that a node gets."""
    seen: list[Any] = []

    async def a(state: Num, ctx: Any) -> Any:
        seen.append(look(ctx))
        return {"a": 1}

    result = await runner.run([node("a", a, output=One)], Num())
    result.raise_for_status()
    return seen[0]


FULL = {"user": "u", "_stroma_model": "small"}
READERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "json": (lambda ctx: json.loads(json.dumps(ctx)), FULL),
    "indented json": (lambda ctx: json.loads(json.dumps(ctx, indent=1, sort_keys=True)), FULL),
    "dict": (dict, FULL),
    "**": (lambda ctx: {**ctx}, FULL),
    "keywords": (lambda ctx: (lambda **given: given)(**ctx), FULL),
    "update": (lambda ctx: (made := {}, made.update(ctx))[0], FULL),
    "|": (lambda ctx: {} | ctx, FULL),
    "copy": (copy.copy, FULL),
    ".copy": (lambda ctx: ctx.copy(), FULL),
    "deepcopy": (copy.deepcopy, FULL),
    "pickle": (lambda ctx: pickle.loads(pickle.dumps(ctx)), FULL),
    "pydantic dict": (lambda ctx: TypeAdapter(dict[str, Any]).validate_python(ctx), FULL),
    "pydantic model": (lambda ctx: User.model_validate(ctx), User(user="u")),
    "pydantic json": (lambda ctx: json.loads(TypeAdapter(Any).dump_json(ctx)), FULL),
    "reversed": (lambda ctx: list(reversed(ctx)), ["_stroma_model", "user"]),
    "list": (list, ["user", "_stroma_model"]),
    "len": (len, 2),
    "format": (lambda ctx: "{user} {_stroma_model}".format_map(ctx), "u small"),
    "repr": (lambda ctx: repr(ctx), repr(FULL)),
    "==": (lambda ctx: (ctx == FULL, ctx != FULL), (True, False)),
    "items": (lambda ctx: dict(ctx.items()), FULL),
}


@pytest.mark.parametrize("reader", READERS)
async def test_the_context_with_a_fallback_reads_like_a_dict(reader: str) -> None:
    """While a fallback is due, ctx has the model's name for whatever reads dicts, and the user's dict has not."""
    look, expected = READERS[reader]
    own = {"user": "u"}
    runner = quick(budget=ExecutionBudget(max_cost_usd=1), context=own).with_model_fallback(
        "gpt-4o", to="small", at_budget_pct=0
    )
    assert await in_node(runner, look) == expected
    assert own == {"user": "u"}


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, dict, lambda c: pickle.loads(pickle.dumps(c))])
async def test_writes_reach_the_users_dict_and_copies_are_apart(make: Callable[[Any], Any]) -> None:
    """What a node writes to ctx is in the user's dict and in every later reading of ctx; a copy is a dict of its own."""
    own: dict[str, Any] = {"user": "u", "old": 1}

    def write(ctx: Any) -> Any:
        made = make(ctx)
        made["lost"] = 1
        ctx["kept"] = [1]
        del ctx["old"]
        ctx.setdefault("more", 2)
        assert ctx.pop("user") == "u"
        return type(made), json.loads(json.dumps(ctx)), TypeAdapter(dict[str, Any]).validate_python(ctx)

    runner = quick(budget=ExecutionBudget(max_cost_usd=1), context=own).with_model_fallback(
        "gpt-4o", to="small", at_budget_pct=0
    )
    now = {"kept": [1], "more": 2, "_stroma_model": "small"}
    assert await in_node(runner, write) == (dict, now, now)
    assert own == {"kept": [1], "more": 2}


# ---------------------------------------------------------------------- ids


async def test_idempotency_keys_never_collide(store: Any) -> None:
    """Every execution, run, position and child has an idempotency key of its own, whatever the run's id looks like."""
    keys: list[str] = []

    async def note(state: Any) -> Any:
        run = current_node()
        assert run is not None
        keys.append(run.idempotency_key)
        return {"n": 1}

    nodes = [node("x", note), parallel(node("y", note), parallel(node("z", note)))]
    ids = [
        "pay",
        "pay@2",
        "pay:1",
        "pay:2",
        "pay:1:0:",
        "pay:1:1:",
        "pay:1:1:0",
        "pay:2:0:",
        "pay:",
        ":",
        "1",
    ]
    for run_id in ids:
        for _ in range(3):
            result = await quick(store=store).run(nodes, Num(), run_id=run_id)
            assert result.status is RunStatus.COMPLETED
    assert len(keys) == len(ids) * 9
    assert len(set(keys)) == len(keys)


async def test_an_idempotency_key_stays_on_retry_and_resume(store: Any) -> None:
    """All attempts at one position, those after a resume too, have the same idempotency key."""
    keys: list[str] = []

    async def a(state: Num) -> Any:
        run = current_node()
        assert run is not None
        keys.append(run.idempotency_key)
        if len(keys) < 5:
            raise ValueError("no")
        return {"a": 1}

    runner = quick(store=store, run_id="pay", policy_map=TWICE)
    nodes = [node("a", a, output=One)]
    assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
    assert (await runner.run(nodes, Num(), resume=True)).final_state == One(a=1)
    assert len(keys) == 5
    assert len(set(keys)) == 1


def test_generated_ids_are_unique_across_threads() -> None:
    """No two threads get the same generated run id, of a config or of its copies."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            config = RunConfig()
            copies = [config, config.model_copy(), config.model_copy(), copy.copy(config)]
            barrier = threading.Barrier(len(copies))
            got: list[str] = []

            def take(config: RunConfig, barrier: threading.Barrier = barrier, got: list[str] = got) -> None:
                barrier.wait()
                got.append(config.take_run_id())

            threads = [threading.Thread(target=take, args=(each,)) for each in copies]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(got)) == len(copies)
    finally:
        sys.setswitchinterval(interval)


# ---------------------------------------------------------------------- ends


@pytest.mark.core
async def test_closing_the_coroutine_of_a_run(store: Any) -> None:
    """The coroutine of run() can be closed in the middle of a node: hooks get as far as their first await, and the run
    can go on."""
    inside = [False]
    closed: list[str] = []

    async def a(state: Num) -> Any:
        return {"a": 1}

    async def b(state: One) -> Any:
        if inside[0]:
            return {"b": 1}
        inside[0] = True
        try:
            await forever()
        finally:
            closed.append("b")

    async def watch(*_: Any) -> None:
        closed.append("hook")
        await asyncio.sleep(0)
        closed.append("never")

    nodes = [node("a", a, output=One), node("b", b, One, Two)]
    runner = quick(store=store, run_id="o", node_timeouts={"b": 60_000})
    hooks = NodeHooks(on_node_cancelled=watch, on_run_end=watch)
    run = runner.with_hooks(hooks).run(nodes, Num())
    awaited = run.send(None)
    while not inside[0]:
        if awaited is not None:
            awaited._asyncio_future_blocking = False
            await asyncio.wait([awaited])
        awaited = run.send(None)
    run.close()
    assert closed == ["b", "hook", "hook"]
    assert current_node() is None
    result = await quick(store=store, run_id="o").run(nodes, Num(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert [e.node_id for e in result.trace] == ["b"]


async def test_a_cancelled_run_raises_cancelled_error(store: Any) -> None:
    """Cancelling a run raises CancelledError, also if its on_run_end hook is not async."""
    inside = asyncio.Event()

    async def a(state: Num) -> Any:
        inside.set()
        await forever()

    runner = quick(store=store, hooks=NodeHooks(on_run_end=lambda *_: None))
    task = asyncio.create_task(runner.run([node("a", a)], Num()))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


# ---------------------------------------------------------------------- what errors mean, and what they say


def error_with(base: type[Exception], **attributes: Any) -> Exception:
    return type("Shaped", (base,), attributes)("x")


@pytest.mark.parametrize(
    ("status", "expected"), [(401, T), (400, T), (404, T), (429, R), (503, R), (None, R)]
)
def test_what_a_provider_says_comes_before_what_a_timeout_is(
    status: int | None, expected: FailureClass
) -> None:
    """A TimeoutError that carries a provider's status is what that status says; without one it is RECOVERABLE."""
    error = error_with(TimeoutError, **({} if status is None else {"status_code": status}))
    assert classify(error, NodeContext("n", 1, "r")) is expected


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 01 Jan 9999 00:00:00 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "1e999",
        "nan",
        "9" * 5000,
        "soon",
    ],
)
def test_a_senseless_retry_after_breaks_nothing(header: str) -> None:
    """A Retry-After that is no date or number of this world leaves a 429 RECOVERABLE."""
    error = error_with(Exception, status_code=429, headers={"retry-after": header})
    assert classify(error, NodeContext("n", 1, "r")) is R


async def test_a_single_node_is_told_to_stand_in_a_list() -> None:
    """run(node, state) and run(parallel(...), state) say to put it in a list; what is no node is told how to be one."""
    a = node("a", _one, output=One)
    for single in (a, parallel(a), map_over("items", a, into="items")):
        with pytest.raises(TypeError, match="in a list"):
            await quick().run(single, Num())

    async def plain(state: Num) -> Any:
        return {}

    for nodes in (plain, [plain]):
        with pytest.raises(TypeError, match="decorate it with @stroma_node"):
            await quick().run(nodes, Num())  # type: ignore[arg-type]
