"""The output of a flow: validated and committed as that of a node, with one row of the trace."""

from __future__ import annotations

from functools import partial
from time import perf_counter_ns
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import StepCall
from stroma.contracts.contract import ContractViolation, output_violation
from stroma.contracts.node import FlowNode
from stroma.contracts.schema import Snapshot, schema_of
from stroma.cost.budget import BudgetExceeded
from stroma.engine.commit import failed_of, record, settle
from stroma.engine.outcome import Halt
from stroma.engine.tasks import raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, ends_run
from stroma.runner.flows.call import FlowScope
from stroma.trace.events import AttemptRow

__all__ = ["commit_output"]


async def commit_output(
    flow: FlowScope,
    node: FlowNode,
    snapshot: Snapshot,
    returned: Any,
    begin: int,
    step: StepCall | None,
) -> BaseModel | Halt:
    """Validate and commit the output of a flow. ``snapshot``: of its input. ``step``: the step that it is in another flow."""
    ctx, execution = flow.ctx, flow.execution
    contract = ctx.contract_of(node)
    assert contract is not None  # A flow has one.
    source, schema = schema_of(contract.input_schema), schema_of(contract.output_schema)
    try:
        if isinstance(returned, BaseModel) and not isinstance(returned, schema.model):
            text = (
                f"flow {node.node_id!r} must return a {schema.model.__name__}, got {type(returned).__name__}"
            )
            raise ContractViolation(
                node.node_id,
                "output",
                {},
                [{"type": "model_type", "loc": (), "msg": text, "input": None}],
            )
        model, saved = schema.accept_output(returned)
    except BaseException as error:
        if ends_run(error):
            raise
        if not isinstance(error, ContractViolation):
            error = output_violation(node.node_id, returned, error, schema.model)
        return Halt(ctx.diagnose(error, node.node_id, 1))
    failure = None
    if not flow.branch:
        ctx.cost_tracker.latency_ns += execution.busy_ns
        exceeded: BudgetExceeded | None = (
            ctx.cost_tracker.exceeded(ctx.budget, node.node_id) if ctx.limits else None
        )
        if exceeded is not None:
            failure = ctx.diagnose(exceeded, node.node_id, 1)
    row = AttemptRow(
        node.node_id,
        1,
        begin + ctx.epoch_ns,
        perf_counter_ns() - begin,
        snapshot,
        saved,
        "success" if failure is None else "failure",
        None if failure is None else failed_of(failure),
        None,
        flow.position,
        flow.branch,
        execution.group,
        (source, schema, None),
        None,
        execution.busy_ns,
    )
    again = partial(record, ctx, row, schema, model, step)
    pending = again()
    if pending is not None:
        problem, cancelled = await settle(ctx, row, pending, again)
        if problem is not None:
            stored = Failure(problem, FailureClass.RECOVERABLE, node.node_id, 1, str(problem), "store")
            return Halt(stored, partial=True)
        raise_if(cancelled)
    if ctx.delivers:
        ctx.session.delivered(row)  # A flow has no hooks of its own.
    if not flow.branch:
        ctx.handover.offer(model, saved, schema)
    return model if failure is None else Halt(failure, output=model, spent=True)
