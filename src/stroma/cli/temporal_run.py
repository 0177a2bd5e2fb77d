"""Run a pipeline on workers that Temporal chooses, from its config to the exit code."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel

from stroma._utils.text import clean
from stroma.checkpoint.entries import Waiting
from stroma.cli.errors import Code
from stroma.cli.formatting import id_word
from stroma.cli.output import emit_fields, err
from stroma.cli.progress import timed_lines
from stroma.cli.report import RunReport
from stroma.cli.signals import StopSignals
from stroma.cli.stores import Database
from stroma.cli.temporal import TemporalCluster
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.cli.options import RunOptions
    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.runner.submission import RunHandle

__all__ = ["TemporalRun"]

#: Seconds until the task queue of a run that has not started is checked for workers.
_QUIET_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class TemporalRun:
    """One run on Temporal."""

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel
    cluster: TemporalCluster
    database: Database
    options: RunOptions
    resume: bool = False

    def execute(self) -> int:
        """Submit the run, print the report, and return the exit code. Raises Problem."""
        self.database.prepare()
        started = time.perf_counter()
        result, waiting, stopped_by = self.cluster.run(self._drive())
        if result is None:
            return self._report_detached(stopped_by)
        report = RunReport(
            result,
            self.pipeline.name,
            self.target,
            self.database,
            stopped_by,
            time.perf_counter() - started,
            self.config.budget,
            waiting=waiting,
        )
        report.print(json=self.options.as_json, quiet=self.options.quiet)
        return int(report.code)

    def _report_detached(self, stopped_by: str | None) -> int:
        """Print how to follow a run that continues without this command."""
        run_id = self.config.run_id
        if not self.options.quiet:
            why = f" ({stopped_by})" if stopped_by else ""
            err.line(("detached", "yellow"), f"{why}: run {clean(run_id)} continues without this command")
            err.line(f"  follow it: {self.database.hint('tail', id_word(run_id))}")
            err.line(f"  or cancel it: {self.database.hint('cancel', id_word(run_id))}")
        if self.options.as_json:
            emit_fields("stroma.detached/1", run_id=run_id, pipeline=self.pipeline.name)
        return Code.OK

    async def _drive(self) -> tuple[ExecutionResult | None, list[Waiting], str | None]:
        try:
            runner = await self.cluster.runner(self.database, self.config)
            handle = await runner.submit(self.pipeline, self.state, run_id=self.config.run_id)
            if self.resume:
                await runner.resume(handle.run_id)
            result, stopped_by = await self._wait(runner, handle)
            waiting: list[Waiting] = []
            if result is not None and result.status is RunStatus.SUSPENDED:
                waiting = await asyncio.to_thread(self.database.store.waiting, result.run_id)
            return result, waiting, stopped_by
        finally:
            await self.database.close()

    async def _wait(
        self, runner: TemporalRunner, handle: RunHandle[BaseModel]
    ) -> tuple[ExecutionResult | None, str | None]:
        if not self.options.quiet:
            timed_lines(
                (clean(self.pipeline.name, 60), "bold"),
                f": run {id_word(handle.run_id)} on {self.cluster.name}",
            )
        task = asyncio.current_task()
        assert task is not None
        stopping = asyncio.ensure_future(handle.until_stopped())

        def leave() -> None:
            stopping.cancel()

        messages = {
            "SIGINT": "cancelling the run; finished nodes are stored. Repeat the signal to leave it running",
            "SIGTERM": "leaving; the run continues without this command",
        }
        shown = self.database.hint("show", id_word(handle.run_id))
        after = f"the run continues unless it was cancelled; see: {shown}"
        stop = StopSignals(task, leave, patience="", after=after, messages=messages)
        watching = asyncio.ensure_future(self._watch_for_workers(handle))
        try:
            try:
                return await asyncio.shield(stopping), stop.signal
            except asyncio.CancelledError:
                if stop.signal != "SIGINT":
                    return None, stop.signal
                await runner.cancel(handle.run_id)
                return await stopping, stop.signal
        finally:
            watching.cancel()
            stopping.cancel()

    async def _watch_for_workers(self, handle: RunHandle[BaseModel]) -> None:
        """Print a note while no worker polls the task queue of a run that has not started."""
        delay, client = _QUIET_SECONDS, await self.cluster.connect()
        while True:
            await asyncio.sleep(delay)
            if await handle.status() == "QUEUED" and not await self.cluster.has_workers(client):
                err.line(
                    ("note: ", "yellow"),
                    f"no worker polls {self.cluster.name}; start one: ",
                    self.database.hint("worker", self.target, options=self.cluster.words),
                )
                delay = 60.0
