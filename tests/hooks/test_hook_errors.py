"""Hooks that raise, return late, take other arguments or are no coroutine functions, and what they leave."""

import asyncio
import functools
import gc
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest.mock import AsyncMock, MagicMock, create_autospec

import pytest
from pydantic import BaseModel
from tests.kit import (
    Note,
    Num,
    cancel_after,
    computing,
    context_of,
    failing_with,
    node,
    noting,
    passing,
    plus,
    quick,
    quick_without_retries,
    record_hooks,
    record_node_hooks,
    same,
)

from stroma import (
    CheckpointNotFound,
    HookError,
    NodeHooks,
    RunConfig,
    RunStatus,
    StromaRunner,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.telemetry import log_hooks


async def test_no_hooks_may_be_said_with_none() -> None:
    """hooks=None means none, alone and composed."""
    seen: list[str] = []
    assert (await StromaRunner.quick(hooks=None).run([node("a", same)], Num())).status is RunStatus.COMPLETED
    config = RunConfig(hooks=None)
    runner = StromaRunner(
        quick_without_retries().registry, quick_without_retries().checkpoint_manager, config
    )
    assert (await runner.run([node("a", same)], Num())).status is RunStatus.COMPLETED
    composed = record_hooks(seen) | None
    await quick_without_retries(hooks=composed).run([node("a", same)], Num())
    assert seen == ["run_start", "start a", "success a", "run_end"]


async def test_a_hook_that_cannot_be_interrupted_by_throwing() -> None:
    """What a hook returns may be an awaitable without throw(): a time limit and a cancellation end it."""

    class Bare:
        def __await__(self) -> Any:
            return self

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> None:
            return None

    hooks = NodeHooks(on_node_start=lambda *_: Bare())
    result = await quick_without_retries(hooks=hooks, hook_timeout_ms=20).run([node("a", same)], Num())
    assert result.status is RunStatus.COMPLETED
    assert [type(error.exception).__name__ for error in result.hook_errors] == ["HookTimeout"]


async def test_run_end_fires_when_the_resume_target_has_no_checkpoint() -> None:
    """on_run_end fires also when run() raises once the run has begun; the result's status is INTERRUPTED."""
    seen: list[Any] = []

    hooks = NodeHooks(
        on_run_start=noting(seen, lambda run_id, *_: "start"),
        on_run_end=noting(seen, lambda run_id, result: result.status),
    )
    with pytest.raises(CheckpointNotFound):
        await quick(hooks=hooks, resume_from="b").run([node("a", plus), node("b", plus)], Num())
    assert seen == ["start", RunStatus.INTERRUPTED]


@pytest.mark.core
async def test_a_hook_cannot_grant_attempts() -> None:
    """G8: what a hook writes on current_node() has no node called more often."""
    calls: list[int] = []

    async def meddle(*_: Any) -> None:
        run = current_node()
        run.attempt = -5 if len(calls) < 20 else run.attempt

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ValueError

    result = await quick(hooks=NodeHooks(on_node_failure=meddle)).run([node("a", func)], Num())
    assert ([event.attempt for event in result.trace], len(calls)) == ([1, 2, 3], 3)


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("event", ["on_node_start", "on_node_success", "on_run_end"])
async def test_a_hook_that_raises_generator_exit_changes_nothing(event: str, suspends: bool) -> None:
    """G8: a GeneratorExit that a hook raises itself is an exception in a hook like any other."""

    async def leave(*_: Any) -> None:
        if suspends:
            await asyncio.sleep(0)
        raise GeneratorExit

    result = await quick(hooks=NodeHooks(**{event: leave})).run([node("a", lambda state: {"n": 1})], Num())
    assert (result.status, [error.hook for error in result.hook_errors]) == (RunStatus.COMPLETED, [event])


async def _fail_at_end() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(failing_with(KeyError, "x")(None))


async def _fail_in_inner_group() -> None:
    async with asyncio.TaskGroup():
        await _fail_at_end()


async def _fail_in_body() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(failing_with(KeyError, "x")(None))
        await asyncio.sleep(1)


@pytest.mark.parametrize("is_caught", [False, True])
@pytest.mark.parametrize("way", [_fail_at_end, _fail_in_inner_group, _fail_in_body])
@pytest.mark.parametrize("event", ["on_node_start", "on_node_success", "on_run_end"])
async def test_a_failed_task_group_of_a_hook_changes_nothing(event: str, way: Any, is_caught: bool) -> None:
    """G8: a task group that fails in a hook does not cancel the run, and a cancellation after it does."""

    over = asyncio.Event()

    async def use_group(*_: Any) -> None:
        try:
            await way()
        except* KeyError:
            if not is_caught:
                raise
        over.set()
        await asyncio.sleep(0.01)

    runner = quick(hooks=NodeHooks(**{event: use_group}))
    result = await runner.run([node("a", same)], Num())
    assert (result.status, len(result.hook_errors)) == (RunStatus.COMPLETED, not is_caught)
    if is_caught:
        over.clear()
        await cancel_after(runner.run([node("a", same)], Num()), over)


async def test_a_hook_error_without_a_repr_is_raised_as_one() -> None:
    """hook_errors="raise" gives HookError, whatever the repr of what the hook raised does."""

    class Mute(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    async def start(*_: Any) -> None:
        raise Mute

    with pytest.raises(HookError, match="a Mute"):
        await quick(hooks=NodeHooks(on_node_start=start), hook_errors="raise").run([node("a", same)], Num())


@pytest.mark.core
async def test_the_error_of_a_sync_hook_has_the_result_of_a_step() -> None:
    """In plain code, too, the TypeError of a sync hook comes after the trace, with ``result`` on it."""
    same = computing(lambda state: (state, 5))
    runner = quick()
    config = RunConfig(hooks=NodeHooks(on_node_success=lambda *_: None))
    ctx = context_of(runner, config)
    with pytest.raises(TypeError, match="on_node_success") as caught:
        await execute_step("a", same, Num(), ctx)
    result = caught.value.result
    assert (result.status, result.total_tokens) == (RunStatus.INTERRUPTED, 5)
    assert [event.outcome for event in result.trace] == ["success"]


@pytest.mark.core
async def test_hooks_that_can_be_read_once_are_read_once() -> None:
    """Sets of hooks that come out of a generator are called in every run."""
    seen: list[str] = []

    runner = quick(hooks=(hooks for hooks in [record_node_hooks(seen)]))
    for _ in range(2):
        await runner.run([node("a", same)], Num())
    assert seen == ["start", "success"] * 2


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


class Item(BaseModel):
    value: int


class Many(BaseModel):
    items: list[int] = list(range(20))
    out: list[dict[str, Any]] = []


@pytest.mark.core
@pytest.mark.parametrize("shape", ["node", "sequence", "parallel"])
async def test_a_failed_attempt_with_hooks_leaves_no_cycle(shape: str) -> None:
    """An exception that a map has collected is freed without the garbage collector."""

    async def watch(*_: Any) -> None: ...

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_failure=watch))

    same = runner.node("same", input=Item, output=Item)(passing())
    item = runner.node("item", input=Item, output=Item)(failing_with(LookupError))
    inside: Any = {"node": item, "sequence": [same, item], "parallel": parallel(item)}[shape]
    nodes: list[Any] = [map_over("items", inside, into="out", on_item_failure="collect")]
    await runner.run(nodes, Many())
    gc.collect()
    gc.disable()
    try:
        await runner.run(nodes, Many())
        assert not [one for one in gc.get_objects() if type(one) is LookupError]
    finally:
        gc.enable()
