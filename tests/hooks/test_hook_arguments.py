"""Hooks, classifiers and redact that cannot be called with what they are called with."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest.mock import AsyncMock, MagicMock, create_autospec

import pytest
from tests.kit import Note, passing

from stroma import NodeHooks, RunConfig, RunStatus, StromaRunner
from stroma.telemetry import log_hooks

EVENTS = [field.name for field in fields(NodeHooks) if field.name.startswith("on_")]


class Hooks:
    async def none(self) -> None: ...

    async def one(self, run_id: str) -> None: ...

    async def nine(self, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> None: ...

    async def keyword(self, *arguments: Any, needed: int) -> None: ...

    @classmethod
    async def of_class(cls, run_id: str) -> None: ...

    @staticmethod
    async def static(run_id: str) -> None: ...


class Called:
    async def __call__(self, run_id: str) -> None: ...


async def plain(run_id: str) -> None: ...


async def takes_five(a: Any, b: Any, c: Any, d: Any, e: Any) -> None: ...


def loose(func: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that passes other arguments on than it takes."""

    @functools.wraps(func)
    def wrapper(*arguments: Any) -> Any:
        return func(arguments[0])

    return wrapper


WRONG: dict[str, Any] = {
    "function": plain,
    "no arguments": Hooks().none,
    "method": Hooks().one,
    "unbound method": Hooks.nine,
    "class method": Hooks.of_class,
    "static method": Hooks.static,
    "keyword": Hooks().keyword,
    "object": Called(),
    "lambda": lambda run_id: plain(run_id),
    "partial": functools.partial(plain),
    "partial that has it all": functools.partial(takes_five, 1, 2, 3, 4, 5),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_hook_of_other_arguments_is_refused_at_construction(event: str, kind: str) -> None:
    """A hook that cannot be called with its event's arguments is a TypeError that names them."""
    with pytest.raises(TypeError, match=rf"{event} is called with \(run_id, ") as raised:
        NodeHooks(**{event: WRONG[kind]})
    assert repr(WRONG[kind]) in str(raised.value)


class Unknowable:
    """A callable that says nothing of its arguments, or something wrong."""

    __signature__ = inspect.Signature([])

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(arguments[0])


def lying(*arguments: Any) -> Any:
    return plain(arguments[0])


lying.__signature__ = inspect.Signature([])

RIGHT: dict[str, Any] = {
    "decorated": loose(plain),
    "any arguments": lambda *arguments: plain(arguments[0]),
    "defaults": lambda run_id, b=1, c=2, d=3, e=4: plain(run_id),
    "signature of its own": lying,
    "object with a signature of its own": Unknowable(plain),
    "builtin": dict.fromkeys,
    "mock": AsyncMock(),
    "mock of a function": AsyncMock(spec=plain),
    "magic": MagicMock(),
    "autospec": create_autospec(plain),
    "class": Called,
    "partial of a builtin": functools.partial(map, None),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", RIGHT)
def test_what_cannot_be_inspected_is_accepted(event: str, kind: str) -> None:
    """A hook whose signature is unknown, or that may fit, is accepted; the run decides."""
    NodeHooks(**{event: RIGHT[kind]})


@pytest.mark.parametrize("event", EVENTS)
def test_the_arguments_are_those_that_hooks_are_called_with(event: str) -> None:
    """The number of arguments that is asked for is that of the event's annotation."""
    annotation = str(NodeHooks.__annotations__[event])
    count = annotation.partition("[[")[2].replace("dict[str, Any]", "dict").partition("]")[0].count(",") + 1
    arguments = ", ".join("abcdefg"[:count])
    NodeHooks(**{event: eval(f"lambda {arguments}: None")})
    with pytest.raises(TypeError):
        NodeHooks(**{event: eval(f"lambda {arguments}, more: None")})


def test_exporters_pass() -> None:
    """The hooks of exporters fit their events."""
    log_hooks()


@pytest.mark.parametrize("kind", ["no arguments", "lambda", "function"])
def test_a_classifier_of_other_arguments_is_refused(kind: str) -> None:
    """A classifier that can never be called is refused by the config, not skipped for each failure."""
    for make in (
        lambda: RunConfig(classifiers=[lambda error, where: None, WRONG[kind]]),
        lambda: StromaRunner.quick().with_classifiers([lambda error, where: None, WRONG[kind]]),
    ):
        with pytest.raises(TypeError, match=r"classifiers\[1\] is called with \(exception, context\)"):
            make()


def test_a_redact_of_other_arguments_is_refused() -> None:
    """A redact that can never be called is refused by the config, in place of hiding every state."""
    with pytest.raises(TypeError, match=r"redact is called with \(state\)"):
        RunConfig(redact=lambda state, more: state)


async def test_a_hook_that_fits_by_name_only_still_runs() -> None:
    """A decorated hook whose own signature takes anything is called as ever."""
    called: list[str] = []

    async def hook(run_id: str) -> None:
        called.append(run_id)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_start=loose(hook)))

    a = runner.node("a", input=Note, output=Note)(passing())
    result = await runner.run([a], Note(), run_id="r")
    assert (result.status, called) == (RunStatus.COMPLETED, ["r"])
