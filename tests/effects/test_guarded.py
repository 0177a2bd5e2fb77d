"""Effects as steps of a guard, as tools of agent frameworks are."""

import asyncio
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import THRICE, Receipt, open_question

from stroma import NotDone, RunStatus, StromaRunner, Suspend, current_node
from stroma.adapters import Guard

store = store_fixture("async-memory", "sqlite")


class Till:
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
    till = Till(store, fails=1)
    async with till.guard.run() as run:
        value = await till.charge(5) if is_async else await asyncio.to_thread(till.charge_sync, 5)
    assert (value, till.calls, list(till.charges.values())) == ({"number": 1}, 1, [1])
    assert run.result.status is RunStatus.COMPLETED


@pytest.mark.core
async def test_an_agent_cannot_repeat_an_unknown_call(store: Any) -> None:
    """A framework that swallows the suspension and repeats the call does not reach the function."""
    till = Till(store, fails=1, reconciles=False, output=Receipt)
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
    till = Till(store)
    for _ in range(2):
        async with till.guard.run():
            assert [await till.charge(5), await till.charge(5)] == [{"number": 1}, {"number": 2}]
    assert (till.calls, len(till.charges)) == (2, 2)
