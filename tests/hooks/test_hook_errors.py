"""Hooks that raise, return late, are closed or are no coroutine functions."""

import asyncio
from typing import Any

import pytest
from tests.kit import (
    Num,
    cancel_after,
    computing,
    context_of,
    failing_with,
    node,
    noting,
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
)


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
