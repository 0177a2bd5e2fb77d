"""One run, from the configured pipeline to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass

from pydantic import BaseModel

from stroma.checkpoint.journal import CorruptCheckpoint, PipelineChanged, RunRecord, StoreError
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.sqlite import SQLiteStore
from stroma.cli.errors import Code, Problem, command
from stroma.cli.progress import Progress, listen
from stroma.cli.report import Ending
from stroma.cli.signals import Stop
from stroma.cli.stores import Database
from stroma.cli.trouble import last_frame, said
from stroma.cli.words import id_word
from stroma.config import RunConfig
from stroma.contracts import ContractRegistry
from stroma.hooks import HookError, HookNotAsync, flatten
from stroma.runner import Pipeline, StromaRunner
from stroma.trace import ExecutionResult

__all__ = ["Job"]


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
    as_json: bool
    quiet: bool

    def go(self) -> int:
        """Run to the end, tell how it went, and return the exit code. Raises Problem."""
        self.db.prepare()
        listen(quiet=self.quiet)
        progress = Progress(quiet=self.quiet)
        hooks = [*flatten(self.config.hooks), progress.hooks()]
        config = self.config.model_copy(update={"hooks": hooks})
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.db.store), config)
        begun = time.perf_counter()
        result, stopped_by = self._run(runner, progress)
        if result is None:
            raise Problem(
                f"stopped by {stopped_by or 'code of its own'} before the run began; nothing was called",
                code=Code.INTERRUPTED,
            )
        remembered = self.known if self.start_at is None else None
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
        )
        ending.tell(json=self.as_json, quiet=self.quiet)
        return int(ending.code)

    def _run(self, runner: StromaRunner, progress: Progress) -> tuple[ExecutionResult | None, str | None]:
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
    ) -> tuple[ExecutionResult | None, str | None]:
        task = asyncio.current_task()
        assert task is not None
        stop = Stop(task, self._way_on("go on with"))
        going_on = self.known is not None and self.start_at is None
        try:
            result: ExecutionResult | None = await runner.run(
                self.pipeline, self.state, resume=going_on or None, resume_from=self.start_at
            )
        except asyncio.CancelledError:  # By the signal, or by code of the pipeline.
            result = progress.result
        finally:
            if isinstance(self.db.store, SQLiteStore):
                await self.db.store.aclose()
        return result, stop.signal

    # ------------------------------------------------------------------ what leaves run() as an exception

    def _resume(self, *options: str) -> str:
        return command("resume", id_word(self.config.run_id), self.target, options=(*options, *self.db.words))

    def _way_on(self, words: str) -> str:
        if not self.db.keeps:
            return f"{self.db.name} keeps nothing of it"
        return f"every finished node is kept; {words}: {self._resume()}"

    def _store_problem(self, error: StoreError) -> Problem:
        if isinstance(error, (PipelineChanged, CorruptCheckpoint)):
            again = f"or make the outputs from a node on anew: {self._resume('--from', 'NODE')}"
            return self.db.problem(error, again)
        more = () if not self.db.is_default else ("or name another store: --db FILE, or STROMA_DB=FILE",)
        return self.db.problem(error, *more)

    def _broke_off(self, error: BaseException, what: str) -> Problem:
        return Problem(
            f"{what}: {said(error)}",
            *last_frame(error),
            self._way_on("mend that, then go on with"),
            code=Code.FAILED,
        )
