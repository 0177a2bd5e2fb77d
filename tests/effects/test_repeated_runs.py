"""run() of an id that exists: by default it discards no unfinished execution, answer or recorded effect."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.effects.shop import Order, Receipt, Refused, Shop
from tests.fixtures import store_fixture
from tests.kit import Note as Letter
from tests.kit import computing, context_on, failing_with, passing
from tests.shared_stores import STORES

from stroma import Flow, NodeContract, Pipeline, RunConfig, RunExists, RunStatus, StromaRunner, execute_step
from stroma.adapters import Guard

store = store_fixture(*STORES)


class Approval(BaseModel):
    by: str


class Stopped(BaseException):
    """As KeyboardInterrupt, it is no failure of the node."""


def shop_of(store: Any, shop: Shop, **config: Any) -> tuple[StromaRunner, list[Any]]:
    runner = StromaRunner.quick(store=store, **config)
    return runner, [runner.node("charge", input=Order, output=Receipt, effect=True)(shop.charge)]


@pytest.mark.core
async def test_an_unknown_charge_is_not_made_again(store: Any) -> None:
    """G13. run() of an id whose call of an effect was cut off is RunExists; a resume asks a person."""
    shop = Shop(after=[TimeoutError("no answer")])
    runner, nodes = shop_of(store, shop)
    await runner.run(nodes, Order(), run_id="order-7")
    for _ in range(2):
        with pytest.raises(
            RunExists, match=r"SUSPENDED.*1 open question.*effect of 'charge' again.*resume=True"
        ):
            await runner.run(nodes, Order(), run_id="order-7")
    resumed = await runner.run(nodes, Order(), run_id="order-7", resume=True)
    assert (resumed.status, resumed.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)


@pytest.mark.parametrize("error", [None, Refused("declined")])
async def test_a_recorded_effect_outlives_its_execution(store: Any, error: Exception | None) -> None:
    """G13. run() of an id that has called an effect is RunExists, however the call and the run ended."""
    shop = Shop(before=[] if error is None else [error])
    runner, nodes = shop_of(store, shop)
    first = await runner.run(nodes, Order(), run_id="r")
    assert first.status is (RunStatus.COMPLETED if error is None else RunStatus.FAILED)
    with pytest.raises(RunExists, match=r"recorded effect.*'charge' again"):
        await runner.run(nodes, Order(), run_id="r")
    calls = shop.calls

    harmless = runner.node("harmless", input=Order, output=Order)(passing())
    await runner.run([harmless], Order(), run_id="r", if_exists="restart")
    with pytest.raises(RunExists, match="'charge' again"):
        await runner.run([harmless], Order(), run_id="r")
    assert shop.calls == calls
    await runner.run(nodes, Order(), run_id="r", if_exists="restart")
    assert shop.calls == calls + 1


async def test_a_fork_has_the_recorded_effects_that_it_copied(store: Any) -> None:
    """G13. run() of the id of a fork that has the output of an effect is RunExists, as for its original."""
    shop = Shop()
    runner, nodes = shop_of(store, shop)

    ship = runner.node("ship", input=Receipt, output=Receipt)(passing())
    nodes.append(ship)
    await runner.run(nodes, Order(), run_id="r")
    fork = await runner.fork("r", nodes, at="ship", new_run_id="fork")
    assert (fork.status, shop.calls) == (RunStatus.RESUMED, 1)
    with pytest.raises(RunExists, match="'charge' again"):
        await runner.run(nodes, Order(), run_id="fork")
    assert shop.calls == 1


@pytest.mark.core
async def test_an_answer_is_not_thrown_away(store: Any) -> None:
    """run() of an id that waits, or has its answer, is RunExists; a resume uses the answer."""
    runner = StromaRunner.quick(store=store)

    @runner.flow("letters", input=Letter, output=Letter)
    async def letters(flow: Flow, letter: Letter) -> Letter:
        answer = await flow.wait_for(Approval, reason="ok?")
        return Letter(text=letter.text + answer.by)

    assert (await runner.run(letters, Letter(), run_id="o")).status is RunStatus.SUSPENDED
    with pytest.raises(RunExists, match="1 open question"):
        await runner.run(letters, Letter(), run_id="o")
    await runner.signal("o", Approval(by="Grace"))
    with pytest.raises(RunExists, match="1 answered question"):
        await runner.run(letters, Letter(), run_id="o")
    result = await runner.run(letters, Letter(), run_id="o", resume=True)
    assert (result.status, result.output) == (RunStatus.RESUMED, Letter(text="Grace"))
    assert (await runner.run(letters, Letter(), run_id="o")).status is RunStatus.SUSPENDED


async def test_a_queued_run_is_not_replaced(store: Any) -> None:
    """run() of an id that waits for a worker is RunExists; its input stays, and a resume starts it."""
    runner = StromaRunner.quick(store=store)

    copy = runner.node("copy", input=Letter, output=Letter)(passing())
    letters = Pipeline("letters", [copy])
    await runner.submit(letters, Letter(text="first"), run_id="q")
    with pytest.raises(RunExists, match=r"has not ended \(QUEUED\); pass resume=True"):
        await runner.run(letters, Letter(text="second"), run_id="q")
    result = await runner.run(letters, Letter(text="first"), run_id="q", resume=True)
    assert result.final_state == Letter(text="first")


async def test_an_interrupted_run_keeps_its_outputs(store: Any) -> None:
    """run() of an interrupted id is RunExists with the number of its commits, for lists, guards and code."""
    runner = StromaRunner.quick(store=store)
    first = runner.node("first", input=Letter, output=Letter)(computing(lambda _: Letter(text="paid")))
    second = runner.node("second", input=Letter, output=Letter)(failing_with(Stopped))
    with pytest.raises(Stopped):
        await runner.run([first, second], Letter(), run_id="r")
    loss = r"INTERRUPTED.*discard 1 committed node;"
    with pytest.raises(RunExists, match=loss):
        await runner.run([first, second], Letter(), run_id="r")
    guard = Guard(runner)

    @guard.step("guarded")
    async def guarded(text: str) -> str:
        return text

    with pytest.raises(RunExists, match=loss):
        async with guard.run(run_id="r"):
            await guarded("")
    contract = NodeContract(node_id="first", input_schema=Letter, output_schema=Letter)
    config = RunConfig(run_id="r")
    ctx = context_on(store, config)
    with pytest.raises(RunExists, match=loss):
        await execute_step("first", first, Letter(), ctx, contract=contract)


_SCRIPT = """
import os, sys
from pydantic import BaseModel
from stroma import StromaRunner

class Order(BaseModel):
    text: str

runner = StromaRunner.quick(store="runs.db")

@runner.node("charge", input=Order, output=Order, effect=True)
async def charge(order: Order) -> Order:
    print("CHARGED", flush=True)
    os._exit(9)

runner.run_sync([charge], Order(text="ada"), run_id="order-7")
"""


@pytest.mark.slow
def test_a_script_that_starts_again_charges_once(tmp_path: Path) -> None:
    """G13: A script that dies in the call of an effect and starts again gets RunExists, and calls nothing."""
    script = tmp_path / "shop.py"
    script.write_text(_SCRIPT)
    ends = [
        subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        for _ in range(2)
    ]
    assert [(end.returncode, end.stdout) for end in ends] == [(9, "CHARGED\n"), (1, "")]
    assert "RunExists: run 'order-7' has not ended (RUNNING)" in ends[1].stderr
