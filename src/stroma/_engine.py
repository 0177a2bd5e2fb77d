"""The loop: attempt, commit, decide, wait. The only place that calls a node's function.

Every driver (the local runner, ``execute_step``, groups, adapters) enters at :func:`execute`, once per node and
position. What it does for one attempt, in this order:

1. validate the input, fire start;
2. call the function, under its timeout;
3. count the usage, validate the output, reach the verdict on the budget;
4. commit: one store call, one row of the trace. Nothing that comes later can lose it;
5. fire success or failure.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any, Final

from pydantic import BaseModel, RootModel

from stroma.checkpoint import Committed, CorruptCheckpoint, PipelineChanged, StoreError
from stroma.context import CURRENT, Kind, NodeExecution, ReliabilityContext
from stroma.contracts import ContractViolation, NodeContract, as_violation
from stroma.cost import BudgetExceeded, UsageError, cached_pricer, check_usage, find_pricer
from stroma.failures import (
    Failure,
    FailureClass,
    FailurePolicy,
    NodeContext,
    Retry,
    Stop,
    decide,
    diagnose,
    policy_for,
)
from stroma.hooks import HookNotAsync
from stroma.nodes import Group, Node, Plan
from stroma.schemas import NotSerialisable, Schema, Snapshot, schema_of
from stroma.trace import NO_USAGE, AttemptUsage, Outcome, Row, RunStatus

__all__ = ["GroupStopped", "Halt", "Kept", "execute", "uninterrupted"]

#: Between tries of a commit that the store refused.
_STORE_DELAYS: Final = (0.02, 0.1, 0.4)
_NO_RETRIES: Final = FailurePolicy(max_retries=0, backoff_seconds=0.0)
sleep = asyncio.sleep


class Kept(RootModel[Any]):
    """The output of a node without a contract, as it was returned."""


@dataclass(frozen=True, slots=True)
class Halt:
    """An execution that stopped for good.

    Attributes:
        failure: what stopped it.
        output: what was committed all the same, by an attempt that took the run over its budget.
    """

    failure: Failure
    output: BaseModel | None = None
    partial: bool = False

    @property
    def status(self) -> RunStatus:
        """FAILED if trying the same again is pointless, else PARTIAL."""
        terminal = self.failure.failure_class is FailureClass.TERMINAL and not self.partial
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL


class GroupStopped(Exception):
    """A child of a group stopped for good; the group fails with the child's own exception."""

    def __init__(self, halt: Halt) -> None:
        super().__init__(halt)
        self.halt = halt


async def execute(
    ctx: ReliabilityContext,
    node: Node | Group,
    value: BaseModel,
    position: int,
    *,
    branch: str = "",
    kind: Kind = "node",
    parent: NodeExecution | None = None,
    contract: NodeContract[Any, Any] | None = None,
    cancelling: int = 0,
) -> BaseModel | Halt:
    """Run a node at one position until it is committed or has stopped for good.

    ``contract`` wins over the registry, the registry over the marker. ``cancelling``: the running task's count of
    cancellations when the driver began (0 in a task of its own), to tell a new one from a node's stray
    CancelledError. The output is committed when this returns it.
    Cancellation, KeyboardInterrupt, SystemExit and HookNotAsync come out as exceptions, StoreError if what the
    journal holds of this position does not fit; all else is a Halt.
    """
    if branch and (position, branch) in ctx.done:
        return ctx.done[position, branch]
    if ctx.restored:
        committed = await restore(ctx, node, value, position, branch=branch, kind=kind, contract=contract)
        if committed is not None:
            if ctx.step_policies:
                _remember(ctx, position, branch, committed)
            return committed
    plan = _plan(ctx, node, value, contract)
    if isinstance(node, Group):
        kind = "group"
    rows = ctx.trace.rows if parent is None or parent.children is None else parent.children
    run = NodeExecution(ctx, node.node_id, kind, position, branch, rows)
    # Rows hold encoded snapshots where the trace knows the schemas that read them.
    run.compact = ctx.trace.adopt(node.node_id, plan)
    if parent is not None:
        run.parent = parent
    token = CURRENT.set(run)
    try:
        while True:
            run.attempt += 1
            if ctx.limits:
                exceeded = _exceeded(ctx, run)
                if exceeded is not None:
                    # Earlier attempts, siblings or processes have spent it: the next call is never made.
                    return _refused(run, exceeded)
            outcome = await _attempt(ctx, run, node, plan, value, cancelling)
            if not isinstance(outcome, Failure):
                if ctx.step_policies and isinstance(outcome, BaseModel):
                    _remember(ctx, position, branch, outcome)
                return outcome
            decision = _decide(ctx, run, node, outcome)
            if isinstance(decision, Stop):
                ctx.run_logger.info("node %r stopped: %s", node.node_id, decision.why)
                return Halt(outcome)
            delay = decision.delay_seconds
            run.last_failure = outcome
            run.usage = NO_USAGE
            if ctx.fire.on_node_retry is not None:
                arguments = (ctx.run_id, node.node_id, run.attempt + 1, delay, outcome.failure_class)
                await ctx.fire.fire("on_node_retry", ctx.fire.on_node_retry, node.node_id, lambda: arguments)  # noqa: B023
            ctx.run_logger.info("node %r: attempt %d follows in %.3f s", node.node_id, run.attempt + 1, delay)
            await sleep(delay)
    finally:
        CURRENT.reset(token)


