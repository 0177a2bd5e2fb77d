"""The loop: attempt, commit, decide, wait. The only place that calls a node's function.

Every driver (the local runner, ``execute_step``, groups, adapters) enters at :func:`execute` or, if it has many nodes in
turn, at :func:`execute_in_turn`, once per node and position. What it does for one attempt, in this order:

1. validate the input, fire start;
2. call the function, under its timeout;
3. count the usage, validate the output, reach the verdict on the budget;
4. commit: one store call, one row of the trace. Nothing that comes later can lose it;
5. fire success or failure.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from functools import cache, partial
from time import perf_counter_ns
from typing import Any, Final, NamedTuple, TypedDict, Unpack, cast, final

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import Finished, PipelineChanged, StepCall, StoreError, Waiting, schema_ref
from stroma.contracts.contract import ContractViolation, NodeContract, as_violation, output_violation
from stroma.contracts.node import Group, Node, Plan, output_class
from stroma.contracts.schema import Snapshot, schema_of
from stroma.contracts.snapshots import PickledSnapshot
from stroma.cost.budget import BudgetExceeded
from stroma.cost.usage import UsageError
from stroma.engine.admission import admit
from stroma.engine.commit import make_row, record, refer, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT, leave
from stroma.engine.events import of_start, of_success, tell_closed, tell_end, tell_failure, warn_of_budget
from stroma.engine.execution import Kind, NodeExecution, new_execution
from stroma.engine.interceptors import Call
from stroma.engine.metering import count_returned, price
from stroma.engine.restore import restore
from stroma.engine.tasks import in_thread, passes_through, refusal
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed, Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose, ends_run, isinstance_by_type, message_of
from stroma.failures.policy import Retry, Stop, follow_up
from stroma.hooks.dispatch import HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow
from stroma.trace.result import RunStatus

__all__ = ["GroupStopped", "Halt", "attempt_once", "begin_group", "execute", "execute_in_turn"]

_SPENT: Final = Stop("the budget is spent")
sleep = asyncio.sleep


@final
class Halt(NamedTuple):
    """An execution that stopped for good.

    Attributes:
        failure: what stopped it.
        output: what was committed all the same, by an attempt that took the run over its budget.
        partial: trying again later may help, whatever the class says.
        spent: a limit of this run is crossed (and not only one of a run inside the node).
        suspended: a node waits for a person. That is no failure; ``failure`` only says what for.
    """

    failure: Failure
    output: BaseModel | None = None
    partial: bool = False
    spent: bool = False
    suspended: bool = False

    @property
    def status(self) -> RunStatus:
        """SUSPENDED if a node waits, FAILED if trying the same again is pointless, else PARTIAL."""
        if self.suspended:
            return RunStatus.SUSPENDED
        terminal = self.failure.failure_class is FailureClass.TERMINAL and not self.partial
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL


class GroupStopped(Exception):
    """What is inside stopped for good: a child of a group, or a step that the guard of an adapter knows of.

    The execution around it fails with the inner one's own exception and class.
    """

    def __init__(self, halt: Halt) -> None:
        super().__init__(halt)
        self.halt = halt


async def execute(
    ctx: ReliabilityContext, node: Node | Group, value: BaseModel, position: int, **place: Unpack[Place]
) -> BaseModel | Halt:
    """Run a node at one position until it is committed or has stopped for good.

    The output is committed when this returns it. Cancellation, KeyboardInterrupt, SystemExit and HookNotAsync come out
    as exceptions, StoreError if what the journal holds of this position does not fit; all else is a Halt.
    """
    finished = ctx.session.finished
    if finished is not None and (position, place.get("branch", "")) not in ctx.restored:
        return _over(ctx, node.node_id, finished)
    token = CURRENT.set(CURRENT.get())
    try:
        outcome = await execute_in_turn(ctx, (node,), value, position, **place)
        assert outcome is not None  # There is no further node.
        return outcome
    finally:
        leave(token)


def _over(ctx: ReliabilityContext, node_id: str, finished: Finished) -> Halt:
    """The end of a step that is not called: its run has ended, by somebody's cancel() or as poison."""
    error = RunFailed(finished.error or f"run {ctx.run_id!r} has ended: {finished.status}")
    failure = diagnose(error, NodeContext(node_id, 1, ctx.run_id))
    kind = FailureClass.TERMINAL if finished.status == RunStatus.FAILED else FailureClass.RECOVERABLE
    return Halt(replace(failure, failure_class=kind, reason=finished.reason or failure.reason))


