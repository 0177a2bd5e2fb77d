"""The loop: attempt, decide, wait.

Every driver (the local runner, ``execute_step``, groups, adapters) enters at :func:`execute` or, if it has
many nodes in turn, at :func:`execute_in_turn`, once per node and position. One attempt
(:mod:`stroma.engine.attempt`), in this order:

1. validate the input, call the start hooks;
2. call the function, under its time limit;
3. count the usage, validate the output, reach the verdict on the budget;
4. commit: one store call, one row of the trace. Nothing that comes later can lose it;
5. call the success or failure hooks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma.contracts.contract import ContractViolation, NodeContract
from stroma.contracts.node import Group, Node, contract_of_node, output_class
from stroma.contracts.schema import schema_of
from stroma.cost.budget import BudgetExceeded
from stroma.engine.admission import make_admitted
from stroma.engine.attempt import NodeAttempt
from stroma.engine.commit import violation_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode, leave
from stroma.engine.outcome import (
    STOPPED,
    Halt,
    Place,
    Stopped,
    crossed_limit,
    halt_of_ended_run,
    hold,
    refuse,
)
from stroma.engine.restore import output_schema, restore
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.failures.mistakes import is_repeated_mistake
from stroma.failures.policy import Retry, Stop, follow_up
from stroma.trace.events import NO_USAGE, Schemas

_SPENT: Final = Stop("the budget is spent")
sleep = asyncio.sleep


async def execute(
    ctx: ReliabilityContext, node: Node | Group, value: BaseModel, place: Place
) -> BaseModel | Halt:
    """Run a node at one position until it is committed or has stopped for good.

    The output is committed when this returns it. Raises cancellations, KeyboardInterrupt, SystemExit and
    HookNotAsync, and StoreError if the journal's entry for this position does not fit; all else is a Halt.
    """
    finished = ctx.session.finished
    if finished is not None and (place.position, place.branch) not in ctx.journal.restored:
        return halt_of_ended_run(ctx, node.node_id, finished)
    around = CURRENT.get()
    token = CURRENT.set(around)
    try:
        # STOPPED would be for a further node. No local variable has the outcome: see execute_in_turn().
        return cast("BaseModel | Halt", note_end(around, await execute_in_turn(ctx, (node,), value, place)))
    finally:
        leave(token)


def note_end(around: RunningNode | None, outcome: Any) -> Any:
    """Record the exception of a halted execution or run in the node around it, and return the outcome.

    A group ends with the exception of a child anyway, and a map can have many.
    """
    if around is not None and around.kind != "group" and type(outcome) is Halt:
        around.note_raised(outcome.failure.exception)
    return outcome


async def execute_in_turn(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], value: BaseModel, place: Place
) -> BaseModel | Halt | Stopped:
    """:func:`execute` for nodes in turn, each at the next position and on the output of the one before.

    STOPPED if no further node may start (see Stopping). The last node stays the current one: the caller
    restores the previous one, or ends its task.
    """
    # One coroutine for all nodes of a run, since it costs as much as the loop itself.
    first, branch, kind, parent, contract, step, cancelling, restores, role, is_called, settles = place
    journal, stopping, account = ctx.journal, ctx.stopping, ctx.account
    task: asyncio.Task[Any] | None = None
    attempt, is_gated = NodeAttempt(ctx), ctx.config.gated
    is_special = is_called or settles or role is not None
    for position, node in enumerate(nodes, first):
        if position != first:
            if stopping.is_asked:
                return STOPPED
            task = task or asyncio.current_task()
            if task is not None and task.cancelling() != cancelling:
                # Either a cancellation is pending, and this await raises it; or a TaskGroup of the node has
                # left one behind.
                await asyncio.sleep(0)
                cancelling = task.cancelling()
        if branch and restores and (position, branch) in ctx.handover.done:
            value = ctx.handover.done[position, branch]
            continue
        if journal.restored and restores:
            committed = await restore(ctx, node, value, place._replace(position=position))
            if committed is not None:
                if ctx.step_policies and parent is not None and parent.kind == "group" and parent.remembers:
                    ctx.handover.done[position, branch] = committed
                value = committed
                continue
        run = RunningNode(
            ctx, node.node_id, kind if type(node) is Node else "group", position, branch, parent
        )
        try:
            run.schemas = _schemas_of(ctx, node, value, contract)
        except Exception as error:
            return await reject(ctx, run, node, value, error)
        if step is not None:
            run.step = step
        if is_special:
            run.is_called, run.settles, run.framework_role = is_called, settles, role
        CURRENT.set(run)
        number = 0  # Not read from the execution, which hooks can change.
        try:
            if journal.tried:
                number, halt = _count_earlier_attempts(ctx, run, node)
                if halt is not None:
                    return halt
            while True:
                number += 1
                run.attempt = number
                if stopping.holds:
                    return await hold(ctx, run.node_id, number)
                if account.limits or account.uncounted is not None:
                    exceeded = crossed_limit(ctx, run)
                    if exceeded is not None:
                        # Earlier attempts, siblings or processes have used it up: the next call is never
                        # made.
                        return refuse(run, exceeded)
                if type(node) is not Node or (node.is_async and not is_gated):
                    outcome = await attempt.make(run, node, value, cancelling)
                else:
                    make = partial(attempt.make, run, node, value, cancelling)
                    outcome = await make_admitted(run, node, make)
                if type(outcome) is not Failure:
                    break
                decision = _decide(ctx, run, node, outcome, number)
                if isinstance(decision, Stop):
                    outcome = _stop(run, outcome, decision)
                    break
                await _wait(ctx, run, outcome, number, decision.delay_seconds)
                if stopping.is_cancelled:  # A step of plain code, whose task is the caller's own.
                    outcome = _stop(run, outcome, Stop("the run was cancelled"))
                    break
                run.ended = run.attempt_id = None
                task = task or asyncio.current_task()
                if task is not None:
                    cancelling = task.cancelling()
        finally:
            if run._at_end is not None:
                run.close()
            if run.raised_inside is not None:
                run.raised_inside = None
            # The traceback of a failure references this frame: nothing in it may reference the failure (a
            # cycle on 3.12).
            del run
        if type(outcome) is Halt:
            try:
                return outcome
            finally:
                del outcome
        value = outcome
    return value


# ---------------------------------------------------------------------- before an attempt


def _schemas_of(
    ctx: ReliabilityContext, node: Node | Group, value: BaseModel, contract: NodeContract[Any, Any] | None
) -> Schemas:
    """Return the schemas of input and output, with the contract. Without one the input is not validated."""
    if type(node) is not Node:
        return schema_of(type(value)), output_schema(ctx, node, value), None
    contract = contract or contract_of_node(node, ctx.registry)
    if contract is None:
        return schema_of(type(value)), schema_of(output_class(None)), None
    # Looking schemas up is a tenth of the engine's time: the node caches them while contract and classes are
    # the same.
    known = node.plan[0]
    if known is not None:
        before, after, of = known
        # model_rebuild() gives a class another validator.
        if (
            of is not contract
            or before.namespace["__pydantic_validator__"] is not before.validator
            or after.namespace["__pydantic_validator__"] is not after.validator
        ):
            known = None
    if known is None:
        known = node.plan[0] = schema_of(contract.input_schema), schema_of(contract.output_schema), contract
    return known


async def reject(
    ctx: ReliabilityContext, run: RunningNode, node: Node | Group, value: BaseModel, error: Exception
) -> Halt:
    """Return the end of a node whose input, or contract, cannot be read: it is recorded, and not called."""
    CURRENT.set(run)
    try:
        run.attempt = 1
        run.schemas = schema_of(type(value)), schema_of(output_class(None)), None
        outcome = await NodeAttempt(ctx).make(run, node, value, 0, error)
        return Halt(run.marked(outcome)) if isinstance(outcome, Failure) else cast("Halt", outcome)
    finally:
        run.close()


def _count_earlier_attempts(
    ctx: ReliabilityContext, run: RunningNode, node: Node | Group
) -> tuple[int, Halt | None]:
    """Return how many attempts dead processes made, and the node's end if no further attempt follows."""
    tried = ctx.journal.tried.pop((run.position, run.branch), None) if ctx.journal.tried else None
    if tried is None or tried.node_id != run.node_id:
        return 0, None
    count = run.attempt = tried.attempts
    run.repairs = min(tried.repairs, ctx.config.contract_retries.get(run.node_id, 0))
    # It was granted before the process died: _decide() grants it again.
    if tried.is_repaired and run.repairs:
        run.repairing, run.repairs = True, run.repairs - 1
    contract, broken = contract_of_node(node, ctx.registry), None
    if tried.rejected is not None and contract is not None:
        broken = violation_of(tried.node_id, tried.rejected, contract.output_schema)
    failure = Failure(
        broken
        if broken is not None and tried.is_repaired
        else RunFailed.recorded(tried.message, tried.error_type),
        FailureClass(tried.failure_class),
        run.node_id,
        count,
        tried.message,
        tried.reason,
        earlier=broken,
        mark=tried.mark,
    )
    run.last_failure = failure
    decision = _decide(ctx, run, node, failure, count)
    return count, _stop(run, failure, decision) if isinstance(decision, Stop) else None


