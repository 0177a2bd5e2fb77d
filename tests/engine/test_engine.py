"""The engine, rule by rule: contracts, failures, retries, timeouts, budgets, values, ids, runs."""

import asyncio
import contextvars
import functools
import inspect
import math
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel, computed_field, field_serializer, model_validator
from tests.kit import Item as Base
from tests.kit import Num, Text, computing, context_of, forever, node, noting, passing, returning

from stroma import (
    KNOWN_MODELS,
    BudgetExceeded,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    FallbackPolicy,
    InMemoryStore,
    NodeContext,
    NodeContract,
    NodeExecution,
    NodeHooks,
    Pipeline,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StromaRunner,
    StromaStep,
    UsageError,
    current_node,
    current_node_or_none,
    execute_step,
    stroma_node,
)
from stroma.engine.execution import RunningNode

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


def fast(recoverable: int = 3, ambiguous: int = 1) -> dict[FailureClass, FailurePolicy]:
    return {
        R: FailurePolicy(max_retries=recoverable, backoff_seconds=0),
        A: FailurePolicy(max_retries=ambiguous, backoff_seconds=0),
    }


def quick(**config: Any) -> StromaRunner:
    config.setdefault("policy_map", fast())
    return StromaRunner.quick(**config)


class Log:
    """A set of all node hooks that notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        names = ("on_node_start", "on_node_success", "on_node_failure", "on_node_cancelled", "on_run_end")
        self.hooks = NodeHooks(**{name: self._note(name) for name in names})

    def _note(self, name: str) -> Any:
        async def hook(run_id: str, *arguments: Any) -> None:
            self.events.append((name.rpartition("_")[2], *arguments))

        return hook


def raising(*errors: BaseException) -> tuple[Any, list[int]]:
    """A node that raises one error after another, then returns {"n": 1}; and the list of its calls."""
    left = list(errors)
    calls: list[int] = []

    async def func(state: Num) -> dict[str, Any]:
        calls.append(len(calls) + 1)
        if left:
            raise left.pop(0)
        return {"n": 1}

    return func, calls


class Invoice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    net: int
    tax: int

    @computed_field
    def gross(self) -> int:
        return self.net + self.tax


class WithGross(BaseModel):
    net: int
    gross: int


async def test_computed_fields_do_not_break_a_closed_contract() -> None:
    """A computed field is no field: it passes a boundary whose model forbids extra fields."""
    same = passing()
    nodes = [node("a", same, Invoice, Invoice), node("b", same, Invoice, Invoice)]
    result = await quick().run(nodes, Invoice(net=1, tax=2))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert next(iter(result.trace)).output_state == {"net": 1, "tax": 2}


async def test_a_computed_field_reaches_a_node_that_has_a_field_of_its_name() -> None:
    """A computed field of one state fills the field of its name in the next."""
    result = await quick().run([node("take", passing(), WithGross, WithGross)], Invoice(net=1, tax=2))
    assert result.final_state == WithGross(net=1, gross=3)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int


async def test_extra_fields_are_kept_where_they_are_allowed() -> None:
    """Extra fields of a model that allows them go on to the next node, and a default model drops them."""
    seen: list[BaseModel] = []

    add = computing(lambda state: {"n": state.n, "more": [1, {"deep": "x"}]})

    async def take(state: Any) -> Any:
        seen.append(state)
        return state

    nodes = [node("add", add, Open, Open), node("open", take, Open, Open), node("num", take, Num, Num)]
    assert (await quick().run(nodes, Open(n=1))).status is RunStatus.COMPLETED
    assert seen[0] == Open(n=1, more=[1, {"deep": "x"}])
    assert seen[1] == Num(n=1)


async def test_extra_fields_are_refused_where_they_are_forbidden() -> None:
    """Extra fields at a boundary that forbids them stop the run there, and the next node is not called."""
    called: list[Any] = []

    async def closed(state: Closed) -> dict[str, Any]:
        called.append(state)
        return {"n": 1}

    source = node("add", returning({"n": 1, "more": 2}), Open, Open)
    result = await quick().run([source, node("closed", closed, Closed, Num)], Open(n=1))
    assert result.status is RunStatus.FAILED
    assert called == []
    assert isinstance(result.failure.exception, ContractViolation)
    assert result.failure.exception.direction == "input"
    assert result.final_state == Open(n=1, more=2)


class Words(RootModel[list[str]]):
    pass


async def test_root_models_cross_boundaries() -> None:
    """A root model is an input and an output like any other; its state dict is {"root": value}."""
    split = computing(lambda state: Words(state.text.split()))

    async def add(state: Words) -> Any:
        state.root.append("!")
        return state

    log = Log()
    nodes = [node("split", split, Text, Words), node("add", add, Words, Words)]
    result = await quick(hooks=log.hooks).run(nodes, Text(text="a b"))
    assert result.final_state == Words(["a", "b", "!"])
    assert [e.input_state for e in result.trace] == [{"text": "a b"}, {"root": ["a", "b"]}]
    assert log.events[2] == ("start", "add", {"root": ["a", "b"]})


class Lossy(BaseModel):
    when: datetime
    secret: str

    @field_serializer("when")
    def _short(self, value: datetime) -> str:
        return "sometime"

    @field_serializer("secret")
    def _hide(self, value: str) -> str:
        return "***"


async def test_serializers_do_not_change_what_the_next_node_gets() -> None:
    """Values cross a boundary losslessly: a lossy field_serializer has no say in it."""
    seen: list[Lossy] = []
    value = Lossy(when=datetime(2026, 1, 2, tzinfo=UTC), secret="s3cret")

    async def take(state: Lossy) -> Lossy:
        seen.append(state)
        return state

    await quick().run([node("a", take, Lossy, Lossy), node("b", take, Lossy, Lossy)], value)
    assert [(s.when, s.secret) for s in seen] == [(value.when, "s3cret")] * 2


class Upper(BaseModel):
    text: str

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value


async def test_model_validators_run_on_returned_dicts() -> None:
    """Validators in mode "before" see what the node returned, whatever it is."""
    result = await quick().run([node("a", returning("plain"), Num, Upper)], Num())
    assert result.final_state == Upper(text="plain")


# ---------------------------------------------------------------------- contracts


class Wider(Base):
    more: str = "x"


async def test_the_output_is_of_the_promised_class() -> None:
    """A returned instance of a subclass becomes one of the promised class: nothing passes unvalidated."""
    func = computing(lambda _: Wider(n=1))
    result = await quick().run([node("a", func, Num, Base)], Num())
    assert type(result.final_state) is Base


# ---------------------------------------------------------------------- what a node may be and return


@pytest.mark.core
@pytest.mark.parametrize(
    ("returned", "tokens", "produced", "model"),
    [
        ({"n": 1}, 0, 0, None),
        (Num(n=1), 0, 0, None),
        (({"n": 1}, 7), 7, 0, None),
        ((Num(n=1), 7), 7, 0, None),
        (({"n": 1}, 7, "gpt-4o"), 7, 0, "gpt-4o"),
        (({"n": 1}, 7, 3, "gpt-4o"), 10, 3, "gpt-4o"),
        (({"n": 1}, 0, 0, "gpt-4o"), 0, 0, "gpt-4o"),
        (({"n": 1}, 7, None), 7, 0, None),
    ],
)
async def test_every_shape_of_return(returned: Any, tokens: int, produced: int, model: str | None) -> None:
    """A node returns a dict, a model, (output, tokens), (output, in, model) or (output, in, out, model)."""
    log = Log()
    result = await quick(hooks=log.hooks).run([node("a", returning(returned))], Num())
    (event,) = result.trace
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state == Num(n=1)
    assert result.total_tokens == tokens
    assert (event.usage.tokens, event.usage.output_tokens, event.usage.model) == (tokens, produced, model)
    assert log.events[1] == ("success", "a", {"n": 1}, tokens)
    if model:
        dearer = (tokens - produced) * KNOWN_MODELS[model][0] + produced * KNOWN_MODELS[model][1]
        assert result.total_cost_usd == pytest.approx(dearer / 1e6)


class Callee:
    async def __call__(self, state: Num) -> dict[str, Any]:
        return {"n": state.n + 1}

    async def method(self, state: Num, ctx: dict[str, Any]) -> dict[str, Any]:
        return {"n": state.n + ctx["by"]}

    @staticmethod
    async def static(state: Num) -> dict[str, Any]:
        return {"n": state.n + 1}


async def _adding(by: int, state: Num) -> dict[str, Any]:
    return {"n": state.n + by}


@pytest.mark.parametrize(
    "func",
    [
        Callee(),
        Callee().method,
        Callee.static,
        functools.partial(_adding, 1),
        lambda state: _adding(1, state),
        lambda state: {"n": state.n + 1},
    ],
    ids=["object", "method", "static", "partial", "lambda-coroutine", "lambda"],
)
async def test_every_kind_of_callable(func: Any) -> None:
    """Functions, methods, partials, callable objects and lambdas are nodes, async or not."""
    result = await quick(context={"by": 1}).run([node("a", func)], Num(n=1))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state == Num(n=2)


@pytest.mark.core
async def test_the_context_is_the_users_own_object() -> None:
    """Two positional parameters mean the run's context dict, the user's own; later nodes see writes."""
    context: dict[str, Any] = {}
    got: list[Any] = []

    async def two(state: Num, ctx: dict[str, Any]) -> Any:
        got.append(ctx)
        ctx["seen"] = 1
        return state

    async def default(state: Num, ctx: dict[str, Any] | None = None) -> Any:
        got.append(ctx)
        return state

    async def keyword(state: Num, *, ctx: Any = "untouched", **more: Any) -> Any:
        got.append((ctx, more))
        return state

    await quick(context=context).run([node("a", two), node("b", default), node("c", keyword)], Num())
    assert got[0] is context
    assert got[1] is context
    assert got[2] == ("untouched", {})
    assert context == {"seen": 1}


tone: contextvars.ContextVar[str] = contextvars.ContextVar("tone")


@pytest.mark.core
async def test_sync_nodes_run_in_daemon_threads_with_the_context() -> None:
    """A plain def node runs in a daemon thread with a copied context: variables and current_node()."""
    seen: list[Any] = []

    def func(state: Num) -> dict[str, Any]:
        thread = threading.current_thread()
        run = current_node_or_none()
        seen.append((thread.daemon, thread is threading.main_thread(), tone.get(), run and run.node_id))
        tone.set("changed")
        return {"n": 1}

    token = tone.set("warm")
    try:
        assert (await quick().run([node("a", func)], Num())).status is RunStatus.COMPLETED
        assert seen == [(True, False, "warm", "a")]
        assert tone.get() == "warm"
    finally:
        tone.reset(token)


async def test_not_a_node() -> None:
    """A function that is no node is a TypeError that says how to decorate it, before anything runs."""
    func, calls = raising()

    bare = passing()
    with pytest.raises(
        TypeError, match=r"is not a stroma node; decorate it with @stroma_node or @runner\.node"
    ):
        await quick().run([node("a", func), bare], Num())
    with pytest.raises(TypeError, match="is not a stroma node"):
        Pipeline("p", [bare])
    assert calls == []


async def test_the_initial_state_must_be_a_model() -> None:
    """An initial state that is no pydantic model is a TypeError."""
    with pytest.raises(TypeError, match="pydantic model"):
        await quick().run([], {"n": 1})
    with pytest.raises(TypeError, match=r"^the initial state must be a pydantic model, got dict; pass Num\("):
        await quick().run([node("a", raising()[0])], {"n": 1})


# ---------------------------------------------------------------------- retries


@pytest.mark.core
@pytest.mark.parametrize("n", [0, 1, 4])
async def test_duplicate_ids_count_from_zero(n: int) -> None:
    """The same id at two positions has its own count of retries at each."""
    func, calls = raising(*[TimeoutError()] * n)
    other, others = raising(*[TimeoutError()] * n)
    twice = [node("same", func), node("same", other)]
    result = await quick(policy_map=fast(recoverable=n)).run(twice, Num())
    assert result.status is RunStatus.COMPLETED
    assert (len(calls), len(others)) == (n + 1, n + 1)
    assert [(e.position, e.attempt) for e in result.trace] == [
        (position, attempt + 1) for position in (0, 1) for attempt in range(n + 1)
    ]
    assert len(result.trace.events_for("same")) == 2 * (n + 1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_client_of_another_event_loop_is_named(wrapped: bool) -> None:
    """A failure whose cause is a lock or client of another event loop has the fix in its message."""
    lock, loops = asyncio.Lock(), set[Any]()

    async def func(state: Num) -> Any:
        loops.add(asyncio.get_running_loop())
        async with lock:
            waiter = asyncio.create_task(lock.acquire())
            await asyncio.sleep(0)
            if len(loops) == 1:  # The lock belongs to this loop from now on.
                waiter.cancel()
                return state
            try:
                return await waiter
            except RuntimeError as error:
                if wrapped:
                    raise ConnectionError("Connection error.") from error
                raise

    runner = quick(policy_map=fast(recoverable=1, ambiguous=1))
    assert runner.run_sync([node("ask", func)], Num()).status is RunStatus.COMPLETED
    failure = runner.run_sync([node("ask", func)], Num()).failure
    assert "create it in the node, or call asyncio.run() once around all runs" in failure.message


# ---------------------------------------------------------------------- timeouts


def test_an_abandoned_thread_does_not_hold_up_the_loop() -> None:
    """The end of the event loop does not wait for the thread of a sync node that timed out."""
    release = threading.Event()

    def func(state: Num) -> Any:
        release.wait(60)
        return {"n": 1}

    runner = quick(node_timeouts={"slow": 20}, policy_map=fast(recoverable=0))
    try:
        result = runner.run_sync([node("slow", func)], Num())
        assert not release.is_set()
        assert result.status is RunStatus.PARTIAL
        assert any(t.name.startswith("stroma-") and t.is_alive() for t in threading.enumerate())
    finally:
        release.set()


class SlowStore(InMemoryStore):
    """A sync store of the simple protocol whose calls give awaitables that take their time."""

    open_run = None

    def save(self, run_id: str, node_id: str, state: BaseModel) -> Any:
        async def later() -> None:
            await asyncio.sleep(0.06)

        return later()


async def test_timeouts_do_not_bound_hooks_nor_the_store() -> None:
    """Neither a slow hook nor a slow store counts against a node's timeout, nor in its duration."""

    async def slow(*_: Any) -> None:
        await asyncio.sleep(0.06)

    hooks = NodeHooks(on_node_start=slow, on_node_success=slow)
    result = await quick(node_timeouts={"a": 40}, hooks=hooks, store=_Simple(SlowStore())).run(
        [node("a", passing())], Num()
    )
    assert result.status is RunStatus.COMPLETED, result.failure
    assert next(iter(result.trace)).duration_ms < 40