class Place(TypedDict, total=False):
    """Where an execution stands, and under what.

    Attributes:
        contract: wins over the registry, which wins over the marker.
        restores: whether what is committed there already is the output; otherwise the function is called all the same.
        cancelling: the running task's count of cancellations when the driver began (0 in a task of its own), to tell a
            new one from a node's stray CancelledError.
    """

    branch: str
    kind: Kind
    parent: NodeExecution | None
    contract: NodeContract[Any, Any] | None
    step: StepCall | None
    cancelling: int
    restores: bool


async def execute_in_turn(
    ctx: ReliabilityContext,
    nodes: Sequence[Node | Group],
    value: BaseModel,
    position: int = 0,
    branch: str = "",
    kind: Kind = "node",
    parent: NodeExecution | None = None,
    contract: NodeContract[Any, Any] | None = None,
    step: StepCall | None = None,
    cancelling: int = 0,
    restores: bool = True,
) -> BaseModel | Halt | None:
    """:func:`execute` for nodes in turn, each at the next position and on the output of the one before.

    None if the run was told meanwhile that no further node shall begin (``ctx.stops``). The last node stays the current
    one: who calls this puts back what was before. So it is for a task that ends with its node, too.
    """
    # A run has one coroutine for all its nodes, and each of their attempts one: that is what most of them cost.
    rows = ctx.trace.rows if parent is None or parent.children is None else parent.children
    task = asyncio.current_task()
    first = position
    for position, node in enumerate(nodes, first):
        if position != first:
            if ctx.stops:
                return None
            if task is not None and task.cancelling() != cancelling:
                # Either a cancellation is on its way, and this lets it in; or a node's TaskGroup has left one behind.
                await asyncio.sleep(0)
                cancelling = task.cancelling()
        if branch and restores and (position, branch) in ctx.done:
            value = ctx.done[position, branch]
            continue
        if ctx.restored and restores:
            committed = await restore(
                ctx,
                node,
                value,
                position,
                branch=branch,
                kind=kind,
                contract=contract,
                parent=parent,
            )
            if committed is not None:
                if ctx.step_policies and parent is not None and parent.kind == "group" and parent.remembers:
                    ctx.done[position, branch] = committed
                value = committed
                continue
        run = new_execution(
            ctx, node.node_id, kind if type(node) is Node else "group", position, branch, rows, parent
        )
        try:
            plan = _plan(ctx, run, node, value, contract)
        except Exception as broken:
            return await _without_plan(ctx, run, value, broken)
        if step is not None:
            run.step = step
        CURRENT.set(run)
        attempt = 0  # Kept here: what hooks can reach decides nothing.
        try:
            if ctx.tried:
                attempt, stopped = _tried_before(ctx, run, node)
                if stopped is not None:
                    return stopped
            while True:
                attempt += 1
                run.attempt = attempt
                if ctx.limits:
                    exceeded = _exceeded(ctx, run)
                    if exceeded is not None:
                        # Earlier attempts, siblings or processes have spent it: the next call is never made.
                        return _refused(run, exceeded)
                if ctx.gated and type(node) is Node:
                    outcome = await _attempt_in_turn(ctx, run, node, plan, value, cancelling)
                else:
                    outcome = await _attempt(ctx, run, node, plan, value, cancelling)
                if type(outcome) is not Failure:
                    break
                decision = _decide(ctx, run, node, outcome, attempt)
                if isinstance(decision, Stop):
                    ctx.run_logger.info("node %r stopped: %s", node.node_id, decision.why)
                    return Halt(outcome, spent=decision is _SPENT)
                await _wait(ctx, run, outcome, attempt, decision.delay_seconds)
                if ctx.cancelled:  # A step of plain code, whose task is the caller's own.
                    ctx.run_logger.info("node %r stopped: the run was cancelled", node.node_id)
                    return Halt(outcome)
                if task is not None:
                    cancelling = task.cancelling()
        finally:
            if run._at_end is not None:
                run.close()
        del run  # What it knows of a failure knows this frame: see _attempt().
        if type(outcome) is Halt:
            return outcome
        value = outcome
    return value


