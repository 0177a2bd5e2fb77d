"""Hooks: what each event means, how sets compose, change nothing (G8), and pair up (G9)."""

import asyncio
import contextvars
import functools
import gc
import logging
import threading
import types
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import NEVER, ONCE, SimpleStore, Text, cancel_after, computing, failing_with, returning
from tests.kit import Item as Number

from stroma import (
    KNOWN_MODELS,
    AsyncInMemoryStore,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    Fenced,
    HookError,
    NodeHooks,
    RunStatus,
    StromaRunner,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
    stroma_node,
)
from stroma import NodeContract as Contract

START, SUCCESS, FAILURE = "on_node_start", "on_node_success", "on_node_failure"
CANCELLED, RETRY, SKIPPED = "on_node_cancelled", "on_node_retry", "on_node_skipped"
RUN_START, RUN_END, WARNING = "on_run_start", "on_run_end", "on_budget_warning"
ALL = (RUN_START, START, SUCCESS, FAILURE, RETRY, SKIPPED, CANCELLED, WARNING, RUN_END)
ENDS = (SUCCESS, FAILURE, CANCELLED)


class State(BaseModel):
    value: int = 0
    items: list[int] = []


class Recorder:
    """A set of hooks that notes every call, with where it happened."""

    def __init__(self, label: str = "", log: list[Any] | None = None, **instead: Callable[..., Any]) -> None:
        self.label = label
        self.log: list[Any] = [] if log is None else log
        self.open: Counter[Any] = Counter()
        self.unpaired: list[Any] = []
        inputs = {name: instead.get(name, self._hook(name)) for name in ALL}
        self.hooks = NodeHooks(**inputs)

    def _hook(self, name: str) -> Callable[..., Awaitable[None]]:
        async def hook(*arguments: Any) -> None:
            here = current_node_or_none()
            key = here and (arguments[0], here.node_id, here.position, here.branch, here.attempt)
            if name == START:
                self.open[key] += 1
            elif name in ENDS:
                self.open[key] -= 1
                if self.open[key] < 0:
                    self.unpaired.append((name, key))
            elif name in (RUN_START, RUN_END):
                self.open[RUN_START, arguments[0]] += 1 if name == RUN_START else -1
            self.log.append((f"{self.label}{name}", *arguments))

        return hook

    @property
    def names(self) -> list[str]:
        return [entry[0] for entry in self.log]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.log if entry[0] == f"{self.label}{name}"]

    def assert_paired(self) -> None:
        """Every start has exactly one end, and no end is without a start."""
        assert {key: count for key, count in self.open.items() if count} == {}
        assert self.unpaired == []


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


def node(node_id: str, output: type[BaseModel] = State, input: type[BaseModel] = State) -> Any:
    return stroma_node(node_id, Contract(node_id=node_id, input_schema=input, output_schema=output))


plus = node("plus")(computing(lambda state: {"value": state.value + 1}))
plus_two = node("plus two")(computing(lambda state: {"value": state.value + 2}))
plus_tokens = node("plus tokens")(computing(lambda state: ({"value": state.value + 1}, 5)))
spender = node("spender")(returning(({"value": 1}, 9)))
bad = node("bad")(failing_with(ValueError, "no"))
invalid = node("invalid", output=Text)(returning({"text": 5}))


def flaky(failures: int = 1) -> Any:
    left = [failures]

    @node("flaky")
    async def flaky(state: State) -> Any:
        if left[0]:
            left[0] -= 1
            raise TimeoutError("slow")
        return {"value": state.value + 1}

    return flaky


def waiting(node_id: str = "waiting") -> tuple[Any, asyncio.Event]:
    """A node that waits for ever, and the event that says it has begun."""
    started = asyncio.Event()

    @node(node_id)
    async def waits(state: State) -> Any:
        started.set()
        await asyncio.Event().wait()

    return waits, started


def quick(*hooks: Any, **config: Any) -> StromaRunner:
    sets = [item.hooks if isinstance(item, Recorder) else item for item in hooks]
    inputs: dict[str, Any] = {"policy_map": ONCE, "run_id": "r", "hooks": sets[0] if len(sets) == 1 else sets}
    return StromaRunner.quick(**(inputs | config))


async def test_start_sees_validated_input(seen: Recorder) -> None:
    """on_node_start fires before the function runs and after input validation, with the valid dict."""

    class Raw(BaseModel):
        value: str

    @node("n")
    async def n(state: State) -> Any:
        assert seen.of(START) == [("r", "n", {"value": 5, "items": []})]
        return {"value": 1}

    await quick(seen).run([n], Raw(value="5"))
    assert seen.names == [RUN_START, START, SUCCESS, RUN_END]


# ---------------------------------------------------------------------- the events, one by one


async def test_success_fires_after_the_commit() -> None:
    """on_node_success fires when the output is in the store and in the trace."""
    store = AsyncInMemoryStore()
    committed: list[Any] = []

    async def on_success(run_id: str, node_id: str, *_: Any) -> None:
        committed.append(await store.load(run_id, node_id))

    runner = quick(NodeHooks(on_node_success=on_success), store=store)
    await runner.run([plus], State(value=4))
    assert committed == [State(value=5)]