class _Simple:
    """Only the simple protocol of a store."""

    def __init__(self, store: Any) -> None:
        self.save, self.load, self.delete = store.save, store.load, store.delete


def test_a_timeout_must_be_positive() -> None:
    """A node timeout of zero or less is a ValueError that names the node."""
    for bad in (0, -1):
        with pytest.raises(ValueError, match="slow"):
            RunConfig(node_timeouts={"slow": bad})


# ---------------------------------------------------------------------- budgets


def spending(*returns: Any) -> tuple[Any, list[Any]]:
    """A node's function that returns one value after another, and the list of its calls."""
    left = list(returns)
    calls: list[Any] = []

    async def func(state: Num) -> Any:
        calls.append(state.n)
        return left.pop(0) if len(left) > 1 else left[0]

    return func, calls


@pytest.mark.core
async def test_a_classifier_may_call_the_budget_terminal() -> None:
    """BudgetExceeded is RECOVERABLE unless a classifier says otherwise: then FAILED, with its output kept."""

    def terminal(exc: Exception, context: NodeContext) -> FailureClass | None:
        return T if isinstance(exc, BudgetExceeded) else None

    func, _ = spending(({"n": 7}, 101))
    budget = ExecutionBudget(max_tokens_total=100)
    result = await quick(budget=budget, classifiers=[terminal]).run([node("a", func)], Num())
    assert (result.status, result.final_state) == (RunStatus.FAILED, Num(n=7))
    assert [e.failure for e in result.trace] == [T]