def _exceeded(ctx: ReliabilityContext, run: NodeExecution) -> BudgetExceeded | None:
    """The limit that is crossed, the time that the group around the node has run for so far included."""
    exceeded = ctx.cost_tracker.exceeded(ctx.budget, run.node_id)
    limit = ctx.budget.max_latency_ms
    if exceeded is None and limit is not None and run.parent is not None:
        used = ctx.cost_tracker.used("latency") + run.busy(perf_counter_ns()) / 1e6
        if used > limit:
            return BudgetExceeded("latency", limit, used, run.node_id)
    return exceeded


def _remember(ctx: ReliabilityContext, position: int, branch: str, output: BaseModel) -> None:
    """Only node_policies can try a whole group again; what its children committed is not run again then."""
    if branch:
        ctx.done[position, branch] = output
    else:
        ctx.done.clear()


def _plan(
    ctx: ReliabilityContext, node: Node | Group, value: BaseModel, contract: NodeContract[Any, Any] | None
) -> Plan:
    """What the input and the output must satisfy; no input schema: the state passes unvalidated."""
    if isinstance(node, Group):
        return None, schema_of(node.output(ctx, value)), None
    found = contract or ctx.registry.find(node.node_id) or node.contract
    if found is None:
        return None, schema_of(Kept), None
    # Looking schemas up is a tenth of the engine's time: the node keeps them while contract and classes are the same.
    plan = node.plan[0]
    if (
        plan is None
        or plan[2] is not found
        # model_rebuild() gives a class another validator. (Asked here, not in a method: it is asked for every node.)
        or plan[0].validator is not plan[0].model.__pydantic_validator__
        or plan[1].validator is not plan[1].model.__pydantic_validator__
    ):
        plan = node.plan[0] = schema_of(found.input_schema), schema_of(found.output_schema), found
    return plan


def _decide(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, failure: Failure
) -> Retry | Stop:
    if ctx.limits and ctx.cost_tracker.exceeded(ctx.budget, failure.node_id) is not None:
        return Stop("the budget is spent")
    own = ctx.step_policies.get(node.node_id) if ctx.step_policies else None
    if own is None and isinstance(node, Group):
        # Its children had their retries; a group has its own only if asked.
        return decide(failure, _NO_RETRIES, attempt=run.attempt)
    policy = policy_for(failure.failure_class, own, ctx.policy_map)
    if run.repairing:
        # The attempt was granted, whatever the policy says; it only lends its delay.
        run.repairing, run.repairs = False, run.repairs + 1
        return decide(failure, policy.model_copy(update={"max_retries": 1}), attempt=1)
    return decide(failure, policy, attempt=run.attempt - run.repairs)


def _refused(run: NodeExecution, exceeded: BudgetExceeded) -> Halt:
    if run.last_failure is not None:
        exceeded.__cause__ = run.last_failure.exception
    failure = diagnose(exceeded, NodeContext(run.node_id, run.attempt, run.run_id), run.ctx.classifiers)
    run.ctx.run_logger.info("node %r is not called: %s", run.node_id, failure.message)
    return Halt(failure)


# ---------------------------------------------------------------------- one attempt


