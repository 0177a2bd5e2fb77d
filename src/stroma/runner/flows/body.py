"""Flows in the sequence of a run, and the commit of their outputs."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import StepCall
from stroma.contracts.contract import ContractViolation, as_violation, output_violation
from stroma.contracts.copying import Snapshot
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node
from stroma.contracts.schema import schema_of
from stroma.engine.commit import failed_of, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.loop import execute_in_turn
from stroma.engine.merged_models import is_merged
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.restore import restore
from stroma.engine.tasks import raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, ends_run
from stroma.runner.flows.call import FlowScope
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import leaves_of
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.path import INNERMOST, FlowPath
from stroma.trace.events import AttemptRow


async def commit_output(
    flow: FlowScope, node: FlowNode, snapshot: Snapshot, returned: Any, begin: int, step: StepCall | None
) -> BaseModel | Halt:
    """Validate and commit the output of a flow. ``snapshot``: of its input. ``step``: in another flow."""
    ctx, execution, node_id = flow.ctx, flow.execution, node.node_id
    contract = contract_of_node(node, ctx.registry)
    assert contract is not None  # A flow has one.
    source, schema = schema_of(contract.input_schema), schema_of(contract.output_schema)
    try:
        is_model = isinstance(returned, BaseModel) and not is_merged(returned)
        if is_model and not isinstance(returned, schema.model):
            text = f"flow {node_id!r} must return a {schema.model.__name__}, got {type(returned).__name__}"
            problem = {"type": "model_type", "loc": (), "msg": text, "input": None}
            raise ContractViolation(node_id, "output", {}, [problem])
        model, saved = schema.accept_output(returned)
    except BaseException as error:
        if ends_run(error):
            raise
        if not isinstance(error, ContractViolation):
            error = output_violation(node_id, returned, error, schema.model)
        return Halt(ctx.diagnose(error, node_id, 1))
    failure = None
    if not flow.branch:
        ctx.cost_tracker.latency_ns += execution.busy_ns
        exceeded = ctx.cost_tracker.exceeded(ctx.budget, node_id) if ctx.account.limits else None
        failure = None if exceeded is None else ctx.diagnose(exceeded, node_id, 1)
    row = AttemptRow(
        node_id,
        1,
        begin + ctx.journal.epoch_ns,
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
    again = partial(ctx.journal.record, row, schema, model, step)
    pending = again()
    if pending is not None:
        refused, cancelled = await settle(ctx, row, pending, again)
        if refused is not None:
            stored = Failure(refused, FailureClass.RECOVERABLE, node_id, 1, str(refused), "store")
            return Halt(stored, partial=True)
        raise_if(cancelled)
    if ctx.fire.delivers:
        ctx.session.delivered(row)  # A flow has no hooks of its own.
    if not flow.branch:
        ctx.handover.model = model
    return model if failure is None else Halt(failure, output=model, spent=True)


async def run_with_flows(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], value: BaseModel, place: Place
) -> BaseModel | Halt | Stopped:
    """Do the same as ``execute_in_turn`` for a sequence that has flows in it."""
    journal = FlowJournal(ctx)
    first = 0
    while first < len(nodes):
        if first and ctx.stopping.is_asked:
            return STOPPED
        here = place._replace(position=place.position + first)
        node = nodes[first]
        if isinstance(node, FlowNode):
            outcome: Any = await restore(ctx, node, value, here) if ctx.journal.restored else None
            if outcome is None:
                outcome = await _run_flow(FlowDriver(ctx, journal, node.node_id, here.position), node, value)
            first += 1
        else:
            end = next((at for at in range(first, len(nodes)) if isinstance(nodes[at], FlowNode)), len(nodes))
            outcome = await execute_in_turn(ctx, nodes[first:end], value, here)
            first = end
        if isinstance(outcome, (Halt, Stopped)):
            return outcome
        value = outcome
    return value


async def _run_flow(driver: FlowDriver, node: FlowNode, value: BaseModel) -> BaseModel | Halt | Stopped:
    """Run a flow at a position of the run. Return its committed output, or its end."""
    ctx = driver.ctx
    contract = contract_of_node(node, ctx.registry)
    assert contract is not None
    source = schema_of(contract.input_schema)
    try:
        state = source.convert(value)
        snapshot = source.snapshot(state)
    except BaseException as error:
        if ends_run(error):
            raise
        raw = schema_of(type(value)).state(value)
        violation = as_violation(node.node_id, "input", raw, error, source.model)
        return driver.endings.halt(violation, node.node_id)
    flow, position = FlowPath(driver, None, node, ""), driver.position
    begin, first_row = perf_counter_ns(), len(ctx.trace.rows)
    outcome: Any = STOPPED
    try:
        outcome = await _drive(flow, node, state)
    finally:
        if driver.has_siblings:
            ctx.trace.sort(first_row)
        has_ended = not isinstance(outcome, (Halt, Stopped))
        driver.journal.note_busy(position, 0 if has_ended else flow.execution.busy_ns)
    if isinstance(outcome, (Halt, Stopped)):
        ctx.cost_tracker.latency_ns += flow.execution.busy_ns
        return outcome
    return await commit_output(flow, node, snapshot, outcome, begin, None)


async def _drive(path: FlowPath, node: FlowNode, state: BaseModel) -> Any:
    """Run the body of a flow. Return what it returned, or a Halt. Raises what must leave the run."""
    driver = path.driver
    assert node.body is not None
    driver.context.run(INNERMOST.set, weakref.ref(path))
    body = await driver.run(node.body(path, state))
    if driver.stopping is not None:
        return driver.stopping
    cancelled = asyncio.CancelledError("the body of the flow cancelled itself")
    error = cancelled if body.cancelled() else body.exception()
    if error is None:
        return body.result()
    if not all(isinstance(one, (Exception, asyncio.CancelledError)) for one in leaves_of(error)):
        raise error
    first = driver.endings.first_to_retry(error)
    if first is not None:
        # With the failures by which the body has decided nothing.
        first = min([first, *(one for one in driver.failures if one > driver.called_at)])
        driver.journal.discard_from(path.position, first, driver.records.last)
    driver.ctx.redactor.note_secrets(state)
    driver.ctx.redactor.note_seen(state)
    return driver.endings.halt_of(error, node.node_id)