async def test_run_end_gets_the_result(seen: Recorder) -> None:
    """on_run_end(run_id, result) is the last event of a run and gets the result that run() returns."""
    for nodes in ([plus], [flaky(), plus], [bad], [invalid], []):
        seen.log.clear()
        result = await quick(seen).run(nodes, State(value=1))
        assert seen.names[-1] == RUN_END
        assert seen.names.count(RUN_END) == 1
        ((run_id, argument),) = seen.of(RUN_END)
        assert run_id == "r"
        assert isinstance(argument, ExecutionResult)
        for field in ("run_id", "status", "final_state", "total_tokens", "total_cost_usd", "failure"):
            assert getattr(argument, field) == getattr(result, field)
        assert list(argument.trace) == list(result.trace)
    seen.assert_paired()


@pytest.mark.core
async def test_skipped_on_resume(seen: Recorder) -> None:
    """A node restored from the journal fires on_node_skipped alone, and is in neither trace nor totals."""
    store = AsyncInMemoryStore()
    fail = True

    @node("paid")
    async def paid(state: State) -> Any:
        return {"value": 5}, 100

    @node("then")
    async def then(state: State) -> Any:
        if fail:
            raise ValueError
        return {"value": state.value + 1}, 10

    await quick(store=store, hooks=NodeHooks(), policy_map=NEVER).run([paid, then], State())
    fail = False
    result = await quick(seen, store=store, resume=True).run([paid, then], State())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, State(value=6))
    assert seen.names == [RUN_START, SKIPPED, START, SUCCESS, RUN_END]
    assert seen.of(SKIPPED) == [("r", "paid", {"value": 5, "items": []})]
    assert [event.node_id for event in result.trace] == ["then"]
    assert result.total_tokens == 10
    seen.assert_paired()


async def test_skipped_on_resume_from(seen: Recorder) -> None:
    """With resume_from, too, on_run_start comes first, and each skipped node fires on_node_skipped alone."""
    store = AsyncInMemoryStore()
    await quick(store=store, hooks=NodeHooks()).run([plus, plus_two, flaky(0)], State())
    runner = quick(seen, store=store, resume_from="flaky")
    assert (await runner.run([plus, plus_two, flaky(0)], State())).status is RunStatus.RESUMED
    state = {"value": 1, "items": []}
    assert seen.of(SKIPPED) == [("r", "plus", state), ("r", "plus two", {"value": 3, "items": []})]
    assert sorted(seen.names) == sorted([RUN_START, SKIPPED, SKIPPED, START, SUCCESS, RUN_END])
    assert seen.names[0] == RUN_START, "a run's first event is on_run_start"


# ---------------------------------------------------------------------- several sets


async def order_of(way: Callable[[NodeHooks, NodeHooks, NodeHooks], Any]) -> list[str]:
    log: list[Any] = []
    a, b, c = (Recorder(f"{name}.", log) for name in "abc")
    sets = way(a.hooks, b.hooks, c.hooks)
    await StromaRunner.quick(hooks=sets, policy_map=ONCE).run([flaky()], State())
    return [entry[0] for entry in log]


@pytest.mark.core
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(lambda a, b, c: [a, b, c], id="list"),
        pytest.param(lambda a, b, c: (a, b, c), id="tuple"),
        pytest.param(lambda a, b, c: a | b | c, id="a | b | c"),
        pytest.param(lambda a, b, c: a | (b | c), id="a | (b | c)"),
        pytest.param(lambda a, b, c: [a, b] | c, id="[a, b] | c"),
        pytest.param(lambda a, b, c: a | [b, c], id="a | [b, c]"),
        pytest.param(lambda a, b, c: [a, b | c], id="[a, b | c]"),
    ],
)
async def test_order_of_sets(way: Any) -> None:
    """Starts run first to last, ends last to first, however the sets were put together."""
    up, down = ["a", "b", "c"], ["c", "b", "a"]
    assert await order_of(way) == [
        *(f"{s}.{RUN_START}" for s in up),
        *(f"{s}.{START}" for s in up),
        *(f"{s}.{FAILURE}" for s in down),
        *(f"{s}.{RETRY}" for s in up),
        *(f"{s}.{START}" for s in up),
        *(f"{s}.{SUCCESS}" for s in down),
        *(f"{s}.{RUN_END}" for s in down),
    ]


@pytest.mark.parametrize("name", [RUN_START, START, SUCCESS, SKIPPED])
async def test_each_set_gets_its_own_dict(name: str) -> None:
    """Each set gets its own copy of the dict, nested values too; its changes reach nobody (G7, G8)."""
    inputs: list[dict[str, Any]] = []

    async def vandal(*arguments: Any) -> None:
        (state,) = (a for a in arguments if isinstance(a, dict))
        inputs.append({key: list(v) if isinstance(v, list) else v for key, v in state.items()})
        state["items"].append(666)
        state["value"] = 666
        state["new"] = 666

    seen_by_node: list[State] = []

    @node("n")
    async def n(state: State) -> Any:
        seen_by_node.append(state)
        return {"value": state.value + 1, "items": state.items}

    store = AsyncInMemoryStore()
    hooks = [NodeHooks(**{name: vandal}), NodeHooks(**{name: vandal})]
    runner = quick(*hooks, store=store)
    result = await runner.run([n, n], State(value=1, items=[1]))
    if name == SKIPPED:
        result = await quick(*hooks, store=store, resume=True).run([n, n], State(value=1, items=[1]))
    assert result.final_state == State(value=3, items=[1])
    assert [state.items for state in seen_by_node] == [[1], [1]]
    assert inputs
    assert all(state["items"] == [1] and state["value"] < 4 and len(state) == 2 for state in inputs)
    for event in result.trace:
        assert event.input_state["items"] == [1]
        assert event.output_state["items"] == [1]
        assert "new" not in event.input_state


