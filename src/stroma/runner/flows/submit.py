"""Runs that a flow submits: each is a recorded step of the flow, and a run of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import StoreError
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.identity import quoted
from stroma.contracts.contract import NodeContract, check_id
from stroma.contracts.node import Node
from stroma.engine.execution import current_node
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.path import FlowPath
from stroma.runner.flows.suspension import now_ms
from stroma.runner.pipeline import Pipeline, input_schema_of, nodes_of
from stroma.runner.submit_options import SubmitOptions, queue_entry

__all__ = ["call_submit"]


class SubmittedRun(BaseModel):
    """Output of the step that submits a run."""

    run_id: str


def call_submit(
    path: FlowPath, pipeline: Pipeline, state: BaseModel, options: SubmitOptions
) -> Coroutine[Any, Any, str]:
    """Return the coroutine of a submission, which is numbered when it is made."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"flow.submit takes a flow or a Pipeline, got {type(pipeline).__name__}")
    if not isinstance(state, BaseModel):
        raise TypeError(
            f"the input of {pipeline.name!r} must be a pydantic model, got {type(state).__name__}"
        )
    path.begin_call("flow.submit")
    ctx = path.driver.ctx
    schema = input_schema_of(nodes_of(pipeline), ctx.registry)
    given_id = options.get("run_id")
    if given_id is not None:
        check_id(given_id, "run id")
    queue_entry(options, 0)  # Checks the keywords.

    async def submit(state: BaseModel) -> SubmittedRun:
        store: Any = ctx.checkpoint_manager.store
        if not hasattr(store, "submit"):
            raise StoreError(
                f"{type(store).__name__} has no queue of runs; use a journal store such as SQLiteStore"
            )
        # A repeated step has the same key: it finds the run that it has submitted before.
        own_id = hashlib.sha256(current_node().idempotency_key.encode("utf-8", "surrogatepass")).hexdigest()[
            :32
        ]
        run_id = given_id or own_id
        tags = (pipeline.config or ctx.config).tags
        version = pipeline.version or ""
        request = RunRequest(run_id, pipeline.name, schema.convert(state), schema, tags=tags, version=version)
        await store.submit(request, queue_entry(options, now_ms()))
        return SubmittedRun(run_id=run_id)

    node_id = f"submit {pipeline.name}"
    contract = NodeContract(node_id=node_id, input_schema=schema.model, output_schema=SubmittedRun)
    node = Node(node_id, submit, contract, False, True)
    return _submit(path, node, state, path.identify(quoted(node_id), None))


async def _submit(path: FlowPath, node: Node, state: BaseModel, identity: str) -> str:
    submitted: SubmittedRun = await path.driver.request(path.prepare(FlowCall(path, identity, node, state)))
    return submitted.run_id
