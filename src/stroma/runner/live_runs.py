"""The runs of one runner in this process, and the shutdown that ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stroma.runner.batch import Batch
from stroma.runner.run import RunExecution
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["LiveRuns"]


class LiveRuns:
    """Runs in flight and batches of runs, shared by a runner and its streams."""

    def __init__(self) -> None:
        self.runs: set[RunExecution] = set()
        self.batches: dict[Batch, None] = {}

    async def execute(self, run: RunExecution) -> ExecutionResult:
        """Execute a run; until its end a shutdown includes it."""
        self.runs.add(run)
        try:
            return await run.run()
        finally:
            self.runs.discard(run)
            if run.ended is not None and not run.ended.done():
                run.ended.set_result(None)

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Open a batch, which starts no further run after a shutdown."""
        batch = Batch()
        self.batches[batch] = None
        try:
            yield batch
        finally:
            self.batches.pop(batch, None)

    def drain(self, run_id: str) -> None:
        """End a run at its next step boundary, as INTERRUPTED. Called in the event loop of the run."""
        for run in list(self.runs):
            if run.ctx.run_id == run_id:
                _ = run.drain()

    def progress(self, run_id: str) -> dict[str, Any]:
        """Return the last finished step of a run in this process, and its cost so far. May be called in any thread."""
        progress: dict[str, Any] = {}
        for run in list(self.runs):
            if run.ctx.run_id == run_id:
                rows = run.ctx.trace.rows
                cost = run.ctx.cost_tracker.total_cost_usd
                progress = {"step": rows[-1].node_id if rows else None, "cost_usd": cost}
        return progress

    async def interrupt(self, tasks: set[asyncio.Task[None]]) -> None:
        """End the runs of these tasks as INTERRUPTED, and await the tasks."""
        for run in list(self.runs):
            if run.task in tasks:
                run.cancel(RunStatus.INTERRUPTED)
        if tasks:
            await asyncio.wait(tasks)

    async def shut_down(self, drain_seconds: float) -> None:
        """End the runs of the running event loop; see :meth:`StromaRunner.shutdown`."""
        loop = asyncio.get_running_loop()
        for batch in list(self.batches):
            if batch.loop is loop:
                batch.drain()
        runs = [run for run in list(self.runs) if run.loop is loop and run.task is not asyncio.current_task()]
        # The ends of runs, not of their tasks: a task may continue after its run.
        ends = {run: run.drain() for run in runs}
        if ends:
            _, late = await asyncio.wait(ends.values(), timeout=drain_seconds)
            for run, end in ends.items():
                if end in late:
                    run.cancel(RunStatus.INTERRUPTED)
            if late:
                await asyncio.wait(late)