@pytest.mark.core
@pytest.mark.parametrize(
    "usage",
    [
        (-1,),
        (math.nan,),
        (math.inf,),
        (1.5,),
        ("12",),
        (True,),
        (None,),
        (-5, "gpt-4o"),
        (5, -1, "gpt-4o"),
        (5, math.nan, "gpt-4o"),
        (5, 6),
        (5, 6, 7),
    ],
    ids=repr,
)
async def test_bad_usage_is_terminal_and_the_output_kept(usage: tuple[Any, ...]) -> None:
    """Usage that cannot be counted is a TERMINAL failure naming the node; the output is kept."""
    func, calls = spending(({"n": 7}, *usage))
    after, others = spending({"n": 8})
    store = InMemoryStore()
    result = await quick(store=store, run_id="r").run([node("a", func), node("b", after)], Num())
    (event,) = result.trace
    assert result.status is RunStatus.FAILED
    assert isinstance(result.failure.exception, UsageError)
    assert result.failure.failure_class is T
    assert "'a'" in result.failure.message
    assert (event.output_state, event.failure) == ({"n": 7}, T)
    assert result.final_state == Num(n=7)
    assert store.load("r", "a") == Num(n=7)
    assert (len(calls), others) == (1, [])
    assert result.total_tokens >= 0
    assert math.isfinite(result.total_cost_usd)


