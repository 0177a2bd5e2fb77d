"""Calls of a flow that are made of other calls: maps, and the flows and pipelines inside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from time import perf_counter_ns
from typing import Any, cast

from pydantic import BaseModel

from stroma.checkpoint import StepCall
from stroma.checkpoint.entries import OF_FLOW
from stroma.checkpoint.identity import SCOPE
from stroma.contracts.node import FlowNode, Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.current import CURRENT
from stroma.engine.outcome import Halt
from stroma.engine.tasks import gather
from stroma.failures.failure import Failure
from stroma.runner.flows.errors import StepFailed
from stroma.runner.flows.flow_run import FlowRun, as_output
from stroma.runner.flows.journal import encode_input, read_failure
from stroma.runner.flows.order import FlowCall
from stroma.runner.flows.output import commit_output
from stroma.runner.flows.steps import call_step, make_step, restore_step, step_node_of
from stroma.runner.pipeline import Pipeline

__all__ = ["call_flow", "call_map"]


def call_map(
    run: FlowRun, node: Any, items: Iterable[Any], max_concurrency: int | None, key: str | None
) -> Coroutine[Any, Any, list[Any]]:
    """Return the coroutine of a map, which is numbered in the task that calls it."""
    record = step_node_of(node, "flow.map")
    if max_concurrency is not None and max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, or None for no bound, got {max_concurrency!r}")
    states = list(items)
    for state in states:
        if not isinstance(state, BaseModel):
            raise TypeError(
                f"the items of {record.node_id!r} must be pydantic models, got {type(state).__name__}"
            )
    return _map(run, record, states, max_concurrency, run.number_call("flow.map", record.node_id, key, "*"))


async def _map(
    run: FlowRun,
    node: Node | Group,
    states: list[BaseModel],
    limit: int | None,
    call: FlowCall,
) -> list[Any]:
    driver = run.driver

    async def work() -> tuple[list[Any], bool]:
        # The items are the steps of a part of the flow, by their indexes.
        items = FlowRun(
            driver, run, _part_of(run, limit), run.position, run.prefix + call.identity, is_map=True
        )
        items.path = run.path
        failed = [at for at, record in items.records.items() if record.kind == "failure"]
        if failed:  # Its siblings were cancelled, or are of no use any more.
            first = min(failed, key=lambda at: int(at.partition("@")[0]))
            failure = read_failure(items.records[first].data)
            await items.end()
            raise items.step_failed(failure, first, 0)
        is_recorded = len(items.records) == len(states)
        driver.has_siblings |= len(states) > 1
        try:
            outputs = await gather(
                [
                    make_step(items, node, state, FlowCall(str(index), index, in_main=False))
                    for index, state in enumerate(states)
                ]
            )
        finally:
            await items.end()
        driver.flows.remove(items)
        return outputs, is_recorded

    size = b"%d items" % len(states)
    return cast("list[Any]", await _compose(run, work, call, size))


def find_flow(obj: Any) -> FlowNode | None:
    """Return the record of a flow; None for any other object."""
    node = getattr(obj, "_stroma_node", None)
    return node if isinstance(node, FlowNode) else None


def call_flow(run: FlowRun, flow: Any, state: Any, key: str | None) -> Coroutine[Any, Any, Any]:
    """Return the coroutine of a flow or pipeline inside a flow, which is numbered in the task that calls it."""
    if not isinstance(flow, Pipeline):
        raise TypeError(
            f"flow.run takes a flow or a Pipeline, got {flow!r}; call a single node with flow.step"
        )
    if not isinstance(state, BaseModel):
        raise TypeError(f"the input of {flow.name!r} must be a pydantic model, got {type(state).__name__}")
    call = run.number_call("flow.run", flow.name, key)
    node = find_flow(flow)
    return _run_pipeline(run, flow, state, call) if node is None else _run_flow(run, node, state, call)


async def _run_flow(run: FlowRun, node: FlowNode, state: BaseModel, call: FlowCall) -> Any:
    driver, ctx = run.driver, run.driver.ctx
    input_key = encode_input(ctx, node, state)
    identity = run.identity_for(call.identity, input_key)
    call = call._replace(identity=identity)

    async def work() -> tuple[Any, bool]:
        contract = ctx.contract_of(node)
        assert contract is not None
        is_restored = (run.position, run.prefix + identity) in ctx.restored
        if is_restored and not driver.replay_only:
            return as_output(cast("BaseModel", await restore_step(run, node, state, identity))), True
        child = FlowRun(driver, run, node, run.position, run.prefix + identity)
        begin = perf_counter_ns()
        try:
            prepared, snapshot = schema_of(contract.input_schema).prepare_input(state)
            returned = await child.call_body(node, prepared)
        except Exception as error:
            ctx.redactor.note_secrets(state)
            raise _InnerFailed(driver.endings.halt_of(error, node.node_id).failure) from error
        if is_restored:  # Its body was only to be checked.
            driver.flows.remove(child)
            return as_output(cast("BaseModel", await restore_step(run, node, state, identity))), True
        step = StepCall(OF_FLOW, input_key)
        outcome = await commit_output(child, node, snapshot, returned, begin, step)
        driver.flows.remove(child)
        driver.journal.forget("started", run.position, run.prefix + identity)
        if isinstance(outcome, Halt):
            if outcome.partial or outcome.spent:
                await driver.stop_here(outcome)
            raise _InnerFailed(outcome.failure) from outcome.failure.exception
        return as_output(outcome), False

    return await _compose(run, work, call, input_key)


async def _run_pipeline(run: FlowRun, pipeline: Pipeline, state: BaseModel, call: FlowCall) -> Any:
    driver = run.driver

    async def work() -> tuple[Any, bool]:
        child = FlowRun(
            driver, run, _part_of(run, None, pipeline.name), run.position, run.prefix + call.identity
        )
        is_recorded = len(child.records) == len(pipeline.nodes)
        value: Any = state
        scope = SCOPE.get()
        child.begin()
        try:
            for node in pipeline.nodes:
                make_call = call_step if find_flow(node) is None else call_flow
                value = await make_call(child, node, value, None)
        finally:
            await child.end()
            SCOPE.set(scope)
        driver.flows.remove(child)
        return value, is_recorded

    return await _compose(run, work, call, None)


async def _compose(
    run: FlowRun,
    work: Callable[[], Coroutine[Any, Any, tuple[Any, bool]]],
    call: FlowCall,
    input_key: bytes | None,
) -> Any:
    """Make a call that is made of other calls, and hand out its result in turn.

    ``work`` returns the result, and True if it was all recorded.
    """
    driver, identity = run.driver, call.identity
    task = asyncio.current_task()
    assert task is not None
    if driver.closing or run.has_ended:
        run.refuse(identity)
    run.alive += 1
    begin, scope = perf_counter_ns(), SCOPE.get()
    run.open[identity] = task
    result: Any = None
    failure: Failure | None = None
    cause: BaseException | None = None
    try:
        recorded = await run.find_recorded(identity, input_key) if run.records else None
        is_recorded = recorded is not None and recorded.kind != "started"
        if recorded is None:
            branch = f"{run.prefix}{identity}"
            driver.journal.note_started(run.position, branch, input_key, is_held=driver.unreached > 0)
        if recorded is not None and recorded.kind == "failure":
            failure = read_failure(recorded.data)
            cause = failure.exception
        else:
            try:
                result, is_recorded = await work()
            except StepFailed as error:
                failure, cause = error.failure, error
            except _InnerFailed as error:
                failure, cause = error.failure, error.__cause__
            if failure is not None:
                assert cause is not None
                inside = f"{run.prefix}{identity}."
                driver.endings.forget_what_ended(run.position, inside, cause, driver.activity)
                run.note_failure(identity, failure, input_key)
        index = await run.take_turn(call, is_recorded)
        if failure is None:
            return result
        raise run.step_failed(failure, identity, index, cause) from cause
    except asyncio.CancelledError:
        run.note_cancelled(identity, begin, input_key)
        raise
    finally:
        cause = None  # Its traceback references this frame.
        run.alive -= 1
        run.open.pop(identity, None)
        SCOPE.set(scope)
        CURRENT.set(None)
        run.look_for_siblings()


class _InnerFailed(Exception):
    """A flow inside a flow failed; the cause is what its body raised."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _part_of(run: FlowRun, limit: int | None, name: str | None = None) -> FlowNode:
    """Return the record of a part of a flow that has no contract of its own."""
    node_id = name or run.node.node_id
    return FlowNode(node_id, _not_called, None, False, True, max_concurrency=limit)


def _not_called(*_: Any) -> Any:
    raise NotImplementedError
