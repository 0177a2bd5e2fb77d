"""Waits that end when the run is paused, and the ends of nodes of which no further attempt begins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PAUSED, Suspend
from stroma.failures.failure import Failure

__all__ = ["Paused", "hold", "paused", "wait_unless_held"]

T = TypeVar("T")


class Paused(Suspend):
    """The suspension of a paused run: it waits for somebody who resumes it, and for no answer."""


async def hold(ctx: ReliabilityContext, node_id: str, attempt: int) -> Halt:
    """Return the end of a node of which no further attempt begins. Never returns in a run that is being cancelled."""
    if not ctx.paused:
        await asyncio.get_running_loop().create_future()  # The cancellation of the task is on its way.
    return paused(ctx, node_id, attempt)


def paused(ctx: ReliabilityContext, node_id: str, attempt: int) -> Halt:
    """Return the end of a node of a paused run."""
    ctx.note_suspended(PAUSED)
    ctx.run_logger.info("node %r is not called: the run is paused", node_id)
    failure = Failure(Paused(PAUSED), FailureClass.RECOVERABLE, node_id, attempt, PAUSED)
    return Halt(failure, suspended=True)


async def wait_unless_held(ctx: ReliabilityContext, work: Callable[[], Awaitable[T]]) -> T | None:
    """Await work that precedes an attempt. None if the run is paused before that or meanwhile: then the work is cancelled."""
    if ctx.holds:
        return None
    if asyncio.current_task() is None:
        return await work()
    loop, scope = asyncio.get_running_loop(), asyncio.timeout(None)

    def end() -> None:
        if not scope.expired():
            scope.reschedule(loop.time())

    ctx.on_hold[end] = None
    try:
        async with scope:
            return await work()
    except TimeoutError:
        if not scope.expired():
            raise
        return None
    finally:
        del ctx.on_hold[end]
