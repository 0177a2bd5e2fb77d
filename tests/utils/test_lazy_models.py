"""Models that build their validators on first use."""

import subprocess
import sys
import threading

import pytest

from stroma import ExecutionBudget, FailurePolicy, RunConfig, default_policy_map
from stroma._utils.models import LazyModel


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


def test_threads_that_use_a_class_first_get_the_same_validator() -> None:
    """Several threads may use a class for the first time at once, which pydantic before 2.14 forbids."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            assert made_by_threads(type("Made", (LazyModel,), {"__annotations__": {"n": int}})) == []
    finally:
        sys.setswitchinterval(before)


def made_by_threads(kind: type[LazyModel]) -> list[BaseException]:
    raised: list[BaseException] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        try:
            kind(n=1)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


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
    assert in_a_fresh_process(code).split() == ["False", "True", "stroma.contracts.untyped:UntypedState"]
