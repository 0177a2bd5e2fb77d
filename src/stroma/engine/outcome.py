"""Ends and places of executions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, Final, NamedTuple, final

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import Finished, StepCall, StoreError
from stroma.contracts.contract import NodeContract, Role
from stroma.cost.budget import BudgetExceeded, budget_exceeded
from stroma.cost.usage import UsageError
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import Kind, RunningNode
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PAUSED, RunCancelled, RunFailed, Suspend, WaitedTooLong
from stroma.failures.failure import Failure, NodeContext, diagnose, isinstance_by_type
from stroma.trace.result import ExecutionResult, RunStatus


def limit_that_stopped(ctx: ReliabilityContext, result: ExecutionResult) -> BudgetExceeded | None:
    """Return the limit that stopped a run, also if its last failure is another one; else None."""
    failure = result.failure
    if failure is None:
        return None
    if isinstance(failure.exception, BudgetExceeded):
        return failure.exception
    is_partial = result.status is RunStatus.PARTIAL
    return ctx.cost_tracker.exceeded(ctx.budget, failure.node_id) if is_partial else None


@final
class Halt(NamedTuple):
    """An execution that stopped for good.

    Attributes:
        failure: the last failure.
        output: the output that was committed by an attempt that took the run over its budget.
        partial: trying again later may help, whatever the failure class is.
        spent: a limit of this run is crossed, and not only one of a run inside the node; or the usage of an
            attempt cannot be counted. No further call is made, whatever the code around it does.
        suspended: a node waits for a person. ``failure`` holds the reason then.
    """

    failure: Failure
    output: BaseModel | None = None
    partial: bool = False
    spent: bool = False
    suspended: bool = False

    @property
    def status(self) -> RunStatus:
        """SUSPENDED if a node waits, FAILED if another attempt would fail the same way, else PARTIAL."""
        if self.suspended:
            return RunStatus.SUSPENDED
        terminal = self.failure.failure_class is FailureClass.TERMINAL and not self.partial
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL


@final
class Stopped:
    """The run was stopped from elsewhere between two nodes: no further node begins."""

    __slots__ = ()


STOPPED: Final = Stopped()


class Paused(Suspend):
    """The suspension of a paused run: it waits to be resumed, not for an answer."""


class GroupStopped(Exception):
    """A child of a group, or a step that the guard of an adapter called, stopped for good.

    The execution around it fails with the inner exception and class.
    """

    def __init__(self, halt: Halt) -> None:
        super().__init__(halt)
        self.halt = halt


@final
class Place(NamedTuple):
    """Place of an execution: position, branch, parent and contract.

    Attributes:
        position: of the first node, 0-based.
        contract: precedes the registry, which precedes the marker.
        cancelling: the running task's count of cancellations when the driver began (0 in a task of its own),
            to tell a new one from a node's stray CancelledError.
        role: its framework_role; is_called: see RunningNode.
        restores: return the output that is committed there already; otherwise the function is called anyway.
        settles: find out how the call of an effect ended, and do not call it again: no code waits for it.
    """

    position: int = 0
    branch: str = ""
    kind: Kind = "node"
    parent: RunningNode | None = None
    contract: NodeContract[Any, Any] | None = None
    step: StepCall | None = None
    cancelling: int = 0
    restores: bool = True
    role: Role | None = None
    is_called: bool = False
    settles: bool = False


def crossed_limit(ctx: ReliabilityContext, run: RunningNode) -> BudgetExceeded | UsageError | None:
    """Return the limit that is crossed, including the time of the group around the node so far.

    Also usage that cannot be counted: the limits cannot be applied after it.
    """
    if ctx.account.uncounted is not None:
        return ctx.account.uncounted
    exceeded = ctx.cost_tracker.exceeded(ctx.budget, run.node_id)
    limit = ctx.budget.max_latency_ms
    if exceeded is None and limit is not None and run.parent is not None:
        used = ctx.cost_tracker.used("latency") + run.busy(perf_counter_ns()) / 1e6
        if used > limit:
            return budget_exceeded(ctx.budget, "latency", used, run.node_id)
    return exceeded


def refuse(run: RunningNode, error: Exception) -> Halt:
    """Return the end of a node whose next attempt may not be made."""
    if run.last_failure is not None and error.__cause__ is None:
        error.__cause__ = run.last_failure.exception
    failure = run.ctx.diagnose(error, run.node_id, run.attempt)
    if isinstance_by_type(error, WaitedTooLong):
        failure = replace(failure, retry_after_seconds=error.retry_after)
    run.ctx.run_logger.info("node %r is not called: %s", run.node_id, one_line(failure.message))
    if isinstance_by_type(error, StoreError):
        failure = replace(failure, failure_class=FailureClass.RECOVERABLE, reason="store")
        return Halt(failure, partial=True)
    return Halt(
        failure, spent=isinstance_by_type(error, BudgetExceeded) or error is run.ctx.account.uncounted
    )


async def refuse_late(run: RunningNode) -> Halt | None:
    """Return the end of an attempt that may not begin since the run was paused, or a limit crossed."""
    ctx = run.ctx
    if ctx.stopping.holds:
        return await hold(ctx, run.node_id, run.attempt)
    is_limited = ctx.account.limits or ctx.account.uncounted is not None
    exceeded = crossed_limit(ctx, run) if is_limited else None
    return None if exceeded is None else refuse(run, exceeded)


def cancelled(ctx: ReliabilityContext, node_id: str) -> Halt:
    """Return the end of a step of plain code that is not called, since its run was cancelled."""
    error = RunCancelled(
        f"run {ctx.run_id!r} was cancelled and step {node_id!r} is not called; resume the run, or call the "
        "step in another run"
    )
    return Halt(Failure(error, FailureClass.TERMINAL, node_id, 1, str(error)))


def halt_of_ended_run(ctx: ReliabilityContext, node_id: str, finished: Finished) -> Halt:
    """Return the end of a step that is not called, since its run was cancelled or given up as poison."""
    error = RunFailed(finished.error or f"run {ctx.run_id!r} has ended: {finished.status}")
    failure = diagnose(error, NodeContext(node_id, 1, ctx.run_id))
    kind = FailureClass.TERMINAL if finished.status == RunStatus.FAILED else FailureClass.RECOVERABLE
    return Halt(replace(failure, failure_class=kind, reason=finished.reason or failure.reason))


async def hold(ctx: ReliabilityContext, node_id: str, attempt: int) -> Halt:
    """Return the end of a node in a paused run. Never returns in a run that is being cancelled."""
    if not ctx.stopping.is_paused:
        await asyncio.get_running_loop().create_future()  # The cancellation of the task is on its way.
    return paused(ctx, node_id, attempt)


def paused(ctx: ReliabilityContext, node_id: str, attempt: int) -> Halt:
    """Return the end of a node of a paused run."""
    ctx.account.note_suspended(PAUSED)
    ctx.run_logger.info("node %r is not called: the run is paused", node_id)
    failure = Failure(Paused(PAUSED), FailureClass.RECOVERABLE, node_id, attempt, PAUSED)
    return Halt(failure, suspended=True)
