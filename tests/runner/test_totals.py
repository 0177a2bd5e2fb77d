"""Sums of a result: those of this call, and those of the whole execution."""

from typing import Any

from tests.fixtures import store_fixture
from tests.kit import NEVER, Num
from tests.shared_stores import FAMILIES

from stroma import RunStatus, StromaRunner, Usage

store = store_fixture(*FAMILIES)


async def test_total_has_what_earlier_processes_spent(store: Any) -> None:
    """total_tokens and total_cost_usd are of this call, total is of all processes of the execution."""
    broken = [True]
    runner = StromaRunner.quick(store=store, policy_map=NEVER)

    @runner.node
    async def first(state: Num) -> tuple[Num, Usage]:
        return state, Usage(input_tokens=100, cost_usd=0.5)

    @runner.node
    async def second(state: Num) -> tuple[Num, Usage]:
        if broken:
            raise ValueError("broken")
        return state, Usage(input_tokens=7, cost_usd=0.25)

    def sums(result: Any) -> tuple[int, float, int, float]:
        return result.total_tokens, result.total_cost_usd, result.total.tokens, result.total.cost_usd

    result = await runner.run([first, second], Num(n=1), run_id="r")
    assert sums(result) == (100, 0.5, 100, 0.5)
    broken.clear()
    result = await runner.run([first, second], Num(n=1), run_id="r", resume=True)
    assert (result.status, *sums(result)) == (RunStatus.RESUMED, 7, 0.25, 107, 0.75)
    returned = await runner.run([first, second], Num(n=1), run_id="r", if_exists="return")
    assert sums(returned) == (0, 0.0, 107, 0.75)
