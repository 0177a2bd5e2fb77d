"""The guard: any callable as a step, which can be told from the bare one by nothing but its guarantees."""

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import gc
import importlib
import inspect
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.frameworks.kit import Seen, guard_of
from tests.kit import cancel, cancel_after, context_of, run_python, stuck

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    CheckpointManager,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    HookError,
    NodeContract,
    NodeHooks,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Usage,
    UsageError,
    current_node,
    current_node_or_none,
    execute_step,
)
from stroma.adapters import (
    Control,
    Guard,
    LoopAdapter,
    StepInterceptor,
    TurnAdapter,
    extract_state_dict,
    what_stopped,
)


class Passenger(BaseModel):
    name: str
    seat: int = 1


class Ticket(BaseModel):
    code: str


class Anything(BaseModel):
    pass


class Flaky:
    """Raises what it is given, one after the other, then returns."""

    def __init__(self, *errors: BaseException, result: Any = "done") -> None:
        self.errors = list(errors)
        self.result = result
        self.calls = 0

    def step(self) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.result


# ---------------------------------------------------------------------- the same callable


async def run_it(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a guarded callable in the way that fits it."""
    instance = func(*args, **kwargs)
    if inspect.isasyncgen(instance) or inspect.isgenerator(instance):
        return [part async for part in parts_of(instance)]
    return await instance if inspect.isawaitable(instance) else instance


async def parts_of(stream: Any) -> Any:
    """Yield the parts of a stream of either kind."""
    if inspect.isgenerator(stream):
        for part in stream:
            yield part
    else:
        async for part in stream:
            yield part


async def read_and_close(stream: Any, count: int) -> None:
    """Read so many parts of a stream of either kind, then close it."""
    for _ in range(count):
        next(stream) if inspect.isgenerator(stream) else await anext(stream)
    stream.close() if inspect.isgenerator(stream) else await stream.aclose()


def as_stream(kind: str, source: Any) -> Any:
    """Return a generator function, or an async one of the same parts."""

    @functools.wraps(source)
    async def astream(*args: Any) -> Any:
        for part in source(*args):
            yield part

    return source if kind == "stream" else astream


def plain(a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
    return a, b, rest, key, more


async def coroutine(a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
    return a, b, rest, key, more


def generator(a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
    yield from (a, b, rest, key, more)


async def async_generator(a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
    for chunk in (a, b, rest, key, more):
        yield chunk


class Holder:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def method(self, a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
        return self.factor, a, b, rest, key, more

    async def async_method(self, a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
        return self.factor, a, b, rest, key, more

    @classmethod
    def of_class(cls, a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
        return cls.__name__, a, b, rest, key, more

    def __call__(self, a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
        return self.factor, a, b, rest, key, more


class AsyncCallable:
    async def __call__(self, a: int, b: int = 2, *rest: int, key: str = "k", **more: Any) -> Any:
        return a, b, rest, key, more


CALLABLES = {
    "function": plain,
    "coroutine": coroutine,
    "generator": generator,
    "async generator": async_generator,
    "method": Holder(3).method,
    "async method": Holder(3).async_method,
    "classmethod": Holder.of_class,
    "object": Holder(3),
    "async object": AsyncCallable(),
    "partial": functools.partial(plain, 7, key="p"),
    "async partial": functools.partial(coroutine, 7, key="p"),
    "generator partial": functools.partial(generator, 7, key="p"),
    "lambda": lambda a, b=2, *rest, key="k", **more: (a, b, rest, key, more),
}


@pytest.mark.parametrize("name", CALLABLES)
async def test_a_guarded_callable_looks_like_the_bare_one_and_returns_the_same(name: str) -> None:
    """Any arguments reach any callable unchanged; its signature, name, documentation and kind stay."""
    func = CALLABLES[name]
    wrapped = guard_of().wrap("it", func)
    calls: list[Any] = [((1,), {"other": 4, "self_": 0}), ((1, 5, 6, 7), {"key": "z", "other": 9})]
    for args, kwargs in calls:
        assert await run_it(wrapped, *args, **kwargs) == await run_it(func, *args, **kwargs)
    assert inspect.signature(wrapped) == inspect.signature(func)
    bare = func
    while isinstance(bare, functools.partial):
        bare = bare.func
    for asks in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        expected = asks(bare) or asks(getattr(bare, "__call__", None))  # noqa: B004
        assert asks(wrapped) == expected, asks.__name__
    if hasattr(func, "__name__"):
        assert wrapped.__name__ == func.__name__
        assert wrapped.__doc__ == func.__doc__


def test_a_method_can_be_decorated_where_it_is_defined() -> None:
    """A step in a class body binds like a method, also above the decorator of a static or class method;
    neither self nor cls is part of its input."""
    guard = guard_of()

    class Desk:
        def __init__(self) -> None:
            self.sold = 0

        @guard.step("sell", input=Passenger)
        def sell(self, name: str) -> str:
            self.sold += 1
            return f"{name} {self.sold}"

        @guard.step("close")
        @classmethod
        def close(cls, hour: int) -> str:
            return f"{cls.__name__} {hour}"

        @guard.step("price")
        @staticmethod
        def price(seats: int) -> int:
            return seats * 5

    desk = Desk()
    assert (desk.sell("Ada"), desk.sell(name="Bo")) == ("Ada 1", "Bo 2")
    events = guard.current.ctx.trace
    assert [event.input_state for event in events] == [{"name": "Ada", "seat": 1}, {"name": "Bo", "seat": 1}]
    assert (desk.close(8), Desk.close(9), desk.price(2), Desk.price(3)) == ("Desk 8", "Desk 9", 10, 15)
    inputs = [event.input_state for event in events][2:]
    assert inputs == [{"hour": 8}, {"hour": 9}, {"seats": 2}, {"seats": 3}]


def test_the_wrong_arguments_are_the_callers_error() -> None:
    """A call that the signature does not allow raises the TypeError that it would raise unguarded."""
    wrapped = guard_of().wrap("it", lambda a: a)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        wrapped()


def test_what_cannot_be_a_step_is_refused() -> None:
    with pytest.raises(TypeError, match="not callable"):
        guard_of().wrap("it", 3)
    with pytest.raises(ValueError, match="must not be empty"):
        guard_of().wrap("", plain)


@pytest.mark.core
def test_a_plain_function_that_returns_a_coroutine_is_named() -> None:
    """What would run behind the guard's back is a TypeError at the first call that says how to declare it."""
    calls = []

    def hidden() -> Any:
        calls.append(1)
        return coroutine(1)

    with pytest.raises(TypeError, match="markcoroutinefunction"):
        guard_of().wrap("it", hidden)()
    assert len(calls) == 1
    assert asyncio.run(guard_of().wrap("it", hidden, kind="acall")()) == (1, 2, (), "k", {})


def test_the_very_object_is_passed_and_returned() -> None:
    """What a framework means by an object that it gets back (a Command, a message) is not lost in a copy."""

    class Command:
        def __init__(self) -> None:
            self.update, self.goto = {"a": 1}, "there"

    instance, guard = Command(), guard_of()
    assert guard.wrap("it", lambda given: given)(instance) is instance
    assert guard.current.ctx.trace._events[0].output_state == {"update": {"a": 1}, "goto": "there"}


# ---------------------------------------------------------------------- sync code stays what it is


def test_a_sync_step_runs_in_the_thread_of_its_caller() -> None:
    """Thread-locals, an absent event loop and asyncio.run() work in it as they would unguarded."""
    local = threading.local()
    local.value = "mine"

    def look() -> tuple[int, str, str]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()

        async def inner() -> str:
            return "ran"

        return threading.get_ident(), local.value, asyncio.run(inner())

    assert guard_of().wrap("it", look)() == (threading.get_ident(), "mine", "ran")


async def test_a_sync_step_can_be_called_where_a_loop_is_running() -> None:
    """It blocks like the bare function, and its async hooks run all the same."""
    seen = Seen()
    guard = guard_of(seen)
    assert guard.wrap("it", lambda: threading.get_ident())() == threading.get_ident()
    assert seen.lines == ["start it", "success it"]


VALUE: contextvars.ContextVar[str] = contextvars.ContextVar("value", default="none")


@pytest.mark.core
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_context_variables_are_kept(kind: str) -> None:
    """A step sees its caller's variables, its caller sees its own, but not what a start hook set."""
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="no span")

    async def start(*_: Any) -> None:
        span.set("the span")

    guard = guard_of(hooks=NodeHooks(on_node_start=start))

    def work() -> tuple[str, str]:
        seen = VALUE.get(), span.get()
        VALUE.set("set inside")
        return seen

    async def awork() -> tuple[str, str]:
        return work()

    def outside() -> None:
        VALUE.set("given")
        if kind == "sync":
            assert guard.wrap("it", work)() == ("given", "the span")
            assert span.get() == "no span"
        else:

            async def main() -> None:
                assert await guard.wrap("it", awork)() == ("given", "the span")
                assert VALUE.get() == "set inside"

            asyncio.run(main())
            return
        assert VALUE.get() == "set inside"
        assert current_node_or_none() is None

    contextvars.copy_context().run(outside)


