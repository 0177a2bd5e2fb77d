"""Findings about an attempt: its failure, and what is worth a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged, StoreError
from stroma.contracts.contract import ContractViolation
from stroma.contracts.copying import Snapshot
from stroma.cost.usage import UsageError
from stroma.engine.config import limits_ms
from stroma.engine.context import ReliabilityContext
from stroma.engine.deadlines import DeadlineExceeded
from stroma.engine.execution import RunningNode
from stroma.engine.outcome import GroupStopped, Halt
from stroma.engine.tasks import TICK_SECONDS
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, diagnose, isinstance_by_type
from stroma.failures.mistakes import explain_mistake
from stroma.trace.trace import states_of, thaw

#: A node may block the event loop for less than this.
BLOCK_NS: Final = 1_000_000_000
#: A shorter time is not detected: the loop has its next tick after it.
MIN_BLOCK_NS: Final = int(2 * TICK_SECONDS * 1e9)


def diagnose_attempt(
    ctx: ReliabilityContext, run: RunningNode, error: BaseException, snapshot: Snapshot, *, is_of_store: bool
) -> tuple[Failure, Halt | None]:
    """Return the failure of an exception, and the Halt if policies do not decide what follows.

    ``is_of_store``: the store refused the commit of an output.
    """
    if isinstance_by_type(error, GroupStopped):
        inner = ctx.redactor.mask_failure(error.halt.failure, snapshot)
        failure = Failure(
            inner.exception,
            inner.failure_class,
            run.node_id,
            run.attempt,
            inner.message,
            inner.reason,
            inner.retry_after_seconds,
            inner.inner or inner,
            mark=inner.mark,
        )
        if error.halt.spent or error.halt.partial:
            return failure, Halt(failure, partial=error.halt.partial, spent=error.halt.spent)
        return failure, None
    failure = ctx.diagnose(error, run.node_id, run.attempt, snapshot)
    if isinstance_by_type(error, PipelineChanged):  # Of a step inside: another attempt meets the same.
        failure = replace(failure, failure_class=FailureClass.TERMINAL, reason="changed")
    explained = explain_mistake(failure, ctx.context)
    if explained:
        failure = replace(failure, message=failure.message + ctx.redactor.mask(explained))
    failure = _redact(ctx, run, failure, snapshot)
    for interceptor in ctx.fire.interceptors:
        failure = interceptor.diagnosed(run, failure)
    if isinstance_by_type(error, ContractViolation) and _may_repair(ctx, run, failure):
        run.repairing = True
        failure = replace(failure, failure_class=FailureClass.RECOVERABLE)
    if isinstance_by_type(error, DeadlineExceeded) and error.ctx is ctx:
        return failure, Halt(failure, spent=True)
    if (
        is_of_store
        and isinstance_by_type(error, StoreError)
        and not isinstance_by_type(error, PipelineChanged)
    ):
        failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, failure.message, "store")
        return failure, Halt(failure, partial=True)
    return failure, None


def _redact(ctx: ReliabilityContext, run: RunningNode, failure: Failure, snapshot: Snapshot) -> Failure:
    if not ctx.redactor.is_on:
        return failure
    message = ctx.redactor.redact_message(failure.message, states_around(run, snapshot))
    return failure if message == failure.message else replace(failure, message=message)


def states_around(run: RunningNode, snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """Yield the states that an attempt may quote: its input, and those of the attempts inside it.

    Also those of the nodes whose code calls it: a step may be a function inside a function.
    """
    node: RunningNode | None = run
    while node is not None:
        state = snapshot if node is run else node.input_snapshot
        yield thaw(node.schemas and node.schemas[0], state) or {}
        yield from states_of(node.children or ())
        node = None if node.parent is None or node.parent.kind == "group" else node.parent


def judge(
    ctx: ReliabilityContext, run: RunningNode, usage_error: UsageError | None, snapshot: Snapshot
) -> tuple[Failure | None, BaseException | None]:
    """Return the failure beside a valid output (usage, a crossed limit), and the exception to raise.

    The latter is a KeyboardInterrupt in a classifier, for example: the output is committed in spite of it.
    """
    error = usage_error or ctx.cost_tracker.exceeded(ctx.budget, run.node_id)
    if error is None:
        return None, None
    try:
        return _redact(ctx, run, ctx.diagnose(error, run.node_id, run.attempt, snapshot), snapshot), None
    except BaseException as interrupt:
        return diagnose(error, NodeContext(run.node_id, run.attempt, ctx.run_id)), interrupt


def _may_repair(ctx: ReliabilityContext, run: RunningNode, failure: Failure) -> bool:
    """Return True if the config grants another attempt after an output that broke its contract."""
    error = failure.exception
    if getattr(error, "node_id", None) != run.node_id:
        return False  # Of a run inside the node: not its own output.
    is_output = getattr(error, "direction", None) == "output"
    granted = ctx.config.contract_retries.get(run.node_id, 0)
    return is_output and failure.failure_class is FailureClass.TERMINAL and run.repairs < granted


def log_failure(ctx: ReliabilityContext, run: RunningNode, failure: Failure) -> None:
    """Log a failed attempt."""
    if ctx.run_logger.isEnabledFor(logging.WARNING):
        ctx.run_logger.warning(
            "node %r%s failed at attempt %d (%s): %s",
            run.node_id,
            f" [{run.branch}]" if run.branch else "",
            run.attempt,
            failure.failure_class,
            one_line(str(failure)),
        )


def warn_of_blocking(ctx: ReliabilityContext, run: RunningNode, duration_ns: int) -> None:
    """Warn once of a node that blocked the event loop for 1 s, or for its whole time limit."""
    limits = limits_ms(ctx.step_timeouts.get(run.node_id))
    if duration_ns >= BLOCK_NS or any(ms is not None and duration_ns >= ms * 1_000_000 for ms in limits):
        ctx.warn_once(
            run.node_id,
            "blocks",
            f"node {run.node_id!r} blocked the event loop for {duration_ns / 1e6:,.0f} ms, so that no "
            "other task and no time limit "
            "could run; await in it, or define it with def instead of async def to run it in a thread",
        )


async def warn_of_budget(ctx: ReliabilityContext) -> None:
    """Call the ``on_budget_warning`` hooks for each limit that has just been used to 80 %."""
    for dimension, used, limit in ctx.account.due_warnings(ctx.cost_tracker):
        await ctx.fire.fire("on_budget_warning", None, ctx.run_id, dimension, used, limit)
