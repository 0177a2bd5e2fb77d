"""A run on other machines as an async iterator of what happens in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from stroma.runner.stream import StreamEvent
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult

__all__ = ["TemporalStream"]

#: Seconds between two looks: at first, at most.
_LOOKS: Final = (0.05, 1.0)
_KINDS: Final[dict[str, Any]] = {
    "success": "node_success",
    "failure": "node_failure",
    "cancelled": "node_cancelled",
    "suspended": "node_suspended",
}


class TemporalStream:
    """The ends of a run's attempts as they arrive, and finally "run_end" with the result.

    It looks at the run from time to time, so it tells no starts and no retries, and what is inside a group comes with the
    group. A reader that leaves leaves the run as it is; :meth:`TemporalRunner.cancel` ends it.
    """

    def __init__(
        self,
        begin: Callable[[], Awaitable[tuple[str, Awaitable[ExecutionResult]]]],
        look: Callable[[str, int], Awaitable[list[TraceEvent]]],
    ) -> None:
        self._begin = begin
        self._look = look
        self._events = self._all()

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self._events

    async def __anext__(self) -> StreamEvent:
        return await anext(self._events)

    async def _all(self) -> AsyncIterator[StreamEvent]:
        run_id, outcome = await self._begin()
        number, seen, delay = 1, 0, _LOOKS[0]
        waiting = asyncio.ensure_future(outcome)
        try:
            yield StreamEvent(number, "run_start", run_id)
            while not waiting.done():
                await asyncio.wait([waiting], timeout=delay)
                events = [] if waiting.done() else await self._look(run_id, seen)
                for event in events:
                    number, seen = number + 1, seen + 1
                    yield _stream_event(number, event)
                delay = _LOOKS[0] if events else min(2 * delay, _LOOKS[1])
            result = waiting.result()
            for event in list(result.trace)[seen:]:
                number += 1
                yield _stream_event(number, event)
            yield StreamEvent(number + 1, "run_end", run_id, result=result)
        finally:
            waiting.cancel()


def _stream_event(number: int, event: TraceEvent) -> StreamEvent:
    return StreamEvent(
        number,
        _KINDS[event.outcome],
        event.run_id,
        node_id=event.node_id,
        position=event.position,
        branch=event.branch,
        attempt=event.attempt,
        event=event,
    )
