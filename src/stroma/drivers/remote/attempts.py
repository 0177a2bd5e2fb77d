"""Operations of a worker for an interpreter, done by the engine: one attempt of a node, one end of a run."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import time_ns
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import (
    CheckpointManager,
    InMemoryStore,
    StepCall,
    StoreError,
    Waiting,
)
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.payloads import BlobStore
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.contract import ContractRegistry, ContractViolation
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.untyped import Kept
from stroma.drivers.remote.mirror import is_mirrored, mirror
from stroma.drivers.remote.plans import FROZEN, KnownNodes, MissingNode, context_of
from stroma.drivers.remote.results import Reader, fetch, result_of, unpack
from stroma.drivers.remote.wire import (
    LARGE,
    ClassName,
    Event,
    NodeSpec,
    Reply,
    Report,
    Request,
    Value,
    clip,
    decode_failure,
    encode_failure,
    json_size,
)
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT, leave
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import attempt_once, begin_group
from stroma.engine.outcome import GroupStopped, Halt
from stroma.failures.errors import ItemFailure, Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose, message_of
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.runner import Pipeline
from stroma.trace.events import AttemptRow
from stroma.trace.plain import jsonable

__all__ = ["Attempts"]

logger = logging.getLogger("stroma")


class Attempts:
    """Performs requests for the nodes of a worker's pipelines, with its own hooks, classifiers and limits."""

    def __init__(
        self,
        pipelines: Iterable[Pipeline],
        *,
        config: RunConfig | None = None,
        registry: ContractRegistry | None = None,
        payloads: BlobStore | None = None,
        store: Any = None,
    ) -> None:
        self.registry = ContractRegistry() if registry is None else registry
        self.payloads = payloads
        self.store = store
        self._manager = CheckpointManager(InMemoryStore())  # It stays empty: the driver stores runs.
        self._known: dict[str, tuple[KnownNodes, RunConfig]] = {}
        for pipeline in pipelines:
            own = config or pipeline.config or RunConfig()
            self._known[pipeline.name] = KnownNodes.of(pipeline, self.registry), own

    def known(self, pipeline: str) -> tuple[KnownNodes, RunConfig]:
        """Return the nodes and the config of a pipeline. Raises MissingNode."""
        try:
            return self._known[pipeline]
        except KeyError:
            have = ", ".join(map(repr, self._known)) or "none"
            raise MissingNode(
                f"this worker lacks pipeline {pipeline!r}; it has {have}: give it to the worker of this task queue"
            ) from None

    async def perform(self, request: Request, *, redelivered: bool = False) -> Reply:
        """Perform a request. Raises MissingNode, and CancelledError if nothing was started; other failures are replies.

        ``redelivered``: another process may have started, or even finished, the same request.
        """
        known, config = self.known(request["pipeline"])
        work = _Work(self, known, config, request, redelivered)
        operations: dict[str, Callable[[], Awaitable[Reply]]] = {
            "begin": work.begin,
            "attempt": work.attempt,
            "open": work.open,
            "items": work.items,
            "close": work.close,
            "pack": work.pack,
            "end": work.end,
        }
        return await operations[request["op"]]()


class _ClosingGroup(Group):
    """A group whose children have run elsewhere; running it merges their outputs."""

    def __init__(
        self, group: Group, merge: Callable[[NodeExecution, BaseModel], Awaitable[dict[str, Any]]]
    ) -> None:
        super().__init__(group.node_id, group.children, group.max_concurrency)
        self.is_map = group.is_map
        self._group = group
        self._merge = merge

    async def run(self, ctx: Any, execution: NodeExecution, value: BaseModel) -> dict[str, Any]:
        return await self._merge(execution, value)

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        return self._group.output_class(input_class, child_classes)


class _Record(NullSession):
    """The session of a run on another machine: what the engine records of an attempt becomes the reply."""

    def __init__(self, work: _Work, execution: int, traceparent: str | None) -> None:
        self.execution = execution
        self.traceparent = traceparent
        self.waiting: Mapping[tuple[int, str], Waiting] = {}
        self._work = work
        self.row: AttemptRow | None = None
        self.output: Value | None = None
        self.asks: Waiting | None = None

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        if is_called(row.branch):
            return None  # A step inside the node: the driver receives only its usage.
        self.row = row
        if output is None or schema is None:
            return None
        return self._keep(schema.encode(output).decode())

    async def _keep(self, text: str) -> None:
        self.output = await self._work.value(text, self._work.output_class())

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        self.row, self.asks = row, waiting
        return None


