"""Flows that take another path on a resume: what they did on the first path is not done again."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import World, runner_on
from tests.kit import Num, node
from tests.shared_stores import FAMILIES

from stroma import (
    Flow,
    FlowFunction,
    NodeContract,
    Pipeline,
    RunStatus,
    StepFailed,
    current_run,
    execute_step,
    stroma_flow,
    stroma_node,
)

store = store_fixture(*FAMILIES)
#: What a flow does once on all of its paths: an effect, a paid step, or a submission.
DOES = ("effect", "paid", "submit")


class Shop(World):
    """A world with something that must happen once."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does, self.submitted = does, Pipeline("mails", [node("mail", self._mail)])
        is_effect = does in ("effect", "inside")
        contract = NodeContract(node_id="pay", input_schema=Num, output_schema=Num, effect=is_effect)
        self.pay = stroma_node("pay", contract)(self._pay)
        self.agent = node("agent", self._agent)

    async def _mail(self, state: Num) -> Num:
        return state

    async def _agent(self, state: Num) -> Num:
        receipt = await execute_step("pay", self.pay, state, current_run())
        await self._call("agent")
        return Num(n=receipt.final_state.n)

    async def _pay(self, state: Num) -> Num:
        await self._call(f"pay {state.n}")
        return Num(n=len(self.paid()))

    async def once(self, flow: Flow, state: Num) -> str:
        """Return what happened: the number of the payment, or the id of the submitted run."""
        if self.does == "submit":
            return await flow.submit(self.submitted, state)
        if self.does == "inside":
            return str((await flow.step(self.agent, state)).n)
        return str((await flow.step(self.pay, state)).n)

    def paid(self) -> list[str]:
        return [one for one in self.calls if one.startswith("pay")]

    def count(self, store: Any) -> int:
        return len(self.paid()) + len([one for one in store.list_runs() if one.pipeline == "mails"])


def with_fallback(shop: Shop) -> FlowFunction[Num, Num]:
    """Return a flow that pays with a quote or, if there is none, without."""
    quote, improve, mail = shop.step("quote"), shop.step("improve"), shop.step("letter")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.step(quote, state)
            await flow.step(improve, state)
        except StepFailed:
            await shop.once(flow, state)
            return await flow.step(mail, state)
        await shop.once(flow, state)
        return await flow.step(mail, state)

    return f


def saga(shop: Shop) -> FlowFunction[Num, Num]:
    """Return a flow that pays back when a booking fails, and fails with it."""
    hotel, flight = shop.step("hotel"), shop.step("flight")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.step(hotel, state)
            return await flow.step(flight, state)
        except StepFailed:
            await shop.once(flow, state)
            raise

    return f


