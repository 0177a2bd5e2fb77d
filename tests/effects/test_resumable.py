"""The test kit and effects: a death at each boundary, between intent, call and commit too."""

from typing import Any

import pytest
from tests.effects.shop import Order, Receipt, Shop
from tests.kit import passing

from stroma import Flow, FlowFunction, StromaRunner, stroma_flow, stroma_node
from stroma.contracts.contract import NodeContract
from stroma.testing import assert_resumable


def nodes_of(shop: Shop, **options: Any) -> list[Any]:
    runner = StromaRunner.quick()
    charge = runner.node("charge", input=Order, output=Receipt, **options)(shop.charge)
    last = NodeContract(node_id="last", input_schema=Receipt, output_schema=Receipt)

    count = stroma_node("last", last)(passing())
    return [charge, count]


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_an_effect_with_reconcile_is_proven(processes: bool) -> None:
    """assert_resumable accepts an effect that charges once, with a death on either side of its call."""
    shop = Shop()
    proof = await assert_resumable(
        nodes_of(shop, effect=True, reconcile=shop.look),
        Order(),
        effects=None if processes else lambda: len(shop.charges),
        reset=lambda: setattr(shop, "charges", []),
        processes=processes,
    )
    tried = [boundary.point for boundary in proof.boundaries if boundary.node_id == "charge"]
    assert tried[:3] == ["before_node", "after_node", "after_commit"]


async def test_an_effect_without_reconcile_is_none() -> None:
    """Without reconcile the resumed run waits for a person, and the message says what is missing."""
    shop = Shop()
    with pytest.raises(
        AssertionError, match=r"before node 'charge'.* was called; .*SUSPENDED.*pass reconcile="
    ):
        await assert_resumable(
            nodes_of(shop, effect=True), Order(), processes=False, reset=shop.charges.clear
        )


async def test_a_node_that_is_no_effect_charges_twice() -> None:
    """The same node without effect=True is found out."""
    shop = Shop()
    with pytest.raises(AssertionError, match=r"its effects differ.*pass effect=True"):
        await assert_resumable(
            nodes_of(shop),
            Order(),
            effects=lambda: len(shop.charges),
            reset=shop.charges.clear,
            ignore=["number"],
        )


def flow_of(shop: Shop, **options: Any) -> FlowFunction[Order, Receipt]:
    """A flow that charges in a step, in a map and in a flow inside."""
    charge = StromaRunner.quick().node("charge", input=Order, output=Receipt, **options)(shop.charge)

    @stroma_flow("inner", input=Order, output=Receipt)
    async def inner(flow: Flow, order: Order) -> Receipt:
        receipt: Receipt = await flow.step(charge, order)
        return receipt

    @stroma_flow("sell", input=Order, output=Receipt)
    async def sell(flow: Flow, order: Order) -> Receipt:
        await flow.step(charge, Order(cents=1))
        await flow.map(charge, [Order(cents=2), Order(cents=3)])
        return await flow.run(inner, Order(cents=4))

    return sell


async def test_effects_of_a_flow_are_proven() -> None:
    """assert_resumable takes a flow whose steps, maps and flows have effects, each of which happens once."""
    shop = Shop()
    proof = await assert_resumable(
        flow_of(shop, effect=True, reconcile=shop.look),
        Order(),
        effects=lambda: len(shop.charges),
        processes=False,
        reset=lambda: setattr(shop, "charges", []),
        ignore=["number"],
    )
    branches = {boundary.branch for boundary in proof.boundaries if boundary.node_id == "charge"}
    assert branches == {"charge#0", "*charge#1.0", "*charge#1.1", "inner#2.charge#0"}


async def test_a_step_of_a_flow_that_is_no_effect_charges_twice() -> None:
    """The same flow without effect=True is found out."""
    shop = Shop()
    with pytest.raises(AssertionError, match=r"its effects differ.*pass effect=True"):
        await assert_resumable(
            flow_of(shop),
            Order(),
            effects=lambda: len(shop.charges),
            processes=False,
            reset=lambda: setattr(shop, "charges", []),
            ignore=["number"],
        )


async def test_a_replay_calls_no_effect() -> None:
    """check_deterministic calls each effect of a flow once, and none in its replay."""
    shop = Shop()
    result = await StromaRunner.quick().check_deterministic(
        flow_of(shop, effect=True, reconcile=shop.look), Order()
    )
    assert isinstance(result.output, Receipt)
    assert len(shop.charges) == 4
