"""Hooks and log lines of the end of an attempt."""

from __future__ import annotations

import logging
from typing import Any, Final

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.contracts.schema import Schema
from stroma.engine.config import limits_ms
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.redaction import UnreadState
from stroma.engine.tasks import TICK_SECONDS
from stroma.failures.failure import Failure

#: A node may block the event loop for less than this.
BLOCK_NS: Final = 1_000_000_000
#: A shorter time is not detected: the loop has its next tick after it.
MIN_BLOCK_NS: Final = int(2 * TICK_SECONDS * 1e9)


def start_arguments(
    ctx: ReliabilityContext, run: RunningNode, schema: Schema, state: BaseModel
) -> tuple[Any, ...]:
    """Return fresh arguments for one set of ``on_node_start`` hooks."""
    values = schema.state(state)
    return ctx.run_id, run.node_id, values if ctx.config.redact is None else ctx.redactor.redact_state(values)


def success_arguments(
    ctx: ReliabilityContext, run: RunningNode, schema: Schema, model: BaseModel
) -> tuple[Any, ...]:
    """Return fresh arguments for one set of ``on_node_success`` hooks."""
    values = schema.state(model)
    shown = values if ctx.config.redact is None else ctx.redactor.redact_state(values)
    return ctx.run_id, run.node_id, shown, run.counted.tokens


def unread_start(
    ctx: ReliabilityContext, run: RunningNode, schema: Schema, state: BaseModel
) -> tuple[Any, ...]:
    """Return the arguments of ``on_node_start`` for sets that read no state."""
    return ctx.run_id, run.node_id, UnreadState(schema, state, ctx.redactor)


def unread_success(
    ctx: ReliabilityContext, run: RunningNode, schema: Schema, model: BaseModel
) -> tuple[Any, ...]:
    """Return the arguments of ``on_node_success`` for sets that read no state."""
    return ctx.run_id, run.node_id, UnreadState(schema, model, ctx.redactor), run.counted.tokens


def failure_arguments(ctx: ReliabilityContext, run: RunningNode, failure: Failure) -> tuple[Any, ...]:
    """Return the arguments of ``on_node_failure`` hooks."""
    return ctx.run_id, run.node_id, ctx.redactor.redact_error(failure.exception), failure.failure_class


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
    calls = ctx.fire.on_budget_warning
    assert calls is not None
    for dimension, used, limit in ctx.account.due_warnings(ctx.cost_tracker):
        await ctx.fire.fire("on_budget_warning", calls, None, tuple, (ctx.run_id, dimension, used, limit))
