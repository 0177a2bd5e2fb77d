"""Store in memory."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.memory.store import AsyncInMemoryStore, InMemoryStore

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

_HOMES = {
    "AsyncInMemoryStore": "checkpoint.memory.store",
    "InMemoryStore": "checkpoint.memory.store",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
