"""Many runs of one call: so many at once, until all are done or a shutdown says that no more shall begin."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from stroma.groups import gather
from stroma.trace import ExecutionResult

__all__ = ["Batch", "outcome_of"]


class Batch:
    """The runs of one call of ``run_many`` or ``recover``."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        #: Whether no further run shall begin.
        self.draining = False

    async def go(self, work: Iterable[Coroutine[Any, Any, None]], max_concurrency: int) -> None:
        """Await all, so many at once; they are made as there is room for them.

        The first exception, out of making them or out of one, cancels the others and comes out as itself.
        """
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency!r}; give a whole number from 1 up")
        waiting = iter(work)

        async def worker() -> None:
            while not self.draining and (item := next(waiting, None)) is not None:
                await item

        await gather([worker() for _ in range(max_concurrency)])


async def outcome_of(run: Coroutine[Any, Any, ExecutionResult]) -> ExecutionResult | Exception:
    """What a run came to: its result, or what it raised."""
    try:
        return await run
    except Exception as error:
        return error
