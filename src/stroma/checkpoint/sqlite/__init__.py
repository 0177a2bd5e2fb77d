"""Store in an SQLite file."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]

_HOMES = {
    "SQLiteStore": "checkpoint.sqlite.store",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
