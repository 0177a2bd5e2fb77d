"""Effects on a Temporal server: no call is repeated unless somebody states that it did not happen."""

from __future__ import annotations

import asyncio
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest
from tests.drivers import worker_helper
from tests.drivers.conftest import TemporalDriver
from tests.drivers.test_effects_elsewhere import Orders, Total, effect
from tests.effects.shop import Order, Receipt, Shop
from tests.kit import NEVER, TWICE, Num
from tests.servers_temporal import TemporalServer

from stroma import Flow, NodeHooks, NotDone, Pipeline, RunConfig, RunStatus, map_over, stroma_flow
from stroma.temporal import stroma_worker


@pytest.mark.parametrize("reconciles", [True, False])
async def test_a_worker_that_is_killed_in_the_call(
    temporal: TemporalDriver, temporal_server: TemporalServer, tmp_path: pathlib.Path, reconciles: bool
) -> None:
    """G13. After SIGKILL inside the call of an effect, reconcile or a person states how it ended; it is called once."""
    kind = "reconciled" if reconciles else "effect"

    def start() -> subprocess.Popen[bytes]:
        helper = [
            sys.executable,
            "-m",
            "tests.drivers.worker_helper",
            temporal_server.address,
            temporal.queue,
        ]
        return subprocess.Popen([*helper, str(tmp_path), kind], cwd=pathlib.Path(__file__).parents[2])

    def calls() -> list[pathlib.Path]:
        return list(tmp_path.glob("charge.*"))

    temporal.options["heartbeat_seconds"] = 2.0
    pipeline = worker_helper.charging(tmp_path, reconciles=reconciles)
    runner, run_id = temporal.runner(), f"killed-{kind}-{temporal.queue}"
    first = start()
    others: list[subprocess.Popen[bytes]] = []
    try:
        running = asyncio.create_task(runner.run(pipeline, Num(), run_id=run_id))
        while not calls():
            await asyncio.sleep(0.02)
            assert first.poll() is None
        first.kill()
        first.wait()
        others.append(start())
        result = await asyncio.wait_for(running, 90)
        if not reconciles:
            assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
            (question,) = await runner.waiting(run_id)
            assert question.effect is not None
            assert question.effect[:2] == (f"{run_id}:1:0:", 1)
            await runner.signal(run_id, Num(n=7))
            result = await asyncio.wait_for(runner.resume(pipeline, run_id), 90)
    finally:
        for process in (first, *others):
            process.kill()
            process.wait()
    assert (result.status in (RunStatus.COMPLETED, RunStatus.RESUMED), result.final_state) == (True, Num(n=7))
    assert len(calls()) == 1


async def test_a_worker_that_was_taken_for_lost_does_not_call(temporal: TemporalDriver) -> None:
    """G13. A worker that was silent for longer than heartbeat_seconds before the call does not make it any more."""
    shop, starts, charges_when_asked = Shop(), list[str](), list[int]()
    look = shop.look

    async def looks(order: Order, key: str) -> Any:
        charges_when_asked.append(len(shop.charges))
        return await look(order, key)

    shop.look = looks  # type: ignore[method-assign]

    async def block(run_id: str, node_id: str, state: Any) -> None:
        starts.append(node_id)
        if len(starts) == 1:
            time.sleep(4)

    temporal.options["heartbeat_seconds"] = 1.0
    async with temporal.bind([effect(shop)], hooks=NodeHooks(on_node_start=block)) as bound:
        result = await bound.run(Order())
    assert (result.status, shop.calls, charges_when_asked) == (RunStatus.COMPLETED, 1, [0])


@pytest.mark.parametrize("cached", [True, False])
async def test_lists_maps_and_flows(temporal: TemporalDriver, cached: bool) -> None:
    """Unknown calls suspend the run, are stated by signals one by one, and the run goes on by itself; in replays too."""
    if not cached:
        temporal.worker_options["max_cached_workflows"] = 0
    shop = Shop(after=[TimeoutError(), TimeoutError()])
    charge = effect(shop, reconciles=False)
    async with temporal.bind(
        [map_over("orders", charge, into="receipts", max_concurrency=1)], policy_map=TWICE
    ) as bound:
        run_id = f"map-{temporal.queue}"
        result = await bound.run(Orders(orders=[Order()] * 3), run_id=run_id)
        assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"] * 2, 3)
        await bound.runner.signal(run_id, NotDone(), branch="0")
        await bound.runner.signal(run_id, {"number": 2}, branch="1")
        result = await bound.go_on(Orders(orders=[Order()] * 3), run_id)
    assert (result.status, shop.calls) == (RunStatus.RESUMED, 4)
    assert result.final_state is not None
    assert result.final_state.model_dump()["receipts"] == [{"number": number} for number in (4, 2, 3)]

    shop = Shop(after=[TimeoutError()])
    step = effect(shop, reconciles=False)

    @stroma_flow("sell", input=Order, output=Total)
    async def sell(flow: Flow, order: Order) -> Total:
        return Total(receipts=[await flow.step(step, order), await flow.step(step, order)])

    temporal.queue += "-flow"
    async with temporal.bind([sell], policy_map=TWICE) as bound:
        run_id = f"flow-{temporal.queue}"
        result = await bound.run(Order(), run_id=run_id)
        assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)
        await bound.runner.signal(run_id, Receipt(number=1))
        result = await bound.go_on(Order(), run_id)
    assert (result.status, shop.calls, len(set(shop.charges))) == (RunStatus.RESUMED, 2, 2)


async def test_a_worker_that_ends_in_the_call(temporal: TemporalDriver) -> None:
    """A worker that is shut down in the call of an effect leaves it unknown; the next one asks reconcile."""
    shop, called = Shop(), asyncio.Event()
    charge = shop.charge

    async def waits(order: Order) -> Any:
        receipt = await charge(order)
        called.set()
        await asyncio.Event().wait()
        return receipt

    shop.charge = waits  # type: ignore[method-assign]
    pipeline = Pipeline("pipe", [effect(shop)])
    runner = temporal.runner(RunConfig(policy_map=NEVER))
    first = stroma_worker(temporal.client, temporal.queue, [pipeline])
    working = asyncio.create_task(first.run())
    running = asyncio.create_task(runner.run(pipeline, Order()))
    await called.wait()
    await first.shutdown()
    await working
    async with stroma_worker(temporal.client, temporal.queue, [pipeline]):
        result = await asyncio.wait_for(running, 60)
    assert (result.status, result.final_state, shop.calls) == (RunStatus.COMPLETED, Receipt(number=1), 1)
