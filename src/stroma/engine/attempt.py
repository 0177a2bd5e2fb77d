"""One attempt of a node: validate, call, count, commit, announce. The only place that calls a node's function.

Between a valid output and its commit, nothing but the commit is awaited. Whatever interrupts it, an attempt that has begun
has one end: one row of the trace, and one call of an end hook for each start hook. Once ``row`` is set, what is raised
goes into ``interrupt``: an exception that left ``make()`` before the end hooks would keep them from being called.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter_ns
from typing import Any, Final, final

from pydantic import BaseModel

from stroma._utils.text import one_line, typed
from stroma.checkpoint import Fenced, StoreError, Waiting, schema_ref
from stroma.checkpoint.entries import effect_note
from stroma.contracts.contract import NodeContract, as_violation, output_violation
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import Group, Node, Plan
from stroma.contracts.schema import Snapshot, schema_of
from stroma.cost.usage import UsageError
from stroma.engine.admission import admit
from stroma.engine.commit import failed_of, record, record_failure_site, record_rejected, refer, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.diagnosis import DeadlineExceeded, diagnose_attempt
from stroma.engine.effects import Effect, Stated, UnknownOutcome
from stroma.engine.events import (
    failure_arguments,
    log_failure,
    start_arguments,
    success_arguments,
    unread_start,
    unread_success,
    warn_of_budget,
)
from stroma.engine.execution import NodeExecution
from stroma.engine.holds import hold, wait_unless_held
from stroma.engine.interceptors import Call
from stroma.engine.metering import count_returned, price
from stroma.engine.outcome import GroupStopped, Halt, refuse
from stroma.engine.tasks import as_store_error, in_thread, passes_through
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import (
    Failure,
    NodeContext,
    diagnose,
    ends_run,
    isinstance_by_type,
    kind_of,
    message_of,
)
from stroma.failures.refusals import is_refusal
from stroma.hooks.dispatch import Calls, Firing, HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow, Outcome

__all__ = ["NodeAttempt", "make_in_turn"]

_NOTHING: Final[Snapshot] = ()


@final
class NodeAttempt:
    """One attempt of a node, from its input to its end.

    An object serves the attempts of a driver one after the other: a new one for each takes 0.3 us more of the 10 of a node.
    """

    __slots__ = (
        "begin", "cancelling", "ctx", "duration", "failure", "firing", "first_unstarted", "interrupt", "is_counted", "model",
        "node", "output", "plan", "row", "run", "saved", "snapshot", "state", "usage_error", "value",
    )  # fmt: skip

    state: BaseModel
    model: BaseModel
    saved: Snapshot

    def __init__(self, ctx: ReliabilityContext) -> None:
        self.ctx = ctx

    def prepare(
        self, run: NodeExecution, node: Node | Group, plan: Plan, value: BaseModel, cancelling: int
    ) -> NodeAttempt:
        """Begin the next attempt; call one of :meth:`make`, :meth:`begin_only` and :meth:`reject` after it."""
        self.run = run
        self.node = node
        self.plan = plan
        #: The state before the node; ``state`` is the node's own copy of it, and ``snapshot`` goes into the row.
        self.value = value
        self.cancelling = cancelling
        self.snapshot: Snapshot = _NOTHING
        #: When the attempt began, later when its function did, in ns; 0 before that. How long the function took.
        self.begin = 0
        self.duration = 0
        self.output: Any = None
        self.usage_error: UsageError | None = None
        #: What it took is counted in the run's totals.
        self.is_counted = False
        #: The verdict on an output that is valid: a crossed limit. ``model`` is committed all the same, as ``saved``.
        self.failure: Failure | None = None
        #: The end: its row, and the calls of its hooks.
        self.row: AttemptRow | None = None
        self.firing: Firing | None = None
        #: The first set of hooks that has not seen the start; None if all have.
        self.first_unstarted: int | None = None
        #: A cancellation, or a KeyboardInterrupt, that comes out once the attempt has its end.
        self.interrupt: BaseException | None = None
        return self

    async def make(self) -> BaseModel | Failure | Halt:
        """Make the attempt. Return the committed output, a Failure for the policies to decide about, or a Halt."""
        # One coroutine for the call and its commit, and few calls of methods where nothing is to be done: 0.7 us less of the
        # 11 of a node.
        ctx, run, node = self.ctx, self.run, self.node
        raised: BaseException | None = None
        try:
            violation = self._take_input()
            if violation is not None:
                return await self._fail(violation)
            if ctx.fire.on_node_start is not None:
                firing = self._start_hooks()
                if not firing.advance():
                    await self._finish_start_hooks(firing)
            contract = self.plan[2]
            if contract is not None and contract.effect:
                ended = await self._begin_effect(contract)
                if ended is not None:
                    return ended
            parent = run.parent
            self.begin = begin = perf_counter_ns()
            if parent is not None and type(node) is Node:
                parent.enter(begin)
            try:
                if type(node) is Node and node.is_async and not ctx.timed:
                    # Without _call_function(), whose coroutine each turn of the event loop would pass through.
                    self.output = output = await (
                        node.func(self.state, ctx.node_context())
                        if node.wants_context
                        else node.func(self.state)
                    )
                elif ctx.timed:
                    self.output = output = await self._call_in_time()
                else:
                    self.output = output = await self._call_function(self.state)
                if parent is None and type(node) is Node:
                    self.duration = perf_counter_ns() - begin
                else:
                    self._stop_clock()
            except BaseException as error:
                self._stop_clock()
                if passes_through(error, self.cancelling, in_group=type(node) is not Node):
                    raise
                raised, output = error, None
            if type(output) is tuple or run.reported is not None:
                await self._price_usage()
            self.is_counted = True
            if run.counted is not NO_USAGE or type(node) is not Node:
                self._count_usage()
            elif not run.branch:
                ctx.cost_tracker.latency_ns += self.duration
            if raised is not None:
                return await self._end_of_call(raised)
            violation = self._accept_output()
            if violation is not None:
                return await self._fail_call(violation)
            if self.usage_error is not None or ctx.limits:
                self._judge()
            row, pending = self._begin_commit()
            if pending is not None:
                problem = await self._finish_commit(row, pending)
                if problem is not None:
                    return await self._fail(problem, is_of_store=True)
                row = refer(ctx, row)
            self._end_with_output(row)
            if self.interrupt is None and self.failure is None and not ctx.limits:
                end_hooks = self.firing
                # Most hooks never wait. Without a coroutine around them, at start and end: 0.6 us less for a node.
                if end_hooks is None or (end_hooks.advance() and not ctx.delivers):
                    return self.model
            return await self._announce()
        except BaseException as interrupt:
            await self._end_interrupted(interrupt)
            raise
        finally:
            # What the function raised references the frames that it passed, they this attempt, and the execution its last
            # failure: otherwise each failed run is a cycle that only the garbage collector frees.
            del self.run, run, raised
            self.firing = None  # Its arguments refer to the failure, and this frame is in its traceback.

    async def begin_only(self) -> Failure | Halt | None:
        """Make the part of the attempt that precedes the call. Return its end if the input is not valid."""
        try:
            violation = self._take_input()
            if violation is not None:
                return await self._fail(violation)
            if self.ctx.fire.on_node_start is not None:
                firing = self._start_hooks()
                if not firing.advance():
                    await self._finish_start_hooks(firing)
            return None
        except BaseException as interrupt:
            await self._end_interrupted(interrupt)
            raise
        finally:
            del self.run  # As in make().

    async def reject(self, error: Exception) -> Failure | Halt:
        """End as failed, since there is no schema to validate the input with."""
        try:
            return await self._fail(self._reject_input(error))
        except BaseException as interrupt:
            await self._end_interrupted(interrupt)
            raise
        finally:
            del self.run  # As in make().

    # ------------------------------------------------------------------ input

    def _take_input(self) -> Exception | None:
        """Validate the state before the node and take a snapshot of it. Return the violation, if there is one."""
        schema, handover = self.plan[0], self.ctx.handover
        try:
            if schema is None:
                self.state, self.snapshot = self._copy_input()
            elif handover.snapshot is not None and self.value is handover.model:
                self.state, self.snapshot = handover.take(schema)
            else:
                self.state, self.snapshot = schema.prepare_input(self.value)
        except BaseException as error:
            # Whatever a validator raises: nothing was awaited, so it is no cancellation.
            if ends_run(error):
                raise
            return self._reject_input(error)
        return None

    def _reject_input(self, error: BaseException) -> Exception:
        """Return the violation that an input has come to."""
        self.begin = perf_counter_ns()
        value = self.ctx.handover.own(self.value)
        raw = schema_of(type(value)).state(value) if isinstance(value, BaseModel) else {"value": value}
        self.snapshot = raw
        schema = self.plan[0]
        return as_violation(self.run.node_id, "input", raw, error, None if schema is None else schema.model)

    def _copy_input(self) -> tuple[BaseModel, Snapshot]:
        """Return the input of a node without a contract, or of a group, each child of which copies it for itself."""
        assert self.run.schemas is not None
        schema, value = self.run.schemas[0], self.value
        packed = self.ctx.handover.packed(value)
        if packed is not None and type(self.node) is Node:
            return schema.restore(packed), packed
        value = self.ctx.handover.own(value)
        if type(self.node) is not Node:
            snapshot = schema.snapshot(value)
            self.run.taken = value, snapshot
            return value, snapshot
        shared = None if self.run.parent is None else self.run.parent.taken
        snapshot = shared[1] if shared is not None and shared[0] is value else schema.snapshot(value)
        return schema.copy(value), snapshot

    def _start_hooks(self) -> Firing:
        self.begin = perf_counter_ns()
        ctx, state, schema = self.ctx, self.state, self.plan[0]
        calls = ctx.fire.on_node_start
        assert calls is not None
        if schema is None or type(state) is not schema.model:
            schema = schema_of(type(state))
        about = (ctx, self.run, schema, state)
        return Firing(
            ctx.fire, "on_node_start", calls, self.run.node_id, start_arguments, about, unread_start
        )

    async def _finish_start_hooks(self, firing: Firing) -> None:
        try:
            await firing.finish()
        except HookNotAsync as error:
            self.first_unstarted = error.set_index
            raise

    # ------------------------------------------------------------------ effects

    async def _begin_effect(self, contract: NodeContract[Any, Any]) -> BaseModel | Failure | Halt | None:
        """Store that an effect is to be called. Return the end of an attempt that must not call it."""
        run = self.run
        self.begin = self.begin or perf_counter_ns()
        if self.ctx.elsewhere and effect_note(run.position, run.branch) not in self.ctx.session.notes:
            error = (
                f"effect {run.node_id!r} is called inside a node of a run on other machines, which would not know of the call; "
                "make it a node of the pipeline, or a step of a flow"
            )
            return await self._fail(NotImplementedError(error))
        effect: Effect | None = run.effect
        if effect is None:
            effect = run.effect = Effect(run, contract, self.plan, self.snapshot)
        if effect.is_open:
            try:
                stated = await effect.state_earlier(self._fresh_input(), self.cancelling)
            except StoreError as error:
                return await self._fail(error, is_of_store=True)
            ended = await self._end_as_stated(effect, stated)
            if ended is not None:
                return ended
        problem, cancelled = await effect.begin()
        if problem is not None:
            return await self._fail(problem, is_of_store=True)
        if cancelled:
            raise asyncio.CancelledError
        return None

    async def _end_effect(self, effect: Effect, error: BaseException) -> BaseModel | Failure | Halt | None:
        """End an attempt whose call may have happened. Return None if it did not: that is an ordinary failure."""
        effect.is_under_way = False
        if isinstance_by_type(error, GroupStopped):
            error = error.halt.failure.exception
        if isinstance_by_type(error, Fenced):
            return None  # Another process owns the run, and asks. The intent stays open.
        if is_refusal(error):
            effect.close()
            return None
        why = self.ctx.redactor.mask(one_line(typed(kind_of(error), message_of(error))))
        self.ctx.run_logger.warning("nobody knows if effect %r happened: %s", self.run.node_id, why)
        return await self._end_as_stated(
            effect, await effect.reconcile(self._fresh_input(), why, self.cancelling)
        )

    async def _end_as_stated(self, effect: Effect, stated: Stated) -> BaseModel | Failure | Halt | None:
        """End an attempt as somebody states about the last call. Return None if that did not happen."""
        logger, node_id = self.ctx.run_logger, self.run.node_id
        if isinstance(stated, NotDone):
            logger.info("effect %r did not happen: %s", node_id, one_line(stated.reason or "stated"))
            effect.close()
            return None
        if isinstance(stated, Unknown):
            return await self._suspend(effect.unknown(stated.reason))
        self.output = stated.output
        violation = self._accept_output()
        if violation is not None:
            cause = f"invalid output was stated: {one_line(message_of(violation))}"
            return await self._suspend(effect.unknown(cause))
        logger.info("effect %r happened already; it is not called", node_id)
        self.is_counted = effect.is_stated = True
        if self.usage_error is not None or self.ctx.limits:
            self._judge()
        row, pending = self._begin_commit()
        if pending is not None:
            problem = await self._finish_commit(row, pending)
            if problem is not None:
                return await self._fail(problem, is_of_store=True)
            row = refer(self.ctx, row)
        self._end_with_output(row)
        return await self._announce()

    def _fresh_input(self) -> BaseModel:
        """Return the input again, as no function has changed it."""
        assert self.plan[0] is not None
        return self.plan[0].restore(self.snapshot)

    # ------------------------------------------------------------------ call

    def _stop_clock(self) -> None:
        """Note how long the function took; for a group, from the start of its first function to the end of its last."""
        now = perf_counter_ns()
        run = self.run
        if type(self.node) is not Node:
            if run.first_ns:
                self.begin, self.duration = run.first_ns, run.last_ns - run.first_ns
            return
        self.duration = now - self.begin
        if run.parent is not None:
            run.parent.leave(now)

    async def _call_function(self, state: BaseModel) -> Any:
        """Call a function or a group, as its kind wants to be called."""
        node, ctx = self.node, self.ctx
        if isinstance(node, Group):
            self.run.start_children()
            return await node.run(ctx, self.run, state)
        context = ctx.node_context() if node.wants_context else ctx.context
        if node.is_async:
            return await node.call(state, context)
        returned = await in_thread(node.call, (state, context))
        return await returned if isinstance(returned, Awaitable) else returned

    async def _call_in_time(self) -> Any:
        """Call under the node's timeout and the run's latency deadline, whichever is nearer."""
        ctx, node_id = self.ctx, self.run.node_id
        limit = ctx.budget.max_latency_ms
        timeout_ms = ctx.step_timeouts.get(node_id)
        own = math.inf if timeout_ms is None else timeout_ms / 1000
        remaining = math.inf
        if limit is not None and not isinstance(self.node, Group):
            # The children of a group have the deadline themselves, each with an end of its own.
            used = ctx.cost_tracker.used("latency") + self.run.busy(self.begin) / 1e6
            remaining = (limit - used) / 1000
        seconds = min(remaining, own)
        scope = asyncio.timeout(None if math.isinf(seconds) else max(0.0, seconds))
        call: Call = self._call_function
        for interceptor in reversed(ctx.interceptors):
            call = partial(interceptor.call, self.run, self.node, call)
        try:
            async with scope:
                return await call(self.state)
        except TimeoutError:
            if not scope.expired():
                raise
            if remaining < own:
                assert limit is not None
                now = perf_counter_ns()
                busy = self.run.busy(now) if self.run.parent else now - self.begin
                used = ctx.cost_tracker.used("latency") + busy / 1e6
                raise DeadlineExceeded(ctx, "latency", limit, max(used, limit), node_id) from None
            raise TimeoutError(
                f"node {node_id!r} did not end within {timeout_ms} ms; raise node_timeouts[{node_id!r}], or make the call shorter"
            ) from None

    # ------------------------------------------------------------------ usage

    async def _price_usage(self) -> None:
        """Take the usage out of the output, and put a price on it."""
        if type(self.output) is tuple:
            self.output, self.usage_error = count_returned(self.run, self.output)
        if self.run.reported is not None:
            cancelled, unpriced = await price(self.ctx, self.run)
            if cancelled:
                self.interrupt = asyncio.CancelledError()
            self.usage_error = self.usage_error or unpriced

    def _count_usage(self) -> None:
        """Count what the call took: it is spent, whatever becomes of the output."""
        ctx, run = self.ctx, self.run
        self.is_counted = True
        if run.counted is not NO_USAGE:
            ctx.cost_tracker.spend(run.counted.tokens, run.counted.cost_usd)
        if not run.branch:  # The functions inside a group are counted with the group.
            ctx.cost_tracker.latency_ns += self.duration if type(self.node) is Node else run.busy_ns

    # ------------------------------------------------------------------ output

    def _accept_output(self) -> Exception | None:
        """Validate the output and take a snapshot of it. Return what is wrong with it."""
        schema = self.plan[1]
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
            return self._usage_error_before(violation) or violation
        return None

    def _usage_error_before(self, error: BaseException) -> UsageError | None:
        """Return usage that cannot be counted, which precedes another failure: another attempt would buy more of it."""
        usage_error = self.usage_error
        if usage_error is None or usage_error.silent:
            return None
        usage_error.__cause__ = error
        return usage_error

    def _judge(self) -> None:
        """Reach the verdict on the budget; it is part of the commit."""
        ctx, run = self.ctx, self.run
        error: Exception | None = self.usage_error
        if error is None and ctx.limits:
            error = ctx.cost_tracker.exceeded(ctx.budget, run.node_id)
        if error is None:
            return
        where = NodeContext(run.node_id, run.attempt, ctx.run_id)
        try:
            self.failure = diagnose(error, where, ctx.classifiers)
        except (
            BaseException
        ) as interrupt:  # KeyboardInterrupt in a classifier: the output is paid for all the same.
            self.interrupt = interrupt
            self.failure = diagnose(error, where)

    def _begin_commit(self) -> tuple[AttemptRow, Awaitable[None] | Exception | None]:
        """Store the output, in one call. Return its row, and what is to be settled, if anything."""
        ctx, run, duration = self.ctx, self.run, self.duration
        if self.failure is None and run.counted is NO_USAGE and type(self.node) is Node:
            # As _make_row() and record() do, without their calls: 0.3 us less of the 11 of a node.
            fields = (
                run.node_id, run.attempt, self.begin + ctx.epoch_ns, duration, self.snapshot, self.saved, "success", None,
                None, run.position, run.branch, run.group, run.schemas, run.children, duration,
            )  # fmt: skip
            row: AttemptRow = tuple.__new__(AttemptRow, fields)
            try:
                return row, ctx.session.record(row, self.plan[1], self.model, run.step)
            except BaseException as error:
                return row, as_store_error(error)
        outcome: Outcome = "success" if self.failure is None else "failure"
        row = self._make_row(outcome, duration, self.failure, self.saved)
        return row, record(ctx, row, self.plan[1], self.model, run.step)

    async def _finish_commit(self, row: AttemptRow, pending: Awaitable[None] | Exception) -> Exception | None:
        """See the commit through. Return why the store refuses it."""
        again = partial(record, self.ctx, row, self.plan[1], self.model, self.run.step)
        return await self._settle(row, pending, again)

    def _end_with_output(self, row: AttemptRow) -> None:
        """Append the row of a committed output. From here on it is safe."""
        ctx, run = self.ctx, self.run
        fire = ctx.fire
        if self.failure is not None:
            self._end(row, fire.on_node_failure, failure_arguments, ctx, run, self.failure)
        else:  # As _end() does, for 0.2 us less; every set of hooks has seen the start of an attempt that succeeds.
            self.row = run.ended = row
            run.rows.append(row)
            calls = fire.on_node_success
            if calls is not None:
                about = (ctx, run, self.plan[1], self.model)
                self.firing = Firing(
                    fire, "on_node_success", calls, run.node_id, success_arguments, about, unread_success
                )
        if ctx.step_policies:
            # With the commit: a cancellation that comes after it must not have the node called again.
            self._remember_output()
        if not run.branch:
            ctx.handover.offer(self.model, self.saved, self.plan[1])

    def _remember_output(self) -> None:
        """Keep the output of a group's child for another attempt of the group, which only node_policies can grant."""
        run, done = self.run, self.ctx.done
        if run.branch:
            # A step that code calls is called again by another attempt of that code.
            if run.parent is not None and run.parent.kind == "group" and run.parent.remembers:
                done[run.position, run.branch] = self.model
        elif done:
            for place in [place for place in done if place[0] == run.position]:
                del done[place]

    async def _settle(
        self,
        row: AttemptRow,
        pending: Awaitable[None] | Exception,
        again: Callable[[], Awaitable[None] | Exception | None],
    ) -> Exception | None:
        """See a store call through; a cancellation meanwhile comes out at the end. Return why the store refuses it."""
        problem, cancelled = await settle(self.ctx, row, pending, again)
        if cancelled and self.interrupt is None:
            self.interrupt = asyncio.CancelledError()
        return problem

    # ------------------------------------------------------------------ end

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
            run.node_id, run.attempt, self.begin + self.ctx.epoch_ns, duration, self.snapshot, output, outcome, failed,
            usage, run.position, run.branch, run.group, run.schemas, run.children, busy,
        )  # fmt: skip
        return tuple.__new__(AttemptRow, fields)  # AttemptRow(*fields) takes 0.3 us more of the 10 of a node.

    def _end(
        self, row: AttemptRow, calls: Calls | None, make: Callable[..., tuple[Any, ...]], *about: Any
    ) -> None:
        """Append the row of the end, and prepare the calls of its hooks with the arguments ``make(*about)``."""
        run = self.run
        self.row = run.ended = row
        run.rows.append(row)
        if calls is not None:
            if self.first_unstarted is not None:
                calls = tuple([call for call in calls if call[0] < self.first_unstarted])
            event = f"on_node_{row.outcome}"
            self.firing = Firing(self.ctx.fire, event, calls, run.node_id, make, about)

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

    # ------------------------------------------------------------------ other ends

    async def _end_of_call(self, raised: BaseException) -> BaseModel | Failure | Halt:
        """End an attempt whose function raised."""
        if isinstance_by_type(raised, Suspend) or (
            isinstance_by_type(raised, GroupStopped) and raised.halt.suspended
        ):
            if self.run.effect is not None:
                self.run.effect.close()  # It asks a person before it changes anything.
            return await self._suspend(raised)
        return await self._fail_call(self._usage_error_before(raised) or raised)

    async def _fail_call(self, error: BaseException) -> BaseModel | Failure | Halt:
        """End an attempt whose call failed. An effect that may have happened all the same ends as somebody states."""
        effect: Effect | None = self.run.effect
        ended = None if effect is None else await self._end_effect(effect, error)
        return await self._fail(error) if ended is None else ended

    async def _fail(self, error: BaseException, *, is_of_store: bool = False) -> Failure | Halt:
        """End as failed: classify, record, and call the failure hooks."""
        ctx, run = self.ctx, self.run
        failure, halt = diagnose_attempt(ctx, run, error, self.snapshot, is_of_store=is_of_store)
        row = self._make_row("failure", self.duration, failure)
        row = refer(ctx, row)
        self._end(row, ctx.fire.on_node_failure, failure_arguments, ctx, run, failure)
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

    async def _suspend(self, raised: BaseException) -> Failure | Halt:
        """End as suspended: a person has to answer first. That is no failure."""
        ctx, run = self.ctx, self.run
        row = self._make_row("suspended", self.duration)
        waiting: Waiting | None = None
        if isinstance_by_type(raised, Suspend):
            ctx.redactor.note_secrets(self.snapshot)
            reason = ctx.redactor.mask(message_of(raised))
            if isinstance_by_type(raised, UnknownOutcome):
                waiting = raised.waiting(run)
            else:
                ref = "" if raised.schema is None else schema_ref(raised.schema)
                waiting = Waiting(run.position, run.branch, run.node_id, reason, ref)
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
            ctx.suspended.append(reason)
        ctx.run_logger.info("node %r is suspended: %s", run.node_id, one_line(reason))
        self._end(row, ctx.fire.on_node_suspended, lambda: (ctx.run_id, run.node_id, reason))
        await self._call_end_hooks()
        self._raise_interrupt()
        error = raised if isinstance(raised, Exception) else Suspend(reason)
        failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, reason)
        return Halt(failure, suspended=True)

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
        self._end(row, ctx.fire.on_node_cancelled, lambda: (ctx.run_id, run.node_id))
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


async def make_in_turn(attempt: NodeAttempt) -> BaseModel | Failure | Halt:
    """Make an attempt between its admission and the settlement of what it took."""
    run, ctx = attempt.run, attempt.ctx
    permit = await wait_unless_held(ctx, partial(admit, ctx, run))
    if isinstance(permit, Exception):
        return refuse(run, permit)
    if permit is None or ctx.holds:
        if permit is not None:
            permit.drop()
        return await hold(ctx, run.node_id, run.attempt)
    try:
        outcome = await attempt.make()
    except GeneratorExit:
        permit.drop(run.counted)
        raise
    except BaseException:
        await permit.leave(None)
        raise
    if await permit.leave(outcome):
        raise asyncio.CancelledError
    return outcome