async def _attempt(
    ctx: ReliabilityContext,
    run: NodeExecution,
    node: Node | Group,
    plan: Plan,
    value: BaseModel,
    cancelling: int,
) -> BaseModel | Failure | Halt:
    # No closures in here: each variable that one captures makes every use of it slower.
    given, promised, _ = plan
    fire = ctx.fire
    try:
        if given is not None:
            state, picture = given.take(value, run.compact)
        else:
            state, picture = _take_unvalidated(node, value)
    except Exception as broken:
        raw = _raw_picture(value)
        violation = as_violation(run.node_id, "input", raw, broken)
        return await _fail(ctx, run, violation, perf_counter_ns(), 0, raw)
    if fire.on_node_start is not None:
        await _fire_start(ctx, run, state, picture)

    # ---- the call
    raised: BaseException | None = None
    output: Any = None
    begin = perf_counter_ns()
    if run.parent is not None and type(node) is Node:
        run.parent.enter(begin)
    try:
        if ctx.timed:
            output = await _call_in_time(ctx, run, node, state, begin)
        elif type(node) is Node and node.is_async:  # _call, without the cost of another coroutine
            output = await (node.func(state, ctx.node_context()) if node.wants_context else node.func(state))
        else:
            output = await _call(ctx, run, node, state)
    except BaseException as error:
        duration = _ended(run, node, begin)
        if _passes_through(error, cancelling):
            await _abandon(ctx, run, begin, duration, picture, error)
            raise
        raised = error
    else:
        duration = perf_counter_ns() - begin
        if run.parent is not None or type(node) is not Node:
            duration = _ended(run, node, begin)

    # ---- usage, at once: it is spent whatever becomes of the output
    bad_usage: UsageError | None = None
    cancelled = False
    if type(output) is tuple:
        output, bad_usage = _count_returned(run, output)
    if run.reported is not None:
        cancelled, unpriced = await _price(ctx, run)
        bad_usage = bad_usage or unpriced
    if run.usage is not NO_USAGE:
        ctx.cost_tracker.spend(run.usage.tokens, run.usage.cost_usd)
    if not run.branch:  # A group's own wall time counts that of its children.
        ctx.cost_tracker.latency_ns += duration
    if raised is not None:
        return await _fail(ctx, run, raised, begin, duration, picture, cancelled=cancelled)

    # ---- the output
    try:
        model, kept = promised.give(output, run.compact)
    except Exception as broken:
        violation = as_violation(run.node_id, "output", output, broken)
        return await _fail(ctx, run, violation, begin, duration, picture, cancelled=cancelled)

    # ---- the verdict, before the commit and part of it
    failure: Failure | None = None
    over: Exception | None = bad_usage
    if over is None and ctx.limits:
        over = ctx.cost_tracker.exceeded(ctx.budget, run.node_id)
    if over is not None:
        failure = diagnose(over, NodeContext(run.node_id, run.attempt, ctx.run_id), ctx.classifiers)

    # ---- the commit: from here on the output is safe from budgets, hooks and cancellation
    if failure is None and run.usage is NO_USAGE:  # What _row would give, without its call and its questions.
        row: Row = (
            run.node_id, run.attempt, begin + ctx.epoch_ns, duration, picture, kept,
            "success", None, None, run.position, run.branch, run.children,
        )  # fmt: skip
    else:
        row = _row(run, begin, duration, picture, kept, failure, "success" if failure is None else "failure")
    pending: Awaitable[None] | Exception | None
    try:
        pending = ctx.session.record(row, promised, model)
    except Exception as refused:
        pending = refused
    if pending is not None:
        problem, late = await _settle(ctx, row, promised, model, pending)
        cancelled = cancelled or late
        if problem is not None:
            return await _fail(ctx, run, problem, begin, duration, picture, cancelled=cancelled)
    run.rows.append(row)
    if not run.branch:
        ctx.last_state = model

    # ---- who watches
    if failure is not None:
        await _tell_failure(ctx, run, failure)
    elif fire.on_node_success is not None:
        await _fire_success(ctx, run, promised, model)
    if ctx.limits and fire.on_budget_warning is not None:
        await _warn(ctx)
    if cancelled:
        raise asyncio.CancelledError
    return model if failure is None else Halt(failure, output=model)


