"""Conformance tests of journal stores by subject, for :class:`stroma.testing.JournalStoreTests`."""
