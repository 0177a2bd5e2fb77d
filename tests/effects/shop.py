"""A shop whose provider counts charges by idempotency key, for tests of effects."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from tests.kit import Receipt

from stroma import NotDone, current_node

__all__ = ["Order", "Receipt", "Refused", "Shop"]


class Order(BaseModel):
    cents: int = 100


class Refused(Exception):
    """As an HTTP client raises for a 4xx."""

    status_code = 402


class Shop:
    """A function that charges a card, and what its provider knows.

    ``before``, ``after``: raised in the first calls, before or after the charge.
    """

    def __init__(self, *, before: Sequence[BaseException] = (), after: Sequence[BaseException] = ()) -> None:
        self.charges: list[str] = []
        self.calls = 0
        self.asked: list[str] = []
        self._before, self._after = list(before), list(after)

    async def charge(self, order: Order) -> dict[str, Any]:
        here = current_node()
        self.calls += 1
        if self._before:
            raise self._before.pop(0)
        self.charges.append(here.idempotency_key)
        if self._after:
            raise self._after.pop(0)
        return {"number": len(self.charges)}

    async def look(self, order: Order, key: str) -> Any:
        """Return what the provider says of a charge."""
        self.asked.append(key)
        return {"number": self.charges.index(key) + 1} if key in self.charges else NotDone()