def _ended(run: NodeExecution, node: Node | Group, begin: int) -> int:
    """How long the function ran, in ns; for a group, how long any function inside it did: neither hooks nor waits."""
    now = perf_counter_ns()
    if type(node) is not Node:
        return run.busy_ns
    if run.parent is not None:
        run.parent.leave(now)
    return now - begin


def _take_unvalidated(node: Node | Group, value: BaseModel) -> tuple[BaseModel, Snapshot]:
    """The input of a node without a contract, or of a group, each child of which takes its own copy."""
    schema = schema_of(type(value))
    picture = schema.state(value)
    return value if isinstance(node, Group) else schema.copy(value), picture


def _raw_picture(value: Any) -> dict[str, Any]:
    return schema_of(type(value)).state(value) if isinstance(value, BaseModel) else {"value": value}


def _row(
    run: NodeExecution,
    begin: int,
    duration: int,
    picture: Snapshot,
    kept: Snapshot | None,
    failure: Failure | None,
    outcome: Outcome,
) -> Row:
    return (
        run.node_id,
        run.attempt,
        begin + run.ctx.epoch_ns,
        duration,
        picture,
        kept,
        outcome,
        None if failure is None else (failure.failure_class, failure.message, failure.reason),
        None if run.usage is NO_USAGE else run.usage,
        run.position,
        run.branch,
        run.children,
    )


async def _fail(
    ctx: ReliabilityContext,
    run: NodeExecution,
    exc: BaseException,
    begin: int,
    duration: int,
    picture: Snapshot,
    *,
    cancelled: bool = False,
) -> Failure | Halt:
    """One failed attempt: classified, recorded, shown to the hooks."""
    halt: Halt | None = None
    if isinstance(exc, GroupStopped):
        child = exc.halt.failure
        failure = Failure(
            child.exception, child.failure_class, run.node_id, run.attempt, child.message, child.reason,
            child.retry_after_seconds,
        )  # fmt: skip
        if child.reason in ("budget", "store"):
            halt = Halt(failure, partial=exc.halt.partial)
    else:
        failure = diagnose(exc, NodeContext(run.node_id, run.attempt, ctx.run_id), ctx.classifiers)
        if isinstance(exc, ContractViolation) and _may_repair(ctx, run, failure):
            run.repairing = True
            failure = replace(failure, failure_class=FailureClass.RECOVERABLE)
        if isinstance(exc, _Deadline):
            halt = Halt(failure)
        elif isinstance(exc, StoreError):
            failure = Failure(
                exc, FailureClass.RECOVERABLE, run.node_id, run.attempt, failure.message, "store"
            )
            halt = Halt(failure, partial=True)
    row = _row(run, begin, duration, picture, None, failure, "failure")
    run.rows.append(row)
    if not (halt is not None and failure.reason == "store"):
        problem, late = await _record(ctx, row)
        cancelled |= late
        if problem is not None:
            stored = Failure(
                problem, FailureClass.RECOVERABLE, run.node_id, run.attempt, str(problem), "store"
            )
            halt = Halt(stored, partial=True)
    await _tell_failure(ctx, run, failure)
    if ctx.limits and ctx.fire.on_budget_warning is not None:
        await _warn(ctx)
    if cancelled:
        raise asyncio.CancelledError
    return failure if halt is None else halt


def _may_repair(ctx: ReliabilityContext, run: NodeExecution, failure: Failure) -> bool:
    """Whether the config grants another attempt after an output that broke its contract."""
    granted = ctx.config.contract_retries.get(run.node_id, 0)
    direction = getattr(failure.exception, "direction", None)
    return direction == "output" and failure.failure_class is FailureClass.TERMINAL and run.repairs < granted


