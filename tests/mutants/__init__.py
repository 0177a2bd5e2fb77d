"""Deliberate breaks of the source, one per rule: the suite must notice each of them. Run with ``./dev mutants``.

A break that survives names a sentence that no test holds. This module is also the pytest plugin of those runs: it
makes sure that the library under test is the broken copy and not the one that is installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test any other stroma than the one beside the tests."""
    import stroma

    if not Path(stroma.__file__).is_relative_to(config.rootpath / "src"):
        raise pytest.UsageError(
            f"stroma is imported from {stroma.__file__}, not from {config.rootpath / 'src'}"
        )
