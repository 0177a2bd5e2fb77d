"""A worker: continues the runs of some pipelines that are due, while its process lives."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from pydantic import BaseModel

from stroma.checkpoint import CheckpointNotFound, RunBusy, RunExists, StoreError
from stroma.contracts.schema import Schema
from stroma.runner.batch import Batch
from stroma.runner.flows.suspension import now_ms
from stroma.runner.live_runs import LiveRuns
from stroma.runner.pipeline import Pipeline, nodes_of
from stroma.runner.stored_runs import StoredRuns
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["RunWorker", "WorkerHealth"]

logger = logging.getLogger("stroma")

_MIN_PAGE: Final = 100  # due runs of a pipeline that are read at once: workers choose among them at random
_FIRST_DELAY_SECONDS: Final = 5.0  # before a run that could not be resumed is tried again; doubled each time
_MAX_DELAY_SECONDS: Final = 300.0
_MAX_POLL_DELAY_SECONDS: Final = 30.0  # while the store cannot be read

Outcome = ExecutionResult | Exception


class _Served(NamedTuple):
    pipeline: Pipeline
    schema: Schema


class _Delay(NamedTuple):
    """A run that was not continued here: how often that failed, and when it may be tried again.

    Attributes:
        failures: 0 if another process was faster.
        until: by the clock of the event loop.
    """

    failures: int
    until: float


class WorkerHealth:
    """Condition of a worker. May be read in any thread.

    Attributes:
        started: set once the store has been read.
        active: runs in progress.
        is_draining: no further run is continued.
    """

    #: A store that cannot be read for so long makes the worker unhealthy.
    MAX_FAILING_SECONDS: Final = 60.0

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.active = 0
        self.is_draining = False
        #: By time.monotonic(), while the store cannot be read.
        self.failing_since: float | None = None

    @property
    def is_ok(self) -> bool:
        """True while the worker takes up runs; False before, while it drains, or cannot read the store for a minute."""
        failing = 0.0 if self.failing_since is None else time.monotonic() - self.failing_since
        is_failing = failing >= self.MAX_FAILING_SECONDS
        return self.started.is_set() and not self.is_draining and not is_failing


class RunWorker:
    """One call of ``serve``.

    Args:
        resume: resumes a run, given its pipeline, its input, its id and the time at which it was due.
        batch: a shutdown drains it.
    """

    def __init__(
        self,
        stored: StoredRuns,
        resume: Callable[[Pipeline, BaseModel, str, int], Awaitable[ExecutionResult]],
        batch: Batch,
        live: LiveRuns,
        health: WorkerHealth | None = None,
    ) -> None:
        self._stored = stored
        self._resume = resume
        self._batch = batch
        self._live = live
        self._max_concurrency, self._poll_seconds = 0, 0.0
        self._active: dict[str, asyncio.Task[None]] = {}
        self._delays: dict[str, _Delay] = {}
        self._failed_polls = 0
        self.health = health or WorkerHealth()
        self._on_result: Callable[[str, Outcome], None] | None = None
        # Not the shared generator: a program that seeds it would make all workers choose the same runs.
        self._random = random.Random()

    async def serve(
        self,
        pipelines: Sequence[Pipeline],
        max_concurrency: int,
        poll_seconds: float,
        on_result: Callable[[str, Outcome], None] | None,
    ) -> None:
        """Continue due runs until the batch is drained; see :meth:`StromaRunner.serve`."""
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency!r}")
        if not 0 < poll_seconds < float("inf"):
            raise ValueError(f"poll_seconds must be above 0, got {poll_seconds!r}")
        self._max_concurrency, self._poll_seconds, self._on_result = max_concurrency, poll_seconds, on_result
        served = self._check(pipelines)
        drained = asyncio.ensure_future(self._batch.until_drained())
        try:
            while not self._batch.draining:
                has_more = await self._take_up(served)
                waits: set[asyncio.Future[None]] = {drained}
                if has_more:
                    waits |= set(self._active.values())
                timeout = None if has_more else self._next_poll_seconds()
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self.health.is_draining = True
            while self._active:
                await asyncio.wait(set(self._active.values()))
        finally:
            drained.cancel()
            self._batch.drain()
            await self._live.interrupt(set(self._active.values()))

    def _check(self, pipelines: Sequence[Pipeline]) -> list[_Served]:
        if not pipelines:
            raise ValueError("serve() needs at least one flow or Pipeline")
        for pipeline in pipelines:
            if not isinstance(pipeline, Pipeline):
                raise TypeError(
                    f"serve() takes flows and Pipelines, since runs are found by their name, got {type(pipeline).__name__}; "
                    "pass Pipeline(name, nodes)"
                )
        names = [pipeline.name for pipeline in pipelines]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} pipelines have the name {name!r}; use distinct names")
        self._stored.require_due_runs()
        return [_Served(one, self._stored.input_schema(nodes_of(one), None)) for one in pipelines]

    def _next_poll_seconds(self) -> float:
        """Return a random delay, so that workers that were started together do not ask together."""
        seconds = self._poll_seconds * 2.0 ** min(self._failed_polls, 10)
        if self._failed_polls:
            seconds = max(self._poll_seconds, min(seconds, _MAX_POLL_DELAY_SECONDS))
        return seconds * self._random.uniform(0.5, 1.5)

    async def _take_up(self, served: list[_Served]) -> bool:
        """Start due runs while there is room. Return True if there may be more."""
        free = self._max_concurrency - len(self._active)
        if free < 1:
            return True
        due_ms = now_ms()
        try:
            due = await self._find_due(served, due_ms)
        except StoreError as error:
            if not (self.health.started.is_set() or error.transient):
                raise
            if self._failed_polls == 0:
                self.health.failing_since = time.monotonic()
                logger.warning("the store cannot be asked for due runs: %s; trying again", error)
            self._failed_polls += 1
            return False
        self.health.started.set()
        if self._failed_polls:
            self._failed_polls, self.health.failing_since = 0, None
            logger.info("the store can be asked for due runs again")
        if self._batch.draining:
            return False
        # At random, so that workers that found the same runs do not all try the same ones.
        for one, run_id in self._random.sample(due, min(free, len(due))):
            task = asyncio.create_task(self._continue(one, run_id, due_ms))
            self._active[run_id] = task
            self.health.active = len(self._active)
            task.add_done_callback(partial(self._finish, run_id))
        return len(due) >= free

    async def _find_due(self, served: list[_Served], due_ms: int) -> list[tuple[_Served, str]]:
        now = asyncio.get_running_loop().time()
        self._delays = {
            run_id: delay
            for run_id, delay in self._delays.items()
            if delay.until + (_MAX_DELAY_SECONDS if delay.failures else 0) > now
        }
        delayed = {run_id for run_id, delay in self._delays.items() if delay.until > now}
        # Runs that are not chosen must not hide others.
        limit = max(_MIN_PAGE, 10 * self._max_concurrency) + len(delayed) + len(self._active)
        due = [
            (one, run_id)
            for one in served
            for run_id in await self._stored.find_due(one.pipeline.name, due_ms, limit)
        ]
        return [(one, run_id) for one, run_id in due if run_id not in delayed and run_id not in self._active]

    async def _continue(self, served: _Served, run_id: str, due_ms: int) -> None:
        outcome: Outcome
        try:
            state = await self._stored.read_input(run_id, served.schema)
            if self._batch.draining:
                return
            outcome = await self._resume(served.pipeline, state, run_id, due_ms)
        except (RunBusy, RunExists, CheckpointNotFound) as error:
            logger.debug("run %s is not continued here: %s", run_id, error)
            self._delays.setdefault(run_id, _Delay(0, asyncio.get_running_loop().time() + self._poll_seconds))
            return
        except Exception as error:
            outcome = error
        if isinstance(outcome, Exception) or (
            outcome.status is RunStatus.INTERRUPTED and not self._batch.draining
        ):
            self._delay(run_id, outcome)
        else:
            self._delays.pop(run_id, None)
        if self._on_result is not None:
            self._on_result(run_id, outcome)

    def _delay(self, run_id: str, outcome: Outcome) -> None:
        before = self._delays.get(run_id)
        failures = 1 if before is None else before.failures + 1
        seconds = min(_FIRST_DELAY_SECONDS * 2.0 ** (failures - 1), _MAX_DELAY_SECONDS)
        self._delays[run_id] = _Delay(failures, asyncio.get_running_loop().time() + seconds)
        why = outcome if isinstance(outcome, Exception) else f"it ended as {outcome.status}"
        logger.warning("run %s could not be continued: %s; trying again in %.0f s", run_id, why, seconds)

    def _finish(self, run_id: str, task: asyncio.Task[None]) -> None:
        del self._active[run_id]
        self.health.active = len(self._active)
        if not task.cancelled() and task.exception() is not None:
            logger.error("continuing run %s failed", run_id, exc_info=task.exception())
