"""Telling the hooks and the log what became of an attempt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import BaseModel

from stroma.contracts.schema import Schema
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution
from stroma.failures.failure import Failure
from stroma.hooks.dispatch import Calls, HookNotAsync
from stroma.trace.events import AttemptRow

__all__ = ["of_start", "of_success", "tell_closed", "tell_end", "tell_failure", "warn_of_budget"]


async def tell_end(
    ctx: ReliabilityContext,
    run: NodeExecution,
    calls: Calls,
    row: AttemptRow,
    arguments: Callable[[], tuple[Any, ...]],
    begun: Coroutine[Any, Any, None] | None = None,
) -> None:
    """Fire the hooks of an attempt's end, and note that they were. ``begun``: what is left of that."""
    try:
        await (begun or ctx.fire.fire(f"on_node_{row.outcome}", calls, run.node_id, arguments))
    except GeneratorExit:  # The sets that are left see this end as well.
        tell_closed(ctx, run, ctx.fire.untold, row, arguments)
        raise
    except (asyncio.CancelledError, HookNotAsync):
        # They come out once every set was told: what was counted once must not be told again.
        if ctx.delivers:
            ctx.session.delivered(row)
        raise
    if ctx.delivers:
        ctx.session.delivered(row)


def tell_closed(
    ctx: ReliabilityContext,
    run: NodeExecution,
    calls: Calls | None,
    row: AttemptRow,
    arguments: Callable[[], tuple[Any, ...]],
) -> None:
    """Fire the hooks of an attempt's end where the coroutine is being closed: nothing may be awaited any more."""
    run.ended = row
    if calls is not None:
        token = CURRENT.set(run)  # Whoever closes it has a context of their own.
        try:
            ctx.fire.fire_now(f"on_node_{row.outcome}", calls, run.node_id, arguments)
        finally:
            CURRENT.reset(token)


def of_start(
    ctx: ReliabilityContext, run: NodeExecution, schema: Schema, state: BaseModel
) -> tuple[Any, ...]:
    """What the hooks of a start are given, fresh on each call."""
    seen = schema.state(state)
    return ctx.run_id, run.node_id, seen if ctx.config.redact is None else ctx.shown(seen)


def of_success(
    ctx: ReliabilityContext, run: NodeExecution, schema: Schema, model: BaseModel
) -> tuple[Any, ...]:
    """What the hooks of a success are given, fresh on each call."""
    seen = schema.state(model)
    return ctx.run_id, run.node_id, seen if ctx.config.redact is None else ctx.shown(seen), run.counted.tokens


async def tell_failure(
    ctx: ReliabilityContext, run: NodeExecution, failure: Failure, row: AttemptRow
) -> None:
    run.ended = row
    if ctx.run_logger.isEnabledFor(
        logging.WARNING
    ):  # Redacting the message takes the states around it apart.
        ctx.run_logger.warning(
            "node %r%s failed at attempt %d (%s): %s",
            run.node_id,
            f" [{run.branch}]" if run.branch else "",
            run.attempt,
            failure.failure_class,
            ctx.said(failure, row),
        )
    calls = ctx.fire.on_node_failure
    if calls is not None:
        arguments = (ctx.run_id, run.node_id, ctx.shown_error(failure.exception), failure.failure_class)
        left = ctx.fire.fire_soon("on_node_failure", calls, run.node_id, tuple, arguments)
        if left is not None:
            await tell_end(ctx, run, calls, row, lambda: arguments, left)
        elif ctx.delivers:
            ctx.session.delivered(row)


async def warn_of_budget(ctx: ReliabilityContext) -> None:
    for dimension, used, limit in ctx.due_warnings():
        arguments = (ctx.run_id, dimension, used, limit)
        assert ctx.fire.on_budget_warning is not None
        await ctx.fire.fire("on_budget_warning", ctx.fire.on_budget_warning, None, lambda: arguments)  # noqa: B023
