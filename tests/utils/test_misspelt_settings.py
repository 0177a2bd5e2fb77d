"""Misspelt fields of settings."""

from typing import Any

import pytest
from pydantic import Field, ValidationError
from tests.kit import Num

from stroma import ExecutionBudget, FailurePolicy, NodeContract, RunConfig, StromaRunner


@pytest.mark.parametrize(
    ("make", "field", "hint"),
    [
        (lambda: RunConfig(max_recovery=3), "max_recovery", "did you mean 'max_recoveries'?"),
        (lambda: ExecutionBudget(max_cost=1), "max_cost", "did you mean 'max_cost_usd'?"),
        (lambda: FailurePolicy(max_retrys=2), "max_retrys", "did you mean 'max_retries'?"),
        (lambda: StromaRunner.quick(nod_timeouts={}), "nod_timeouts", "did you mean 'node_timeouts'?"),
        (
            lambda: NodeContract(node_id="a", input_schema=Num, output_schma=Num),
            "output_schma",
            "did you mean 'output_schema'?",
        ),
        (
            lambda: RunConfig(budget={"max_latency": 5}),
            "budget.max_latency",
            "did you mean 'max_latency_ms'?",
        ),
        (
            lambda: ExecutionBudget(zzz=1),
            "zzz",
            "the fields are max_tokens_total, max_cost_usd, max_latency_ms",
        ),
    ],
)
def test_a_misspelt_field_names_the_nearest_one(make: Any, field: str, hint: str) -> None:
    """An unknown field of a config, policy, budget or contract is an error that names the nearest field."""
    with pytest.raises(ValidationError) as caught:
        make()
    (error,) = caught.value.errors()
    assert (error["type"], ".".join(map(str, error["loc"]))) == ("extra_forbidden", field)
    assert error["msg"] == f"Extra inputs are not permitted; {hint}"


def test_an_unknown_field_without_a_near_one_is_named_alone() -> None:
    """A name like none of a config's many fields is named without a guess."""
    with pytest.raises(ValidationError) as caught:
        RunConfig(zzz=1)
    assert [(error["loc"], error["msg"]) for error in caught.value.errors()] == [
        (("zzz",), "Extra inputs are not permitted")
    ]


def test_subclasses_keep_their_own_fields() -> None:
    """Fields and aliases that a subclass adds are known."""

    class Ours(RunConfig):
        team: str = Field("core", alias="squad")

    assert Ours(squad="x").team == "x"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Ours(tem="x")