@pytest.mark.core
def test_a_hook_may_call_a_sync_step() -> None:
    """The hook of a sync step runs on the background loop, so a sync step that it calls cannot deadlock."""
    calls: list[str] = []

    async def start(_run: str, node_id: str, _state: Any) -> None:
        if node_id == "outer":
            inner()

    guard = guard_of(hooks=NodeHooks(on_node_start=start))
    inner = guard.wrap("inner", lambda: calls.append("inner"))
    guard.wrap("outer", lambda: calls.append("outer"))()
    assert calls == ["inner", "outer"]
    # The loop that was made for that call alone is gone with it.
    alive = [thread for thread in threading.enumerate() if thread.name == "stroma-guard"]
    for thread in alive[1:]:
        thread.join(10)
    assert sum(thread.is_alive() for thread in alive) == 1


def test_steps_inside_steps_to_any_depth() -> None:
    """A sync step that calls itself nests as deep as it is called."""
    guard = guard_of()

    @guard.step("down")
    def down(n: int) -> int:
        return 0 if n == 0 else 1 + down(n - 1)

    assert down(20) == 20
    events = list(guard.current.ctx.trace.walk())
    assert len(events) == 21
    assert len(guard.current.ctx.trace) == 1
    assert events[-1].branch.count(".") == 19


# ---------------------------------------------------------------------- contracts


SIGN = NodeContract(node_id="sign", input_schema=Passenger, output_schema=Ticket)


@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
def test_bad_input_is_caught_before_the_call(kind: str) -> None:
    """G1: a contract violation on input is raised at its step, and the function is never called."""
    called: list[str] = []
    seen = Seen()
    guard = guard_of(seen)
    func = guard.wrap("sign", _made(kind, lambda name: called.append(name) or {"code": "x"}), contract=SIGN)
    with pytest.raises(ContractViolation) as caught:
        _drive(func, 7)
    assert (caught.value.node_id, caught.value.direction) == ("sign", "input")
    assert called == []
    assert seen.lines == ["failure sign"]


@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
def test_bad_output_is_caught_at_its_step(kind: str) -> None:
    """G1: a contract violation on output is raised in place of the result, which was counted."""
    guard = guard_of()
    func = _made(kind, lambda name: {"code": 7})
    options: dict[str, Any] = {"collect": lambda chunks: chunks[0]} if "stream" in kind else {}
    step = guard.wrap("sign", func, contract=SIGN, usage=lambda instance: Usage(3, 4), **options)
    with pytest.raises(ContractViolation) as caught:
        _drive(step, "Ada")
    assert (caught.value.node_id, caught.value.direction) == ("sign", "output")
    assert guard.current.ctx.cost_tracker.total_tokens == 7
    assert guard.stopped.exception is caught.value


def _made(kind: str, func: Any) -> Any:
    """A function of ``name`` of a kind, which does what ``func`` does."""

    def sync(name: Any) -> Any:
        return func(name)

    async def acall(name: Any) -> Any:
        return func(name)

    def stream(name: Any) -> Any:
        yield func(name)

    return {"sync": sync, "async": acall}.get(kind) or as_stream(kind, stream)


def _calling(kind: str, tool: Any, first: Any = id) -> Any:
    """Return a function of a kind that calls ``first``, then a tool of this kind."""

    def agent(name: Any) -> Any:
        first(name)
        return tool(name)

    async def aagent(name: Any) -> Any:
        return await agent(name)

    return agent if kind == "sync" else aagent


def _drive(func: Any, *args: Any) -> Any:
    return asyncio.run(run_it(func, *args))


@dataclasses.dataclass
class PassengerData:
    name: str
    seat: int = 1


class PassengerObject:
    def __init__(self, name: Any) -> None:
        self.name = name


class SlottedPassenger:
    """Nothing of it is in a ``__dict__``."""

    __slots__ = ("_name",)

    def __init__(self, name: Any) -> None:
        self._name = name

    @property
    def name(self) -> Any:
        return self._name


class Trip(BaseModel):
    passenger: Passenger