async def _abandon(
    ctx: ReliabilityContext,
    run: NodeExecution,
    begin: int,
    duration: int,
    picture: Snapshot,
    why: BaseException,
    reached: int | None = None,
) -> None:
    """The attempt ends without a verdict: cancelled, or the process is told to stop. Its usage counts.

    ``reached``: how many sets of hooks saw the start; None for all.
    """
    if isinstance(why, GeneratorExit):  # The coroutine is being closed: nothing may be awaited any more.
        run.rows.append(_row(run, begin, duration, picture, None, None, "cancelled"))
        return
    if run.reported is not None:
        await _price(ctx, run)
        ctx.cost_tracker.spend(run.usage.tokens, run.usage.cost_usd)
    if not run.branch:
        ctx.cost_tracker.latency_ns += duration
    row = _row(run, begin, duration, picture, None, None, "cancelled")
    run.rows.append(row)
    await _record(ctx, row)
    calls = ctx.fire.on_node_cancelled
    if calls is not None and reached is not None:
        calls = tuple(call for call in calls if call[0] < reached)
    if calls is not None:
        await ctx.fire.fire("on_node_cancelled", calls, run.node_id, lambda: (ctx.run_id, run.node_id))


async def _fire_start(
    ctx: ReliabilityContext, run: NodeExecution, state: BaseModel, picture: Snapshot
) -> None:
    begin = perf_counter_ns()
    schema = schema_of(type(state))
    calls = ctx.fire.on_node_start
    assert calls is not None
    try:
        await ctx.fire.fire(
            "on_node_start",
            calls,
            run.node_id,
            lambda: (ctx.run_id, run.node_id, ctx.shown(schema.state(state))),
        )
    except BaseException as stopped:
        # The sets that saw the start see the end.
        reached = stopped.set_index if isinstance(stopped, HookNotAsync) else None
        await _abandon(ctx, run, begin, 0, picture, stopped, reached)
        raise


async def _fire_success(
    ctx: ReliabilityContext, run: NodeExecution, schema: Schema, model: BaseModel
) -> None:
    calls = ctx.fire.on_node_success
    assert calls is not None
    await ctx.fire.fire(
        "on_node_success",
        calls,
        run.node_id,
        lambda: (ctx.run_id, run.node_id, ctx.shown(schema.state(model)), run.usage.tokens),
    )


async def _tell_failure(ctx: ReliabilityContext, run: NodeExecution, failure: Failure) -> None:
    ctx.run_logger.warning(
        "node %r%s failed at attempt %d (%s): %s",
        run.node_id,
        f" [{run.branch}]" if run.branch else "",
        run.attempt,
        failure.failure_class,
        failure.message,
    )
    calls = ctx.fire.on_node_failure
    if calls is not None:
        arguments = (ctx.run_id, run.node_id, ctx.shown_error(failure.exception), failure.failure_class)
        await ctx.fire.fire("on_node_failure", calls, run.node_id, lambda: arguments)


async def _warn(ctx: ReliabilityContext) -> None:
    for dimension, used, limit in ctx.due_warnings():
        arguments = (ctx.run_id, dimension, used, limit)
        assert ctx.fire.on_budget_warning is not None
        await ctx.fire.fire("on_budget_warning", ctx.fire.on_budget_warning, None, lambda: arguments)  # noqa: B023


# ---------------------------------------------------------------------- calling


async def _call(ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, state: BaseModel) -> Any:
    if isinstance(node, Group):
        run.children, run.busy_ns, run.running = [], 0, 0
        return await node.run(ctx, run, state)
    context = ctx.node_context() if node.wants_context else ctx.context
    if node.is_async:
        return await node.call(state, context)
    returned = await _in_thread(node.call, (state, context))
    return await returned if isinstance(returned, Awaitable) else returned


class _Deadline(BudgetExceeded):
    """The latency budget ran out under the function in flight."""

    def __reduce__(self) -> Any:
        return (BudgetExceeded, self.args)


async def _call_in_time(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, state: BaseModel, begin: int
) -> Any:
    """Call under the node's timeout and the run's latency deadline, whichever is nearer."""
    limit = ctx.budget.max_latency_ms
    left = math.inf
    if limit is not None:
        left = (limit - ctx.cost_tracker.used("latency") - run.busy(begin) / 1e6) / 1000
    timeout_ms = ctx.step_timeouts.get(run.node_id)
    own = math.inf if timeout_ms is None else timeout_ms / 1000
    if isinstance(node, Group):
        left = math.inf  # Its children stand under the deadline themselves, each with an end of its own.
    seconds = min(left, own)
    scope = asyncio.timeout(None if math.isinf(seconds) else max(0.0, seconds))
    try:
        async with scope:
            return await _call(ctx, run, node, state)
    except TimeoutError:
        if not scope.expired():
            raise
        if left < own:
            assert limit is not None
            now = perf_counter_ns()
            used = ctx.cost_tracker.used("latency") + (run.busy(now) if run.parent else now - begin) / 1e6
            raise _Deadline("latency", limit, max(used, limit), run.node_id) from None
        raise TimeoutError(
            f"node {run.node_id!r} did not end within {timeout_ms} ms (node_timeouts)"
        ) from None


