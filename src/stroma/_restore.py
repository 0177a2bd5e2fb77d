"""Committed outputs, in place of running their nodes again."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import Committed, CorruptCheckpoint, PipelineChanged
from stroma.context import CURRENT, Kind, NodeExecution, ReliabilityContext
from stroma.contracts import NodeContract
from stroma.nodes import Group, Kept, Node
from stroma.schemas import Schema, schema_of

__all__ = ["check_committed", "output_schema", "restore"]


async def restore(
    ctx: ReliabilityContext,
    node: Node | Group,
    value: BaseModel,
    position: int,
    *,
    branch: str = "",
    kind: Kind = "node",
    contract: NodeContract[Any, Any] | None = None,
    parent: NodeExecution | None = None,
) -> BaseModel | None:
    """The committed output of a position, in place of running it again; None if there is none.

    Raises PipelineChanged, or CorruptCheckpoint if what was kept cannot be read back.
    """
    committed = ctx.restored.get((position, branch))
    if committed is None:
        return None
    schema = schema_of(contract.output_schema) if contract is not None else output_schema(ctx, node, value)
    check_committed(
        ctx, node, schema, committed, position, branch, None if parent is None else parent.node_id
    )
    try:
        model = schema.trust(schema.restore(committed.output))
    except Exception as error:
        target = node.node_id
        while parent is not None:  # Children of groups are no targets of a resume.
            target, parent = parent.node_id, parent.parent
        raise CorruptCheckpoint(
            f"the output of node {node.node_id!r} at position {position} of run {ctx.run_id!r} cannot be read back: "
            f"{error}; resume from there (resume_from={target!r}) to make it anew"
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
    schema: Schema | None,
    committed: Committed,
    position: int,
    branch: str,
    group: str | None = None,
) -> None:
    """Raise PipelineChanged if a position holds the output of another node, or of another contract."""
    where = f"position {position}" + (f" ({branch})" if branch else "")
    if committed.node_id != node.node_id:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: at {where} it has the output of node {committed.node_id!r}, but the "
            f"pipeline has {node.node_id!r} there; restore the order of nodes, or begin a new run"
        )
    contract, _, recorded = committed.contract.partition(":")
    if (recorded or None) != group:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: the output of node {node.node_id!r} at {where} was made for "
            f"{recorded!r}, and the pipeline has {group!r} there; restore it, or begin a new run"
        )
    if schema is not None and contract != schema.fingerprint:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot go on: the output schema of node {node.node_id!r} at {where} is not the one that "
            f"its output was recorded with ({schema.model.__name__} has changed); restore it, or begin a new run"
        )
