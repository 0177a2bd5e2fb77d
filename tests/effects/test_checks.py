"""What is said of effects before a run: by the checker and the command line."""

from typing import Any

from tests.effects.shop import Order, Receipt, Shop
from tests.kit import NEVER, THRICE

from stroma import NodeContract, Pipeline, StromaRunner, map_over, parallel, stroma_node
from stroma.cli import main


def effect(*, reconciles: bool) -> Any:
    shop = Shop()
    contract = NodeContract(
        node_id="charge",
        input_schema=Order,
        output_schema=Receipt,
        effect=True,
        reconcile=shop.look if reconciles else None,
    )
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