@pytest.mark.core
async def test_an_unknown_model_counts_as_nothing_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A model nobody knows is priced 0 with one warning and listed once in result.unpriced_models."""
    func, _ = spending(({"n": 1}, 10, "no-such-model-of-ours"))
    result = await quick().run([node("a", func), node("b", func)], Num())
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.COMPLETED, 20, 0.0)
    assert result.unpriced_models == ["no-such-model-of-ours"]
    assert sum("no-such-model-of-ours" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.core
async def test_known_models_win_over_the_price_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node reports is what it is priced at; KNOWN_MODELS overlays the price data."""
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o", (1000.0, 2000.0))
    monkeypatch.setitem(KNOWN_MODELS, "ours", (1.0, 1.0))
    func, _ = spending(({"n": 1}, 1000, 1000, "gpt-4o"), ({"n": 1}, 1_000_000, 0, "ours"))
    result = await quick().run([node("a", func), node("b", func)], Num())
    assert result.total_cost_usd == pytest.approx(3.0 + 1.0)
    assert result.unpriced_models == []


# ---------------------------------------------------------------------- the fallback signal


def fallback_runner(context: dict[str, Any], *rules: FallbackPolicy) -> StromaRunner:
    fallbacks = list(rules) or [FallbackPolicy("gpt-4o", "gpt-4o-mini", 0.5)]
    return quick(budget=ExecutionBudget(max_cost_usd=1.0), context=context, model_fallbacks=fallbacks)