@pytest.mark.parametrize(
    "state",
    [
        {"name": "Ada"},
        Passenger(name="Ada"),
        PassengerData("Ada"),
        PassengerObject("Ada"),
        functools.partial(dict, name="Ada")(),
    ],
)
def test_states_of_any_kind_are_validated_by_their_attributes(state: Any) -> None:
    """A dict, a model, a dataclass and an object with attributes fit one contract, and arrive unchanged."""
    guard = guard_of()
    step = guard.wrap_step("sign", lambda state: state, SIGN.model_copy(update={"output_schema": Passenger}))
    assert step(state) is state
    assert guard.current.ctx.trace._events[0].output_state == {"name": "Ada", "seat": 1}


@pytest.mark.core
def test_objects_deep_inside_are_validated_by_their_attributes() -> None:
    contract = NodeContract(node_id="it", input_schema=Trip, output_schema=Trip)
    step = guard_of().wrap_step("it", lambda state: state, contract)
    for passenger in (PassengerObject("Ada"), SlottedPassenger("Ada")):
        trip = {"passenger": passenger}
        assert step(trip) is trip
    with pytest.raises(ContractViolation, match=r"passenger\.name"):
        step({"passenger": PassengerObject(7)})


class Word(RootModel[str]):
    pass


def test_a_plain_result_is_the_only_required_field_or_the_root() -> None:
    """A tool that returns text satisfies a contract of one text."""
    guard = guard_of()
    assert guard.step("one", output=Ticket)(lambda: "T1")() == "T1"
    assert guard.step("two", output=Word)(lambda: "T2")() == "T2"
    with pytest.raises(ContractViolation):
        guard.step("three", output=Word)(lambda: 3)()
    with pytest.raises(ContractViolation):
        guard.step("four", output=Trip)(lambda: (1, 2))()


def test_the_registry_holds_contracts_for_steps_too() -> None:
    """A contract that the runner has for the id of a step is obeyed without being named again."""
    guard = guard_of()
    guard.registry.register(SIGN)
    step = guard.wrap_step("sign", lambda state, extra=None: {"code": state["name"]})
    assert step({"name": "Ada"}, extra=1) == step(state={"name": "Ada"}) == {"code": "Ada"}
    with pytest.raises(ContractViolation):
        step({"nom": "Ada"})


def test_contract_retries_ask_again() -> None:
    """A granted repair calls the step again, which finds what was wrong."""
    guard = guard_of(contract_retries={"sign": 1})
    seen = []

    @guard.step("sign", output=Ticket)
    def sign() -> dict[str, Any]:
        node = current_node()
        seen.append(node.last_failure and node.last_failure.as_prompt())
        return {"code": 7 if node.attempt == 1 else "T"}

    assert sign() == {"code": "T"}
    assert seen[0] is None
    assert "code" in seen[1]


def test_every_attempt_of_a_mutating_step_is_traced_as_it_was_given() -> None:
    """G7: A step that changes its arguments changes no event."""
    guard = guard_of()

    @guard.step("eat")
    def eat(basket: list[str]) -> None:
        basket.clear()

    eat(["apple"])
    assert guard.current.ctx.trace._events[0].input_state == {"basket": ["apple"]}


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
def test_a_transient_failure_is_retried_and_a_terminal_one_is_not(kind: str) -> None:
    """G3, and what comes out is the very exception that the function raised."""
    for error, calls in ((TimeoutError("slow"), 3), (ConnectionError("gone"), 3), (ValueError("odd"), 2)):
        flaky = Flaky(*[error] * calls)
        step = guard_of().wrap("it", _made(kind, lambda _, flaky=flaky: flaky.step()))
        with pytest.raises(type(error)) as caught:
            _drive(step, "x")
        assert caught.value is error
        assert flaky.calls == calls
    flaky = Flaky(TimeoutError(), TimeoutError())
    step = guard_of().wrap("it", _made(kind, lambda _: flaky.step()))
    assert _drive(step, "x") == (["done"] if "stream" in kind else "done")
    terminal = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    flaky = Flaky(ValueError("no"), ValueError("no"))
    with pytest.raises(ValueError):
        _drive(terminal.wrap("it", _made(kind, lambda _: flaky.step())), "x")
    assert flaky.calls == 1


@pytest.mark.core
def test_a_step_that_must_not_be_called_again_is_not() -> None:
    """``can_retry=False``: whatever the policy says, one failure is all."""
    flaky = Flaky(TimeoutError("slow"))
    guard = guard_of()
    with pytest.raises(TimeoutError), guard.run() as run:
        guard.wrap("pay", flaky.step, can_retry=False)()
    assert flaky.calls == 1
    assert run.result.status is RunStatus.PARTIAL


@pytest.mark.parametrize(
    "error", [StopIteration("over"), StopAsyncIteration("over"), asyncio.CancelledError("own")]
)
def test_exceptions_that_python_itself_reads_come_out_as_themselves(error: BaseException) -> None:
    """StopIteration and the like from a plain function are what its caller gets."""
    flaky = Flaky(*[error] * 5)
    with pytest.raises(type(error)) as caught:
        guard_of().wrap("it", flaky.step)()
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("kind", ["sync", "stream"])
def test_a_process_that_is_told_to_stop_stops(error: BaseException, kind: str) -> None:
    """KeyboardInterrupt and SystemExit pass at once, the attempt ends as cancelled, the guard serves on."""
    seen = Seen()
    guard = guard_of(seen)
    flaky = Flaky(error)
    step = guard.wrap("it", _made(kind, lambda _: flaky.step()))
    with pytest.raises(type(error)):
        list(step("x"))
    assert seen.lines == ["start it", "cancelled it"]
    assert list(step("x")) in (["done"], list("done"))


@pytest.mark.core
def test_retries_do_not_multiply_with_depth() -> None:
    """What an inner step gave up is not tried again by those around it, however it was wrapped on its way."""
    flaky = Flaky(*[TimeoutError("slow")] * 100)
    guard = guard_of()
    inner = guard.wrap("inner", flaky.step)

    @guard.step("middle")
    def middle() -> Any:
        try:
            return inner()
        except TimeoutError as error:
            raise RuntimeError("the tool failed") from error

    @guard.step("outer")
    def outer() -> Any:
        try:
            return middle()
        except RuntimeError:
            raise LookupError("no answer")  # noqa: B904 the context alone says where it came from

    with pytest.raises(LookupError, match="no answer"), guard.run() as run:
        outer()
    assert flaky.calls == 3
    assert isinstance(run.stopped.exception, TimeoutError)
    assert run.stopped.node_id == "inner"
    assert run.result.status is RunStatus.PARTIAL


