"""`stroma run` and `stroma resume` on a cluster: one run, from the configured pipeline to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from stroma._utils.text import clean, count, money, span, typed
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, emit, err, out
from stroma.cli.progress import timed_line
from stroma.cli.report import Ending
from stroma.cli.signals import Stop
from stroma.cli.temporal import Cluster
from stroma.engine.config import RunConfig
from stroma.runner.runner import Pipeline
from stroma.runner.stream import StreamEvent
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from temporalio.client import Client

    from stroma.cli.options import Running
    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.drivers.temporal.stream import TemporalStream

__all__ = ["ClusterJob"]

#: Seconds without news after which it is looked whether there are workers at all.
_QUIET_SECONDS: Final = 5.0
_VERBS: Final = {
    "success": ("ok", "green"),
    "failure": ("FAILED", "bold red"),
    "cancelled": ("cancelled", "yellow"),
    "suspended": ("suspended", "yellow"),
}


@dataclass(slots=True)
class ClusterJob:
    """One run to be done. ``state``: its input; None to go on with one that is there."""

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel | None
    cluster: Cluster
    options: Running
    resume: bool = False
    detach: bool = False
    #: Whether anything was heard of the run lately.
    heard: bool = False

    def go(self) -> int:
        """Have it run to the end, tell how it went, and return the exit code. Raises Problem."""
        begun = time.perf_counter()
        result, waiting, stopped_by = self.cluster.run(self._drive())
        if result is None:
            return self._left(stopped_by)
        ending = Ending(
            result, self.pipeline.name, self.target, self.cluster, stopped_by, time.perf_counter() - begun,
            self.config.budget, waiting=waiting,
        )  # fmt: skip
        ending.tell(json=self.options.as_json, quiet=self.options.quiet)
        return int(ending.code)

    def _left(self, stopped_by: str | None) -> int:
        """The run goes on, and this command does not."""
        run_id = self.config.run_id
        wait = self.cluster.hint("run", self.target, options=("--run-id", run_id, "--attach"))
        if not self.options.quiet:
            why = f" ({stopped_by})" if stopped_by else ""
            err.line(("detached", "yellow"), f"{why}: run {clean(run_id)} goes on without this command")
            err.line(f"  wait for its result: {wait}")
            err.line(f"  or have it stop: {self.cluster.hint('cancel', id_word(run_id))}")
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
        left: list[bool] = []

        def leave() -> None:
            left.append(True)
            following.cancel()

        says = {
            "SIGINT": "asking the run to end; what is finished is kept. Again to leave it as it is",
            "SIGTERM": "leaving; the run goes on without this command",
        }
        after = f"the run goes on, unless it was asked to end; see: {self.cluster.hint('show', id_word(self.config.run_id))}"
        stop = Stop(task, leave, patience="", after=after, says=says)
        looking = asyncio.ensure_future(self._look_for_workers(client))
        try:
            try:
                result = await asyncio.shield(following)
            except asyncio.CancelledError:
                if left or stop.signal is None:
                    return None, [], stop.signal
                await runner.cancel(self.config.run_id)
                result = await following
        finally:
            looking.cancel()
            following.cancel()
        waiting: list[Any] = []
        if result.status is RunStatus.SUSPENDED:
            with contextlib.suppress(TimeoutError):
                waiting = await self.cluster.answer(runner.waiting(result.run_id))
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

    # ------------------------------------------------------------------ what is heard of it

    async def _follow(self, events: TemporalStream) -> ExecutionResult:
        async for event in events:
            self.heard |= event.event is not None
            if event.result is not None:
                return event.result
            if not self.options.quiet:
                self._tell(event)
        raise Problem("the run has no end", code=Code.ENVIRONMENT)

    def _tell(self, event: StreamEvent) -> None:
        if event.kind == "run_start":
            timed_line(
                (clean(self.pipeline.name, 60), "bold"),
                f": run {id_word(event.run_id)} on {self.cluster.name}",
            )
        elif event.event is not None:
            for one in _inside_first(event.event):
                timed_line(*_told(one))

    async def _look_for_workers(self, client: Client) -> None:
        """Say so if nobody is there who could do the work."""
        delay = _QUIET_SECONDS
        while True:
            self.heard = False
            await asyncio.sleep(delay)
            if not self.heard and not await self.cluster.has_workers(client):
                err.line(
                    ("note: ", "yellow"),
                    f"no worker has asked {self.cluster.name} for work lately; the run waits for one: ",
                    self.cluster.command("worker", self.target),
                )
                delay = 60.0


def _inside_first(event: TraceEvent) -> list[TraceEvent]:
    """As they ended: what is inside of a group before the group."""
    return [*(one for child in event.children for one in _inside_first(child)), event]


def _told(event: TraceEvent) -> list[Part]:
    depth = event.branch.count(".") + 1 if event.branch else 0
    name = f"{'  ' * depth}{clean(event.node_id, 80)}".ljust(24)
    verb, style = _VERBS[event.outcome]
    told = [span(event.duration_ms / 1000)]
    if event.failure is not None:
        told.insert(0, f"{event.failure}{f' {event.reason}' if event.reason else ''}")
    if event.attempt > 1:
        told.append(f"attempt {event.attempt}")
    if event.usage.tokens:
        told += [count(event.usage.tokens), money(event.usage.cost_usd)]
    parts: list[Part] = [name, "  ", (verb.ljust(9), style), " ", ", ".join(told)]
    if event.failure_message and not event.children:  # A group's is its child's.
        parts.append(f"  | {clean(typed(event.error_type, event.failure_message), 600)}")
    return parts
