"""Hostile nodes and hooks: each gives a clear result or error, nothing finished is lost or left running."""

import asyncio
import contextlib
import copy
import gc
import logging
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel, field_validator
from tests.fixtures import store_fixture
from tests.kit import NEVER, ONCE, Loose, Num, computing, context_of, failing_with, forever, node, returning

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    UsageError,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.hooks.sets import EVENTS

pytestmark = pytest.mark.filterwarnings("error")

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


class Items(BaseModel):
    n: int = 0
    items: list[dict[str, int]] = [{"n": 1}]


class Formats(logging.Handler):
    """Formats every record, as a real handler would, and throws it away."""

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Take what other files have left out of garbage collection: `gc.collect()` then takes 5 ms, not 80."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """No thread of ours outlives a test, no coroutine is left unawaited, each log record can be formatted."""
    before = set(threading.enumerate())
    logger, handler = logging.getLogger("stroma"), Formats()
    logger.addHandler(handler)
    logger.propagate = False  # A captured lone surrogate is more than some reporters can carry.
    yield
    logger.removeHandler(handler)
    logger.propagate = True
    gc.collect()  # What was never awaited warns now, and the filter makes that an error.
    deadline = time.monotonic() + 5
    while left := {t for t in threading.enumerate() if t not in before and t.name.startswith("stroma")}:
        assert time.monotonic() < deadline, left
        time.sleep(0.001)


def nothing_runs() -> None:
    assert asyncio.all_tasks() == {asyncio.current_task()}


store = store_fixture("async-memory", "sqlite")


quick = partial(StromaRunner.quick, policy_map=NEVER)


class Pairs:
    """Hooks that note starts and ends by place."""

    def __init__(self) -> None:
        self.open: Counter[Any] = Counter()
        self.starts = 0
        self.hooks = NodeHooks(
            on_node_start=self._note(1),
            on_node_success=self._note(-1),
            on_node_failure=self._note(-1),
            on_node_cancelled=self._note(-1),
        )

    def _note(self, change: int) -> Callable[..., Awaitable[None]]:
        async def hook(*_: Any) -> None:
            run = current_node()
            self.open[run.run_id, run.position, run.branch, run.attempt] += change
            self.starts += change > 0

        return hook

    def check(self) -> None:
        assert self.starts
        assert not +self.open, self.open
        assert not -self.open, self.open


# ---------------------------------------------------------------------- what a node returns


class Evil:
    """Refuses to be looked at, compared, copied, hashed or pickled."""

    def _no(self, *_: Any) -> Any:
        raise LookupError("leave me alone")

    __repr__ = __str__ = __eq__ = __hash__ = __deepcopy__ = __copy__ = __reduce_ex__ = __len__ = __iter__ = (
        _no
    )
    __bool__ = __getattr__ = _no


class EvilDict(dict[str, Any]):
    def _no(self, *_: Any) -> Any:
        raise LookupError("leave me alone")

    __getitem__ = __iter__ = __len__ = keys = items = values = get = _no


def _itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def _abyss(depth: int = 20_000) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "list": lambda: [1],
    "text": lambda: "n=1",
    "number": lambda: 1,
    "class": lambda: Num,
    "wrong-field": lambda: {"n": "bad"},
    "wrong-key-type": lambda: {1: 2, "n": None},
    "huge-negative-usage": lambda: ({"n": 1}, -(10**5000)),
    "constructed": lambda: Num.model_construct(n="bad"),
    "generator": lambda: (i for i in ()),
    "exception": lambda: ValueError("returned, not raised"),
    "empty-tuple": tuple,
    "long-tuple": lambda: (1, 2, 3, 4, 5),
    "evil": Evil,
    "evil-field": lambda: {"n": Evil()},
    "evil-dict": lambda: EvilDict(n=1),
    "itself": lambda: {"n": _itself()},
    "abyss": lambda: {"n": _abyss()},
    "usage-only": lambda: (None, 5),
    "evil-usage": lambda: ({"n": 1}, Evil()),
    "evil-model": lambda: ({"n": 1}, 1, Evil()),
    "huge-usage": lambda: ({"n": 1}, 10**400),
}


def _in_thread(hostile: Any) -> Any:
    def sync(state: Any) -> Any:
        coroutine = hostile(state)
        try:
            coroutine.send(None)
        except StopIteration as returned:
            return returned.value
        raise AssertionError

    return node("bad", sync)


PLACES: dict[str, Callable[[Any], Any]] = {
    "node": lambda hostile: node("bad", hostile),
    "thread": _in_thread,
    "child": lambda hostile: parallel(node("good", _good), node("bad", hostile)),
    "item": lambda hostile: map_over("items", node("bad", hostile), into="out"),
}


async def _good(state: Any) -> Any:
    return {"n": 1}


#: Every place in memory, and one on the disk.
SPREAD = [("memory", place) for place in PLACES] + [("sqlite", "child")]


@pytest.mark.parametrize(("store", "place"), SPREAD, indirect=["store"])
@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_return_is_a_failure_that_loses_nothing(name: str, place: str, store: Any) -> None:
    """Whatever a node returns as its output: FAILED, named, called once; earlier outputs are kept."""
    calls: Counter[str] = Counter()

    async def first(state: Items) -> Any:
        calls["first"] += 1
        return {"n": 5, "items": [{"n": 1}]}, 3

    async def hostile(state: Any) -> Any:
        calls["bad"] += 1
        return WRONG[name]() if calls["bad"] == 1 else {"n": 7}

    async def last(state: Any) -> Any:
        calls["last"] += 1
        return {"n": 9}

    pairs = Pairs()
    nodes = [node("first", first, Items, Items), PLACES[place](hostile), node("last", last)]
    runner = quick(store=store, run_id="r", hooks=pairs.hooks, policy_map=ONCE)
    result = await runner.run(nodes, Items())
    assert result.status is RunStatus.FAILED, result
    assert result.failure.failure_class is T
    assert ("too deep" if name == "abyss" else "'bad'") in result.failure.message
    assert len(result.failure.message) < 5_000
    assert calls == {"first": 1, "bad": 1}
    pairs.check()
    assert isinstance(result.trace.to_json(), str)
    nothing_runs()
    again = await runner.run(nodes, Items(), resume=True)
    assert again.status is RunStatus.RESUMED, again.failure
    assert calls["first"] == 1
    assert again.final_state == Num(n=9)
    nothing_runs()


@pytest.mark.parametrize("value", [threading.Lock, Evil, _itself, _abyss])
async def test_what_cannot_be_serialised(value: Callable[[], Any], store: Any) -> None:
    """Output under Any that cannot be stored: bought once, named, no harm to traces and hooks."""
    calls: list[int] = []

    async def hostile(state: Num) -> Any:
        calls.append(1)
        return {"anything": value()}, 7

    pairs = Pairs()
    runner = quick(store=store, hooks=pairs.hooks, policy_map=ONCE)
    result = await runner.run([node("bad", hostile, Num, Loose)], Num())
    assert (len(calls), result.total_tokens) == (1, 7)
    if isinstance(store, SQLiteStore):
        assert result.status is RunStatus.FAILED
        assert "anything cannot be serialised" in result.failure.message
    else:
        assert result.status is RunStatus.COMPLETED, result.failure
    assert isinstance(result.trace.to_json(), str)
    pairs.check()


# ---------------------------------------------------------------------- what a node raises


class Mute(Exception):
    def __str__(self) -> str:
        raise LookupError

    __repr__ = __str__


class Unpicklable(Exception):
    """Neither copied nor pickled, and made from arguments that it does not keep."""

    def __init__(self, a: int, *, b: int) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        raise TypeError("no")


class Odd(BaseException):
    pass


class Sly(Exception):
    """Attributes that raise, where a client's error would have its status and headers."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


