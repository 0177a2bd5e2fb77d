"""Figures of the queues that a worker serves, for its health and for the exporters of its pipelines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint import StoreError
from stroma.checkpoint.queue import QueueFigures
from stroma.hooks.sets import AnyHooks, distinct, flatten
from stroma.runner.flows.suspension import now_ms

if TYPE_CHECKING:
    from stroma.runner.stored_runs import StoredRuns

__all__ = ["QueueReader", "readers_of", "watch_queues"]

logger = get_logger()

#: Seconds between two queries, which are cheap: one for each pipeline.
_READ_SECONDS: Final = 5.0

#: Called with (pipeline, queued runs, seconds for which the oldest due run is due); with None when nobody knows any more.
QueueReader = Callable[[str, int | None, float | None], None]


def readers_of(hooks: AnyHooks | None) -> list[QueueReader]:
    """Return what exporters among these hooks show the figures of a queue with."""
    readers: list[Any] = [getattr(one, "queue_reader", None) for one in distinct(flatten(hooks))]
    return [reader for reader in readers if reader is not None]


async def watch_queues(
    stored: StoredRuns,
    pipelines: Sequence[str],
    readers: Mapping[str, Sequence[QueueReader]],
    note: Callable[[int, float], None] | None,
) -> None:
    """Read the figures of these queues every few seconds until the task is cancelled; return at once without a reader.

    ``note`` is called with the sum of the queued runs, and for how long the oldest due run of all queues is due.
    A store that cannot be read changes nothing: the figures are those of the last time.
    """
    if note is None and not any(readers.values()):
        return
    try:
        while True:
            try:
                now = now_ms()
                figures = await stored.queue_figures(pipelines, now)
            except StoreError as error:
                logger.debug("the figures of the queue cannot be read: %s", error)
            else:
                seconds = {name: _seconds_due(one, now) for name, one in figures.items()}
                if note is not None:
                    note(sum(one.queued for one in figures.values()), max(seconds.values(), default=0.0))
                for name, one in figures.items():
                    for reader in readers.get(name, ()):
                        reader(name, one.queued, seconds[name])
            await asyncio.sleep(_READ_SECONDS)
    finally:
        for name in pipelines:
            for reader in readers.get(name, ()):
                reader(name, None, None)


def _seconds_due(figures: QueueFigures, now: int) -> float:
    return 0.0 if figures.oldest_due_ms is None else max(0, now - figures.oldest_due_ms) / 1000