def side_by_side(shop: Shop) -> FlowFunction[Num, Num]:
    """Return a flow that pays beside a step, whose branch has another one after it."""
    reserve, label = shop.step("reserve"), shop.step("label")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        tried = asyncio.Event()

        async def stock() -> Num:
            try:
                await flow.step(reserve, state)
            finally:
                tried.set()
            return await flow.step(label, state)

        async def money() -> str:
            await tried.wait()
            return await shop.once(flow, state)

        ends = await asyncio.gather(stock(), money(), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        return state

    return f


@pytest.mark.parametrize("does", DOES)
async def test_a_fallback_that_was_paid_is_not_paid_again(store: Any, does: str) -> None:
    """G5, G13. A step that fails in the fallback for another ends the run, and a resume tries it alone."""
    shop = Shop(does)
    shop.failing = {"quote", "letter"}
    assert (await runner_on(store).run(with_fallback(shop), Num())).failure.node_id == "letter"
    shop.failing = set()
    result = await runner_on(store).run(with_fallback(shop), Num())
    assert (result.status, shop.count(store)) == (RunStatus.RESUMED, 1)
    assert [one.split()[0] for one in shop.calls if one != "pay 0"] == ["quote", "letter", "letter"]


@pytest.mark.parametrize("does", DOES)
async def test_a_compensation_is_made_once(store: Any, does: str) -> None:
    """G5, G13. A resume that fails elsewhere takes the compensation's outcome, whatever its number is."""
    shop = Shop(does)
    for failing in ("hotel", "flight", "flight"):
        shop.failing = {failing}
        result = await runner_on(store).run(saga(shop), Num())
        assert (result.failure.node_id, shop.count(store)) == (failing, 1)
    shop.failing = set()
    assert (await runner_on(store).run(saga(shop), Num())).status is RunStatus.RESUMED


@pytest.mark.parametrize("does", DOES)
async def test_a_branch_that_had_ended_is_not_made_again(store: Any, does: str) -> None:
    """G5, G13. A resume returns what a branch has done, though the other branch makes more calls before."""
    shop = Shop(does)
    shop.failing = {"reserve"}
    assert (await runner_on(store).run(side_by_side(shop), Num())).status is RunStatus.PARTIAL
    shop.failing = set()
    for _ in range(2):
        result = await runner_on(store).run(side_by_side(shop), Num())
        assert (result.status, shop.count(store)) == (RunStatus.RESUMED, 1)


async def test_an_effect_in_a_node_that_failed_is_not_made_again(store: Any) -> None:
    """G13. An effect that a failed node has called is not called again by another call of that node."""
    shop = Shop("inside")
    shop.failing = {"reserve", "agent"}
    assert (await runner_on(store).run(side_by_side(shop), Num())).status is RunStatus.PARTIAL
    shop.failing = set()
    result = await runner_on(store).run(side_by_side(shop), Num())
    assert (result.status, shop.count(store), shop.calls.count("agent")) == (RunStatus.RESUMED, 1, 2)


async def test_equal_calls_take_their_outcomes_in_order(store: Any) -> None:
    """G13. Two equal payments are two on each path; one more is another payment, with its own key."""
    shop, seen = Shop("effect"), list[list[str]]()
    first, second = shop.step("first"), shop.step("second")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.step(first, state)
            await flow.step(second, state)
        except StepFailed:
            seen.append([await shop.once(flow, state) for _ in range(2)])
            raise
        seen.append([await shop.once(flow, state) for _ in range(3)])
        return state

    for failing in ("first", "second", ""):
        shop.failing = {failing}
        result = await runner_on(store).run(f, Num())
    assert (result.status, seen) == (RunStatus.RESUMED, [["1", "2"], ["1", "2"], ["1", "2", "3"]])
    assert (len(shop.paid()), len(shop.keys["pay 0"])) == (3, 3)


async def test_an_error_that_is_raised_for_a_failure_is_tried_again(store: Any) -> None:
    """A resume tries the step again for whose failure the body raised an exception of its own."""
    shop = Shop("paid")
    shop.failing = {"quote"}
    quote = shop.step("quote")

    def refuse() -> Num:
        raise ValueError("nobody has a quote")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            return await flow.step(quote, state)
        except StepFailed:
            return refuse()

    assert "nobody" in (await runner_on(store).run(f, Num())).failure.message
    shop.failing = set()
    assert (await runner_on(store).run(f, Num())).status is RunStatus.RESUMED


async def test_a_flow_inside_may_decide_otherwise(store: Any) -> None:
    """An inner flow that ended after a failure which is retried has the output that its body returns now."""
    shop = Shop("paid")
    shop.failing, shop.turns = {"bad", "quote"}, {"quote": 20}
    bad, quote = shop.step("bad"), shop.step("quote", lambda n: 100)

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        try:
            return await flow.step(quote, state)
        except StepFailed:
            return Num(n=-1)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        calls = flow.step(bad, state), flow.run(inner, state)
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        if isinstance(first, BaseException):
            raise first
        assert isinstance(second, Num)
        return second

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    shop.failing = set()
    for _ in range(2):
        result = await runner_on(store).run(f, Num())
        assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=100))


async def test_a_question_with_a_key_keeps_its_answer(store: Any) -> None:
    """An answer belongs to the question with the same key, whatever path a resume takes to it."""
    shop = Shop("paid")
    hotel, flight = shop.step("hotel"), shop.step("flight")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            await flow.step(hotel, state)
            return await flow.step(flight, state)
        except StepFailed:
            await flow.wait_for(Num, reason="Cancel?", key="cancel")
            raise

    shop.failing = {"hotel", "flight"}
    assert (await runner_on(store).run(f, Num())).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Num())
    for failing in ("hotel", "flight"):
        shop.failing = {failing}
        assert (await runner_on(store).run(f, Num())).failure.node_id == failing
