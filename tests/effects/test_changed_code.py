"""Code that changed while the outcome of an effect is unknown: nothing is called before somebody decides."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, create_model
from tests.effects.shop import Order, Receipt, Shop
from tests.fixtures import store_fixture
from tests.flows.steps import runner_on
from tests.kit import NEVER, Num, node, open_question
from tests.shared_stores import FAMILIES

from stroma import (
    Flow,
    NodeContract,
    NotDone,
    PipelineChanged,
    RunStatus,
    StepFailed,
    StromaRunner,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.testing import crash_at

store = store_fixture(*FAMILIES)
Body = Callable[[Flow, "Code", Order], Awaitable[Any]]


class Both(BaseModel):
    receipts: list[Receipt] = []


class Code:
    """The nodes of one version of the code. ``name``: of the effect; ``is_effect``: it still is one."""

    def __init__(self, shop: Shop, name: str = "pay", is_effect: bool = True) -> None:
        contract = NodeContract(
            node_id=name, input_schema=Order, output_schema=Receipt, effect=is_effect, reconcile=None
        )
        self.pay = stroma_node(name, contract)(shop.charge)
        self.first, self.other = stroma_node("first")(_same), stroma_node("other")(_same)
        self.fails = stroma_node("fails")(_fails)
        self.ends = stroma_node("ends")(_ends)

    @property
    def inner(self) -> Any:
        @stroma_flow("inner")
        async def inner(flow: Flow, state: Order) -> Receipt:
            return await flow.step(self.pay, state)

        return inner

    @property
    def without(self) -> Any:
        @stroma_flow("inner")
        async def inner(flow: Flow, state: Order) -> Receipt:
            return await flow.step(self.ends, state)

        return inner


async def _same(order: Order) -> Order:
    return order


async def _ends(order: Order) -> Receipt:
    return Receipt(number=0)


async def _fails(order: Order) -> Order:
    raise KeyError("fails")


class Change(NamedTuple):
    """The nodes of a list, or the body of a flow, before and after a deploy."""

    before: Any
    after: Any
    name: str = "pay"
    is_effect: bool = True


def split(order: Order) -> list[Order]:
    return [order]


async def again(flow: Flow, code: Code, order: Order) -> Any:
    """Try a step that fails, and pay then."""
    try:
        await flow.step(code.fails, order)
    except StepFailed:
        return await flow.step(code.pay, order)


def step(node: str, key: str | None = None) -> Body:
    async def body(flow: Flow, code: Code, order: Order) -> Any:
        return await flow.step(getattr(code, node), order, key=key)

    return body


def inside(flow_name: str) -> Body:
    async def body(flow: Flow, code: Code, order: Order) -> Any:
        return await flow.run(getattr(code, flow_name), order)

    return body


def after(first: Body, then: Body) -> Body:
    async def body(flow: Flow, code: Code, order: Order) -> Any:
        await first(flow, code, order)
        return await then(flow, code, order)

    return body


def mapped(key: str | None) -> Body:
    async def body(flow: Flow, code: Code, order: Order) -> Any:
        return (await flow.map(code.pay, [order], key=key))[0]

    return body


LISTS = {
    "renamed": Change(lambda c: [c.pay], lambda c: [c.pay], "charge"),
    "moved": Change(lambda c: [c.first, c.pay], lambda c: [c.first, c.other, c.pay]),
    "removed": Change(lambda c: [c.first, c.pay], lambda c: [c.first]),
    "replaced": Change(lambda c: [c.pay], lambda c: [c.pay], is_effect=False),
    "child": Change(lambda c: [parallel(c.pay, c.first)], lambda c: [parallel(c.pay, c.first)], "charge"),
    "item": Change(
        lambda c: [map_over(split, c.pay, into="receipts")],
        lambda c: [map_over(split, c.pay, into="receipts")],
        "charge",
    ),
}
FLOWS = {
    "renamed": Change(step("pay"), step("pay"), "charge"),
    "renamed with a key": Change(step("pay", "k"), step("pay", "k"), "charge"),
    "another key": Change(step("pay", "k"), step("pay", "j")),
    "moved": Change(step("pay"), after(step("other"), step("pay"))),
    "moved with a key": Change(
        after(step("first"), step("pay", "k")), after(step("first"), after(step("other"), step("pay", "k")))
    ),
    "removed": Change(after(step("first"), step("pay")), after(step("first"), step("ends"))),
    "removed with a key": Change(step("pay", "k"), step("ends", "j")),
    "replaced": Change(step("pay"), step("pay"), is_effect=False),
    "in a flow inside": Change(inside("inner"), inside("without")),
    "item": Change(mapped("k"), mapped("k"), "charge"),
    "after a failure": Change(again, again, "charge"),
}


def nodes_of(change: Change, shop: Shop, is_flow: bool, is_after: bool) -> Any:
    code = Code(shop, change.name, change.is_effect) if is_after else Code(shop)
    make = change.after if is_after else change.before
    if not is_flow:
        return make(code)

    @stroma_flow("f")
    async def f(flow: Flow, state: Order) -> Receipt:
        output: Receipt = await make(flow, code, state)
        return output

    return f


CASES = [
    *(pytest.param(change, False, id=f"list: {name}") for name, change in LISTS.items()),
    *(pytest.param(change, True, id=f"flow: {name}") for name, change in FLOWS.items()),
]


@pytest.mark.core
@pytest.mark.parametrize(("change", "is_flow"), CASES)
async def test_an_unknown_call_that_code_no_longer_makes(store: Any, change: Change, is_flow: bool) -> None:
    """G13. If a process died in the call of an effect, code that renames, moves, replaces or removes its node
    does not continue the run: it calls nothing, and the code that made the call still settles it."""
    shop = Shop()
    with crash_at("after_node", "pay"):
        await run(store, nodes_of(change, shop, is_flow, is_after=False))
    assert shop.calls == 1
    for _ in range(2):
        with pytest.raises(PipelineChanged, match="cannot be resumed"):
            await run(store, nodes_of(change, shop, is_flow, is_after=True), resume=True)
        assert shop.calls == 1
    result = await run(store, nodes_of(change, shop, is_flow, is_after=False), resume=True)
    assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)


@pytest.mark.core
async def test_an_unknown_call_after_a_failed_run(store: Any) -> None:
    """G13. The same holds for a call that was made after the run had failed, and was resumed."""
    shop, failing = Shop(), [KeyError("once")]

    async def check(order: Order) -> Order:
        if failing:
            raise failing.pop()
        return order

    def flow_with(name: str) -> Any:
        code, checked = Code(shop, name), stroma_node("check")(check)

        @stroma_flow("f")
        async def f(flow: Flow, state: Order) -> Receipt:
            await flow.step(checked, state)
            return await flow.step(code.pay, state)

        return f

    assert (await run(store, flow_with("pay"))).status is RunStatus.PARTIAL
    with crash_at("after_node", "pay"):
        await run(store, flow_with("pay"), resume=True)
    with pytest.raises(PipelineChanged, match="does not make step 'pay'"):
        await run(store, flow_with("charge"), resume=True)
    assert shop.calls == 1


@pytest.mark.core
async def test_a_call_of_a_discarded_path(store: Any) -> None:
    """G13. A restarted flow need not make the call whose outcome is unknown: a person is asked at its end."""
    shop, begun = Shop(), list[int]()
    code = Code(shop)

    @stroma_flow("f")
    async def f(flow: Flow, state: Order) -> Receipt:
        await flow.step(code.first, state)
        begun.append(1)
        return await flow.step(code.ends if len(begun) > 1 else code.pay, state)

    with crash_at("after_node", "pay"):
        await run(store, f)
    result = await run(store, f, resume_from="f")
    assert (result.suspended, shop.calls, len(begun)) == (["effect"], 1, 2)
    await StromaRunner.quick(store=store).signal("r", NotDone(), question=open_question(store, "r"))
    assert (await run(store, f, resume=True)).status is RunStatus.RESUMED


async def run(store: Any, nodes: Any, **kwargs: Any) -> Any:
    return await StromaRunner.quick(store=store, policy_map=NEVER).run(nodes, Order(), run_id="r", **kwargs)


def _deploy(charges: list[str], way: str, fields: dict[str, Any], failed: asyncio.Event) -> Any:
    """Return a flow that charges an order with these fields, the first time after a step has failed."""
    order: Any = create_model("Order", **fields)

    async def charge(state: Any) -> Receipt:
        await failed.wait()
        charges.append(current_node().idempotency_key)
        return Receipt(number=len(charges))

    async def reserve(state: Num) -> Num:
        if not failed.is_set():
            raise KeyError("nothing is left")
        return state

    contract = NodeContract(node_id="pay", input_schema=order, output_schema=Receipt, effect=True)
    pay = stroma_node("pay", contract)(charge)

    async def call(state: Any) -> Any:
        run = current_run()
        assert run is not None
        return (await execute_step("pay", pay, state, run)).final_state

    @stroma_flow("inner", input=order, output=Receipt)
    async def inner(flow: Flow, state: Any) -> Receipt:
        return await flow.step(pay, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        bill = order(**dict.fromkeys(fields, 5))
        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            "step": lambda: flow.step(pay, bill),
            "map": lambda: flow.map(pay, [bill]),
            "flow": lambda: flow.run(inner, bill),
            "node": lambda: flow.step(node("agent", call, order, Receipt), bill),
        }
        paying = asyncio.ensure_future(ways[way]())
        try:
            await flow.step(node("reserve", reserve), state)
        finally:
            failed.set()
        await paying
        return await flow.wait_for(Num, reason="Done?")

    return f


@pytest.mark.parametrize("way", ["step", "map", "flow", "node"])
@pytest.mark.parametrize("now", [{"cents": (int, 0), "cur": (int, 5)}, {"amount": (int, 0)}])
async def test_a_deploy_that_changes_an_order_does_not_charge_again(
    store: Any, way: str, now: dict[str, Any]
) -> None:
    """G13. A resume that retries a failure takes the charge made after it, also if its class has changed."""
    charges, failed = list[str](), asyncio.Event()
    before = _deploy(charges, way, {"cents": (int, 0)}, failed)
    assert (await runner_on(store).run(before, Num())).status is RunStatus.PARTIAL
    assert len(charges) == 1
    after = _deploy(charges, way, now, failed)
    assert (await runner_on(store).run(after, Num())).status is RunStatus.SUSPENDED
    await runner_on(store).signal("r", Num(n=3))
    result = await runner_on(store).run(after, Num())
    assert (result.status, result.final_state, len(charges)) == (RunStatus.RESUMED, Num(n=3), 1)