@pytest.mark.core
def test_a_level_that_is_given_a_policy_does_try_again() -> None:
    """``node_policies`` with an outer step's id asks for what is otherwise not done."""
    flaky = Flaky(*[TimeoutError("slow")] * 4)
    once = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0)}
    policies = {"outer": {**once, FailureClass.AMBIGUOUS: once[FailureClass.RECOVERABLE]}}
    guard = guard_of(policy_map=once, node_policies=policies)
    inner = guard.wrap("inner", flaky.step)
    with pytest.raises(TimeoutError):
        guard.wrap("outer", lambda: inner())()
    assert flaky.calls == 4


def test_a_failure_that_the_framework_handles_stops_nothing() -> None:
    """An outer step that goes on without an inner one succeeds, and nothing stopped the run."""
    guard = guard_of()
    inner = guard.wrap("inner", Flaky(*[ValueError("odd")] * 9).step)

    @guard.step("outer")
    def outer() -> str:
        try:
            return inner()
        except ValueError:
            return "without"

    with guard.run() as run:
        assert outer() == "without"
    assert run.stopped is None
    assert run.result.status is RunStatus.COMPLETED


# ---------------------------------------------------------------------- control flow


class Steering(Exception):
    pass


@pytest.mark.core
@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
@pytest.mark.parametrize("outcome", ["suspended", "returned", "passed"])
def test_exceptions_that_steer_pass_untouched_and_are_not_retried(kind: str, outcome: str) -> None:
    """What a framework means by an exception happens once, and is told as what it is, at every level."""
    seen = Seen()
    guard = guard_of(seen)
    steering = Steering("go there")
    flaky = Flaky(steering)

    def control(error: BaseException) -> Control | None:
        return (
            Control(outcome, {"code": "T"} if outcome == "returned" else "an answer")
            if error is steering
            else None
        )

    inner = guard.wrap("inner", lambda: flaky.step(), control=control)
    outer = guard.wrap("outer", _made(kind, lambda _: inner()), control=control)
    with pytest.raises(Steering) as caught, guard.run() as run:
        _drive(outer, "x")
    assert caught.value is steering
    assert flaky.calls == 1
    end, status = {
        "suspended": ("suspended", "SUSPENDED"),
        "returned": ("success", "PARTIAL"),
        "passed": ("failure", "FAILED"),
    }[outcome]
    inside = ["start outer", "start inner < outer", f"{end} inner < outer", f"{end} outer"]
    assert seen.lines == ["run start", *inside, f"run end {status}"]
    assert run.result.suspended == (["an answer"] if outcome == "suspended" else [])


# ---------------------------------------------------------------------- money


@pytest.mark.core
def test_only_the_innermost_step_books_what_was_used() -> None:
    """Tokens count once: an outer step that reports the total adds only what nobody inside has counted."""
    guard = guard_of()
    model = guard.wrap("model", lambda: "text", usage=lambda _: Usage(10, 5))

    @guard.step("agent", usage=lambda total: total)
    def agent() -> Usage:
        model()
        model()
        return Usage(26, 12)

    with guard.run() as run:
        agent()
    assert run.result.total_tokens == 38
    spent = [(event.node_id, event.usage.tokens) for event in run.result.trace.walk()]
    assert spent == [("agent", 8), ("model", 15), ("model", 15)]


@pytest.mark.core
@pytest.mark.parametrize(
    "used",
    [
        Usage(1000, 100, model="my-model", cost_usd=0.5),
        Usage(100_000, 100, cached_input_tokens=99_000, model="claude-haiku-4-5"),
        Usage(99_000, 100, cache_write_tokens=9_000, cache_write_1h_tokens=9_000, model="claude-haiku-4-5"),
        Usage(100_000, 100, model="claude-haiku-4-5", tier="batch"),
    ],
)
def test_a_total_costs_the_same_with_a_counted_call_inside(used: Usage) -> None:
    """A step that reports a total keeps its reported cost, cache and tier, less what inner steps counted."""

    def cost(inner: Usage | None) -> float:
        guard = guard_of()
        tool = guard.wrap("tool", lambda: "text", usage=lambda _: inner)

        @guard.step("agent", usage=lambda total: total)
        def agent() -> Usage:
            tool()
            return used

        with guard.run() as run:
            agent()
        assert run.result.total_tokens == used.input_tokens + used.output_tokens
        return run.result.total_cost_usd

    assert cost(Usage(1, 1, model="claude-haiku-4-5")) == pytest.approx(cost(None), abs=1e-5)


def test_tokens_of_failed_attempts_count() -> None:
    """G6: The tokens of failed attempts and of invalid answers count."""
    guard = guard_of(contract_retries={"it": 1})
    answers = [{"code": 1}, {"code": "T"}]
    contract = NodeContract(node_id="it", input_schema=Anything, output_schema=Ticket)
    step = guard.wrap("it", lambda: answers.pop(0), contract=contract, usage=lambda _: Usage(10, 1))

    @guard.step("outer")
    def outer() -> Any:
        node = current_node()
        node.report_usage(input_tokens=100)
        if node.attempt == 1:
            raise TimeoutError
        return step()

    outer()
    assert guard.current.ctx.cost_tracker.total_tokens == 222


def test_the_budget_is_checked_before_and_after_each_call() -> None:
    """The call that crosses the limit raises, and none follows, however often a framework swallows it."""
    calls: list[int] = []
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    model = guard.wrap("model", lambda: calls.append(1), usage=lambda _: Usage(8, 2))

    @guard.step("agent")
    def agent() -> str:
        for _ in range(6):
            try:
                model()
            except BudgetExceeded:
                continue
        return "finished anyway"

    with guard.run() as run:  # Its code goes on as if nothing had happened.
        with pytest.raises(BudgetExceeded) as caught:
            agent()
    assert (caught.value.limit, caught.value.actual) == (25, 30)
    assert len(calls) == 3
    assert run.result.status is RunStatus.PARTIAL
    assert run.result.total_tokens == 30
    assert run.stopped.node_id == "model"
    assert guard.stopped == run.stopped


@pytest.mark.core
def test_no_guarded_call_follows_one_without_a_price() -> None:
    """G6: Under a cost limit no guarded call follows one without a price, also if a framework swallows it."""
    guard, calls = guard_of(budget=ExecutionBudget(max_cost_usd=5.0)), []
    model = guard.wrap("model", lambda: calls.append(1), usage=lambda _: Usage(8, 2, model="unheard-of"))
    with guard.run() as run:
        for _ in range(3):
            with pytest.raises(UsageError):
                model()
    assert (run.result.status, run.result.failure.reason, len(calls)) == (RunStatus.FAILED, "usage", 1)


