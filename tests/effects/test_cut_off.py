"""Calls of effects that the code around them cuts off, and calls with another input at their place."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.effects.shop import Order, Receipt
from tests.fixtures import store_fixture
from tests.kit import NEVER, THRICE, context_of, open_question, same

from stroma import (
    NodeContract,
    NotDone,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    current_node_or_none,
    current_run,
    execute_step,
)
from stroma.adapters import Guard
from stroma.engine.context import ReliabilityContext
from stroma.testing import crash_at

store = store_fixture("async-memory", "sqlite")


class SlowTill:
    """An effect whose first call is not answered.

    Attributes:
        charges: (key, cents) of each charge. ``takes_first``: the first call is one of them.
        asked: (key, cents) of each question to ``reconcile``.
    """

    def __init__(
        self, store: Any, *, takes_first: bool = True, reconciles: bool = True, **config: Any
    ) -> None:
        self.charges: list[tuple[str, int]] = []
        self.asked: list[tuple[str, int]] = []
        self.calls, self._takes_first, self.hangs = 0, takes_first, asyncio.Event()
        self.runner = StromaRunner.quick(store=store, resume=True, run_id="r", policy_map=NEVER, **config)
        self.contract = NodeContract(
            node_id="charge",
            input_schema=Order,
            output_schema=Receipt,
            effect=True,
            reconcile=self._look if reconciles else None,
        )

    async def charge(self, order: Order) -> Any:
        self.calls += 1
        if self.calls > 1 or self._takes_first:
            self.charges.append((current_node().idempotency_key, order.cents))
        if self.calls == 1:
            self.hangs.set()
            await asyncio.Event().wait()
        return Receipt(number=len(self.charges))

    async def _look(self, order: Order, key: str) -> Any:
        self.asked.append((key, order.cents))
        return Receipt(number=self.charges.index(self.asked[-1]) + 1) if self.charges else NotDone()

    def tool(self, owner: Any) -> Any:
        """Return the effect as a tool of a runner, or of a run."""
        options: Any = {
            "input": Order,
            "output": Receipt,
            "effect": True,
            "reconcile": self.contract.reconcile,
        }

        async def charge(order: Order) -> Any:
            return await self.charge(order)

        guard = Guard(owner)
        return guard, guard.step("charge", **options)(charge)

    async def step(self, ctx: ReliabilityContext, cents: int = 100) -> Any:
        order = Order(cents=cents)
        result = await execute_step("charge", self.charge, order, ctx, contract=self.contract)
        if result.status is RunStatus.SUSPENDED:
            asked, node = Suspend("effect"), current_node_or_none()
            if node is not None:
                asked.asked_at = node.run_id, node.position, "charge#0"
            raise asked
        return result.final_state


async def cut_off(till: SlowTill, call: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a call. Cancels it, and raises TimeoutError, if the function hangs."""
    task, hangs = asyncio.create_task(call), asyncio.create_task(till.hangs.wait())
    await asyncio.wait([task, hangs], return_when=asyncio.FIRST_COMPLETED)
    hangs.cancel()
    if task.done():
        return task.result()
    till.hangs.clear()
    task.cancel()
    await asyncio.wait([task])
    raise TimeoutError


