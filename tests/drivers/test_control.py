"""What people and programs do to a run in progress is the same, whichever process drives it."""

import asyncio
from typing import Any

import pytest
from tests.drivers.conftest import Way
from tests.kit import NEVER, Num, Receipt, node, same

from stroma import ExecutionBudget, NodeContract, NotDone, RunStatus, SharedBudget, current_node, stroma_node


class Gate:
    """A node whose call waits until the gate opens."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        self.calls: list[str] = []

    def node(self, node_id: str, *, waits: bool = False, tokens: int = 0) -> Any:
        async def call(state: Num) -> Num:
            self.calls.append(node_id)
            if tokens:
                current_node().report_usage(input_tokens=tokens)
            if waits:
                self.reached.set()
                await self.opened.wait()
            return Num(n=state.n + 1)

        return node(node_id, call)


async def test_a_pause_and_its_end(way: Way) -> None:
    """A paused run commits the node in flight and starts no other; it continues after unpause()."""
    gate = Gate()
    async with way.bind([gate.node("a", waits=True), gate.node("b")], policy_map=NEVER) as bound:
        running = asyncio.ensure_future(bound.run(Num(), run_id=way.run_id))
        await asyncio.wait_for(gate.reached.wait(), 60)
        pausing = asyncio.ensure_future(bound.control.pause(way.run_id))
        await asyncio.sleep(0)
        while not way.store.is_request_pending(way.run_id) and not pausing.done():
            await asyncio.sleep(0.01)
        await pausing
        gate.opened.set()
        result = await running
        assert (result.status, result.suspended, gate.calls) == (RunStatus.SUSPENDED, ["paused"], ["a"])
        assert await bound.control.unpause(way.run_id)
        result = await bound.go_on(way.run_id)
    assert (result.status, result.final_state, gate.calls) == (RunStatus.RESUMED, Num(n=2), ["a", "b"])


async def test_a_cancellation(way: Way) -> None:
    """A cancelled run ends as CANCELLED, with the outputs that were committed."""
    gate = Gate()
    async with way.bind([gate.node("a"), gate.node("b", waits=True)]) as bound:
        running = asyncio.ensure_future(bound.run(Num(), run_id=way.run_id))
        await asyncio.wait_for(gate.reached.wait(), 60)
        assert await bound.control.cancel(way.run_id)
        result = await running
    assert (result.status, result.final_state) == (RunStatus.CANCELLED, Num(n=1))
    assert way.store.get_run(way.run_id).status == "CANCELLED"


async def test_a_budget_that_is_raised(way: Way) -> None:
    """A run that waits for its budget continues when it is raised, and calls no committed node again."""
    gate = Gate()
    nodes = [gate.node("a", tokens=8), gate.node("b", tokens=8), gate.node("c")]
    budget = ExecutionBudget(max_tokens_total=10)
    async with way.bind(nodes, budget=budget, on_budget="wait", policy_map=NEVER) as bound:
        result = await bound.run(Num(), run_id=way.run_id)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["budget"])
        assert await bound.control.set_budget(way.run_id, tokens=100)
        result = await bound.go_on(way.run_id)
    assert (result.status, result.final_state, gate.calls) == (RunStatus.RESUMED, Num(n=3), ["a", "b", "c"])
    assert way.store.get_run(way.run_id).tokens == 16


async def test_a_shared_budget(way: Way) -> None:
    """A shared budget counts the runs of all processes: the run that would cross it ends as PARTIAL."""
    gate = Gate()
    shared = SharedBudget("team", max_tokens=10, reserve_tokens=6, store=way.store)
    async with way.bind([gate.node("a", tokens=6)], shared_budgets=[shared], policy_map=NEVER) as bound:
        first = await bound.run(Num(), run_id=f"{way.run_id}-1")
        second = await bound.run(Num(), run_id=f"{way.run_id}-2")
    assert (first.status, second.status, gate.calls) == (RunStatus.COMPLETED, RunStatus.PARTIAL, ["a"])


@pytest.mark.parametrize("reconciles", [True, False])
async def test_an_effect_whose_outcome_is_unknown(way: Way, reconciles: bool) -> None:
    """G13. After a call with an unknown outcome reconcile, or a person, states it; no call is repeated."""
    calls: list[int] = []

    async def look(state: Num, key: str) -> Receipt | NotDone:
        return Receipt(number=len(calls))

    async def charge(state: Num) -> Receipt:
        calls.append(state.n)
        raise TimeoutError("no answer")

    contract = NodeContract(
        node_id="charge",
        input_schema=Num,
        output_schema=Receipt,
        effect=True,
        reconcile=look if reconciles else None,
    )
    async with way.bind([node("first", same), stroma_node("charge", contract)(charge)]) as bound:
        result = await bound.run(Num(), run_id=way.run_id)
        if not reconciles:
            assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
            [question] = result.questions
            await bound.control.signal(way.run_id, Receipt(number=1), question=question.id)
            result = await bound.go_on(way.run_id)
    assert (result.final_state, calls) == (Receipt(number=1), [0])


async def test_steps_inside_a_node(way: Way) -> None:
    """Steps that a node calls are part of its attempt: they are retried and recorded inside it."""
    calls: list[str] = []

    async def inner(state: Num) -> Num:
        calls.append("inner")
        return Num(n=state.n + 1)

    async def outer(state: Num) -> Num:
        calls.append("outer")
        output = await inner_node(state)
        assert isinstance(output, Num)
        return output

    inner_node = node("inner", inner)
    async with way.bind([node("outer", outer)], policy_map=NEVER) as bound:
        result = await bound.run(Num())
    assert (result.status, result.final_state, calls) == (RunStatus.COMPLETED, Num(n=1), ["outer", "inner"])