def _tried_before(ctx: ReliabilityContext, run: NodeExecution, node: Node | Group) -> tuple[int, Halt | None]:
    """Return how many attempts processes that died have made of a node, and its end if no other one follows them."""
    tried = ctx.tried.pop((run.position, run.branch), None) if ctx.tried else None
    if tried is None or tried.node_id != run.node_id:
        return 0, None
    count = tried.attempts
    run.attempt = count
    # Which of them repaired a broken output is not recorded.
    run.repairs = min(count, ctx.config.contract_retries.get(run.node_id, 0))
    failure = Failure(
        RunFailed.recorded(tried.message, tried.error_type),
        FailureClass(tried.failure_class),
        run.node_id,
        count,
        tried.message,
        tried.reason,
    )
    run.last_failure = failure
    decision = _decide(ctx, run, node, failure, count)
    if not isinstance(decision, Stop):
        return count, None
    ctx.run_logger.info("node %r stopped: %s", node.node_id, decision.why)
    return count, Halt(failure, spent=decision is _SPENT)


async def _wait(
    ctx: ReliabilityContext, run: NodeExecution, failure: Failure, attempt: int, delay: float
) -> None:
    """From a failed attempt to the next one."""
    run.last_failure = failure
    run.counted = NO_USAGE
    if ctx.fire.on_node_retry is not None:
        arguments = (ctx.run_id, run.node_id, attempt + 1, delay, failure.failure_class)
        await ctx.fire.fire("on_node_retry", ctx.fire.on_node_retry, run.node_id, lambda: arguments)
    if ctx.run_logger.isEnabledFor(logging.INFO):
        ctx.run_logger.info("node %r: attempt %d follows in %.3f s", run.node_id, attempt + 1, delay)
    await sleep(delay)
    run.ended = None


async def attempt_once(
    ctx: ReliabilityContext,
    run: NodeExecution,
    node: Node | Group,
    value: BaseModel,
    *,
    after_seconds: float | None = None,
    begun: bool = False,
) -> BaseModel | Failure | Halt:
    """Exactly one attempt, for a driver that keeps the counts itself and decides what follows (see ``stroma.drivers.remote``).

    ``run`` says which one it is: its attempt, last failure and repairs. ``after_seconds``: how long the driver has waited
    before it, for the hooks; None for a first one. ``begun``: :func:`begin_group` was its beginning. A Failure is what
    :func:`stroma.failures.policy.follow_up` is to be asked about; all else is as in :func:`execute`.
    """
    token = CURRENT.set(run)
    try:
        try:
            plan = _plan(ctx, run, node, value, None)
        except Exception as broken:
            return await _without_plan(ctx, run, value, broken)
        task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        await _tell_retry(ctx, run, after_seconds)
        if ctx.limits and not begun:
            exceeded = _exceeded(ctx, run)
            if exceeded is not None:
                return _refused(run, exceeded)
        if ctx.gated and type(node) is Node:
            return await _attempt_in_turn(ctx, run, node, plan, value, cancelling)
        return await _attempt(ctx, run, node, plan, value, cancelling)
    finally:
        run.close()
        leave(token)


async def _tell_retry(ctx: ReliabilityContext, run: NodeExecution, after_seconds: float | None) -> None:
    """Tell the hooks what an attempt was waited for, as they find it where nobody but the engine waits."""
    calls = ctx.fire.on_node_retry
    if after_seconds is not None and run.last_failure is not None and calls is not None:
        arguments = (ctx.run_id, run.node_id, run.attempt, after_seconds, run.last_failure.failure_class)
        run.attempt -= 1
        await ctx.fire.fire("on_node_retry", calls, run.node_id, lambda: arguments)
        run.attempt += 1


async def begin_group(
    ctx: ReliabilityContext,
    run: NodeExecution,
    group: Group,
    value: BaseModel,
    *,
    after_seconds: float | None = None,
) -> Halt | None:
    """What :func:`attempt_once` does for a group before its children run, if those run elsewhere; its end comes with it.

    A Halt is a group that is not begun.
    """
    token = CURRENT.set(run)
    try:
        try:
            _plan(ctx, run, group, value, None)
        except Exception as broken:
            return await _without_plan(ctx, run, value, broken)
        await _tell_retry(ctx, run, after_seconds)
        if ctx.limits:
            exceeded = _exceeded(ctx, run)
            if exceeded is not None:
                return _refused(run, exceeded)
        state, picture = _take_unvalidated(ctx, run, group, value)
        calls = ctx.fire.on_node_start
        if calls is not None:
            about = ctx, run, schema_of(type(state)), state
            left = ctx.fire.fire_soon("on_node_start", calls, run.node_id, of_start, *about)
            if left is not None:
                await _started(ctx, run, picture, left)
        return None
    finally:
        run.close()
        leave(token)


