"""Guarded runs that somebody cancels or pauses, or whose budget somebody changes."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import Num, cancel_after, node

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    InMemoryStore,
    Limit,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    current_run,
)
from stroma.adapters import Guard, RunCancelled, what_stopped
from stroma.trace import ExecutionResult


def stroma_cancel(path: str | Path, run_id: str = "x") -> None:
    command = [sys.executable, "-m", "stroma", "cancel", run_id, "--db", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done
    assert "will cancel run" in done.stderr


def result_of(guard: Guard) -> ExecutionResult:
    return guard.last.result


@pytest.mark.slow
def test_a_step_ends_and_the_next_one_is_refused(tmp_path: Path) -> None:
    """`stroma cancel` interrupts no step: its result is recorded, nothing follows, whatever frameworks do."""
    with SQLiteStore(tmp_path / "x.db") as store:
        guard = Guard(StromaRunner.quick(store=store))
        calls: list[str] = []

        @guard.step("first")
        def first() -> int:
            stroma_cancel(store.path)
            run = guard.open_runs[0]
            while not run.ctx.stopping.is_cancelled:  # The store looks about once a second.
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


async def test_a_stream_ends_before_its_next_part() -> None:
    """A framework that yields parts is ended between two of them, and closed; its reader is not cancelled."""
    store = AsyncInMemoryStore()
    guard = Guard(StromaRunner.quick(store=store, run_id="x"))
    ended = []

    async def parts() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            ended.append(True)

    async def read() -> None:
        async for part in guard.aover(guard.wrap("parts", parts, kind="astream")):
            assert part == 1
            guard.open_runs[0].cancel()

    with pytest.raises(RunCancelled):
        await read()
    assert ended == [True]
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
    assert asyncio.current_task().cancelling() == 0
    assert not await store.cancel("x")


async def test_nothing_waits_for_a_further_attempt() -> None:
    """A step that waits before its next attempt ends at once with its failure."""
    store, waits = AsyncInMemoryStore(), asyncio.Event()
    policy = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=5, backoff_seconds=3600, jitter=False)}
    guard = Guard(StromaRunner.quick(store=store, policy_map=policy))

    @guard.step("fails")
    async def fails() -> None:
        waits.set()
        raise ConnectionError("gone")

    async def framework() -> None:
        async with guard.run(run_id="x"):
            with pytest.raises(ConnectionError):
                await fails()
            await fails()

    task = asyncio.create_task(framework())
    await waits.wait()
    assert await store.cancel("x")
    with pytest.raises(RunCancelled):
        await task


async def test_nothing_waits_for_its_turn() -> None:
    """A step that waits for room at a limit is not called: it ends at once."""
    store, begun, calls = AsyncInMemoryStore(), asyncio.Event(), list[int]()
    limits = {"full": Limit(requests_per_minute=1)}
    guard = Guard(StromaRunner.quick(store=store, limits=limits, node_limits={"n": "full"}))

    @guard.step("n")
    async def step() -> None:
        calls.append(1)
        begun.set()

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await step()
            await step()

    task = asyncio.create_task(framework())
    await begun.wait()
    await asyncio.sleep(0.05)
    assert await store.cancel("x")
    with pytest.raises(RunCancelled):
        await asyncio.wait_for(task, 20)
    assert calls == [1]
    assert result_of(guard).status is RunStatus.CANCELLED


async def test_a_cancelled_task_is_cancelled() -> None:
    """The end of the task of a run is the end of the run as CANCELLED."""
    guard = Guard(StromaRunner.quick(store=AsyncInMemoryStore()))
    waits = asyncio.Event()

    @guard.step("hangs")
    async def hangs() -> None:
        waits.set()
        await asyncio.Event().wait()

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await hangs()

    await cancel_after(framework(), waits)
    assert result_of(guard).status is RunStatus.CANCELLED


async def test_a_run_of_somebody_else_is_theirs_to_end() -> None:
    """The guard of a context leaves it to the run that the context is of."""
    from tests.store_suite.journal import State

    from stroma import ReliabilityContext, stroma_node

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

    result = await StromaRunner.quick().run([stroma_node("n", input=State, output=State)(func)], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == [True]


store = store_fixture("async-memory", "sqlite")


def guard_of(store: Any) -> tuple[Guard, list[int], asyncio.Event, asyncio.Event]:
    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=10))
    return Guard(runner), [], asyncio.Event(), asyncio.Event()


async def test_the_next_step_of_a_paused_run_is_not_called(store: Any) -> None:
    """The current step is committed, the next raises Suspend, and the run is SUSPENDED ("paused")."""
    guard, calls, reached, go = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        reached.set()
        await go.wait()
        return n

    raised: list[BaseException] = []

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await work(1)
            try:
                await work(2)
            except Exception as error:
                raised.append(error)
                raise

    task = asyncio.create_task(framework())
    await reached.wait()
    assert await guard.runner.pause("x") is True
    go.set()
    await asyncio.wait([task])
    assert calls == [1]
    assert isinstance(raised[0], Suspend)
    task.exception()
    assert (guard.last.result.status, guard.last.result.suspended) == (RunStatus.SUSPENDED, ["paused"])
    record = store.get_run("x")
    assert (record.status, record.error, record.holder) == ("SUSPENDED", "paused", None)


async def test_a_raise_applies_to_the_next_step(store: Any) -> None:
    """A budget that is raised while a step is at work is the one that it and the next one meet."""
    guard, calls, reached, go = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        reached.set()
        await go.wait()
        current_node().report_usage(input_tokens=8)
        return n

    async def framework() -> None:
        async with guard.run(run_id="x"):
            await work(1)
            await work(2)

    task = asyncio.create_task(framework())
    await reached.wait()
    assert await guard.runner.set_budget("x", tokens=16) is True
    go.set()
    await task
    assert (calls, store.get_run("x").status) == ([1, 2], "COMPLETED")


@pytest.mark.parametrize("request_name", ["cancel", "pause", "set_budget"])
async def test_requests_reach_the_steps_outside_of_runs(request_name: str) -> None:
    """Steps outside of ``guard.run()`` heed a request about their run, which has no owner."""
    store = InMemoryStore()
    guard, calls, _, _ = guard_of(store)

    @guard.step("work")
    async def work(n: int) -> int:
        calls.append(n)
        current_node().report_usage(input_tokens=3)
        return n

    await work(1)
    run_id = guard.current.ctx.run_id
    limits = {"tokens": 5} if request_name == "set_budget" else {}
    assert await getattr(guard.runner, request_name)(run_id, **limits) is True
    record = store.get_run(run_id)
    stop, status = {
        "cancel": (RunCancelled, "CANCELLED"),
        "pause": (Suspend, "SUSPENDED"),
        "set_budget": (BudgetExceeded, "RUNNING"),
    }[request_name]
    assert (record.status, record.holder) == (status, None)
    for n in (2, 3, 4):
        with pytest.raises(stop):
            await work(n)
    assert calls == (
        [1, 2] if request_name == "set_budget" else [1]
    )  # The call that crosses a limit is made.
    record = store.get_run(run_id)
    assert record.status == status


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_pause_inside_a_node_asks_nothing(store: Any, is_wrapped: bool, is_nested: bool) -> None:
    """The node around the step that is not called waits with the run: no failure, and nothing to answer."""
    runner, calls = StromaRunner.quick(store=store), list[int]()

    async def func(state: Num) -> dict[str, int]:
        guard = Guard(current_run())

        @guard.step("tool")
        async def tool(number: int) -> int:
            calls.append(number)
            if calls == [0]:
                await runner.pause("x")
            return number

        async def agent() -> int:
            try:
                return await tool(0) + await tool(1)
            except Suspend as error:
                if is_wrapped:
                    raise RuntimeError("a tool has failed") from error
                raise

        return {"n": state.n + await (guard.step("agent")(agent) if is_nested else agent)()}

    nodes = [node("node", func)]
    result = await runner.run(nodes, Num(n=1), run_id="x")
    assert (result.status, result.suspended, result.failure) == (RunStatus.SUSPENDED, ["paused"], None)
    assert [event.outcome for event in result.trace] == ["suspended"]
    assert store.waiting("x") == []
    resumed = await runner.resume(nodes, "x")
    assert (resumed.status, resumed.final_state) == (RunStatus.RESUMED, Num(n=2))
