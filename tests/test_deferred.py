"""Our models make their validators when they are first used, and nobody can tell."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import pytest
from pydantic import BaseModel, ConfigDict

from stroma import ExecutionBudget, FailurePolicy, ItemFailure, NodeContract, RunConfig, default_policy_map
from stroma._utils.models import Deferred


class In(BaseModel):
    n: int


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ExecutionBudget, FailurePolicy, ItemFailure, NodeContract, RunConfig])
def test_a_class_shows_its_fields_before_its_first_use(kind: type[BaseModel]) -> None:
    """What help() says does not depend on whether one was made."""
    assert list(inspect.signature(kind).parameters) == list(kind.model_fields)
    told = in_a_fresh_process(
        f"import inspect; from stroma import {kind.__name__} as kind; print(*inspect.signature(kind).parameters)"
    )
    assert told.split() == list(kind.model_fields)


def test_a_users_own_class_is_made_at_once() -> None:
    """What is wrong with it is said where it is defined, and its own signature stands there."""

    class Local: ...

    class Mine(FailurePolicy):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        place: Local | None = None

    class Later(Mine):
        more: int = 1

    assert Mine.__pydantic_complete__
    assert Later.__pydantic_complete__
    assert NodeContract[In, In].__pydantic_complete__
    assert list(inspect.signature(Later).parameters)[-2:] == ["place", "more"]
    assert Mine(place=Local()).max_retries == 3


def test_threads_that_use_a_class_first_get_the_same_validator() -> None:
    """Whoever comes second waits; pydantic before 2.14 would give it the validator of no class at all."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            assert made_by_threads(type("Made", (Deferred,), {"__annotations__": {"n": int}})) == []
    finally:
        sys.setswitchinterval(before)


def made_by_threads(kind: type[Deferred]) -> list[BaseException]:
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
        "import sys; from stroma.checkpoint import resolve_schema; print('stroma.contracts.untyped' in sys.modules)\n"
        "kept = resolve_schema('stroma.contracts.untyped:Kept')\n"
        "from stroma.checkpoint import schema_ref; from stroma.contracts.untyped import Kept\n"
        "print(kept is Kept, schema_ref(kept))"
    )
    assert in_a_fresh_process(code).split() == ["False", "True", "stroma.contracts.untyped:Kept"]
