"""Run a pipeline on Temporal workers, from its config to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, typed
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, emit, err, out
from stroma.cli.progress import timed_lines
from stroma.cli.report import RunReport
from stroma.cli.signals import StopSignals
from stroma.cli.temporal import TemporalCluster
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.runner.stream import StreamEvent
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from temporalio.client import Client

    from stroma.cli.options import RunOptions
    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.drivers.temporal.stream import TemporalStream

__all__ = ["TemporalRun"]

#: Seconds without events after which the task queue is checked for workers.
_QUIET_SECONDS: Final = 5.0
_VERBS: Final = {
    "success": ("ok", "green"),
    "failure": ("FAILED", "bold red"),
    "cancelled": ("cancelled", "yellow"),
    "suspended": ("suspended", "yellow"),
}


@dataclass(slots=True)
class TemporalRun:
    """One run on Temporal. ``state``: its input; None to resume an existing run."""

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel | None
    cluster: TemporalCluster
    options: RunOptions
    resume: bool = False
    detach: bool = False
    #: An event arrived since the last check for workers.
    is_active: bool = False

    def execute(self) -> int:
        """Start or resume the run, print the report, and return the exit code. Raises Problem."""
        started = time.perf_counter()
        result, waiting, stopped_by = self.cluster.run(self._drive())
        if result is None:
            return self._report_detached(stopped_by)
        report = RunReport(
            result, self.pipeline.name, self.target, self.cluster, stopped_by, time.perf_counter() - started,
            self.config.budget, waiting=waiting,
        )  # fmt: skip
        report.print(json=self.options.as_json, quiet=self.options.quiet)
        return int(report.code)

    def _report_detached(self, stopped_by: str | None) -> int:
        """Print how to follow a run that continues without this command."""
        run_id = self.config.run_id
        wait = self.cluster.hint("run", self.target, options=("--run-id", run_id, "--attach"))
        if not self.options.quiet:
            why = f" ({stopped_by})" if stopped_by else ""
            err.line(("detached", "yellow"), f"{why}: run {clean(run_id)} continues without this command")
            err.line(f"  wait for its result: {wait}")
            err.line(f"  or cancel it: {self.cluster.hint('cancel', id_word(run_id))}")
        if self.options.as_json:
            emit({"schema": "stroma.detached/1", "run_id": run_id, "pipeline": self.pipeline.name})
        elif self.detach:
            out.line(run_id)
        return Code.OK

    async def _drive(self) -> tuple[ExecutionResult | None, list[Any], str | None]:
        client = await self.cluster.connect()
        runner = self.cluster.runner(client, self.config)
        task = asyncio.current_task()
        assert task is not None
        events = self._stream(runner)
        if self.detach:
            await anext(events)
            return None, [], None
        following = asyncio.ensure_future(self._follow(events))
        detached: list[bool] = []

        def detach_now() -> None:
            detached.append(True)
            following.cancel()

        messages = {
            "SIGINT": "cancelling the run; finished nodes are stored. Repeat the signal to leave it running",
            "SIGTERM": "leaving; the run continues without this command",
        }
        after = f"the run continues unless it was cancelled; see: {self.cluster.hint('show', id_word(self.config.run_id))}"
        stop = StopSignals(task, detach_now, patience="", after=after, messages=messages)
        watching = asyncio.ensure_future(self._watch_for_workers(client))
        try:
            try:
                result = await asyncio.shield(following)
            except asyncio.CancelledError:
                if detached or stop.signal is None:
                    return None, [], stop.signal
                await runner.cancel(self.config.run_id)
                result = await following
        finally:
            watching.cancel()
            following.cancel()
        waiting: list[Any] = []
        if result.status is RunStatus.SUSPENDED:
            with contextlib.suppress(TimeoutError):
                waiting = await self.cluster.query(runner.waiting(result.run_id))
        return result, waiting, stop.signal

    def _stream(self, runner: TemporalRunner) -> TemporalStream:
        if self.state is None and self.options.if_running == "attach":
            return runner.follow(self.pipeline, self.config.run_id)
        if self.state is None:
            return runner.stream_resumed(self.pipeline, self.config.run_id)
        return runner.stream(
            self.pipeline, self.state, run_id=self.config.run_id, resume=self.resume or None,
            if_exists="return" if self.options.if_running == "attach" else None,
            if_running=self.options.if_running, traceparent=os.environ.get("TRACEPARENT"),
        )  # fmt: skip

    # ------------------------------------------------------------------ events

    async def _follow(self, events: TemporalStream) -> ExecutionResult:
        async for event in events:
            self.is_active |= event.event is not None
            if event.result is not None:
                return event.result
            if not self.options.quiet:
                self._print_event(event)
        raise Problem("the events of the run ended without a result", code=Code.ENVIRONMENT)

    def _print_event(self, event: StreamEvent) -> None:
        if event.kind == "run_start":
            timed_lines(
                (clean(self.pipeline.name, 60), "bold"),
                f": run {id_word(event.run_id)} on {self.cluster.name}",
            )
        elif event.event is not None:
            for one in _children_first(event.event):
                timed_lines(*_event_parts(one))

    async def _watch_for_workers(self, client: Client) -> None:
        """Print a note while no worker polls the task queue."""
        delay = _QUIET_SECONDS
        while True:
            self.is_active = False
            await asyncio.sleep(delay)
            if not self.is_active and not await self.cluster.has_workers(client):
                err.line(
                    ("note: ", "yellow"),
                    f"no worker polls {self.cluster.name}; start one: ",
                    self.cluster.command("worker", self.target),
                )
                delay = 60.0


def _children_first(event: TraceEvent) -> list[TraceEvent]:
    """Return an event after its children, in the order in which they ended."""
    return [*(one for child in event.children for one in _children_first(child)), event]


def _event_parts(event: TraceEvent) -> list[Part]:
    depth = event.branch.count(".") + 1 if event.branch else 0
    name = f"{'  ' * depth}{clean(event.node_id, 80)}".ljust(24)
    verb, style = _VERBS[event.outcome]
    details = [format_duration(event.duration_ms / 1000)]
    if event.failure is not None:
        details.insert(0, f"{event.failure}{f' {event.reason}' if event.reason else ''}")
    if event.attempt > 1:
        details.append(f"attempt {event.attempt}")
    if event.usage.tokens or event.usage.cost_usd:
        details += [format_tokens(event.usage.tokens), format_usd(event.usage.cost_usd)]
    parts: list[Part] = [name, "  ", (verb.ljust(9), style), " ", ", ".join(details)]
    if event.failure_message and not event.children:  # The child has the same message.
        parts.append(f"  | {clean(typed(event.error_type, event.failure_message), 600)}")
    return parts
