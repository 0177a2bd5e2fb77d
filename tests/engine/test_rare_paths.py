"""What happens seldom: the rules that no ordinary run meets."""

import asyncio
import copy
import dataclasses
import threading
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tests.engine.event_log import Between, Journal
from tests.kit import NEVER, ONCE, Num, node

from stroma import (
    AsyncInMemoryStore,
    ContractViolation,
    CostTracker,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    FallbackPolicy,
    NodeHooks,
    NodeUsage,
    Pipeline,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.contracts import NotSerialisable
from stroma.contracts.node import find_node
from stroma.contracts.schema import schema_of
from stroma.cost import UsageError
from stroma.cost.fallback import fallback_due


class Other(BaseModel):
    m: int = 0


quick = partial(StromaRunner.quick, policy_map=NEVER)


def context(**config: Any) -> ReliabilityContext:
    runner = quick(**config)
    return ReliabilityContext.for_run(runner.config, runner.registry, runner.checkpoint_manager)


def watch(seen: list[str]) -> NodeHooks:
    def noting(event: str) -> Any:
        async def hook(run_id: str, what: Any, *_: Any) -> None:
            seen.append(f"{event[8:]} {what}" if event.startswith("on_node") else event[3:])

        return hook

    names = [field.name for field in dataclasses.fields(NodeHooks) if field.name != "on_budget_warning"]
    return NodeHooks(**{name: noting(name) for name in names})


async def same(state: BaseModel) -> Any:
    return state


async def fail(state: BaseModel) -> Any:
    raise ConnectionError("down")


async def forever(*_: Any) -> Any:
    await asyncio.sleep(30)


# ---------------------------------------------------------------------- money and time


@pytest.mark.core
async def test_what_each_node_used_is_told_by_the_tracker() -> None:
    """summary() has the sums per node id over all attempts of the context, looked at or not, in groups too."""

    async def spend(state: Num) -> Any:
        return state, 3, 4, "gpt-4o-mini"

    ctx = context()
    await execute_step("a", spend, Num(), ctx)
    await execute_step("a", spend, Num(), ctx)
    await execute_step("g", parallel(node("b", spend), node("c", spend)), Num(), ctx)
    summary = ctx.cost_tracker.summary()
    assert {name: used.tokens_used for name, used in summary.items()} == {
        "a": 14, "parallel(b, c)": 0, "b": 7, "c": 7,
    }  # fmt: skip
    assert (summary["a"].model, summary["a"].output_tokens) == ("gpt-4o-mini", 8)
    assert [event.usage.input_tokens for event in ctx.trace] == [3, 3, 0]
    looked_at = ctx.cost_tracker.summary()
    assert {n: (u.tokens_used, u.cost_usd) for n, u in looked_at.items()} == {
        n: (u.tokens_used, u.cost_usd) for n, u in summary.items()
    }


@pytest.mark.core
@pytest.mark.parametrize("figures", [{"cost_usd": -1.0}, {"cost_usd": float("nan")}, {"latency_ms": -1}])
def test_figures_that_cannot_be_counted_are_not_recorded(figures: dict[str, Any]) -> None:
    """CostTracker.record refuses a negative or non-finite cost or time, and records nothing then."""
    tracker = CostTracker()
    with pytest.raises(UsageError, match="'a'"):
        tracker.record(
            NodeUsage(**{"node_id": "a", "tokens_used": 5, "cost_usd": 0.0, "latency_ms": 0, **figures})
        )
    assert (tracker.total_tokens, tracker.summary()) == (0, {})


def test_without_a_cost_limit_no_fallback_is_due() -> None:
    """A fallback goes by a share of max_cost_usd: without one none is due."""
    rules = [FallbackPolicy("a", "b", 0.0)]
    assert fallback_due(CostTracker(), ExecutionBudget(), rules) is None


@pytest.mark.core
async def test_a_child_is_not_tried_again_once_the_latency_is_spent() -> None:
    """While siblings run the time passes for all: a child whose wait ends past the limit is not called again."""
    calls: list[str] = []

    async def failing(state: Num) -> Any:
        calls.append("failing")
        raise ConnectionError

    waits = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=0.15, jitter=False)}
    runner = quick(policy_map=waits, budget=ExecutionBudget(max_latency_ms=50))
    result = await runner.run([parallel(node("slow", forever), node("failing", failing))], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["failing"])
    assert result.failure is not None
    assert result.failure.reason == "budget"


