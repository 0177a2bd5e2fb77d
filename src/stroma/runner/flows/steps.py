"""Steps of a flow: made as full nodes, or replayed from their records."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import current_task
from collections.abc import Coroutine
from sys import exception
from threading import get_ident
from time import perf_counter_ns
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged, StepCall, StoreError
from stroma.checkpoint.entries import OF_FLOW
from stroma.checkpoint.identity import SCOPE, quoted
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import FlowNode, Group, Node, Plan, find_node
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.admission import make
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import plan_of, try_again
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.restore import restore
from stroma.failures.failure import Failure
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.flows.endings import end_of
from stroma.runner.flows.flow_run import FlowRun, as_output
from stroma.runner.flows.journal import CallRecord, encode_input, read_failure
from stroma.runner.flows.order import FlowCall
from stroma.runner.flows.suspension import OpenWait

__all__ = ["call_step", "make_step", "restore_step", "step_node_of"]


class _KnownStep:
    """Facts about a node that all of its calls share.

    Attributes:
        state_class: of the last input.
        identity_name: the node's part of the identities of its calls.
        label: name of the coroutines of its calls.
        plan: its schemas and its contract, once a call has needed them; None where they depend on the state.
    """

    __slots__ = ("identity_name", "label", "node", "plan", "state_class")

    def __init__(self, node: Node | Group, state_class: type[BaseModel]) -> None:
        self.node = node
        self.state_class = state_class
        self.identity_name = quoted(node.node_id)
        self.label = f"flow.step({node.node_id})"
        self.plan: tuple[Schema, Schema, NodeContract[Any, Any] | None] | None = None


def call_step(run: FlowRun, node: Any, state: Any, key: str | None) -> Coroutine[Any, Any, Any]:
    """Return the coroutine of a step, which is numbered in the task that calls it."""
    # Looking at a node and at the class of a state takes 2 us, and most steps are of the same ones.
    try:
        known = run.known.get(node)
    except TypeError:  # It cannot be hashed.
        known = None
    if known is None or type(state) is not known.state_class:
        known = _learn_step(run, node, state)
    driver, scope = run.driver, run.main_scope
    coroutine: Coroutine[Any, Any, Any]
    # As number_call() does, for the calls of most flows: 1 us less.
    if (
        key is None
        and run.is_sequential
        and get_ident() == driver.thread_id
        and current_task(driver.loop) is run.main_task
        and CURRENT.get() is None
        and exception() is None
        and scope is not None
    ):
        driver.activity += 1
        name = known.identity_name
        count = scope.counts[name]
        scope.counts[name] = count + 1
        coroutine = _make_next_step(run, known, state, f"{name}#{count}", driver.activity)
    else:
        call = run.number_call("flow.step", known.node.node_id, key)
        coroutine = make_step(run, known.node, state, call)
    coroutine.__qualname__ = known.label  # type: ignore[attr-defined]  # Python's warning of a coroutine that is never awaited shows it.
    return coroutine


def _learn_step(run: FlowRun, node: Any, state: Any) -> _KnownStep:
    """Check the arguments of a step."""
    record = step_node_of(node, "flow.step")
    if not isinstance(state, BaseModel):
        raise TypeError(
            f"the input of step {record.node_id!r} must be a pydantic model, got {type(state).__name__}"
        )
    known = _KnownStep(record, type(state))
    with contextlib.suppress(TypeError):  # It cannot be hashed.
        run.known[node] = known
    return known


def step_node_of(node: Any, method: str) -> Node | Group:
    """Return the record of a node. Raises TypeError for a flow, and for several nodes."""
    if isinstance(node, (list, tuple)):
        raise TypeError(
            f"{method} takes one node, got a {type(node).__name__} of {len(node)}; only map_over takes several nodes: use "
            "flow.step(map_over(...), state)"
        )
    record = find_node(node)
    if isinstance(record, FlowNode):
        raise TypeError(f"{method} takes a node, and {record.node_id!r} is a flow; call it with flow.run")
    return record


async def _make_next_step(
    run: FlowRun, known: _KnownStep, state: BaseModel, identity: str, number: int
) -> Any:
    """Do what :func:`make_step` does, for a step that the first task of the body makes while nothing else is under way.

    Most steps are such ones. Without what records and siblings need, one takes 12 us in place of 18, of which 9 are its node's.
    """
    driver, node = run.driver, known.node
    ctx, task = driver.ctx, current_task(driver.loop)
    if (
        not run.is_sequential
        or run.alive
        or driver.busy
        or ctx.stops
        or ctx.holds
        or ctx.limits
        or task is not run.main_task
        or type(node) is not Node
    ):
        return await make_step(run, node, state, FlowCall(identity, number, in_main=True))
    assert task is not None
    input_key = encode_input(ctx, node, state) if run.stores_inputs else None
    attempt, outcome = run.attempt, None
    run.alive = driver.busy = 1
    try:
        execution = NodeExecution(ctx, node.node_id, "node", run.position, run.prefix + identity)
        try:
            plan: Plan | None = known.plan
            if plan is not None:
                execution.schemas = known.plan
            else:
                plan = plan_of(ctx, execution, node, state, None)
                source, target, contract = plan
                if source is not None:
                    known.plan = source, target, contract
            if run.stores_inputs:
                execution.step = StepCall(OF_FLOW, input_key)
            execution.attempt = 1
            CURRENT.set(execution)
            outcome = await make(attempt.prepare(execution, node, plan, state, task.cancelling()))
            run.lone_ns += attempt.duration
            if type(outcome) is Failure:
                outcome, busy_ns = await try_again(ctx, attempt, node, plan, state, outcome)
                run.lone_ns += busy_ns
        finally:
            driver.busy -= 1
            if execution._at_end is not None:
                execution.close()
            del execution
            if driver.waits.open or driver.stopping is not None:
                driver.wake()
        if type(outcome) is Halt:
            if driver.stopping is not None:
                await driver.never()
            await _settle(run, outcome, identity, input_key)
        elif run.is_sequential and run.alive == 1 and not driver.ready:
            # No other task has made a call, or is about to: there is no order to wait for.
            run.order.delivered.append(identity)
            if plan[2] is None:
                return as_output(outcome)
            plan[1].mark_shared(outcome)
            return outcome
        elif driver.stopping is not None:
            await driver.never()
        index = await run.take_turn(FlowCall(identity, number, in_main=True), False)
    except asyncio.CancelledError:
        run.note_cancelled(identity, attempt.begin or perf_counter_ns(), input_key)
        raise
    except (HookNotAsync, PipelineChanged, StoreError) as error:  # What leaves a run.
        await driver.stop_here(end_of(error, node))
    finally:
        run.alive -= 1
        CURRENT.set(None)
        if SCOPE.get() is not run.main_scope:
            SCOPE.set(run.main_scope)
    if type(outcome) is Halt:
        raise run.step_failed(outcome.failure, identity, index) from outcome.failure.exception
    return as_output(outcome)


async def make_step(run: FlowRun, node: Node | Group, state: BaseModel, call: FlowCall) -> Any:
    """Make a step, or replay it, and return its output. Raises StepFailed."""
    driver, identity = run.driver, call.identity
    task = current_task(driver.loop)
    assert task is not None
    if driver.closing or run.has_ended:
        run.refuse(identity)
    run.alive += 1
    driver.activity += 1
    run.open[identity] = task
    scope = SCOPE.get()
    input_key: bytes | None = None
    recorded: CallRecord | None = None
    begin = perf_counter_ns()
    try:
        if run.stores_inputs or run.records:
            input_key = encode_input(driver.ctx, node, state)
        if run.records:
            if run.optional:
                del run.open[identity]
                identity = run.identity_for(identity, input_key)
                call = call._replace(identity=identity)
                run.open[identity] = task
            recorded = await run.find_recorded(identity, input_key)
        if recorded is None:
            outcome = await _execute(run, node, state, identity, input_key, task)
        elif recorded.kind == "output":
            outcome = await restore_step(run, node, state, identity)
        else:
            outcome = Halt(read_failure(recorded.data))
        index = await run.take_turn(call, recorded is not None)
    except asyncio.CancelledError:
        run.note_cancelled(identity, begin, input_key)
        raise
    except (HookNotAsync, PipelineChanged, StoreError) as error:  # What leaves a run.
        await driver.stop_here(end_of(error, node))
    finally:
        run.alive -= 1
        run.open.pop(identity, None)
        CURRENT.set(None)
        if SCOPE.get() is not scope:
            SCOPE.set(scope)
        run.look_for_siblings()
    if type(outcome) is Halt:
        raise run.step_failed(outcome.failure, identity, index) from outcome.failure.exception
    return as_output(outcome)


async def _execute(
    run: FlowRun,
    node: Node | Group,
    state: BaseModel,
    identity: str,
    input_key: bytes | None,
    task: asyncio.Task[Any],
) -> BaseModel | Halt:
    """Make a step that is not recorded. Return its committed output, or the Halt of its failure."""
    driver = run.driver
    await run.before_live(identity)
    branch = run.prefix + identity
    place = Place(
        run.position,
        branch,
        "node",
        run.execution,
        None,
        StepCall(OF_FLOW, input_key),
        task.cancelling(),
        restores=False,
    )
    if not run.gates:
        outcome = await _make(run, node, state, place)
    else:
        # What it is recorded with, though the body may change it while the step is queued.
        state = schema_of(type(state)).copy(state)
        async with contextlib.AsyncExitStack() as stack:
            for gate in run.gates:
                await stack.enter_async_context(gate)
            if driver.stopping is not None or driver.closing:
                await driver.never()
            outcome = await _make(run, node, state, place)
    if driver.stopping is not None:  # A sibling has ended the flow meanwhile: this one is committed.
        await driver.never()
    if type(outcome) is Halt:
        await _settle(run, outcome, identity, input_key)
    return outcome


async def _make(run: FlowRun, node: Node | Group, state: BaseModel, place: Place) -> BaseModel | Halt:
    driver = run.driver
    end: BaseException | None = None
    driver.busy += 1
    try:
        outcome = await driver.execute(node, state, place)
        assert not isinstance(outcome, Stopped)  # There is no further node.
        return outcome
    except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # What leaves a run, such as that of a hook that is not async.
        end = error
    finally:
        driver.busy -= 1
        if driver.ctx.limits and driver.ctx.budget.max_latency_ms is not None:
            driver.note_busy()  # With the next commit, for a process that takes over.
        if driver.waits.open or driver.stopping is not None:
            driver.wake()
    assert end is not None
    return await driver.stop_here(end_of(end, node))


async def _settle(run: FlowRun, halt: Halt, identity: str, input_key: bytes | None) -> None:
    """Record a failure that the body is to meet; of what it must not meet, the flow ends or waits."""
    driver = run.driver
    if halt.suspended and driver.ctx.paused:
        await driver.stop_here(STOPPED)
    if halt.suspended:
        wait = driver.waits.add(OpenWait(run.prefix + identity, halt.failure.message, is_of_step=True))
        try:
            await driver.never()
        finally:
            driver.waits.remove(wait)
    if halt.spent or halt.partial:
        await driver.stop_here(halt)
    run.note_failure(identity, halt.failure, input_key)


async def restore_step(run: FlowRun, node: Node | Group, state: BaseModel, identity: str) -> BaseModel | Halt:
    """Return the recorded output of a step after its skip hooks were called."""
    driver, branch = run.driver, run.prefix + identity
    place = Place(run.position, branch)
    output: BaseModel | None = None
    # It may load a blob, or call a slow hook: the flow is neither idle nor stuck meanwhile.
    driver.busy += 1
    try:
        output = await restore(driver.ctx, node, state, place)
    except (PipelineChanged, StoreError) as error:
        driver.stop(end_of(error, node))
    finally:
        driver.busy -= 1
        if driver.waits.open or driver.stopping is not None:
            driver.wake()
    if driver.stopping is not None:
        await driver.never()
    if output is None:  # A group whose schema has changed is assembled again, of children that are restored.
        task = asyncio.current_task()
        assert task is not None
        return await _execute(run, node, state, identity, encode_input(driver.ctx, node, state), task)
    driver.journal.forget_output(run.position, branch)
    return output