@pytest.mark.core
async def test_run_end_cannot_change_the_result() -> None:
    """G8: what on_run_end does to its result changes neither the run's result nor what other sets see."""
    seen: list[Any] = []

    async def vandal(run_id: str, result: ExecutionResult) -> None:
        assert isinstance(result.final_state, State)
        seen.append((result.status, result.final_state.value, len(result.trace)))
        result.status = RunStatus.FAILED
        result.final_state.value = 666
        result.total_tokens = 666
        result.trace.append(next(iter(result.trace)))
        next(iter(result.trace)).input_state["value"] = 666
        result.hook_errors.clear()

    result = await quick(*[NodeHooks(on_run_end=vandal)] * 2).run([plus_tokens, plus], State())
    assert seen == [(RunStatus.COMPLETED, 2, 2)] * 2
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, State(value=2))
    assert result.total_tokens == 5
    assert [event.input_state["value"] for event in result.trace] == [0, 1]
    assert result.hook_errors == []


def sync_hook(*_: Any) -> Any:
    """Return no awaitable, which only a call shows."""
    return len(_)


@pytest.mark.parametrize("name", [SUCCESS, FAILURE, RUN_END])
async def test_a_sync_end_leaves_the_other_sets_their_ends(name: str, seen: Recorder) -> None:
    """G9: a sync end hook of one set costs no other set its end event, whichever comes first."""
    wrong = NodeHooks(**{name: sync_hook})
    nodes = [invalid] if name == FAILURE else [plus]
    for sets in ((seen, wrong), (wrong, seen)):
        with pytest.raises(TypeError, match=name):
            await quick(*sets).run(nodes, State())
        assert seen.names == [RUN_START, START, FAILURE if name == FAILURE else SUCCESS, RUN_END]
        seen.assert_paired()
        seen.log.clear()


@pytest.mark.parametrize("first", [True, False])
async def test_a_sync_end_inside_a_group(first: bool, seen: Recorder) -> None:
    """G9: a child's sync end hook ends its siblings and the group, for every set that saw them start."""
    wrong = NodeHooks(on_node_success=sync_hook)
    waits, _ = waiting()
    with pytest.raises(TypeError, match=SUCCESS):
        await quick(*((wrong, seen) if first else (seen, wrong))).run([parallel(waits, plus)], State())
    assert {n for _, n, *_ in seen.of(START)} == {"waiting", "plus", "parallel(waiting, plus)"}
    assert {n for _, n in seen.of(CANCELLED)} >= {"waiting", "parallel(waiting, plus)"}
    seen.assert_paired()


# ---------------------------------------------------------------------- not async


class NotAwaitable:
    def __repr__(self) -> str:
        return "<the callable object>"

    def __call__(self, *_: Any) -> int:
        return 5


async def generator_hook(*_: Any) -> AsyncIterator[int]:
    yield 1


def plain_hook(*_: Any) -> None:
    """Not async."""


class PlainHooks:
    def method(self, *_: Any) -> None:
        """Not async either."""


def scenario(name: str, store: Any) -> tuple[list[Any], dict[str, Any]]:
    """Nodes and config under which an event fires."""
    if name in (FAILURE, RETRY):
        return [plus, bad], {}
    if name == SKIPPED:
        return [plus, plus_two], {"store": store, "resume": True}
    if name == WARNING:
        return [spender, plus], {"budget": ExecutionBudget(max_tokens_total=10)}
    return [plus, plus_two], {}


@pytest.mark.parametrize("name", [n for n in ALL if n != CANCELLED])
@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(plain_hook, id="def"),
        pytest.param(PlainHooks().method, id="method"),
        pytest.param(functools.partial(plain_hook, 1), id="partial"),
        pytest.param(NotAwaitable(), id="callable object"),
        pytest.param(generator_hook, id="async generator"),
        pytest.param(lambda *_: "text", id="lambda"),
    ],
)
async def test_not_async(name: str, hook: Any) -> None:
    """A hook that is not async makes run() raise a TypeError at its call, with the hook and the callable."""
    store = AsyncInMemoryStore()
    if name == SKIPPED:
        await quick(NodeHooks(), store=store).run([plus], State())
    nodes, config = scenario(name, store)
    with pytest.raises(TypeError) as caught:
        await quick(NodeHooks(**{name: hook}), **config).run(nodes, State())
    assert name in str(caught.value)
    assert repr(hook) in str(caught.value)
    result = caught.value.result
    assert isinstance(result, ExecutionResult)
    assert result.run_id == "r"
    assert [(e.node_id, e.outcome) for e in result.trace] == {
        RUN_START: [],
        START: [("plus", "cancelled")],
        SUCCESS: [("plus", "success")],
        FAILURE: [("plus", "success"), ("bad", "failure")],
        RETRY: [("plus", "success"), ("bad", "failure")],
        SKIPPED: [],
        WARNING: [("spender", "success")],
        RUN_END: [("plus", "success"), ("plus two", "success")],
    }[name]


# ---------------------------------------------------------------------- any callable


