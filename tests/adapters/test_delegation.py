"""Guarded callables and methods: copies are guarded, and nothing changes for who calls or inspects them."""

import copy
import functools
import inspect
import logging
import pickle
from typing import Any

import pytest
import wrapt
from pydantic import BaseModel
from tests.kit import Text as Query
from tests.kit import Text as Seen

from stroma import ContractViolation, RunStatus, Usage
from stroma.adapters import Guard
from stroma.adapters._delegation import guard_methods, wrap_method
from stroma.adapters._step import GuardedStep
from stroma.adapters.guard import contract_for


class Model:
    def __init__(self, name: str) -> None:
        self.name = name

    def call(self, text: str) -> str:
        return f"{self.name} {text}"

    async def acall(self, text: str) -> str:
        return self.call(text)


class Derived(Model):
    def call(self, text: str) -> str:
        return super().call(text).upper()


class Typed(BaseModel):
    name: str = "a"

    def call(self, text: str) -> str:
        return f"{self.name} {text}"


def nodes(run: Any) -> list[str]:
    return [event.node_id for event in run.result.trace.walk()]


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [Model, Derived, Typed])
def test_a_copy_is_guarded_and_calls_itself(kind: Any, copying: Any) -> None:
    """Wrappers rebind on copy and deepcopy: the copy's own attributes are used, and its calls are steps."""
    guard, plain = Guard(), kind(name="a")
    copied = copying(guard_methods(kind(name="a"), ("call", "acall"), guard, "model"))
    copied.name = plain.name = "b"
    with guard.run() as run:
        assert copied.call("x") == plain.call("x")
    assert nodes(run) == ["model"]


def test_an_object_that_is_not_guarded_is_left_alone() -> None:
    """Another object of the same class makes no step, and its methods have their names and signatures."""
    guard = Guard()
    guard_methods(Model("a"), ("call", "acall"), guard, "model")
    with guard.run() as run:
        assert Model("b").call("x") == "b x"
    assert nodes(run) == []
    assert (Model.call.__name__, list(inspect.signature(Model("b").call).parameters)) == ("call", ["text"])
    assert inspect.iscoroutinefunction(Model.acall)


async def test_a_method_that_calls_another_is_one_step() -> None:
    """Of the same object, or of the class that it extends."""
    guard, model = Guard(), Derived("a")
    guard_methods(Model("b"), ("call",), guard, "other")
    guard_methods(model, ("call", "acall"), guard, "model")
    with guard.run() as run:
        assert (await model.acall("x"), model.call("y")) == ("A X", "A Y")
    assert nodes(run) == ["model", "model"]


def test_a_wrapped_method_is_called_once_for_the_classes_it_extends() -> None:
    """A run around a method that calls that of its base class is one run."""
    guard, calls = Guard(), list[str]()

    def wrapper(call: Any) -> Any:
        def wrapped(self: Any, text: str) -> str:
            calls.append(text)
            return str(call(self, text))

        return wrapped

    base, derived = Model("a"), Derived("b")
    for one in (base, derived, derived):
        wrap_method(one, "call", guard, wrapper)
    assert (base.call("x"), derived.call("y"), copy.copy(derived).call("z")) == ("a x", "B Y", "B Z")
    assert calls == ["x", "y", "z"]


def test_what_is_pickled_is_not_guarded_where_it_is_loaded() -> None:
    """A guard does not keep an object from being stored."""
    guard, model = Guard(), Model("a")
    guard_methods(model, ("call",), guard, "model")
    with guard.run() as run:
        assert pickle.loads(pickle.dumps(model)).call("x") == "a x"
    assert nodes(run) == []


def test_a_method_of_the_object_itself_is_guarded() -> None:
    """One that a program has put in place of the class's."""
    guard, model = Guard(), Model("a")
    model.call = lambda text: f"own {text}"
    for _ in range(2):
        guard_methods(model, ("call",), guard, "model")
    with guard.run() as run:
        assert model.call("x") == "own x"
    assert nodes(run) == ["model"]


def test_another_guard_and_another_contract_are_errors() -> None:
    """Not one of them in silence."""
    guard, model = Guard(), Model("a")
    guard_methods(model, ("call",), guard, "model")
    with pytest.raises(ValueError, match="another guard"):
        guard_methods(model, ("call",), Guard(), "model")
    with pytest.raises(ValueError, match="already attached to this guard, with another contract"):
        guard_methods(model, ("call",), guard, "model", contract=contract_for("model", (Seen, None)))