def _exceeded(ctx: ReliabilityContext, run: NodeExecution) -> BudgetExceeded | None:
    """The limit that is crossed, the time that the group around the node has run for so far included."""
    exceeded = ctx.cost_tracker.exceeded(ctx._budget, run.node_id)
    limit = ctx._budget.max_latency_ms
    if exceeded is None and limit is not None and run.parent is not None:
        used = ctx.cost_tracker.used("latency") + run.busy(perf_counter_ns()) / 1e6
        if used > limit:
            return BudgetExceeded("latency", limit, used, run.node_id)
    return exceeded


def _remember(ctx: ReliabilityContext, run: NodeExecution, output: BaseModel) -> None:
    """Only node_policies can try a whole group again; what its children committed is not run again then."""
    if run.branch:
        # A step that code calls is called again by another attempt of that code.
        if run.parent is not None and run.parent.kind == "group" and run.parent.remembers:
            ctx.done[run.position, run.branch] = output
    elif ctx.done:
        for key in [key for key in ctx.done if key[0] == run.position]:
            del ctx.done[key]


def _plan(
    ctx: ReliabilityContext,
    run: NodeExecution,
    node: Node | Group,
    value: BaseModel,
    contract: NodeContract[Any, Any] | None,
) -> Plan:
    """What the input and the output must satisfy; noted in the execution, too, for who reads its rows.

    No input schema: the state passes unvalidated.
    """
    if type(node) is Group:
        plan: Plan = None, schema_of(node.output(ctx, value)), None
        run.schemas = schema_of(type(value)), plan[1], None
        return plan
    found = contract or ctx.registry.find(node.node_id) or node.contract
    if found is None:
        plan = _no_contract()
        run.schemas = schema_of(type(value)), plan[1], None
        return plan
    # Looking schemas up is a tenth of the engine's time: the node keeps them while contract and classes are the same.
    known = node.plan[0]
    if known is not None:
        given, promised, of = known
        # model_rebuild() gives a class another validator. (Asked here, not in a method: it is asked for every node.)
        if (
            of is not found
            or given.namespace["__pydantic_validator__"] is not given.validator
            or promised.namespace["__pydantic_validator__"] is not promised.validator
        ):
            known = None
    if known is None:
        known = node.plan[0] = schema_of(found.input_schema), schema_of(found.output_schema), found
    run.schemas = known
    return known


@cache
def _no_contract() -> Plan:
    """What holds for all nodes without a contract."""
    return None, schema_of(output_class(None)), None


async def _without_plan(
    ctx: ReliabilityContext, run: NodeExecution, value: BaseModel, broken: Exception
) -> Halt:
    """The end of a node whose contract cannot be read: a class that is not fully defined, say."""
    CURRENT.set(run)
    try:
        run.attempt = 1
        raw = _raw_picture(value)
        violation = as_violation(run.node_id, "input", raw, broken)
        outcome = await _fail(ctx, run, violation, perf_counter_ns(), 0, raw)
        return outcome if isinstance(outcome, Halt) else Halt(outcome)
    finally:
        run.close()


def _decide(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, failure: Failure, attempt: int
) -> Retry | Stop:
    if ctx.limits and ctx.cost_tracker.exceeded(ctx._budget, failure.node_id) is not None:
        return _SPENT
    if ctx.cancelled:  # The node made an error of its own of it.
        return Stop("the run was cancelled")
    decision = follow_up(
        failure,
        ctx.step_policies.get(node.node_id) if ctx.step_policies else None,
        ctx.policy_map,
        attempt=attempt,
        group=isinstance(node, Group),
        repairing=run.repairing,
        repairs=run.repairs,
    )
    if run.repairing:
        run.repairing, run.repairs = False, run.repairs + 1
    return decision


def _refused(run: NodeExecution, why: Exception) -> Halt:
    if run.last_failure is not None and why.__cause__ is None:
        why.__cause__ = run.last_failure.exception
    failure = diagnose(why, NodeContext(run.node_id, run.attempt, run.run_id), run.ctx.classifiers)
    run.ctx.run_logger.info("node %r is not called: %s", run.node_id, one_line(failure.message))
    if isinstance_by_type(why, StoreError):
        failure = replace(failure, failure_class=FailureClass.RECOVERABLE, reason="store")
        return Halt(failure, partial=True)
    return Halt(failure, spent=isinstance_by_type(why, BudgetExceeded))


