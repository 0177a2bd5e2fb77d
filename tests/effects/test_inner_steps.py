"""Effects that call other steps, and effects as steps of a guard, as tools of agent frameworks are."""

import asyncio
from typing import Any

import httpx
import pytest
from tests.effects.shop import Order, Receipt, Refused
from tests.fixtures import store_fixture
from tests.kit import NEVER, THRICE, open_question

from stroma import (
    ExecutionResult,
    NotDone,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    current_run,
    execute_step,
)
from stroma.adapters import Guard

store = store_fixture("async-memory", "sqlite")

REFUSED = httpx.HTTPStatusError(
    "429", request=httpx.Request("POST", "https://model.test"), response=httpx.Response(429)
)


class Till:
    """An effect that charges and then calls a step, and the step, which fails at first."""

    def __init__(self, store: Any, first: BaseException, *, how: str = "raised"):
        self.runner = StromaRunner.quick(store=store, policy_map=NEVER)
        self.charges = self.calls = 0
        self.first, self.how = first, how
        marked = self.runner.node("inner", input=Order, output=Order)
        self.inner = marked(self._inner)
        self.pay = self.runner.node("pay", input=Order, output=Receipt, effect=True)(self._pay)

    async def _inner(self, order: Order) -> Order:
        self.calls += 1
        if self.calls == 1:
            raise self.first
        return order

    async def _pay(self, order: Order) -> Receipt:
        self.charges += 1
        try:
            if self.how == "of another run":
                result = await StromaRunner.quick(policy_map=NEVER).run([self.inner], order)
            else:
                run = current_run()
                assert run is not None
                result = await execute_step("inner", self.inner, order, run)
            result.raise_for_status()
        except httpx.HTTPStatusError as error:
            if self.how == "wrapped":
                raise Refused from error
            if self.how == "while handled":
                raise Refused  # noqa: B904
            if self.how == "in a group":
                raise ExceptionGroup("both", [error, Refused()]) from None
            raise
        return Receipt(number=self.charges)

    async def run(self) -> ExecutionResult:
        return await self.runner.run([self.pay], Order(), run_id="r", if_exists="resume")


@pytest.mark.core
@pytest.mark.parametrize("how", ["raised", "wrapped", "while handled", "in a group", "of another run"])
async def test_a_refusal_inside_is_not_that_of_the_effect(store: Any, how: str) -> None:
    """G13: A step inside an effect that is refused leaves the outcome of the effect unknown, however its
    exception is wrapped; a refusal of the effect's own request afterwards is one."""
    till = Till(store, REFUSED, how=how)
    assert (await till.run()).suspended == ["effect"]
    assert ((await till.run()).status, till.charges) == (RunStatus.SUSPENDED, 1)
    await till.runner.signal("r", NotDone(), question=open_question(store, "r"))
    assert ((await till.run()).status, till.charges) == (RunStatus.RESUMED, 2)


@pytest.mark.core
async def test_an_own_refusal_beside_a_failed_step_is_one(store: Any) -> None:
    """An effect whose own request is refused did not happen, also if a step inside has failed before."""
    runner, charges = StromaRunner.quick(store=store, policy_map=NEVER), [Refused()]

    @runner.node("pay", input=Order, output=Receipt, effect=True)
    async def pay(order: Order) -> Receipt:
        run = current_run()
        assert run is not None
        assert not (await execute_step("check", check, order, run)).ok
        if charges:
            raise charges.pop()
        return Receipt(number=1)

    @runner.node("check", input=Order, output=Order)
    async def check(order: Order) -> Order:
        raise REFUSED

    assert (await runner.run([pay], Order(), run_id="r")).status is RunStatus.FAILED
    assert (await runner.run([pay], Order(), run_id="r", resume=True)).status is RunStatus.RESUMED


@pytest.mark.core
@pytest.mark.parametrize("asks", [True, False])
async def test_a_question_inside_is_not_asked_before_the_effect(store: Any, asks: bool) -> None:
    """G13: An effect that acts, then calls a step that asks, is not called again: a person is asked."""
    charges = list[int]()
    question: list[Exception] = [Suspend("which?", schema=Order) if asks else TimeoutError()]
    runner = StromaRunner.quick(store=store, policy_map=NEVER, resume=True, run_id="r")
    guard = Guard(runner)

    @guard.step("mail", effect=not asks)
    async def mail(cents: int) -> int:
        if question:
            raise question.pop()
        return cents

    @guard.step("pay", effect=True)
    async def pay(cents: int) -> int:
        charges.append(cents)
        return await mail(cents)

    for asking in ("mail", "pay"):
        async with guard.run() as run:
            with pytest.raises(Suspend):
                await pay(5)
        assert (run.result.status, charges) == (RunStatus.SUSPENDED, [5])
        await runner.signal("r", {"cents": 5}, question=open_question(store, "r", node_id=asking))
    async with guard.run() as run:
        assert await pay(5) == {"cents": 5}
    assert (run.result.status, charges) == (RunStatus.RESUMED, [5])