@pytest.mark.core
def test_what_stopped_it_is_found_behind_what_the_framework_made_of_it() -> None:
    """Five frameworks wrap what they are given; the cause is found through causes, contexts and groups."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=5))
    model = guard.wrap("model", lambda: "x", usage=lambda _: Usage(8, 2))

    def framework() -> None:
        failed: list[Exception] = [KeyError(1)]
        try:
            model()
        except Exception as error:
            failed.append(error)
        try:
            raise RuntimeError("pipeline failed") from ExceptionGroup("tasks", failed)
        except RuntimeError:
            raise OSError("agent failed")  # noqa: B904

    with pytest.raises(OSError) as caught, guard.run() as run:
        framework()
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert isinstance(run.stopped and run.stopped.exception, BudgetExceeded)
    assert what_stopped(OSError()) is None


def test_bad_usage_keeps_the_output_and_stops() -> None:
    """Figures that cannot be counted are a terminal failure, not a second call."""
    flaky = Flaky()
    step = guard_of().wrap("it", flaky.step, usage=lambda _: object())
    with pytest.raises(ValueError, match="carries no usage"):
        step()
    assert flaky.calls == 1


# ---------------------------------------------------------------------- streams


@pytest.mark.core
@pytest.mark.parametrize("kind", ["stream", "astream"])
def test_a_stream_is_retried_until_its_first_chunk_and_never_after(kind: str) -> None:
    """What was handed on cannot be taken back; what was not is asked for again."""
    starts = []

    def chunks(fail_at: int) -> Any:
        starts.append(fail_at)
        for n in range(3):
            if n == fail_at and len(starts) < 3:
                raise TimeoutError(str(n))
            yield n

    got: list[int] = []

    async def read(fail_at: int) -> None:
        async for chunk in parts_of(step(fail_at)):
            got.append(chunk)

    guard = guard_of()
    step = guard.wrap("it", as_stream(kind, chunks), usage=lambda seen: Usage(len(seen)))
    asyncio.run(read(0))
    assert (got, starts) == ([0, 1, 2], [0, 0, 0])
    assert guard.current.ctx.cost_tracker.total_tokens == 3
    starts.clear()
    got.clear()
    with pytest.raises(TimeoutError, match="1"):
        asyncio.run(read(1))
    assert (got, starts) == ([0], [1])


async def test_a_generator_is_driven_like_the_bare_one() -> None:
    """Sent values reach a guarded generator, of either kind, and its return value the caller."""

    def talk() -> Any:
        yield (yield (yield 0))
        return "end"

    async def atalk() -> Any:
        yield (yield (yield 0))

    guard = guard_of()
    stream, astream = guard.wrap("talk", talk)(), guard.wrap("atalk", atalk)()
    assert [stream.send(value) for value in (None, "a", None)] == [0, "a", None]
    assert [await astream.asend(value) for value in (None, "a", None)] == [0, "a", None]
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == "end"
    await astream.aclose()


@pytest.mark.parametrize("kind", ["stream", "astream"])
async def test_an_abandoned_stream_is_cancelled_and_what_it_has_used_counts(kind: str) -> None:
    """G6, G9: a reader that leaves half-way has paid for what came; its source is closed, its start has an
    end."""
    closed = []

    def source() -> Any:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    guard = guard_of(seen := Seen())
    usages: list[Any] = [lambda chunks: Usage(len(chunks)), lambda chunks: 1 // 0]
    for usage in usages:
        await read_and_close(guard.wrap("it", as_stream(kind, source), usage=usage)(), 2)
    assert (closed, seen.lines) == ([True] * 2, ["start it", "cancelled it"] * 2)
    events = list(guard.current.ctx.trace)
    assert [(event.outcome, event.usage.tokens) for event in events] == [("cancelled", 2), ("cancelled", 0)]
    assert guard.current.ctx.cost_tracker.total_tokens == 2


@pytest.mark.parametrize("kind", ["stream", "astream"])
@pytest.mark.parametrize("collect", [None, lambda chunks: chunks])
def test_what_a_stream_has_used_before_it_fails_counts(kind: str, collect: Any) -> None:
    """G6: the provider's last event has arrived and is paid for, so the budget refuses the next call."""
    calls: list[int] = []

    def source() -> Any:
        calls.append(1)
        yield "text"
        yield Usage(100)
        raise ConnectionError("the stream broke")

    def used(chunks: list[Any]) -> Usage | None:
        return next((chunk for chunk in chunks if isinstance(chunk, Usage)), None)

    guard = guard_of(budget=ExecutionBudget(max_tokens_total=150))
    step = guard.wrap("it", as_stream(kind, source), usage=used, collect=collect)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            _drive(step)
    with pytest.raises(BudgetExceeded):
        _drive(step)
    assert len(calls) == 2
    events = [(event.outcome, event.usage.tokens) for event in guard.current.ctx.trace]
    assert events == [("failure", 100), ("failure", 100)]
    assert guard.current.ctx.cost_tracker.total_tokens == 200


async def test_a_stream_whose_task_group_fails_is_tried_again() -> None:
    """G3: a task group that fails before the first part of a stream is a failure, and no cancellation."""
    calls: list[int] = []

    async def connect() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("no server")

    async def source() -> Any:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connect())
        yield "text"

    guard = guard_of()
    assert [chunk async for chunk in guard.wrap("it", source)()] == ["text"]
    assert [event.outcome for event in guard.current.ctx.trace] == ["failure", "success"]


async def test_a_stream_that_failed_and_is_cancelled_counts_once() -> None:
    """G6: its reader is cancelled while the failure is recorded."""
    began = asyncio.Event()

    async def failing(*_: Any) -> None:
        began.set()
        await asyncio.sleep(60)

    async def source() -> Any:
        yield Usage(100)
        raise ConnectionError("the stream broke")

    async def read() -> None:
        async for _ in guard.wrap("it", source, usage=lambda chunks: chunks[0])():
            pass

    guard = guard_of(hooks=NodeHooks(on_node_failure=failing))
    await cancel_after(read(), began)
    assert guard.current.ctx.cost_tracker.total_tokens == 100


@pytest.mark.parametrize("can_retry", [True, False])
async def test_a_time_limit_is_no_reason_to_repeat_what_must_not_be_repeated(can_retry: bool) -> None:
    """A stream that has given a part and a step with ``can_retry=False`` are not retried after a timeout."""
    calls: list[int] = []
    parts: list[str] = []

    async def stream() -> Any:
        calls.append(1)
        yield "a"
        await asyncio.sleep(60)

    async def slow() -> None:
        calls.append(1)
        await asyncio.sleep(60)

    policies: Any = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0)}
    guard = guard_of(node_timeouts={"it": 20}, policy_map=policies)
    with pytest.raises(TimeoutError, match="did not end within 20 ms"):
        if can_retry:
            async for part in guard.wrap("it", stream)():
                parts.append(part)
        else:
            await guard.wrap("it", slow, can_retry=False)()
    assert (calls, parts) == ([1], ["a"] if can_retry else [])


