"""Flows in the sequence of a run."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from pydantic import BaseModel

from stroma.contracts.contract import as_violation
from stroma.contracts.node import FlowNode, Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.loop import execute_in_turn
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.restore import restore
from stroma.failures.failure import ends_run
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.output import commit_output
from stroma.runner.flows.path import INNERMOST, FlowPath

__all__ = ["run_with_flows"]


async def run_with_flows(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], value: BaseModel, place: Place
) -> BaseModel | Halt | Stopped:
    """Do the same as ``execute_in_turn`` for a sequence that has flows in it."""
    journal = FlowJournal(ctx)
    first = 0
    while first < len(nodes):
        if first and ctx.stops:
            return STOPPED
        here = place._replace(position=place.position + first)
        node = nodes[first]
        if isinstance(node, FlowNode):
            restored = await restore(ctx, node, value, here) if ctx.restored else None
            outcome = (
                await run_flow(FlowDriver(ctx, journal, node.node_id, here.position), node, value)
                if restored is None
                else restored
            )
            first += 1
        else:
            end = next((at for at in range(first, len(nodes)) if isinstance(nodes[at], FlowNode)), len(nodes))
            outcome = await execute_in_turn(ctx, nodes[first:end], value, here)
            first = end
        if isinstance(outcome, (Halt, Stopped)):
            return outcome
        value = outcome
    return value


async def run_flow(driver: FlowDriver, node: FlowNode, value: BaseModel) -> BaseModel | Halt | Stopped:
    """Run a flow at a position of the run. Return its committed output, or its end."""
    ctx = driver.ctx
    contract = ctx.contract_of(node)
    assert contract is not None
    source = schema_of(contract.input_schema)
    try:
        state, snapshot = source.prepare_input(value)
    except BaseException as error:
        if ends_run(error):
            raise
        value = ctx.handover.own(value)
        raw = schema_of(type(value)).state(value)
        return driver.endings.halt(
            as_violation(node.node_id, "input", raw, error, source.model), node.node_id
        )
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
    if body.cancelled():
        error: BaseException | None = asyncio.CancelledError("the body of the flow cancelled itself")
    else:
        error = body.exception()
    if error is None:
        return body.result()
    if not isinstance(error, Exception) and not isinstance(
        error, (asyncio.CancelledError, BaseExceptionGroup)
    ):
        raise error
    first = driver.endings.first_to_retry(error)
    if first is not None:
        # With the failures by which the body has decided nothing.
        first = min([first, *(one for one in driver.failures if one > driver.called_at)])
        driver.journal.discard_from(path.position, first, driver.records.last)
    driver.ctx.redactor.note_secrets(state)
    return driver.endings.halt_of(error, node.node_id)
