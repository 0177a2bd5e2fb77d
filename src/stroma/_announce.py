"""Telling the hooks and the log what became of an attempt."""

from __future__ import annotations

from pydantic import BaseModel

from stroma.context import NodeExecution, ReliabilityContext
from stroma.failures import Failure
from stroma.schemas import Schema
from stroma.trace import Row

__all__ = ["fire_success", "tell_failure", "warn_of_budget"]


async def fire_success(
    ctx: ReliabilityContext, run: NodeExecution, schema: Schema, model: BaseModel, row: Row
) -> None:
    run.ended = row
    calls = ctx.fire.on_node_success
    assert calls is not None
    await ctx.fire.fire(
        "on_node_success",
        calls,
        run.node_id,
        lambda: (ctx.run_id, run.node_id, ctx.shown(schema.state(model)), run.counted.tokens),
    )
    if ctx.delivers:
        ctx.session.delivered(row)


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
        await ctx.fire.fire("on_node_failure", calls, run.node_id, lambda: arguments)
        if ctx.delivers:
            ctx.session.delivered(row)


async def warn_of_budget(ctx: ReliabilityContext) -> None:
    for dimension, used, limit in ctx.due_warnings():
        arguments = (ctx.run_id, dimension, used, limit)
        assert ctx.fire.on_budget_warning is not None
        await ctx.fire.fire("on_budget_warning", ctx.fire.on_budget_warning, None, lambda: arguments)  # noqa: B023
