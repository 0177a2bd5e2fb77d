"""Effects that a flow's body gives up or sees fail: they run to their end, and nobody calls them twice."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from tests.effects.shop import Order, Receipt, Refused, Shop
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


class Basket(BaseModel):
    items: dict[Any, Any]


class SlowShop(Shop):
    """A shop whose provider answers once it is told to.

    ``charged``: set when the provider has the charge. ``stuck``: set where a process that ``is_dying`` gets
        no further.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__()
        self.refuses, self.is_dying = refuses, False
        self.charged, self.answers, self.stuck = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def charge(self, order: Order) -> dict[str, Any]:
        receipt = {"number": 0} if self.refuses else await super().charge(order)
        self.charged.set()
        await self.answers.wait()
        if self.refuses:
            self.refuses = False
            raise Refused("declined")
        return receipt


def shop_flow(
    shop: SlowShop, store: Any, reconcile: Callable[..., Any] | None, calls: int = 2
) -> tuple[StromaRunner, FlowFunction[Order, Receipt]]:
    """A flow that gives up a charge as soon as the provider has it, and then makes further calls of it."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=reconcile)(shop.charge)

    @runner.node("hurry", input=Order, output=Order)
    async def hurry(order: Order) -> Order:
        await shop.charged.wait()
        return order

    @runner.node("answer", input=Order, output=Order)
    async def answer(order: Order) -> Order:
        if shop.is_dying:
            shop.stuck.set()
            await asyncio.Event().wait()
        shop.answers.set()
        return order

    @runner.flow("buy", input=Order, output=Receipt)
    async def buy(flow: Flow, order: Order) -> Receipt:
        first = asyncio.create_task(flow.step(charge, order))
        await flow.step(hurry, order)
        first.cancel()
        await asyncio.wait([first])
        await flow.step(answer, order)
        receipt = Receipt(number=0)
        for _ in range(1, calls):
            try:
                receipt = await flow.step(charge, order)
            except StepFailed:
                receipt = await flow.step(charge, order)
        return receipt

    return runner, buy


async def test_the_next_call_takes_the_outcome(store: Any) -> None:
    """G13. An equal call takes the outcome of the effect that the body gave up; a further one is a call."""
    shop = SlowShop()
    runner, buy = shop_flow(shop, store, shop.look)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.output, len(shop.charges)) == (RunStatus.COMPLETED, Receipt(number=1), 1)
    shop = SlowShop()
    runner, buy = shop_flow(shop, store, shop.look, calls=3)
    assert (await runner.run(buy, Order(), run_id="s")).output == Receipt(number=2)
    assert len(set(shop.charges)) == 2


async def test_a_call_with_an_equal_input_takes_the_outcome(store: Any) -> None:
    """G13. Inputs whose dicts are equal are the same input, whatever the order of the keys."""
    charges: list[Basket] = []
    runner = StromaRunner.quick(store=store, policy_map=NEVER)

    @runner.node(effect=True)
    async def charge(basket: Basket) -> Receipt:
        charges.append(basket)
        await asyncio.sleep(0.05)
        return Receipt(number=len(charges))

    @runner.flow
    async def buy(flow: Flow, order: Order) -> Receipt:
        try:
            async with asyncio.timeout(0.01):
                return await flow.step(charge, Basket(items={"tea": 1, 2: "cups"}))
        except TimeoutError:
            return await flow.step(charge, Basket(items={2: "cups", "tea": 1}))

    result = await runner.run(buy, Order(), run_id="r")
    assert (result.output, len(charges)) == (Receipt(number=1), 1)


async def test_a_refused_call_may_be_made_again(store: Any) -> None:
    """A charge that was given up and certainly refused allows another one."""
    shop = SlowShop(refuses=True)
    runner, buy = shop_flow(shop, store, shop.look)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, len(shop.charges)) == (RunStatus.COMPLETED, 1), result.failure


async def test_a_flow_does_not_end_before_an_effect(store: Any) -> None:
    """A charge in flight that nobody asks for any more is recorded before the flow ends."""
    shop = SlowShop()
    runner, buy = shop_flow(shop, store, shop.look, calls=1)
    result = await runner.run(buy, Order(), run_id="r")
    assert result.status is RunStatus.COMPLETED
    assert [event.outcome for event in result.trace if event.node_id == "charge"] == ["success"]


async def killed(store: Any, shop: SlowShop, reconcile: Any, calls: int) -> None:
    """Run a process that dies after the body gave the charge up and before the provider answers."""
    runner, buy = shop_flow(shop, store, reconcile, calls)
    shop.is_dying = True
    run = asyncio.create_task(runner.run(buy, Order(), run_id="r"))
    await shop.stuck.wait()
    run.cancel()
    await asyncio.wait([run])
    shop.is_dying = False


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("stated", ["done", "not done", "unknown"])
async def test_after_a_death_it_is_found_out_first(store: Any, stated: str, calls: int) -> None:
    """G13. A process that takes over asks how a charge that was given up ended, at a call or at the end."""
    shop = SlowShop()

    async def look(order: Order, key: str) -> Any:
        shop.asked.append(key)
        return {"done": {"number": 1}, "not done": NotDone(), "unknown": Unknown("no record")}[stated]

    await killed(store, shop, look, calls)
    assert len(shop.charges) == 1
    runner, buy = shop_flow(shop, store, look, calls)
    result = await runner.run(buy, Order(), run_id="r", resume=True)
    assert shop.asked == [shop.charges[0]]
    if stated == "unknown":
        assert (result.status, result.suspended, len(shop.charges)) == (RunStatus.SUSPENDED, ["effect"], 1)
        stated = "done"
        result = await runner.run(buy, Order(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED
    assert len(shop.charges) == (2 if stated == "not done" and calls == 2 else 1)


@pytest.mark.parametrize("way", ["call", "gather", "group"])
async def test_an_effect_inside_a_step_runs_to_its_end(store: Any, way: str) -> None:
    """G13. A body that gives up a step cuts off no effect inside it; the next call takes the outcome."""
    shop = SlowShop()
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    charge = runner.node("charge", input=Order, output=Receipt, effect=True)(shop.charge)

    async def charge_once(order: Order) -> Any:
        return (await execute_step("charge", charge, order, current_run())).output

    @runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        if way == "gather":
            async with asyncio.TaskGroup() as group:
                task = group.create_task(charge_once(order))
            return task.result()
        return await charge_once(order)

    @runner.node("hurry", input=Order, output=Order)
    async def hurry(order: Order) -> Order:
        await shop.charged.wait()
        return order

    @runner.node("answer", input=Order, output=Order)
    async def answer(order: Order) -> Order:
        shop.answers.set()
        return order

    step: Any = parallel(agent) if way == "group" else agent

    @runner.flow("buy", input=Order, output=Receipt)
    async def buy(flow: Flow, order: Order) -> Receipt:
        first = asyncio.create_task(flow.step(step, order))
        await flow.step(hurry, order)
        first.cancel()
        again = asyncio.create_task(flow.step(agent, order))
        await flow.step(answer, order)
        return await again

    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, len(shop.charges)) == (RunStatus.COMPLETED, 1), result.failure
    assert result.output.number == 1
    assert [event.outcome for event in result.trace.walk() if event.node_id == "charge"] == ["success"] * 2


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


def group_flow(
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
    runner, buy = group_flow(shop, store, shop.look, further=1, within=within)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=3))
    assert len(shop.charges) == len(set(shop.charges)) == 2
    shop = Store()
    runner, buy = group_flow(shop, store, shop.look, tries=1, further=2, within=within)
    await runner.run(buy, Order(), run_id="s")
    assert len(shop.charges) == 2, "the first further call has the charge of the group"


@pytest.mark.parametrize("within", ["group", "map", "node"])
async def test_a_charge_that_a_time_limit_cut_off_is_looked_for(store: Any, within: str) -> None:
    """G13. The next call of a group, map or node whose time limit cut off a charge asks the provider."""
    shop = Store(failures=0, hangs=True)
    runner, buy = group_flow(shop, store, shop.look, within=within)
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=2)), result.failure
    assert shop.asked == shop.charges
    assert len(shop.charges) == 1


async def test_a_charge_that_did_not_happen_is_made(store: Any) -> None:
    """A charge that was stated not to have happened is made by the next call of the group."""
    shop = Store(before=[ConnectionResetError("lost")])
    runner, buy = group_flow(shop, store, lambda order, key: NotDone())
    result = await runner.run(buy, Order(), run_id="r")
    assert (result.status, len(shop.charges)) == (RunStatus.COMPLETED, 1), result.failure


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize("tries", [1, 3])
async def test_an_unknown_charge_is_asked_about(store: Any, tries: int, happened: bool) -> None:
    """G13. A flow does not complete while nobody knows if a charge in a failed group happened, whether its
    body tries again or ends; a person states it, and no more than that charge is made."""
    shop = Store(after=[ConnectionResetError("lost")])
    runner, buy = group_flow(shop, store, lambda order, key: Unknown(), tries=tries)
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
    runner, buy = group_flow(shop, store, None, tries=1, within=within)
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

    _, buy = group_flow(shop, None, shop.look, within=within)
    await assert_resumable(
        buy, Order(), effects=lambda: len(shop.charges), processes=False, reset=reset, ignore=["n"]
    )
