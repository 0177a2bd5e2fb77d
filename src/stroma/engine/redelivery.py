"""Redeliver end hooks that a crashed process did not call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from stroma.checkpoint import Committed, StepCall
from stroma.checkpoint.identity import is_called
from stroma.contracts.node import Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT, leave
from stroma.engine.execution import Kind, RunningNode
from stroma.engine.redaction import UnreadState
from stroma.engine.restore import node_at, output_schema, raw_output, read_output
from stroma.failures.errors import RunFailed
from stroma.hooks.dispatch import HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow

__all__ = ["redeliver"]


async def redeliver(ctx: ReliabilityContext, nodes: Sequence[Node | Group]) -> None:
    """Call the pending end hooks of earlier processes, oldest first; they add nothing to trace and totals."""
    identities = {position: identity for identity, position in ctx.session.places.items()}
    for row in ctx.session.undelivered:
        node, group = (None, None) if is_called(row.branch) else node_at(nodes, row.position, row.branch)
        is_item = group is not None and group.is_map
        kind: Kind = "group" if isinstance(node, Group) else "item" if is_item else "node"
        run = RunningNode(ctx, row.node_id, kind, row.position, row.branch)
        run.attempt, run.counted, run.ended, run.redelivered = row.attempt, row.usage or NO_USAGE, row, True
        run.step = StepCall(0, None, identities.get(row.position))
        token = CURRENT.set(run)
        try:
            await _call_hooks(ctx, run, row, node)
        finally:
            run.close()
            leave(token)


async def _call_hooks(
    ctx: ReliabilityContext, run: RunningNode, row: AttemptRow, node: Node | Group | None
) -> None:
    event = f"on_node_{row.outcome}"
    calls = getattr(ctx.fire, event, None)
    if calls:
        failed, committed = row.failure, await _committed(ctx, row)

        def arguments(reads_state: bool = True) -> tuple[Any, ...]:
            at = (ctx.run_id, run.node_id)
            if row.outcome == "success":
                return (*at, _output(ctx, row, node, committed, reads_state), run.counted.tokens)
            if failed is None:
                return at
            if row.outcome == "suspended":
                return (*at, failed.message)
            return (*at, RunFailed.recorded(failed.message, failed.error_type), failed.failure_class)

        try:
            await ctx.fire.fire(event, calls, run.node_id, arguments, unread=lambda: arguments(False))
        except (asyncio.CancelledError, HookNotAsync):  # They come out once every set was called.
            ctx.session.delivered(row)
            raise
    ctx.session.delivered(row)


async def _committed(ctx: ReliabilityContext, row: AttemptRow) -> Committed | None:
    committed = ctx.journal.restored.get((row.position, row.branch))
    if committed is None and row.branch and row.outcome == "success":  # Those of a map may be read lazily.
        outputs: Any = ctx.session.committed(row.position, [row.branch])
        committed = (await outputs if inspect.isawaitable(outputs) else outputs).get(row.branch)
    return committed


def _output(
    ctx: ReliabilityContext,
    row: AttemptRow,
    node: Node | Group | None,
    committed: Committed | None,
    reads_state: bool,
) -> dict[str, Any]:
    """Return the output that was committed with an attempt, in the form for its hook."""
    if committed is None or committed.is_failed_item:
        return {}  # It was discarded since.
    if isinstance(node, Node) and node.node_id == row.node_id:
        schema = output_schema(ctx, node, None)
        try:
            model = read_output(schema, committed, None)
        except ValueError:
            pass  # The schema has changed: the run is about to be refused, or to upcast.
        else:
            unread = UnreadState(schema, model, ctx.redactor)
            return unread.shown() if reads_state else unread
    if not reads_state:
        return {}
    raw = raw_output(committed)
    return ctx.redactor.redact_state(raw if isinstance(raw, dict) else {"value": raw})