@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
def test_a_late_call_is_over_before_it_is_repeated(kind: str) -> None:
    """A call that exceeds its time limit does not overlap its retry: the caller gets the answer once."""
    calls: list[int] = []

    def late() -> float:
        calls.append(1)
        return 0.15 if len(calls) == 1 else 0

    def call() -> list[str]:
        time.sleep(late())
        return ["a", "b"]

    async def acall() -> list[str]:
        await asyncio.sleep(late())
        return ["a", "b"]

    def stream() -> Any:
        yield from call()

    async def astream() -> Any:
        for part in await acall():
            yield part

    functions = {"sync": call, "async": acall, "stream": stream, "astream": astream}
    guard = guard_of(node_timeouts={"it": 50})
    with guard.run() as run:
        answer = _drive(guard.wrap("it", functions[kind], usage=lambda _: Usage(10, 0, model="gpt-4o")))
    assert (answer, len(calls)) == (["a", "b"], 2)
    assert [event.failure for event in run.result.trace] == [FailureClass.RECOVERABLE, None]
    # A plain function returns its paid result, late.
    assert run.result.total_tokens == (20 if kind == "sync" else 10)


def test_a_late_stream_ends_at_its_next_part() -> None:
    """A stream that exceeds its time limit between two parts ends, and its source is closed."""
    closed: list[str] = []

    def stream() -> Any:
        try:
            yield "a"
            time.sleep(0.1)
            yield "b"
        finally:
            closed.append("closed")

    step = guard_of(node_timeouts={"it": 50}).wrap("it", stream)
    parts = step()
    assert next(parts) == "a"
    with pytest.raises(TimeoutError, match="'it' did not end within 50 ms"):
        next(parts)
    assert closed == ["closed"]


def test_steps_between_the_chunks_of_a_stream_are_not_inside_it() -> None:
    """What the reader of a stream does between two chunks has the reader's place, its source the stream's."""
    guard = guard_of()
    other = guard.wrap("other", lambda: None)
    inner = guard.wrap("inner", lambda: None)

    @guard.step("stream")
    def stream() -> Any:
        for n in range(2):
            inner()
            yield n

    for _ in stream():
        other()
        assert current_node_or_none() is None
    trace = guard.current.ctx.trace
    assert [event.node_id for event in trace] == ["other", "other", "stream"]
    assert [event.node_id for event in trace._events[2].children] == ["inner", "inner"]


# ---------------------------------------------------------------------- runs, hooks and the journal


@pytest.mark.parametrize("awaits", range(3))
@pytest.mark.parametrize("kind", ["async with", "aover"])
async def test_a_run_that_is_cancelled_while_it_begins_ends(kind: str, awaits: int) -> None:
    """G9: A guarded run whose caller is cancelled in its start hook, or right after it, has one end hook."""
    ends: list[RunStatus] = []
    begun = asyncio.Event()

    async def on_run_start(*_: Any) -> None:
        begun.set()
        await asyncio.sleep(0)

    async def on_run_end(_: str, result: Any) -> None:
        await asyncio.sleep(0)
        ends.append(result.status)

    guard = guard_of(hooks=NodeHooks(on_run_start=on_run_start, on_run_end=on_run_end))

    async def parts() -> Any:
        await asyncio.sleep(60)
        yield 1

    async def program() -> None:
        if kind == "aover":
            async for _ in guard.aover(parts):
                pass
        else:
            async with guard.run():
                await asyncio.sleep(60)

    task = asyncio.create_task(program())
    await begun.wait()
    for _ in range(awaits):
        await asyncio.sleep(0)
    await cancel(task)
    assert ends == [RunStatus.CANCELLED]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hooks_see_steps_in_order_with_their_parents(kind: str) -> None:
    seen = Seen()
    guard = guard_of(seen)
    flaky = Flaky(TimeoutError())
    tool = guard.wrap("tool", _made(kind, lambda _: flaky.step()))
    step = guard.wrap("agent", _calling(kind, tool))
    with guard.run(pipeline="trip"):
        _drive(step, "x")
    tool_lines = [f"{event} tool < agent" for event in ("start", "failure", "retry", "start", "success")]
    assert seen.lines == ["run start", "start agent", *tool_lines, "success agent", "run end COMPLETED"]


@pytest.mark.core
def test_a_failed_attempt_has_its_own_children() -> None:
    """An attempt's event shows what was called in it, and not in the one before."""
    guard = guard_of()
    tool = guard.wrap("tool", lambda n: n)

    @guard.step("agent")
    def agent() -> None:
        node = current_node()
        tool(node.attempt)
        if node.attempt == 1:
            raise TimeoutError

    agent()
    first, second = guard.current.ctx.trace
    assert [child.input_state for child in first.children] == [{"n": 1}]
    assert [child.input_state for child in second.children] == [{"n": 2}]
    assert len({child.branch for child in (*first.children, *second.children)}) == 2


def test_a_run_is_a_run_in_the_journal(tmp_path: Any) -> None:
    """Steps of a framework are recorded durably: attempts, nesting, usage, how it ended."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store, pipeline="trip")
        tool = guard.wrap("tool", lambda: {"a": 1}, usage=lambda _: Usage(3, 4))
        with guard.run({"question": "why"}, run_id="r1"):
            guard.wrap("agent", lambda: tool())()
        run = store.get_run("r1")
        assert (run.status, run.pipeline, run.tokens) == ("COMPLETED", "trip", 7)
        attempts = store.attempts("r1")
        assert [(a.node_id, a.outcome) for a in attempts] == [("agent", "success"), ("tool", "success")]
        assert b"why" in store.input_of("r1")


def test_a_run_that_is_resumed_remembers_the_bill_and_calls_anew(tmp_path: Any) -> None:
    """A framework has its own way of going on: the guard returns nothing recorded, but its budget goes on."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        flaky, budget = Flaky(), ExecutionBudget(max_tokens_total=15)
        for ends in (contextlib.nullcontext(), pytest.raises(BudgetExceeded)):
            guard = guard_of(store=store, run_id="r1", resume=True, budget=budget)
            with ends, guard.run():
                guard.wrap("model", flaky.step, usage=lambda _: Usage(10))()
        assert flaky.calls == 2
        assert [a.position for a in store.attempts("r1")] == [0, 0]  # It is the same call, made again.


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "COMPLETED"),
        (ValueError("odd"), "PARTIAL"),
        (KeyboardInterrupt(), "INTERRUPTED"),
        (asyncio.CancelledError(), "CANCELLED"),
    ],
)
def test_a_run_says_how_it_ended(error: BaseException | None, status: str) -> None:
    """What comes out of the code around the steps, of a framework itself too, is how the run ended."""
    guard = guard_of()
    run = guard.run()
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)), run:
        if error is not None:
            raise error
    assert run.result.status == status
    with pytest.raises(RuntimeError, match="used only once"), run:
        pass