# ---------------------------------------------------------------------- stores in the wrong moment


@pytest.mark.core
@pytest.mark.parametrize("what", [fail, forever], ids=["failed", "cancelled"])
async def test_an_interrupt_while_an_attempt_without_output_is_kept(what: Any) -> None:
    """G9: KeyboardInterrupt while the store keeps a failed or a cancelled attempt comes out after that was told."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    seen: list[str] = []
    runner = quick(store=Journal(lambda session: Between(session, record=interrupt)), hooks=watch(seen))

    async def run() -> bool:
        # Inside the task: one that ends by an interrupt would end the loop as well.
        try:
            await runner.run([node("a", what)], Num())
        except KeyboardInterrupt:
            return True
        return False

    task = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    task.cancel()
    assert await task
    assert seen == ["run_start", "start a", "failure a" if what is fail else "cancelled a", "run_end"]


@pytest.mark.core
async def test_a_failed_attempt_that_cannot_be_kept_ends_the_run() -> None:
    """A store that refuses to keep a failed attempt stops the run as PARTIAL with its error: usage would be lost."""

    def refuse(*_: Any) -> None:
        raise StoreError("full")

    seen: list[str] = []
    store = Journal(lambda session: Between(session, record=refuse))
    result = await quick(store=store, policy_map=ONCE, hooks=watch(seen)).run([node("a", fail)], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert (result.failure.reason, result.failure.message) == ("store", "full")
    assert [event.failure_message for event in result.trace] == ["down"]
    assert seen == ["run_start", "start a", "failure a", "run_end"]


@pytest.mark.core
async def test_a_question_that_is_kept_while_the_run_is_cancelled() -> None:
    """A run that is cancelled while its question is kept keeps it, and is cancelled."""

    async def ask(state: Num) -> Any:
        raise Suspend("well?")

    def slowly(session: Any) -> Any:
        async def later(*arguments: Any) -> None:
            inside.set()
            await asyncio.sleep(0.02)
            session.suspend(*arguments)

        return Between(session, suspend=later)

    inside, store, seen = asyncio.Event(), Journal(slowly), list[str]()
    task = asyncio.create_task(
        quick(store=store, hooks=watch(seen)).run([node("ask", ask)], Num(), run_id="r")
    )
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [waiting.reason for waiting in store.waiting("r")] == ["well?"]
    assert seen == ["run_start", "start ask", "suspended ask", "run_end"]


@pytest.mark.core
async def test_a_child_that_was_restored_is_restored_once() -> None:
    """A group that is tried again after a resume neither calls nor restores again what it has restored."""
    store, seen, left = AsyncInMemoryStore(), list[str](), [2]

    async def flaky(state: Num) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError
        return {"m": 1}

    nodes = [parallel(node("a", same), node("b", flaky, output=Other))]
    assert (await quick(store=store).run(nodes, Num(), run_id="r")).status is RunStatus.PARTIAL
    runner = quick(store=store, node_policies={"parallel(a, b)": ONCE}, hooks=watch(seen))
    result = await runner.run(nodes, Num(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED
    assert seen.count("skipped a") == 1
    assert "start a" not in seen


# ---------------------------------------------------------------------- contexts, hooks, nodes


@pytest.mark.core
async def test_every_way_to_change_the_context_while_a_fallback_is_due() -> None:
    """clear, popitem, values and merging work on a context that names a fallback as on the dict that it is a view of."""
    base: dict[str, Any] = {"a": 1, "b": 2}
    seen: list[Any] = []

    async def func(state: Num, ctx: dict[str, Any]) -> Any:
        seen.append(list(ctx.values()))
        seen.append(ctx | {"c": 3})
        seen.append({"c": 3} | ctx)
        seen.append(ctx.popitem())
        seen.append(dict(base))
        ctx.clear()
        seen.append((dict(base), dict(ctx)))
        return state

    budget, rules = ExecutionBudget(max_cost_usd=0), [FallbackPolicy("big", "small", 0.0)]
    result = await quick(budget=budget, model_fallbacks=rules, context=base).run([node("a", func)], Num())
    result.raise_for_status()
    assert seen == [
        [1, 2, "small"],
        {"a": 1, "b": 2, "c": 3, "_stroma_model": "small"},
        {"a": 1, "b": 2, "c": 3, "_stroma_model": "small"},
        ("b", 2),
        {"a": 1},
        ({}, {"_stroma_model": "small"}),
    ]


async def test_no_hooks_may_be_said_with_none() -> None:
    """hooks=None means none, alone and composed."""
    seen: list[str] = []
    assert (await StromaRunner.quick(hooks=None).run([node("a", same)], Num())).status is RunStatus.COMPLETED
    config = RunConfig(hooks=None)  # type: ignore[arg-type]
    runner = StromaRunner(quick().registry, quick().checkpoint_manager, config)
    assert (await runner.run([node("a", same)], Num())).status is RunStatus.COMPLETED
    composed = watch(seen) | None  # type: ignore[operator]
    await quick(hooks=composed).run([node("a", same)], Num())
    assert seen == ["run_start", "start a", "success a", "run_end"]


async def test_closing_a_run_inside_a_hook() -> None:
    """The coroutine of run() can be closed while a hook waits: nothing is awaited then, and the ends are told."""
    seen: list[str] = []

    @types.coroutine
    def pause() -> Any:
        yield

    async def start(*_: Any) -> None:
        await pause()

    async def noting(*_: Any) -> None:
        seen.append("told")

    for limit in (None, 5000):
        hooks = NodeHooks(on_node_start=start, on_node_cancelled=noting, on_run_end=noting)
        run = quick(hooks=hooks, hook_timeout_ms=limit).run([node("a", same)], Num())
        run.send(None)
        run.close()
    assert seen == ["told"] * 4
    assert current_node() is None


async def test_a_hook_that_cannot_be_interrupted_by_throwing() -> None:
    """What a hook returns may be an awaitable without throw(): its time limit and a cancellation end it as any other."""

    class Bare:
        def __await__(self) -> Any:
            return self

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> None:
            return None

    result = await quick(hooks=NodeHooks(on_node_start=lambda *_: Bare()), hook_timeout_ms=20).run(
        [node("a", same)], Num()
    )
    assert result.status is RunStatus.COMPLETED
    assert [type(error.exception).__name__ for error in result.hook_errors] == ["HookTimeout"]


def test_a_function_that_was_marked_by_hand_is_looked_at_once() -> None:
    """Its signature takes 10 us to read, and each run asks for each of its nodes; marked anew, it is another node."""

    async def first(state: Num) -> Any: ...

    marked: Any = first
    marked._stroma_node_id = "a"
    record = find_node(marked)
    assert find_node(marked) is record
    marked._stroma_node_id = "b"
    assert find_node(marked).node_id == "b"
    assert find_node(marked) is find_node(marked) is not record


async def test_what_cannot_be_a_node() -> None:
    """What cannot be called cannot be a node; a callable without a signature takes the state alone."""
    with pytest.raises(TypeError, match="not callable"):
        node("a", 5)

    class Unsigned:
        __signature__ = "none"

        async def __call__(self, state: Num) -> Any:
            return {"n": 1}

    result = await quick().run([node("a", Unsigned())], Num())
    assert result.final_state == Num(n=1)

    first = node("a", same)
    second = node("b", first)
    assert await second(Num(n=7)) == Num(n=7)
    assert (first._stroma_node_id, second._stroma_node_id) == ("a", "b")


async def test_what_a_step_may_be_given() -> None:
    """The input of a step is a model: anything else is a TypeError that names the step."""
    with pytest.raises(TypeError, match="'a'"):
        await execute_step("a", same, {"n": 1}, context())  # type: ignore[arg-type]


async def test_where_a_node_stands_can_be_printed() -> None:
    """repr(current_node()) names run, node, position and attempt."""
    shown: list[str] = []

    async def func(state: Num) -> Any:
        shown.append(repr(current_node()))
        return state

    await quick().run([node("a", func)], Num(), run_id="r")
    assert shown == ["<node 'a' of run 'r', position 0, attempt 1>"]


async def test_a_violation_may_have_errors_of_any_kind() -> None:
    """The text of a violation that was made by hand shows whatever its errors are."""
    assert str(ContractViolation("a", "input", {}, ["too long", {"msg": "bad"}])) == (
        "Contract violation for 'a' (input): too long; bad"
    )


async def test_a_copy_of_a_config_takes_the_same_generated_id() -> None:
    """Configs that are deep copies of one another share their generated id, and only one run takes it."""
    config = RunConfig()
    twin = copy.deepcopy(config)
    assert [config.take_run_id() == config.run_id, twin.take_run_id() == twin.run_id] == [True, False]


@pytest.mark.parametrize("name", ["", "a b", "1"])
def test_map_over_wants_names_of_fields(name: str) -> None:
    """map_over refuses what can be no field's name, where it is made."""
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over(name, node("a", same), into="out")
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over("items", node("a", same), into=name)


