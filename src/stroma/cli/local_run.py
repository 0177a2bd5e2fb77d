"""One run, from the configured pipeline to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel

from stroma._utils.text import clean, span
from stroma.checkpoint.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    PipelineChanged,
    RunBusy,
    RunExists,
    StoreError,
)
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem
from stroma.cli.exporters import FLUSH_SECONDS, Exporters
from stroma.cli.formatting import id_word
from stroma.cli.output import err
from stroma.cli.progress import Progress, listen
from stroma.cli.report import Ending
from stroma.cli.signals import Stop
from stroma.cli.stores import Database
from stroma.cli.user_errors import last_frame, said
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.schema import schema_of
from stroma.engine.config import RunConfig
from stroma.hooks.dispatch import HookNotAsync
from stroma.hooks.sets import HookError, flatten
from stroma.runner.runner import Pipeline, StromaRunner
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.cli.options import Running

__all__ = ["Fork", "Job"]


@dataclass(frozen=True, slots=True)
class Fork:
    """A run that begins with what another one has made.

    Attributes:
        parent: the other run.
        position: where the new one begins.
        edited: in place of what the parent committed before that, or of its input.
    """

    parent: str
    position: int
    edited: BaseModel | None

    async def make(self, db: Database, run_id: str) -> None:
        """Make it. Raises StoreError."""
        given = {}
        if self.edited is not None:
            name = "edited" if self.position else "state"
            given[name] = (schema_of(type(self.edited)), self.edited)
        await db.store.fork(self.parent, run_id, self.position, **given)


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be done. ``known`` is the record of the run to go on with, if there is one."""

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel
    db: Database
    known: RunRecord | None
    start_at: str | None
    options: Running
    fork: Fork | None = None

    def go(self) -> int:
        """Run to the end, tell how it went, and return the exit code. Raises Problem."""
        self.db.prepare()
        quiet = self.options.quiet
        listen(quiet=quiet)
        progress = Progress(quiet=quiet)
        if self.fork is not None and not quiet:
            err.line(
                f"run {clean(self.config.run_id)} begins at {clean(self.start_at or '', 100)!r} of {clean(self.fork.parent)}"
            )
        own = flatten(self.config.hooks)
        exporters = self.options.exporters.hooks(own, quiet=quiet)
        hooks = [*Exporters.joined(exporters, own), progress.hooks()]
        config = self.config.model_copy(update={"hooks": hooks})
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.db.store), config)
        begun = time.perf_counter()
        result, waiting, stopped_by = self._run(runner, progress)
        if result is None:
            raise Problem(
                f"stopped by {stopped_by or 'code of its own'} before the run began; nothing was called",
                code=Code.INTERRUPTED,
            )
        remembered = self.known if self.start_at is None else None
        if remembered is not None and config.if_running == "attach":
            remembered = self._seen_since(result)
        ending = Ending(
            result,
            self.pipeline.name,
            self.target,
            self.db,
            stopped_by,
            time.perf_counter() - begun,
            config.budget,
            remembered.tokens if remembered is not None else 0,
            remembered.cost_usd if remembered is not None else 0.0,
            waiting,
            self.fork.parent
            if self.fork is not None
            else self.known.parent
            if self.known is not None
            else None,
        )
        ending.tell(json=self.options.as_json, quiet=quiet)
        return int(ending.code)

    def _seen_since(self, result: ExecutionResult) -> RunRecord | None:
        """What others used on the run, also while this process waited for them."""
        try:
            record = self.db.known(result.run_id)
        except Problem:  # The run is over all the same.
            record = None
        if record is None:
            return self.known
        return replace(
            record,
            tokens=record.tokens - result.total_tokens,
            cost_usd=max(0.0, round(record.cost_usd - result.total_cost_usd, 12)),
        )

    def _run(
        self, runner: StromaRunner, progress: Progress
    ) -> tuple[ExecutionResult | None, list[Waiting], str | None]:
        # What nodes print is talk: stdout is for the final state alone.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                return asyncio.run(self._drive(runner, progress))
            except StoreError as error:
                raise self._store_problem(error) from error
            except (HookNotAsync, HookError) as error:
                raise self._broke_off(error, "a hook of the pipeline's config") from error
            except SystemExit as error:
                raise self._broke_off(error, "code of the pipeline ended the process") from error
            except Exception as error:
                raise self._broke_off(error, "the run broke off") from error

    async def _drive(
        self, runner: StromaRunner, progress: Progress
    ) -> tuple[ExecutionResult | None, list[Waiting], str | None]:
        task = asyncio.current_task()
        assert task is not None
        draining: list[asyncio.Task[None]] = []

        def drain() -> None:
            if runner.config.if_running == "attach" and not progress.begun:
                task.cancel()  # It waits for a run that is somebody else's.
            else:
                draining.append(asyncio.create_task(runner.shutdown(drain_seconds=self.options.drain)))

        stop = Stop(task, drain, patience=span(self.options.drain), after=self._way_on("go on with"))
        going_on = self.known is not None and self.start_at is None
        waiting: list[Waiting] = []
        try:
            if self.fork is not None:
                await self.fork.make(self.db, self.config.run_id)
            result: ExecutionResult | None = await runner.run(
                self.pipeline,
                self.state,
                resume=going_on or None,
                resume_from=self.start_at,
                traceparent=os.environ.get("TRACEPARENT"),
            )
            if result is not None and result.status is RunStatus.SUSPENDED:
                with contextlib.suppress(StoreError):  # The result has the reasons.
                    waiting = self.db.store.waiting(result.run_id)
        except asyncio.CancelledError:  # By the signal, or by code of the pipeline.
            result = progress.result
        finally:
            # A signal that comes again ends the process; until then what is queued has its time.
            await runner.aclose(timeout_seconds=FLUSH_SECONDS)
            self.options.exporters.close()
            await self.db.close()
        return result, waiting, stop.signal

    # ------------------------------------------------------------------ what leaves run() as an exception

    def _resume(self, *options: str) -> str:
        return self.db.hint("resume", id_word(self.config.run_id), self.target, options=options)

    def _way_on(self, words: str) -> str:
        if not self.db.keeps:
            return f"{self.db.name} keeps nothing of it"
        return f"every finished node is kept; {words}: {self._resume()}"

    def _store_problem(self, error: StoreError) -> Problem:
        if isinstance(error, (PipelineChanged, CorruptCheckpoint)):
            again = f"or make the outputs from a node on anew: {self._resume('--from', 'NODE')}"
            return self.db.problem(error, again)
        if isinstance(error, RunBusy):
            return self._busy(error)
        if isinstance(error, RunExists):
            return self.db.problem(
                error, f"go on with it: {self._resume()}", "or take another id: --run-id ID"
            )
        if isinstance(error, CheckpointNotFound):
            return self.db.problem(error)
        more = () if not self.db.is_default else ("or name another store: --db FILE, or STROMA_DB=FILE",)
        return self.db.problem(error, *more)

    def _busy(self, error: RunBusy) -> Problem:
        name = id_word(self.config.run_id)
        other = "" if error.same_input else ", with another input"
        return Problem(
            f"run {clean(self.config.run_id)} is being run by {error.holder}{other}; it is theirs for another "
            f"{span(error.left_seconds)}, and longer if they are still at work",
            f"wait for what they make of it: {self._resume('--attach')}",
            f"or have them stop: {self.db.hint('cancel', name)}",
            f"or, if that process is known to be gone: {self._resume('--take-over')}",
            code=Code.ENVIRONMENT,
        )

    def _broke_off(self, error: BaseException, what: str) -> Problem:
        return Problem(
            f"{what}: {said(error)}",
            *last_frame(error),
            self._way_on("mend that, then go on with"),
            code=Code.FAILED,
        )
