"""Progress of a map: counts of its items, its rate, and the calls of the progress hooks."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Final

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.hooks.sets import MapProgress
from stroma.runner.items import Source

__all__ = ["ProgressReporter"]

_PROGRESS_SECONDS: Final = 0.2
_RATE_SECONDS: Final = 15  # over which the rate of a progress report is measured


class ProgressReporter:
    """Counts the items of a map that have ended, and calls the progress hooks a few times a second."""

    def __init__(self, ctx: ReliabilityContext, execution: NodeExecution, source: Source) -> None:
        self._ctx = ctx
        self._execution = execution
        self._source = source
        self._calls = ctx.fire.on_map_progress
        self._start = self._last_report = monotonic()
        self._is_reporting = False
        #: (when, items done in this process) at the last reports.
        self._marks: deque[tuple[float, int]] = deque([(self._start, 0)])
        self.done = self.failed = self.restored = 0
        self.has_ended = False

    async def count_item(self, *, failed: bool = False, restored: bool = False) -> None:
        """Count an item that has ended."""
        self.done += 1
        self.failed += failed
        self.restored += restored
        is_due = self._calls is not None and monotonic() - self._last_report >= _PROGRESS_SECONDS
        if is_due and not self._is_reporting:
            await self.report()

    async def end(self) -> None:
        """Report for the last time."""
        self.has_ended = True
        await self.report()

    async def report(self) -> None:
        """Call the progress hooks."""
        calls = self._calls
        if calls is None:
            return
        self._is_reporting = True
        try:
            now = self._last_report = monotonic()
            done_here = self.done - self.restored
            while len(self._marks) > 1 and now - self._marks[0][0] > _RATE_SECONDS:
                self._marks.popleft()
            since, done_before = self._marks[0]
            self._marks.append((now, done_here))
            rate = (done_here - done_before) / (now - since) if now > since else 0.0
            total = self._source.total
            remaining = None if total is None or not rate else (total - self.done) / rate
            progress = MapProgress(
                self.done,
                total,
                self.failed,
                self.restored,
                rate,
                remaining,
                now - self._start,
                self.has_ended,
            )
            ctx, node_id = self._ctx, self._execution.node_id
            await ctx.fire.fire("on_map_progress", calls, node_id, lambda: (ctx.run_id, node_id, progress))
        finally:
            self._is_reporting = False