class SlyProperty(Exception):
    @property
    def status_code(self) -> Any:
        raise KeyError

    @property
    def response(self) -> Any:
        raise SystemError


def _ring() -> Exception:
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    return a


def _recurse() -> Any:
    return _recurse()


RAISED: dict[str, Callable[[], BaseException]] = {
    "mute": Mute,
    "unpicklable": lambda: Unpicklable(1, b=2),
    "sly": Sly,
    "sly-property": SlyProperty,
    "ring": _ring,
    "surrogate": lambda: ValueError("\ud800"),
    "long": lambda: ValueError("x" * 2_000_000),
    "nul": lambda: ValueError("a\0b"),
    "cancelled": asyncio.CancelledError,
    "stop-iteration": StopIteration,
    "stop-async-iteration": StopAsyncIteration,
    "memory": MemoryError,
    "group": lambda: ExceptionGroup("several", [ValueError(), TypeError()]),
    "timeout": TimeoutError,
    "warning": lambda: UserWarning("w"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
}


@pytest.mark.parametrize(("store", "place"), SPREAD, indirect=["store"])
@pytest.mark.parametrize("name", RAISED)
async def test_whatever_a_node_raises_is_its_failure(name: str, place: str, store: Any) -> None:
    """For any exception of a node: one class, one event, one end per attempt; earlier outputs are kept."""
    calls: Counter[str] = Counter()
    healed = False

    async def first(state: Items) -> Any:
        calls["first"] += 1
        return state, 3

    async def hostile(state: Any) -> Any:
        calls["bad"] += 1
        if healed:
            return {"n": 7}
        raise RAISED[name]()

    pairs = Pairs()
    nodes = [node("first", first, Items, Items), PLACES[place](hostile)]
    runner = quick(store=store, run_id="r", hooks=pairs.hooks, policy_map=ONCE)
    result = await runner.run(nodes, Items())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.failure_class in (R, A)
    assert isinstance(result.failure.message, str)
    assert result.failure.message
    assert calls == {"first": 1, "bad": 2}
    attempts = [e.attempt for e in result.trace.walk() if e.node_id == "bad"]
    assert attempts == [1, 2]
    with pytest.raises(BaseException) as raised:
        result.raise_for_status()
    if place == "node" or not name.startswith(("stop", "generator")):
        assert type(raised.value) in (type(RAISED[name]()), RuntimeError)
    pairs.check()
    nothing_runs()
    healed = True
    assert (await runner.run(nodes, Items(), resume=True)).status is RunStatus.RESUMED
    assert calls["first"] == 1
    nothing_runs()


class Muted(BaseModel):
    n: int = 0

    @field_validator("n")
    @classmethod
    def refuse(cls, n: int) -> int:
        if n:
            raise Mute
        return n


@pytest.mark.parametrize("side", ["input", "output"])
async def test_a_validator_whose_error_has_no_text(side: str) -> None:
    """A contract is broken by whatever a validator raises, also if its ``str()`` raises."""
    nodes = [node("first", returning({"n": 1}), Num, Muted if side == "output" else Num)]
    nodes += [node("second", returning({"n": 1}), Muted, Num)] if side == "input" else []
    result = await quick(policy_map=NEVER).run(nodes, Num())
    assert result.failure.reason == "contract"
    assert result.failure.message.endswith(": Mute")


@pytest.mark.parametrize("place", ["node", "child", "item"])
async def test_a_node_that_recurses(place: str, store: Any) -> None:
    """Endless recursion is a failure that is not tried again, also from a thread."""

    async def hostile(state: Any) -> Any:
        _recurse()

    result = await quick(store=store).run([PLACES[place](hostile)], Items())
    assert result.status is RunStatus.FAILED
    assert isinstance(result.failure.exception, RecursionError)
    assert (result.failure.failure_class, result.failure.reason) == (FailureClass.TERMINAL, "bug")
    sync = await quick(store=store).run([node("bad", lambda state: _recurse())], Num())
    assert isinstance(sync.failure.exception, RecursionError)


async def test_one_exception_object_for_all(store: Any) -> None:
    """The same exception object raised on each attempt, in every run and at once, is never mixed up."""
    error = ValueError("shared")

    async def hostile(state: Any) -> Any:
        await asyncio.sleep(0)
        raise error

    runner = quick(store=store, policy_map=ONCE)
    results = await asyncio.gather(*[runner.run([node("bad", hostile)], Num(n=i)) for i in range(10)])
    for result in results:
        assert result.failure.exception is error
        assert [event.failure_message for event in result.trace] == ["shared"] * 2
    nothing_runs()


async def test_a_classifier_that_raises_and_lies() -> None:
    """A classifier that raises, returns nonsense or blocks a moment is skipped; the next one is heard."""
    requests: list[Any] = []

    def lies(error: Exception, context: Any) -> Any:
        requests.append("lies")
        return "NO SUCH CLASS"

    def raises(error: Exception, context: Any) -> Any:
        requests.append("raises")
        raise Mute

    result = await quick(classifiers=[lies, raises, lambda e, c: T]).run(
        [node("bad", failing_with(Mute))], Num()
    )
    assert requests == ["lies", "raises"]
    assert result.status is RunStatus.FAILED


async def test_a_node_that_mutates_and_keeps_its_objects(store: Any) -> None:
    """What a node does to its input and output, now or later, reaches no other node, attempt or store."""
    entries: list[Any] = []
    seen: list[Any] = []

    def spoil(value: Any) -> None:
        for item in value.items:
            item["n"] = -1
        value.items.append({"n": -2})
        value.n = -3

    def make(name: str) -> Any:
        left = [True, False]

        async def func(state: Items) -> Any:
            seen.append((name, state.n, copy.deepcopy(state.items)))
            entries.append(state)
            spoil(state)
            await asyncio.sleep(0)
            for old in entries:
                spoil(old)
            if left.pop(0):
                raise LookupError
            output = Items(n=1, items=[{"n": 1}])
            entries.append(output)
            asyncio.get_running_loop().call_soon(spoil, output)
            return output

        return node(name, func, Items, Items)

    nodes = [make("a"), parallel(make("b"), make("c")), make("d")]
    initial = Items(n=1)
    result = await quick(store=store, run_id="r", policy_map=ONCE).run(nodes, initial)
    assert result.status is RunStatus.COMPLETED, result.failure
    for old in entries:
        spoil(old)
    assert {entry[0] for entry in seen} == set("abcd")
    assert all(entry[1:] == (1, [{"n": 1}]) for entry in seen), seen
    assert initial == Items(n=1)
    good = {"n": 1, "items": [{"n": 1}]}
    for event in result.trace.walk():
        assert event.input_state == good
        assert event.output_state in (good, None)
    again = await quick(store=store, run_id="r", resume=True).run(nodes, Items(n=1))
    assert (again.status, len(again.trace)) == (RunStatus.RESUMED, 0)
    assert again.final_state.model_dump() == good


# ---------------------------------------------------------------------- what never ends


async def test_a_node_that_answers_its_timeout_with_another_error(store: Any) -> None:
    """A node that turns its timeout's cancellation into an error fails with that; nothing leaks."""

    async def angry(state: Num) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise LookupError("my own") from None

    result = await quick(store=store, node_timeouts={"bad": 10}).run([node("bad", angry)], Num())
    assert isinstance(result.failure.exception, (LookupError, TimeoutError))
    assert asyncio.current_task().cancelling() == 0
    nothing_runs()


@pytest.mark.parametrize("place", ["alone", "group"])
async def test_a_sync_function_that_blocks(place: str, store: Any) -> None:
    """A blocked thread is abandoned at its timeout: loop and run go on, and its late output is ignored."""
    release = threading.Event()
    done: list[threading.Thread] = []

    def blocks(state: Num) -> Any:
        done.append(threading.current_thread())
        release.wait(10)
        return {"n": 1}, 100

    instance = node("bad", blocks)
    nodes = [node("good", _good), parallel(instance, node("side", _good)) if place == "group" else instance]
    pairs = Pairs()
    begin = time.monotonic()
    try:
        runner = quick(store=store, node_timeouts={"bad": 20}, policy_map=ONCE, hooks=pairs.hooks)
        result = await runner.run(nodes, Num())
        assert time.monotonic() - begin < 5
        assert result.status is RunStatus.PARTIAL
        assert result.total_tokens == 0
        assert len(done) == 2
        nothing_runs()
    finally:
        release.set()
    for thread in done:
        await asyncio.to_thread(thread.join, 5)
    await asyncio.sleep(0)
    assert result.total_tokens == 0
    assert sum(event.node_id == "bad" for event in result.trace.walk()) == 2
    pairs.check()


async def test_tasks_that_a_node_starts_are_its_own() -> None:
    """A task that a node leaves behind is neither awaited nor cancelled by us, and changes no record."""
    left: list[asyncio.Task[Any]] = []

    async def starts(state: Num) -> Any:
        run = current_node()

        async def later() -> str:
            await asyncio.sleep(0.01)
            with pytest.raises(UsageError, match="after attempt 1 was counted"):
                run.report_usage(input_tokens=1000)
            return "done"

        left.append(asyncio.create_task(later()))
        return {"n": 1}, 1

    budget = ExecutionBudget(max_tokens_total=10)
    result = await quick(budget=budget).run([node("a", starts), node("b", _good)], Num())
    assert result.status is RunStatus.COMPLETED
    assert not left[0].done()
    assert await left[0] == "done"
    assert result.total_tokens == 1
    nothing_runs()


# ---------------------------------------------------------------------- hooks


async def _stubborn(*_: Any) -> None:
    for _i in range(3):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def _blocks(*_: Any) -> None:
    time.sleep(0.006)


def _raiser(error: Callable[[], BaseException], suspends: bool) -> Any:
    async def hook(*_: Any) -> None:
        if suspends:
            await asyncio.sleep(0)
        raise error()

    return hook


async def _mutates(*arguments: Any) -> None:
    for value in arguments:
        if isinstance(value, dict):
            value.clear()
            value["n"] = Evil()
        elif hasattr(value, "trace"):
            value.trace.rows.clear()
            value.status, value.final_state, value.total_tokens = "BROKEN", None, -1


STARTED: list[Any] = []


async def _starts_tasks(*_: Any) -> None:
    STARTED.append(asyncio.create_task(_raiser(lambda: LookupError("in a task of the hook's"), True)()))


async def _no_arguments() -> None: ...


MISCHIEF: dict[str, Any] = {
    "never-returns": forever,
    "stubborn": _stubborn,
    "blocks": _blocks,
    "raises-later": _raiser(Mute, True),
    "raises-odd": _raiser(Odd, True),
    "raises-cancelled": _raiser(asyncio.CancelledError, True),
    "mutates": _mutates,
    "starts-tasks": _starts_tasks,
    "wrong-arguments": lambda *arguments: _no_arguments(
        *arguments
    ),  # NodeHooks would refuse the hook itself.
}


def _busy_pipeline(calls: Counter[str]) -> list[Any]:
    """Nodes that make every kind of event: retries, a group, an item, cancelled siblings, a warning."""

    def flaky(name: str, kind: type[BaseModel] = Items) -> Any:
        left = [LookupError("first time"), None]

        async def func(state: Any) -> Any:
            calls[name] += 1
            await asyncio.sleep(0)
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return state, 10

        return node(name, func, kind, kind)

    async def waits(state: Any) -> Any:
        calls["waits"] += 1
        await asyncio.Event().wait()

    async def fails(state: Any) -> Any:
        calls["fails"] += 1
        await asyncio.sleep(0)
        raise ValueError("for good")

    return [
        flaky("a"),
        parallel(flaky("b"), flaky("c")),
        map_over("items", flaky("d", Num), into="out"),
        parallel(node("waits", waits), node("fails", fails)),
    ]


#: Events that this pipeline does not have.
ABSENT = ("on_node_suspended", "on_node_wait", "on_circuit_change", "on_limit_cooldown")


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("hook", [event for event in EVENTS if event not in ABSENT])
@pytest.mark.parametrize("kind", MISCHIEF)
async def test_hooks_change_nothing(kind: str, hook: str, store: Any) -> None:
    """G8: Calls, outcome, trace, totals and journal are the same with and without any hook."""
    budget = ExecutionBudget(max_tokens_total=45)

    async def once(hooks: Any, run_id: str) -> Any:
        calls: Counter[str] = Counter()
        nodes = _busy_pipeline(calls)
        runner = quick(store=store, budget=budget, policy_map=ONCE, hooks=hooks, hook_timeout_ms=5)
        first = await runner.run(nodes, Items(), run_id=run_id)
        second = await runner.run(nodes, Items(), run_id=run_id, resume=True)
        return calls, first, second

    plain = await once(NodeHooks(), "plain")
    assert (plain[1].status, plain[1].total_tokens) == (RunStatus.PARTIAL, 40)
    pairs = Pairs()
    hooked = await once([pairs.hooks, NodeHooks(**{hook: MISCHIEF[kind]})], "hooked")
    assert hooked[0] == plain[0]
    for mine, theirs in zip(hooked[1:], plain[1:], strict=True):
        assert mine.status is theirs.status
        assert mine.final_state.model_dump() == theirs.final_state.model_dump()
        assert mine.total_tokens == theirs.total_tokens
        assert mine.trace.diff(theirs.trace) == []
        assert type(mine.failure.exception) is type(theirs.failure.exception)
        assert all(failed.hook == hook for failed in mine.hook_errors)
    loud = kind.startswith(("raises", "never", "stubborn", "wrong"))
    assert bool(hooked[1].hook_errors or hooked[2].hook_errors) == loud
    pairs.check()
    await asyncio.gather(*STARTED, return_exceptions=True)
    STARTED.clear()
    nothing_runs()


class Refuses(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError(f"no {record.getMessage()}")


async def test_a_log_handler_changes_nothing(caplog: Any, capsys: Any, store: Any) -> None:
    """A handler or filter that raises costs no retry, hook or end of a run; stderr has its traceback."""
    calls: list[int] = []

    async def flaky(state: Num) -> Num:
        calls.append(state.n)
        if len(calls) == 1:
            raise ConnectionError("later")
        return state

    caplog.set_level(logging.DEBUG, logger="stroma")
    refuses = Refuses()
    caplog.handler.addFilter(refuses)
    try:
        runner = quick(
            store=store, policy_map=ONCE, hooks=NodeHooks(on_node_success=failing_with(ValueError))
        )
        result = await runner.run([node("flaky", flaky)], Num(n=1), run_id="r")
        again = await runner.run([node("flaky", flaky)], Num(n=1), run_id="r", resume=True)
    finally:
        caplog.handler.removeFilter(refuses)
    assert (result.status, again.status, calls) == (RunStatus.COMPLETED, RunStatus.RESUMED, [1, 1])
    assert [failed.hook for failed in result.hook_errors] == ["on_node_success"]
    assert "RuntimeError: no run 'r': node 'flaky' failed at attempt 1" in capsys.readouterr().err


# ---------------------------------------------------------------------- cancelled anywhere, then resumed


async def _spin(seconds: float) -> None:
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
async def test_cancelled_anywhere_then_resumed(
    twice: bool, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4, G5, G6, G9: A run that is cancelled at any await, even twice, loses no output that was returned."""
    monkeypatch.setattr("stroma.engine.loop.sleep", _spin)
    step = 3 if isinstance(store, SQLiteStore) else 1
    seen: Counter[str] = Counter()
    for at in range(0, 10_000, step):
        run_id = f"run {at}"
        returned: Counter[str] = Counter()
        began: Counter[str] = Counter()
        spent = 0
        failing = {"a": 1, "b": 1, "d": 1}

        def make(
            name: str,
            returned: Counter[str] = returned,
            began: Counter[str] = began,
            failing: dict[str, int] = failing,
        ) -> Any:
            async def func(state: Num) -> Any:
                nonlocal spent
                began[name] += 1
                current_node().report_usage(input_tokens=1)
                spent += 1
                await asyncio.sleep(0)
                if failing.get(name):
                    failing[name] -= 1
                    raise LookupError
                returned[name] += 1
                return {"n": state.n + 1}

            return node(name, func)

        nodes = [make("a"), parallel(make("b"), make("c")), make("d")]
        pairs = Pairs()

        async def dawdle(*_: Any) -> None:
            await asyncio.sleep(0)

        slow = NodeHooks(**dict.fromkeys(EVENTS, dawdle))
        budget = ExecutionBudget(max_tokens_total=1000)
        runner = quick(store=store, policy_map=ONCE, hooks=[pairs.hooks, slow], budget=budget)
        task = asyncio.create_task(runner.run(nodes, Num(), run_id=run_id))
        for _ in range(at):
            await asyncio.sleep(0)
        for _ in range(5 if twice else 1):
            task.cancel()
            await asyncio.sleep(0)
        try:
            finished = await task
        except asyncio.CancelledError:
            finished = None
        nothing_runs()
        if pairs.starts:
            pairs.check()
        before = returned.copy()
        seen.update(before.keys())
        held: list[int] = []

        async def look(*_: Any, held: list[int] = held) -> None:
            left = current_node().remaining_budget.tokens
            assert left is not None
            held.append(1000 - left)

        spent_before = spent
        again = await runner.with_hooks(NodeHooks(on_node_start=look)).run(
            nodes, Num(), run_id=run_id, resume=True
        )
        assert again.failure is None, again.failure
        assert again.final_state == Num(n=3)
        assert all(returned[name] == 1 for name in "abcd"), (at, returned)
        if held:
            assert held[0] == spent_before, at
        nothing_runs()
        if finished is not None:
            break
    else:
        raise AssertionError("the run never came to its end")
    assert set(seen) == set("abcd")


async def test_a_failed_group_leaves_no_cancellation_behind() -> None:
    """A group or TaskGroup that fails leaves the task uncancelled: a timeout around the run still works."""
    task = asyncio.current_task()

    async def fails(state: Num) -> Any:
        await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            result = await quick().run([parallel(node("side", _good), node("bad", fails))], Num())
            assert result.status is RunStatus.PARTIAL
            assert task.cancelling() == 0
            await asyncio.Event().wait()
    with pytest.raises(LookupError):
        await parallel(node("side", _good), node("bad", fails))(Num())
    assert task.cancelling() == 0


@pytest.mark.parametrize("first", ["node", "group"])
async def test_a_stray_cancellation_after_a_failed_task_group(first: str) -> None:
    """A node's own CancelledError is its failure also after a TaskGroup failed in the run."""
    healed = False

    async def fails(state: Num) -> Any:
        nonlocal healed
        await asyncio.sleep(0)
        if not healed:
            healed = True
            raise LookupError
        return state

    async def gathers(state: Num) -> Any:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fails(state))
        except* LookupError:
            pass
        return state

    group = parallel(node("side", _good), node("flaky", fails))
    before = node("gathers", gathers) if first == "node" else group
    runner = quick(node_policies={group.node_id: ONCE})
    result = await runner.run([before, node("bad", failing_with(asyncio.CancelledError))], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.node_id == "bad"


@pytest.mark.parametrize("at", range(8))
async def test_cancelled_while_a_child_fails(at: int) -> None:
    """A cancellation that meets the failure of a group's child is a cancellation all the same."""

    async def fails(state: Num) -> Any:
        for _ in range(3):
            await asyncio.sleep(0)
        raise LookupError

    async def slow_to_go(state: Num) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    pairs = Pairs()
    nodes = [parallel(node("slow", slow_to_go), node("bad", fails))]
    task = asyncio.create_task(quick(hooks=pairs.hooks).run(nodes, Num()))
    for _ in range(at):
        await asyncio.sleep(0)
    if not task.cancel():
        return  # The run had ended.
    with pytest.raises(asyncio.CancelledError):
        await task
    if pairs.starts:
        pairs.check()
    nothing_runs()


class Stops(BaseModel):
    n: int = 0

    @field_validator("n")
    @classmethod
    def _stops(cls, value: int) -> int:
        if value == 13:
            raise KeyboardInterrupt
        return value


async def _interrupts_later(*_: Any) -> Any:
    await asyncio.sleep(0)
    raise KeyboardInterrupt


def _interrupts_sync(*_: Any) -> Any:
    raise KeyboardInterrupt


async def _breaks(state: Any) -> Any:
    raise LookupError


STOPPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "node": (lambda: node("bad", failing_with(KeyboardInterrupt)), {}),
    "node-later": (lambda: node("bad", _interrupts_later), {}),
    "thread": (lambda: node("bad", _interrupts_sync), {}),
    "child": (lambda: parallel(node("side", _good), node("bad", _interrupts_later)), {}),
    "item": (lambda: map_over("items", node("bad", _interrupts_later), into="out"), {}),
    "output-validator": (lambda: node("bad", returning(({"n": 13}, 5)), Num, Stops), {}),
    "input-validator": (lambda: node("bad", _good, Stops, Num), {}),
    "classifier": (lambda: node("bad", _breaks), {"classifiers": [_interrupts_sync]}),
    "redact": (lambda: node("bad", _good), {"redact": _interrupts_sync}),
    **{hook: (lambda: node("bad", _good), {"hooks": hook}) for hook in ("on_node_start", "on_node_success")},
    "on_node_failure": (lambda: node("bad", _breaks), {"hooks": "on_node_failure"}),
    "on_node_retry": (lambda: node("bad", _breaks), {"hooks": "on_node_retry"}),
}


@pytest.mark.parametrize("where", STOPPED)
def test_keyboard_interrupt_anywhere(where: str, store: Any) -> None:
    """KeyboardInterrupt comes out from anywhere; what returned is kept, the run resumable, hooks pair."""
    make, config = STOPPED[where]
    config = dict(config)
    calls: Counter[str] = Counter()

    async def first(state: Items) -> Any:
        calls["first"] += 1
        return {"n": 13 if where == "input-validator" else 1, "items": [{"n": 1}]}

    healed = returning({"n": 7})
    pairs = Pairs()
    bad = make()
    sets = [pairs.hooks]
    if name := config.pop("hooks", None):

        async def hook(run_id: str, node_id: str, *_: Any) -> None:
            if node_id == "bad":
                raise KeyboardInterrupt

        sets = [NodeHooks(**{name: hook}), pairs.hooks]
        if name in ("on_node_success", "on_node_failure"):
            sets.reverse()  # Ends run last to first: ours is called before the one that stops it all.
            sets = [sets[1], sets[0]]
    if "redact" in config:
        config["redact"] = lambda state: (
            _interrupts_sync() if state.get("n") == 1 and calls["first"] else state
        )
    nodes = [node("first", first, Items, Items), bad]
    runner = quick(store=store, run_id="r", hooks=sets, policy_map=ONCE, **config)
    with pytest.raises(KeyboardInterrupt):
        runner.run_sync(nodes, Items())
    if where not in ("redact", *EVENTS):
        pairs.check()
    if isinstance(store, SQLiteStore):
        row = store.get_run("r")
        assert row.status == "INTERRUPTED"
    good = [
        nodes[0],
        {
            "child": lambda: parallel(node("side", _good), node("bad", healed)),
            "item": lambda: map_over("items", node("bad", healed), into="out"),
            "output-validator": lambda: node("bad", healed, Num, Stops),
        }.get(where, lambda: node("bad", healed))(),
    ]
    again = quick(store=store, run_id="r", resume=True).run_sync(good, Items())
    assert again.status is RunStatus.RESUMED, again.failure
    assert calls["first"] == 1


# ---------------------------------------------------------------------- Control-C


@pytest.mark.parametrize("during", ["await", "code", "backoff", "hook"])
def test_control_c(during: str, store: Any) -> None:
    """A real SIGINT under run_sync: KeyboardInterrupt comes out, what returned is kept, the rest resumes."""
    calls: Counter[str] = Counter()
    struck: list[int] = []

    def strike() -> None:
        if not struck:
            struck.append(1)
            signal.raise_signal(signal.SIGINT)

    async def first(state: Num) -> Any:
        calls["first"] += 1
        return {"n": 1}

    async def second(state: Num) -> Any:
        calls["second"] += 1
        if during == "code":
            strike()
        elif during == "await":
            asyncio.get_running_loop().call_soon(strike)
            await asyncio.sleep(0 if struck else 5)
        elif during == "backoff" and not struck:
            asyncio.get_running_loop().call_later(0.01, strike)
            raise LookupError
        return {"n": 2}

    async def last(state: Num) -> Any:
        calls["last"] += 1
        await asyncio.sleep(0)
        return {"n": 3}

    async def hook(run_id: str, node_id: str, *_: Any) -> None:
        if during == "hook" and node_id == "second":
            strike()
            await asyncio.sleep(0)

    slow = {c: FailurePolicy(max_retries=1, backoff_seconds=5, jitter=False) for c in FailureClass}
    pairs = Pairs()
    nodes = [node("first", first), node("second", second), node("last", last)]
    hooks = [pairs.hooks, NodeHooks(on_node_success=hook)]
    runner = quick(store=store, run_id="r", policy_map=slow, hooks=hooks)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run_sync(nodes, Num())
    assert time.monotonic() - begin < 4
    pairs.check()
    if isinstance(store, SQLiteStore):
        row = store.get_run("r")
        assert row.status in ("CANCELLED", "INTERRUPTED")
    again = runner.run_sync(nodes, Num(), resume=True)
    assert (again.status, again.final_state) == (RunStatus.RESUMED, Num(n=3))
    # Its function had returned, in these two: it is not called again.
    assert calls == {"first": 1, "second": 1 if during in ("code", "hook") else 2, "last": calls["last"]}


@pytest.mark.parametrize("name", WRONG)
async def test_hostile_steps(name: str) -> None:
    """A step is as safe as a node: a wrong output and an error are results; nothing is left."""
    runner = quick()
    ctx = context_of(runner)
    contract: NodeContract[Any, Any] = NodeContract(node_id="bad", input_schema=Num, output_schema=Num)

    hostile = computing(lambda _: WRONG[name]())
    result = await execute_step("bad", hostile, Num(), ctx, contract=contract)
    assert result.status is RunStatus.FAILED
    assert ("too deep" if name == "abyss" else "'bad'") in result.failure.message
    # Without a contract nothing is refused: whatever comes back does so as it was returned, or as a failure.
    free = await execute_step("free", hostile, Num(), ctx)
    assert free.status in RunStatus
    nothing_runs()


async def test_results_of_hostile_runs_can_be_pickled_or_say_why() -> None:
    """The trace of a run that went wrong is plain data, whatever the exception was."""

    async def hostile(state: Num) -> Any:
        raise Unpicklable(1, b=2)

    result = await quick().run([node("bad", hostile)], Num())
    events = list(result.trace)
    assert pickle.loads(pickle.dumps(events)) == events


# ---------------------------------------------------------------------- results


@pytest.mark.core
async def test_results_can_be_pickled_and_copied() -> None:
    """A result goes to another process whole with its trace, which reads there as here."""
    plus = computing(lambda state: ({"n": state.n + 1}, 5))
    nodes = [node("a", plus), parallel(node("b", plus), node("c", plus)), node("d", plus)]
    result = await quick().run(nodes, Num())
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert (twin.status, twin.final_state, twin.total_tokens) == (RunStatus.COMPLETED, Num(n=3), 20)
        assert twin.trace.diff(result.trace) == []
        assert list(twin.trace.walk()) == list(result.trace.walk())
