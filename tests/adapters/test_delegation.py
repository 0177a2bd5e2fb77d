"""Guarded methods of objects: copies of the object are guarded and call themselves; nothing else changes."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import wrapt
from pydantic import BaseModel
from tests.kit import Text as Seen

from stroma.adapters import Guard
from stroma.adapters._delegation import guard_methods, wrap_method
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
