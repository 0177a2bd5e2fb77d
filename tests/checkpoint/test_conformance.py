"""Every store that needs no server, through the suite for journal stores."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.store_suite.journal import JournalStoreTests

from stroma import AsyncInMemoryStore, InMemoryStore, SQLiteStore


class TestInMemoryStore(JournalStoreTests):
    @pytest.fixture
    def store(self) -> Any:
        return InMemoryStore()


class TestAsyncInMemoryStore(JournalStoreTests):
    @pytest.fixture
    def store(self) -> Any:
        return AsyncInMemoryStore()


@pytest.mark.core
class TestSQLiteStore(JournalStoreTests):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Any]:
        async with SQLiteStore(tmp_path / "runs.db") as store:
            yield store

    @pytest.fixture
    async def other(self, store: Any, tmp_path: Path) -> AsyncIterator[Any]:
        async with SQLiteStore(tmp_path / "runs.db") as other:
            yield other