async def _attempt_in_turn(
    ctx: ReliabilityContext,
    run: NodeExecution,
    node: Node | Group,
    plan: Plan,
    value: BaseModel,
    cancelling: int,
) -> BaseModel | Failure | Halt:
    """An attempt between its admission and the settlement of what it took."""
    permit = await admit(ctx, run)
    if isinstance(permit, Exception):
        return _refused(run, permit)
    try:
        outcome = await _attempt(ctx, run, node, plan, value, cancelling)
    except GeneratorExit:  # The coroutine is being closed: nothing may be awaited any more.
        permit.drop(run.counted)
        raise
    except BaseException:
        await permit.leave(None)
        raise
    if await permit.leave(outcome):
        raise asyncio.CancelledError
    return outcome


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
        if given is None:
            state, picture = _take_unvalidated(ctx, run, node, value)
        elif ctx.pictured is None or value is not ctx.newest:
            state, picture = given.prepare_input(value)
        else:
            state, picture, used = given.prepare_input_from(value, ctx.pictured, not ctx.lent)
            ctx.lent |= used
    except BaseException as broken:
        # Whatever a validator raises: nothing was awaited, so nobody cancels or closes us.
        if ends_run(broken):
            raise
        raw = _raw_picture(ctx.settled(value))
        violation: Exception = as_violation(
            run.node_id, "input", raw, broken, None if given is None else given.model
        )
        return await _fail(ctx, run, violation, perf_counter_ns(), 0, raw)
    if fire.on_node_start is not None:
        shape = given if given is not None and type(state) is given.model else schema_of(type(state))
        left = fire.fire_soon(
            "on_node_start", fire.on_node_start, run.node_id, of_start, ctx, run, shape, state
        )
        if left is not None:
            await _started(ctx, run, picture, left)

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
        begin, duration = _ended(run, node, begin)
        if passes_through(error, cancelling, in_group=type(node) is not Node):
            await _abandon(ctx, run, begin, duration, picture, error)
            raise
        raised = error
    else:
        duration = perf_counter_ns() - begin
        if run.parent is not None or type(node) is not Node:
            begin, duration = _ended(run, node, begin)

    # ---- usage, at once: it is spent whatever becomes of the output
    bad_usage: UsageError | None = None
    cancelled = False
    stopped: BaseException | None = None
    if type(output) is tuple:
        output, bad_usage = count_returned(run, output)
    if run.reported is not None:
        cancelled, unpriced = await price(ctx, run)
        bad_usage = bad_usage or unpriced
    if run.counted is not NO_USAGE:
        ctx.cost_tracker.spend(run.counted.tokens, run.counted.cost_usd)
    if not run.branch:  # What functions inside a group took is what the group takes.
        ctx.cost_tracker.latency_ns += duration if type(node) is Node else run.busy_ns
    if raised is not None:
        if isinstance_by_type(raised, Suspend) or (
            isinstance_by_type(raised, GroupStopped) and raised.halt.suspended
        ):
            return await _suspend(ctx, run, raised, begin, duration, picture, cancelled=cancelled)
        if bad_usage is not None and not bad_usage.silent:
            # Another attempt would buy more at a price that no limit can count.
            bad_usage.__cause__, raised = raised, bad_usage
        failed = _fail(ctx, run, raised, begin, duration, picture, cancelled=cancelled)
        # What it raised knows the frames that it passed, and so this one: a circle that only the collector would end.
        del raised, run
        return await failed

    # ---- the output
    lends = ctx.lends and not run.branch  # That of a child is read by others than the next node.
    try:
        if type(node) is Node:
            model, kept = promised.accept_output(output, lends)
        else:
            model, kept = promised.assemble(output)
    except BaseException as broken:
        if ends_run(broken):
            await _abandon(ctx, run, begin, 0, picture, broken)
            raise
        violation = output_violation(run.node_id, output, broken, promised.model)
        if bad_usage is not None and not bad_usage.silent:
            bad_usage.__cause__, violation = violation, bad_usage
        return await _fail(ctx, run, violation, begin, duration, picture, cancelled=cancelled)

    pictured: PickledSnapshot | bytes | None = None
    lent = False
    if type(kept) is not tuple and ctx.chained and promised.is_reusable(kept):
        pictured = cast("PickledSnapshot | bytes", kept)
        lent = lends and type(kept) is PickledSnapshot and type(node) is Node

    # ---- the verdict, before the commit and part of it
    failure: Failure | None = None
    if bad_usage is not None or ctx.limits:
        over: Exception | None = bad_usage
        if over is None:
            over = ctx.cost_tracker.exceeded(ctx._budget, run.node_id)
        if over is not None:
            where = NodeContext(run.node_id, run.attempt, ctx.run_id)
            try:
                failure = diagnose(over, where, ctx.classifiers)
            except BaseException as error:  # KeyboardInterrupt in a classifier.
                stopped, failure = error, diagnose(over, where)  # The output is paid for all the same.

    # ---- the commit: from here on the output is safe from budgets, hooks and cancellation
    if (
        failure is None and run.counted is NO_USAGE
    ):  # What make_row would give, without its call and its questions.
        row = AttemptRow(
            run.node_id, run.attempt, begin + ctx.epoch_ns, duration, picture, kept,
            "success", None, None, run.position, run.branch, run.group, run.schemas, run.children,
            duration if type(node) is Node else run.busy_ns,
        )  # fmt: skip
    else:
        row = make_row(
            run, begin, duration, picture, kept, failure, "success" if failure is None else "failure"
        )
    pending: Awaitable[None] | Exception | None
    problem: Exception | None = None
    try:
        try:
            pending = ctx.session.record(row, promised, model, run.step)
        except BaseException as refused:
            pending = refusal(refused)
        if pending is not None:
            problem, late = await settle(ctx, row, promised, model, run.step, pending)
            cancelled = cancelled or late
            if problem is None:
                row = refer(ctx, row)
    except BaseException as interrupt:  # KeyboardInterrupt in a store.
        await _abandon(ctx, run, begin, 0, picture, interrupt)
        raise
    if problem is not None:
        return await _fail(ctx, run, problem, begin, duration, picture, cancelled=cancelled, of_store=True)
    run.rows.append(row)
    if (
        ctx.step_policies
    ):  # With the commit: a cancellation that comes after it must not have the node called again.
        _remember(ctx, run, model)
    if not run.branch:
        ctx.newest, ctx.pictured, ctx.lent = model, pictured, lent

    # ---- who watches
    if failure is not None:
        await tell_failure(ctx, run, failure, row)
    elif fire.on_node_success is not None:
        run.ended = row
        left = fire.fire_soon(
            "on_node_success", fire.on_node_success, run.node_id, of_success, ctx, run, promised, model
        )
        if left is not None:
            arguments = partial(of_success, ctx, run, promised, model)
            await tell_end(ctx, run, fire.on_node_success, row, arguments, left)
        elif ctx.delivers:
            ctx.session.delivered(row)
    if ctx.limits and fire.on_budget_warning is not None:
        await warn_of_budget(ctx)
    if stopped is not None:
        raise stopped
    if cancelled:
        raise asyncio.CancelledError
    return model if failure is None else Halt(failure, output=model, spent=bad_usage is None)


