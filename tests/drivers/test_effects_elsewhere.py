"""Effects of a run whose attempts are made by workers, without a server: workers are lost around the call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from tests.drivers.seam import Seam
from tests.effects.shop import Order, Receipt, Shop
from tests.kit import NEVER, TWICE

from stroma import (
    ContractRegistry,
    Flow,
    NodeContract,
    Pipeline,
    RunConfig,
    StromaRunner,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.checkpoint.entries import NOT_DONE
from stroma.contracts.schema import schema_of
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.interpreter import Interpreter
from stroma.drivers.remote.plans import KnownNodes, freeze
from stroma.drivers.remote.results import result_of
from stroma.drivers.remote.state import Continue, new_state, next_segment
from stroma.drivers.remote.wire import fold, unfold
from stroma.trace import ExecutionResult


class Orders(BaseModel):
    orders: list[Order]


class Total(BaseModel):
    receipts: list[Receipt]


class LosingSeam(Seam):
    """Loses the workers of the first attempts of effects, "before" or "after" they made the attempt."""

    def __init__(self, attempts: Attempts, lost: Sequence[str]) -> None:
        super().__init__(attempts)
        self._lost = list(lost)

    async def ask(self, request: Any) -> tuple[Any, bool]:
        if "effect" not in request or not self._lost:
            return await super().ask(request)
        if self._lost.pop(0) == "after":
            await super().ask(request)
        failure = {
            "failure_class": "RECOVERABLE", "message": "lost", "reason": "worker", "retry_after": None,
            "node_id": request["spec"]["id"], "attempt": 1, "type": "WorkerLost", "data": None,
        }  # fmt: skip
        halt = {"partial": True, "spent": False, "suspended": False}
        return {"failure": failure, "halt": halt, "lost": "WorkerLost: no heartbeat"}, False


class Run:
    """A run in segments, whose state crosses each boundary as JSON."""

    def __init__(
        self, nodes: list[Any], state: BaseModel, *, lost: Sequence[str] = (), **config: Any
    ) -> None:
        settings, self._pipeline = RunConfig(**config), Pipeline("pipe", nodes)
        self.attempts = Attempts([self._pipeline], config=settings)
        self.seam = LosingSeam(self.attempts, lost)
        self._known = KnownNodes.of(self._pipeline, ContractRegistry())
        self._plan = freeze("pipe", self._known.nodes, settings, self._known.registry, run_id="r")
        kind = type(state)
        text = schema_of(kind).encode(state).decode()
        value: Any = {
            "text": text, "size": len(text), "cls": ["class", f"{kind.__module__}:{kind.__qualname__}"],
        }  # fmt: skip
        self.state = new_state(value, context={})
        self.report: Any = None

    def answer(self, payload: Any) -> None:
        """Answer the questions of the suspended run."""
        text = NOT_DONE.decode() if payload is None else json.dumps(payload)
        for key, question in self.state["waiting"].items():
            self.state["answers"][key] = {**question, "payload": text}

    async def go_on(self) -> ExecutionResult:
        """Run to the end of a segment."""
        if self.report is not None:
            self.state = next_segment(self.state)
        while True:
            self.state = unfold(json.loads(json.dumps(fold(self.state))))
            try:
                self.report = await Interpreter(self._plan, self.state, self.seam, self.seam).run()
                break
            except Continue:
                pass
        return await result_of(json.loads(json.dumps(self.report)), self._known, None)


def effect(shop: Shop, *, reconciles: bool = True) -> Any:
    """Return the node that charges."""
    look = shop.look if reconciles else None
    contract = NodeContract(
        node_id="charge", input_schema=Order, output_schema=Receipt, effect=True, reconcile=look
    )
    return stroma_node("charge", contract)(shop.charge)


@pytest.mark.core
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_lost_worker_is_reconciled(when: str) -> None:
    """G13. After a worker was lost around the call, another one asks reconcile, with the same key, and charges once in all."""
    shop = Shop()
    run = Run([effect(shop)], Order(), lost=[when], policy_map=TWICE)
    result = await run.go_on()
    assert (result.status, result.final_state) == ("COMPLETED", Receipt(number=1))
    assert (shop.calls, shop.asked, shop.charges) == (1, ["r:1:0:"], ["r:1:0:"])


@pytest.mark.core
@pytest.mark.parametrize("happened", [True, False])
async def test_a_person_decides_about_a_lost_worker(happened: bool) -> None:
    """G13. Without reconcile a run whose worker was lost in a call waits, however often it is resumed, for a person's statement."""
    shop = Shop()
    run = Run([effect(shop, reconciles=False)], Order(), lost=["after"], policy_map=TWICE)
    for _ in range(2):
        result = await run.go_on()
        assert (result.status, result.suspended, shop.calls) == ("SUSPENDED", ["effect"], 1)
    (question,) = run.report["waiting"]
    assert question["effect"][0] == shop.charges[0]
    assert "no heartbeat" in question["effect"][2]
    run.answer({"number": 7} if happened else None)
    result = await run.go_on()
    assert (result.status, shop.calls) == ("RESUMED", 1 if happened else 2)
    assert result.final_state == Receipt(number=7 if happened else 2)
    assert len(set(shop.charges)) == 1