@pytest.mark.parametrize("wrapping", [guard_methods, wrap_method])
async def test_an_instrumentation_of_a_method_gets_its_object(wrapping: Any) -> None:
    """What an instrumentation puts around a method of a class is called with the object and its arguments."""

    class Instrumented(Model):
        async def acall(self, text: str) -> str:
            return await super().acall(text)

    class Ours(Instrumented):
        pass

    class Theirs(Instrumented):
        pass

    calls: list[tuple[Any, Any]] = []

    async def around(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append((instance, args))
        return await wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(Instrumented, "acall", around)
    guard, models = Guard(), (Ours("a"), Theirs("b"))
    for model in models:  # Of the second class, the method is one that the first one has wrapped.
        if wrapping is guard_methods:
            guard_methods(model, ("acall",), guard, "model")
        else:
            wrap_method(model, "acall", guard, lambda call: call)
        async with guard.run():
            assert await model.acall("x") == f"{model.name} x"
    assert calls == [(model, ("x",)) for model in models]


class Unseen(Exception):
    """What a view raises."""


def raises(*_: Any) -> Any:
    raise Unseen("secret state")


@pytest.mark.parametrize("view", ["input_view", "output_view", "usage", "collect"])
@pytest.mark.parametrize("kind", ["call", "acall", "stream", "astream"])
async def test_a_view_that_raises_is_logged_and_never_fails_a_step(
    kind: str, view: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A view (input, output, usage, the result of a stream) that raises is logged; the step still returns."""
    guard, calls = Guard(), []

    def call(text: str) -> str:
        calls.append(text)
        return text

    async def acall(text: str) -> str:
        return call(text)

    def stream(text: str) -> Any:
        yield call(text)

    async def astream(text: str) -> Any:
        yield call(text)

    func = {"call": call, "acall": acall, "stream": stream, "astream": astream}[kind]
    options: dict[str, Any] = {view: raises}
    step: Any = guard.wrap("step", func, **options)
    seen: Any
    with caplog.at_level(logging.WARNING):
        async with guard.run("x") as run:
            if kind == "call":
                seen = [step("a")]
            elif kind == "acall":
                seen = [await step("a")]
            else:
                seen = list(step("a")) if kind == "stream" else [part async for part in step("a")]
    assert (seen, calls) == (["a"], ["a"])
    assert run.result.status is RunStatus.COMPLETED
    if view != "collect" or "stream" in kind:
        (message,) = caplog.messages
        assert "step 'step' raised Unseen" in message


def test_a_contract_judges_what_a_broken_view_shows() -> None:
    """No contract is passed over in silence: what cannot be seen does not satisfy it."""
    guard, calls = Guard(), list[str]()
    step: Any = guard.wrap("step", calls.append, contract=_contract(input=Query), input_view=raises)
    with pytest.raises(ContractViolation), guard.run("x"):
        step("a")
    assert calls == []


def test_a_control_that_raises_leaves_the_failure_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """What reads the meaning of an exception cannot replace it."""
    guard = Guard()
    step = GuardedStep("step", control=raises, can_retry=False)

    def broken() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"), guard.run("x"):
        guard.call(step, broken)
    assert any("raised Unseen" in message for message in caplog.messages)


def _contract(**schemas: Any) -> Any:
    from stroma.adapters.guard import contract_for

    return contract_for("step", (schemas.get("input"), schemas.get("output")))


class Tools:
    def plain(self, query: str, *, limit: int = 2) -> str:
        return query * limit

    guarded = Guard().step("guarded")(plain)
    counted = Guard().step("counted", usage=lambda _: Usage(1, 1))(plain)


@pytest.mark.parametrize("name", ["guarded", "counted"])
def test_a_signature_never_holds_self(name: str) -> None:
    """Frameworks wrap a bound method again, as functools.wraps does, and read what it takes."""

    def again(bound: Any) -> Any:
        @functools.wraps(bound)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return bound(*args, **kwargs)

        return wrapper

    tools = Tools()
    plain = inspect.signature(tools.plain)
    assert inspect.signature(getattr(tools, name)) == plain
    assert inspect.signature(again(getattr(tools, name))) == plain
    assert inspect.signature(getattr(Tools, name)) == inspect.signature(Tools.plain)
    assert inspect.signature(Guard().wrap("x", tools.plain)) == plain
    assert inspect.signature(Guard().wrap("x", functools.partial(tools.plain, limit=3))) == inspect.signature(
        functools.partial(tools.plain, limit=3)
    )
    assert again(getattr(tools, name))("a", limit=3) == "aaa"


def test_a_second_contract_is_an_error() -> None:
    """What was guarded with one contract is not guarded with another in silence."""
    guard = Guard()
    step = guard.wrap("step", lambda text: text, contract=_contract(input=Query))
    assert guard.has(step)
    assert guard.has(step, _contract(input=Query))
    with pytest.raises(ValueError, match="'step' is already attached to this guard, with another contract"):
        guard.has(step, _contract(output=Query))
    bare = guard.wrap("step", lambda text: text)
    with pytest.raises(ValueError, match="or without one"):
        guard.has(bare, _contract(input=Query))
