"""Owners that stand still between the intent of an effect and its call, for longer than their lease."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.effects.shop import Order, Receipt, Shop
from tests.fixtures import store_fixture
from tests.shared_stores import SHARED

from stroma import Fenced, NotDone, RunStatus, SQLiteStore, StromaRunner, current_node
from stroma.checkpoint.durable import rows
from stroma.checkpoint.sqlite.connection import SqliteConnection
from stroma.engine.effects import Effect

store = store_fixture(*SHARED)


@pytest.mark.core
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_call_after_the_lease(store: Any, monkeypatch: Any, is_async: bool) -> None:
    """G13. An owner whose lease is over after the intent's commit makes no call; a resume makes it."""
    shop = Shop()
    runner = StromaRunner.quick(store=store)

    charge = runner.node("charge", input=Order, output=Receipt, effect=True)(
        shop.charge if is_async else (lambda order: asyncio.run(shop.charge(order)))
    )
    begin, main, clock, is_late = Effect.begin, threading.current_thread(), rows.lease_clock, []

    async def stand_still(effect: Effect) -> Any:
        ended = await begin(effect)
        is_late.append(True)
        return ended

    def late_clock() -> float:
        # The node in a thread stands still after the thread has started.
        is_there = is_async or threading.current_thread() is not main
        return clock() + (60 if is_late and is_there else 0)

    with monkeypatch.context() as patched:
        patched.setattr(Effect, "begin", stand_still)
        patched.setattr(rows, "lease_clock", late_clock)
        result = await runner.run([charge], Order(), run_id="r")
    assert (result.status, shop.calls) == (RunStatus.PARTIAL, 0)
    assert result.failure is not None
    assert isinstance(result.failure.exception, Fenced)
    assert "'charge' was called" in result.failure.message
    result = await runner.run([charge], Order(), run_id="r", resume=True)
    assert (result.status, shop.calls) == (RunStatus.RESUMED, 1)


async def test_a_renewed_lease_is_held(store: Any, monkeypatch: Any) -> None:
    """A node before the effect may take longer than the lease, which is renewed; the effect is called."""
    shop = Shop()
    runner = StromaRunner.quick(store=store, lease_seconds=1.0)

    @runner.node("think", input=Order, output=Order)
    async def think(order: Order) -> Order:
        await asyncio.sleep(1.2)
        return order

    charge = runner.node("charge", input=Order, output=Receipt, effect=True)(shop.charge)
    result = await runner.run([think, charge], Order(), run_id="r")
    assert (result.status, shop.calls) == (RunStatus.COMPLETED, 1)


async def test_the_end_of_a_stale_owner(store: Any, monkeypatch: Any) -> None:
    """G13. An owner that is taken over from before its intent is stored leaves the next intent alone."""
    shop = Shop(after=[ConnectionResetError("no answer")])
    runner = StromaRunner.quick(store=store, if_running="take_over", resume=True)
    charge = runner.node("charge", input=Order, output=Receipt, effect=True)(shop.charge)
    is_stopped, goes_on, begin = asyncio.Event(), asyncio.Event(), Effect.begin

    async def stand_still(effect: Effect) -> Any:
        if not is_stopped.is_set():
            is_stopped.set()
            await goes_on.wait()
        return await begin(effect)

    monkeypatch.setattr(Effect, "begin", stand_still)
    stale = asyncio.create_task(runner.run([charge], Order(), run_id="r"))
    await is_stopped.wait()
    assert (await runner.run([charge], Order(), run_id="r")).status is RunStatus.SUSPENDED
    goes_on.set()
    assert (await stale).status is RunStatus.PARTIAL
    assert (await runner.run([charge], Order(), run_id="r")).status is RunStatus.SUSPENDED
    assert (shop.calls, len(shop.charges)) == (1, 1)


async def test_a_stale_owner_with_an_outcome(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An owner taken over from during a call logs that it happened, with its key: a person is asked."""
    runner = StromaRunner.quick(store=store, if_running="take_over", resume=True)
    is_called, returns, keys = asyncio.Event(), asyncio.Event(), list[str]()

    @runner.node("charge", input=Order, output=Receipt, effect=True)
    async def charge(order: Order) -> Receipt:
        keys.append(current_node().idempotency_key)
        is_called.set()
        await returns.wait()
        return Receipt(number=1)

    stale = asyncio.create_task(runner.run([charge], Order(), run_id="r"))
    await is_called.wait()
    assert (await runner.run([charge], Order(), run_id="r")).suspended == ["effect"]
    returns.set()
    assert (await stale).status is RunStatus.PARTIAL
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "ERROR" and not one.exc_info]
    assert f"effect 'charge' with key {keys[0]} returned" in line
    assert len(keys) == 1


@pytest.mark.slow
def test_a_process_that_is_stopped_after_the_intent(tmp_path: Path) -> None:
    """G13: A process that is stopped after its intent charges nothing if another has ended the run."""
    ledger = tmp_path / "ledger"
    ledger.touch()

    def run(*, stops: bool) -> None:
        runner = StromaRunner.quick(store=SQLiteStore(tmp_path / "runs.db"), lease_seconds=1.0)

        async def find(order: Order, key: str) -> Any:
            return {"number": 1} if key in ledger.read_text() else NotDone()

        @runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=find)
        async def charge(order: Order) -> Any:
            with ledger.open("a") as file:
                file.write(f"{current_node().idempotency_key}\n")
            return {"number": 1}

        apply, count = SqliteConnection.apply, [0]

        def stop(self: Any, *args: Any) -> Any:
            done = apply(self, *args)
            count[0] += 1
            if count[0] == 2:  # The first transaction opens the run, the second one has the intent.
                os.kill(os.getpid(), signal.SIGSTOP)
            return done

        if stops:
            pytest.MonkeyPatch().setattr(SqliteConnection, "apply", stop)
        asyncio.run(runner.run([charge], Order(), run_id="r", resume=True))

    def fork(*, stops: bool) -> int:
        pid = os.fork()
        if not pid:
            try:
                run(stops=stops)
            finally:
                os._exit(0)
        return pid

    stale = fork(stops=True)
    try:
        assert os.WIFSTOPPED(os.waitpid(stale, os.WUNTRACED)[1])
        time.sleep(1.2)  # Its lease is over.
        os.waitpid(fork(stops=False), 0)
        assert len(ledger.read_text().split()) == 1
    finally:
        os.kill(stale, signal.SIGCONT)
        os.waitpid(stale, 0)
    assert len(ledger.read_text().split()) == 1
