"""One call of ``run``: the run's hooks and record around the loop over its nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from pydantic import BaseModel

from stroma.checkpoint import CheckpointNotFound, Committed, Finished, PipelineChanged
from stroma.contracts.node import Group, Node, apart_in
from stroma.contracts.tagged_json import NotSerialisable
from stroma.cost.usage import shown
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT, leave
from stroma.engine.loop import execute_in_turn
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.redelivery import redeliver
from stroma.engine.restore import check_place, output_schema, restore
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed
from stroma.failures.failure import Failure, NodeContext, diagnose, text_of
from stroma.hooks.dispatch import HookNotAsync
from stroma.hooks.sets import HookError
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["OneRun"]


class OneRun:
    """One call of ``run``: the run's hooks and record around the loop over its nodes."""

    def __init__(
        self, ctx: ReliabilityContext, nodes: list[Node | Group], initial: BaseModel, start: int | None
    ) -> None:
        self.ctx = ctx
        self.nodes = nodes
        self.initial = initial
        self.start = start
        self.continued = False
        self.task = asyncio.current_task()
        self.loop = asyncio.get_running_loop()
        #: Ends with the run, for whoever waits for that.
        self.ended: asyncio.Future[None] | None = None
        #: How the run ends that somebody else has cancelled.
        self._cancelled_as: RunStatus | None = None
        self._over = False

    def cancel(self, status: RunStatus = RunStatus.CANCELLED) -> None:
        """End the run, from any thread. Its result has the status; nothing is raised."""
        try:
            self.loop.call_soon_threadsafe(self._cancel, status)
        except RuntimeError:  # The loop was closed under the run: nobody is at work on it any more.
            self.ctx.session.abandon()

    def drain(self) -> asyncio.Future[None]:
        """Let no further node begin. What is returned ends with the run."""
        self.ctx.stops = True
        self.ctx.interrupt = lambda: self._cancel(RunStatus.INTERRUPTED)
        if self.ended is None:
            self.ended = self.loop.create_future()
        return self.ended

    def _cancel(self, status: RunStatus) -> None:
        if not self._over and self._cancelled_as is None and self.task is not None:
            self._cancelled_as = status
            self.ctx.cancelled = self.ctx.stops = True
            self.task.cancel()

    @property
    def state(self) -> BaseModel:
        """The last committed state, else the initial one."""
        last = self.ctx.last_state
        return self.initial if last is None else last

    async def go(self) -> ExecutionResult:
        ctx = self.ctx
        status = RunStatus.INTERRUPTED
        failure: Failure | None = None
        result: ExecutionResult | None = None
        begun = False
        cancelling = 0 if self.task is None else self.task.cancelling()
        try:
            try:
                await self._open()
                begun = True
                ctx.handover.is_active = True
                ctx.session.on_cancel = self.cancel
                await ctx.announce_start(self.initial)
                if ctx.delivers:
                    await redeliver(ctx, self.nodes)
                if ctx.session.finished is None:
                    if self.start:
                        await self._skip_to(self.start)
                    token = CURRENT.set(CURRENT.get())
                    try:
                        # Here, and in no coroutine of its own, which every run would have.
                        outcome: BaseModel | Halt | Stopped = STOPPED
                        first = self.start or 0
                        nodes = self.nodes[first:] if first else self.nodes
                        if not (ctx.stops and nodes):
                            cancels = 0 if self.task is None else self.task.cancelling()
                            outcome = await execute_in_turn(
                                ctx, nodes, self.state, Place(first, cancelling=cancels)
                            )
                    finally:
                        leave(token)
                    failure, status = self._came_to(outcome)
                else:
                    failure, status = await self._as_it_was(ctx.session.finished)
            except NotSerialisable as error:  # The input, in a store that outlives the process.
                failure = diagnose(error, NodeContext("input", 1, ctx.run_id))
                status = RunStatus.FAILED
                if not begun:
                    begun = True
                    await ctx.announce_start(self.initial)
            if self._cancelled_as is not None and self.task is not None:
                # A node has swallowed the cancellation, or ended without meeting it: the caller's task is left as it was.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
                if self.task.uncancel() > cancelling:
                    raise asyncio.CancelledError
        except asyncio.CancelledError:
            status = self._cancelled_as or RunStatus.CANCELLED
            if self._cancelled_as is None or self.task is None or self.task.uncancel() > cancelling:
                raise
        except GeneratorExit:  # The coroutine is being closed: nothing may be awaited any more.
            ctx.session.abandon()
            if begun:
                ctx.call_end_hooks_now(ctx.build_result(status, self.state))
            begun = False
            raise
        except HookNotAsync as error:
            error.result = ctx.build_result(status, self.state)
            raise
        finally:
            self._over = True
            ctx.session.on_cancel = (
                None  # Without a circle between them, nothing of the run waits for the collector.
            )
            if begun or failure is not None:
                result = await self._end(status, failure)
        if result is None:  # Ended from elsewhere while it was opened: no hook was told of a start.
            result = ctx.build_result(status, self.state, failure)
        for probe in ctx.probes:
            probe.ended(ctx, result)
        return result

    async def _open(self) -> None:
        ctx = self.ctx
        try:
            session = await ctx.open(
                self.initial,
                discard_from=self.start,
                accept=self._check_unchanged,
                apart=apart_in(self.nodes),
            )
        except asyncio.CancelledError:
            await ctx.end(
                self._cancelled_as or RunStatus.CANCELLED, None
            )  # The store may have begun it already.
            raise
        self.continued = session.continued or self.start is not None

    def _check_unchanged(self, position: int, branch: str, committed: Committed) -> None:
        """Refuse a changed pipeline before anything runs, what stands inside its groups included."""
        check_place(self.ctx, self.nodes, committed, position, branch)

    async def _skip_to(self, start: int) -> None:
        """The published way of resuming: go on from the checkpoint of the node before, whatever lies further back."""
        ctx = self.ctx
        loaded = -1
        for position in range(start):
            state = await restore(ctx, self.nodes[position], self.state, Place(position))
            if state is not None:
                loaded = position
        if loaded == start - 1:
            return
        before = self.nodes[start - 1]
        schema = output_schema(ctx, before, self.state).model
        saved = await ctx.checkpoint_manager.resume(ctx.run_id, before.node_id, schema)
        if saved is None:
            raise CheckpointNotFound(
                f"run {ctx.run_id!r} has no checkpoint of node {before.node_id!r}, which stands before "
                f"{self.nodes[start].node_id!r}; run the pipeline from its beginning, or resume from an earlier node"
            )
        ctx.handover.offer(saved)

    def _came_to(self, outcome: BaseModel | Halt | Stopped) -> tuple[Failure | None, RunStatus]:
        """The end of a run whose nodes came to an outcome."""
        if isinstance(outcome, Stopped):
            return None, self._cancelled_as or RunStatus.INTERRUPTED
        if isinstance(outcome, Halt):
            failure = None if outcome.suspended else outcome.failure
            return failure, self._cancelled_as or outcome.status
        return None, RunStatus.RESUMED if self.continued else RunStatus.COMPLETED

    async def _as_it_was(self, finished: Finished) -> tuple[Failure | None, RunStatus]:
        """The outcome of an execution that is returned, not run."""
        ctx = self.ctx
        status = RunStatus(finished.status)
        completed = status in (RunStatus.COMPLETED, RunStatus.RESUMED)
        for position, node in enumerate(self.nodes):
            if await restore(ctx, node, self.state, Place(position)) is None:
                if not completed:
                    break
                raise PipelineChanged(
                    f"run {ctx.run_id!r} finished without node {node.node_id!r}, which the pipeline has at position "
                    f'{position}; continue it with if_exists="resume", or begin a new run'
                )
        if completed or status in _CUT_SHORT:
            return None, status
        if status is RunStatus.SUSPENDED:
            reasons = [w.reason for w in ctx.session.waiting.values() if w.payload is None]
            ctx.suspended.extend(reasons or [finished.error or "it waits for an answer"])
            return None, status
        error = RunFailed(finished.error or f"run {ctx.run_id!r} ended as {status}")
        failure = diagnose(error, NodeContext("run", 1, ctx.run_id))
        kind = FailureClass.TERMINAL if status is RunStatus.FAILED else FailureClass.RECOVERABLE
        return replace(failure, failure_class=kind, reason=finished.reason or failure.reason), status

    async def _end(self, status: RunStatus, failure: Failure | None) -> ExecutionResult:
        """Close the record, build the result, tell the hooks: always, whichever way the run ended."""
        ctx = self.ctx
        result = ctx.build_result(status, self.state, failure)
        why = text_of(failure) if failure is not None else "; ".join(ctx.suspended) or None
        if ctx.run_logger.isEnabledFor(logging.INFO):
            ctx.run_logger.info("run of %r ended: %s", ctx.pipeline, status)
        if await ctx.end_and_announce(status, why, result if ctx.fire.on_run_end is not None else None):
            raise asyncio.CancelledError
        if ctx.hook_failures and ctx.config.hook_errors == "raise" and status not in _CUT_SHORT:
            first = ctx.hook_failures[0]
            where = "" if first.node_id is None else f" of {first.node_id!r}"
            raise HookError(
                f"{len(ctx.hook_failures)} hook calls raised; the first, {first.hook}{where}: {shown(first.exception)}",
                result,
            ) from first.exception
        return result


_CUT_SHORT = (RunStatus.CANCELLED, RunStatus.INTERRUPTED)
