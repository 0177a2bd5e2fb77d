"""Effects in groups, maps, plain steps, steps that nodes call, and flows."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.effects.shop import Order, Receipt, Shop
from tests.fixtures import store_fixture
from tests.kit import NEVER, ONCE, THRICE, cancel, context_of, open_question

from stroma import (
    Flow,
    NodeContract,
    NotDone,
    RunStatus,
    StromaRunner,
    current_run,
    execute_step,
    map_over,
    parallel,
)
from stroma.testing import crash_at

store = store_fixture("async-memory", "sqlite")


class Orders(BaseModel):
    orders: list[Order]


class Total(BaseModel):
    receipts: list[Receipt]


def effect(runner: StromaRunner, shop: Shop, *, reconciles: bool = True) -> Any:
    """Return the node that charges."""
    return runner.node(
        "charge", input=Order, output=Receipt, effect=True, reconcile=shop.look if reconciles else None
    )(shop.charge)


class Siblings:
    """An effect that its provider answers slowly, and a node that fails during the call."""

    def __init__(self, runner: StromaRunner, fails: int = 1) -> None:
        self.shop, self.charged, self.answered = Shop(), asyncio.Event(), asyncio.Event()
        self.tries, self.fails = 0, fails
        self.charge = runner.node(
            "charge", input=Order, output=Receipt, effect=True, reconcile=self.shop.look
        )(self._charge)
        self.fail = runner.node("fail", input=Order, output=Order)(self._fail)

    async def _charge(self, order: Order) -> Any:
        receipt = await self.shop.charge(order)
        self.charged.set()
        await self.answered.wait()
        return receipt

    async def _fail(self, order: Order) -> Order:
        await self.charged.wait()
        self.tries += 1
        if self.tries <= self.fails:
            asyncio.get_running_loop().call_later(0.01, self.answered.set)
            raise ConnectionResetError
        return order


@pytest.mark.core
async def test_a_child_of_a_group(store: Any) -> None:
    """G13. An effect whose sibling fails runs to its end; a retry of the group uses its output."""
    policies = {"parallel(charge, fail)": THRICE}
    runner = StromaRunner.quick(store=store, policy_map=NEVER, node_policies=policies)
    siblings = Siblings(runner, fails=2)
    result = await runner.run([parallel(siblings.charge, siblings.fail)], Order(), run_id="r")
    assert (result.status, siblings.shop.calls, siblings.tries) == (RunStatus.COMPLETED, 1, 3)
    assert siblings.shop.asked == []
    outcomes = [event.outcome for event in result.trace.walk() if event.node_id == "charge"]
    assert outcomes == ["success"]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["nested", "item", "step"])
async def test_an_effect_further_inside(store: Any, kind: str) -> None:
    """G13. A sibling's failure lets an effect in a group, a map or a step of a node run to its end, too."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    siblings, after = Siblings(runner), []

    @runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        run = current_run()
        assert run is not None
        step = await execute_step("charge", siblings.charge, order, run)
        await asyncio.sleep(0)
        after.append(step)
        return step.final_state

    inside: dict[str, Any] = {
        "nested": parallel(siblings.charge),
        "item": map_over(lambda order: [Order(cents=1)], siblings.charge, into="receipts"),
        "step": agent,
    }
    nodes = [parallel(inside[kind], siblings.fail)]
    result = await runner.run(nodes, Order(), run_id="r")
    assert (result.status, siblings.shop.calls) == (RunStatus.PARTIAL, 1)
    assert after == [], "the code after the effect is cancelled"
    result = await runner.run(nodes, Order(), run_id="r", resume=True)
    assert (result.status, siblings.shop.calls, siblings.shop.asked) == (RunStatus.RESUMED, 1, [])