@pytest.mark.core
async def test_an_own_question_in_a_guarded_effect(store: Any) -> None:
    """A guarded effect that itself asks has not acted: it is called again for the answer."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER, resume=True, run_id="r")
    guard, calls = Guard(runner), list[int]()

    @guard.step("pay", effect=True)
    async def pay(cents: int) -> int:
        calls.append(cents)
        current_node().wait_for(Order, reason="which?")
        return cents

    async with guard.run():
        with pytest.raises(Suspend):
            await pay(5)
    await runner.signal("r", Order(), question=open_question(store, "r"), schema=Order)
    async with guard.run():
        assert await pay(5) == 5
    assert calls == [5, 5]


@pytest.mark.core
async def test_a_refused_model_inside_a_guarded_tool(store: Any) -> None:
    """G13: An agent that repeats a tool which charged before its model was refused does not charge twice."""
    guard = Guard(StromaRunner.quick(store=store, policy_map=NEVER))
    charges, asked = list[int](), list[str]()

    @guard.step("model")
    def model(text: str) -> str:
        asked.append(text)
        if len(asked) == 1:
            raise REFUSED
        return "thanks"

    @guard.step("pay", effect=True)
    def pay(cents: int) -> str:
        charges.append(cents)
        return model(f"a receipt for {cents}")

    async with guard.run(run_id="r") as run:
        for error in (httpx.HTTPStatusError, Suspend):
            with pytest.raises(error):
                pay(5)
    assert (run.result.status, run.result.suspended, charges) == (RunStatus.SUSPENDED, ["effect"], [5])


class GuardedTill:
    """A tool that charges, and its provider."""

    def __init__(self, store: Any, *, fails: int = 0, reconciles: bool = True, **options: Any) -> None:
        self.charges: dict[str, int] = {}
        self.calls, self._fails = 0, fails
        self.runner = StromaRunner.quick(store=store, policy_map=THRICE, resume=True, run_id="r")
        self.guard = Guard(self.runner)
        reconcile = self.look if reconciles else None
        step = self.guard.step("charge", effect=True, reconcile=reconcile, **options)
        self.charge, self.charge_sync = step(self._charge), step(self._charge_sync)

    def _charge_sync(self, cents: int) -> Any:
        here = current_node()
        self.calls += 1
        self.charges[here.idempotency_key] = self.charges.get(here.idempotency_key, 0) + 1
        if self.calls <= self._fails:
            raise TimeoutError("no answer")
        return {"number": len(self.charges)}

    async def _charge(self, cents: int) -> Any:
        return self._charge_sync(cents)

    def look(self, _: Any, key: str) -> Any:
        return {"number": list(self.charges).index(key) + 1} if key in self.charges else NotDone()


@pytest.mark.core
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_tool_that_may_have_happened(store: Any, is_async: bool) -> None:
    """G13. A guarded effect's caller gets the output that reconcile states; the function is called once."""
    till = GuardedTill(store, fails=1)
    async with till.guard.run() as run:
        value = await till.charge(5) if is_async else await asyncio.to_thread(till.charge_sync, 5)
    assert (value, till.calls, list(till.charges.values())) == ({"number": 1}, 1, [1])
    assert run.result.status is RunStatus.COMPLETED


@pytest.mark.core
async def test_an_agent_cannot_repeat_an_unknown_call(store: Any) -> None:
    """A framework that swallows the suspension and repeats the call does not reach the function."""
    till = GuardedTill(store, fails=1, reconciles=False, output=Receipt)
    async with till.guard.run() as run:
        for _ in range(3):
            with pytest.raises(Suspend):
                await till.charge(5)
    assert (run.result.status, run.result.suspended, till.calls) == (RunStatus.SUSPENDED, ["effect"], 1)
    await till.runner.signal("r", {"number": 9}, question=open_question(store, "r"), schema=Receipt)
    async with till.guard.run() as run:  # As the next process does, from the start.
        assert await till.charge(5) == Receipt(number=9)
    assert till.calls == 1
    async with till.guard.run() as run:
        assert await till.charge(5) == Receipt(number=9)
        assert await till.charge(6) == {"number": 2}
    assert till.calls == 2


async def test_each_call_of_a_tool_is_an_effect_of_its_own(store: Any) -> None:
    """Two calls with the same arguments are two effects with different keys; a resume repeats neither."""
    till = GuardedTill(store)
    for _ in range(2):
        async with till.guard.run():
            assert [await till.charge(5), await till.charge(5)] == [{"number": 1}, {"number": 2}]
    assert (till.calls, len(till.charges)) == (2, 2)