class _Work:
    """One request."""

    def __init__(
        self, owner: Attempts, known: KnownNodes, config: RunConfig, request: Request, redelivered: bool
    ) -> None:
        self.owner = owner
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
            config.model_copy(update=frozen), owner.registry, owner._manager
        )
        ctx.pipeline = request["pipeline"]
        ctx.traceparent = request["traceparent"]
        ctx.elsewhere = True
        spent = request["spent"]
        ctx.cost_tracker.prior_tokens = spent["tokens"]
        ctx.cost_tracker.prior_cost_usd = spent["cost_usd"]
        ctx.cost_tracker.prior_latency_ms = spent["latency_ms"]
        ctx._warned.update(dict.fromkeys(request["warned"]))
        self.record = _Record(self, request["execution"], request["traceparent"])
        ctx.session = self.record

    # ------------------------------------------------------------------ values

    async def value(self, text: str, cls: ClassName, *, apart: bool = False) -> Value:
        """Return a text as a value for the driver; a large one goes to the payload store. Raises StoreError.

        ``apart``: a small one too, if there is a store.
        """
        size = json_size(text)
        store = self.owner.payloads
        if size < LARGE and size <= self.room and not (apart and store is not None):
            self.room -= size
            return {"text": text, "size": size, "cls": cls}
        if store is None:
            error = StoreError(
                f"a state of {size} bytes cannot be kept in the run itself, which has room for {self.room} more; give the "
                "worker and the client a payload store: payloads="
            )
            error.transient = False
            raise error
        data = text.encode()
        name = hashlib.sha256(data).hexdigest()
        await asyncio.to_thread(store.put, name, data)
        return {"blob": name, "size": size, "cls": cls}

    async def text_of(self, value: Value) -> str:
        return await fetch(self.owner.payloads, value)

    async def model_of(self, value: Value) -> BaseModel:
        return self.known.decode(await self.text_of(value), value["cls"])

    def output_class(self) -> ClassName:
        spec = self.request["spec"]
        if spec["kind"] == "node":
            return ["out", spec["id"], spec.get("output")]
        return ["group", spec, self.request["value"]["cls"]]

    # ------------------------------------------------------------------ places

    def _execution(self, node: Node | Group) -> NodeExecution:
        request, ctx = self.request, self.ctx
        position, branch = request["position"], request["branch"]
        parent: NodeExecution | None = None
        indexes = branch.split(".") if branch else []
        for depth, group_id in enumerate(request["groups"]):
            above = NodeExecution(ctx, group_id, "group", position, ".".join(indexes[:depth]), parent)
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
        answer = request.get("answer")
        if answer is not None and answer["payload"] is not None:
            told = Waiting(
                position, branch, node.node_id, answer["reason"], answer["schema_ref"], answer["payload"].encode()
            )  # fmt: skip
            self.record.waiting = {(position, branch): told}
        return run

    # ------------------------------------------------------------------ operations

    async def begin(self) -> Reply:
        request, ctx = self.request, self.ctx
        for index, spec in enumerate(request["nodes"]):
            self.known.find(spec, [index])
        reply: Reply = {}
        initial = await self.model_of(request["value"])
        try:
            await ctx.announce_start(initial)
            if ctx.fire.on_node_skipped is not None:
                for skipped in request["skipped"]:
                    await self._skip(skipped)
        except HookNotAsync as error:
            reply["broken"] = ["HookNotAsync", str(error)]
        reply["traceparent"] = ctx.kept_traceparent or ctx.traceparent
        return self._noted(reply)

    async def _skip(self, skipped: dict[str, Any]) -> None:
        ctx, calls = self.ctx, self.ctx.fire.on_node_skipped
        assert calls is not None
        spec: NodeSpec = skipped["spec"]
        state = await self.model_of(skipped["value"])
        shown = schema_of(type(state)).state(state)
        kind: Any = "node" if spec["kind"] == "node" else "group"
        run = NodeExecution(ctx, spec["id"], kind, skipped["position"], skipped["branch"])
        token = CURRENT.set(run)
        try:
            await ctx.fire.fire(
                "on_node_skipped",
                calls,
                spec["id"],
                lambda: (ctx.run_id, spec["id"], ctx.redactor.redact_state(shown)),
            )
        finally:
            run.close()
            leave(token)

    async def attempt(self) -> Reply:
        node = self.known.find(self.request["spec"], self.request["path"])
        value = await self.model_of(self.request["value"])
        return await self._attempt(node, value)

    async def _attempt(self, node: Node | Group, value: BaseModel, *, begun: bool = False) -> Reply:
        run = self._execution(node)
        task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        reply: Reply = {}
        outcome: BaseModel | Failure | Halt | None = None
        try:
            outcome = await attempt_once(
                self.ctx, run, node, value, after_seconds=self.request.get("after"), begun=begun
            )
        except asyncio.CancelledError:
            if self.record.row is None:
                raise
            # What was committed, or has failed, before that came through is told all the same.
            while task is not None and task.cancelling() > cancelling:
                task.uncancel()
            reply["cancelled"] = True
        except HookNotAsync as error:
            reply["broken"] = ["HookNotAsync", str(error)]
        if isinstance(outcome, Halt):
            reply["failure"] = encode_failure(outcome.failure)
            reply["halt"] = {
                "partial": outcome.partial,
                "spent": outcome.spent,
                "suspended": outcome.suspended,
            }
        elif isinstance(outcome, Failure):
            reply["failure"] = encode_failure(outcome)
            reply["repairing"] = run.repairing
        if self.record.row is not None:
            reply["row"] = await self._event(self.record.row, node)
            if self.record.output is not None and self.record.row.outcome != "cancelled":
                reply["output"] = self.record.output
        asks = self.record.asks
        if asks is not None:
            reply["waiting"] = {
                "position": asks.position,
                "branch": asks.branch,
                "node_id": asks.node_id,
                "reason": asks.reason,
                "schema_ref": asks.schema_ref,
                "payload": None,
            }
        return self._noted(reply)

    async def open(self) -> Reply:
        group = self.known.find(self.request["spec"], self.request["path"])
        assert isinstance(group, Group)
        value = await self.model_of(self.request["value"])
        run = self._execution(group)
        reply: Reply = {"at_ns": time_ns()}
        try:
            halt = await begin_group(self.ctx, run, group, value, after_seconds=self.request.get("after"))
        except HookNotAsync as error:
            reply["broken"] = ["HookNotAsync", str(error)]
            halt = None
        if halt is not None:
            reply["failure"] = encode_failure(halt.failure)
            reply["halt"] = {"partial": halt.partial, "spent": halt.spent, "suspended": False}
            if self.record.row is not None:
                reply["row"] = await self._event(self.record.row, group)
        if self.ctx.kept_traceparent is not None:
            reply["traceparent"] = self.ctx.kept_traceparent
        return self._noted(reply)

    async def items(self) -> Reply:
        group = self.known.find(self.request["spec"], self.request["path"])
        assert isinstance(group, Group)
        value = await self.model_of(self.request["value"])
        first = self.request["first"]
        try:
            page = slice(first, first + self.request["count"])
            total, found = group.read_items(self.ctx.registry, value, page)
            items: list[Value] = []
            for item in found:
                kind = type(item)
                text = schema_of(kind).encode(item).decode()
                items.append(await self.value(text, ["class", f"{kind.__module__}:{kind.__qualname__}"]))
        except Exception as error:
            where = NodeContext(group.node_id, self.request["attempt"], self.ctx.run_id)
            return {"failure": encode_failure(diagnose(error, where, self.ctx.classifiers))}
        return {"total": total, "items": items}

    async def close(self) -> Reply:
        request = self.request
        group = self.known.find(request["spec"], request["path"])
        assert isinstance(group, Group)
        value = await self.model_of(request["value"])
        self.ctx.fire.on_node_start = None  # It was called when the group was opened.
        # So that row and hooks have the time at which the group was opened.
        self.ctx.epoch_ns -= max(0, time_ns() - request["opened_ns"])
        return await self._attempt(_ClosingGroup(group, self._merge_children), value, begun=True)

    async def _merge_children(self, execution: NodeExecution, value: BaseModel) -> dict[str, Any]:
        """Return the output of a group whose children have run elsewhere, or raise as it would have."""
        request, ctx = self.request, self.ctx
        execution.busy_ns = request["busy_ns"]
        if request["span_ns"]:
            execution.first_ns, execution.last_ns = (at - ctx.epoch_ns for at in request["span_ns"])
        if request["cancelled"]:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.Event().wait()
        stopped = request.get("stopped")
        if stopped is not None:
            failure = decode_failure(stopped["failure"])
            if stopped["suspended"]:
                failure = replace(failure, exception=Suspend(failure.message))
            raise GroupStopped(
                Halt(
                    failure,
                    partial=stopped["partial"],
                    spent=stopped["spent"],
                    suspended=stopped["suspended"],
                )
            )
        group = self.known.find(request["spec"], request["path"])
        assert isinstance(group, Group)
        outputs = [await self.model_of(output) for output in await self._outputs()]
        failures = [ItemFailure(**failed) for failed in request["failures"]]
        return group.merge(value, outputs, failures)

    async def _outputs(self) -> list[Value]:
        request = self.request
        found = list(request["outputs"])
        if not request["packs"]:
            return found
        # Of a map: in the order of the items, whichever pack they are in.
        numbered = dict(zip(request["indexes"], found, strict=True))
        for pack in request["packs"]:
            for index, value in unpack(await self.text_of(pack))["outputs"].items():
                numbered[int(index)] = value
        return [value for _, value in sorted(numbered.items())]

    async def pack(self) -> Reply:
        request = self.request
        outputs = {str(i): value for i, value in zip(request["indexes"], request["outputs"], strict=True)}
        text = json.dumps({"outputs": outputs, "rows": request["rows"]})
        # Packs take no room of the run's own: a map has any number of them.
        return {"packed": await self.value(text, ["raw"], apart=True)}

    async def end(self) -> Reply:
        ctx, report = self.ctx, self.request["report"]
        if self.owner.store is not None and is_mirrored(report["status"]):
            await self._mirror(report)
        if ctx.fire.on_run_end is None:
            return {}
        result = await result_of(report, self.known, self.owner.payloads)
        reply: Reply = {}
        try:
            await ctx.call_end_hooks(result)
        except HookNotAsync as error:
            reply["broken"] = ["HookNotAsync", str(error)]
        return self._noted(reply)

    async def _mirror(self, report: Report) -> None:
        reader = Reader(self.known, self.owner.payloads, report["run_id"], report["values"])
        try:
            initial = await self.model_of(self.request["value"])
            await mirror(self.owner.store, report, reader, initial, self.ctx.config.tags)
        except Exception:  # The result itself is stored by the driver.
            self.ctx.run_logger.exception("the run could not be written to %r", self.owner.store)

    # ------------------------------------------------------------------ what goes back

    def _noted(self, reply: Reply) -> Reply:
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

    async def _event(self, row: AttemptRow, node: Node | Group) -> Event:
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
            "input": await self._input(row, node),
            "output": self.record.output if row.outcome != "cancelled" else None,
            "children": None,
        }  # fmt: skip
        if row.function_ns != row.duration_ns:
            event["function_ns"] = row.function_ns
        return event

    async def _input(self, row: AttemptRow, node: Node | Group) -> Value | None:
        """Return the input of the attempt, if it differs from the request's."""
        picture = row.input
        contract = self.known.contract(node) if isinstance(node, Node) else None
        if isinstance(picture, dict):  # It violated its contract, or has no other form.
            if contract is None:
                return None
            cls: ClassName = ["raw"]
            try:
                text = schema_of(Kept).encode(Kept(picture)).decode()
            except Exception:
                text = json.dumps(jsonable(picture))
        elif contract is None:
            return None
        else:
            schema = schema_of(contract.input_schema)
            cls = ["in", node.node_id, schema.fingerprint]
            try:
                text = (
                    picture if isinstance(picture, bytes) else schema.encode(schema.restore(picture))
                ).decode()
            except Exception:  # It holds a value without a stored form.
                text, cls = json.dumps(jsonable(schema.thaw(picture))), ["raw"]
        given = self.request["value"]
        if cls[0] == "in" and given.get("text") == text:
            return None
        if "blob" in given and given["blob"] == hashlib.sha256(text.encode()).hexdigest():
            return None
        try:
            return await self.value(text, cls)
        except Exception:  # The output is more important than the snapshot of an input.
            return {"text": "{}", "size": 2, "cls": ["raw"]}
