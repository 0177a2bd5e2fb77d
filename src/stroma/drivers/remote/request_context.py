"""One request of an interpreter on a worker: the engine's context for it, and its reply as plain data."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from stroma.checkpoint import (
    CheckpointManager,
    StepCall,
    Waiting,
)
from stroma.checkpoint.entries import effect_note
from stroma.checkpoint.payloads import BlobStore
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.contract import ContractRegistry, ContractViolation
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import UntypedState
from stroma.drivers.remote.failure_data import decode_failure
from stroma.drivers.remote.plans import FROZEN, KnownNodes, context_of
from stroma.drivers.remote.questions import waiting_of
from stroma.drivers.remote.results import fetch, no_room_error
from stroma.drivers.remote.state import encode_inside
from stroma.drivers.remote.wire import (
    LARGE,
    ActivityRequest,
    ClassName,
    Event,
    Reply,
    Value,
    clip,
    json_size,
)
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import Intent
from stroma.engine.execution import NodeExecution
from stroma.failures.failure import message_of
from stroma.trace.events import AttemptRow, BoundedRows
from stroma.trace.plain import jsonable

__all__ = ["RequestContext", "WorkerResources"]


class WorkerResources(NamedTuple):
    """Contracts and stores that all requests of a worker share; nothing is written to the checkpoint manager."""

    registry: ContractRegistry
    payloads: BlobStore | None
    store: Any
    manager: CheckpointManager


class ReplySession(NullSession):
    """The session of a run on another machine: what the engine records of an attempt becomes the reply."""

    def __init__(self, request: RequestContext, execution: int, traceparent: str | None) -> None:
        self.execution = execution
        self.traceparent = traceparent
        self.waiting: Mapping[tuple[int, str], Waiting] = {}
        self._request = request
        self.row: AttemptRow | None = None
        #: The sums of the steps inside the node.
        self.inside = BoundedRows(0)
        self.output: Value | None = None
        self.asks: Waiting | None = None
        self._asked_inside: Waiting | None = None
        #: The last call of the effect that the request is for.
        self.intent: Intent | None = None
        self.notes: Mapping[str, bytes] = {}

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        if self._count_inside(row):
            return None
        self.row = row
        if row.outcome == "suspended":
            self.asks = self._asked_inside
        if output is None or schema is None:
            return None
        return self._keep(schema.encode(output).decode())

    def _count_inside(self, row: AttemptRow) -> bool:
        """Count a step inside the node, of which the driver receives only sums. Return False for the node itself."""
        if row.branch == self._request.request["branch"]:
            return False
        self.inside.append(row._replace(children=None))  # They have come here before it.
        return True

    async def _keep(self, text: str) -> None:
        self.output = await self._request.value(text, self._request.output_class())

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        if self._count_inside(row):
            self._asked_inside = waiting
        else:
            self.row, self.asks = row, waiting
        return None

    def note(self, key: str, data: bytes | None) -> None:
        if data is not None and key in self.notes:
            self.intent = Intent(*json.loads(data))

    def flush(self) -> Awaitable[None] | None:
        confirm = self._request.confirm
        return None if confirm is None else confirm()

    def recall(self, run: NodeExecution, number: int, is_open: bool) -> None:
        """Note the last call of an effect. A step inside the node has no note: nothing outside would know of its call."""
        self.intent = Intent(run.node_id, number, is_open, run.branch, "")
        self.notes = {effect_note(run.position, run.branch): json.dumps(self.intent).encode()}


class RequestContext:
    """The engine's context for one request of an interpreter, and the reply to it."""

    def __init__(
        self,
        worker: WorkerResources,
        known: KnownNodes,
        config: RunConfig,
        request: ActivityRequest,
        redelivered: bool,
        confirm: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.confirm = confirm
        self.worker = worker
        self.known = known
        self.request = request
        self.redelivered = redelivered
        self.room = request["room"]
        own = {key: value for key, value in config.context.items() if key not in request["gone"]}
        self.before = {**own, **request["context"]}
        settings = RunConfig.model_validate(request["settings"])
        frozen: dict[str, Any] = {name: getattr(settings, name) for name in FROZEN}
        frozen["context"] = {**own, **copy.deepcopy(request["context"])}
        frozen["run_id"] = request["run_id"]
        # The driver itself redelivers the attempts of dead processes.
        frozen["hook_delivery"] = "at_most_once"
        frozen["node_policies"] = {}  # The driver's business.
        self.ctx = ctx = ReliabilityContext.for_run(
            config.model_copy(update=frozen), worker.registry, worker.manager
        )
        ctx.pipeline = request["pipeline"]
        ctx.traceparent = request["traceparent"]
        ctx.elsewhere = True
        spent = request["spent"]
        ctx.cost_tracker.prior_tokens = spent["tokens"]
        ctx.cost_tracker.prior_cost_usd = spent["cost_usd"]
        ctx.cost_tracker.prior_latency_ms = spent["latency_ms"]
        ctx._warned.update(dict.fromkeys(request["warned"]))
        self.record = ReplySession(self, request["execution"], request["traceparent"])
        ctx.session = self.record

    # ------------------------------------------------------------------ values

    async def value(self, text: str, cls: ClassName, *, apart: bool = False) -> Value:
        """Return a text as a value for the driver; a large one goes to the payload store. Raises StoreError.

        ``apart``: a small one too, if there is a store.
        """
        size = json_size(text)
        store = self.worker.payloads
        if size < LARGE and size <= self.room and not (apart and store is not None):
            self.room -= size
            return {"text": text, "size": size, "cls": cls}
        if store is None:
            raise no_room_error(size, self.room)
        data = text.encode()
        name = hashlib.sha256(data).hexdigest()
        await asyncio.to_thread(store.put, name, data)
        return {"blob": name, "size": size, "cls": cls}

    async def text_of(self, value: Value) -> str:
        return await fetch(self.worker.payloads, value)

    async def model_of(self, value: Value) -> BaseModel:
        return self.known.decode(await self.text_of(value), value["cls"])

    def output_class(self) -> ClassName:
        spec = self.request["spec"]
        if spec["kind"] == "node":
            return ["out", spec["id"], spec.get("output")]
        return ["group", spec, self.request["value"]["cls"]]

    # ------------------------------------------------------------------ places

    def execution_of(self, node: Node | Group) -> NodeExecution:
        """Return the execution that the request is for, inside those of the groups around it."""
        request, ctx = self.request, self.ctx
        position, branch = request["position"], request["branch"]
        parent: NodeExecution | None = None
        indexes = branch.split(".") if branch else []
        outside = len(indexes) - len(request["groups"])  # Parts of the branch that are of a flow.
        for depth, group_id in enumerate(request["groups"]):
            above = NodeExecution(
                ctx, group_id, "group", position, ".".join(indexes[: outside + depth]), parent
            )
            above.children = []
            if parent is None:
                above.busy_ns = request.get("busy_ns", 0)
            parent = above
        kind: Any = "group" if isinstance(node, Group) else request["kind"]
        run = NodeExecution(ctx, node.node_id, kind, position, branch, parent)
        run.attempt = request["attempt"]
        run.repairs = request.get("repairs", 0)
        run.redelivered = self.redelivered
        last = request.get("last")
        if last is not None:
            run.last_failure = decode_failure(last)
            contract = self.known.contract(node) if isinstance(node, Node) else None
            violation = run.last_failure.exception
            if contract is not None and isinstance(violation, ContractViolation):
                violation.schema = contract.output_schema
        own = request.get("answer")
        answers = [*request.get("inside", ()), *(() if own is None else (own,))]
        self.record.waiting = {(one["position"], one["branch"]): waiting_of(one) for one in answers}
        if "effect" in request:
            number, is_open = request["effect"]
            # An earlier delivery may have called it.
            self.record.recall(run, number + self.redelivered, is_open or self.redelivered)
        return run

    # ------------------------------------------------------------------ the reply

    def with_notes(self, reply: Reply) -> Reply:
        """Add to a reply what the attempt left in the context: values, warnings, unpriced models, errors of hooks."""
        ctx = self.ctx
        changes, unsaid = context_of(ctx, self.before)
        if changes is not None:
            reply["context"] = changes
        for key in unsaid:
            ctx.run_logger.warning(
                "context[%r] is not a JSON value, or too large; it stays in this process and is not passed to other nodes",
                key,
            )
        if ctx.unpriced:
            reply["unpriced"] = ctx.unpriced
        if ctx.hook_failures:
            reply["hook_errors"] = [
                [
                    failed.hook,
                    failed.node_id,
                    type(failed.exception).__name__,
                    clip(message_of(failed.exception)),
                ]
                for failed in ctx.hook_failures
            ]
        warned = [w for w in ctx._warned if isinstance(w, str) and w not in self.request["warned"]]
        if warned:
            reply["warned"] = sorted(warned)
        return reply

    async def encode_row(self, row: AttemptRow, node: Node | Group) -> Event:
        """Return a row of the trace as plain data."""
        failure, used = row.failure, row.usage
        event: Event = {
            "id": row.node_id,
            "attempt": row.attempt,
            "started_ns": row.started_ns,
            "duration_ns": row.duration_ns,
            "outcome": row.outcome,
            "failure": None if failure is None else [
                failure.failure_class.value, clip(failure.message), failure.reason, failure.error_type,
            ],
            "usage": None if used is None else [
                used.tokens, used.output_tokens, used.cost_usd, used.model, used.cached_input_tokens,
                used.cache_write_tokens,
            ],
            "position": row.position,
            "branch": row.branch,
            "input": await self._encode_input(row, node),
            "output": self.record.output if row.outcome != "cancelled" else None,
            "children": None,
        }  # fmt: skip
        if row.function_ns != row.duration_ns:
            event["function_ns"] = row.function_ns
        inside = encode_inside(self.record.inside, self.ctx.cost_tracker)
        if inside is not None:
            event["inside"] = inside
        return event

    async def _encode_input(self, row: AttemptRow, node: Node | Group) -> Value | None:
        """Return the input of the attempt, if it differs from the request's."""
        snapshot = row.input
        contract = self.known.contract(node) if isinstance(node, Node) else None
        if isinstance(snapshot, dict):  # It violated its contract, or has no other form.
            if contract is None:
                return None
            cls: ClassName = ["raw"]
            try:
                text = schema_of(UntypedState).encode(UntypedState(snapshot)).decode()
            except Exception:
                text = json.dumps(jsonable(snapshot))
        elif contract is None:
            return None
        else:
            schema = schema_of(contract.input_schema)
            cls = ["in", node.node_id, schema.fingerprint]
            try:
                text = (
                    snapshot if isinstance(snapshot, bytes) else schema.encode(schema.restore(snapshot))
                ).decode()
            except Exception:  # It holds a value without a stored form.
                text, cls = json.dumps(jsonable(schema.thaw(snapshot))), ["raw"]
        request_value = self.request["value"]
        if cls[0] == "in" and request_value.get("text") == text:
            return None
        if "blob" in request_value and request_value["blob"] == hashlib.sha256(text.encode()).hexdigest():
            return None
        try:
            return await self.value(text, cls)
        except Exception:  # The output is more important than the snapshot of an input.
            return {"text": "{}", "size": 2, "cls": ["raw"]}
