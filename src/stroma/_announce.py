"""Telling the hooks and the log what became of an attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import BaseModel

from stroma.context import ReliabilityContext
from stroma.execution import CURRENT, NodeExecution
from stroma.failures import Failure
from stroma.hooks import Calls, HookNotAsync
from stroma.schemas import Schema
from stroma.trace import OUTCOME, Row

__all__ = ["fire_success", "tell_end", "tell_failure", "warn_of_budget"]


async def tell_end(
    ctx: ReliabilityContext,
    run: NodeExecution,
    calls: Calls,
    row: Row,
    arguments: Callable[[], tuple[Any, ...]],
) -> None:
    """Fire the hooks of an attempt's end, and note that they were."""
    try:
        await ctx.fire.fire(f"on_node_{row[OUTCOME]}", calls, run.node_id, arguments)
    except GeneratorExit:  # The coroutine is being closed: the sets that are left see this end as well.
        token = CURRENT.set(run)  # Whoever closes it has a context of their own.
        try:
            ctx.fire.fire_now(f"on_node_{row[OUTCOME]}", ctx.fire.untold, run.node_id, arguments)
        finally:
            CURRENT.reset(token)
        raise
    except (asyncio.CancelledError, HookNotAsync):
        # They come out once every set was told: what was counted once must not be told again.
        if ctx.delivers:
            ctx.session.delivered(row)
        raise
    if ctx.delivers:
        ctx.session.delivered(row)


def fire_success(
    ctx: ReliabilityContext, run: NodeExecution, schema: Schema, model: BaseModel, row: Row
) -> Coroutine[Any, Any, None]:
    run.ended = row
    calls = ctx.fire.on_node_success
    assert calls is not None
    return tell_end(
        ctx,
        run,
        calls,
        row,
        lambda: (ctx.run_id, run.node_id, ctx.shown(schema.state(model)), run.counted.tokens),
    )


async def tell_failure(ctx: ReliabilityContext, run: NodeExecution, failure: Failure, row: Row) -> None:
    run.ended = row
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
        await tell_end(ctx, run, calls, row, lambda: arguments)


async def warn_of_budget(ctx: ReliabilityContext) -> None:
    for dimension, used, limit in ctx.due_warnings():
        arguments = (ctx.run_id, dimension, used, limit)
        assert ctx.fire.on_budget_warning is not None
        await ctx.fire.fire("on_budget_warning", ctx.fire.on_budget_warning, None, lambda: arguments)  # noqa: B023