# ---------------------------------------------------------------------- runs


@pytest.mark.core
async def test_run_many_recovers_first() -> None:
    """run_many(recover=True) goes on with what was interrupted before it runs its inputs."""
    store, gate = AsyncInMemoryStore(), asyncio.Event()

    async def wait(state: Num) -> Any:
        await gate.wait()
        return state

    pipeline = Pipeline("p", [node("a", wait)])
    runner = quick(store=store)
    task = asyncio.create_task(runner.run(pipeline, Num(n=1), run_id="old"))
    await asyncio.sleep(0.01)
    await runner.shutdown(drain_seconds=0)
    assert (await task).status is RunStatus.INTERRUPTED
    gate.set()
    outcomes = await quick(store=store).run_many(pipeline, [Num(n=2)], recover=True)
    assert [getattr(outcome, "final_state", None) for outcome in outcomes] == [Num(n=2)]
    old = store.get_run("old")
    assert old is not None
    assert old.status == "RESUMED"


async def test_a_run_whose_input_no_longer_fits_is_not_recovered(tmp_path: Path) -> None:
    """recover() gives the error of a run whose input the pipeline does not take any more, and goes on with the others."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        for name, func in (("r", forever), ("s", forever)):
            runner = quick(store=store)
            given: BaseModel = Num(n=1) if name == "r" else Other(m=1)
            first = node("a", func, type(given))
            task = asyncio.create_task(runner.run(Pipeline("p", [first]), given, run_id=name))
            await asyncio.sleep(0.05)
            await runner.shutdown(drain_seconds=0)
            await task

        class Wanted(BaseModel):
            model_config = ConfigDict(extra="forbid")
            n: int

        outcomes = await quick(store=store).recover(Pipeline("p", [node("a", same, Wanted)]))
    assert isinstance(outcomes["s"], ValueError)
    assert set(outcomes) == {"r", "s"}


async def test_what_a_store_without_a_journal_cannot_do() -> None:
    """fork, recover, signal and cancel say which kind of store they need."""

    class Simple:
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
        def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
        def delete(self, run_id: str) -> None: ...

    runner = quick(store=Simple())
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
async def test_plain_code_that_is_cancelled_while_its_end_is_kept() -> None:
    """``async with ctx:`` whose task is cancelled while the end is noted is cancelled, and the end is noted."""

    def slowly(session: Any) -> Any:
        async def later(*arguments: Any) -> None:
            inside.set()
            await asyncio.sleep(0.02)
            session.end(*arguments)

        return Between(session, end=later)

    inside, store = asyncio.Event(), Journal(slowly)
    ctx = context(store=store, run_id="r")

    async def plain() -> None:
        async with ctx:
            await execute_step("a", same, Num(), ctx)

    task = asyncio.create_task(plain())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run = store.get_run("r")
    assert run is not None
    assert run.status == "COMPLETED"


async def test_plain_code_that_is_closed() -> None:
    """``async with ctx:`` whose code is closed awaits nothing any more."""

    @types.coroutine
    def pause() -> Any:
        yield

    async def plain() -> None:
        async with context() as ctx:
            await execute_step("a", same, Num(), ctx)
            await pause()

    code = plain()
    code.send(None)
    code.close()


# ---------------------------------------------------------------------- schemas


class Loop(BaseModel):
    any: Any = None


async def test_an_output_that_contains_itself_and_a_model() -> None:
    """Output that contains itself is refused by validation, in its words, not by an endless walk."""

    class Holder(BaseModel):
        items: list[Num]

    async def func(state: Num) -> Any:
        items: list[Any] = []
        items.append(items)
        return {"items": items}

    result = await quick().run([node("a", func, output=Holder)], Num())
    assert result.status is RunStatus.FAILED


@dataclasses.dataclass
class Doubling:
    n: int
    twice: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.twice = self.n * 2


@dataclasses.dataclass
class Counting:
    n: int
    seed: dataclasses.InitVar[int] = 0


async def test_dataclasses_that_do_more_than_hold_fields() -> None:
    """A dataclass with code or fields of its own making crosses as a copy, as it is."""

    class Holder(BaseModel):
        doubling: Doubling
        counting: Counting

    made: list[Any] = []

    async def func(state: Num) -> Any:
        made.append(Holder(doubling=Doubling(2), counting=Counting(3)))
        made[0].doubling.n = 7
        return made[0]

    result = await quick().run([node("a", func, output=Holder), node("b", same, Holder, Holder)], Num())
    state = result.final_state
    assert isinstance(state, Holder), result.failure
    assert (state.doubling.n, state.doubling.twice, state.counting.n) == (7, 4, 3)
    assert state.doubling is not made[0].doubling


class Text(str):
    pass


def test_what_only_a_declared_class_restores_is_refused_under_any() -> None:
    """A subclass of a plain type under Any would come back as that type: it is refused by name."""
    with pytest.raises(NotSerialisable, match=r"Loop\.any"):
        schema_of(Loop).encode(Loop(any=Text("x")))
    with pytest.raises(NotSerialisable, match=r"Loop\.any"):
        schema_of(Loop).encode(Loop(any=threading.Lock()))


async def test_a_class_that_validates_in_its_own_way() -> None:
    """A class that overrides model_validate is asked by it at every boundary."""

    class Own(BaseModel):
        n: int = 0

        @classmethod
        def model_validate(cls, obj: Any, **_: Any) -> Any:
            if isinstance(obj, dict) and obj.get("n") == 13:
                raise ValueError("unlucky")
            return super().model_validate(obj)

    async def func(state: Num) -> Any:
        return {"n": state.n}

    nodes = [node("a", func, output=Own)]
    assert (await quick().run(nodes, Num(n=1))).final_state == Own(n=1)
    assert (await quick().run(nodes, Num(n=13))).status is RunStatus.FAILED


def test_an_aliased_class_comes_back_though_it_would_refuse_itself() -> None:
    """What an aliased class with validators of its own has taken comes back from a store as it was."""

    class Sender(BaseModel):
        model_config = ConfigDict(populate_by_name=False)
        n: int = Field(alias="N")

        @model_validator(mode="after")
        def once(self) -> Any:
            self.n += 1
            return self

    schema = schema_of(Sender)
    made = schema.validate({"N": 1})
    assert schema.decode(schema.encode(made)) == made


def test_basemodel_itself_is_no_schema() -> None:
    """BaseModel describes nothing: it is refused, with what to use."""
    with pytest.raises(TypeError, match="subclass with fields"):
        schema_of(BaseModel)


async def test_an_output_of_another_kind_is_a_changed_pipeline() -> None:
    """PipelineChanged says so where a root model stands for a record, or the other way round."""
    from pydantic import RootModel

    store = AsyncInMemoryStore()

    async def one(state: Num) -> Any:
        return [1]

    runner = quick(store=store)
    nodes = [node("a", one, output=RootModel[list[int]]), node("b", fail, RootModel[list[int]])]
    await runner.run(nodes, Num(), run_id="r")
    changed = [node("a", same), node("b", same)]
    with pytest.raises(StoreError, match="another kind of value"):
        await runner.run(changed, Num(), run_id="r", resume=True)
