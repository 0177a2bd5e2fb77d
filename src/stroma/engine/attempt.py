"""One attempt of a node: validate, call, count, commit, announce. Only this calls a node's function.

Between a valid output and its commit, nothing but the commit is awaited. Each end is one row of the trace,
and one call of an end hook for each start hook, whatever interrupts it. Once ``row`` is set, exceptions go
into ``interrupt``: raised before the end hooks, they would keep them from being called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from typing import Any, Final, final

from pydantic import BaseModel

from stroma._utils.access import message_of
from stroma._utils.text import one_line
from stroma.checkpoint import Fenced, PipelineChanged, StoreError, Waiting
from stroma.contracts.contract import NodeContract, NotDone, Unknown, as_violation, output_violation
from stroma.contracts.copying import Snapshot
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.cost.usage import UsageError
from stroma.engine.commit import failed_of, record_failure_site, record_rejected, settle, store_notes
from stroma.engine.context import ReliabilityContext
from stroma.engine.deadlines import call_in_time
from stroma.engine.diagnosis import (
    MIN_BLOCK_NS,
    diagnose_attempt,
    judge,
    log_failure,
    states_around,
    warn_of_blocking,
    warn_of_budget,
)
from stroma.engine.effects import Effect, Stated, UnknownOutcome
from stroma.engine.execution import CURRENT, RunningNode, mark_attempt
from stroma.engine.metering import count_returned, price
from stroma.engine.outcome import GroupStopped, Halt, refuse_late
from stroma.engine.placed_calls import call_at_place, note_call, open_call
from stroma.engine.questions import asks_itself, find_question, question_of, suspend_again
from stroma.engine.redaction import HookState
from stroma.engine.tasks import (
    CONTINUES,
    LoopTicks,
    call_in_thread,
    is_closed,
    loop_ticks,
    passes_through,
    raise_if,
)
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PlaceError, Suspend
from stroma.failures.failure import Failure, ends_run, isinstance_by_type
from stroma.failures.refusals import is_refusal
from stroma.hooks.dispatch import Calls, Firing, HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow, Outcome, Schemas

_row_of: Final = AttemptRow._make


@final
@dataclass(eq=False, repr=False, slots=True)  # Slots: 0.5 us less of the 9 of a node.
class NodeAttempt:
    """One attempt of a node, from its input to its end.

    An object serves the attempts of a driver one after the other: a new one for each takes 0.4 us more of the
    11 of a node.

    Attributes:
        value: the state before the node; ``state`` is the node's copy, ``snapshot`` that for the row.
        cancelling: how many cancellations of the task came before.
        begin: when the attempt began, later when its function did, in ns; 0 before that.
        ticks, tick: the ticks of the event loop, and their count when the function was called.
        duration: how long the function took, in ns.
        is_counted: what it took is in the totals of the run.
        output: what the function returned; ``model`` once it is valid, and ``saved`` the snapshot of that.
        usage_error: usage that cannot be counted.
        failure: the verdict on an output that is valid: a crossed limit. ``model`` is committed all the same.
        row, firing: the end, and the calls of its hooks.
        first_unstarted: the first set of hooks that has not seen the start; None if all have.
        interrupt: a cancellation, or a KeyboardInterrupt, that comes out once the attempt has its end.
    """

    ctx: ReliabilityContext
    ticks: LoopTicks = field(default_factory=loop_ticks, init=False)
    run: RunningNode = field(init=False)
    node: Node | Group = field(init=False)
    schemas: Schemas = field(init=False)
    value: BaseModel = field(init=False)
    state: BaseModel = field(init=False)
    snapshot: Snapshot = field(init=False)
    cancelling: int = field(init=False)
    begin: int = field(init=False)
    tick: int = field(init=False)
    duration: int = field(init=False)
    is_counted: bool = field(init=False)
    output: Any = field(init=False)
    model: BaseModel = field(init=False)
    saved: Snapshot = field(init=False)
    usage_error: UsageError | None = field(init=False)
    failure: Failure | None = field(init=False)
    row: AttemptRow | None = field(init=False)
    firing: Firing | None = field(init=False)
    first_unstarted: int | None = field(init=False)
    interrupt: BaseException | None = field(init=False)

    async def make(
        self,
        run: RunningNode,
        node: Node | Group,
        value: BaseModel,
        cancelling: int,
        refusal: Exception | None = None,
    ) -> BaseModel | Failure | Halt:
        """Make the next attempt. Return the committed output, a Failure for the policies, or a Halt.

        ``refusal``: why the input cannot be validated.
        """
        self.run = run
        self.node = node
        assert run.schemas is not None
        self.schemas = run.schemas
        self.value = value
        self.cancelling = cancelling
        self.snapshot = ()
        self.begin = self.duration = 0
        unset: Any = None  # For type checkers: the methods below set these.
        self.output = self.usage_error = self.failure = self.row = self.firing = unset
        self.first_unstarted = self.interrupt = unset
        self.is_counted = False
        # Calls that rarely suspend are awaited only if they do: 1.2 us less of the 7 of a node with hooks.
        ctx, contract = self.ctx, self.schemas[2]
        problem: BaseException | None = None
        try:
            problem = self._take_input() if refusal is None else self._reject_input(refusal)
            if problem is not None:
                return await self._fail(problem)
            if ctx.journal.session.waiting:
                still_asks = await self._reopen(contract)
                if still_asks is not None:
                    return still_asks
            if ctx.fire.on_node_start is not None:
                hooks = self._start_hooks(ctx.fire.on_node_start)
                if not hooks.advance():
                    await self._finish_start_hooks(hooks)
            if contract is not None and (contract.effect or contract.place is not None):
                ended = await self._begin_special(contract)
                if ended is not None:
                    return ended

            self._start_clock()
            has_deadline = ctx.account.limits and ctx.budget.max_latency_ms is not None
            try:
                self.output = await (
                    call_in_time(run, node, self._call_function, self.state, self.begin)
                    if has_deadline or ctx.step_timeouts or ctx.fire.interceptors
                    else self._call_function(self.state)
                )
            except BaseException as error:
                if passes_through(error, cancelling, in_group=type(node) is not Node):
                    raise
                problem = error
            finally:
                self._stop_clock()

            if type(self.output) is tuple or run.reported is not None:
                await self._price()
            # The money is spent, even if the output is lost.
            self.is_counted = True
            if run.counted is not NO_USAGE:
                ctx.cost_tracker.spend(run.counted.tokens, run.counted.cost_usd)
            if not run.branch:  # The functions inside a group are counted with the group.
                ctx.cost_tracker.latency_ns += self.duration if type(node) is Node else run.busy_ns
            if problem is None:
                problem = self._accept_output()
            if problem is not None:
                return await self._end_without_output(problem)

            pending = self._commit()
            if pending is not None:
                problem = await pending
            if problem is not None:
                return await self._fail(problem, is_of_store=True)

            if self.interrupt is None and self.failure is None and not ctx.account.limits:
                end_hooks = self.firing
                if end_hooks is None or (end_hooks.advance() and not ctx.fire.delivers):
                    return self.model
            return await self._announce()
        except BaseException as interrupt:
            await self._end_interrupted(interrupt)
            raise
        finally:
            # An exception references the frames that it passed, the frames this attempt, and the execution
            # its last failure. Without this, each failed run is a reference cycle that only garbage
            # collection frees.
            if run.effect is not None:
                run.effect.end_attempt(None if self.row is None else self.row.outcome)
            del self.run, run, problem, refusal
            self.firing = None  # Its arguments refer to the failure, and this frame is in its traceback.

    # ------------------------------------------------------------------ validate

    def _take_input(self) -> Exception | None:
        """Validate the state before the node and take a snapshot. Return the violation, if any."""
        schema, _, contract = self.schemas
        try:
            if contract is None:
                self.state, self.snapshot = self._copy_input()
            else:
                self.state = schema.convert(self.value)
                self.snapshot = schema.snapshot(self.state)
        except BaseException as error:
            # Any exception of a validator: nothing was awaited, so it is not a cancellation.
            if ends_run(error):
                raise
            return self._reject_input(error)
        return None

    def _reject_input(self, error: BaseException) -> Exception:
        """Return the violation of an input."""
        self.begin = perf_counter_ns()
        value = self.value
        raw = schema_of(type(value)).state(value) if isinstance(value, BaseModel) else {"value": value}
        self.snapshot = raw
        schema, _, contract = self.schemas
        return as_violation(self.run.node_id, "input", raw, error, None if contract is None else schema.model)

    def _copy_input(self) -> tuple[BaseModel, Snapshot]:
        """Return the input of a node without a contract, or of a group, whose children copy it."""
        schema, value = self.schemas[0], self.value
        if type(self.node) is not Node:
            snapshot = schema.snapshot(value)
            self.run.taken = value, snapshot
            return value, snapshot
        shared = None if self.run.parent is None else self.run.parent.taken
        snapshot = shared[1] if shared is not None and shared[0] is value else schema.snapshot(value)
        return schema.copy(value), snapshot

    def _start_hooks(self, calls: Calls) -> Firing:
        self.begin = perf_counter_ns()
        ctx, state, schema = self.ctx, self.state, self.schemas[0]
        if type(state) is not schema.model:
            schema = schema_of(type(state))
        values = ctx.run_id, self.run.node_id, HookState(schema, state, ctx.redactor)
        return Firing(ctx.fire, "on_node_start", calls, self.run.node_id, values)

    async def _finish_start_hooks(self, hooks: Firing) -> None:
        try:
            if not hooks.advance():
                await hooks.finish()
        except HookNotAsync as error:
            self.first_unstarted = error.set_index
            raise

    # ------------------------------------------------------------------ call

    def _start_clock(self) -> None:
        """Record the start of the function; a group records the starts of the functions inside it."""
        ticks = self.ticks
        if not ticks.is_due:
            ticks.start()
        self.tick = ticks.count
        self.begin = perf_counter_ns()
        if self.run.parent is not None and type(self.node) is Node:
            self.run.parent.enter(self.begin)

    def _call_function(self, state: BaseModel) -> Awaitable[Any]:
        """Call a function or a group."""
        node, ctx = self.node, self.ctx
        if isinstance(node, Group):
            self.run.start_children()
            return node.run(ctx, self.run, state)
        if ctx.redactor.is_on:
            self.run.input_snapshot = self.snapshot
        arguments = (state, ctx.node_context()) if node.wants_context else (state,)
        contract, call, is_async, effect = self.schemas[2], node.func, node.is_async, self.run.effect
        if contract is not None and contract.place is not None:
            call, is_async = partial(call_at_place, self.run, contract), True
        if effect is not None:
            call = partial(effect.call, call)
        awaitable: Awaitable[Any]
        if is_async:
            awaitable = call(*arguments)
        else:
            warn = partial(ctx.run_logger.warning, CONTINUES, node.node_id)
            awaitable = call_in_thread(call, arguments, warn)
        return mark_attempt(self.run, awaitable) if ctx.fire.takes_events else awaitable

    def _stop_clock(self) -> None:
        """Record the duration of the function; for a group, from its first start to its last end."""
        now = perf_counter_ns()
        run = self.run
        if type(self.node) is not Node:
            if run.first_ns:
                self.begin, self.duration = run.first_ns, run.last_ns - run.first_ns
            return
        self.duration = now - self.begin
        if run.parent is not None:
            run.parent.leave(now)
        ticks = self.ticks
        if self.duration >= MIN_BLOCK_NS and ticks.count == self.tick and ticks.loop is not None:
            warn_of_blocking(self.ctx, run, self.duration)

    # ------------------------------------------------------------------ count

    async def _price(self) -> None:
        """Take the usage out of the output, and price it and the reported usage."""
        if type(self.output) is tuple:
            self.output, self.usage_error = count_returned(self.run, self.output)
        if self.run.reported is not None:
            cancelled, unpriced = await price(self.ctx, self.run)
            self.interrupt = self.interrupt or cancelled
            self.usage_error = self.usage_error or unpriced

    def _accept_output(self) -> Exception | None:
        """Validate the output and take a snapshot of it. Return the violation, if any."""
        schema = self.schemas[1]
        try:
            if type(self.node) is Node:
                self.model, self.saved = schema.accept_output(self.output)
            else:
                self.model, self.saved = schema.assemble(self.output)
        except BaseException as error:
            if ends_run(error):
                raise
            violation = output_violation(self.run.node_id, self.output, error, schema.model)
            record_rejected(self.run, self.begin, self.snapshot, self.output, violation)
            return violation
        return None

    async def _end_without_output(self, error: BaseException) -> BaseModel | Failure | Halt:
        """End an attempt whose function raised or whose output is invalid; an effect ends as stated."""
        effect: Effect | None = self.run.effect
        question = find_question(error, self.run)
        if question is not None or (isinstance_by_type(error, GroupStopped) and error.halt.suspended):
            if effect is not None and asks_itself(question or error, self.run):
                effect.close()  # It asks a person before it changes anything.
            return await self._suspend(question or error)
        usage_error = self.usage_error
        if usage_error is not None and not usage_error.silent:
            # It precedes the other failure: another attempt would cost as much again.
            usage_error.__cause__ = error
            error = usage_error
        ended = None if effect is None else await self._end_effect(effect, error)
        return await self._fail(error) if ended is None else ended

    # ------------------------------------------------------------------ commit

    def _commit(self) -> Coroutine[Any, Any, Exception | None] | None:
        """Judge the budget, and store the output with the verdict in one call.

        Return a coroutine if the store takes its time; of that, why the store refuses the output.
        """
        ctx, run = self.ctx, self.run
        if self.usage_error is not None or ctx.account.limits:
            failure, interrupt = judge(ctx, run, self.usage_error, self.snapshot)
            self.failure = failure
            if interrupt is not None:
                self.interrupt = interrupt
        if run.effect is not None:
            run.effect.note_output()
        outcome: Outcome = "success" if self.failure is None else "failure"
        row = self._make_row(outcome, self.duration, self.failure, self.saved)
        pending = ctx.journal.record(row, self.schemas[1], self.model, run.step)
        if pending is not None:
            return self._finish_commit(row, pending)
        self._end_with_output(row)
        return None

    async def _finish_commit(self, row: AttemptRow, pending: Awaitable[None] | Exception) -> Exception | None:
        again = partial(self.ctx.journal.record, row, self.schemas[1], self.model, self.run.step)
        problem = await self._settle(row, pending, again)
        if problem is None:
            self._end_with_output(self.ctx.session.with_references(row))
        elif self.run.effect is not None:
            self.run.effect.note_refused(problem)
        return problem

    def _end_with_output(self, row: AttemptRow) -> None:
        """Append the row of a committed output, which can no longer be lost."""
        ctx, run = self.ctx, self.run
        self.row = run.ended = row
        run.rows.append(row)
        if self.failure is not None:
            self._set_failure_hooks(self.failure)
        elif ctx.fire.on_node_success is not None:
            view = HookState(self.schemas[1], self.model, ctx.redactor)
            self._set_hooks(ctx.fire.on_node_success, view, run.counted.tokens)
        if ctx.step_policies:
            # With the commit: a cancellation that comes after it must not have the node called again.
            self._remember_output()
        if not run.branch:
            ctx.handover.model = self.model

    def _remember_output(self) -> None:
        """Keep a child's output for another attempt of its group, which only node_policies can grant."""
        run, done = self.run, self.ctx.handover.done
        if run.branch:
            # A step that code calls is called again by another attempt of that code.
            if run.parent is not None and run.parent.kind == "group" and run.parent.remembers:
                done[run.position, run.branch] = self.model
        elif done:
            for place in [place for place in done if place[0] == run.position]:
                del done[place]

    # ------------------------------------------------------------------ the end

    def _make_row(
        self, outcome: Outcome, duration: int, failure: Failure | None = None, output: Snapshot | None = None
    ) -> AttemptRow:
        """Return the row of the attempt, with the snapshots of its input and its output."""
        run, failed = self.run, None
        if failure is not None:
            record_failure_site(run, self.begin, failure)
            failed = failed_of(failure, outcome)
        fields = (
            run.node_id,
            run.attempt,
            self.begin + self.ctx.journal.epoch_ns,
            duration,
            self.snapshot,
            output,
            outcome,
            failed,
            None if run.counted is NO_USAGE else run.counted,
            run.position,
            run.branch,
            run.group,
            run.schemas,
            run.children,
            min(run.busy_ns, duration) if run.kind == "group" else duration,
        )
        return _row_of(fields)  # Named arguments take 0.7 us of the 9 of a node.

    def _end(self, row: AttemptRow) -> None:
        """Append the row of the end."""
        self.row = self.run.ended = row
        self.run.rows.append(row)

    def _set_hooks(self, calls: Calls | None, *values: Any) -> None:
        """Prepare the calls of the hooks of the end. ``values``: their arguments after run and node."""
        assert self.row is not None
        if calls is not None:
            if self.first_unstarted is not None:
                calls = tuple([call for call in calls if call[0] < self.first_unstarted])
            event, run, ctx = f"on_node_{self.row.outcome}", self.run, self.ctx
            self.firing = Firing(ctx.fire, event, calls, run.node_id, (ctx.run_id, run.node_id, *values))

    def _set_failure_hooks(self, failure: Failure) -> None:
        calls = self.ctx.fire.on_node_failure
        if calls is not None:
            self._set_hooks(calls, self.ctx.redactor.redact_error(failure.exception), failure.failure_class)

    async def _call_end_hooks(self) -> None:
        """Call the hooks of the end, and note in the store that they were called."""
        ctx, firing = self.ctx, self.firing
        if firing is None:
            return
        if not firing.advance():
            try:
                await firing.finish()
            except (asyncio.CancelledError, HookNotAsync):
                # They are raised once every set was called: that must not happen again.
                if ctx.fire.delivers and self.row is not None:
                    ctx.session.delivered(self.row)
                raise
        if ctx.fire.delivers and self.row is not None:
            ctx.session.delivered(self.row)

    async def _announce(self) -> BaseModel | Halt:
        """Call the hooks of an end with an output, then raise the pending interrupt."""
        ctx = self.ctx
        if self.failure is not None and self.row is not None:
            log_failure(ctx, self.run, self.failure)
        if self.firing is not None:
            await self._call_end_hooks()
        if ctx.account.limits and ctx.fire.on_budget_warning is not None:
            await warn_of_budget(ctx)
        self._raise_interrupt()
        if self.failure is None:
            return self.model
        if self.usage_error is not None:
            ctx.note_uncounted(self.run.node_id, self.usage_error)
        return Halt(self.run.marked(self.failure), output=self.model, spent=True)

    def _raise_interrupt(self) -> None:
        """Raise the pending interrupt, now that the attempt has its end."""
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
        if self.usage_error is not None and error is self.usage_error:
            ctx.note_uncounted(run.node_id, self.usage_error)
            halt = Halt(failure, spent=True)
        row = ctx.session.with_references(self._make_row("failure", self.duration, failure))
        self._end(row)
        halt = halt and halt._replace(failure=run.marked(failure))
        self._set_failure_hooks(failure)
        ends_by_store = halt is not None and failure.reason == "store"
        if not ends_by_store or self.is_counted:
            try:
                problem = await self._save(row, repeats=not ends_by_store)
            except GeneratorExit:
                raise
            except BaseException as interrupt:  # KeyboardInterrupt in a store.
                problem, self.interrupt = None, interrupt
            if problem is not None and not ends_by_store:
                stored = Failure(
                    problem, FailureClass.RECOVERABLE, run.node_id, run.attempt, str(problem), "store"
                )
                halt = Halt(stored, partial=True)
        log_failure(ctx, run, failure)
        if self.firing is not None:
            await self._call_end_hooks()
        if ctx.account.limits and ctx.fire.on_budget_warning is not None:
            await warn_of_budget(ctx)
        self._raise_interrupt()
        return failure if halt is None else halt

    async def _save(self, row: AttemptRow, *, repeats: bool = True) -> Exception | None:
        """Record an end without an output. Return why the store refuses it.

        Of an output that the store has refused, this records the usage, in one try. If the store has stored
        it after all, the row has the same key, and changes nothing.
        """
        again = partial(self.ctx.journal.record, row)
        pending = again()
        if pending is None:
            return None
        problem = await self._settle(row, pending, again, repeats=repeats)
        if problem is not None and row.usage is not None:
            self.ctx.journal.note_unrecorded(row.usage)
        return problem

    async def _settle(
        self,
        row: AttemptRow,
        pending: Awaitable[None] | Exception,
        again: Callable[[], Awaitable[None] | Exception | None],
        *,
        repeats: bool = True,
    ) -> Exception | None:
        """Finish a store call, and return the reason of a refusal. A cancellation is raised later."""
        problem, cancelled = await settle(self.ctx, row, pending, again, repeats=repeats)
        self.interrupt = self.interrupt or cancelled
        return problem

    async def _suspend(self, raised: BaseException) -> Failure | Halt:
        """End as suspended: a person has to answer first. That is not a failure."""
        ctx, run = self.ctx, self.run
        row = self._make_row("suspended", self.duration)
        waiting: Waiting | None = None
        if isinstance_by_type(raised, Suspend):
            ctx.redactor.note_secrets(self.snapshot)
            reason = ctx.redactor.mask(message_of(raised))
            if not isinstance_by_type(raised, UnknownOutcome):
                reason = ctx.redactor.redact_question(reason, states_around(run, self.snapshot))
            waiting = question_of(raised, run, reason)
        else:  # A group; its children have recorded what they wait for.
            assert isinstance_by_type(raised, GroupStopped)
            reason = raised.halt.failure.message
        again = partial(ctx.journal.record, row, waiting=waiting)
        pending = again()
        if pending is not None:
            problem = await self._settle(row, pending, again)
            if problem is not None:
                return await self._fail(problem, is_of_store=True)
        if waiting is not None:
            ctx.account.note_question(waiting)
            run.question = waiting.question
        ctx.run_logger.info("node %r is suspended: %s", run.node_id, one_line(reason))
        self._end(row)
        self._set_hooks(ctx.fire.on_node_suspended, reason)
        await self._call_end_hooks()
        self._raise_interrupt()
        error = raised if isinstance(raised, Exception) else Suspend(reason)
        failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, reason)
        return Halt(failure, suspended=True)

    # ------------------------------------------------------------------ interrupted

    async def _end_interrupted(self, interrupt: BaseException) -> None:
        """Record the end of an interrupted attempt, also if its coroutine is being closed."""
        if is_closed(interrupt):
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
        """End without a verdict: the attempt was cancelled, or the process is stopping.

        The usage so far is counted.

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
            # The interrupt is propagating, and must not be replaced.
            ctx.run_logger.warning("%s", error)
        if stopped is not None:
            raise stopped

    def _end_as_cancelled(self, duration: int) -> AttemptRow:
        """Append the row of an attempt without a verdict, and return it."""
        row = self._make_row("cancelled", duration)
        self._end(row)
        self._set_hooks(self.ctx.fire.on_node_cancelled)
        return row

    def _close_out(self) -> None:
        """End where nothing can be awaited: the coroutine is being closed.

        Hooks run until they first suspend.
        """
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

    # ------------------------------------------------------------------ effects

    async def _reopen(self, contract: NodeContract[Any, Any] | None) -> Failure | Halt | None:
        """Return the end of a node that is not called: its question is open, or its answer does not fit.

        An effect first looks for a statement about the call that the question is about.
        """
        run, waiting = self.run, self.run.waiting()
        try:
            if waiting is not None:
                _ = run.signal
            elif contract is not None and contract.effect:
                effect = self._effect_of(contract)
                if effect.has_question:
                    effect.earlier = await effect.learn(self.cancelling)
                    if isinstance(effect.earlier, UnknownOutcome):
                        waiting = effect.question(effect.earlier.place)
                    elif isinstance(effect.earlier, NotDone):  # Its reconcile may have taken its time.
                        return await refuse_late(run)
        except PipelineChanged as error:
            return Halt(
                Failure(error, FailureClass.TERMINAL, run.node_id, run.attempt, str(error), "changed")
            )
        except StoreError as error:
            return await self._fail(error, is_of_store=True)
        return None if waiting is None or waiting.payload is not None else suspend_again(run, waiting)

    def _effect_of(self, contract: NodeContract[Any, Any]) -> Effect:
        run = self.run
        effect: Effect | None = run.effect
        if effect is None:
            effect = run.effect = Effect(run, contract, self.snapshot)
        return effect

    async def _begin_special(self, contract: NodeContract[Any, Any]) -> BaseModel | Failure | Halt | None:
        """Store that an effect or placed node is to be called. Return the end if it must not be called."""
        run, call = self.run, None
        self.begin = self.begin or perf_counter_ns()
        if contract.place is not None:
            try:
                call = run.placed_call = open_call(run, contract, self.snapshot)
            except PlaceError as error:
                return await self._fail(error)
        is_sent = call is not None and call.is_sent
        effect: Effect | None = run.effect
        if contract.effect:
            effect = self._effect_of(contract)
            try:
                earlier = effect.earlier or await effect.learn(self.cancelling, is_sent=is_sent)
            except StoreError as error:
                return await self._fail(error, is_of_store=True)
            effect.earlier = None
            if isinstance(earlier, UnknownOutcome):
                return await self._suspend_unknown(earlier)
            ended = None if earlier is None else await self._end_as_stated(effect, earlier)
            if ended is not None:
                return ended
        if is_sent:  # Its place has the outcome.
            if effect is not None:
                effect.note_begun()
            return None
        if run.settles:
            raise asyncio.CancelledError(
                f"effect {run.node_id!r} did not happen, and nobody waits for it any more"
            )
        if call is not None:
            note_call(run, call)
        problem, cancelled = await (store_notes(run) if effect is None else effect.begin())
        if call is not None and (problem is not None or cancelled):
            note_call(run, None)
        if problem is not None:
            return await self._fail(problem, is_of_store=True)
        raise_if(cancelled)
        return None

    async def _end_effect(self, effect: Effect, error: BaseException) -> BaseModel | Failure | Halt | None:
        """End an attempt whose call may have happened. Return None if it did not: an ordinary failure."""
        if isinstance_by_type(error, GroupStopped):
            error = error.halt.failure.exception
        if effect.is_refused:
            effect.close()
            if self.run.placed_call is not None:
                note_call(self.run, None)
            return await self._fail(error, is_of_store=True)
        if isinstance_by_type(error, Fenced):
            return None  # Another process owns the run, and asks. The intent stays open.
        if self.run.raised_itself(error) and is_refusal(error):
            effect.close()
            return None
        if self.ctx.config.gated:
            effect.error = error
        around = states_around(self.run, self.snapshot)
        why = one_line(self.ctx.redactor.error_text(error, self.snapshot, around))
        return await self._end_as_stated(effect, await effect.reconcile(why, self.cancelling))

    def _shown(self, message: str) -> str:
        """Return a message about the attempt as others may see it."""
        return self.ctx.redactor.redact_message(message, states_around(self.run, self.snapshot))

    async def _end_as_stated(self, effect: Effect, stated: Stated) -> BaseModel | Failure | Halt | None:
        """End an attempt by a statement about the last call. Return None if that call did not happen."""
        logger, node_id = self.ctx.run_logger, self.run.node_id
        if isinstance(stated, NotDone):
            why = self._shown(stated.reason) if stated.reason else "stated"
            logger.info("effect %r did not happen: %s", node_id, one_line(why))
            effect.close(is_stated=True)
            return None
        if isinstance(stated, Unknown):
            return await self._suspend_unknown(effect.unknown(stated.reason))
        self.output = stated.output
        violation = self._accept_output()
        if violation is not None:
            cause = f"invalid output was stated: {one_line(message_of(violation))}"
            return await self._suspend_unknown(effect.unknown(cause))
        logger.info("effect %r happened already; it is not called", node_id)
        self.is_counted = effect.is_stated = True
        pending = self._commit()
        problem = None if pending is None else await pending
        return await self._announce() if problem is None else await self._fail(problem, is_of_store=True)

    async def _suspend_unknown(self, question: UnknownOutcome) -> Failure | Halt:
        """End as suspended until a person has stated what happened."""
        self.ctx.redactor.note_attempt(self.snapshot)
        cause = self._shown(self.ctx.redactor.mask(question.unknown.cause))
        question.unknown = question.unknown._replace(cause=cause)
        text = "the call of effect %r has an unknown outcome: %s"
        self.ctx.run_logger.warning(text, self.run.node_id, one_line(cause))
        return await self._suspend(question)
