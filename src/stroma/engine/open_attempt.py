"""The end of an attempt: one row of the trace, and one call of an end hook for each start hook, whatever interrupts it.

Once ``row`` is set, what is raised goes into ``interrupt``: an exception that came out before the end hooks
would keep them from being called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import Waiting
from stroma.contracts.schema import Snapshot
from stroma.cost.usage import UsageError
from stroma.engine.commit import failed_of, record, record_failure_site, refer, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.diagnosis import diagnose_attempt
from stroma.engine.events import failure_arguments, log_failure, warn_of_budget
from stroma.engine.execution import NodeExecution
from stroma.engine.metering import price
from stroma.engine.outcome import GroupStopped, Halt
from stroma.engine.questions import question_of
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure, isinstance_by_type, message_of
from stroma.hooks.dispatch import Calls, Firing, HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow, Outcome

__all__ = ["OpenAttempt"]


class OpenAttempt:
    """An attempt as far as its end is concerned; :class:`stroma.engine.attempt.NodeAttempt` makes it.

    Attributes:
        snapshot: of the input, for the row.
        begin: when the attempt began, later when its function did, in ns; 0 before that.
        duration: how long the function took, in ns.
        is_counted: what it took is in the totals of the run.
        usage_error: usage that cannot be counted.
        failure: the verdict on an output that is valid: a crossed limit. ``model`` is committed all the same.
        row, firing: the end, and the calls of its hooks.
        first_unstarted: the first set of hooks that has not seen the start; None if all have.
        interrupt: a cancellation, or a KeyboardInterrupt, that comes out once the attempt has its end.
    """

    __slots__ = (
        "begin",
        "ctx",
        "duration",
        "failure",
        "firing",
        "first_unstarted",
        "interrupt",
        "is_counted",
        "model",
        "row",
        "run",
        "snapshot",
        "usage_error",
    )

    ctx: ReliabilityContext
    run: NodeExecution
    snapshot: Snapshot
    begin: int
    duration: int
    is_counted: bool
    model: BaseModel
    usage_error: UsageError | None
    failure: Failure | None
    row: AttemptRow | None
    firing: Firing | None
    first_unstarted: int | None
    interrupt: BaseException | None

    def _make_row(
        self, outcome: Outcome, duration: int, failure: Failure | None = None, output: Snapshot | None = None
    ) -> AttemptRow:
        """Return the row of the attempt, with the snapshots of its input and its output."""
        run = self.run
        if failure is not None:
            record_failure_site(run, self.begin, failure)
        failed = None if failure is None else failed_of(failure, outcome)
        usage = None if run.counted is NO_USAGE else run.counted
        busy = min(run.busy_ns, duration) if run.kind == "group" else duration
        fields = (
            run.node_id,
            run.attempt,
            self.begin + self.ctx.epoch_ns,
            duration,
            self.snapshot,
            output,
            outcome,
            failed,
            usage,
            run.position,
            run.branch,
            run.group,
            run.schemas,
            run.children,
            busy,
        )
        return tuple.__new__(AttemptRow, fields)  # AttemptRow(*fields) takes 0.3 us more of the 10 of a node.

    def _end(self, row: AttemptRow) -> None:
        """Append the row of the end."""
        self.row = self.run.ended = row
        self.run.rows.append(row)

    def _set_hooks(
        self,
        calls: Calls | None,
        make: Callable[..., tuple[Any, ...]],
        about: tuple[Any, ...] = (),
        unread: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        """Prepare the calls of the hooks of the end; see :class:`stroma.hooks.dispatch.Firing`."""
        assert self.row is not None
        if calls is not None:
            if self.first_unstarted is not None:
                calls = tuple([call for call in calls if call[0] < self.first_unstarted])
            event = f"on_node_{self.row.outcome}"
            self.firing = Firing(self.ctx.fire, event, calls, self.run.node_id, make, about, unread)

    async def _call_end_hooks(self) -> None:
        """Call the hooks of the end, and note in the store that they were called."""
        ctx, firing = self.ctx, self.firing
        if firing is None:
            return
        if not firing.advance():
            try:
                await firing.finish()
            except (asyncio.CancelledError, HookNotAsync):
                # They come out once every set was called: that must not happen again.
                if ctx.delivers and self.row is not None:
                    ctx.session.delivered(self.row)
                raise
        if ctx.delivers and self.row is not None:
            ctx.session.delivered(self.row)

    async def _announce(self) -> BaseModel | Halt:
        """Call the hooks of an end with an output, then let out what came up meanwhile."""
        ctx = self.ctx
        if self.failure is not None and self.row is not None:
            log_failure(ctx, self.run, self.failure, self.row)
        if self.firing is not None:
            await self._call_end_hooks()
        if ctx.limits and ctx.fire.on_budget_warning is not None:
            await warn_of_budget(ctx)
        self._raise_interrupt()
        if self.failure is None:
            return self.model
        return Halt(self.failure, output=self.model, spent=self.usage_error is None)

    def _raise_interrupt(self) -> None:
        """Raise what was to come out once the attempt has its end."""
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            try:
                raise interrupt
            finally:
                del interrupt  # Or the exception and this frame would be a cycle.

    # ------------------------------------------------------------------ without an output

    async def _fail(self, error: BaseException, *, is_of_store: bool = False) -> Failure | Halt:
        """End as failed: classify, record, and call the failure hooks."""
        ctx, run = self.ctx, self.run
        failure, halt = diagnose_attempt(ctx, run, error, self.snapshot, is_of_store=is_of_store)
        row = self._make_row("failure", self.duration, failure)
        row = refer(ctx, row)
        self._end(row)
        self._set_hooks(ctx.fire.on_node_failure, failure_arguments, (ctx, run, failure))
        if halt is None or failure.reason != "store":
            try:
                problem = await self._save(row)
            except GeneratorExit:
                raise
            except BaseException as interrupt:  # KeyboardInterrupt in a store.
                problem, self.interrupt = None, interrupt
            if problem is not None:
                stored = Failure(
                    problem, FailureClass.RECOVERABLE, run.node_id, run.attempt, str(problem), "store"
                )
                halt = Halt(stored, partial=True)
        log_failure(ctx, run, failure, row)
        await self._call_end_hooks()
        if ctx.limits and ctx.fire.on_budget_warning is not None:
            await warn_of_budget(ctx)
        self._raise_interrupt()
        return failure if halt is None else halt

    async def _save(self, row: AttemptRow) -> Exception | None:
        """Record an end without an output. Return why the store refuses it."""
        pending = record(self.ctx, row)
        if pending is None:
            return None
        return await self._settle(row, pending, partial(record, self.ctx, row))

    async def _settle(
        self,
        row: AttemptRow,
        pending: Awaitable[None] | Exception,
        again: Callable[[], Awaitable[None] | Exception | None],
    ) -> Exception | None:
        """See a store call through; a cancellation meanwhile comes out at the end. Return why the store refuses it."""
        problem, cancelled = await settle(self.ctx, row, pending, again)
        self.interrupt = self.interrupt or cancelled
        return problem

    async def _suspend(self, raised: BaseException) -> Failure | Halt:
        """End as suspended: a person has to answer first. That is no failure."""
        ctx, run = self.ctx, self.run
        row = self._make_row("suspended", self.duration)
        waiting: Waiting | None = None
        if isinstance_by_type(raised, Suspend):
            ctx.redactor.note_secrets(self.snapshot)
            reason = ctx.redactor.mask(message_of(raised))
            waiting = question_of(raised, run, reason)
        else:  # A group; its children have recorded what they wait for.
            assert isinstance_by_type(raised, GroupStopped)
            reason = raised.halt.failure.message
        again = partial(record, ctx, row, waiting=waiting)
        pending = again()
        if pending is not None:
            problem = await self._settle(row, pending, again)
            if problem is not None:
                return await self._fail(problem, is_of_store=True)
        if waiting is not None:
            ctx.note_question(waiting)
            run.question = waiting.question
        ctx.run_logger.info("node %r is suspended: %s", run.node_id, one_line(reason))
        self._end(row)
        self._set_hooks(ctx.fire.on_node_suspended, lambda: (ctx.run_id, run.node_id, reason))
        await self._call_end_hooks()
        self._raise_interrupt()
        error = raised if isinstance(raised, Exception) else Suspend(reason)
        failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, reason)
        return Halt(failure, suspended=True)

    # ------------------------------------------------------------------ interrupted

    async def _end_interrupted(self, interrupt: BaseException) -> None:
        """Give an attempt that is interrupted its end. The one place that knows of coroutines that are closed."""
        if isinstance(interrupt, GeneratorExit):
            self._close_out()
            return
        try:
            await self._abandon()
        except GeneratorExit:
            self._close_out()
            raise
        except asyncio.CancelledError:
            if not isinstance(interrupt, asyncio.CancelledError):
                raise  # Otherwise the first one is on its way out.

    async def _abandon(self) -> None:
        """End without a verdict: cancelled, or the process is asked to stop. The usage so far is counted.

        Does nothing if the attempt has an end, or has not begun.
        """
        if self.row is not None or not self.begin:
            return
        ctx, run = self.ctx, self.run
        duration = 0
        if not self.is_counted:
            duration = self.duration
            if run.reported is not None:
                await price(ctx, run)
                ctx.cost_tracker.spend(run.counted.tokens, run.counted.cost_usd)
            if not run.branch:
                ctx.cost_tracker.latency_ns += min(run.busy_ns, duration) if run.kind == "group" else duration
        row = self._end_as_cancelled(duration)
        stopped: BaseException | None = None
        try:
            await self._save(row)
        except GeneratorExit:
            raise
        except BaseException as error:  # KeyboardInterrupt in a store.
            stopped = error
        try:
            await self._call_end_hooks()
        except HookNotAsync as error:
            # The interrupt is on its way out, and must come out as itself.
            ctx.run_logger.warning("%s", error)
        if stopped is not None:
            raise stopped

    def _end_as_cancelled(self, duration: int) -> AttemptRow:
        """Append the row of an attempt without a verdict, and return it."""
        ctx, run = self.ctx, self.run
        row = self._make_row("cancelled", duration)
        self._end(row)
        self._set_hooks(ctx.fire.on_node_cancelled, lambda: (ctx.run_id, run.node_id))
        return row

    def _close_out(self) -> None:
        """End where nothing can be awaited: the coroutine around is being closed. Hooks get as far as they come."""
        if self.row is None:
            if not self.begin:
                return
            self._end_as_cancelled(0 if self.is_counted else self.duration)
        if self.firing is not None:
            token = CURRENT.set(self.run)  # The code that closes it has a context of its own.
            try:
                self.firing.finish_now()
            finally:
                CURRENT.reset(token)
