"""Drive a stored run: continue it as far as possible. Every dispatcher calls this: a worker, Temporal."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged, RunBusy, RunExists
from stroma.checkpoint.decisions import UNFINISHED
from stroma.engine.context import Dispatch
from stroma.runner.flows.suspension import now_ms
from stroma.runner.live_runs import Batch
from stroma.runner.pipeline import Pipeline
from stroma.runner.stored_runs import ServedPipeline, StoredRuns
from stroma.trace.result import ExecutionResult, Question, RunStatus

if TYPE_CHECKING:
    from stroma.checkpoint import RunRecord


@dataclass(frozen=True, slots=True)
class Ended:
    """The run has ended, with a status: COMPLETED, RESUMED, FAILED, PARTIAL or CANCELLED."""

    run_id: str
    status: RunStatus
    #: None if the run had ended before this call.
    result: ExecutionResult | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Suspended:
    """The run is suspended."""

    run_id: str
    until: datetime | None  # When the run is due again; None: an answer or a request has to come first.
    questions: tuple[Question, ...] = ()  # Those without an answer.
    #: None if the run was suspended before this call.
    result: ExecutionResult | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Yielded:
    """The run was INTERRUPTED at a step boundary, by its time limit or a shutdown, and is due at once."""

    run_id: str
    result: ExecutionResult | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Busy:
    """Another owner has the run."""

    run_id: str
    until: datetime | None  # The end of its lease, which it renews; None without a lease, in memory.
    owner: str  # The process that owns the run, for messages.


@dataclass(frozen=True, slots=True)
class Blocked:
    """The code of this process cannot continue the run, which stays as it was and is marked as blocked."""

    run_id: str
    reason: str  # What does not fit.
    #: Before that, workers with this code do not try again; None: no pipeline has its name here.
    until: datetime | None = None


DriveOutcome = Ended | Suspended | Yielded | Busy | Blocked


def _mismatch(run_id: str, error: PipelineChanged) -> str:
    """Return what does not fit, for a sentence that names the run and says that it is blocked."""
    return str(error).removeprefix(f"run {run_id!r} ").removeprefix("cannot be resumed: ")


class RunDriver:
    """Continues runs of a store. ``run`` continues one run, given its nodes, input, id and dispatch."""

    def __init__(
        self,
        stored: StoredRuns,
        batch: Batch,
        run: Callable[[Pipeline | list[Any], BaseModel, str, Dispatch], Awaitable[ExecutionResult]],
    ) -> None:
        self._stored = stored
        self._batch = batch  # A shutdown drains it; then no further run is continued.
        self._run = run

    async def drive(
        self, run_id: str, find: Callable[[str], ServedPipeline | None], max_seconds: float | None
    ) -> DriveOutcome:
        """Continue a run, if it is due; see :meth:`StromaRunner.drive`. ``find``: nodes by pipeline."""
        while True:
            record = await self._stored.get(run_id)
            outcome = await self._settled(record)
            if outcome is not None:
                return outcome
            served = find(record.pipeline)
            if served is None:
                reason = f"pipeline {record.pipeline!r} is not served here; pass it in pipelines="
                return Blocked(run_id, reason)
            outcome = await self.continue_run(run_id, served, Dispatch(now_ms(), max_seconds))
            if outcome is not None:
                return outcome
            if self._batch.draining:
                return Yielded(run_id)

    async def continue_run(
        self, run_id: str, served: ServedPipeline, dispatch: Dispatch
    ) -> DriveOutcome | None:
        """Continue a run that was due a moment ago. Return None if it is not, and during a shutdown."""
        try:
            result = await self.resume(run_id, served, dispatch)
        except RunBusy as busy:
            return Busy(run_id, _end_of_lease(busy), busy.holder)
        except RunExists:
            return None
        except PipelineChanged as error:
            mark = (await self._stored.get(run_id)).blocked
            return Blocked(
                run_id, _mismatch(run_id, error), None if mark is None else _to_time(mark.until_ms)
            )
        if result.status is RunStatus.SUSPENDED:
            outcome = await self._settled(await self._stored.get(run_id), result)
            # None: an answer has come meanwhile.
            return outcome or Suspended(run_id, _to_time(now_ms()), (), result)
        if result.status is not RunStatus.INTERRUPTED:
            return Ended(run_id, result.status, result)
        if result.failure is not None:
            raise result.failure.exception
        return Yielded(run_id, result)

    async def resume(self, run_id: str, served: ServedPipeline, dispatch: Dispatch) -> ExecutionResult:
        """Resume a run that is due.

        Raises RunExists if it is not, and during a shutdown; RunBusy; PipelineChanged if the code does not
        fit it: then the run is marked as blocked.
        """
        try:
            state = await self._stored.load_input(run_id, served.schema)
            if self._batch.draining:
                raise RunExists(
                    f"run {run_id!r} is not continued, as the runner shuts down; another process continues it"
                )
            return await self._run(served.nodes, state, run_id, dispatch)
        except PipelineChanged as error:
            store = self._stored.journal("block")
            await store.block(run_id, _mismatch(run_id, error), served.code.name, dispatch.claim, now_ms())
            raise

    async def _settled(self, record: RunRecord, result: ExecutionResult | None = None) -> DriveOutcome | None:
        """Return the outcome for a run that is not due; None for any other run, and one with an owner."""
        if record.status == "RUNNING":
            return None
        if record.status not in UNFINISHED:
            return Ended(record.run_id, RunStatus(record.status), result)
        if record.due_ms is not None and record.due_ms <= now_ms():
            return None
        until = None if record.due_ms is None else _to_time(record.due_ms)
        waiting = await self._stored.read_questions(record.run_id)
        questions = tuple(one.question for one in waiting if one.payload is None)
        return Suspended(record.run_id, until, questions, result)


def _end_of_lease(busy: RunBusy) -> datetime | None:
    left_ms = 1000 * max(busy.left_seconds, 0.0)
    return _to_time(now_ms() + int(left_ms)) if math.isfinite(left_ms) else None


def _to_time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
