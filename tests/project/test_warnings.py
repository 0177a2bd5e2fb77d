"""Deprecations that our own code causes are errors in every test: so it stays ready for the next Python."""

import warnings
from typing import Any

import pytest


def warn_from(module: str, category: type[Warning]) -> None:
    """Raise a warning that is attributed to a module."""
    scope: dict[str, Any] = {"__name__": module, "warnings": warnings, "category": category}
    exec("warnings.warn('old', category)", scope)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize(
    "module", ["stroma", "stroma.checkpoint.sqlite.store", "tests.project.test_warnings"]
)
def test_a_deprecation_in_our_own_code_is_an_error(module: str, category: type[Warning]) -> None:
    """Whatever our modules call that will be removed fails the test that notices it."""
    with pytest.raises(category, match="old"):
        warn_from(module, category)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
def test_a_deprecation_in_foreign_code_is_a_warning(category: type[Warning]) -> None:
    """A dependency that deprecates something of its own is no fault of ours."""
    with pytest.warns(category, match="old"):
        warn_from("a_dependency", category)