@pytest.mark.core
async def test_the_fallback_signal_appears_at_its_share() -> None:
    """Below the share there is no key; at it ctx["_stroma_model"] and current_node().model name it."""
    seen: list[Any] = []
    context: dict[str, Any] = {"kept": 1}

    async def func(state: Num, ctx: dict[str, Any]) -> Any:
        seen.append(
            (
                ctx is context,
                "_stroma_model" in ctx,
                ctx.get("_stroma_model"),
                current_node().model,
                dict(ctx),
            )
        )
        ctx[f"written{state.n}"] = state.n
        return {"n": state.n + 1}, 100_000, "gpt-4o"  # 0.25 USD

    assert (await fallback_runner(context).run([node("a", func)] * 4, Num())).status is RunStatus.COMPLETED
    assert [s[:4] for s in seen] == [
        (True, False, None, None),
        (True, False, None, None),
        (False, True, "gpt-4o-mini", "gpt-4o-mini"),
        (False, True, "gpt-4o-mini", "gpt-4o-mini"),
    ]
    noted = {"kept": 1, "written0": 0, "written1": 1, "written2": 2, "_stroma_model": "gpt-4o-mini"}
    assert seen[3][4] == noted
    assert context == {"kept": 1, "written0": 0, "written1": 1, "written2": 2, "written3": 3}


async def test_sync_nodes_get_the_signal_and_other_runs_do_not() -> None:
    """The signal of one run is not seen by another that shares its context dict."""
    context: dict[str, Any] = {}
    seen: list[Any] = []

    def sync(state: Num, ctx: dict[str, Any]) -> Any:
        seen.append(ctx.get("_stroma_model"))
        return state, 200_000, "gpt-4o"

    runner = fallback_runner(context)
    await runner.run([node("a", sync)] * 2, Num())
    await runner.run([node("a", sync)], Num())
    assert seen == [None, "gpt-4o-mini", None]
    assert context == {}


# ---------------------------------------------------------------------- ids

BAD_IDS = ["", "a\0b", "\0", "\ud800", "a\udfff"]


@pytest.mark.core
@pytest.mark.parametrize("text", BAD_IDS, ids=ascii)
async def test_text_that_no_store_can_keep_is_refused(text: str) -> None:
    """Empty ids, NUL and lone surrogates are a ValueError, wherever the id is given."""
    func, calls = raising()
    with pytest.raises(ValueError, match="run id"):
        RunConfig(run_id=text)
    with pytest.raises(ValueError, match="run id"):
        await quick().run([node("a", func)], Num(), run_id=text)
    with pytest.raises(ValueError, match="node id"):
        node(text, func)
    with pytest.raises(ValueError, match="node id"):
        quick().node(text, input=Num, output=Num)(func)
    runner = quick()
    ctx = context_of(runner)
    with pytest.raises(ValueError, match="node id"):
        await execute_step(text, func, Num(), ctx)
    assert calls == []