def _ended(run: NodeExecution, node: Node | Group, begin: int) -> tuple[int, int]:
    """Return when the function began and how long it took, in ns; for a group, from its first function to its last."""
    if type(node) is not Node:
        return (run.first_ns, run.last_ns - run.first_ns) if run.first_ns else (begin, 0)
    now = perf_counter_ns()
    if run.parent is not None:
        run.parent.leave(now)
    return begin, now - begin


def _take_unvalidated(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, value: BaseModel
) -> tuple[BaseModel, Snapshot]:
    """The input of a node without a contract, or of a group, each child of which takes its own copy."""
    assert run.schemas is not None  # _plan() has looked at the value.
    schema, pictured = run.schemas[0], ctx.pictured
    if type(node) is Node and value is ctx.newest and type(pictured) is PickledSnapshot:
        return schema.restore(pictured), pictured
    value = ctx.settled(value)
    if type(node) is not Node:
        picture = schema.snapshot(value)
        run.taken = value, picture
        return value, picture
    shared = None if run.parent is None else run.parent.taken
    picture = shared[1] if shared is not None and shared[0] is value else schema.snapshot(value)
    return schema.copy(value), picture


def _raw_picture(value: Any) -> dict[str, Any]:
    return schema_of(type(value)).state(value) if isinstance(value, BaseModel) else {"value": value}


