"""Run a pipeline in this process, from its config to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import BaseModel

from stroma._utils.text import clean, format_duration
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    PipelineChanged,
    RunBusy,
    RunExists,
    StoreError,
)
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem, describe_error, last_frame
from stroma.cli.exporters import FLUSH_SECONDS, Exporters
from stroma.cli.formatting import id_word
from stroma.cli.inputs import input_model
from stroma.cli.loading import note_target
from stroma.cli.output import err, user_code
from stroma.cli.progress import Progress, show_warnings
from stroma.cli.report import RunReport
from stroma.cli.signals import StopSignals
from stroma.cli.stores import Database, store_problem
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import FlowNode
from stroma.engine.config import RunConfig
from stroma.failures.errors import PlaceError
from stroma.hooks.dispatch import HookNotAsync
from stroma.hooks.sets import HookError, flatten
from stroma.runner.pipeline import Pipeline, nodes_of
from stroma.runner.runner import StromaRunner
from stroma.runner.stored_runs import limits_of
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.cli.options import RunOptions

#: Least size of a terminal with a live table.
_MIN_COLUMNS: Final = 40
_MIN_ROWS: Final = 8


class _Ending(NamedTuple):
    """The end of a run: its result if it started, its open questions, the signal, and its time."""

    result: ExecutionResult | None
    waiting: list[Waiting]
    stopped_by: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class LocalRun:
    """One run in this process.

    Attributes:
        state: the input; of a fork what replaces the input of its first node, if anything does.
        record: the stored run to resume, if any.
        start_at: where to resume it, or where to fork another run.
        forks: id of the run to fork.
        output: the output of its first node or call, which is not called then.
    """

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel | None
    db: Database
    record: RunRecord | None
    start_at: str | None
    options: RunOptions
    forks: str | None = None
    output: BaseModel | None = None

    def execute(self) -> int:
        """Run, print the report, and return the exit code. Raises Problem."""
        self.db.prepare()
        quiet = self.options.quiet
        show_warnings(quiet=quiet)
        progress = Progress(quiet=True) if quiet else self._shown_progress()
        if self.forks is not None and not quiet:
            where = "at" if self.output is None else "with the given output of"
            at = f"{clean(self.start_at or '', 100)!r} of {clean(self.forks)}"
            err.line(f"run {clean(self.config.run_id)} starts {where} {at}")
        own = flatten(self.config.hooks)
        exporters = self.options.exporters.hooks(own, quiet=quiet)
        hooks = [*Exporters.merge(exporters, own), progress.hooks(), note_target(self.target)]
        config = self.config.model_copy(update={"hooks": hooks})
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.db.store), config)
        try:
            result, waiting, stopped_by, seconds = self._run(runner, progress)
        finally:
            progress.close()
        if result is None:
            raise Problem(
                f"stopped by {stopped_by or 'the pipeline itself'} before the run started; no node was "
                "called",
                code=Code.INTERRUPTED,
            )
        report = RunReport(
            result,
            self.pipeline.name,
            self.target,
            self.db,
            stopped_by,
            seconds,
            config.budget,
            waiting,
            self.forks if self.record is None else self.record.parent,
        )
        report.print(quiet=quiet)
        if self.options.loop is None:
            report.emit(json=self.options.as_json)
        elif report.is_drained:
            return Code.INTERRUPTED  # The signal ends the command too.
        return report.code

    def _shown_progress(self) -> Progress:
        """Return a live table on a terminal, else lines."""
        columns, rows = err.size
        if not err.is_live or columns < _MIN_COLUMNS or rows < _MIN_ROWS:
            return Progress(quiet=False)
        from stroma.cli.live import LiveProgress  # It takes rich.

        nodes = [node.node_id for node in nodes_of(self.pipeline)]
        return LiveProgress(self.pipeline.name, nodes, self.config.budget)

    def _run(self, runner: StromaRunner[Any], progress: Progress) -> _Ending:
        with user_code():
            try:
                run = asyncio.run if self.options.loop is None else self.options.loop.run
                return run(self._drive(runner, progress))
            except StoreError as error:
                raise self._store_problem(error) from error
            except PlaceError as error:
                raise Problem(f"the run cannot start: {error}") from error
            except (HookNotAsync, HookError) as error:
                raise self._failure_problem(error, "a hook of the pipeline's config") from error
            except SystemExit as error:
                raise self._failure_problem(error, "code of the pipeline ended the process") from error
            except Exception as error:
                raise self._failure_problem(error, "the run failed") from error

    async def _set_budget(self) -> None:
        """Store the limits of the command for a resumed run: older ones of `stroma budget` would win."""
        record, options = self.record, self.options
        if record is None or record.holder is not None or self.start_at is not None:
            return
        if (options.budget_tokens, options.budget_usd) != (None, None) and isinstance(
            self.db.store, AsyncStates
        ):
            limits = limits_of(options.budget_tokens, options.budget_usd, None)
            await self.db.store.set_budget(record.run_id, limits)

    async def _drive(self, runner: StromaRunner[Any], progress: Progress) -> _Ending:
        task = asyncio.current_task()
        assert task is not None
        draining: list[asyncio.Task[None]] = []

        def drain() -> None:
            if runner.config.if_running == "attach" and not progress.is_started:
                task.cancel()  # Another process runs it.
            else:
                draining.append(asyncio.create_task(runner.shutdown(drain_seconds=self.options.drain)))

        stop = StopSignals(
            task,
            drain,
            patience=format_duration(self.options.drain),
            after=self._next_step("resume with"),
            say=progress.say,
            quiet=self.options.quiet,
        )
        waiting: list[Waiting] = []
        started = time.perf_counter()
        try:
            await self._set_budget()
            result: ExecutionResult | None = await self._start(runner)
            if result is not None and result.status is RunStatus.SUSPENDED:
                with contextlib.suppress(StoreError):  # The result has the reasons too.
                    waiting = self.db.store.waiting(result.run_id)
        except asyncio.CancelledError:  # By a signal, or by the pipeline itself.
            result = progress.result
        finally:
            seconds = time.perf_counter() - started
            # A second signal ends the process at once.
            await runner.aclose(timeout_seconds=FLUSH_SECONDS)
            self.options.exporters.close()
            await self.db.close()
        return _Ending(result, waiting, stop.signal, seconds)

    async def _start(self, runner: StromaRunner[Any]) -> ExecutionResult:
        traceparent = os.environ.get("TRACEPARENT")
        if self.forks is None:
            assert self.state is not None
            is_resumed = self.record is not None and self.start_at is None
            return await runner.run(
                self.pipeline,
                self.state,
                resume=is_resumed or None,
                resume_from=self.start_at,
                traceparent=traceparent,
            )
        assert self.start_at is not None
        return await runner.fork(
            self.forks,
            self.pipeline,
            at=self.start_at,
            state=self.state,
            output=self.output,
            new_run_id=self.config.run_id,
            input_schema=input_model(self.pipeline),
            traceparent=traceparent,
        )

    # ------------------------------------------------------------------ problems

    def _resume_hint(self, *options: str) -> str:
        return self.db.hint("resume", id_word(self.config.run_id), self.target, options=options)

    def _next_step(self, verb: str) -> str:
        if not self.db.is_durable:
            return f"{self.db.name} stores nothing of it"
        return f"finished nodes are stored; {verb}: {self._resume_hint()}"

    def _store_problem(self, error: StoreError) -> Problem:
        if isinstance(error, (PipelineChanged, CorruptCheckpoint)):
            if any(isinstance(node, FlowNode) for node in nodes_of(self.pipeline)):
                return store_problem(error)
            return store_problem(error, f"or rerun from a node: {self._resume_hint('--from', 'NODE')}")
        if isinstance(error, RunBusy):
            return self._busy_problem(error)
        if isinstance(error, RunExists):
            return store_problem(
                # The advice of the message is for a program.
                RunExists(str(error).partition("; pass resume=True")[0]),
                f"resume it: {self._resume_hint()}",
                "or discard what it did: repeat the command with --restart",
                "or use another id: --run-id ID",
            )
        if isinstance(error, CheckpointNotFound):
            return store_problem(error)
        more = () if not self.db.is_default else ("or name another store: --db FILE, or STROMA_DB=FILE",)
        return store_problem(error, *more)

    def _busy_problem(self, error: RunBusy) -> Problem:
        name = id_word(self.config.run_id)
        other = "" if error.same_input else ", with another input"
        return Problem(
            f"run {clean(self.config.run_id)} is already running in {error.holder}{other} (lease expires in "
            f"{format_duration(error.left_seconds)} unless renewed)",
            f"wait for its result: {self._resume_hint('--attach')}",
            f"or cancel it: {self.db.hint('cancel', name)}",
            f"or, if that process is dead: {self._resume_hint('--take-over')}",
            code=Code.ENVIRONMENT,
        )

    def _failure_problem(self, error: BaseException, what: str) -> Problem:
        return Problem(
            f"{what}: {describe_error(error)}",
            *last_frame(error),
            self._next_step("fix that, then resume with"),
            code=Code.FAILED,
        )
