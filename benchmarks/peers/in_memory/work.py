"""The work that every library does: nodes that validate a small state, add one, and validate the result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel

#: Does all nodes once and gives the last count.
Run = Callable[[], Awaitable[int]]
START: dict[str, Any] = {"i": 0, "s": "hello"}


class In(BaseModel):
    i: int
    s: str


class Out(BaseModel):
    i: int
    s: str


def add_one() -> Callable[[Any], Awaitable[dict[str, Any]]]:
    async def node(state: Any) -> dict[str, Any]:
        return {"i": state.i + 1, "s": state.s}

    return node
