"""One call of ``run``: the record and the hooks of a run around the loop over its nodes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn

from pydantic import BaseModel

from stroma.checkpoint import CheckpointNotFound, Finished, PipelineChanged
from stroma.checkpoint.entries import SETBACKS_NOTE, RunControl, delay_after
from stroma.contracts.node import FlowNode, Group, Node, apart_in
from stroma.contracts.tagged_json import NotSerialisable
from stroma.cost.usage import shown
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import intents
from stroma.engine.execution import CURRENT, leave
from stroma.engine.lifecycle import (
    announce_start,
    call_end_hooks_now,
    end_and_announce,
    end_run,
    give_back,
    open_run,
)
from stroma.engine.loop import execute_in_turn, note_end
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped, halt_of_ended_run, limit_that_stopped
from stroma.engine.restore import check_place, check_unfinished_call, output_schema, redeliver, restore
from stroma.engine.tasks import is_closed, raise_if
from stroma.failures.classes import FailureClass, describe_class
from stroma.failures.errors import BUDGET, LAST_FAILURE, PAUSED, RunFailed, SharedBudgetExceeded
from stroma.failures.failure import Failure, NodeContext, diagnose, isinstance_by_type
from stroma.hooks.dispatch import HookNotAsync
from stroma.hooks.sets import HookError
from stroma.runner.stored_runs import StoredRuns
from stroma.trace.result import ExecutionResult, RunStatus

#: Levels of the line about an end; of any other status INFO.
_LEVELS = {RunStatus.FAILED: logging.ERROR, RunStatus.PARTIAL: logging.WARNING}
#: Message of the cancellation of a run's task by :meth:`RunExecution.cancel`.
_BY_RUN: Final = "the run was cancelled"
_CUT_SHORT = (RunStatus.CANCELLED, RunStatus.INTERRUPTED)


class RunExecution:
    """One call of ``run``. :meth:`run` stores how the run ended, whichever way that was."""

    continued = False
    ended: asyncio.Future[None] | None = None  # Done when the run has ended; made by drain().
    _status = RunStatus.INTERRUPTED
    _failure: Failure | None = None
    _result: ExecutionResult | None = None
    _has_started = _has_ended = False
    #: The run ends INTERRUPTED, and would at once again: its dispatcher continues it after a delay.
    _has_setback = False
    _cancelled_as: RunStatus | None = None  # The status of a run that cancel() has cancelled.

    def __init__(
        self, ctx: ReliabilityContext, nodes: list[Node | Group], initial: BaseModel, start: int | None
    ) -> None:
        self.ctx = ctx
        self.nodes = nodes
        self.initial = initial
        self.start = start
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task(self.loop)
        self._cancelling = 0 if self.task is None else self.task.cancelling()

    @property
    def _when_cancelled(self) -> RunStatus:
        """The status when the caller's task is cancelled: the end of a dispatcher is not that of the run."""
        by_dispatcher = self.ctx.journal.dispatch.due_ms is not None
        return RunStatus.INTERRUPTED if by_dispatcher else RunStatus.CANCELLED

    def cancel(self, status: RunStatus = RunStatus.CANCELLED) -> None:
        """End the run with a status; its caller gets the result. Safe to call from any thread."""
        self._call_soon(self._cancel, status)

    def control(self, control: RunControl) -> None:
        """Apply requests about the run: no attempt begins that they forbid. Safe to call from any thread."""
        self.ctx.accept(control)
        if control.cancel:
            self.cancel()
        elif control.pause:
            self._call_soon(self.ctx.stopping.end_waits)

    def _call_soon(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # The loop was closed under the run, so that nothing runs it.
            self.ctx.session.abandon()

    def drain(self) -> asyncio.Future[None]:
        """Start no further node. Returns a future that is done when the run has ended."""
        self.ctx.stopping.is_asked = True
        self.ctx.stopping.interrupt = lambda: self._cancel(RunStatus.INTERRUPTED)
        if self.ended is None:
            self.ended = self.loop.create_future()
        return self.ended

    def _cancel(self, status: RunStatus) -> None:
        if not self._has_ended and self._cancelled_as is None and self.task is not None:
            self._cancelled_as = status
            self.ctx.stopping.is_cancelled = self.ctx.stopping.is_asked = True
            self.task.cancel(_BY_RUN)

    @property
    def state(self) -> BaseModel:
        """The last committed state, else the initial one."""
        last = self.ctx.handover.model
        return self.initial if last is None else last

    async def run(self) -> ExecutionResult:
        """Open the run, execute its nodes, and close it."""
        try:
            try:
                await self._begin()
                await self._execute()
            except NotSerialisable as error:  # The input, in a store that outlives the process.
                await self._reject_input(error)
            if self._cancelled_as is not None:
                await self._absorb_cancellation()
        except BaseException as error:
            if not await self._leave(error):
                raise
        else:
            await self._leave(None)
        # Without a result, the run was cancelled while it was opened, before its start hooks.
        result = self._result or self.ctx.build_result(self._status, self.state, self._failure)
        self._result = self._failure = None  # Exceptions reference this frame: otherwise a reference cycle.
        for interceptor in self.ctx.fire.interceptors:
            interceptor.ended(self.ctx, result)
        return result

    async def _leave(self, error: BaseException | None) -> bool:
        """Store how the run ended, and call its end hooks. Return True if a cancellation is its result."""
        ctx, is_suppressed = self.ctx, False
        kind = type(error)  # Not isinstance(): an exception may raise when asked for its __class__.
        if error is not None and issubclass(kind, asyncio.CancelledError):
            self._status = self._cancelled_as or self._when_cancelled
            if self._cancelled_as is not None and self.task is not None:
                # Or a task group of a node has left its cancellation behind, as it does up to Python 3.12.
                is_suppressed = self.task.uncancel() <= self._cancelling or error.args == (_BY_RUN,)
        elif error is not None and is_closed(error):  # Nothing can be awaited.
            ctx.journal.abandon()
            if self._has_started:
                call_end_hooks_now(ctx, ctx.build_result(self._status, self.state))
            self._has_started = False
        elif issubclass(kind, Exception):
            self._has_setback = ctx.journal.dispatch.due_ms is not None
            if type(error) is HookNotAsync:
                error.result = ctx.build_result(self._status, self.state)
        self._has_ended = True
        ctx.journal.session.on_control = None  # Otherwise the session and the run are a reference cycle.
        if self._has_started or self._failure is not None:
            try:
                self._result = await self._close()
            except asyncio.CancelledError:
                if is_suppressed or not issubclass(kind, asyncio.CancelledError):
                    raise  # Otherwise the first one is on its way out.
        return is_suppressed

    async def _begin(self) -> None:
        """Open the run and call its start hooks, and the end hooks that a crashed process did not call."""
        ctx = self.ctx
        try:
            session = await open_run(
                ctx,
                self.initial,
                discard_from=self.start,
                accept=partial(check_place, ctx, self.nodes),  # Inside groups too, before anything runs.
                apart=apart_in(self.nodes),
            )
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            # The store may have stored the start of the run already.
            is_cancelled = isinstance(error, asyncio.CancelledError)
            status = self._when_cancelled if is_cancelled else RunStatus.INTERRUPTED
            await end_run(ctx, self._cancelled_as or status, None)
            raise
        self.continued = session.continued or self.start is not None
        if session.continued and session.finished is None:
            try:
                for at, waiting in session.waiting.items():
                    check_unfinished_call(ctx, self.nodes, *at, waiting)
                for at, intent in intents(ctx).items() if session.notes else ():
                    if intent.is_unknown:
                        check_unfinished_call(ctx, self.nodes, *at, intent)
            except PipelineChanged as changed:
                await self._give_back(changed)
        self._has_started = ctx.handover.is_active = True
        session.on_control = self.control
        await announce_start(ctx, self.initial)
        if ctx.fire.delivers:
            await redeliver(ctx, self.nodes)

    async def _execute(self) -> None:
        """Execute the nodes that are not committed, or restore the outcome of a run that is returned."""
        ctx = self.ctx
        finished = ctx.journal.session.finished
        if finished is not None:
            await self._restore_outcome(finished)
            return
        first = self.start or 0
        if first:
            await self._skip_to(first)
        outcome: BaseModel | Halt | Stopped = STOPPED
        token = CURRENT.set(CURRENT.get())
        seconds = ctx.journal.dispatch.max_seconds
        limit = None if seconds is None else self.loop.call_later(seconds, self.drain)
        try:
            nodes = self.nodes[first:] if first else self.nodes
            if not (ctx.stopping.is_asked and nodes):
                place = Place(first, cancelling=0 if self.task is None else self.task.cancelling())
                if FlowNode in set(map(type, nodes)):
                    from stroma.runner.flows.body import run_with_flows

                    outcome = await run_with_flows(ctx, nodes, self.state, place)
                else:
                    outcome = await execute_in_turn(ctx, nodes, self.state, place)
        finally:
            leave(token)
            if limit is not None:
                limit.cancel()
        if isinstance(outcome, Stopped):  # A shutdown, or a pause: no further node was to start.
            if ctx.stopping.is_paused:
                ctx.account.note_suspended(PAUSED)
            status = RunStatus.SUSPENDED if ctx.stopping.is_paused else RunStatus.INTERRUPTED
            self._status = self._cancelled_as or status
        elif isinstance(outcome, Halt):
            await self._end_halted(note_end(CURRENT.get(), outcome))
        else:
            self._status = RunStatus.RESUMED if self.continued else RunStatus.COMPLETED

    async def _end_halted(self, halt: Halt) -> None:
        ctx, failure, status = self.ctx, halt.failure, halt.status
        is_own = halt.spent and not isinstance_by_type(failure.exception, SharedBudgetExceeded)
        if is_own and status is RunStatus.PARTIAL and ctx.config.on_budget == "wait":
            # The run is suspended until somebody raises its budget, in place of its end.
            ctx.account.note_suspended(BUDGET)
            status = RunStatus.SUSPENDED
        elif failure.reason == "changed" and ctx.session.continued and not ctx.trace.rows:
            await self._give_back(failure.exception)
        else:
            self._failure = None if halt.suspended else failure
            if failure.reason == "store" and halt.partial and ctx.journal.dispatch.due_ms is not None:
                # A dispatcher continues the run once the store is well again; a person reads the error.
                status, self._has_setback = RunStatus.INTERRUPTED, True
        self._status = self._cancelled_as or status

    async def _give_back(self, changed: BaseException) -> NoReturn:
        """Leave the run as it was: this code does not fit it. Raises PipelineChanged."""
        has_started, self._has_started = self._has_started, False
        result = self.ctx.build_result(RunStatus.INTERRUPTED, self.state) if has_started else None
        raise_if(await give_back(self.ctx, result))
        self.ctx.redactor.note_context()
        text = self.ctx.redactor.mask(str(changed))
        raise changed if text == str(changed) else PipelineChanged(text)

    async def _reject_input(self, error: NotSerialisable) -> None:
        """Fail the run for an input that its store cannot store."""
        self._failure = diagnose(error, NodeContext("input", 1, self.ctx.run_id))
        self._status = RunStatus.FAILED
        if not self._has_started:
            self._has_started = True
            await announce_start(self.ctx, self.initial)

    async def _absorb_cancellation(self) -> None:
        """Take back a cancellation of :meth:`cancel` that no node raised."""
        assert self.task is not None
        came: asyncio.CancelledError | None = None
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            came = error
        if self.task.uncancel() > self._cancelling and came is not None and came.args != (_BY_RUN,):
            raise_if(came)

    async def _skip_to(self, start: int) -> None:
        """Restore the nodes before a resume target from the journal, else from the last checkpoint."""
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
                f"run {ctx.run_id!r} has no checkpoint of node {before.node_id!r}, which precedes "
                f"{self.nodes[start].node_id!r}; run the pipeline from its start, or from an earlier node"
            )
        ctx.handover.model = saved

    async def _restore_outcome(self, finished: Finished) -> None:
        """Restore the outcome of a run that has ended, without a call."""
        ctx = self.ctx
        status = RunStatus(finished.status)
        completed = status in (RunStatus.COMPLETED, RunStatus.RESUMED)
        for position, node in enumerate(self.nodes):
            if await restore(ctx, node, self.state, Place(position)) is None:
                if not completed:
                    break
                raise PipelineChanged(
                    f"run {ctx.run_id!r} finished without node {node.node_id!r}, which the pipeline has at "
                    f'position {position}; continue it with if_exists="resume", or start a new run'
                )
        self._status = status
        if completed or status in _CUT_SHORT:
            return
        if status is RunStatus.SUSPENDED:
            if finished.error not in (PAUSED, BUDGET):
                ctx.account.note_open_questions(ctx.session.waiting.values())
            if not ctx.account.suspended:
                ctx.account.note_suspended(finished.error or "waiting for an answer")
            return
        cause = (await StoredRuns(ctx.registry, ctx.checkpoint_manager).get(ctx.run_id)).cause
        if cause is None:  # No attempt stopped it.
            self._failure = halt_of_ended_run(ctx, "run", finished).failure
            return
        kind, message = FailureClass(str(cause.failure_class)), cause.message or ""
        error = RunFailed.recorded(finished.error or message, cause.error_type)
        self._failure = Failure(error, kind, cause.node_id, cause.attempt, message, cause.reason)

    def _note_setbacks(self) -> None:
        """Count the setbacks of the run in succession, and note when it is due after one."""
        session = self.ctx.journal.session
        before = session.notes.get(SETBACKS_NOTE)
        if self._has_setback:
            from stroma.runner.flows.suspension import now_ms

            number = 1 + int(before or 0)
            self.ctx.journal.wake_ms = now_ms() + int(1000 * delay_after(number))
            session.note(SETBACKS_NOTE, str(number).encode())
        elif before is not None:
            session.note(SETBACKS_NOTE, None)

    async def _close(self) -> ExecutionResult:
        """Store the end of the run, call its end hooks and return its result. Raises HookError."""
        ctx, status, failure = self.ctx, self._status, self._failure
        error = ctx.account.describe_suspension() if failure is None else str(failure)
        if status is RunStatus.SUSPENDED:  # Its record has what stopped it, its result all questions.
            ctx.account.note_open_questions(ctx.session.waiting.values())
            error = error or ctx.account.describe_suspension()
        else:
            ctx.journal.wake_ms = None  # Other work of the run is not finished, and waits for no time.
        result = ctx.build_result(status, self.state, failure)
        if self._has_setback or ctx.journal.session.notes:
            self._note_setbacks()
        if failure is not None:
            ctx.journal.cause = failure.mark
            exceeded = limit_that_stopped(ctx, result)
            if exceeded is not None and failure.exception is not exceeded:
                error = f"{type(exceeded).__name__}: {exceeded}{LAST_FAILURE}{error}"
        # The process that ran it has logged its end, at the level of it.
        was_finished = ctx.journal.session.finished is not None
        level = logging.INFO if was_finished else _LEVELS.get(status, logging.INFO)
        if ctx.run_logger.isEnabledFor(level):
            about = {"run_status": status.value}
            cause = ""
            if failure is not None and status in _LEVELS:
                why = describe_class(failure.failure_class, failure.reason)
                cause = f" at node {failure.node_id!r}: {why}"
            what = "returned its stored result" if was_finished else "ended"
            ctx.run_logger.log(level, "pipeline %r %s: %s%s", ctx.pipeline, what, status, cause, extra=about)
        has_hooks = ctx.fire.on_run_end is not None
        ending = end_and_announce(ctx, status, error, result) if has_hooks else end_run(ctx, status, error)
        raise_if(await ending)
        if ctx.account.hook_failures and ctx.config.hook_errors == "raise" and status not in _CUT_SHORT:
            first = ctx.account.hook_failures[0]
            where = "" if first.node_id is None else f" of {first.node_id!r}"
            calls, text = f"{len(ctx.account.hook_failures)} hook calls raised", shown(first.exception)
            raise HookError(f"{calls}; the first, {first.hook}{where}: {text}", result) from first.exception
        return result


# Any version but ff, with ids that are not all zeros; 00 has no more fields;
# https://www.w3.org/TR/trace-context/
_TRACEPARENT: Final = re.compile(
    r"(?!ff|00.{53}-)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def set_traceparent(ctx: ReliabilityContext, traceparent: str) -> None:
    """Set the trace context of a run; an invalid one, perhaps from the network, is logged and ignored."""
    if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent):
        ctx.journal.traceparent = traceparent
    else:
        ctx.run_logger.warning("traceparent %s is not a W3C trace context and is ignored", shown(traceparent))
