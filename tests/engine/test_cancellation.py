"""Cancelled, closed and interrupted runs: the end of each is recorded once, no committed output is lost."""

import asyncio
import contextvars
import gc
import sys
import types
from typing import Any

import pytest
from tests.engine.event_log import Between, Journal
from tests.engine.gated_journal import GatedJournal
from tests.fixtures import store_fixture
from tests.kit import (
    Num,
    One,
    Two,
    cancel_after,
    context_of,
    failing_with,
    forever,
    node,
    quick,
    quick_without_retries,
    returning,
    same,
    sleep_forever,
)
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    NodeHooks,
    ReliabilityContext,
    RunStatus,
    StoreError,
    current_node_or_none,
    execute_step,
)


@pytest.mark.core
@pytest.mark.parametrize("transient", [True, False])
async def test_a_cancellation_during_a_commit_that_is_refused_comes_out(transient: bool) -> None:
    """A run that is cancelled while the store refuses its output is cancelled, and goes no further."""
    store = GatedJournal()
    refusal = StoreError("not now")
    refusal.transient = transient
    store.late.append(refusal)
    calls: list[str] = []

    def func(name: str) -> Any:
        async def call(state: Num) -> Any:
            calls.append(name)
            return {"n": 7}

        return node(name, call)

    run = asyncio.create_task(quick(store=store, run_id="r").run([func("a"), func("b")], Num()))
    await store.waiting.wait()
    run.cancel()
    await asyncio.sleep(0)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert calls == ["a"]
    assert await store.load("r", "a") == (Num(n=7) if transient else None)
    assert store.inner.get_run("r").status == "CANCELLED"


@pytest.mark.core
async def test_a_store_that_never_answers_does_not_hold_a_cancelled_run_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cancelled run waits for the commit in flight, but not for ever; then it ends, and can be resumed."""
    monkeypatch.setattr("stroma.engine.tasks.LAST_SECONDS", 0.05)
    store = GatedJournal()
    calls = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}

    run = asyncio.create_task(quick(store=store, run_id="r").run([node("a", func)], Num()))
    await store.waiting.wait()
    run.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await run
    assert store.tries == 1
    assert store.inner.get_run("r").status == "CANCELLED"
    store.gate.set()
    result = await quick(store=store, run_id="r", resume=True).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.RESUMED, 2)


def context(**config: Any) -> ReliabilityContext:
    runner = quick_without_retries(**config)
    return context_of(runner)


@pytest.mark.core
async def test_plain_code_that_is_cancelled_while_its_end_is_kept() -> None:
    """``async with ctx:`` cancelled while the end is noted is cancelled, and the end is noted."""

    def slowly(session: Any) -> Any:
        async def later(*arguments: Any) -> None:
            inside.set()
            await asyncio.sleep(0.02)
            session.end(*arguments)

        return Between(session, end=later)

    inside, store = asyncio.Event(), Journal(slowly)
    ctx = context(store=store, run_id="r")

    async def plain() -> None:
        async with ctx:
            await execute_step("a", same, Num(), ctx)

    await cancel_after(plain(), inside)
    run = store.get_run("r")
    assert run.status == "COMPLETED"


async def test_plain_code_that_is_closed() -> None:
    """``async with ctx:`` whose code is closed awaits nothing any more."""

    @types.coroutine
    def pause() -> Any:
        yield

    async def plain() -> None:
        async with context() as ctx:
            await execute_step("a", same, Num(), ctx)
            await pause()

    code = plain()
    code.send(None)
    code.close()


store = store_fixture(*IN_PROCESS)


@pytest.mark.core
async def test_closing_the_coroutine_of_a_run(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine of run() closed in a node runs hooks to their first await; the run can be resumed."""
    inside = [False]
    closed: list[str] = []

    async def b(state: One) -> Any:
        if inside[0]:
            return {"b": 1}
        inside[0] = True
        try:
            await forever()
        finally:
            closed.append("b")

    async def watch(*_: Any) -> None:
        closed.append("hook")
        await asyncio.sleep(0)
        closed.append("never")

    nodes = [node("a", returning({"a": 1}), output=One), node("b", b, One, Two)]
    runner = quick_without_retries(store=store, run_id="o", node_timeouts={"b": 60_000})
    hooks = NodeHooks(on_node_cancelled=watch, on_run_end=watch)
    broken = NodeHooks(on_node_cancelled=failing_with(ValueError, "no"))
    run = runner.with_hooks([hooks, broken]).run(nodes, Num())
    awaited = run.send(None)
    while not inside[0]:
        if awaited is not None:
            awaited._asyncio_future_blocking = False
            await asyncio.wait([awaited])
        awaited = run.send(None)
    run.close()
    assert closed == ["b", "hook", "hook"]
    assert "raised for node 'b' of run 'o'" in caplog.text
    assert current_node_or_none() is None
    result = await quick_without_retries(store=store, run_id="o").run(nodes, Num(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert [e.node_id for e in result.trace] == ["b"]


@pytest.mark.core
def test_a_run_that_is_thrown_away_leaves_no_noise() -> None:
    """A coroutine of run() that is collected long after its loop was closed ends without a complaint."""
    complaints: list[Any] = []

    async def wait(state: Num) -> Any:
        await asyncio.sleep(30)

    async def begin() -> Any:
        task = asyncio.create_task(quick().run([node("a", wait)], Num()))
        await asyncio.sleep(0.01)
        return task

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(begin())
        loop.close()
        task._log_destroy_pending = False

    before, sys.unraisablehook = sys.unraisablehook, complaints.append
    try:
        contextvars.Context().run(abandon)
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert complaints == []


@pytest.mark.core
async def test_a_node_that_is_cancelled_after_its_last_await_keeps_its_output() -> None:
    """G4: A node that is cancelled after its last await has its output committed; the run is cancelled."""
    store = AsyncInMemoryStore()

    async def func(state: Num) -> Any:
        asyncio.current_task().cancel()
        return {"n": 7}, 5, 1, "a-model-never-seen-before"

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(quick(store=store, run_id="r").run([node("a", func)], Num()))
    result = await quick(store=store, run_id="r", resume=True).run([node("a", sleep_forever)], Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=7))
