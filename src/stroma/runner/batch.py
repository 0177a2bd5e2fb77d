"""Many runs of one call: so many at once, until all are done or a shutdown says that no more shall begin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from pydantic import BaseModel

from stroma.engine.tasks import gather
from stroma.trace.result import ExecutionResult

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

    async def run_each(
        self,
        run: Callable[..., Coroutine[Any, Any, ExecutionResult]],
        inputs: Iterable[BaseModel],
        max_concurrency: int,
        run_ids: Callable[[int, BaseModel], str] | None,
        on_result: Callable[[int, ExecutionResult | Exception], None] | None,
    ) -> list[ExecutionResult | Exception]:
        """``run(state)``, with ``run_id=`` if they have names, for each input; see ``run_many``."""
        outcomes: dict[int, ExecutionResult | Exception] = {}

        async def one(number: int, state: BaseModel) -> None:
            named = {} if run_ids is None else {"run_id": run_ids(number, state)}
            outcomes[number] = await outcome_of(run(state, **named))
            if on_result is not None:
                on_result(number, outcomes[number])

        await self.go((one(number, state) for number, state in enumerate(inputs)), max_concurrency)
        return [outcomes[number] for number in sorted(outcomes)]


async def outcome_of(run: Coroutine[Any, Any, ExecutionResult]) -> ExecutionResult | Exception:
    """What a run came to: its result, or what it raised."""
    try:
        return await run
    except Exception as error:
        return error