async def _in_thread(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call in a daemon thread of its own: one that is abandoned holds up neither the loop's end nor the process's."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        elif isinstance(error, (StopIteration, GeneratorExit)):
            # A future cannot carry the one; the other, coming out of an await, would mean that we are being closed.
            done.set_exception(RuntimeError(f"the node raised {type(error).__name__}: {error}"))
        else:
            done.set_exception(error)

    def work() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = (context.run(func, *args), None)
        except BaseException as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            pass  # The loop ended; nobody waits for this any more.

    threading.Thread(target=work, name=f"stroma-{getattr(func, '__name__', 'node')}", daemon=True).start()
    return await done


def _passes_through(error: BaseException, cancelling: int) -> bool:
    """Whether an exception is not a failure of the node but the end of this run or process."""
    if isinstance(error, Exception):
        return isinstance(error, (HookNotAsync, PipelineChanged, CorruptCheckpoint))
    if isinstance(error, asyncio.CancelledError):
        # One that the node raised itself, while nobody cancels its task, is a failure like any other.
        task = asyncio.current_task()
        return task is None or task.cancelling() > cancelling
    return isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


async def uninterrupted(work: Awaitable[Any]) -> bool:
    """Await to the very end; True if the running task was cancelled meanwhile: the caller raises that afterwards."""
    future = asyncio.ensure_future(work)
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            cancelled = True
    if future.cancelled():
        raise StoreError("the store gave up the operation by itself")
    future.result()
    return cancelled


async def _record(ctx: ReliabilityContext, row: Row) -> tuple[Exception | None, bool]:
    """Keep an attempt that committed nothing. Returns what is wrong, and whether the task was cancelled meanwhile."""
    pending: Awaitable[None] | Exception | None
    try:
        pending = ctx.session.record(row, None, None)
    except Exception as refused:
        pending = refused
    return (None, False) if pending is None else await _settle(ctx, row, None, None, pending)


async def _settle(
    ctx: ReliabilityContext,
    row: Row,
    schema: Schema | None,
    output: BaseModel | None,
    pending: Awaitable[None] | Exception | None,
) -> tuple[Exception | None, bool]:
    """See a commit through. One that the store refuses is tried again briefly; the node itself is not."""
    cancelled = False
    delays = iter(_STORE_DELAYS)
    while True:
        error: Exception
        try:
            if isinstance(pending, Exception):
                raise pending
            if pending is not None:
                cancelled |= await uninterrupted(pending)
        except NotSerialisable as unkept:
            return unkept, cancelled
        except Exception as refused:
            error = refused
        else:
            return None, cancelled
        delay = None if isinstance(error, StoreError) and not error.transient else next(delays, None)
        if delay is None:
            break
        ctx.run_logger.warning(
            "the store refused attempt %d of node %r: %s; trying again", row[1], row[0], error
        )
        cancelled |= await uninterrupted(asyncio.sleep(delay))
        try:
            pending = ctx.session.record(row, schema, output)
        except Exception as again:
            pending = again
    if isinstance(error, StoreError):
        return error, cancelled
    wrapped = StoreError(f"the store could not keep node {row[0]!r} of run {ctx.run_id!r}: {error}")
    wrapped.__cause__ = error
    return wrapped, cancelled


# ---------------------------------------------------------------------- usage

_SHAPES: Final = "return the output, (output, tokens), (output, input_tokens, model) or (output, input_tokens, output_tokens, model)"


def _count_returned(run: NodeExecution, returned: Any) -> tuple[Any, UsageError | None]:
    """The output without its usage; the usage is noted on the execution."""
    if type(returned) is not tuple:
        return returned, None
    model: Any = None
    produced: Any = 0
    if len(returned) == 2:
        output, used = returned
    elif len(returned) == 3:
        output, used, model = returned
    elif len(returned) == 4:
        output, used, produced, model = returned
    else:
        return returned, None  # The output contract says what is wrong with it.
    if model is not None and not isinstance(model, str):
        return output, UsageError(f"node {run.node_id!r} named the model {model!r}; {_SHAPES}")
    try:
        check_usage(run.node_id, used, produced)
    except UsageError as error:
        return output, error
    run.report_usage(input_tokens=used, output_tokens=produced, model=model)
    return output, None


async def _price(ctx: ReliabilityContext, run: NodeExecution) -> tuple[bool, UsageError | None]:
    """Put a price on what the attempt reported. Returns whether the task was cancelled meanwhile, and what is wrong."""
    cancelled = False
    problem: UsageError | None = None
    tokens, produced, cost, named = 0, 0, 0.0, None
    for given, made, model in run.take_reported():
        tokens += given + made
        produced += made
        if model is None:
            continue
        named = model
        pricer = cached_pricer(model)
        if pricer == "unread":
            # The price data takes a quarter of a second to import: not on the event loop.
            cancelled |= await uninterrupted(_in_thread(find_pricer, (model,)))
            pricer = find_pricer(model)
        if pricer is None:
            if ctx.config.unknown_model == "error":
                problem = UsageError(
                    f"node {run.node_id!r} used model {model!r}, which has no known price; add it to KNOWN_MODELS"
                )
            elif model not in ctx.unpriced:
                ctx.run_logger.warning(
                    "no price is known for model %r: it counts as 0; add it to KNOWN_MODELS", model
                )
            if model not in ctx.unpriced:
                ctx.unpriced.append(model)
        else:
            cost += pricer(given, made)
    run.usage = AttemptUsage(tokens, produced, cost, named)
    return cancelled, problem


# ---------------------------------------------------------------------- the journal


async def restore(
    ctx: ReliabilityContext,
    node: Node | Group,
    value: BaseModel,
    position: int,
    *,
    branch: str = "",
    kind: Kind = "node",
    contract: NodeContract[Any, Any] | None = None,
) -> BaseModel | None:
    """The committed output of a position, in place of running it again; None if there is none.

    Raises PipelineChanged, or CorruptCheckpoint if what was kept cannot be read back.
    """
    committed = ctx.restored.get((position, branch))
    if committed is None:
        return None
    schema = schema_of(contract.output_schema) if contract is not None else output_schema(ctx, node, value)
    check_committed(ctx, node, schema, committed, position, branch)
    try:
        model = schema.restore(committed.output)
    except Exception as error:
        raise CorruptCheckpoint(
            f"the output of node {node.node_id!r} at position {position} of run {ctx.run_id!r} cannot be read back: "
            f"{error}; resume from that node (resume_from={node.node_id!r}) to make it anew"
        ) from error
    if not branch:
        ctx.last_state = model
    if ctx.fire.on_node_skipped is not None:
        run = NodeExecution(
            ctx, node.node_id, "group" if isinstance(node, Group) else kind, position, branch, []
        )
        token = CURRENT.set(run)
        try:
            await ctx.fire.fire(
                "on_node_skipped",
                ctx.fire.on_node_skipped,
                node.node_id,
                lambda: (ctx.run_id, node.node_id, ctx.shown(schema.state(model))),
            )
        finally:
            CURRENT.reset(token)
    return model


def output_schema(ctx: ReliabilityContext, node: Node | Group, value: BaseModel) -> Schema:
    """What a node's output must satisfy, given its input."""
    if isinstance(node, Group):
        return schema_of(node.output(ctx, value))
    contract = ctx.contract_of(node)
    return schema_of(Kept if contract is None else contract.output_schema)


def check_committed(
    ctx: ReliabilityContext,
    node: Node | Group,
    schema: Schema,
    committed: Committed,
    position: int,
    branch: str,
) -> None:
    """Raise PipelineChanged if a position holds the output of another node, or of another contract."""
    where = f"position {position}" + (f" ({branch})" if branch else "")
    if committed.node_id != node.node_id:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: at {where} it has the output of node {committed.node_id!r}, but the "
            f"pipeline has {node.node_id!r} there; restore the order of nodes, or begin a new run"
        )
    if committed.contract != schema.fingerprint:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: the output schema of node {node.node_id!r} at {where} is not the one that "
            f"its output was recorded with ({schema.model.__name__} has changed); restore it, or begin a new run"
        )
