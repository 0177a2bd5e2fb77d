"""Conformance tests that every journal store must pass."""

from __future__ import annotations

from typing import Any

import pytest

from stroma.testing._conformance.executions import ExecutionTests
from stroma.testing._conformance.helpers import (
    HARD_IDS,
    State,
    begin,
    commit,
    fail,
    finish,
    restored,
    row,
    settled,
)
from stroma.testing._conformance.ownership import OwnershipTests
from stroma.testing._conformance.reading import ReadingTests
from stroma.testing._conformance.signals import SignalTests

__all__ = [
    "HARD_IDS",
    "JournalStoreTests",
    "State",
    "begin",
    "commit",
    "fail",
    "finish",
    "restored",
    "row",
    "settled",
]


class JournalStoreTests(ExecutionTests, OwnershipTests, SignalTests, ReadingTests):
    """Conformance tests of journal stores.

    Inherit, and define a fixture ``store`` with an empty store:

    ```python
    class TestMyStore(JournalStoreTests):
        @pytest.fixture
        async def store(self):
            async with MyStore(...) as store:
                yield store
    ```

    For a store that processes can share, also define a fixture ``other``: a second client of the same data.
    pytest-asyncio must be in auto mode, or the class must be marked ``asyncio``.
    """

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError("define a fixture `store` that returns an empty store")

    @pytest.fixture
    def other(self, store: Any) -> Any:
        """Return another client of the same data; override it if processes can share the store."""
        return store