class Kinds:
    """Callables of every kind whose result can be awaited; each notes its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def method(self, *arguments: Any) -> None:
        await asyncio.sleep(0)
        self.calls.append(arguments)

    async def __call__(self, *arguments: Any) -> None:
        await self.method(*arguments)

    async def labelled(self, label: str, *arguments: Any) -> None:
        assert label == "label"
        await self.method(*arguments)

    def future(self, *arguments: Any) -> Awaitable[None]:
        self.calls.append(arguments)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(done.set_result, None)
        return done

    def custom(self, *arguments: Any) -> Awaitable[None]:
        outer = self

        class Later:
            def __await__(self) -> Iterator[Any]:
                yield
                outer.calls.append(arguments)

        return Later()

    @types.coroutine
    def generator_based(self, *arguments: Any) -> Iterator[Any]:
        yield
        self.calls.append(arguments)


KINDS: dict[str, Callable[[Kinds], Any]] = {
    "method": lambda k: k.method,
    "callable object": lambda k: k,
    "partial": lambda k: functools.partial(k.labelled, "label"),
    "lambda returning a task": lambda k: lambda *a: asyncio.ensure_future(k.method(*a)),
    "future": lambda k: k.future,
    "object with __await__": lambda k: k.custom,
    "generator-based coroutine": lambda k: k.generator_based,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_any_callable_whose_result_is_awaitable(kind: str) -> None:
    """Functions, methods, partials, callable objects, lambdas of awaitables: all are awaited."""
    kinds = Kinds()
    result = await quick(NodeHooks(on_node_start=KINDS[kind](kinds))).run([plus], State(value=1))
    assert result.hook_errors == []
    assert kinds.calls == [("r", "plus", {"value": 1, "items": []})]


async def test_wrong_number_of_parameters() -> None:
    """A hook that does not take its arguments, unseen by its signature, is isolated."""

    async def on_start(run_id: str) -> None: ...

    def passes_on(*arguments: Any) -> Any:
        return on_start(*arguments)

    result = await quick(NodeHooks(on_node_start=passes_on)).run([plus], State())
    assert result.status is RunStatus.COMPLETED
    (error,) = result.hook_errors
    assert isinstance(error.exception, TypeError)


# ---------------------------------------------------------------------- isolation (G8)


class Rude(BaseException):
    """Not an Exception."""


async def down(*_: Any) -> None:
    """Raise: the hook of a monitor that cannot be reached."""
    raise RuntimeError("down")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: RuntimeError("monitoring is down"),
    "TimeoutError": lambda: TimeoutError("of its own"),
    "CancelledError": asyncio.CancelledError,
    "StopAsyncIteration": StopAsyncIteration,
    "GeneratorExit": GeneratorExit,
    "BaseException": Rude,
    "unprintable": Unprintable,
}


@pytest.mark.parametrize("kind", EXCEPTIONS)
@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if n != CANCELLED])
async def test_an_exception_in_a_hook_changes_nothing(name: str, suspends: bool, kind: str) -> None:
    """G8: a hook's exception is listed in hook_errors; outcome, trace, calls and other sets are unchanged."""
    raised: list[BaseException] = []

    async def hook(*_: Any) -> None:
        if suspends:
            await asyncio.sleep(0)
        raised.append(EXCEPTIONS[kind]())
        raise raised[-1]

    async def outcome(*sets: Any) -> tuple[ExecutionResult, list[str]]:
        store, called = AsyncInMemoryStore(), []
        nodes, config = scenario(name, store)
        if name == SKIPPED:
            await quick(NodeHooks(), store=store).run(nodes[:1], State())
        other = Recorder()
        original = [n.__name__ for n in nodes]
        assert original
        result = await quick(other, *sets, other, **config).run(nodes, State())
        called = other.names
        other.assert_paired()
        return result, called

    plain, plain_calls = await outcome()
    result, calls = await outcome(NodeHooks(**{name: hook}))
    assert (result.status, result.final_state) == (plain.status, plain.final_state)
    assert result.trace.diff(plain.trace) == []
    assert calls == plain_calls
    assert raised
    assert [(e.hook, type(e.exception)) for e in result.hook_errors] == [(name, type(exc)) for exc in raised]
    assert all(e.exception is exc for e, exc in zip(result.hook_errors, raised, strict=True))
    expected = {RUN_START: None, RUN_END: None, WARNING: None}.get(name, "a node's")
    assert all((e.node_id is None) == (expected is None) for e in result.hook_errors)
    assert asyncio.current_task().cancelling() == 0


async def test_a_cancelled_hook_that_raises(seen: Recorder) -> None:
    """An exception in on_node_cancelled or on_run_end does not keep a cancelled run from being cancelled."""
    waits, started = waiting()
    wrong = NodeHooks(on_node_cancelled=down, on_run_end=down)
    await cancel_after(quick(wrong, seen, wrong).run([waits], State()), started)
    seen.assert_paired()
    ((_, result),) = seen.of(RUN_END)
    assert result.status is RunStatus.CANCELLED
    assert [e.hook for e in result.hook_errors][:2] == [CANCELLED, CANCELLED]


