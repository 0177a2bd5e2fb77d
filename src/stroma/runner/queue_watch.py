"""Figures of the queues that a worker serves, for its health and for the exporters of its pipelines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint import StoreError
from stroma.checkpoint.queue import QueueFigures, QueueReading
from stroma.hooks.sets import AnyHooks, distinct, flatten
from stroma.runner.flows.suspension import now_ms

if TYPE_CHECKING:
    from stroma.runner.stored_runs import ServedPipeline, StoredRuns

__all__ = ["QueueReader", "readers_of", "watch_queues"]

logger = get_logger()

#: Seconds between two queries, which are cheap: one for each pipeline.
_READ_SECONDS: Final = 5.0

#: Called with a pipeline and the figures of its queue; with None when nobody knows them any more.
QueueReader = Callable[[str, QueueReading | None], None]


def readers_of(hooks: AnyHooks | None) -> list[QueueReader]:
    """Return what exporters among these hooks show the figures of a queue with."""
    readers: list[Any] = [getattr(one, "queue_reader", None) for one in distinct(flatten(hooks))]
    return [reader for reader in readers if reader is not None]


async def watch_queues(
    stored: StoredRuns,
    served: Mapping[str, ServedPipeline],
    readers: Mapping[str, Sequence[QueueReader]],
    note: Callable[[Sequence[QueueReading]], None] | None,
) -> None:
    """Read the figures of these queues every few seconds until the task is cancelled; return at once without a reader.

    ``note`` is called with the figures of all queues.
    A store that cannot be read changes nothing: the figures are those of the last time.
    """
    if note is None and not any(readers.values()):
        return
    try:
        while True:
            try:
                now = now_ms()
                figures = await stored.queue_figures(served, now)
            except StoreError as error:
                logger.debug("the figures of the queue cannot be read: %s", error)
            else:
                readings = {name: _reading_of(one, now) for name, one in figures.items()}
                if note is not None:
                    note(list(readings.values()))
                for name, reading in readings.items():
                    for reader in readers.get(name, ()):
                        reader(name, reading)
            await asyncio.sleep(_READ_SECONDS)
    finally:
        for name in served:
            for reader in readers.get(name, ()):
                reader(name, None)


def _reading_of(figures: QueueFigures, now: int) -> QueueReading:
    def seconds_since(ms: int | None) -> float:
        return 0.0 if ms is None else max(0, now - ms) / 1000

    return QueueReading(
        figures.queued,
        seconds_since(figures.oldest_due_ms),
        figures.blocked,
        seconds_since(figures.oldest_blocked_ms),
    )
