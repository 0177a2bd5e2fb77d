"""The body of a flow, run in a task of its own until it ends, is suspended or is stopped."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.contract import as_violation
from stroma.contracts.node import FlowNode, Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.loop import execute_in_turn
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.restore import restore
from stroma.engine.tasks import raise_if, retrieve_exception
from stroma.failures.failure import ends_run
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.flow_run import FlowRun
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.output import commit_output
from stroma.runner.flows.stuck import CURRENT_DRIVER

__all__ = ["run_with_flows"]

_TEAR_DOWN_SECONDS: Final = 5.0
_IDLE_TURNS: Final = 12


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
                await run_flow(FlowDriver(ctx, journal), node, value, here.position)
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


async def run_flow(
    driver: FlowDriver, node: FlowNode, value: BaseModel, position: int
) -> BaseModel | Halt | Stopped:
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
    flow = FlowRun(driver, None, node, position, "")
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


async def _drive(flow: FlowRun, node: FlowNode, state: BaseModel) -> Any:
    """Run the body in a task of its own. Return what it returned, or a Halt. Raises what must leave the run."""
    driver = flow.driver
    context = contextvars.copy_context()
    context.run(CURRENT.set, None)
    context.run(CURRENT_DRIVER.set, driver)
    driver.body = driver.loop.create_task(flow.call_body(node, state), context=context)
    driver.body.add_done_callback(lambda _: driver.wake())
    stop = partial(driver.stop, STOPPED)
    driver.ctx.on_hold[stop] = None
    cancelled: asyncio.CancelledError | None = None
    try:
        await _watch_over(driver, driver.body)
    finally:
        driver.ctx.on_hold.pop(stop, None)
        # Whatever ends it: the body has to end before the run does.
        driver.close()
        if not driver.is_collected:
            cancelled = await _tear_down(driver, driver.body)
        retrieve_exception(driver.body)
        driver.is_over = driver.body.done()
    raise_if(cancelled)
    body, stopping = driver.body, driver.stopping
    driver.body = None
    if not body.done():  # It goes on, and can do nothing: each of its calls raises FlowClosed.
        stopping = stopping or asyncio.CancelledError()
    if stopping is not None:
        if isinstance(stopping, BaseException):
            raise stopping
        return stopping
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
    driver.endings.forget_what_ended(flow.position, "", error, driver.activity)
    driver.endings.handlers.clear()  # Their tracebacks reference the frames of the body.
    driver.ctx.redactor.note_secrets(state)
    return driver.endings.halt_of(error, node.node_id)


async def _watch_over(driver: FlowDriver, body: asyncio.Task[Any]) -> None:
    """Wait until the body has ended or is to end, and suspend it once nothing but waits is open."""
    while not body.done():
        if driver.stopping is not None and not driver.busy:
            return
        is_waiting = driver.stopping is None and driver.waits.open and not driver.busy
        if is_waiting and await _is_idle(driver) and await driver.waits.settle():
            continue
        if body.done() or driver.is_woken or (driver.stopping is not None and not driver.busy):
            driver.is_woken = False
            continue
        driver.waker = driver.loop.create_future()
        timeout = driver.waits.poll_seconds() if driver.waits.open and driver.stopping is None else None
        await asyncio.wait([driver.waker], timeout=timeout)
        driver.is_woken = False


async def _is_idle(driver: FlowDriver) -> bool:
    """Return True if the body, left to itself, does nothing further."""
    seen, quiet = driver.signs(), 0
    while quiet < _IDLE_TURNS:
        await asyncio.sleep(0)
        if driver.busy or driver.stopping is not None or not driver.waits.open or driver.has_returned:
            return False
        signs = driver.signs()
        if signs != seen or any(flow.order.is_turning for flow in driver.flows):
            seen, quiet = signs, 0  # A failure takes a few turns from a task to the TaskGroup around it.
        else:
            quiet += 1
    return True


async def _tear_down(driver: FlowDriver, body: asyncio.Task[Any]) -> asyncio.CancelledError | None:
    """Cancel the body, and wait for its end, for a while. Return the cancellation of the caller that came meanwhile."""
    if not body.done():
        body.cancel()
    cancelled: asyncio.CancelledError | None = None
    deadline = driver.loop.time() + _TEAR_DOWN_SECONDS
    while not body.done():
        try:
            await asyncio.wait([body], timeout=max(0.0, deadline - driver.loop.time()))
        except asyncio.CancelledError as came:
            cancelled = cancelled or came.with_traceback(None)
            continue
        if driver.busy:
            deadline = driver.loop.time() + _TEAR_DOWN_SECONDS  # A commit is under way.
        elif not body.done() and driver.loop.time() >= deadline:
            driver.ctx.run_logger.warning(
                "flow %r does not end although it was cancelled; let CancelledError and FlowClosed out of its body",
                driver.flow_id,
            )
            break
    return cancelled
