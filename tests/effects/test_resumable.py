"""The test kit and effects: a death at each boundary, between intent, call and commit too."""

from typing import Any

import pytest
from tests.effects.shop import Order, Receipt, Shop

from stroma import StromaRunner, stroma_node
from stroma.contracts.contract import NodeContract
from stroma.testing import assert_resumable


def nodes_of(shop: Shop, **options: Any) -> list[Any]:
    runner = StromaRunner.quick()
    charge = runner.node("charge", input=Order, output=Receipt, **options)(shop.charge)
    last = NodeContract(node_id="last", input_schema=Receipt, output_schema=Receipt)

    @stroma_node("last", last)
    async def count(receipt: Receipt) -> Receipt:
        return receipt

    return [charge, count]


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_an_effect_with_reconcile_is_proven(processes: bool) -> None:
    """assert_resumable accepts an effect whose charge is made once, wherever the process dies; both sides of its call are tried."""
    shop = Shop()
    proof = await assert_resumable(
        nodes_of(shop, effect=True, reconcile=shop.look), Order(),
        effects=None if processes else lambda: len(shop.charges), reset=lambda: setattr(shop, "charges", []),
        processes=processes,
    )  # fmt: skip
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
