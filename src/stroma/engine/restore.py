"""Restoring of committed outputs instead of running their nodes again, and redelivery of end hooks."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from stroma._utils.access import error_text
from stroma.checkpoint import Committed, CorruptCheckpoint, PipelineChanged, StepCall, Waiting
from stroma.checkpoint.entries import OF_FLOW, Intent
from stroma.checkpoint.identity import child_indexes, is_called
from stroma.contracts.codec import decode_raw, describe_error
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.copying import StoredSnapshot, isolate
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node, held_by, last_in, output_class
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, Kind, RunningNode, leave
from stroma.engine.outcome import Place
from stroma.engine.redaction import HookState, Redactor
from stroma.failures.errors import ItemFailure, RunFailed
from stroma.hooks.dispatch import HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptRow

#: Nodes that a message names on each side of a difference.
_SHOWN_NODES: Final = 4


async def restore(
    ctx: ReliabilityContext, node: Node | Group, value: BaseModel, place: Place
) -> BaseModel | None:
    """Return the output that is committed at a place, so that its node does not run again; or None.

    Raises PipelineChanged, or CorruptCheckpoint if the stored output cannot be read back.
    """
    position, branch, parent, contract = place.position, place.branch, place.parent, place.contract
    committed = ctx.journal.restored.get((position, branch))
    if committed is None or committed.is_failed_item:
        return None
    schema = schema_of(contract.output_schema) if contract is not None else output_schema(ctx, node, value)
    check_committed(ctx, node, schema, committed, place)
    if isinstance(committed.output, StoredSnapshot):  # It is read here, and not all of a run's at once.
        committed = committed._replace(output=await asyncio.to_thread(committed.output.load))
    changed = committed.contract.partition(":")[0] != schema.fingerprint
    if changed and isinstance(node, Group):
        return None  # It is assembled again, of children that are restored one by one.
    try:
        model = read_output(schema, committed, _upcast(ctx, node, contract) if changed else None)
    except Exception as error:
        target = node.node_id
        while parent is not None:  # Children of groups are no targets of a resume.
            target, parent = parent.node_id, parent.parent
        why, cause = describe_error(error)
        raise CorruptCheckpoint(
            f"the output of node {node.node_id!r} at position {position} of run {ctx.run_id!r} cannot be "
            f"read back: {why}; resume from there (resume_from={target!r}) to run it again"
        ) from cause
    if not branch:
        ctx.handover.model = model
    if not (branch and isinstance(node, FlowNode)):  # The calls of an inner flow are restored one by one.
        ctx.account.failed_items += failed_items_in(ctx, position, branch)
    if ctx.fire.on_node_skipped is not None:
        kind: Kind = "group" if isinstance(node, Group) else place.kind
        run = RunningNode(ctx, node.node_id, kind, position, branch)
        token = CURRENT.set(run)
        try:
            view = HookState(schema, model, ctx.redactor)
            await ctx.fire.fire("on_node_skipped", node.node_id, ctx.run_id, node.node_id, view)
        finally:
            run.close()
            leave(token)
    return model


def failed_items_in(ctx: ReliabilityContext, position: int, branch: str) -> int:
    """Return how many items of maps at and inside a restored place failed."""
    inside = f"{branch}." if branch else ""
    return sum(
        failed
        for (at, of), failed in ctx.journal.failed_maps.items()
        if at == position and (of == branch or of.startswith(inside))
    )


def read_output(schema: Schema, committed: Committed, upcast: Callable[[Any], Any] | None) -> BaseModel:
    """Return a committed output as a model. Raises ValueError if it does not fit."""
    if upcast is not None:
        raw = raw_output(committed)
        try:
            upcasted = upcast(raw)
        except Exception as error:
            raise ValueError(f"its upcast raised {error_text(error)}") from error
        return schema.mark_exclusive(schema.validate(upcasted))
    if committed.schema is not None and committed.schema is not schema:
        return schema.mark_exclusive(schema.validate(raw_output(committed)))
    return schema.mark_exclusive(schema.restore(committed.output))


def value_of(registry: ContractRegistry, node: Node | Group, committed: Committed) -> Any:
    """Return an output without its node's input: a model, plain data of a group, or an ItemFailure.

    Raises CorruptCheckpoint.
    """
    try:
        if committed.is_failed_item:
            return read_output(schema_of(ItemFailure), committed, None)
        node = last_in(node)
        if isinstance(node, Group):
            return raw_output(committed)
        contract = contract_of_node(node, registry)
        schema = schema_of(output_class(contract))
        changed = committed.contract.partition(":")[0] != schema.fingerprint
        model = read_output(schema, committed, contract.upcast if changed and contract is not None else None)
        return held_by(model)
    except ValueError as error:
        why, cause = describe_error(error)
        raise CorruptCheckpoint(
            f"an output of node {node.node_id!r} cannot be read back: {why}; restore its schema, or start "
            "a new run"
        ) from cause


def raw_output(committed: Committed) -> Any:
    """Return a committed output as plain data: a dict of the fields, or the value of a root model."""
    if committed.schema is not None:
        return committed.schema.raw(committed.schema.restore(committed.output))
    output = committed.output.load() if isinstance(committed.output, StoredSnapshot) else committed.output
    return decode_raw(output) if isinstance(output, bytes) else output


def _upcast(
    ctx: ReliabilityContext, node: Node | Group, contract: NodeContract[Any, Any] | None
) -> Callable[[Any], Any] | None:
    contract = contract or contract_of_node(node, ctx.registry)
    return None if contract is None else contract.upcast


def _tolerated(ctx: ReliabilityContext, node: Node | Group, contract: NodeContract[Any, Any] | None) -> bool:
    """Return True if outputs that were recorded with another schema may be read."""
    if isinstance(node, Group):
        return any(_tolerated(ctx, child, None) for child in node.children)
    return _upcast(ctx, node, contract) is not None


def schema_difference(schema: Schema, committed: Committed) -> str:
    """Describe the differences between the fields of an output and of the schema to read it with."""
    raw = raw_output(committed)
    names = set(schema.field_names)
    if not isinstance(raw, dict) or schema.is_root:
        return "it is another kind of value"
    parts = [f"it had {name!r}, which is gone" for name in raw if name not in names]
    parts += [f"it lacks {name!r}, which is new" for name in schema.field_names if name not in raw]
    return "; ".join(parts) or "the types, constraints or defaults of its fields have changed"


def output_schema(ctx: ReliabilityContext, node: Node | Group, value: BaseModel | None) -> Schema:
    """Return the schema of a node's output; only that of a group depends on its input."""
    if isinstance(node, Group):
        assert value is not None
        return schema_of(_output_class(ctx, node, type(value)))
    return schema_of(output_class(contract_of_node(node, ctx.registry)))


