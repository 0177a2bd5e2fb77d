"""Every store that needs no server: the suite for journal stores, and a comparison with plain dicts."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tests.store_suite.journal import JournalStoreTests
from tests.store_suite.machine import JournalStoreMachine
from tests.tiers import examples

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


SHARED = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class MemoryMachine(JournalStoreMachine):
    durable = False
    keeps_history = False

    def make_store(self) -> Any:
        return InMemoryStore()


class AsyncMemoryMachine(MemoryMachine):
    def make_store(self) -> Any:
        return AsyncInMemoryStore()


class SQLiteMachine(JournalStoreMachine):
    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a place: a history that fails is made smaller by running it over and
        # over.
        self.folder = Path(tempfile.mkdtemp(prefix="stroma-machine-", dir=SHARED))

    def make_store(self) -> Any:
        return SQLiteStore(self.folder / "runs.db")

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.folder)


def _settings(count: int) -> settings:
    return examples(count, stateful_step_count=40, report_multiple_bugs=False)


TestMemory = MemoryMachine.TestCase
TestMemory.settings = _settings(150)
TestAsyncMemory = AsyncMemoryMachine.TestCase
TestAsyncMemory.settings = _settings(60)
TestSQLite = SQLiteMachine.TestCase
TestSQLite.settings = _settings(60)