async def test_an_answer_is_for_one_call() -> None:
    """The statement that a call did not happen lets one call follow; if that is lost too, the question is a new one."""
    shop = Shop()
    run = Run([effect(shop, reconciles=False)], Order(), lost=["before"])
    await run.go_on()
    run.answer(None)
    run.seam._lost.append("after")
    for _ in range(2):
        result = await run.go_on()
        assert (result.status, shop.calls) == ("SUSPENDED", 1)
    (question,) = run.report["waiting"]
    assert (question["effect"][1], question["payload"], run.state["answers"]) == (2, None, {})
    run.answer({"number": 1})
    run.seam._lost += ["before", "before"]  # What is stated is not lost with a worker that was to record it.
    result = await run.go_on()
    assert (result.status, result.final_state, shop.calls) == ("RESUMED", Receipt(number=1), 1)


async def test_workers_that_are_lost_again_and_again() -> None:
    """Five workers lost in one attempt stop the run as PARTIAL; a resume asks reconcile."""
    shop = Shop()
    run = Run([effect(shop)], Order(), lost=["after", *["before"] * 4], policy_map=TWICE)
    assert (await run.go_on()).status == "PARTIAL"
    assert ((await run.go_on()).status, shop.calls, len(shop.charges)) == ("RESUMED", 1, 1)


@pytest.mark.core
async def test_an_unclear_failure_is_no_retry() -> None:
    """G13. Elsewhere, too, a timeout of an effect is reconciled and not retried, and a refused connection is retried."""
    shop = Shop(before=[ConnectionRefusedError()], after=[TimeoutError()])
    result = await Run([effect(shop)], Order(), policy_map=TWICE).go_on()
    assert (result.status, shop.calls, len(shop.charges), len(shop.asked)) == ("COMPLETED", 2, 1, 1)
    shop = Shop(after=[TimeoutError()])
    run = Run([effect(shop, reconciles=False)], Order(), policy_map=TWICE)
    assert ((await run.go_on()).status, shop.calls) == ("SUSPENDED", 1)
    assert "TimeoutError" in run.report["waiting"][0]["effect"][2]


@pytest.mark.core
@pytest.mark.parametrize("place", ["group", "map", "flow"])
@pytest.mark.parametrize("reconciles", [True, False])
async def test_in_groups_maps_and_flows(place: str, reconciles: bool) -> None:
    """A lost worker of a child, an item or a step is reconciled or waits; the others are not called again."""
    shop = Shop()
    charge = effect(shop, reconciles=reconciles)

    @stroma_node("other", NodeContract(node_id="other", input_schema=Order, output_schema=Order))
    async def other(order: Order) -> Order:
        return order

    @stroma_flow("sell", input=Order, output=Total)
    async def sell(flow: Flow, order: Order) -> Total:
        return Total(receipts=[await flow.step(charge, order), await flow.step(charge, order)])

    nodes: dict[str, Any] = {
        "group": parallel(charge, other),
        "map": map_over("orders", charge, into="receipts", max_concurrency=1),
        "flow": sell,
    }
    state: BaseModel = Orders(orders=[Order(), Order()]) if place == "map" else Order()
    run = Run([nodes[place]], state, lost=["after"], policy_map=NEVER)
    result = await run.go_on()
    if not reconciles:
        assert (result.status, result.suspended) == ("SUSPENDED", ["effect"])
        run.answer({"number": 1})
        result = await run.go_on()
    assert result.status == ("COMPLETED" if reconciles else "RESUMED"), result.failure
    assert shop.calls == len(shop.charges) == len(set(shop.charges)) == (1 if place == "group" else 2)
    assert run.state["effects"] == {}


async def test_a_run_that_is_cancelled_in_a_call() -> None:
    """A run that is cancelled while an effect is called asks reconcile when it is resumed."""
    shop, called = Shop(), asyncio.Event()

    async def charge(order: Order) -> Any:
        await shop.charge(order)
        if shop.calls == 1:
            called.set()
            await asyncio.Event().wait()

    contract = NodeContract(
        node_id="charge", input_schema=Order, output_schema=Receipt, effect=True, reconcile=shop.look
    )
    run = Run([stroma_node("charge", contract)(charge)], Order())
    running = asyncio.create_task(run.go_on())
    await called.wait()
    running.cancel()
    assert (await running).status == "CANCELLED"
    assert ((await run.go_on()).final_state, shop.calls, len(shop.asked)) == (Receipt(number=1), 1, 1)


async def test_a_driver_that_delivers_an_attempt_again() -> None:
    """An attempt of an effect that is delivered again asks reconcile, whatever its request says of earlier calls."""
    shop = Shop()
    run = Run([effect(shop)], Order())
    await run.go_on()
    request: Any = next(request for request in run.seam.requests if "effect" in request)
    assert request["effect"] == [0, False]
    reply = await run.attempts.perform(request, redelivered=True)
    assert (json.loads(reply["output"]["text"]), shop.calls) == ({"number": 1}, 1)


async def test_an_effect_inside_a_node_is_refused() -> None:
    """A step of a node's function, of which the driver would not know, is not called."""
    shop = Shop()
    charge = effect(shop)

    @stroma_node("agent", NodeContract(node_id="agent", input_schema=Order, output_schema=Receipt))
    async def agent(order: Order) -> Any:
        run = current_run()
        assert run is not None
        step = await execute_step("charge", charge, order, run)
        assert step.failure is not None
        raise step.failure.exception

    result = await Run([agent], Order(), policy_map=NEVER).go_on()
    assert (result.status, shop.calls) == ("FAILED", 0)
    assert "inside a node of a run on other machines" in str(result.failure)


async def test_the_key_is_that_of_a_local_run() -> None:
    """The idempotency key of an effect is the same as in one process."""
    here, there = Shop(), Shop()
    await StromaRunner.quick().run([effect(here)], Order(), run_id="r")
    await Run([effect(there)], Order()).go_on()
    assert here.charges == there.charges