def test_steps_outside_of_any_run_share_one() -> None:
    """A forgotten ``with guard.run()`` forgets no budget."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    step = guard.wrap("model", lambda: "x", usage=lambda _: Usage(10))
    step()
    with pytest.raises(BudgetExceeded):
        step()
    with guard.run():
        step()


@pytest.mark.core
def test_a_thread_without_context_belongs_to_the_only_open_run() -> None:
    """Frameworks call from threads without the caller's context; the budget that is open counts for them."""
    guard = guard_of()
    step = guard.wrap("model", lambda: "x", usage=lambda _: Usage(10))
    with guard.run() as run:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert run.result.total_tokens == 10


@pytest.mark.core
def test_a_step_after_its_run_is_no_step_of_it() -> None:
    guard = guard_of()
    step = guard.wrap("it", lambda: None)
    with guard.run() as run:
        context = contextvars.copy_context()
    context.run(step)
    assert len(run.result.trace) == 0
    assert len(guard.current.ctx.trace) == 1


def test_two_guards_do_not_mix() -> None:
    """A step inside a step of another guard belongs to its own guard's run."""
    one, two = guard_of(), guard_of()
    inner = two.wrap("inner", lambda: None)
    outer = one.wrap("outer", lambda: inner())
    with one.run() as first, two.run() as second:
        outer()
    assert [e.node_id for e in first.result.trace.walk()] == ["outer"]
    assert [e.node_id for e in second.result.trace.walk()] == ["inner"]


def test_one_function_has_one_guard() -> None:
    """What is attached twice is guarded once; a second guard, whose budget would never count, is refused."""
    one, two = guard_of(), guard_of()
    step = one.wrap("it", plain)
    assert (one.has(step), one.has(plain), two.has(plain)) == (True, False, False)
    with pytest.raises(ValueError, match="is already guarded by another guard"):
        two.has(step)


async def test_a_guard_over_a_context_adds_steps_to_it() -> None:
    """Inside a node of a pipeline, steps of the same context are the node's children."""
    runner = StromaRunner.quick(run_id="mine")
    ctx = context_of(runner)
    guard = Guard(ctx)
    tool = guard.wrap("tool", lambda: {"a": 1}, usage=lambda _: Usage(7))

    async def node(state: Passenger) -> dict[str, Any]:
        tool()
        return {"code": "T"}

    result = await execute_step("node", node, Passenger(name="Ada"), ctx, contract=SIGN)
    assert [(e.node_id, e.position, e.branch.partition("#")[0]) for e in result.trace.walk()] == [
        ("node", 0, ""),
        ("tool", 0, "tool"),
    ]
    assert result.total_tokens == 7
    tool()
    assert [e.position for e in ctx.trace] == [0, 1]
    with pytest.raises(RuntimeError, match="belongs to the run of its context"):
        guard.run()


def test_a_hook_that_is_not_async_is_told_and_nothing_is_called_twice() -> None:
    """The one exception of a hook that comes out is no failure for the steps around it to retry."""
    guard = guard_of(hooks=NodeHooks(on_node_success=lambda *a: None if a[1] == "inner" else _nothing()))
    flaky = Flaky()
    inner = guard.wrap("inner", flaky.step)
    with pytest.raises(TypeError, match="on_node_success"):
        guard.wrap("outer", lambda: inner())()
    assert flaky.calls == 1


async def _nothing() -> None:
    return None


# ---------------------------------------------------------------------- many at once


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_thousand_concurrent_calls_are_counted_to_the_token(kind: str) -> None:
    """Steps side by side, from threads or tasks, lose no token, no event and no position."""
    guard = guard_of()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        tool = guard.wrap("tool", _made(kind, lambda n: n), usage=lambda n: Usage(n, 1))
        if kind == "sync":
            outer = guard.wrap("outer", lambda n: tool(n))
            with guard.run() as run, ThreadPoolExecutor(20) as pool:
                jobs = [pool.submit(contextvars.copy_context().run, outer, n) for n in range(1000)]
                assert [job.result() for job in jobs] == list(range(1000))
        else:

            async def each(n: int) -> int:
                return await tool(n)

            aouter = guard.wrap("outer", each)

            async def main() -> Any:
                async with guard.run() as run:
                    assert await asyncio.gather(*(aouter(n) for n in range(1000))) == list(range(1000))
                return run

            run = asyncio.run(main())
    finally:
        sys.setswitchinterval(before)
    assert run.result.total_tokens == sum(range(1000)) + 1000
    assert sorted(event.position for event in run.result.trace) == list(range(1000))
    assert all([child.node_id for child in event.children] == ["tool"] for event in run.result.trace)


def test_sync_steps_in_threads_of_an_async_step_are_its_children() -> None:
    """An async agent whose sync tools run in threads counts on two event loops, and loses nothing."""
    guard = guard_of()
    tool = guard.wrap("tool", lambda n: n, usage=lambda n: Usage(1))

    @guard.step("model", usage=lambda n: Usage(1))
    async def model(n: int) -> int:
        await asyncio.sleep(0)
        return n

    @guard.step("agent")
    async def agent() -> None:
        jobs = [asyncio.to_thread(tool, n) for n in range(50)] + [model(n) for n in range(50)]
        await asyncio.gather(*jobs)

    async def main() -> Any:
        async with guard.run() as run:
            await agent()
        return run

    run = asyncio.run(main())
    assert run.result.total_tokens == 100
    (event,) = run.result.trace
    assert len(event.children) == 100
    assert len({child.branch for child in event.children}) == 100


