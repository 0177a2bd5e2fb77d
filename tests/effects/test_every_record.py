"""Runs that end at each record in the life of an effect: killed, cancelled, or given up for a sibling."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.effects.shop import Order, Receipt
from tests.fixtures import store_fixture
from tests.kit import NEVER, context_of
from tests.shared_stores import opened

from stroma import (
    NodeContract,
    NodeHooks,
    NotDone,
    RunStatus,
    StromaRunner,
    Unknown,
    current_node,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.engine.effects import Effect

store = store_fixture("async-memory", "sqlite")

POINTS = ("before intent", "after intent", "before charge", "after charge", "before commit", "after commit")
PLACES = ("list", "parallel", "map", "step")
RECONCILES = ("looks", "cannot tell", "raises", "none")
_ENDED = (RunStatus.COMPLETED, RunStatus.RESUMED)


class Orders(BaseModel):
    cents: int = 1
    orders: list[Order] = [Order(cents=n) for n in range(3)]


class Shop:
    """One process with a list, a group, a map and steps of plain code that charge.

    Args:
        ledger: the books of the provider, which outlive the process.
        reconciles: see RECONCILES.
        strike: called at each point of each call.
        sibling: of the effect in a group.
    """

    def __init__(
        self,
        store: Any,
        ledger: Path,
        reconciles: str,
        strike: Callable[[str], object] = lambda point: None,
        sibling: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.store, self._ledger, self._reconciles, self._strike = store, ledger, reconciles, strike
        self._sibling = sibling
        hooks = NodeHooks(on_node_success=self._end)
        self.runner = StromaRunner.quick(
            store=store, policy_map=NEVER, hooks=hooks, run_id=ledger.name, resume=True, max_recoveries=1000
        )
        self.contract = NodeContract(
            node_id="charge",
            input_schema=Order,
            output_schema=Receipt,
            effect=True,
            reconcile=None if reconciles == "none" else self._look,
        )

    def charged(self) -> list[str]:
        """Return the key of each charge."""
        return self._ledger.read_text().splitlines()

    async def _charge(self, order: Order) -> Any:
        self._strike("before charge")
        await asyncio.sleep(0)
        with self._ledger.open("a") as file:
            file.write(f"{current_node().idempotency_key}\n")
        self._strike("after charge")
        await asyncio.sleep(0)
        return Receipt(number=order.cents)

    async def _look(self, order: Order, key: str) -> Any:
        if self._reconciles == "cannot tell":
            return Unknown("not yet")
        if self._reconciles == "raises":
            raise OSError("the provider is down")
        return Receipt(number=order.cents) if key in self.charged() else NotDone()

    async def _end(self, run_id: str, node_id: str, output: dict[str, Any], tokens: int) -> None:
        if node_id == "charge":
            self._strike("after commit")

    async def run(self, place: str) -> bool:
        """Run to an end, or until a person must look at the books. Return True if all is done."""
        runner, contract = self.runner, self.contract
        charge = stroma_node("charge", contract)(self._charge)

        @runner.node("other", input=Orders, output=Orders)
        async def other(orders: Orders) -> Orders:
            if self._sibling is not None:
                await self._sibling()
            return orders

        if place == "step":
            context = context_of(runner)
            async with context as ctx:
                result = await execute_step("charge", self._charge, Order(), ctx, contract=contract)
        else:
            nodes: dict[str, Sequence[Any]] = {
                "list": [other, charge],
                "parallel": [parallel(charge, other)],
                "map": [map_over("orders", charge, into="receipts", max_concurrency=2)],
            }
            result = await runner.run(nodes[place], Orders())
        if result.status is RunStatus.SUSPENDED:
            await self._decide()
        return result.status in _ENDED

    async def _decide(self) -> None:
        run_id = self._ledger.name
        for question in self.store.waiting(run_id):
            if question.payload is None:
                stated = Receipt(number=0) if question.effect.key in self.charged() else NotDone()
                await self.runner.signal(run_id, stated, question=question.id, schema=Receipt)


def instrument(patch: Callable[[type, str, Any], None], strike: Callable[[str], object]) -> None:
    """Have the points called that are not in code of the test."""
    begin, note_output = Effect.begin, Effect.note_output

    async def beginning(effect: Effect) -> Any:
        strike("before intent")
        ended = await begin(effect)
        strike("after intent")
        return ended

    def noting(effect: Effect) -> None:
        strike("before commit")
        note_output(effect)

    patch(Effect, "begin", beginning)
    patch(Effect, "note_output", noting)


async def finish(store: Any, ledger: Path, reconciles: str, place: str) -> None:
    """Resume a run until it ends, and compare it with the books."""
    for _ in range(4):
        if await Shop(store, ledger, reconciles).run(place):
            break
    else:
        pytest.fail(f"{ledger.name}: no end")
    charges = Counter(ledger.read_text().splitlines())
    assert len(charges) == (3 if place == "map" else 1), f"{ledger.name}: {charges}"
    assert set(charges.values()) == {1}, f"{ledger.name}: {charges}"


class _Cancellation:
    """Cancels the task that runs when it first reaches a point."""

    def __init__(self, point: str) -> None:
        self._point, self.is_done = point, False
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, reached: str) -> None:
        if reached == self._point and not self.is_done and self.task is not None:
            self.is_done = True
            self.task.cancel()


@pytest.mark.core
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reconciles", RECONCILES)
async def test_cancelled_at_each_record(
    store: Any, tmp_path: Path, monkeypatch: Any, place: str, reconciles: str
) -> None:
    """G13. A run that is cancelled at any record of an effect, and resumed, makes each charge once."""
    for point in POINTS:
        ledger, strike = tmp_path / point, _Cancellation(point)
        ledger.touch()
        with monkeypatch.context() as patched:
            instrument(patched.setattr, strike)
            strike.task = asyncio.create_task(Shop(store, ledger, reconciles, strike).run(place))
            await asyncio.wait([strike.task])
        assert strike.is_done, f"{point} was not reached"
        await finish(store, ledger, reconciles, place)


@pytest.mark.core
@pytest.mark.parametrize("reconciles", RECONCILES)
async def test_given_up_at_each_record(store: Any, tmp_path: Path, monkeypatch: Any, reconciles: str) -> None:
    """G13. A group whose other child fails at any record of an effect, and its resume, charge once."""
    for point in POINTS:
        ledger, reached = tmp_path / point, asyncio.Event()
        ledger.touch()

        def strike(now: str, point: str = point, reached: asyncio.Event = reached) -> None:
            if now == point:
                reached.set()

        async def fail(reached: asyncio.Event = reached) -> None:
            await reached.wait()
            raise ConnectionResetError

        with monkeypatch.context() as patched:
            instrument(patched.setattr, strike)
            shop = Shop(store, ledger, reconciles, strike, fail)
            assert not await shop.run("parallel")
        assert reached.is_set()
        if point not in ("before intent", "after intent"):
            assert len(shop.charged()) == 1, "the call runs to its end"
        await finish(store, ledger, reconciles, "parallel")


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_record(journal: tuple[str, str], tmp_path: Path, place: str) -> None:
    """G13: A process that is killed at any record of an effect, and the next one, charge each order once."""
    kind, _ = journal
    for reconciles in RECONCILES if kind == "sqlite" else ("looks",):
        for point in POINTS:
            ledger = tmp_path / f"{reconciles} {point}"
            ledger.touch()
            for struck in (point, ""):
                pid = os.fork()
                if not pid:
                    try:
                        asyncio.run(_process(journal, ledger, reconciles, place, struck))
                        os._exit(0)
                    finally:
                        os._exit(1)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert code == (-signal.SIGKILL if struck else 0), f"{ledger.name}: {code}"


async def _process(journal: tuple[str, str], ledger: Path, reconciles: str, place: str, struck: str) -> None:
    def strike(reached: str) -> None:
        if reached == struck:
            os.kill(os.getpid(), signal.SIGKILL)

    instrument(setattr, strike)
    async with opened(*journal) as store:
        if struck:
            await Shop(store, ledger, reconciles, strike).run(place)
        else:
            await finish(store, ledger, reconciles, place)
