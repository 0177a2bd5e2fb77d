"""What is said of effects before a run: by the checker, by type checkers, and by drivers on other machines."""

from typing import Any

import pytest
from tests.effects.shop import Order, Receipt, Shop
from tests.kit import NEVER, THRICE

from stroma import (
    NodeContract,
    Pipeline,
    ReliabilityContext,
    RunStatus,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.cli import main
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node
from stroma.drivers.remote.plans import KnownNodes, MissingNode, spec_of


def effect(*, reconciles: bool) -> Any:
    shop = Shop()
    contract = NodeContract(
        node_id="charge", input_schema=Order, output_schema=Receipt, effect=True,
        reconcile=shop.look if reconciles else None,
    )  # fmt: skip
    return stroma_node("charge", contract)(shop.charge)


def findings(runner: StromaRunner, *nodes: Any) -> list[tuple[str, str, str, bool]]:
    checked = nodes[0] if isinstance(nodes[0], Pipeline) else list(nodes)
    return [(f.severity, f.kind, f.target_at, "reconcile" in f.message) for f in runner.check(checked)]


def test_effects_that_a_check_warns_of() -> None:
    """check() warns of an effect without reconcile, and of one in a group that is retried; of no other."""
    good, bad = effect(reconciles=True), effect(reconciles=False)
    plain = StromaRunner.quick()
    assert findings(plain, good, parallel(good)) == []
    expected = [("warning", "effect", at, True) for at in ("0", "1.0")]
    assert findings(plain, bad, map_over("orders", bad, into="receipts"))[-2:] == expected
    group = parallel(good)
    runner = StromaRunner.quick(node_policies={group.node_id: THRICE, "charge": THRICE})
    expected = [("warning", "effect", at, False) for at in ("1.0.0", "2.0")]
    assert findings(runner, good, parallel(parallel(good)), group) == expected
    assert findings(StromaRunner.quick(node_policies={group.node_id: NEVER}), group) == []
    assert findings(plain, Pipeline("p", [group], config=runner.config)) == [
        ("warning", "effect", "0.0", False)
    ]


@pytest.mark.parametrize("is_effect", [True, False])
def test_a_node_that_becomes_an_effect_is_another_one(is_effect: bool) -> None:
    """A worker refuses to call as an effect what was none when the run began elsewhere, and the other way round."""
    charge, registry = find_node(effect(reconciles=True)), ContractRegistry()
    spec = spec_of(charge, registry)
    known = KnownNodes("shop", [charge], registry)
    assert known.find(spec) is charge
    if is_effect:
        del spec["effect"]
    else:
        contract = NodeContract(node_id="charge", input_schema=Order, output_schema=Receipt)
        known = KnownNodes("shop", [find_node(stroma_node("charge", contract)(Shop().charge))], registry)
    with pytest.raises(MissingNode, match="another effect contract"):
        known.find(spec)


async def test_an_effect_that_a_remote_run_calls_is_refused() -> None:
    """An effect that a node of a run on other machines calls is a bug, and not called."""
    runner, shop = StromaRunner.quick(), Shop()
    ctx = ReliabilityContext.for_run(runner.config, runner.registry, runner.checkpoint_manager)
    ctx.elsewhere = True
    contract = NodeContract(node_id="charge", input_schema=Order, output_schema=Receipt, effect=True)
    result = await execute_step("charge", shop.charge, Order(), ctx, contract=contract)
    assert (result.status, shop.calls) == (RunStatus.FAILED, 0)
    assert result.failure is not None
    assert (result.failure.reason, "make it a node of the pipeline" in result.failure.message) == (
        "bug",
        True,
    )


def test_the_command_warns(tmp_path: Any, capsys: Any) -> None:
    """stroma check prints the warnings, and its exit code stays 0."""
    (tmp_path / "shop_check.py").write_text(
        "from pydantic import BaseModel\nfrom stroma import *\n"
        "class A(BaseModel): ...\n"
        "c = NodeContract(node_id='charge', input_schema=A, output_schema=A, effect=True)\n"
        "p = Pipeline('shop', [stroma_node('charge', c)(print)])\n".replace("\\\n", "\n")
    )
    assert main(["check", f"{tmp_path / 'shop_check.py'}:p"]) == 0
    assert "effect 'charge' has no reconcile" in capsys.readouterr().out