async def _fail(
    ctx: ReliabilityContext,
    run: NodeExecution,
    exc: BaseException,
    begin: int,
    duration: int,
    picture: Snapshot,
    *,
    cancelled: bool = False,
    of_store: bool = False,
) -> Failure | Halt:
    """One failed attempt: classified, recorded, shown to the hooks."""
    halt: Halt | None = None
    if isinstance_by_type(exc, GroupStopped):
        child = exc.halt.failure
        failure = Failure(
            child.exception, child.failure_class, run.node_id, run.attempt, child.message, child.reason,
            child.retry_after_seconds,
        )  # fmt: skip
        if exc.halt.spent or exc.halt.partial:
            halt = Halt(failure, partial=exc.halt.partial, spent=exc.halt.spent)
    else:
        try:
            failure = diagnose(exc, NodeContext(run.node_id, run.attempt, ctx.run_id), ctx.classifiers)
        except BaseException as stopped:  # KeyboardInterrupt in a classifier, say.
            await _abandon(ctx, run, begin, 0, picture, stopped)
            raise
        if isinstance_by_type(exc, PipelineChanged):  # Of a step inside: whoever tries again meets the same.
            failure = replace(failure, failure_class=FailureClass.TERMINAL, reason="changed")
        failure = ctx.scrubbed(failure, picture)
        for probe in ctx.probes:
            failure = probe.diagnosed(run, failure)
        if isinstance_by_type(exc, ContractViolation) and _may_repair(ctx, run, failure):
            run.repairing = True
            failure = replace(failure, failure_class=FailureClass.RECOVERABLE)
        if isinstance_by_type(exc, _Deadline) and exc.ctx is ctx:
            halt = Halt(failure, spent=True)
        elif of_store and isinstance_by_type(exc, StoreError):
            failure = Failure(
                exc, FailureClass.RECOVERABLE, run.node_id, run.attempt, failure.message, "store"
            )
            halt = Halt(failure, partial=True)
    row = refer(ctx, make_row(run, begin, duration, picture, None, failure, "failure"))
    run.rows.append(row)
    interrupt: BaseException | None = None
    if not (halt is not None and failure.reason == "store"):
        problem, late = None, False
        try:
            pending = record(ctx, row)
            if pending is not None:
                problem, late = await settle(ctx, row, None, None, None, pending)
        except GeneratorExit:
            told = (ctx.run_id, run.node_id, ctx.shown_error(failure.exception), failure.failure_class)
            tell_closed(ctx, run, ctx.fire.on_node_failure, row, lambda: told)
            raise
        except BaseException as error:  # KeyboardInterrupt in a store.
            interrupt = error
        cancelled |= late
        if problem is not None:
            stored = Failure(
                problem, FailureClass.RECOVERABLE, run.node_id, run.attempt, str(problem), "store"
            )
            halt = Halt(stored, partial=True)
    await tell_failure(ctx, run, failure, row)
    if ctx.limits and ctx.fire.on_budget_warning is not None:
        await warn_of_budget(ctx)
    if interrupt is not None:
        raise interrupt
    if cancelled:
        raise asyncio.CancelledError
    return failure if halt is None else halt


async def _suspend(
    ctx: ReliabilityContext,
    run: NodeExecution,
    raised: BaseException,
    begin: int,
    duration: int,
    picture: Snapshot,
    *,
    cancelled: bool,
) -> Failure | Halt:
    """An attempt that waits for a person: kept with what it waits for, shown to the hooks, and no failure."""
    row = make_row(run, begin, duration, picture, None, None, "suspended")
    if isinstance_by_type(raised, Suspend):
        ctx.note_secrets(picture)
        reason = ctx.masked(message_of(raised))
        ref = "" if raised.schema is None else schema_ref(raised.schema)
        waiting = Waiting(run.position, run.branch, run.node_id, reason, ref)
    else:  # A group; its children have said what for.
        assert isinstance_by_type(raised, GroupStopped)
        reason, waiting = raised.halt.failure.message, None
    pending: Awaitable[None] | Exception | None
    try:
        try:
            keep = (
                ctx.session.record(row, None, None) if waiting is None else ctx.session.suspend(row, waiting)
            )
            pending = keep
        except BaseException as refused:
            pending = refusal(refused)
        problem, late = (
            (None, False) if pending is None else await settle(ctx, row, None, None, None, pending, waiting)
        )
    except BaseException as interrupt:  # KeyboardInterrupt in a store.
        await _abandon(ctx, run, begin, 0, picture, interrupt)
        raise
    cancelled |= late
    if problem is not None:
        return await _fail(ctx, run, problem, begin, duration, picture, cancelled=cancelled, of_store=True)
    if waiting is not None:
        ctx.suspended.append(reason)
    run.rows.append(row)
    ctx.run_logger.info("node %r waits: %s", run.node_id, one_line(reason))
    run.ended = row
    calls = ctx.fire.on_node_suspended
    if calls is not None:
        await tell_end(ctx, run, calls, row, lambda: (ctx.run_id, run.node_id, reason))
    if cancelled:
        raise asyncio.CancelledError
    failure = Failure(
        raised if isinstance(raised, Exception) else Suspend(reason),
        FailureClass.RECOVERABLE, run.node_id, run.attempt, reason,
    )  # fmt: skip
    return Halt(failure, suspended=True)


