"""The static checker against what the engine does, for pairs of classes as hypothesis makes them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from tests.contracts.generated_schemas import Made, pairs

from stroma import Finding, StromaRunner, stroma_node
from stroma.contracts.schema import schema_of

PAIRS = 600
OUTPUTS = 5
seen: Counter[str] = Counter()


def checked(first: Made, second: Made) -> list[Finding]:
    nodes = []
    for node_id, consumed, produced in (("first", first, first), ("second", second, second)):

        async def func(state: Any) -> Any: ...

        nodes.append(stroma_node(node_id, input=consumed.model, output=produced.model)(func))
    return StromaRunner.quick().check(nodes)


def crosses(first: Made, second: Made, values: Any) -> bool | None:
    """Whether an output crosses the engine's own boundary; None if the values make no output."""
    source, target = schema_of(first.model), schema_of(second.model)
    try:
        output, _ = source.accept_output(values)
    except Exception:
        return None
    try:
        target.convert(output)
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # pydantic's, of odd names and defaults.
@seed(20260)
@settings(
    max_examples=PAIRS, phases=[Phase.generate]
)  # So many in every profile: what is decided is counted.
@given(pairs(), st.data())
def agree(pair: tuple[Made, Made], data: st.DataObject) -> None:
    first, second = pair
    findings = checked(first, second)
    assert not [finding for finding in findings if "comparing them raised" in finding.message], findings
    errors = [finding for finding in findings if finding.severity == "error"]
    # A list of the wrong items is an error, though an empty one would pass: outputs have items then.
    outputs = [data.draw(first.values(bool(errors) or n % 2 == 0)) for n in range(OUTPUTS)]
    crossed = [
        result for result in (crosses(first, second, values) for values in outputs) if result is not None
    ]
    if not crossed:
        seen["no output"] += 1
        return
    seen["error" if errors else "warning" if findings else "nothing"] += 1
    if not findings:
        assert all(crossed), (outputs, crossed)
    if errors:
        assert not any(crossed), (outputs, crossed, [str(error) for error in errors])


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_checker_agrees_with_the_boundary_on_generated_pairs() -> None:
    """A pair without a finding is crossed by every output, one with an error by none; 200 are decided."""
    seen.clear()
    agree()
    assert seen["nothing"] + seen["error"] + seen["warning"] > 400, seen
    assert min(seen["nothing"], seen["error"], seen["warning"]) > 50, seen
    assert seen["nothing"] + seen["error"] >= 200, seen