# ---------------------------------------------------------------------- after a failed attempt


def _decide(
    ctx: ReliabilityContext, run: RunningNode, node: Node | Group, failure: Failure, attempt: int
) -> Retry | Stop:
    if ctx.account.limits and ctx.cost_tracker.exceeded(ctx.budget, failure.node_id) is not None:
        return _SPENT
    if ctx.stopping.is_cancelled:  # The node turned it into an error of its own.
        return Stop("the run was cancelled")
    if run.is_final:
        return Stop("its caller has a part of the result, or it must not be called twice")
    if is_repeated_mistake(run.last_failure, failure):
        return Stop("two attempts failed in the same way at the same line; it is probably a bug in the node")
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


def _stop(run: RunningNode, failure: Failure, decision: Stop) -> Halt:
    ctx = run.ctx
    ctx.run_logger.info("node %r stopped: %s", failure.node_id, decision.why)
    exceeded = ctx.cost_tracker.exceeded(ctx.budget, failure.node_id) if decision is _SPENT else None
    if exceeded is not None and not isinstance_by_type(failure.exception, BudgetExceeded):
        with contextlib.suppress(Exception):  # Its class may refuse attributes.
            BaseException.add_note(
                failure.exception,
                f"No further call is made, since the budget of the run is spent: {exceeded}",
            )
    return Halt(run.marked(failure), spent=decision is _SPENT)


async def _wait(
    ctx: ReliabilityContext, run: RunningNode, failure: Failure, attempt: int, delay: float
) -> None:
    """Wait between a failed attempt and the next one."""
    before = run.last_failure
    if before is not None:  # A correction holds until the model has answered it.
        error = before.exception
        broken = error if isinstance_by_type(error, ContractViolation) else before.earlier
        failure = replace(failure, earlier=broken)
    run.last_failure = failure
    run.counted = NO_USAGE
    if ctx.fire.on_node_retry is not None:
        about = run.node_id, attempt + 1, delay, failure.failure_class
        await ctx.fire.fire("on_node_retry", run.node_id, ctx.run_id, *about)
    if ctx.run_logger.isEnabledFor(logging.INFO):
        ctx.run_logger.info("node %r: attempt %d follows in %.3f s", run.node_id, attempt + 1, delay)
    if delay:
        await ctx.stopping.wait_unless_held(partial(sleep, delay))
    else:
        await sleep(0)
