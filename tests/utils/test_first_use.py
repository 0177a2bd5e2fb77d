"""What is loaded on first use, and defaults that are built without validation."""

import subprocess
import sys

import pytest

from stroma import ExecutionBudget, FailurePolicy, RunConfig, default_policy_map


def test_defaults_that_nobody_validated_are_valid() -> None:
    """The policies and the budget that every config begins with are what validation makes of them."""
    for policy in default_policy_map().values():
        assert FailurePolicy.model_validate(policy.model_dump(exclude_unset=True)) == policy
    assert RunConfig().budget == ExecutionBudget.unlimited()


@pytest.mark.slow
def test_the_class_of_nodes_without_a_contract_is_found_by_its_name() -> None:
    """What was stored of them can be read by a process that has run none."""
    code = (
        "import sys; from stroma.checkpoint import resolve_schema; print('stroma.contracts.untyped' in "
        "sys.modules)\n"
        "kept = resolve_schema('stroma.contracts.untyped:UntypedState')\n"
        "from stroma.checkpoint import schema_ref; from stroma.contracts.untyped import UntypedState\n"
        "print(kept is UntypedState, schema_ref(kept))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "stroma.contracts.untyped:UntypedState"]
