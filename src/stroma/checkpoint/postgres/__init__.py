"""Store in PostgreSQL."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.postgres.store import PostgresStore

__all__ = ["PostgresStore"]

_HOMES = {
    "PostgresStore": "checkpoint.postgres.store",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
