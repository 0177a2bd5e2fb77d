"""Conformance tests that every journal store must pass."""

from typing import Any

import pytest
from tests.store_suite.executions import ExecutionTests
from tests.store_suite.helpers import HARD_IDS, State, begin, commit, fail, finish, restored, row, settled
from tests.store_suite.messages import MessageTests
from tests.store_suite.ownership import OwnershipTests
from tests.store_suite.reading import ReadingTests
from tests.store_suite.signals import SignalTests

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


class JournalStoreTests(ExecutionTests, OwnershipTests, SignalTests, MessageTests, ReadingTests):
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
    def other(self, store: Any) -> Any:
        """Return another client of the same data; override it if processes can share the store."""
        return store
