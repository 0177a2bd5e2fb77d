"""For tests of what builds on Stroma. Needs pytest and pytest-asyncio."""

from stroma.testing.stores import JournalStoreTests

__all__ = ["JournalStoreTests"]
