"""The runs of one runner in this process: many runs of one call, and the shutdown that ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from stroma.engine.tasks import TaskPool
from stroma.runner.pipeline import check_bound
from stroma.runner.run import RunExecution
from stroma.trace.result import ExecutionResult, RunStatus


class Batch:
    """The runs of one call of ``run_many``, ``recover`` or ``serve``."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        #: Set once no further run is to start, in the event loop of the batch.
        self.drained = asyncio.Event()

    @property
    def draining(self) -> bool:
        """True once no further run is to start."""
        return self.drained.is_set()

    async def run_each(
        self,
        runs: Iterable[tuple[Any, Callable[[], Awaitable[ExecutionResult]]]],
        max_concurrency: int,
        on_result: Callable[[Any, ExecutionResult | Exception], None] | None = None,
    ) -> dict[Any, ExecutionResult | Exception]:
        """Make (key, run) calls with bounded concurrency, and return the outcomes by key, exceptions too.

        Each is taken when there is room for it. The first exception of ``runs`` or ``on_result`` cancels the
        runs in flight and is raised.
        """
        check_bound(max_concurrency, optional=False)
        pending = iter(runs)
        outcomes: dict[Any, ExecutionResult | Exception] = {}
        pool = TaskPool(max_concurrency)

        async def make_call(key: Any, run: Callable[[], Awaitable[ExecutionResult]]) -> None:
            try:
                outcomes[key] = await run()
            except Exception as error:
                outcomes[key] = error
            if on_result is not None:
                on_result(key, outcomes[key])

        async def start_calls() -> None:
            while not self.draining and (item := next(pending, None)) is not None:
                pool.start(make_call(*item))
                await pool.wait_for_room()

        pool.start(start_calls())
        await pool.join()
        return outcomes


class LiveRuns:
    """Runs in flight and batches of runs, shared by a runner and its streams."""

    def __init__(self) -> None:
        self.runs: set[RunExecution] = set()
        self.batches: set[Batch] = set()

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Open a batch, which starts no further run after a shutdown."""
        batch = Batch()
        self.batches.add(batch)
        try:
            yield batch
        finally:
            self.batches.discard(batch)

    def drain(self, run_id: str) -> None:
        """End a run at its next step boundary, as INTERRUPTED. Called in the event loop of the run."""
        for run in list(self.runs):
            if run.ctx.run_id == run_id:
                _ = run.drain()

    def progress(self, run_id: str) -> dict[str, Any]:
        """Return the last finished step of a run of this process, and its cost. Safe in any thread."""
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
                batch.drained.set()
        # The ends of runs, not of their tasks: a task may continue after its run.
        ends = {run: run.drain() for run in list(self.runs) if run.loop is loop}
        # A node that calls this ends before its run does.
        ends = {run: end for run, end in ends.items() if run.task is not asyncio.current_task()}
        if ends:
            _, late = await asyncio.wait(ends.values(), timeout=drain_seconds)
            for run, end in ends.items():
                if end in late:
                    run.cancel(RunStatus.INTERRUPTED)
            if late:
                await asyncio.wait(late)
