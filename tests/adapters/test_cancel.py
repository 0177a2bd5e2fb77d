"""Guarded runs that somebody asks the end of, from another process or this one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stroma import AsyncInMemoryStore, FailureClass, FailurePolicy, RunStatus, SQLiteStore, StromaRunner
from stroma.adapters import Guard, RunCancelled, what_stopped
from stroma.trace import ExecutionResult


def stroma_cancel(path: str | Path, run_id: str = "x") -> None:
    command = [sys.executable, "-m", "stroma", "cancel", run_id, "--db", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done
    assert "will cancel run" in done.stderr


def result_of(guard: Guard) -> ExecutionResult:
    assert guard.last is not None
    return guard.last.result


async def request_cancel(store: Any, run_id: str = "x") -> None:
    assert await store.cancel(run_id)


@pytest.mark.slow
async def test_what_is_awaited_is_cancelled(tmp_path: Path) -> None:
    """`stroma cancel` ends what an async framework awaits, keeps what is finished, and the caller gets
    RunCancelled."""
    async with SQLiteStore(tmp_path / "x.db") as store:
        guard = Guard(StromaRunner.quick(store=store))
        waits = asyncio.Event()

        @guard.step("quick")
        async def quick(n: int) -> int:
            return n

        @guard.step("hangs")
        async def hangs() -> None:
            waits.set()
            await asyncio.Event().wait()

        async def framework() -> None:
            async with guard.run(run_id="x"):
                await quick(1)
                await hangs()

        task = asyncio.create_task(framework())
        await waits.wait()
        await asyncio.to_thread(stroma_cancel, store.path)
        with pytest.raises(RunCancelled, match="run 'x' was cancelled"):
            await task
        assert task.cancelling() == 0
        assert result_of(guard).status is RunStatus.CANCELLED
        assert isinstance(guard.stopped and guard.stopped.exception, RunCancelled)
        record = store.get_run("x")
        assert record is not None
        assert (record.status, record.holder) == ("CANCELLED", None)
        assert [(a.node_id, a.outcome) for a in store.attempts("x")] == [
            ("quick", "success"),
            ("hangs", "cancelled"),
        ]


@pytest.mark.slow
def test_a_plain_function_ends_and_the_next_step_is_refused(tmp_path: Path) -> None:
    """Sync code is not interrupted: its result is kept, and nothing follows, whatever the framework makes of
    the refusal."""
    with SQLiteStore(tmp_path / "x.db") as store:
        guard = Guard(StromaRunner.quick(store=store))
        calls: list[str] = []

        @guard.step("first")
        def first() -> int:
            stroma_cancel(store.path)
            run = guard.open_runs[0]
            while not run.cancelling:  # The store looks about once a second.
                threading.Event().wait(0.02)
            return 1

        @guard.step("second")
        def second() -> int:
            calls.append("second")
            return 2

        with guard.run(run_id="x"):
            assert first() == 1
            for _ in range(3):  # As a framework that tells its model of errors, and calls again.
                with pytest.raises(RunCancelled) as caught:
                    second()
                assert what_stopped(caught.value) is caught.value
        assert calls == []
        assert result_of(guard).status is RunStatus.CANCELLED
        assert isinstance(guard.stopped and guard.stopped.exception, RunCancelled)
        record = store.get_run("x")
        assert record is not None
        assert record.status == "CANCELLED"
        assert [(a.node_id, a.outcome) for a in store.attempts("x")] == [("first", "success")]


async def test_nothing_is_tried_again() -> None:
    """A step that waits for its next attempt makes none; what is inside another step ends that too."""
    store = AsyncInMemoryStore()
    policy = {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=5, backoff_seconds=0, jitter=False)}
    guard = Guard(StromaRunner.quick(store=store, policy_map=policy))
    calls: list[int] = []

    @guard.step("inner")
    def inner() -> None:
        calls.append(1)
        guard.open_runs[0].cancel()
        raise ValueError("not yet")

    @guard.step("outer")
    def outer() -> None:
        try:
            inner()
        except ValueError:
            inner()

    def framework() -> None:
        with guard.run(run_id="x"):
            outer()

    with pytest.raises(RunCancelled):
        await asyncio.to_thread(framework)
    assert calls == [1]
    assert result_of(guard).status is RunStatus.CANCELLED


@pytest.mark.parametrize("between", [False, True], ids=["in the midst of a part", "between parts"])
async def test_streams(between: bool) -> None:
    """A framework that gives parts is ended where it makes one; whoever reads it is not cancelled
    elsewhere."""
    store = AsyncInMemoryStore()
    guard = Guard(StromaRunner.quick(store=store, run_id="x"))
    waits, ended = asyncio.Event(), []

    async def parts() -> AsyncIterator[int]:
        try:
            yield 1
            waits.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def read() -> None:
        async for part in guard.aover(guard.wrap("parts", parts, kind="astream")):
            assert part == 1
            if between:
                await request_cancel(store)
                await asyncio.sleep(0)

    task = asyncio.create_task(read())
    if not between:
        await waits.wait()
        await request_cancel(store)
    with pytest.raises(RunCancelled):
        await task
    assert ended == [True]
    assert task.cancelling() == 0
    assert result_of(guard).status is RunStatus.CANCELLED


async def test_a_run_that_had_ended_stays_what_it_is() -> None:
    """Asked while its last await was over, it is COMPLETED, and the task goes on as if nothing had been."""
    store = AsyncInMemoryStore()
    guard = Guard(StromaRunner.quick(store=store))

    async def step() -> int:
        return 1

    async with guard.run(run_id="x") as run:
        assert await guard.wrap("n", step)() == 1
        run.cancel()
    await asyncio.sleep(0)
    assert result_of(guard).status is RunStatus.COMPLETED
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not await store.cancel("x")


async def test_somebody_else_cancels_too() -> None:
    """A task that its own caller cancels is cancelled, whoever else has asked for the end of the run."""
    store = AsyncInMemoryStore()
    guard = Guard(StromaRunner.quick(store=store))
    waits = asyncio.Event()

    @guard.step("hangs")
    async def hangs() -> None:
        waits.set()
        await asyncio.Event().wait()

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await hangs()

    task = asyncio.create_task(framework())
    await waits.wait()
    await request_cancel(store)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert result_of(guard).status is RunStatus.CANCELLED


async def test_a_run_of_somebody_else_is_theirs_to_end() -> None:
    """The guard of a context leaves it to the run that the context is of."""
    from tests.store_suite.journal import State

    from stroma import NodeContract, ReliabilityContext, stroma_node

    seen: list[Any] = []

    async def func(state: State, ctx: Any) -> State:
        from stroma.engine.execution import current_run

        run = current_run()
        assert isinstance(run, ReliabilityContext)
        before = run.session.on_control
        guard = Guard(run)
        await guard.wrap("inner", asyncio.sleep)(0)
        seen.append(run.session.on_control == before)
        return state

    contract: Any = NodeContract(node_id="n", input_schema=State, output_schema=State)
    result = await StromaRunner.quick().run([stroma_node("n", contract)(func)], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == [True]