def _may_repair(ctx: ReliabilityContext, run: NodeExecution, failure: Failure) -> bool:
    """Whether the config grants another attempt after an output that broke its contract."""
    granted = ctx.config.contract_retries.get(run.node_id, 0)
    direction = getattr(failure.exception, "direction", None)
    if getattr(failure.exception, "node_id", None) != run.node_id:
        return False  # Of a run inside the node: not its own output.
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
    calls = ctx.fire.on_node_cancelled
    if calls is not None and reached is not None:
        calls = tuple(call for call in calls if call[0] < reached)
    if isinstance(why, GeneratorExit):  # The coroutine is being closed: nothing may be awaited any more.
        row = make_row(run, begin, duration, picture, None, None, "cancelled")
        run.rows.append(row)
        tell_closed(ctx, run, calls, row, lambda: (ctx.run_id, run.node_id))
        return
    if run.reported is not None:
        await price(ctx, run)
        ctx.cost_tracker.spend(run.counted.tokens, run.counted.cost_usd)
    if not run.branch:
        ctx.cost_tracker.latency_ns += min(run.busy_ns, duration) if run.kind == "group" else duration
    run.ended = row = make_row(run, begin, duration, picture, None, None, "cancelled")
    run.rows.append(row)
    stopped: BaseException | None = None
    try:
        pending = record(ctx, row)
        if pending is not None:
            await settle(ctx, row, None, None, None, pending)
    except GeneratorExit:
        tell_closed(ctx, run, calls, row, lambda: (ctx.run_id, run.node_id))
        raise
    except BaseException as error:  # KeyboardInterrupt in a store.
        stopped = error
    if calls is not None:
        try:
            await tell_end(ctx, run, calls, row, lambda: (ctx.run_id, run.node_id))
        except HookNotAsync as error:
            # What ended the attempt is on its way out, and must come out as itself.
            ctx.run_logger.warning("%s", error)
    if stopped is not None:
        raise stopped


async def _started(
    ctx: ReliabilityContext,
    run: NodeExecution,
    picture: Snapshot,
    left: Coroutine[Any, Any, None],
) -> None:
    begin = perf_counter_ns()
    try:
        await left
    except BaseException as stopped:
        # The sets that saw the start see the end.
        reached = stopped.set_index if isinstance(stopped, HookNotAsync) else None
        await _abandon(ctx, run, begin, 0, picture, stopped, reached)
        raise


# ---------------------------------------------------------------------- calling


async def _call(ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, state: BaseModel) -> Any:
    if isinstance(node, Group):
        run.children, run.busy_ns, run.running, run.first_ns, run.last_ns = [], 0, 0, 0, 0
        return await node.run(ctx, run, state)
    context = ctx.node_context() if node.wants_context else ctx.context
    if node.is_async:
        return await node.call(state, context)
    returned = await in_thread(node.call, (state, context))
    return await returned if isinstance(returned, Awaitable) else returned


async def _call_probed(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, state: BaseModel
) -> Any:
    call: Call = partial(_call, ctx, run, node)
    for probe in reversed(ctx.probes):
        call = partial(probe.call, run, node, call)
    return await call(state)


class _Deadline(BudgetExceeded):
    """The latency budget ran out under the function in flight."""

    ctx: ReliabilityContext | None = None  # the run whose budget it was: a nested run has one of its own

    def __reduce__(self) -> Any:
        return (BudgetExceeded, self.args)


async def _call_in_time(
    ctx: ReliabilityContext, run: NodeExecution, node: Node | Group, state: BaseModel, begin: int
) -> Any:
    """Call under the node's timeout and the run's latency deadline, whichever is nearer."""
    limit = ctx._budget.max_latency_ms
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
            if ctx.probes:
                return await _call_probed(ctx, run, node, state)
            return await _call(ctx, run, node, state)
    except TimeoutError:
        if not scope.expired():
            raise
        if left < own:
            assert limit is not None
            now = perf_counter_ns()
            used = ctx.cost_tracker.used("latency") + (run.busy(now) if run.parent else now - begin) / 1e6
            deadline = _Deadline("latency", limit, max(used, limit), run.node_id)
            deadline.ctx = ctx
            raise deadline from None
        raise TimeoutError(
            f"node {run.node_id!r} did not end within {timeout_ms} ms (node_timeouts)"
        ) from None
