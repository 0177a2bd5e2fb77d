"""Effects in groups, maps and nodes that a flow's body sees fail: the next calls take their outcome."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.effects.shop import Order, Receipt, Shop
from tests.fixtures import store_fixture
from tests.kit import NEVER, Num
from tests.shared_stores import FAMILIES

from stroma import (
    Flow,
    FlowFunction,
    Journal,
    NotDone,
    RunStatus,
    StepFailed,
    StromaRunner,
    Unknown,
    current_run,
    execute_step,
    map_over,
    parallel,
)
from stroma.testing import assert_resumable

store = store_fixture(*FAMILIES)


class Store(Shop):
    """A shop with a warehouse that is busy at first, and where a charge may take for ever."""

    def __init__(self, *, failures: int = 1, hangs: bool = False, **charges: Any) -> None:
        super().__init__(**charges)
        self.failures, self.hangs = failures, hangs

    async def charge(self, order: Order) -> dict[str, Any]:
        receipt = await super().charge(order)
        if self.hangs:
            await asyncio.Event().wait()
        return receipt

    async def reserve(self, order: Any) -> dict[str, Any]:
        if self.failures:
            self.failures -= 1
            raise ValueError("the warehouse is busy")
        return {"n": 1}


def shop_flow(
    shop: Store,
    store: Any,
    reconcile: Callable[..., Any] | None,
    *,
    tries: int = 3,
    further: int = 0,
    within: str = "group",
) -> tuple[StromaRunner, FlowFunction[Order, Num]]:
    """Return a flow that tries a group, map or node with a charge again, then charges ``further`` times."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=reconcile)(shop.charge)
    reserve = runner.node("reserve", input=Order, output=Num)(shop.reserve)
    group: Any = parallel(charge, reserve)
    if within == "map":
        group = map_over(lambda order: [order], charge, into=Journal())
    elif within == "node":

        @runner.node("agent", input=Order, output=Num)
        async def agent(order: Order) -> Any:
            (await execute_step("charge", charge, order, current_run())).raise_for_status()
            return await shop.reserve(order)

        group = agent
    if shop.hangs:
        runner = runner.with_node_timeouts({getattr(group, "node_id", "agent"): 500})

    @runner.flow("buy", input=Order, output=Num)
    async def buy(flow: Flow, order: Order) -> Num:
        n = 0
        while n < tries:
            n += 1
            try:
                await flow.step(group, order)
                break
            except StepFailed:
                pass
        for _ in range(further):
            await flow.step(charge, order)
        return Num(n=n)

    return runner, buy


@pytest.mark.parametrize("within", ["group", "node"])
async def test_a_charge_that_was_made_is_not_repeated(store: Any, within: str) -> None:
    """G13. A charge whose sibling or node failed is that of the next call; a call after that is another."""
    shop = Store(failures=2)
    runner, buy = shop_flow(shop, store, shop.look, further=1, within=within)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=3))
    assert len(shop.charges) == len(set(shop.charges)) == 2
    shop = Store()
    runner, buy = shop_flow(shop, store, shop.look, tries=1, further=2, within=within)
    await runner.run(buy, Order(), run_id="s")
    assert len(shop.charges) == 2, "the first further call has the charge of the group"


@pytest.mark.parametrize("within", ["group", "map", "node"])
async def test_a_charge_that_a_time_limit_cut_off_is_looked_for(store: Any, within: str) -> None:
    """G13. The next call of a group, map or node whose time limit cut off a charge asks the provider."""
    shop = Store(failures=0, hangs=True)
    runner, buy = shop_flow(shop, store, shop.look, within=within)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=2)), result.failure
    assert shop.asked == shop.charges
    assert len(shop.charges) == 1


async def test_a_charge_that_did_not_happen_is_made(store: Any) -> None:
    """A charge that was stated not to have happened is made by the next call of the group."""
    shop = Store(before=[ConnectionResetError("lost")])
    runner, buy = shop_flow(shop, store, lambda order, key: NotDone())
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, len(shop.charges)) == (RunStatus.COMPLETED, 1), result.failure


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize("tries", [1, 3])
async def test_an_unknown_charge_is_asked_about(store: Any, tries: int, happened: bool) -> None:
    """G13. A flow does not complete while nobody knows if a charge in a failed group happened, whether its
    body tries again or ends; a person states it, and no more than that charge is made."""
    shop = Store(after=[ConnectionResetError("lost")])
    runner, buy = shop_flow(shop, store, lambda order, key: Unknown(), tries=tries)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
    (question,) = result.questions
    await runner.signal("r", Receipt(number=1) if happened else NotDone(), question=question.id)
    result = await runner.run(buy, Order(), run_id="r", resume=True)
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=min(tries, 2))), result.failure
    assert len(shop.charges) == (1 if happened or tries == 1 else 2)


@pytest.mark.parametrize("within", ["group", "node"])
async def test_a_charge_cut_off_in_the_last_try_is_asked_about(store: Any, within: str) -> None:
    """G13. A charge that a group's or node's time limit cut off suspends a flow that calls nothing else."""
    shop = Store(failures=0, hangs=True)
    runner, buy = shop_flow(shop, store, None, tries=1, within=within)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, [one.node_id for one in result.questions]) == (RunStatus.SUSPENDED, ["charge"])
    again = await runner.run(buy, Order(), run_id="r", resume=True)
    assert (again.status, again.questions) == (RunStatus.SUSPENDED, result.questions)
    await runner.signal("r", Receipt(number=1), question=result.questions[0].id)
    assert (await runner.run(buy, Order(), run_id="r", resume=True)).status is RunStatus.RESUMED
    assert len(shop.charges) == 1


@pytest.mark.parametrize("within", ["group", "node"])
async def test_a_death_at_each_boundary(within: str) -> None:
    """G13. Wherever the process dies, a group or node that fails once charges once."""
    shop = Store()

    def reset() -> None:
        shop.charges, shop.failures = [], 1

    _, buy = shop_flow(shop, None, shop.look, within=within)
    await assert_resumable(
        buy, Order(), effects=lambda: len(shop.charges), processes=False, reset=reset, ignore=["n"]
    )
