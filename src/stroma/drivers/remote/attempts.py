"""Operations of a worker for an interpreter, done by the engine: one attempt of a node, one end of a run."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from time import time_ns
from typing import Any

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint import (
    CheckpointManager,
    InMemoryStore,
)
from stroma.checkpoint.payloads import BlobStore
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.drivers.remote.failure_data import decode_failure, encode_failure
from stroma.drivers.remote.flow_bodies import FlowSite
from stroma.drivers.remote.mirror import is_mirrored, mirror
from stroma.drivers.remote.plans import KnownNodes, MissingNode
from stroma.drivers.remote.questions import answer_of
from stroma.drivers.remote.request_context import RequestContext, WorkerResources
from stroma.drivers.remote.results import Reader, result_of, unpack
from stroma.drivers.remote.wire import (
    ActivityRequest,
    NodeSpec,
    Reply,
    SegmentReport,
    Value,
    clip,
)
from stroma.engine.config import RunConfig
from stroma.engine.current import CURRENT, leave
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import attempt_once, begin_group
from stroma.engine.outcome import GroupStopped, Halt
from stroma.engine.unread import UnreadState
from stroma.failures.errors import ItemFailure, Suspend
from stroma.failures.failure import Failure, NodeContext, diagnose
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.pipeline import Pipeline

__all__ = ["Attempts"]

logger = get_logger()


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
        # The manager's store stays empty: the driver stores runs.
        manager = CheckpointManager(InMemoryStore())
        self._resources = WorkerResources(self.registry, payloads, store, manager)
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

    def site(self, pipeline: str) -> FlowSite:
        """Return what the body of a flow needs of a pipeline. Raises MissingNode."""
        known, config = self.known(pipeline)
        return FlowSite(known, config, self._resources.payloads)

    async def perform(
        self,
        request: ActivityRequest,
        *,
        redelivered: bool = False,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> Reply:
        """Perform a request. Raises MissingNode, and CancelledError if nothing was started; other failures are replies.

        ``redelivered``: another process may have started, or even finished, the same request. ``confirm``: called before an
        effect is; it raises StoreError if the driver has given the request to another process meanwhile.
        """
        known, config = self.known(request["pipeline"])
        work = _Work(self._resources, known, config, request, redelivered, confirm)
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
        self.is_map, self.is_sequence = group.is_map, group.is_sequence
        self._group = group
        self._merge = merge

    async def run(self, ctx: Any, execution: NodeExecution, value: BaseModel) -> dict[str, Any]:
        return await self._merge(execution, value)

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        return self._group.output_class(input_class, child_classes)


class _Work(RequestContext):
    """The operations of an interpreter's requests."""

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
        reply["traceparent"] = ctx.all_traces()
        return self.with_notes(reply)

    async def _skip(self, skipped: dict[str, Any]) -> None:
        ctx, calls = self.ctx, self.ctx.fire.on_node_skipped
        assert calls is not None
        spec: NodeSpec = skipped["spec"]
        state = await self.model_of(skipped["value"])
        schema = schema_of(type(state))
        kind: Any = "node" if spec["kind"] == "node" else "group"
        run = NodeExecution(ctx, spec["id"], kind, skipped["position"], skipped["branch"])
        token = CURRENT.set(run)
        try:
            await ctx.fire.fire(
                "on_node_skipped",
                calls,
                spec["id"],
                lambda: (ctx.run_id, spec["id"], ctx.redactor.redact_state(schema.state(state))),
                unread=lambda: (ctx.run_id, spec["id"], UnreadState(schema, state, ctx.redactor)),
            )
        finally:
            run.close()
            leave(token)

    async def attempt(self) -> Reply:
        node = self.known.find(self.request["spec"], self.request["path"])
        value = await self.model_of(self.request["value"])
        return await self._attempt(node, value)

    async def _attempt(self, node: Node | Group, value: BaseModel, *, has_begun: bool = False) -> Reply:
        run = self.execution_of(node)
        task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        reply: Reply = {}
        outcome: BaseModel | Failure | Halt | None = None
        try:
            outcome = await attempt_once(
                self.ctx, run, node, value, after_seconds=self.request.get("after"), has_begun=has_begun
            )
        except asyncio.CancelledError:
            if self.record.row is None:
                raise
            # What was committed, or has failed, before the cancellation arrived is reported all the same.
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
            reply["row"] = await self.encode_row(self.record.row, node)
            if self.record.output is not None and self.record.row.outcome != "cancelled":
                reply["output"] = self.record.output
        asks = self.record.asks
        if asks is not None:
            reply["waiting"] = answer_of(asks)
            if asks.effect is not None:
                reply["waiting"]["effect"][2] = clip(asks.effect.cause)
        if self.record.intent is not None:
            reply["effect"] = [self.record.intent.number, self.record.intent.is_open]
        return self.with_notes(reply)

    async def open(self) -> Reply:
        group = self.known.find(self.request["spec"], self.request["path"])
        assert isinstance(group, Group)
        value = await self.model_of(self.request["value"])
        run = self.execution_of(group)
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
                reply["row"] = await self.encode_row(self.record.row, group)
        if self.ctx.kept_traces:
            reply["traceparent"] = self.ctx.all_traces()
        return self.with_notes(reply)

    async def items(self) -> Reply:
        group = self.known.find(self.request["spec"], self.request["path"])
        assert isinstance(group, Group)
        value = await self.model_of(self.request["value"])
        first = self.request["first"]
        try:
            page = slice(first, first + self.request["count"])
            total, page_items = group.read_items(self.ctx.registry, value, page)
            items: list[Value] = []
            for item in page_items:
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
        return await self._attempt(_ClosingGroup(group, self._merge_children), value, has_begun=True)

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
        outputs = list(request["outputs"])
        if not request["packs"]:
            return outputs
        # Of a map: in the order of the items, whichever pack they are in.
        numbered = dict(zip(request["indexes"], outputs, strict=True))
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
        if self.worker.store is not None and is_mirrored(report["status"]):
            await self._mirror(report)
        if ctx.fire.on_run_end is None:
            return {}
        result = await result_of(report, self.known, self.worker.payloads)
        reply: Reply = {}
        try:
            await ctx.call_end_hooks(result)
        except HookNotAsync as error:
            reply["broken"] = ["HookNotAsync", str(error)]
        return self.with_notes(reply)

    async def _mirror(self, report: SegmentReport) -> None:
        reader = Reader(self.known, self.worker.payloads, report["run_id"], report["values"])
        try:
            initial = await self.model_of(self.request["value"])
            await mirror(self.worker.store, report, reader, initial, self.ctx.config.tags)
        except Exception:  # The result itself is stored by the driver.
            self.ctx.run_logger.exception("the run could not be written to %r", self.worker.store)