@pytest.mark.core
async def test_generated_ids_are_fresh_for_each_run() -> None:
    """A generated id is fresh for each run; the first run takes the one in the config."""
    func, _ = raising()
    runner = quick()
    ids = [(await runner.run([node("a", func)], Num())).run_id for _ in range(3)]
    assert ids[0] == runner.config.run_id
    assert len(set(ids)) == 3
    both = await asyncio.gather(*[runner.run([node("a", func)], Num()) for _ in range(20)])
    assert len({result.run_id for result in both} | set(ids)) == 23


@pytest.mark.core
async def test_a_given_id_is_used_on_every_run() -> None:
    """A run id the user gave is used on every run of that config; run(run_id=) overrides it once."""
    func, _ = raising()
    runner = quick(run_id="mine")
    nodes = [node("a", func)]
    assert [(await runner.run(nodes, Num())).run_id for _ in range(2)] == ["mine", "mine"]
    assert (await runner.run(nodes, Num(), run_id="other")).run_id == "other"
    assert (await runner.run(nodes, Num())).run_id == "mine"
    built = runner.with_budget(tokens=5).with_context({})
    assert (await built.run(nodes, Num())).run_id == "mine"


# ---------------------------------------------------------------------- sequences and pipelines


async def test_an_empty_sequence_completes() -> None:
    """An empty sequence is COMPLETED with its initial state and an empty trace."""
    result = await quick().run([], Num(n=4))
    assert (result.status, result.final_state, len(result.trace)) == (RunStatus.COMPLETED, Num(n=4), 0)


async def test_any_sequence_will_do() -> None:
    """Tuples, generators and pipelines are sequences of nodes like a list."""
    func, calls = raising()
    marked = node("a", func)
    for sequence in ((marked,), iter([marked]), (m for m in [marked]), Pipeline("p", [marked])):
        assert (await quick().run(sequence, Num())).status is RunStatus.COMPLETED
    assert len(calls) == 4


async def test_the_pipelines_name_and_config() -> None:
    """A Pipeline names the run for hooks; its config counts where the runner was given no such setting."""
    names: list[str] = []

    func, _ = raising()
    hooks = NodeHooks(on_run_start=noting(names, lambda run_id, pipeline, state: f"{pipeline} {run_id}"))
    pipeline = Pipeline("billing", [node("a", func)], config=RunConfig(hooks=hooks, run_id="p"))
    await StromaRunner.quick().run(pipeline, Num())
    assert names == ["billing p"]
    await StromaRunner.quick(hooks=hooks, run_id="own").run(pipeline, Num())
    assert names[1:] == ["billing own"]
    await StromaRunner.quick(hooks=hooks, run_id="own").run(pipeline.nodes, Num())
    await StromaRunner.quick(hooks=hooks, run_id="own", pipeline="named").run(pipeline.nodes, Num())
    assert names[2:] == ["pipeline own", "named own"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"context": {"a": 1}}, {"tags": ("x",)}, {"inline_wait_seconds": 5}, {"hook_errors": "raise"}],
)
async def test_a_setting_of_the_runner_leaves_the_limits_of_the_pipeline(settings: dict[str, Any]) -> None:
    """A runner with other settings applies a pipeline's budget; its own budget wins."""
    func, calls = raising()

    async def costly(state: Num) -> tuple[dict[str, int], int]:
        return await func(state), 100

    nodes = [node(name, costly) for name in "abc"]
    pipeline = Pipeline("p", nodes, config=RunConfig(budget=ExecutionBudget(max_tokens_total=50)))
    runner = StromaRunner.quick(**settings)
    assert (await runner.run(pipeline, Num())).status is RunStatus.PARTIAL
    assert len(calls) == 1
    runner.with_budget(tokens=250)
    assert (await runner.run(pipeline, Num())).total_tokens == 300


async def test_builders_do_not_touch_a_shared_config() -> None:
    """A builder returns its runner and replaces the config whole: other runners of it are unchanged."""
    config = RunConfig(run_id="shared")
    first, second = (StromaRunner(ContractRegistry(), quick().checkpoint_manager, config) for _ in range(2))
    assert first.with_budget(tokens=1).with_model_fallback("a", to="b") is first
    assert second.config.budget.max_tokens_total is None
    assert second.config.model_fallbacks == []
    assert first.config.budget.max_tokens_total == 1
    assert first.config.run_id == "shared"


# ---------------------------------------------------------------------- steps outside pipelines


def step_context(**config: Any) -> ReliabilityContext:
    runner = quick(**config)
    return context_of(runner)