@pytest.mark.core
@pytest.mark.parametrize("kind", ["sync", "async", "stream", "astream"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_cancellation_that_nobody_asked_for_is_a_failure(kind: str, after: int) -> None:
    """What a step raises while its task lives on is retried like others, and not after a first chunk."""
    if after and "stream" not in kind:
        return
    calls: list[int] = []

    def stray(_: Any) -> Any:
        calls.append(1)
        raise asyncio.CancelledError("stray")

    def stream(_: Any) -> Any:
        if after:
            yield 1
        yield stray(_)

    step = guard_of().wrap("it", as_stream(kind, stream) if "stream" in kind else _made(kind, stray))
    with pytest.raises(asyncio.CancelledError, match="stray"):
        _drive(step, "x")
    assert len(calls) == (1 if after else 2)


@pytest.mark.parametrize("kind", ["async", "astream"])
async def test_a_cancelled_step_is_cancelled(kind: str) -> None:
    """Cancellation passes through at once, and the attempt has its end."""
    seen = Seen()
    guard = guard_of(seen)
    started = asyncio.Event()

    hangs = stuck(started)

    async def stream(_: Any) -> Any:
        yield await hangs(_)

    task = asyncio.create_task(run_it(guard.wrap("it", hangs if kind == "async" else stream), "x"))
    await started.wait()
    await cancel(task)
    assert task.cancelled()
    assert seen.lines == ["start it", "cancelled it"]


def test_first_steps_on_many_loops_open_one_run(tmp_path: Any) -> None:
    """A run whose first steps begin side by side, on event loops of their own, is begun once."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store, run_id="one")
        step = guard.wrap("it", _made("async", lambda n: n))
        sync = guard.wrap("sync", lambda n: n)
        barrier = threading.Barrier(8)

        def work(n: int) -> None:
            barrier.wait()
            asyncio.run(step(n)) if n % 2 else sync(n)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run = store.get_run("one")
        assert run.execution == 1
        assert sorted(a.position for a in store.attempts("one")) == list(range(8))


def test_nothing_of_a_call_is_kept() -> None:
    """Arguments and results of calls that are over are not held by the guard."""
    import weakref

    class Thing:
        pass

    guard = guard_of()
    step = guard.wrap("it", lambda thing: thing)
    with guard.run():
        thing = Thing()
        step(thing)
        seen = weakref.ref(thing)
        del thing
        gc.collect()
        assert seen() is None


# ---------------------------------------------------------------------- published protocols


def test_the_guard_really_is_what_the_protocols_ask_for() -> None:
    """StepInterceptor, LoopAdapter and TurnAdapter: real checks by contract and budget, on a context."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=5))
    assert isinstance(guard, StepInterceptor)
    assert isinstance(guard, LoopAdapter)
    assert isinstance(guard, TurnAdapter)
    guard.registry.register(SIGN)
    ctx = guard.run().ctx
    assert guard.on_tool_call("sign", {"name": "Ada"}, ctx) == {"name": "Ada"}
    assert guard.on_tool_result("sign", {"code": "T"}, ctx) == {"code": "T"}
    assert guard.on_tool_call("other", {"a": 1}, ctx) == {"a": 1}
    with pytest.raises(ContractViolation, match="input"):
        guard.on_tool_call("sign", {"name": 1}, ctx)
    with pytest.raises(ContractViolation, match="output"):
        guard.on_tool_result("sign", {"code": 1}, ctx)
    assert guard.on_turn_start("sign", PassengerData("Ada"), ctx) == PassengerData("Ada")
    with pytest.raises(ContractViolation):
        guard.on_turn_end("sign", {"code": 1}, ctx)
    ctx.cost_tracker.spend(6, 0.0)
    with pytest.raises(BudgetExceeded):
        guard.on_tool_call("other", {}, ctx)
    with pytest.raises(BudgetExceeded):
        guard.on_turn_start("other", {}, ctx)


def test_extract_state_dict() -> None:
    """A state as a dict, of whatever frameworks pass around; what is none is a TypeError."""

    class WithDict:
        def dict(self) -> dict[str, Any]:
            return {"name": "Ada"}

    class Slots:
        __slots__ = ("name",)

    for state in ({"name": "Ada"}, WithDict(), PassengerObject("Ada")):
        assert extract_state_dict(state) == {"name": "Ada"}
    for state in (Passenger(name="Ada"), PassengerData("Ada")):
        assert extract_state_dict(state) == {"name": "Ada", "seat": 1}
    for nothing in (3, "text", None, [1], Slots()):
        with pytest.raises(TypeError, match="is not a state"):
            extract_state_dict(nothing)


def test_errors_of_hooks_are_raised_where_tests_ask_for_it() -> None:
    """``hook_errors="raise"``: once the run is complete, with its result; the code's error comes first."""

    async def broken(*_: Any) -> None:
        raise LookupError("no dashboard")

    guard = guard_of(hooks=NodeHooks(on_node_success=broken), hook_errors="raise")
    step = guard.wrap("it", lambda: 1)
    with pytest.raises(HookError, match="on_node_success") as caught, guard.run() as run:
        step()
    assert caught.value.result is run.result
    with pytest.raises(KeyError), guard.run():
        step()
        raise KeyError


def test_a_run_config_is_not_changed() -> None:
    config = RunConfig(run_id="mine")
    guard = Guard(StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()), config))
    with guard.run(run_id="other", pipeline="named") as run:
        pass
    assert (run.ctx.run_id, run.ctx.pipeline) == ("other", "named")
    assert (config.run_id, config.pipeline) == ("mine", "pipeline")


MISSING = r"is required for its adapter.*pip install 'stroma-runner\[{}\]'"


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("LangGraphAdapter", "langgraph"),
        ("stroma_langgraph_node", "langgraph"),
        ("CrewAIAdapter", "crewai"),
        ("stroma_crewai_step", "crewai"),
        ("DeepAgentsAdapter", "deepagents"),
        ("stroma_deepagents_node", "deepagents"),
    ],
)
def test_a_framework_that_is_missing_says_how_to_install_it(name: str, extra: str) -> None:
    """Published names of a framework exist with it; without it, the error ends with the mend."""
    with pytest.raises(ImportError, match=MISSING.format(extra)):
        importlib.import_module("stroma.adapters").__getattr__(name)


@pytest.mark.parametrize("extra", ["langchain", "pydantic-ai", "openai-agents"])
def test_an_adapter_module_without_its_framework_says_how_to_install_it(extra: str) -> None:
    with pytest.raises(ImportError, match=MISSING.format(extra)):
        importlib.import_module(f"stroma.adapters.{extra.replace('-', '_')}")


@pytest.mark.slow
def test_importing_the_guard_imports_no_framework() -> None:
    """Nothing of a framework is loaded before its adapter is asked for."""
    code = (
        "import stroma.adapters.guard, sys; print(sorted({'langgraph', 'langchain_core', 'agents'} & "
        "set(sys.modules)))"
    )
    assert run_python(code=code) == "[]\n"


def test_the_result_of_a_run_that_has_not_ended_is_an_error() -> None:
    """After the block it is there, without a check for None; inside of it the error says so."""
    guard = Guard()
    with guard.run(run_id="r-1") as run, pytest.raises(RuntimeError, match="run 'r-1' has not ended"):
        _ = run.result
    assert run.result.status is RunStatus.COMPLETED