@pytest.mark.core
async def test_a_cancelled_hook_that_is_not_async(seen: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """A cancelled run raises CancelledError also if the hooks of its end are not async; the log says why."""
    waits, started = waiting()
    wrong = NodeHooks(on_node_cancelled=lambda *_: None, on_run_end=lambda *_: None)
    await cancel_after(quick(wrong, seen).run([waits], State()), started)
    seen.assert_paired()
    log = [record.getMessage() for record in caplog.records]
    for hook in ("on_node_cancelled of node 'waiting'", "on_run_end"):
        assert any(f"hook {hook} is not async: " in line for line in log)


@pytest.mark.core
@pytest.mark.parametrize("reaction", ["swallows it", "raises another"])
@pytest.mark.parametrize("name", [RUN_START, START, SUCCESS, FAILURE, RETRY])
async def test_a_hook_cannot_keep_a_run_from_being_cancelled(
    name: str, reaction: str, seen: Recorder
) -> None:
    """G8: A hook that swallows the cancellation of a run does not undo it."""
    started = asyncio.Event()

    async def hook(*_: Any) -> None:
        if started.is_set():
            return
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if reaction == "raises another":
                raise RuntimeError("the exporter was interrupted") from None

    nodes = [bad, plus] if name in (FAILURE, RETRY) else [plus, plus_two]
    await cancel_after(quick(seen, NodeHooks(**{name: hook})).run(nodes, State()), started)
    seen.assert_paired()
    assert len(seen.of(START)) == (0 if name == RUN_START else 1)
    ((_, result),) = seen.of(RUN_END)
    assert result.status is RunStatus.CANCELLED


async def test_hook_errors_raise(seen: Recorder) -> None:
    """hook_errors="raise" turns a hook's exception into a HookError with the result, after the trace."""
    error = RuntimeError("down")

    async def hook(*_: Any) -> None:
        raise error

    runner = quick(seen, NodeHooks(on_node_start=hook), hook_errors="raise")
    with pytest.raises(HookError) as caught:
        await runner.run([plus, plus_two], State())
    result = caught.value.result
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, State(value=3))
    assert [e.outcome for e in result.trace] == ["success", "success"]
    assert len(result.hook_errors) == 2
    assert caught.value.__cause__ is error
    assert START in str(caught.value)
    assert seen.names.count(RUN_END) == 1
    assert seen.of(RUN_END)[0][1].status is RunStatus.COMPLETED


async def test_hook_errors_raise_of_the_last_hook() -> None:
    """hook_errors="raise" sees an exception of on_run_end too; without any it raises nothing."""
    with pytest.raises(HookError, match=RUN_END):
        await quick(NodeHooks(on_run_end=down), hook_errors="raise").run([plus], State())
    assert (await quick(Recorder(), hook_errors="raise").run([plus], State())).status is RunStatus.COMPLETED


async def test_hook_errors_raise_with_a_failed_run() -> None:
    """A run that fails on its own with hook_errors="raise" has its failure on the HookError's result."""
    with pytest.raises(HookError) as caught:
        await quick(NodeHooks(on_node_failure=down), hook_errors="raise").run([invalid], State())
    assert caught.value.result.status is RunStatus.FAILED
    assert caught.value.result.failure is not None


async def test_hook_errors_raise_with_a_cancelled_run() -> None:
    """A cancelled run stays cancelled also with hook_errors="raise"."""
    waits, started = waiting()
    runner = quick(NodeHooks(on_node_start=down, on_node_cancelled=down), hook_errors="raise")
    await cancel_after(runner.run([waits], State()), started)


# ---------------------------------------------------------------------- time limits


@pytest.mark.parametrize("name", [n for n in ALL if n != CANCELLED])
async def test_a_hanging_hook_is_abandoned(name: str) -> None:
    """G8: A hook that never returns delays the run by its time limit, and is listed in `hook_errors`."""
    store = AsyncInMemoryStore()
    nodes, config = scenario(name, store)
    if name == SKIPPED:
        await quick(NodeHooks(), store=store).run(nodes[:1], State())
    plain = await quick(NodeHooks(), **config).run(nodes, State()) if name != SKIPPED else None
    ended: list[str] = []

    async def hangs(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    runner = quick(NodeHooks(**{name: hangs}), hook_timeout_ms=5, **config)
    async with asyncio.timeout(5):
        result = await runner.run(nodes, State())
    assert ended
    assert len(result.hook_errors) == len(ended)
    for error in result.hook_errors:
        assert error.hook == name
        assert "5 ms" in str(error.exception)
        assert "hook_timeout_ms" in str(error.exception)
    if plain is not None:
        assert (result.status, result.final_state) == (plain.status, plain.final_state)
        assert result.trace.diff(plain.trace) == []


async def test_a_hooks_own_timeout_is_its_own() -> None:
    """A hook that limits its own time, by asyncio.timeout or wait_for, is not in the way of ours."""
    ended: list[str] = []

    async def own(*_: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.002):
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.002)
        ended.append("own")

    async def too_long(*_: Any) -> None:
        async with asyncio.timeout(60):
            await asyncio.Event().wait()

    result = await quick(NodeHooks(on_node_start=own)).run([plus], State())
    assert (ended, result.hook_errors) == (["own"], [])
    result = await quick(NodeHooks(on_node_start=too_long), hook_timeout_ms=5).run([plus], State())
    assert result.status is RunStatus.COMPLETED
    assert [type(e.exception).__name__ for e in result.hook_errors] == ["HookTimeout"]