@pytest.mark.core
async def test_a_cancellation_from_outside_does_not_wait(store: Any) -> None:
    """A run that is cancelled while a failed group waits for an effect cuts it off; the resume asks."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    siblings = Siblings(runner)
    siblings.answered.set = lambda: None
    nodes = [parallel(siblings.charge, siblings.fail)]
    task = asyncio.create_task(runner.run(nodes, Order(), run_id="r"))
    while not siblings.tries:
        await asyncio.sleep(0.01)
    assert not task.done()
    await cancel(task)
    result = await runner.run(nodes, Order(), run_id="r", resume=True)
    assert (result.status, siblings.shop.calls, len(siblings.shop.asked)) == (RunStatus.RESUMED, 1, 1)


async def test_a_time_limit_of_a_group_cuts_an_effect_off(store: Any) -> None:
    """G13. Another attempt of a group whose time limit cut an effect off asks, and makes no call."""
    shop, tries = Shop(), []

    async def slow(order: Order) -> Any:
        receipt = await shop.charge(order)
        tries.append(1)
        await asyncio.Event().wait()
        return receipt

    runner = StromaRunner.quick(
        store=store, node_policies={"parallel(charge)": THRICE}, node_timeouts={"parallel(charge)": 500}
    )
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=shop.look)(slow)
    result = await runner.run([parallel(charge)], Order(), run_id="r")
    assert (result.status, shop.calls, len(shop.asked)) == (RunStatus.COMPLETED, 1, 1)


async def test_a_suspended_child_lets_its_siblings_end(store: Any) -> None:
    """An unknown effect in a group suspends the run once its siblings have ended; only it is asked again."""
    shop, calls = Shop(after=[TimeoutError()]), []
    runner = StromaRunner.quick(store=store)

    @runner.node("other", input=Order, output=Order)
    async def other(order: Order) -> Order:
        calls.append(order.cents)
        return order

    nodes = [parallel(effect(runner, shop, reconciles=False), other)]
    result = await runner.run(nodes, Order(), run_id="r")
    assert (result.status, result.suspended, calls) == (RunStatus.SUSPENDED, ["effect"], [100])
    await runner.signal("r", {"number": 9}, question=open_question(store, "r"))
    result = await runner.run(nodes, Order(), run_id="r", resume=True)
    assert (result.status, calls, shop.calls) == (RunStatus.RESUMED, [100], 1)
    assert result.final_state is not None
    assert result.final_state.model_dump() == {"number": 9, "cents": 100}


@pytest.mark.core
@pytest.mark.parametrize("dies", [False, True])
async def test_items_of_a_map(store: Any, dies: bool) -> None:
    """Each item of a map is an effect of its own: those that may have happened are reconciled, one by one."""
    shop = Shop(after=() if dies else [TimeoutError(), KeyError("x")])
    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    nodes = [map_over("orders", effect(runner, shop), into="receipts", max_concurrency=2)]
    orders = Orders(orders=[Order(cents=n) for n in range(5)])
    if dies:
        with crash_at("after_node", "charge", branch="0"):
            await runner.run(nodes, orders, run_id="r")
    result = await runner.run(nodes, orders, run_id="r", resume=dies)
    assert result.status in (RunStatus.COMPLETED, RunStatus.RESUMED)
    assert len(shop.charges) == len(set(shop.charges)) == shop.calls == 5
    assert shop.asked


@pytest.mark.core
async def test_a_step_of_plain_code(store: Any) -> None:
    """execute_step asks for an effect whose call may have happened, in this process and in the next."""
    shop = Shop(after=[TimeoutError()])
    contract = NodeContract(node_id="charge", input_schema=Order, output_schema=Receipt, effect=True)
    runner = StromaRunner.quick(store=store, resume=True, run_id="r", policy_map=THRICE)
    for _ in range(2):
        async with context_of(runner) as ctx:
            step = await execute_step("charge", shop.charge, Order(), ctx, contract=contract)
        assert (step.status, shop.calls) == (RunStatus.SUSPENDED, 1)
    await runner.signal("r", Receipt(number=3), question=open_question(store, "r"))
    async with context_of(runner) as ctx:
        step = await execute_step("charge", shop.charge, Order(), ctx, contract=contract)
    assert (step.final_state, shop.calls) == (Receipt(number=3), 1)


@pytest.mark.core
async def test_a_step_that_a_retried_node_calls(store: Any) -> None:
    """G13. Another attempt of a node gets the output of an equal call of an effect; other input is a call."""
    shop, tries = Shop(), []
    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    charge = effect(runner, shop)

    @runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        run = current_run()
        assert run is not None
        first = await execute_step("charge", charge, order, run)
        tries.append(first.final_state)
        if len(tries) < 3:
            raise ConnectionResetError
        await execute_step("charge", charge, Order(cents=7), run)
        return first.final_state

    result = await runner.run([agent], Order(), run_id="r")
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Receipt(number=1))
    assert tries == [Receipt(number=1)] * 3
    assert shop.calls == len(set(shop.charges)) == 2


async def test_another_attempt_of_a_node_with_another_input(store: Any) -> None:
    """A retried node that calls the effect with another input calls another effect, with a key of its own."""
    shop, tries = Shop(), []
    runner = StromaRunner.quick(store=store, policy_map=ONCE)
    charge = effect(runner, shop)

    @runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        run = current_run()
        assert run is not None
        tries.append(1)
        step = await execute_step("charge", charge, Order(cents=len(tries)), run)
        if len(tries) == 1:
            raise ConnectionResetError
        return step.final_state

    result = await runner.run([agent], Order(), run_id="r")
    assert (result.final_state, shop.calls, len(set(shop.charges))) == (Receipt(number=2), 2, 2)


@pytest.mark.core
async def test_a_step_of_a_flow(store: Any) -> None:
    """G13. A step of a flow that is an effect suspends the flow while its outcome is unknown."""
    shop = Shop(after=[TimeoutError()])
    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    charge = effect(runner, shop, reconciles=False)

    @runner.flow("sell", input=Order, output=Receipt)
    async def sell(flow: Flow, order: Order) -> Receipt:
        receipt: Receipt = await flow.step(charge, order)
        return receipt

    for _ in range(2):
        result: Any = await runner.run(sell, Order(), run_id="r", resume=True)
        assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)
    await runner.signal("r", NotDone(), question=open_question(store, "r"))
    result = await runner.run(sell, Order(), run_id="r", resume=True)
    assert (result.status, result.output, shop.calls) == (RunStatus.RESUMED, Receipt(number=2), 2)


async def test_effects_of_a_flow_at_once_around_a_death(store: Any) -> None:
    """Concurrent effects of a flow, a map among them, happen once each, whenever the process dies."""
    shop = Shop()
    runner = StromaRunner.quick(store=store)
    charge = effect(runner, shop)

    @runner.flow("sell", input=Order, output=Total)
    async def sell(flow: Flow, order: Order) -> Total:
        two = await asyncio.gather(*(flow.step(charge, Order(cents=n)) for n in range(2)))
        more = await flow.map(charge, [Order(cents=9), Order(cents=10)])
        return Total(receipts=[*two, *more])

    for _ in range(2):
        with crash_at("after_node", "charge"):
            await runner.run(sell, Order(), run_id="r", resume=True)
    result: Any = await runner.run(sell, Order(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED
    assert len(shop.charges) == len(set(shop.charges)) == shop.calls == 4
    assert sorted(receipt.number for receipt in result.output.receipts) == [1, 2, 3, 4]