async def test_execute_step_without_a_contract_refuses_nothing() -> None:
    """Without a contract output that fits the input's class becomes it; other output is kept as returned."""
    ctx = step_context()
    fits, _ = spending({"n": "5"})
    odd, _ = spending(["anything"])
    nothing, _ = spending(None)
    assert (await execute_step("a", fits, Num(), ctx)).final_state == Num(n=5)
    entry = (await execute_step("b", odd, Num(), ctx)).final_state
    assert entry == ["anything"]
    result = await execute_step("c", nothing, Num(), ctx)
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, None)

    misfit = await execute_step("d", _give({"text": [1]}), Text(text=""), ctx)
    assert (misfit.status, misfit.final_state) == (RunStatus.COMPLETED, {"text": [1]})


def _give(output: Any) -> Any:
    return returning(output)


@pytest.mark.core
async def test_explicit_contract_then_registry_then_marker() -> None:
    """In execute_step an explicit contract= wins, then the registry, then the marker; a marker suffices."""

    class One(BaseModel):
        one: int = 1

    class Two(BaseModel):
        two: int = 2

    class Three(BaseModel):
        three: int = 3

    def contract(promised: type[BaseModel]) -> NodeContract[Any, Any]:
        return NodeContract(node_id="s", input_schema=Num, output_schema=promised)

    marked = stroma_node("s", contract(One))(returning({}))
    ctx = step_context()
    assert (await execute_step("s", marked, Num(), ctx)).final_state == One()
    ctx.registry.register(contract(Two))
    assert (await execute_step("s", marked, Num(), ctx)).final_state == Two()
    assert (await execute_step("s", marked, Num(), ctx, contract=contract(Three))).final_state == Three()
    assert len(ctx.trace) == 3


async def test_execute_step_results_are_of_the_whole_context() -> None:
    """The result of a step has the totals and the trace of the whole context so far."""
    ctx = step_context()
    func, _ = spending(({"n": 1}, 10))
    first = await execute_step("a", func, Num(), ctx)
    assert (first.total_tokens, len(first.trace)) == (10, 1)
    second = await execute_step("a", func, Num(), ctx)
    assert (second.total_tokens, len(second.trace)) == (20, 2)
    assert [event.position for event in second.trace] == [0, 1]


async def test_repeated_steps_start_from_zero() -> None:
    """Repeated execute_step calls of one id each have their own retries."""
    ctx = step_context(policy_map=fast(ambiguous=1))
    for _ in range(3):
        func, calls = raising(ValueError())
        assert (await execute_step("a", func, Num(), ctx)).status is RunStatus.COMPLETED
        assert calls == [1, 2]


async def test_a_step_that_fails_is_a_result() -> None:
    """A step that fails for good gives a result with its failure; bad input is FAILED without a call."""
    func, calls = raising(*[ValueError("x")] * 9)
    ctx = step_context(policy_map=fast(ambiguous=0))
    result = await execute_step("a", func, Num(n=3), ctx)
    assert (result.status, result.final_state) == (RunStatus.PARTIAL, Num(n=3))
    contract: NodeContract[Any, Any] = NodeContract(node_id="b", input_schema=Text, output_schema=Num)
    result = await execute_step("b", func, Num(), ctx, contract=contract)
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)


@pytest.mark.core
async def test_a_spent_budget_stops_steps() -> None:
    """Once the context's budget is crossed the next step is not called: PARTIAL, without a trace event."""
    ctx = step_context(budget=ExecutionBudget(max_tokens_total=5))
    func, calls = spending(({"n": 1}, 10))
    first = await execute_step("a", func, Num(), ctx)
    second = await execute_step("b", func, Num(), ctx)
    assert (first.status, second.status, len(calls)) == (RunStatus.PARTIAL, RunStatus.PARTIAL, 1)
    assert isinstance(second.failure.exception, BudgetExceeded)


async def test_stroma_step_decorates_and_wraps() -> None:
    """StromaStep registers the contract, returns an ExecutionResult, and its wrap carries the markers."""
    ctx = step_context()
    step = StromaStep(ctx)

    @step("double", input=Num, output=Num)
    async def double(state: Num) -> dict[str, Any]:
        """Twice."""
        return {"n": state.n * 2}

    result = await double(Num(n=4))
    assert isinstance(result, ExecutionResult)
    assert result.final_state == Num(n=8)
    assert ctx.registry.get("double").output_schema is Num
    assert double.__doc__ == "Twice."
    assert double._stroma_node_id == "double"
    assert (await double(Num.model_construct(n="x"))).status is RunStatus.FAILED

    bad = returning({"n": "x"})
    contract: NodeContract[Any, Any] = NodeContract(node_id="bad", input_schema=Num, output_schema=Num)
    wrapped = step.wrap("bad", bad, contract=contract)
    assert (await wrapped(Num())).status is RunStatus.FAILED
    assert wrapped._stroma_contract is contract
    loose = step.wrap("loose", bad)
    assert (await loose(Num())).final_state == {"n": "x"}