async def insist(till: SlowTill, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Call until there is an answer, as an agent does whose tool is too slow."""
    for _ in range(3):
        try:
            return await cut_off(till, call())
        except TimeoutError:
            continue
    raise AssertionError


async def in_a_node(till: SlowTill) -> Any:
    @till.runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        _, charge = till.tool(current_run())
        return await insist(till, lambda: charge(order))

    result = await till.runner.run([agent], Order())
    return result.final_state if result.failure is None and not result.suspended else None


async def in_plain_code(till: SlowTill) -> Any:
    runner = till.runner
    context = context_of(runner)
    async with context as ctx:
        try:
            return await insist(till, lambda: till.step(ctx))
        except Suspend:
            return None


async def in_a_guard(till: SlowTill) -> Any:
    guard, charge = till.tool(till.runner)
    async with guard.run(Order()):
        try:
            return await insist(till, lambda: charge(Order()))
        except Suspend:
            return None


CALLERS = pytest.mark.parametrize("caller", [in_a_node, in_plain_code, in_a_guard])


@pytest.mark.core
@CALLERS
@pytest.mark.parametrize("takes_first", [True, False])
async def test_a_call_that_is_cut_off_and_made_again(store: Any, caller: Any, takes_first: bool) -> None:
    """G13. Code that cuts an effect off and calls it again gets the first output; NotDone() allows a call."""
    till = SlowTill(store, takes_first=takes_first)
    assert await caller(till) == Receipt(number=1)
    assert (till.calls, len(till.charges), len(till.asked)) == (1 if takes_first else 2, 1, 1)
    assert till.asked == till.charges, "it has the key and the input of the first call"
    assert await caller(till) == Receipt(number=1)
    assert (len(till.charges), len(till.asked)) == (1, 1), "a resume restores it"


@pytest.mark.core
@CALLERS
@pytest.mark.parametrize("happened", [True, False])
async def test_a_person_is_asked_about_a_cut_off_call(store: Any, caller: Any, happened: bool) -> None:
    """G13. Without reconcile each further call suspends the run; the answer is about the first call."""
    till = SlowTill(store, takes_first=happened, reconciles=False)
    for _ in range(2):
        assert await caller(till) is None
        assert till.calls == 1
    (question,) = [one for one in store.waiting("r") if one.payload is None]
    stated = Receipt(number=7) if happened else NotDone()
    await till.runner.signal("r", stated, question=open_question(store, "r"), schema=Receipt)
    assert await caller(till) == Receipt(number=7 if happened else 1)
    assert len(till.charges) == 1
    assert till.charges[0][0] == question.effect.key


async def test_a_step_that_was_asked_about_is_not_called_again(store: Any) -> None:
    """G13. Code that ignores a suspended step and repeats the effect's call does not reach the function."""
    till = SlowTill(store, reconciles=False, node_timeouts={"charge": 50})
    runner = till.runner
    async with context_of(runner) as ctx:
        for _ in range(3):
            with pytest.raises(Suspend):
                await till.step(ctx)
        assert till.calls == 1
        assert await till.step(ctx, 7) == Receipt(number=2), "another input is another call"
    (question,) = store.waiting("r")
    assert question.effect.number == 1


async def test_two_calls_with_the_same_input_are_two_effects(store: Any) -> None:
    """Calls with the same input, none cut off, are effects of their own, in turn and at once."""
    till = SlowTill(store)
    till.calls = 1
    runner = till.runner
    async with context_of(runner) as ctx:
        await till.step(ctx)
        await asyncio.gather(till.step(ctx), till.step(ctx))
    assert len(till.charges) == len({key for key, _ in till.charges}) == 3
    assert till.asked == []


async def retry_with_another_input(till: SlowTill) -> Any:
    """Run a node whose attempt cuts its effect off and fails; the next calls it with another input."""

    @till.runner.node("agent", input=Order, output=Receipt)
    async def agent(order: Order) -> Any:
        run = current_run()
        assert run is not None
        if till.calls == 0:
            with pytest.raises(TimeoutError):
                await cut_off(till, till.step(run, 1))
            raise ConnectionResetError
        return await till.step(run, 2)

    return await till.runner.run([agent], Order())


@pytest.mark.core
async def test_another_input_waits_for_the_outcome_of_the_first(store: Any) -> None:
    """G13. Before a call with another input at the same place, reconcile gets the first input and key."""
    till = SlowTill(store, node_policies={"agent": THRICE})
    result = await retry_with_another_input(till)
    assert (result.status, [cents for _, cents in till.charges]) == (RunStatus.COMPLETED, [1, 2])
    assert till.asked == till.charges[:1]
    assert len({key for key, _ in till.charges}) == 2


@pytest.mark.core
@pytest.mark.parametrize("happened", [True, False])
async def test_a_person_is_asked_before_another_input(store: Any, happened: bool) -> None:
    """G13. Without reconcile a call with another input suspends the run, and is made after the answer."""
    till = SlowTill(store, reconciles=False, node_policies={"agent": THRICE})
    result = await retry_with_another_input(till)
    assert (result.status, result.suspended, till.calls) == (RunStatus.SUSPENDED, ["effect"], 1)
    (question,) = [one for one in store.waiting("r") if one.payload is None]
    assert "its input was another one" in question.effect.cause
    stated = Receipt(number=7) if happened else NotDone()
    await till.runner.signal("r", stated, question=open_question(store, "r"), schema=Receipt)
    result = await retry_with_another_input(till)
    assert (result.status, [cents for _, cents in till.charges]) == (RunStatus.RESUMED, [1, 2])


async def test_another_input_in_another_process(store: Any) -> None:
    """G13. A resume that calls the effect with another input asks a person first: the first input is gone."""
    till = SlowTill(store)
    till.calls = 1
    runner = till.runner

    async def process(cents: int) -> Any:
        async with context_of(runner) as ctx:
            await execute_step("begin", same, Order(), ctx)
            return await till.step(ctx, cents)

    with crash_at("after_node", "charge"):
        await process(1)
    with pytest.raises(Suspend):
        await process(2)
    assert ([cents for _, cents in till.charges], till.asked) == ([1], [])
    await runner.signal("r", NotDone(), question=open_question(store, "r"))
    assert await process(2) == Receipt(number=2)


@pytest.mark.core
async def test_another_input_of_a_list(store: Any) -> None:
    """An effect whose output was discarded is called with another input and key: its outcome is known."""
    till, cents = SlowTill(store), [1, 2, 1]
    till.calls = 1

    @till.runner.node("before", input=Order, output=Order)
    async def before(order: Order) -> Order:
        return Order(cents=cents.pop(0))

    charge = till.runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=till._look)
    nodes = [before, charge(till.charge)]
    await till.runner.run(nodes, Order())
    for _ in range(2):  # The second one has the first input again: that call is not repeated.
        result = await till.runner.run(nodes, Order(), resume_from="before")
    assert result.final_state == Receipt(number=1)
    assert [cents for _, cents in till.charges] == [1, 2]
    assert till.asked == till.charges[:1]
    assert len({key for key, _ in till.charges}) == 2


async def test_a_class_that_has_changed_is_no_other_input(store: Any) -> None:
    """G13. After a deploy that changes the input's class, an unknown call is reconciled as what it is."""
    till = SlowTill(store)
    till.calls = 1

    class NewOrder(Order):
        note: str = "new"

    def nodes(model: type[Order]) -> list[Any]:
        return [
            till.runner.node("charge", input=model, output=Receipt, effect=True, reconcile=till._look)(
                till.charge
            )
        ]

    with crash_at("after_node", "charge"):
        await till.runner.run(nodes(Order), Order())
    result = await till.runner.run(nodes(NewOrder), Order())
    assert (result.final_state, len(till.charges), len(till.asked)) == (Receipt(number=1), 1, 1)
