"""Requests about a run in a store, and the wait until its owner has read them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointNotFound
from stroma.cost.budget import ExecutionBudget

__all__ = ["limits_of", "request"]

logger = get_logger()

_OWNER_SECONDS: Final = 10.0  # An owner looks for requests twice a second.
_POLL_SECONDS: Final = (0.01, 0.1)
#: By method, the statuses of a run whose owner may not have read a request.
_UNREAD_IN: Final = {
    "cancel": ("RUNNING", "INTERRUPTED", "SUSPENDED"),
    "pause": ("RUNNING", "INTERRUPTED", "SUSPENDED"),
    "set_budget": ("RUNNING",),
}


def limits_of(tokens: int | None, cost_usd: float | None, latency_ms: int | None) -> Mapping[str, float]:
    """Return limits by field of ExecutionBudget. Raises ValueError without one, pydantic's ValidationError for a bad one."""
    budget = ExecutionBudget(max_tokens_total=tokens, max_cost_usd=cost_usd, max_latency_ms=latency_ms)
    limits: dict[str, float] = budget.model_dump(exclude_none=True)
    if not limits:
        raise ValueError("no limit is set; pass tokens=, cost_usd= or latency_ms=")
    return limits


async def request(store: Any, run_id: str, method: str, *arguments: Any) -> bool:
    """Call a method of a store about a run, and wait until the owner of the run has read the request.

    Returns what the method does. A stored request holds, whatever becomes of the owner. An owner that has not
    read it in 10 seconds is not waited for any longer: its process is stopped, or it is plain code that reads
    no requests. Raises CheckpointNotFound, StoreError.
    """
    done: bool = await getattr(store, method)(run_id, *arguments)
    loop = asyncio.get_running_loop()
    late, pause = loop.time() + _OWNER_SECONDS, _POLL_SECONDS[0]
    while done and await asyncio.to_thread(store.is_request_pending, run_id):
        if loop.time() > late:
            logger.warning(
                "the owner of run %r has not read the request, and may begin further attempts; "
                "the request is stored, and holds when the run is opened again",
                run_id,
            )
            return done
        await asyncio.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS[1])
    record = await asyncio.to_thread(store.get_run, run_id) if done and method in _UNREAD_IN else None
    if record is not None and record.holder is None and record.status in _UNREAD_IN[method]:
        # The owner stopped instead of reading it, or lost its lease: what the request does to a run without
        # an owner is done now, and not when somebody opens the run.
        try:
            await getattr(store, method)(run_id, *arguments)
        except CheckpointNotFound:
            pass
    return done
