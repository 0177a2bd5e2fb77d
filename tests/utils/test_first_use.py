"""What is loaded on first use, the warning about another distribution, and misspelt settings."""

import importlib.util
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError
from tests.kit import Num

import stroma
from stroma import ExecutionBudget, FailurePolicy, NodeContract, RunConfig, StromaRunner, default_policy_map


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


def import_from(folder: Path) -> None:
    """Import the package, under another name, from a folder of packages that has its `__init__.py`."""
    spec = importlib.util.spec_from_file_location("stroma_elsewhere", folder / "stroma" / "__init__.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with ours in it, and what belongs to it."""
    (tmp_path / "stroma").mkdir()
    shutil.copy(stroma.__file__, tmp_path / "stroma")
    (tmp_path / "stroma_runner-0.4.0.dist-info").mkdir()
    (tmp_path / "stroma-notes").mkdir()
    return tmp_path


def test_the_first_import_warns_of_the_other_distribution(packages: Path) -> None:
    """The first import warns once if the distribution `stroma` is installed in the same folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_from(packages)
    (packages / "stroma-0.3.1.dist-info").mkdir()
    with pytest.warns(UserWarning, match="another project") as seen:
        import_from(packages)
    assert [str(one.message) for one in seen] == [
        "the distribution 'stroma 0.3.1' is another project that installs files over those of stroma-runner; "
        "run: pip uninstall -y stroma stroma-runner && pip install stroma-runner"
    ]


def test_a_package_that_is_in_no_folder_imports(tmp_path: Path) -> None:
    """A package inside an archive, whose folder cannot be listed, imports without a warning."""
    from stroma._utils.distributions import find_other_distribution

    (tmp_path / "packages.zip").write_bytes(b"")
    assert find_other_distribution(str(tmp_path / "packages.zip")) is None
    assert find_other_distribution(str(tmp_path / "missing")) is None


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
