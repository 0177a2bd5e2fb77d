"""Releases of frameworks outside of the range that was tested."""

import tomllib
import warnings
from pathlib import Path

import pytest

from stroma.adapters import _releases
from stroma.adapters._releases import RELEASES, imports_of

ROOT = Path(__file__).parents[2]


def test_the_ranges_are_those_of_the_extras() -> None:
    """What an error names as supported is what the extra installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, (name, lowest, below) in RELEASES.items():
        needs = [need.partition(";")[0] for need in extras[extra] if not need.startswith("stroma-runner[")]
        assert needs == [f"{name}>={lowest},<{below}"]


@pytest.mark.parametrize(
    ("installed", "tested"),
    [("1.0.9", False), ("1.0.10", True), ("1.2.24", True), ("2.0.0rc1", False), ("2.0", False)],
)
def test_another_release_is_named_with_those_that_are_supported(
    installed: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that cannot be imported says which is installed and what is supported, not "install it"."""
    monkeypatch.setattr(_releases, "installed_version", lambda _: installed)
    with pytest.raises(ImportError) as refused, imports_of("langgraph"):
        raise ImportError("cannot import name 'Pregel'")
    message = str(refused.value)
    assert message.startswith(f"langgraph {installed} is installed, and ")
    assert "cannot import name 'Pregel'" in message
    assert "install it" not in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with imports_of("langgraph"):
            pass
    assert [str(one.message).partition(":")[0] for one in caught] == (
        []
        if tested
        else [f"langgraph {installed} is installed, and its adapter supports langgraph>=1.0.10,<2"]
    )
