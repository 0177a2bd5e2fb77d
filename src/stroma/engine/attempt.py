"""One attempt of a node: validate, call, count, commit, announce. The only place that calls a node's function.

Between a valid output and its commit, nothing but the commit is awaited. Whatever interrupts it, an attempt that has begun
has one end: one row of the trace, and one call of an end hook for each start hook.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from time import perf_counter_ns
from typing import Any, Final, TypeVar, final

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged, StoreError, Waiting, schema_ref
from stroma.contracts.contract import ContractViolation, as_violation, output_violation
from stroma.contracts.node import Group, Node, Plan
from stroma.contracts.schema import Snapshot, schema_of
from stroma.cost.budget import BudgetExceeded
from stroma.cost.usage import UsageError
from stroma.engine.admission import admit
from stroma.engine.commit import make_row, record, refer, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.events import (
    failure_arguments,
    log_failure,
    start_arguments,
    success_arguments,
    warn_of_budget,
)
from stroma.engine.execution import NodeExecution
from stroma.engine.interceptors import Call
from stroma.engine.metering import count_returned, price
from stroma.engine.outcome import GroupStopped, Halt, refuse
from stroma.engine.tasks import in_thread, passes_through
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose, ends_run, isinstance_by_type, message_of
from stroma.hooks.dispatch import Firing, HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow, Outcome

__all__ = ["Attempt", "make_in_turn"]

T = TypeVar("T")

_NOTHING: Final[Snapshot] = ()


@final
class Attempt:
    """One attempt of a node, from its input to its end."""

    __slots__ = (
        "begin", "cancelling", "ctx", "duration", "failure", "firing", "first_unstarted", "interrupt", "is_counted", "model",
        "node", "output", "plan", "row", "run", "saved", "snapshot", "state", "usage_error", "value",
    )  # fmt: skip

    state: BaseModel
    model: BaseModel
    saved: Snapshot

    def __init__(
        self,
        ctx: ReliabilityContext,
        run: NodeExecution,
        node: Node | Group,
        plan: Plan,
        value: BaseModel,
        cancelling: int,
    ) -> None:
        self.ctx = ctx
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

    async def make(self) -> BaseModel | Failure | Halt:
        """Make the attempt. Return the committed output, a Failure for the policies to decide about, or a Halt."""
        return await self._to_its_end(self._make())

    async def begin_only(self) -> Failure | Halt | None:
        """Make the part of the attempt that precedes the call. Return its end if the input is not valid."""
        return await self._to_its_end(self._start())

    async def reject(self, error: Exception) -> Failure | Halt:
        """End as failed, since there is no schema to validate the input with."""
        return await self._to_its_end(self._fail(self._reject_input(error)))

    async def _make(self) -> BaseModel | Failure | Halt:
        ended = await self._start()
        if ended is not None:
            return ended
        raised = await self._call()
        await self._count_usage()
        if raised is not None:
            return await self._end_of_call(raised)
        violation = self._accept_output()
        if violation is not None:
            return await self._fail(violation)
        self._judge()
        problem = await self._commit()
        if problem is not None:
            return await self._fail(problem, is_of_store=True)
        return await self._announce()

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a part of the attempt; if it is interrupted, give the attempt its end."""
        try:
            return await work
        except GeneratorExit:
            self._close_out()
            raise
        except BaseException:
            try:
                await self._abandon()
            except GeneratorExit:
                self._close_out()
                raise
            raise
        finally:
            # What the function raised references the frames that it passed, they this attempt, and the execution its last
            # failure: without this, each failed run is a cycle that only the garbage collector frees.
            del self.run

    # ------------------------------------------------------------------ input

    async def _start(self) -> Failure | Halt | None:
        """Validate the input and call the start hooks. Return the end of an attempt whose input is not valid."""
        violation = self._take_input()
        if violation is not None:
            return await self._fail(violation)
        ctx, state, schema = self.ctx, self.state, self.plan[0]
        calls = ctx.fire.on_node_start
        if calls is not None:
            if schema is None or type(state) is not schema.model:
                schema = schema_of(type(state))
            about = (ctx, self.run, schema, state)
            firing = Firing(ctx.fire, "on_node_start", calls, self.run.node_id, start_arguments, about)
            if not firing.advance():
                try:
                    await firing.finish()
                except HookNotAsync as error:
                    self.first_unstarted = error.set_index
                    raise
        return None

    def _take_input(self) -> Exception | None:
        """Validate the state before the node and take a snapshot of it. Return the violation, if there is one."""
        schema, handover = self.plan[0], self.ctx.handover
        try:
            if schema is None:
                self.state, self.snapshot = self._copy_input()
            elif handover.has(self.value):
                self.state, self.snapshot = handover.take(schema)
            else:
                self.state, self.snapshot = schema.prepare_input(self.value)
        except BaseException as error:
            # Whatever a validator raises: nothing was awaited, so it is no cancellation.
            if ends_run(error):
                raise
            return self._reject_input(error)
        self.begin = perf_counter_ns()
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

    # ------------------------------------------------------------------ call

    async def _call(self) -> BaseException | None:
        """Call the function. Return what it raised, or raise that if it ends the run."""
        node = self.node
        self.begin = begin = perf_counter_ns()
        if self.run.parent is not None and type(node) is Node:
            self.run.parent.enter(begin)
        try:
            if self.ctx.timed:
                self.output = await self._call_in_time()
            elif type(node) is Node and node.is_async:  # As call_function() does, without another coroutine.
                self.output = await (
                    node.func(self.state, self.ctx.node_context())
                    if node.wants_context
                    else node.func(self.state)
                )
            else:
                self.output = await self._call_function(self.state)
        except BaseException as error:
            self._stop_clock()
            if passes_through(error, self.cancelling, in_group=type(node) is not Node):
                raise
            return error
        self._stop_clock()
        return None

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
        for probe in reversed(ctx.probes):
            call = partial(probe.call, self.run, self.node, call)
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
                raise _Deadline(ctx, "latency", limit, max(used, limit), node_id) from None
            raise TimeoutError(
                f"node {node_id!r} did not end within {timeout_ms} ms (node_timeouts)"
            ) from None

    # ------------------------------------------------------------------ usage

    async def _count_usage(self) -> None:
        """Count what the call took, and take it out of the output: it is spent, whatever becomes of the output."""
        ctx, run = self.ctx, self.run
        if type(self.output) is tuple:
            self.output, self.usage_error = count_returned(run, self.output)
        if run.reported is not None:
            cancelled, unpriced = await price(ctx, run)
            if cancelled:
                self.interrupt = asyncio.CancelledError()
            self.usage_error = self.usage_error or unpriced
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

    async def _commit(self) -> Exception | None:
        """Store the output, in one call. From here on it is safe. Return why the store refuses it."""
        ctx, run, schema = self.ctx, self.run, self.plan[1]
        outcome: Outcome = "success" if self.failure is None else "failure"
        row = make_row(run, self.begin, self.duration, self.snapshot, self.saved, self.failure, outcome)
        pending = record(ctx, row, schema, self.model, run.step)
        if pending is not None:
            problem = await self._settle(
                row, pending, partial(record, ctx, row, schema, self.model, run.step)
            )
            if problem is not None:
                return problem
            row = refer(ctx, row)
        if self.failure is None:
            self._end(row, success_arguments, ctx, run, schema, self.model)
        else:
            self._end(row, failure_arguments, ctx, run, self.failure)
        if ctx.step_policies:
            # With the commit: a cancellation that comes after it must not have the node called again.
            self._remember_output()
        if not run.branch:
            ctx.handover.offer(self.model, self.saved, schema)
        return None

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

    def _end(self, row: AttemptRow, make: Callable[..., tuple[Any, ...]], *about: Any) -> None:
        """Append the row of the end, and prepare the calls of its hooks with the arguments ``make(*about)``."""
        run, fire = self.run, self.ctx.fire
        self.row = run.ended = row
        run.rows.append(row)
        event = f"on_node_{row.outcome}"
        calls = getattr(fire, event)
        if calls is not None:
            if self.first_unstarted is not None:
                calls = tuple([call for call in calls if call[0] < self.first_unstarted])
            self.firing = Firing(fire, event, calls, run.node_id, make, about)

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

    async def _end_of_call(self, raised: BaseException) -> Failure | Halt:
        """End an attempt whose function raised."""
        if isinstance_by_type(raised, Suspend) or (
            isinstance_by_type(raised, GroupStopped) and raised.halt.suspended
        ):
            return await self._suspend(raised)
        return await self._fail(self._usage_error_before(raised) or raised)

    async def _fail(self, error: BaseException, *, is_of_store: bool = False) -> Failure | Halt:
        """End as failed: classify, record, and call the failure hooks."""
        ctx, run = self.ctx, self.run
        failure, halt = self._diagnose(error, is_of_store=is_of_store)
        row = make_row(run, self.begin, self.duration, self.snapshot, None, failure, "failure")
        row = refer(ctx, row)
        self._end(row, failure_arguments, ctx, run, failure)
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

    def _diagnose(self, error: BaseException, *, is_of_store: bool) -> tuple[Failure, Halt | None]:
        """Return what an exception means, and the Halt if nothing else decides what follows."""
        ctx, run = self.ctx, self.run
        if isinstance_by_type(error, GroupStopped):
            inner = error.halt.failure
            failure = Failure(
                inner.exception, inner.failure_class, run.node_id, run.attempt, inner.message, inner.reason,
                inner.retry_after_seconds,
            )  # fmt: skip
            if error.halt.spent or error.halt.partial:
                return failure, Halt(failure, partial=error.halt.partial, spent=error.halt.spent)
            return failure, None
        failure = diagnose(error, NodeContext(run.node_id, run.attempt, ctx.run_id), ctx.classifiers)
        if isinstance_by_type(error, PipelineChanged):  # Of a step inside: another attempt meets the same.
            failure = replace(failure, failure_class=FailureClass.TERMINAL, reason="changed")
        failure = ctx.redactor.mask_failure(failure, self.snapshot)
        for probe in ctx.probes:
            failure = probe.diagnosed(run, failure)
        if isinstance_by_type(error, ContractViolation) and self._may_repair(failure):
            run.repairing = True
            failure = replace(failure, failure_class=FailureClass.RECOVERABLE)
        if isinstance_by_type(error, _Deadline) and error.ctx is ctx:
            return failure, Halt(failure, spent=True)
        if is_of_store and isinstance_by_type(error, StoreError):
            failure = Failure(
                error, FailureClass.RECOVERABLE, run.node_id, run.attempt, failure.message, "store"
            )
            return failure, Halt(failure, partial=True)
        return failure, None

    def _may_repair(self, failure: Failure) -> bool:
        """Return True if the config grants another attempt after an output that broke its contract."""
        run, error = self.run, failure.exception
        if getattr(error, "node_id", None) != run.node_id:
            return False  # Of a run inside the node: not its own output.
        is_output = getattr(error, "direction", None) == "output"
        granted = self.ctx.config.contract_retries.get(run.node_id, 0)
        return is_output and failure.failure_class is FailureClass.TERMINAL and run.repairs < granted

    async def _suspend(self, raised: BaseException) -> Failure | Halt:
        """End as suspended: a person has to answer first. That is no failure."""
        ctx, run = self.ctx, self.run
        row = make_row(run, self.begin, self.duration, self.snapshot, None, None, "suspended")
        waiting: Waiting | None = None
        if isinstance_by_type(raised, Suspend):
            ctx.redactor.note_secrets(self.snapshot)
            reason = ctx.redactor.mask(message_of(raised))
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
        self._end(row, lambda: (ctx.run_id, run.node_id, reason))
        await self._call_end_hooks()
        self._raise_interrupt()
        error = raised if isinstance(raised, Exception) else Suspend(reason)
        failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, reason)
        return Halt(failure, suspended=True)

    async def _abandon(self) -> None:
        """End without a verdict: cancelled, or the process is told to stop. What was used is counted.

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
        row = make_row(run, self.begin, duration, self.snapshot, None, None, "cancelled")
        self._end(row, lambda: (ctx.run_id, run.node_id))
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


async def make_in_turn(attempt: Attempt) -> BaseModel | Failure | Halt:
    """Make an attempt between its admission and the settlement of what it took."""
    run = attempt.run
    permit = await admit(attempt.ctx, run)
    if isinstance(permit, Exception):
        return refuse(run, permit)
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


class _Deadline(BudgetExceeded):
    """The latency budget ran out under the function in flight."""

    def __init__(
        self, ctx: ReliabilityContext, dimension: Any, limit: float, used: float, node_id: str
    ) -> None:
        super().__init__(dimension, limit, used, node_id)
        self.ctx = ctx  # of the run whose budget it was: a run inside the node has one of its own

    def __reduce__(self) -> Any:
        return (BudgetExceeded, self.args)