def _output_class(
    ctx: ReliabilityContext, node: Node | Group, input_class: type[BaseModel]
) -> type[BaseModel]:
    if isinstance(node, Group):
        return node.output_class(input_class, node.output_classes(input_class, partial(_output_class, ctx)))
    return output_schema(ctx, node, None).model


def check_committed(
    ctx: ReliabilityContext,
    node: Node | Group,
    schema: Schema | None,
    committed: Committed,
    place: Place,
    group: str | None = None,
) -> None:
    """Raise PipelineChanged if a place holds the output of another node, or of another contract.

    ``group``: the id of the group around it, where the place has no ``parent``.
    """
    if ctx.config.allow_changes:
        return
    if place.parent is not None:
        group = place.parent.node_id
    where = f"position {place.position}" + (f" ({place.branch})" if place.branch else "")
    if committed.node_id != node.node_id:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: at {where} it has the output of node "
            f"{committed.node_id!r}, but the "
            f"pipeline has {node.node_id!r} there; restore the order of nodes, or start a new run"
        )
    contract, _, recorded = committed.contract.partition(":")
    if (recorded or None) != group:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: the output of node {node.node_id!r} at {where} was "
            f"made for {recorded!r}, and the pipeline has {group!r} there; restore it, or start a new run"
        )
    if committed.is_failed_item:
        return
    if schema is not None and contract != schema.fingerprint and not _tolerated(ctx, node, place.contract):
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: the output of node {node.node_id!r} at {where} was "
            f"recorded with another {schema.model.__name__} ({schema_difference(schema, committed)}); "
            "restore that class, pass upcast= to the node, set allow_changes=True, or start a new run"
        )


def node_at(
    nodes: Sequence[Node | Group], position: int, branch: str
) -> tuple[Node | Group | None, Group | None]:
    """Return the node at a place, or None if the pipeline has none there, and the group around it."""
    children: Sequence[Node | Group] = nodes
    node: Node | Group | None = None
    group: Group | None = None
    for index in (position, *child_indexes(branch)):
        group = node if isinstance(node, Group) else None
        at = 0 if group is not None and group.is_map else index
        if at >= len(children):
            return None, group
        node = children[at]
        children = node.children if isinstance(node, Group) else ()
    return node, group


