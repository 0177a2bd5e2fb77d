"""Calls of a flow: steps, maps, and the flows and pipelines inside it. Each is numbered when it is made.

A map, and a flow or pipeline inside a flow, are code of the body: only the steps inside are events, and the
output of a flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Coroutine, Iterable
from time import perf_counter_ns
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import Committed, StepCall, StoreError
from stroma.checkpoint.entries import OF_FLOW, RunRequest
from stroma.checkpoint.identity import quoted
from stroma.contracts.contract import NodeContract, as_violation, check_id
from stroma.contracts.copying import Snapshot
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node, find_node
from stroma.contracts.schema import comparable, schema_of
from stroma.engine.execution import current_node
from stroma.engine.outcome import Halt
from stroma.engine.restore import read_output
from stroma.runner.flows.body import commit_output
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.endings import StepFailed
from stroma.runner.flows.journal import FlowRecords, step_of
from stroma.runner.flows.path import INNERMOST, FlowPath
from stroma.runner.flows.suspension import now_ms
from stroma.runner.pipeline import (
    Pipeline,
    SubmitOptions,
    check_bound,
    check_state,
    input_schema_of,
    nodes_of,
    queue_entry,
)


def call_step(path: FlowPath, node: Any, state: Any, key: str | None) -> Coroutine[Any, Any, Any]:
    """Return the coroutine of a step."""
    path.begin_call("flow.step")
    record = _step_node_of(node, "flow.step")
    check_state(f"the input of step {record.node_id!r}", state, record)
    call = path.prepare(FlowCall(path, path.identify(quoted(record.node_id), key), record, state))
    coroutine: Any = path.driver.request(call)
    # Python's warning of a coroutine that is never awaited shows it.
    coroutine.__qualname__ = f"flow.step({record.node_id})"
    return coroutine  # type: ignore[no-any-return]  # Type checkers know no such attribute of coroutines.


def _step_node_of(node: Any, method: str) -> Node | Group:
    """Return the record of a node. Raises TypeError for a flow, and for several nodes."""
    if isinstance(node, (list, tuple)):
        raise TypeError(
            f"{method} takes one node, got a {type(node).__name__} of {len(node)}; "
            "only map_over takes several nodes: use flow.step(map_over(...), state)"
        )
    record = find_node(node)
    if isinstance(record, FlowNode):
        raise TypeError(f"{method} takes a node, and {record.node_id!r} is a flow; call it with flow.run")
    return record


def call_map(
    path: FlowPath, node: Any, items: Iterable[Any], max_concurrency: int | None, key: str | None
) -> Coroutine[Any, Any, list[Any]]:
    """Return the coroutine of a map."""
    path.begin_call("flow.map")
    record = _step_node_of(node, "flow.map")
    check_bound(max_concurrency)
    states = list(items)
    for state in states:
        check_state(f"each item of {record.node_id!r}", state)
    return _map(path, record, states, max_concurrency, path.identify(quoted(record.node_id), key, "*"))


async def _map(
    path: FlowPath, node: Node | Group, states: list[BaseModel], limit: int | None, identity: str
) -> list[Any]:
    # The items are the steps of a part of the flow, by their indexes.
    items = FlowPath(path.driver, path, _part_of(path), path.prefix + identity)
    items.names = path.names
    gate = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)

    async def work(index: int, state: BaseModel) -> Any:
        async with gate:
            call = items.prepare(FlowCall(items, str(index), node, state))
            return await items.driver.request(call)

    loop = path.driver.loop
    tasks = [loop.create_task(work(index, state)) for index, state in enumerate(states)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        if pending := [task for task in tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending)


def find_flow(obj: Any) -> FlowNode | None:
    """Return the record of a flow; None for any other object."""
    node = getattr(obj, "_stroma_node", None)
    return node if isinstance(node, FlowNode) else None


def call_flow(path: FlowPath, flow: Any, state: Any, key: str | None) -> Coroutine[Any, Any, Any]:
    """Return the coroutine of a flow or pipeline inside a flow."""
    path.begin_call("flow.run")
    if not isinstance(flow, Pipeline):
        raise TypeError(f"flow.run takes a flow or a Pipeline, got {flow!r}; call a node with flow.step")
    check_state(f"the input of {flow.name!r}", state)
    identity, node = path.identify(quoted(flow.name), key), find_flow(flow)
    if node is None:
        return _run_pipeline(path, flow, state, identity)
    return _run_flow(path, node, state, identity)


async def _run_flow(path: FlowPath, node: FlowNode, state: BaseModel, identity: str) -> Any:
    driver, ctx = path.driver, path.ctx
    contract = contract_of_node(node, ctx.registry)
    assert contract is not None  # A flow has one.
    call = path.prepare(_FlowEnd(path, identity, node, state))
    begin, source = perf_counter_ns(), schema_of(contract.input_schema)
    child = FlowPath(driver, path, node, call.branch)
    try:
        try:
            prepared = source.convert(state)
            snapshot = source.snapshot(prepared)
        except ValueError as error:
            raw = schema_of(type(state)).state(state)
            raise as_violation(node.node_id, "input", raw, error, source.model) from error
        assert node.body is not None
        token = INNERMOST.set(weakref.ref(child))
        try:
            returned = await node.body(child, prepared)
        finally:
            INNERMOST.reset(token)
        child.is_over = True
    except Exception as error:
        ctx.redactor.note_secrets(state)
        ctx.redactor.note_seen(state)
        failure = driver.endings.halt_of(error, node.node_id).failure
        names = error.path if isinstance(error, StepFailed) else (*path.names, failure.node_id)
        raise StepFailed(failure, names) from error
    call.output = child, snapshot, returned, begin
    return await driver.request(call)


class _FlowEnd(FlowCall):
    """The commit of the output of a flow inside a flow."""

    #: The flow, the snapshot of its input, what its body returned and when it began.
    output: tuple[FlowPath, Snapshot, Any, int]

    def is_other_than(self, output: Committed) -> bool:
        # The calls of its body are found again at their places.
        before = comparable(step_of(output).input_key)
        return before is not None and self.input_key is not None and before != self.input_key

    def take_output(self, records: FlowRecords) -> str:
        # Its body may have decided otherwise since: then the output is committed in place of the earlier one.
        earlier, (child, _, returned, _) = records.loose.get(self.branch), self.output
        contract = contract_of_node(child.node, self.scope.ctx.registry)
        if earlier is None or contract is None:
            return ""
        with contextlib.suppress(ValueError):
            before = read_output(schema_of(contract.output_schema), earlier, contract.upcast)
            return self.branch if before == returned else ""
        return ""

    def perform(self, cancelling: int = 0) -> Coroutine[Any, Any, Any]:
        return self._commit()

    async def _commit(self) -> BaseModel | Halt:
        child, snapshot, returned, begin = self.output
        step = StepCall(OF_FLOW, self.input_key)
        return await commit_output(child, child.node, snapshot, returned, begin, step)


async def _run_pipeline(path: FlowPath, pipeline: Pipeline, state: BaseModel, identity: str) -> Any:
    child = FlowPath(path.driver, path, _part_of(path, pipeline.name), path.prefix + identity)
    value: Any = state
    for node in pipeline.nodes:
        call = call_step if find_flow(node) is None else call_flow
        value = await call(child, node, value, None)
    return value


def _part_of(path: FlowPath, name: str | None = None) -> FlowNode:
    """Return the record of a part of a flow that has no contract of its own."""
    return FlowNode(name or path.node.node_id, _part_of, None, wants_context=False, is_async=True)


class SubmittedRun(BaseModel):
    """Output of the step that submits a run."""

    run_id: str


def call_submit(
    path: FlowPath, pipeline: Pipeline, state: BaseModel, options: SubmitOptions
) -> Coroutine[Any, Any, str]:
    """Return the coroutine of a submission, which is numbered when it is made."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"flow.submit takes a flow or a Pipeline, got {type(pipeline).__name__}")
    check_state(f"the input of {pipeline.name!r}", state)
    path.begin_call("flow.submit")
    ctx = path.ctx
    schema = input_schema_of(nodes_of(pipeline), ctx.registry)
    given_id = options.get("run_id")
    if given_id is not None:
        check_id(given_id, "run id")
    queue_entry(options, path.driver.time_ms())  # Checks the keywords.

    async def submit(state: BaseModel) -> SubmittedRun:
        store: Any = ctx.checkpoint_manager.store
        if not hasattr(store, "submit"):
            kind = type(store).__name__
            raise StoreError(f"{kind} has no queue of runs; use a journal store such as SQLiteStore")
        # A repeated step has the same key: it finds the run that it has submitted before.
        run_id = given_id or current_node().idempotency_key
        tags = (pipeline.config or ctx.config).tags
        version = pipeline.version or ""
        request = RunRequest(run_id, pipeline.name, schema.convert(state), schema, tags=tags, version=version)
        await store.submit(request, queue_entry(options, now_ms()))
        return SubmittedRun(run_id=run_id)

    node_id = f"submit {pipeline.name}"
    contract = NodeContract(node_id=node_id, input_schema=schema.model, output_schema=SubmittedRun)
    node = Node(node_id, submit, contract, False, True)
    call = FlowCall(path, path.identify(quoted(node_id), None), node, state)
    # The run of a given id is found by its id, whatever its options are.
    call.takes_outputs = given_id is None
    return _submit(path, path.prepare(call))


async def _submit(path: FlowPath, call: FlowCall) -> str:
    submitted: SubmittedRun = await path.driver.request(call)
    return submitted.run_id
