"""The work that every engine does: nodes that validate a state of 1 KB, count one up and validate the result."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel

#: (address, nodes of a run) -> (run one under an id, give up what is open). The run gives the last count.
Run = Callable[[str], Awaitable[int]]
Close = Callable[[], Awaitable[None]]

#: Runs at once in the comparison of queues.
AT_ONCE = 100

START: dict[str, Any] = {"count": 0, "text": "x" * 1000}


class In(BaseModel):
    count: int
    text: str


class Out(BaseModel):
    count: int
    text: str


async def node(state: Any) -> dict[str, Any]:
    return {"count": state.count + 1, "text": state.text}


async def timed(call: Callable[[], Awaitable[Any]], runs: int) -> tuple[float, float]:
    """Return runs a second, and microseconds of CPU of this process for each."""
    cpu, begun = time.process_time(), time.perf_counter()
    await call()
    return runs / (time.perf_counter() - begun), (time.process_time() - cpu) / runs * 1e6