def check_unfinished_call(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], position: int, branch: str, of: Waiting | Intent
) -> None:
    """Raise PipelineChanged unless the pipeline has the node of a question or an effect at its place."""
    if ctx.config.allow_changes or is_called(branch):
        return
    if position < len(nodes) and isinstance(nodes[position], FlowNode):
        return  # Its body makes the calls.
    node, _ = node_at(nodes, position, branch)
    contract = contract_of_node(node, ctx.registry)
    is_effect = contract is not None and contract.effect
    if node is None or node.node_id != of.node_id or (isinstance(of, Intent) and not is_effect):
        what = of.described if isinstance(of, Intent) else f"it waits for an answer to node {of.node_id!r}"
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: at position {position} {what}"
            f"{_orders(nodes, position, of.node_id)}; restore the order of nodes, or start a new run"
        )


def _orders(nodes: Sequence[Node | Group], position: int, recorded: str) -> str:
    """Describe the nodes around the first difference: as recorded, and as they are now."""
    first = max(0, position - _SHOWN_NODES)
    now = [repr(node.node_id) for node in nodes[first : position + _SHOWN_NODES + 1]]
    before = [*now[: position - first], repr(recorded)]
    dots = "..., " if first else ""
    more = ", ..." if len(nodes) > position + _SHOWN_NODES + 1 else ""
    return f" (recorded: {dots}{', '.join(before)}; the pipeline has {dots}{', '.join(now)}{more})"


def check_place(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], position: int, branch: str, committed: Committed
) -> None:
    """Raise PipelineChanged unless a committed output fits the node and contract at its place."""
    if ctx.config.allow_changes:
        return
    if position >= len(nodes):
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: it has the output of node {committed.node_id!r} at "
            "position "
            f"{position}, and the pipeline has only {len(nodes)} "
            f"nodes{_orders(nodes, position, committed.node_id)}; restore it, or start a new run"
        )
    first = nodes[position]
    if not branch and committed.node_id != first.node_id:
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: at position {position} it has the output of node "
            f"{committed.node_id!r}, but the pipeline has {first.node_id!r} there"
            f"{_orders(nodes, position, committed.node_id)}; restore the order of nodes, or start a new run"
        )
    node, group = None, None
    if not is_called(branch):
        node, group = node_at(nodes, position, branch)
    elif committed.step is None or committed.step.number >= OF_FLOW or not isinstance(first, Node):
        return  # Steps that a node or its hooks call are known when they are called.
    elif isinstance(first, FlowNode):
        return  # And so are those of a flow.
    if node is None:
        around = first.node_id if group is None else group.node_id
        raise PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: it has the output of node {committed.node_id!r} inside "
            f"position {position}, and {around!r} has no such child; restore it, or start a new run"
        )
    # The schema of a group depends on its input, and is checked when it is restored.
    schema = output_schema(ctx, node, None) if isinstance(node, Node) else None
    around_id = None if group is None else group.node_id
    check_committed(ctx, node, schema, committed, Place(position, branch), around_id)


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
    event, failed = f"on_node_{row.outcome}", row.failure
    values: list[Any] = [ctx.run_id, run.node_id]
    if getattr(ctx.fire, event, None):
        if row.outcome == "success":
            values += [_output(ctx, row, node, await _committed(ctx, row)), run.counted.tokens]
        elif failed is not None and row.outcome == "suspended":
            values.append(failed.message)
        elif failed is not None:
            values += [RunFailed.recorded(failed.message, failed.error_type), failed.failure_class]
        try:
            await ctx.fire.fire(event, run.node_id, *values)
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


class _RawOutput(NamedTuple):
    """View of an output that no schema reads any more, or that was discarded."""

    value: dict[str, Any]
    redactor: Redactor

    def for_reader(self) -> dict[str, Any]:
        return self.redactor.redact_state(isolate(self.value)) if self.value else {}

    def for_others(self) -> dict[str, Any]:
        return {}


def _output(
    ctx: ReliabilityContext, row: AttemptRow, node: Node | Group | None, committed: Committed | None
) -> HookState | _RawOutput:
    """Return the output that was committed with an attempt, for its hook."""
    if committed is None or committed.is_failed_item:
        return _RawOutput({}, ctx.redactor)
    if isinstance(node, Node) and node.node_id == row.node_id:
        schema = output_schema(ctx, node, None)
        try:
            return HookState(schema, read_output(schema, committed, None), ctx.redactor)
        except ValueError:
            pass  # The schema has changed: the run is about to be refused, or to upcast.
    raw = raw_output(committed)
    return _RawOutput(raw if isinstance(raw, dict) else {"value": raw}, ctx.redactor)