@pytest.mark.core
async def test_the_timer_is_armed_only_when_a_hook_suspends(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: a hook that never suspends arms no timer; one that does arms one."""
    armed: list[float | None] = []
    real = asyncio.timeout

    def counting(delay: float | None) -> asyncio.Timeout:
        armed.append(delay)
        return real(delay)

    async def at_once(*_: Any) -> None: ...

    async def suspends(*_: Any) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(asyncio, "timeout", counting)
    await quick(NodeHooks(on_node_start=at_once, on_node_success=at_once)).run([plus], State())
    assert armed == []
    await quick(NodeHooks(on_node_start=suspends, on_node_success=at_once)).run([plus], State())
    assert armed == [5.0]


async def test_redact_gets_its_own_dict(seen: Recorder) -> None:
    """A redact that works in place changes what hooks see, and nothing of the run."""

    def in_place(state: dict[str, Any]) -> dict[str, Any]:
        state["items"].clear()
        state["value"] = "***"
        return state

    result = await quick(seen, redact=in_place).run([plus_items, plus_items], State(value=1, items=[1, 2]))
    assert result.final_state == State(value=3, items=[1, 2])
    assert {str(arguments[2]) for arguments in seen.of(SUCCESS)} == {"{'value': '***', 'items': []}"}
    assert [event.input_state["items"] for event in result.trace] == [[1, 2], [1, 2]]


@node("plus items")
async def plus_items(state: State) -> Any:
    return {"value": state.value + 1, "items": state.items}


# ---------------------------------------------------------------------- redaction


@pytest.mark.core
@pytest.mark.parametrize("wrong", ["raises", "no dict"])
async def test_redact_that_fails(wrong: str, seen: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """If redact raises, the state is replaced, not shown, and the run goes on."""

    def redact(state: dict[str, Any]) -> Any:
        if wrong == "raises":
            raise KeyError(f"no such field in {state}")
        return str(state)

    result = await quick(seen, redact=redact).run([plus], State(value=123456))
    assert result.status is RunStatus.COMPLETED
    assert result.hook_errors == []
    shown = [seen.of(RUN_START)[0][2], seen.of(START)[0][2], seen.of(SUCCESS)[0][2]]
    for state in shown:
        assert isinstance(state, dict)
        assert "12345" not in str(state)
        assert "items" not in state
    assert "12345" not in caplog.text


@pytest.mark.core
async def test_log_lines_hold_nothing_that_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    """What redact takes out of a state is in no log line either: of failed attempts or skipped items."""

    class Person(BaseModel):
        name: str

    class People(BaseModel):
        people: list[Person]

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {k: "***" if k in {"name", "people"} else v for k, v in state.items()}

    async def greet(state: Any) -> Any:
        raise ValueError(f"no letter for {state.name}")

    greets = stroma_node("greet", input=Person, output=Person)(greet)
    caplog.set_level(logging.DEBUG, "stroma")
    runner = quick(redact=redact)
    await runner.run([greets], Person(name="Augusta King"))
    collects = map_over("people", greets, into="done", on_item_failure="collect")
    result = await runner.run([collects], People(people=[Person(name="Augusta King")]))
    assert result.status is RunStatus.COMPLETED
    assert caplog.text.count("no letter for [redacted]") == 5  # Two attempts each, and the skipped item.
    assert "failed and is skipped" in caplog.text
    assert "Augusta" not in caplog.text


async def test_an_interrupt_in_redact_is_one() -> None:
    """KeyboardInterrupt in redact comes out of run(), and hides no state instead."""
    with pytest.raises(KeyboardInterrupt):
        await quick(Recorder(), redact=raises_interrupt).run([plus], State())


def raises_interrupt(_: Any) -> Any:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------- the node's own task

mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="unset")


async def set_mark(run_id: str, node_id: str, state: dict[str, Any]) -> None:
    await asyncio.sleep(0)
    mark.set(f"{mark.get().removeprefix('unset')}/{node_id}")


async def test_what_start_sets_is_current_in_the_function() -> None:
    """A context variable set in start is current in the function, its threads and its subtasks."""
    findings: dict[str, str] = {}

    async def look(name: str) -> None:
        await asyncio.sleep(0)
        findings[name] = mark.get()

    @node("n")
    async def n(state: State) -> Any:
        await look("function")
        await asyncio.to_thread(lambda: findings.__setitem__("thread", mark.get()))
        await asyncio.create_task(look("subtask"))
        return {}

    def in_thread(state: State) -> Any:
        findings["plain def"] = mark.get()
        return {}

    runner = quick(NodeHooks(on_node_start=set_mark))
    await asyncio.create_task(runner.run([n], State()))
    await asyncio.create_task(runner.run([node("plain")(in_thread)], State()))
    assert findings == {"function": "/n", "thread": "/n", "subtask": "/n", "plain def": "/plain"}


async def test_what_start_sets_is_current_in_its_ends() -> None:
    """A context variable set in start is still set in success and failure, so a token can be reset."""
    reset: list[str] = []
    tokens: dict[Any, contextvars.Token[str]] = {}

    async def on_start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        tokens[node_id, asyncio.current_task()] = mark.set(node_id)

    async def on_end(run_id: str, node_id: str, *_: Any) -> None:
        mark.reset(tokens.pop((node_id, asyncio.current_task())))
        reset.append(node_id)

    hooks = NodeHooks(on_start, on_end, on_end, on_node_cancelled=on_end)
    result = await quick(hooks).run([flaky(), parallel(plus, plus_two), bad], State())
    assert result.hook_errors == []
    assert sorted(reset) == ["bad", "bad", "flaky", "flaky", "parallel(plus, plus two)", "plus", "plus two"]
    assert tokens == {}
    assert mark.get() == "unset"


@pytest.mark.parametrize("kind", ["children", "items"])
async def test_what_start_sets_is_current_in_children(kind: str) -> None:
    """What a group's start sets is current in each child and item; what a child's start sets is its own."""
    findings: list[str] = []

    def child(name: str, input: type[BaseModel] = State) -> Any:
        async def look(state: Any) -> Any:
            await asyncio.sleep(0)
            findings.append(mark.get())
            return {"text": "x"}

        return node(name, output=Text, input=input)(look)

    def plain(state: State) -> Any:
        findings.append(mark.get())
        return {"text": "x"}

    if kind == "items":
        group = map_over("items", child("item", Number), into="out")
        expected = ["/map_over(items, item)/item"] * 3
    else:
        group = parallel(child("a"), parallel(child("b"), node("plain", output=Text)(plain)))
        inner = "/parallel(a, parallel(b, plain))/parallel(b, plain)"
        expected = ["/parallel(a, parallel(b, plain))/a", f"{inner}/b", f"{inner}/plain"]
    runner = quick(NodeHooks(on_node_start=set_mark))
    await asyncio.create_task(runner.run([group], State(items=[1, 2, 3])))
    assert sorted(findings) == expected


async def test_what_run_start_sets_is_current_in_nodes() -> None:
    """What on_run_start sets is current in every node of the run."""

    async def on_run_start(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        mark.set(f"run {run_id}")

    findings: list[str] = []

    @node("n")
    async def n(state: State) -> Any:
        findings.append(mark.get())
        return {}

    runner = quick(NodeHooks(on_run_start=on_run_start))
    await asyncio.create_task(runner.run([n, parallel(n)], State()))
    assert findings == ["run r", "run r"]


# ---------------------------------------------------------------------- current_node()


async def test_current_node_in_hooks_and_function() -> None:
    """current_node_or_none() is set in the function and the node's hooks; elsewhere it is None."""
    places: dict[str, Any] = {}

    def look(name: str) -> Callable[..., Awaitable[None]]:
        async def hook(*_: Any) -> None:
            here = current_node_or_none()
            places.setdefault(name, []).append(
                here
                and (
                    here.run_id,
                    here.pipeline,
                    here.node_id,
                    here.position,
                    here.attempt,
                    here.kind,
                    here.redelivered,
                )
            )

        return hook

    called = 0

    @node("n")
    async def n(state: State) -> Any:
        nonlocal called
        called += 1
        await look("function")()
        if called == 1:
            raise TimeoutError
        return {}, 85

    hooks = NodeHooks(**{name: look(name) for name in ALL})
    assert current_node_or_none() is None
    with pytest.raises(
        RuntimeError, match="no node is running here; call current_node\\(\\) in a node's function"
    ):
        current_node()
    runner = quick(hooks, pipeline="p", budget=ExecutionBudget(max_tokens_total=100))
    await runner.run([plus, n], State())
    assert current_node_or_none() is None

    def at(node_id: str, position: int, attempt: int) -> tuple[Any, ...]:
        return ("r", "p", node_id, position, attempt, "node", False)

    assert places == {
        RUN_START: [None],
        START: [at("plus", 0, 1), at("n", 1, 1), at("n", 1, 2)],
        "function": [at("n", 1, 1), at("n", 1, 2)],
        FAILURE: [at("n", 1, 1)],
        RETRY: [at("n", 1, 1)],
        SUCCESS: [at("plus", 0, 1), at("n", 1, 2)],
        WARNING: [at("n", 1, 2)],
        RUN_END: [None],
    }


async def test_current_node_knows_usage_model_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an end hook current_node() has the attempt's whole usage, its model, and the remaining budget."""
    monkeypatch.setitem(KNOWN_MODELS, "house", (10.0, 20.0))
    findings: list[Any] = []

    async def look(*_: Any) -> None:
        here = current_node()
        usage, left = here.usage, here.remaining_budget
        findings.append((usage.tokens, usage.output_tokens, round(usage.cost_usd, 6), here.model))
        findings.append((left.tokens, left.cost_usd and round(left.cost_usd, 6), left.latency_ms))

    called = 0

    @node("ask")
    async def ask(state: State) -> Any:
        nonlocal called
        called += 1
        current_node().report_usage(input_tokens=1000, model="house")
        if called == 1:
            raise TimeoutError
        return {}, 2000, 500, "house"

    budget = ExecutionBudget(max_tokens_total=10_000, max_cost_usd=1.0)
    runner = quick(NodeHooks(look, look, look), budget=budget)
    await runner.run([ask], State())
    assert findings == [
        (0, 0, 0, None),
        (10_000, 1.0, None),
        (1000, 0, 0.01, "house"),
        (9_000, 0.99, None),
        (0, 0, 0, None),
        (9_000, 0.99, None),
        (3500, 500, 0.04, "house"),
        (5_500, 0.95, None),
    ]


def test_a_child_that_stops_the_process_at_once() -> None:
    """SystemExit in the first child before its siblings began leaves no coroutine that was never awaited."""
    seen = Recorder()

    @node("stops")
    async def stops(state: State) -> Any:
        raise SystemExit

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            asyncio.run(quick(seen).run([parallel(stops, plus)], State()))
        gc.collect()
    seen.assert_paired()
    assert [str(w.message) for w in caught] == []


# ---------------------------------------------------------------------- groups


#: How runs end: nodes, settings, the status, and how many successes, failures and cancellations there are.
WAYS: dict[str, tuple[Callable[[], list[Any]], dict[str, Any], str, tuple[int, int, int] | None]] = {
    "success": (lambda: [plus, plus_two], {}, "COMPLETED", (2, 0, 0)),
    "retries": (lambda: [flaky(), bad], {}, "PARTIAL", (1, 3, 0)),
    "contract": (lambda: [invalid], {}, "FAILED", (0, 1, 0)),
    "timeout": (lambda: [waiting()[0]], {"node_timeouts": {"waiting": 5}}, "PARTIAL", (0, 2, 0)),
    "group timeout": (
        lambda: [parallel(waiting()[0], plus)],
        {"node_timeouts": {"parallel(waiting, plus)": 100}},
        "PARTIAL",
        (1, 1, 1),
    ),
    "deadline": (lambda: [waiting()[0]], {"budget": ExecutionBudget(max_latency_ms=5)}, "PARTIAL", (0, 1, 0)),
    "group deadline": (
        lambda: [parallel(waiting()[0], plus)],
        {"budget": ExecutionBudget(max_latency_ms=5)},
        "PARTIAL",
        None,  # The deadline may pass before its children begin.
    ),
    "group": (
        lambda: [parallel(plus, parallel(plus_two, flaky())), parallel(waiting()[0], invalid)],
        {},
        "FAILED",
        (5, 3, 1),
    ),
    "group retried": (
        lambda: [parallel(plus, flaky())],
        {"policy_map": NEVER, "node_policies": {"parallel(plus, flaky)": ONCE}},
        "COMPLETED",
        (3, 2, 0),
    ),
    "bad usage": (lambda: [node("cheats")(returning(({}, -5)))], {}, "FAILED", (0, 1, 0)),
    "own cancelled error": (
        lambda: [node("odd")(failing_with(asyncio.CancelledError))],
        {},
        "PARTIAL",
        (0, 2, 0),
    ),
    "sync node": (lambda: [node("plain")(lambda state: next(iter(())))], {}, "PARTIAL", (0, 2, 0)),
    "over budget": (
        lambda: [parallel(spender, plus), plus],
        {"budget": ExecutionBudget(max_tokens_total=5)},
        "PARTIAL",
        (0, 2, 0),
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_every_start_has_one_end(way: str, seen: Recorder) -> None:
    """G9: every start event has exactly one end event, whichever way the attempt ended; so has every run."""
    make, config, status, ends = WAYS[way]
    result = await quick(seen, **config).run(make(), State())
    counts = tuple(map(seen.names.count, ENDS))
    assert (result.status, ends or counts) == (status, counts)
    assert seen.names.count(RUN_START) == seen.names.count(RUN_END) == 1
    seen.assert_paired()


async def run_broken_store(seen: Recorder) -> None:
    class Refusing(SimpleStore):
        def save(self, *_: Any) -> None:
            raise Fenced("somebody else owns the run")

    assert (await quick(seen, store=Refusing()).run([plus], State())).status is RunStatus.PARTIAL
    assert seen.names == [RUN_START, START, FAILURE, RUN_END]


async def run_cancelled_in_group(seen: Recorder) -> None:
    waits, started = waiting()
    await cancel_after(quick(seen).run([parallel(plus, parallel(waits))], State()), started)
    cancelled = {n for _, n in seen.of(CANCELLED)}
    assert cancelled == {"waiting", "parallel(waiting)", "parallel(plus, parallel(waiting))"}


async def run_cancelled_in_thread(seen: Recorder) -> None:
    started, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def plain(state: State) -> Any:
        loop.call_soon_threadsafe(started.set)
        release.wait(5)
        return {}

    try:
        await cancel_after(quick(seen).run([node("plain")(plain)], State()), started)
    finally:
        release.set()
    assert seen.of(CANCELLED) == [("r", "plain")]


async def run_cancelled_in_wait(seen: Recorder) -> None:
    started = asyncio.Event()

    async def on_retry(*_: Any) -> None:
        started.set()

    slow = {cls: FailurePolicy(max_retries=1, backoff_seconds=60, jitter=False) for cls in FailureClass}
    runner = quick(seen, NodeHooks(on_node_retry=on_retry), policy_map=slow)
    await cancel_after(runner.run([bad], State()), started)
    assert seen.of(CANCELLED) == []


SCENARIOS = [value for name, value in list(globals().items()) if name.startswith("run_")]


@pytest.mark.parametrize("way", SCENARIOS, ids=lambda f: f.__name__.removeprefix("run_"))
async def test_every_start_of_a_run_that_is_broken_off_has_one_end(
    way: Callable[[Recorder], Awaitable[None]], seen: Recorder
) -> None:
    """G9: every start event has exactly one end event in a run that is cancelled or loses its store."""
    await way(seen)
    assert seen.of(START)
    seen.assert_paired()
    assert len(seen.of(RUN_START)) == len(seen.of(RUN_END)) == 1


async def test_children_that_never_began_are_closed(seen: Recorder) -> None:
    """A child that fails at once leaves its siblings unbegun: no start, no end, no unawaited coroutine."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = await quick(seen).run([parallel(invalid, plus, plus_two)], State())
        gc.collect()
    assert result.status is RunStatus.FAILED
    assert [n for _, n, *_ in seen.of(START)] == ["parallel(invalid, plus, plus two)", "invalid"]
    seen.assert_paired()
    assert [str(w.message) for w in caught] == []