async def test_steps_get_the_context_and_timeouts() -> None:
    """A step takes (state, ctx) like a node, and node_timeouts bound it."""
    ctx = step_context(context={"by": 3}, node_timeouts={"slow": 20}, policy_map=fast(recoverable=0))

    async def add(state: Num, context: dict[str, Any]) -> Any:
        return {"n": state.n + context["by"]}

    assert (await execute_step("add", add, Num(n=1), ctx)).final_state == Num(n=4)
    result = await execute_step("slow", forever, Num(), ctx)
    assert "'slow'" in result.failure.message


@pytest.mark.core
async def test_current_node_knows_where_it_is() -> None:
    """current_node() has the run, pipeline, node, position, attempt, kind, key, budget and last failure."""
    seen: list[dict[str, Any]] = []

    async def func(state: Num) -> Any:
        run = current_node()
        run.report_usage(input_tokens=1)
        seen.append(
            {
                "ids": (run.run_id, run.pipeline, run.node_id, run.position, run.attempt, run.kind),
                "key": run.idempotency_key,
                "left": run.remaining_budget.tokens,
                "last": run.last_failure and type(run.last_failure.exception),
                "cost": run.remaining_budget.cost_usd,
            }
        )
        if len(seen) == 1:
            raise TimeoutError
        return {"n": 1}, 9

    assert current_node_or_none() is None
    with pytest.raises(
        RuntimeError, match="no node is running here; call current_node\\(\\) in a node's function"
    ):
        current_node()
    runner = quick(run_id="r", budget=ExecutionBudget(max_tokens_total=100))
    await runner.run(Pipeline("pipe", [node("a", func), node("b", func)]), Num())
    assert current_node_or_none() is None
    assert [s["ids"] for s in seen] == [
        ("r", "pipe", "a", 0, 1, "node"),
        ("r", "pipe", "a", 0, 2, "node"),
        ("r", "pipe", "b", 1, 1, "node"),
    ]
    assert seen[0]["key"] == seen[1]["key"] != seen[2]["key"]
    assert [s["left"] for s in seen] == [100, 99, 89]
    assert [s["last"] for s in seen] == [None, TimeoutError, None]
    assert [s["cost"] for s in seen] == [None] * 3


# ---------------------------------------------------------------------- current_node


@pytest.mark.core
async def test_a_decorator_on_top_of_a_node_is_called() -> None:
    """A user's decorator around a node runs, also around one that was wrapped to carry its marks."""
    order: list[str] = []

    def logged(func: Any) -> Any:
        @functools.wraps(func)
        async def wrapper(*value: Any) -> Any:
            order.append("before")
            return await func(*value)

        return wrapper

    async def body(state: Num) -> dict[str, Any]:
        order.append("body")
        return {"n": state.n + 1}

    first = logged(stroma_node("a", input=Num, output=Num)(body))
    second = logged(stroma_node("b", input=Num, output=Num)(body))  # Serves as "a" already, so it is wrapped.
    result = await StromaRunner.quick().run([first, second, first], Num(n=0))
    assert result.final_state == Num(n=3), result.failure
    assert order == ["before", "body"] * 3


#: The names of the page of NodeExecution: what completion shows behind ``current_node().``.
SHOWN = (
    "at_end attempt branch ctx duration_ms emit function_ms idempotency_key kind last_failure model "
    "node_id notes outcome pipeline position question reason redelivered remaining_budget report_usage "
    "run_id signal started_ns usage wait_for"
)


def test_the_class_that_users_see_has_the_documented_names_only() -> None:
    """Completion after ``current_node().`` shows the documented names; the engine's own are a subclass's."""
    names = {name for name in (*dir(NodeExecution), *NodeExecution.__annotations__) if name[0] != "_"}
    assert sorted(names) == SHOWN.split()
    for function in (current_node, current_node_or_none):
        assert "RunningNode" not in str(inspect.signature(function).return_annotation)
    assert {"rows", "reported", "is_final"} <= set(dir(RunningNode)) - names
