"""For tests of what builds on Stroma. Needs pytest and pytest-asyncio."""

from stroma.testing.cells import CellStoreTests
from stroma.testing.stores import JournalStoreTests

__all__ = ["CellStoreTests", "JournalStoreTests"]
