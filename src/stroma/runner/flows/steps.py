"""Steps of a flow: made as full nodes, or replayed from their records."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import current_task
from collections.abc import Coroutine
from time import perf_counter_ns
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged, StepCall, StoreError
from stroma.checkpoint.identity import SCOPE, quoted
from stroma.checkpoint.protocols import OF_FLOW
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import schema_of
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
from stroma.runner.flows.suspension import OpenWait

__all__ = ["call_step", "make_step", "restore_step", "step_node_of"]

_CALL: Final = StepCall(OF_FLOW, None)


def call_step(run: FlowRun, node: Any, state: Any, key: str | None) -> Coroutine[Any, Any, Any]:
    """Return the coroutine of a step, which is numbered in the task that calls it."""
    # Looking at a node and at the class of a state takes 2 us, and most steps are of the same ones.
    try:
        known = run.known.get(node) if type(state) in run.state_classes else None
    except TypeError:  # It cannot be hashed.
        known = None
    if known is None:
        known = _learn_step(run, node, state)
    record, name, label = known
    scope = run.begin_call("flow.step")
    if key is None and not scope.path:
        count = scope.counts[name]
        scope.counts[name] = count + 1
        identity = f"{name}#{count}"
    else:
        identity = run.identify(scope, record.node_id, key)
    coroutine = make_step(run, record, state, identity, run.driver.activity, not scope.path)
    coroutine.__qualname__ = label  # type: ignore[attr-defined]  # Python's warning of a coroutine that is never awaited shows it.
    return coroutine


def _learn_step(run: FlowRun, node: Any, state: Any) -> tuple[Node | Group, str, str]:
    """Check the arguments of a step. Return its node, the name in its identity, and that of its coroutine."""
    record = step_node_of(node, "flow.step")
    if not isinstance(state, BaseModel):
        raise TypeError(
            f"the input of step {record.node_id!r} must be a pydantic model, got {type(state).__name__}"
        )
    run.state_classes.add(type(state))
    known = (record, quoted(record.node_id), f"flow.step({record.node_id})")
    with contextlib.suppress(TypeError):  # It cannot be hashed.
        run.known[node] = known
    return known


def step_node_of(node: Any, method: str) -> Node | Group:
    """Return the record of a node. Raises TypeError for a flow."""
    record = find_node(node)
    if isinstance(record, FlowNode):
        raise TypeError(f"{method} takes a node, and {record.node_id!r} is a flow; call it with flow.run")
    return record


async def make_step(
    run: FlowRun,
    node: Node | Group,
    state: BaseModel,
    identity: str,
    number: int,
    in_main: bool,
) -> Any:
    """Make a step, or replay it, and return its output. Raises StepFailed."""
    driver = run.driver
    task = current_task(driver.loop)
    assert task is not None
    if driver.closing or run.has_ended:
        run.refuse(identity)
    is_alone = not run.alive and not driver.busy and not run.is_concurrent and driver.stopping is None
    run.alive += 1
    driver.activity += 1
    run.open[identity] = task
    scope = SCOPE.get()
    input_key: bytes | None = None
    recorded: CallRecord | None = None
    begin = 0
    try:
        if run.stores_inputs or run.records:
            input_key = encode_input(driver.ctx, node, state)
        if run.records:
            begin = perf_counter_ns()
            if run.optional and identity in run.optional:
                del run.open[identity]
                identity = run.identity_for(identity, input_key)
                run.open[identity] = task
            recorded = await run.find_recorded(identity, input_key)
        if recorded is not None:
            outcome = (
                await restore_step(run, node, state, identity)
                if recorded.kind == "output"
                else Halt(read_failure(recorded.data))
            )
        elif (
            is_alone
            and run.is_plain
            and type(node) is Node
            and not (driver.unreached or driver.ctx.stops or driver.ctx.holds or driver.ctx.limits)
        ):
            # What _execute() does, without its coroutines and what most steps do not need: 10 us in place of 18.
            ctx, attempt = driver.ctx, run.attempt
            execution = NodeExecution(ctx, node.node_id, "node", run.position, run.prefix + identity)
            plan = plan_of(ctx, execution, node, state, None)
            execution.step = _CALL if input_key is None else StepCall(OF_FLOW, input_key)
            execution.attempt = 1
            CURRENT.set(execution)
            driver.busy += 1
            try:
                result = await attempt.prepare(execution, node, plan, state, task.cancelling()).make()
                busy_ns = attempt.duration
                if type(result) is Failure:
                    result, more_ns = await try_again(ctx, attempt, node, plan, state, result)
                    busy_ns += more_ns
            finally:
                driver.busy -= 1
                if execution._at_end is not None:
                    execution.close()
                del execution
                if driver.waits.open or driver.stopping is not None:
                    driver.wake()
            run.count_busy(busy_ns)
            outcome = result
            if driver.stopping is not None:
                await driver.never()
            if type(outcome) is Halt:
                await _settle(run, outcome, identity, input_key)
            elif (
                run.alive == 1
                and not run.is_concurrent
                and not driver.ready
                and (not run.order.is_waiting and not run.order.recorded)
            ):
                run.order.delivered.append(identity)
                if plan[2] is not None:
                    plan[1].mark_shared(outcome)
                    return outcome
                return as_output(outcome)
        else:
            begin = perf_counter_ns()
            outcome = await _execute(run, node, state, identity, input_key, task)
        index = await run.take_turn(identity, recorded is not None, number, in_main)
    except asyncio.CancelledError:
        run.note_cancelled(identity, begin or run.attempt.begin or perf_counter_ns(), input_key)
        raise
    except (HookNotAsync, PipelineChanged, StoreError) as error:  # What leaves a run.
        await driver.stop_here(end_of(error, node))
    finally:
        run.alive -= 1
        run.open.pop(identity, None)
        CURRENT.set(None)
        if SCOPE.get() is not scope:
            SCOPE.set(scope)
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
