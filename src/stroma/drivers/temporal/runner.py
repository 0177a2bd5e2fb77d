"""TemporalRunner: begins runs on a Temporal cluster, and waits for them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, TypeVar, cast

from pydantic import BaseModel
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from stroma.checkpoint import CheckpointNotFound, PipelineChanged, RunBusy, RunExists, StoreError, Waiting
from stroma.checkpoint.identity import child_indexes
from stroma.checkpoint.payloads import BlobStore, blob_store
from stroma.contracts.contract import ContractRegistry, check_id
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.drivers.remote.plans import KnownNodes, freeze, plain_context
from stroma.drivers.remote.results import Reader, broken_of, result_of
from stroma.drivers.remote.state import RunState, new_state, next_segment
from stroma.drivers.remote.wire import (
    LARGE,
    Answer,
    NodeSpec,
    Plan,
    SegmentReport,
    Value,
    fold,
    json_size,
    unfold,
)
from stroma.drivers.temporal import names
from stroma.drivers.temporal.stream import TemporalStream
from stroma.engine.config import RunConfig
from stroma.failures.failure import NodeContext, diagnose
from stroma.hooks.sets import HookError
from stroma.runner.batch import Batch
from stroma.runner.pipeline import Pipeline, nodes_of
from stroma.runner.sequence import warn_of_unknown_ids
from stroma.runner.signals import match_answer
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult, RunStatus
from stroma.trace.trace import ExecutionTrace

__all__ = ["TemporalRunner"]

T = TypeVar("T")
logger = logging.getLogger("stroma")

#: After that many seconds somebody asks the run to say when it waits for a person: most runs have ended by then.
_PATIENCE: Final = 0.2
_MAX_ID_BYTES: Final = 900  # a server accepts 1000
#: Status codes of a query that no worker answers.
_NO_WORKER: Final = (
    RPCStatusCode.FAILED_PRECONDITION,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.CANCELLED,  # The client's own time limit.
)
#: Status codes of calls while the server is unreachable.
_UNREACHABLE: Final = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)
_MAX_PAUSE_SECONDS: Final = 2.0  # between attempts to reach a server
_OPEN: Final = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)


class TemporalRunner:
    """Starts runs on a Temporal cluster, with the interface of StromaRunner; workers run the nodes.

    ``config``: policies, timeouts, budgets, fallbacks and contract retries go with each run. Hooks, classifiers, limits,
    shared budgets and redact are the workers' own: pass those to :func:`stroma_worker`.

    ``payloads``: the store of states of 256 KiB and more, the same as the workers'. ``heartbeat_seconds``: a worker that
    is silent for this time is lost, and its attempts are started again elsewhere; heartbeats are sent at half of it, so no
    node may block its event loop for that long (use ``asyncio.to_thread`` for blocking work). ``attempt_seconds``: a
    longer attempt, whatever its own timeout, stops the run as PARTIAL. ``deliveries``: how many workers may be lost, or
    lack the node, before the run stops as PARTIAL; the second one is tried after ``redelivery_seconds``, later ones after
    growing waits. ``history_events``: a run with a longer history continues with a fresh one. ``task_seconds``: the time
    of a worker for one workflow task, replay included; a worker lost in a task is noticed after it. ``server_seconds``:
    how long calls wait for an unreachable server before they raise StoreError with its address.
    """

    def __init__(
        self,
        client: Client,
        task_queue: str,
        *,
        config: RunConfig | None = None,
        registry: ContractRegistry | None = None,
        payloads: BlobStore | str | None = None,
        heartbeat_seconds: float = 10.0,
        attempt_seconds: float = 86_400.0,
        deliveries: int = 10,
        redelivery_seconds: float = 1.0,
        history_events: int = 10_000,
        task_seconds: float = 10.0,
        server_seconds: float = 60.0,
    ) -> None:
        self.client = client
        self.task_queue = task_queue
        self.config = RunConfig() if config is None else config
        self.registry = ContractRegistry() if registry is None else registry
        self.payloads = blob_store(payloads)
        self._own_config = config
        self._options: dict[str, Any] = {
            "heartbeat_seconds": heartbeat_seconds,
            "attempt_seconds": attempt_seconds,
            "deliveries": deliveries,
            "redelivery_seconds": redelivery_seconds,
            "history_events": history_events,
        }
        self._task_timeout = timedelta(seconds=task_seconds)
        self._server_seconds = server_seconds
        self._search: bool | None = None
        #: Node ids of the config that no node has, and that were warned of.
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ running

    async def run(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial_state: BaseModel,
        *,
        run_id: str | None = None,
        context: dict[str, Any] | None = None,
        resume: bool | None = None,
        if_exists: Literal["restart", "resume", "return", "error"] | None = None,
        if_running: Literal["error", "attach"] | None = None,
        traceparent: str | None = None,
    ) -> ExecutionResult:
        """Run nodes one after the other on the workers of the task queue, and wait for the end.

        As :meth:`stroma.StromaRunner.run`. A caller that is cancelled does not end the run: ``cancel`` does, and
        ``if_running="attach"`` waits for it again. A suspended node returns a SUSPENDED result; the run continues by itself
        once :meth:`signal` has answered, and :meth:`resume` waits for it.

        Raises TypeError for anything that is not a node or cannot be sent, RunBusy, RunExists, PipelineChanged, StoreError
        for a state that is too large without ``payloads``, and for a server that was unreachable for ``server_seconds``.
        """
        started = await self._begin(
            node_sequence, initial_state, run_id=run_id, context=context, resume=resume, if_exists=if_exists,
            if_running=if_running, traceparent=traceparent,
        )  # fmt: skip
        return started if isinstance(started, ExecutionResult) else await started.result()

    async def _begin(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial: BaseModel,
        *,
        run_id: str | None = None,
        context: dict[str, Any] | None = None,
        resume: bool | None = None,
        if_exists: str | None = None,
        if_running: str | None = None,
        traceparent: str | None = None,
    ) -> _StartedRun | ExecutionResult:
        config = self._config_of(node_sequence)
        known = self._known(node_sequence, config)
        if not isinstance(initial, BaseModel):
            raise TypeError(f"the initial state must be a pydantic model, not {type(initial).__name__}")
        run_id = config.take_run_id() if run_id is None else check_id(run_id, "run id")
        sent_context = plain_context(config.context if context is None else context)
        plan = freeze(known.pipeline, known.nodes, config, self.registry, run_id=run_id)
        warn_of_unknown_ids(
            config, known.nodes, self.registry, known.pipeline, warn=logger.warning, warned=self._warned
        )
        schema = schema_of(type(initial))
        try:
            text = schema.encode(initial).decode()
        except NotSerialisable as error:
            failure = diagnose(error, NodeContext("input", 1, run_id))
            return ExecutionResult(
                run_id, RunStatus.FAILED, initial, ExecutionTrace(run_id), 0.0, 0, failure=failure
            )
        kind = type(initial)
        value = await self._value(text, f"{kind.__module__}:{kind.__qualname__}")
        on_existing = (
            "resume" if (config.resume if resume is None else resume) else (if_exists or config.if_exists)
        )
        attach = (if_running or config.if_running) == "attach" and on_existing != "error"
        workflow = await self._describe(run_id)
        handle = self._handle(run_id)
        if workflow is None:
            state = new_state(value, context=sent_context, traceparent=traceparent)
            try:
                return await self._start(plan, state, known, config)
            except RunBusy:  # Another client was faster.
                workflow = await self._describe(run_id)
                if not attach or workflow is None:
                    raise
        memo = await workflow.memo()
        same_input = memo.get("stroma_input") in (None, _input_of(value))
        parked: SegmentReport | None = None
        if workflow.status in _OPEN:
            parked = await self._parked_now(handle)
            if parked is None or on_existing == "error":
                if attach and same_input:
                    return _StartedRun(self, run_id, handle, known, config, 0)
                raise _busy(run_id, same_input=same_input)
        if on_existing in ("resume", "return") and not same_input:
            raise _another_input(run_id)
        if workflow.status in _OPEN:
            if on_existing == "resume" and parked is not None:
                return await self._wake(handle, known, config, parked)
        elif on_existing == "return":
            report = await self._report(handle)
            if report["status"] in (RunStatus.COMPLETED, RunStatus.RESUMED):
                return await self._result(report, known, config)
            on_existing = "resume"
        if on_existing == "error":
            raise RunExists(
                f"run {run_id!r} already exists; use another run id, or pass "
                'if_exists="resume", "return" or "restart"'
            )
        if on_existing == "resume":
            return await self._continue(handle, plan, known, config, value)
        plan["execution"] = int(memo.get("stroma_execution", 1)) + 1
        state = new_state(value, context=sent_context, traceparent=traceparent)
        return await self._start(plan, state, known, config, over_another=workflow.status in _OPEN)

    async def resume(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> ExecutionResult:
        """Resume a run that stopped, or wait for one that continues after an answer; from any process.

        A run that failed, stopped or was cancelled continues at its first position without a commit, under the policies
        and budgets of this runner. Raises CheckpointNotFound, PipelineChanged, RunBusy while it runs.
        """
        started = await self._resume_run(node_sequence, run_id)
        return await started.result()

    async def _resume_run(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> _StartedRun:
        config = self._config_of(node_sequence)
        known = self._known(node_sequence, config)
        workflow = await self._describe(run_id)
        if workflow is None:
            raise _not_found(run_id)
        handle = self._handle(run_id)
        if workflow.status in _OPEN:
            parked = await self._parked_now(handle)
            if parked is not None:
                started = await self._wake(handle, known, config, parked)
            else:
                status = await self._query(handle, names.ROWS, 0)
                if not status["segment"]:
                    raise _busy(run_id)
                started = _StartedRun(self, run_id, handle, known, config, int(status["segment"]))
        else:
            plan = freeze(known.pipeline, known.nodes, config, self.registry, run_id=run_id)
            started = await self._continue(handle, plan, known, config, None)
        return started

    async def run_many(
        self,
        node_sequence: Pipeline | Iterable[Any],
        inputs: Iterable[BaseModel],
        *,
        max_concurrency: int = 100,
        run_ids: Callable[[int, BaseModel], str] | None = None,
        on_result: Callable[[int, ExecutionResult | Exception], None] | None = None,
        **options: Any,
    ) -> list[ExecutionResult | Exception]:
        """Call :meth:`run` for each input, at most ``max_concurrency`` at once; see :meth:`stroma.StromaRunner.run_many`."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        run = partial(self.run, nodes, **options)
        return await Batch().run_each(run, inputs, max_concurrency, run_ids, on_result)

    def stream(
        self, node_sequence: Pipeline | Iterable[Any], initial_state: BaseModel, **options: Any
    ) -> TemporalStream:
        """Return the events of :meth:`run` as an async iterator; see :class:`TemporalStream`. ``options`` are those of run()."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._begin(nodes, initial_state, **options))

    def stream_resumed(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> TemporalStream:
        """Return the events of :meth:`resume` as an async iterator."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._resume_run(nodes, run_id))

    def follow(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> TemporalStream:
        """Return the events of an existing run as an async iterator, without changing the run.

        The last event has its result, or what it is waiting for. Raises CheckpointNotFound.
        """
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._watch(nodes, run_id))

    async def _watch(self, nodes: Pipeline | list[Any], run_id: str) -> _StartedRun | ExecutionResult:
        config = self._config_of(nodes)
        known = self._known(nodes, config)
        workflow = await self._describe(run_id)
        if workflow is None:
            raise _not_found(run_id)
        handle = self._handle(run_id)
        if workflow.status in _OPEN:
            return _StartedRun(self, run_id, handle, known, config, 0)
        return await self._result(await self._report(handle), known, config)

    def _stream(
        self, nodes: Pipeline | list[Any], start: Callable[[], Awaitable[_StartedRun | ExecutionResult]]
    ) -> TemporalStream:
        known = self._known(nodes, self._config_of(nodes))

        async def begin() -> tuple[str, Any]:
            started = await start()
            if isinstance(started, ExecutionResult):
                return started.run_id, asyncio.sleep(0, started)
            return started.run_id, started.result()

        async def look(run_id: str, since: int) -> list[TraceEvent]:
            try:
                reply = await self._query(self._handle(run_id), names.ROWS, since)
            except (RPCError, WorkflowQueryRejectedError, StoreError):
                return []  # No worker, for example: the next call tries again.
            reader = Reader(known, self.payloads, run_id, [])
            return [await reader.event(row) for row in reply["rows"]]

        return TemporalStream(begin, look)

    # ------------------------------------------------------------------ from any process

    async def cancel(self, run_id: str) -> bool:
        """Cancel a run; its nodes are cancelled within a heartbeat. Returns False if it had ended.

        Raises CheckpointNotFound.
        """
        workflow = await self._describe(run_id)
        if workflow is None:
            raise _not_found(run_id)
        if workflow.status not in _OPEN:
            return False
        try:
            await self._handle(run_id).cancel()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def signal(
        self,
        run_id: str,
        answer: Any,
        *,
        node_id: str | None = None,
        branch: str | None = None,
        schema: type[BaseModel] | None = None,
    ) -> None:
        """Send the answer that a suspended run is waiting for; it continues once all are answered.

        As :meth:`stroma.StromaRunner.signal`.
        """
        waiting = [one for one in await self.waiting(run_id) if one.payload is None]
        answered = match_answer(waiting, run_id, answer, node_id=node_id, branch=branch, schema=schema)
        assert answered.payload is not None
        size = json_size(answered.payload.decode())
        if size >= LARGE:
            raise StoreError(
                f"the answer must have fewer than {LARGE} bytes, got {size}; save large data in another store and answer with "
                "its name"
            )
        message: Answer = {
            "position": answered.position,
            "branch": answered.branch,
            "node_id": answered.node_id,
            "reason": answered.reason,
            "schema_ref": answered.schema_ref,
            "payload": answered.payload.decode(),
        }
        await self._handle(run_id).signal(names.ANSWER, message)

    async def waiting(self, run_id: str) -> list[Waiting]:
        """Return the requests of suspended nodes of a run, answered ones included. Raises CheckpointNotFound."""
        workflow = await self._describe(run_id)
        if workflow is None:
            raise _not_found(run_id)
        if workflow.status not in _OPEN:
            return []
        state = cast("RunState", unfold((await self._query(self._handle(run_id), names.STATE))["state"]))
        answers = state["answers"]
        return [
            Waiting(
                one["position"], one["branch"], one["node_id"], one["reason"], one["schema_ref"],
                (answers[key]["payload"] or "").encode() if key in answers else None,
            )
            for key, one in state["waiting"].items()
        ]  # fmt: skip

    async def trace(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> ExecutionResult:
        """Return the current result of a run; its status is INTERRUPTED while it runs. Raises CheckpointNotFound."""
        config = self._config_of(node_sequence)
        workflow = await self._describe(run_id)
        if workflow is None:
            raise _not_found(run_id)
        handle = self._handle(run_id)
        if workflow.status in _OPEN:
            report = cast("SegmentReport", await self._query(handle, names.REPORT))
        else:  # A result that has ended needs no worker.
            report = await self._report(handle)
        if report["status"] == "RUNNING":
            report["status"] = RunStatus.INTERRUPTED.value
        return await result_of(report, self._known(node_sequence, config), self.payloads)

    # ------------------------------------------------------------------ starting

    def _config_of(self, nodes: Any) -> RunConfig:
        if isinstance(nodes, Pipeline) and nodes.config is not None and self._own_config is None:
            return nodes.config
        return self.config

    def _known(self, nodes: Any, config: RunConfig) -> KnownNodes:
        name = nodes.name if isinstance(nodes, Pipeline) else config.pipeline
        return KnownNodes(name, nodes_of(nodes), self.registry)

    async def _value(self, text: str, ref: str) -> Value:
        size = json_size(text)
        if size < LARGE:
            return {"text": text, "size": size, "cls": ["class", ref]}
        data = text.encode()
        if self.payloads is None:
            raise StoreError(
                f"the initial state must have fewer than {LARGE} bytes without a payload store, got {size}; pass payloads= to "
                "this runner and the workers"
            )
        name = hashlib.sha256(data).hexdigest()
        await asyncio.to_thread(self.payloads.put, name, data)
        return {"blob": name, "size": size, "cls": ["class", ref]}

    async def _start(
        self, plan: Plan, state: RunState, known: KnownNodes, config: RunConfig, *, over_another: bool = False
    ) -> _StartedRun:
        run_id = plan["run_id"]
        search = await self._has_search_attributes()
        plan["options"] = {**self._options, "search": search}
        attributes = [
            SearchAttributePair(names.PIPELINE_KEY, plan["pipeline"]),
            SearchAttributePair(names.STATUS_KEY, "RUNNING"),
        ]
        conflict = WorkflowIDConflictPolicy
        mark = os.urandom(8).hex()

        async def start() -> WorkflowHandle[Any, Any]:
            return await self.client.start_workflow(
                names.WORKFLOW,
                cast("Any", {"plan": plan, "state": fold(state)}),
                id=_workflow_id(run_id),
                task_queue=self.task_queue,
                result_type=dict,
                task_timeout=self._task_timeout,
                id_conflict_policy=conflict.TERMINATE_EXISTING if over_another else conflict.FAIL,
                memo={
                    "stroma_execution": plan["execution"],
                    "stroma_pipeline": plan["pipeline"],
                    "stroma_input": _input_of(state["initial"]),
                    "stroma_mark": mark,
                },
                search_attributes=TypedSearchAttributes(attributes) if search else None,
            )

        try:
            handle = await self._retry_call(start)
        except WorkflowAlreadyStartedError:
            # Perhaps by an earlier call whose reply was lost with the server.
            workflow = await self._describe(run_id)
            if workflow is None or (await workflow.memo()).get("stroma_mark") != mark:
                raise _busy(run_id) from None
            handle = self._handle(run_id)
        return _StartedRun(self, run_id, handle, known, config, state["segment"])

    async def _has_search_attributes(self) -> bool:
        """Return True if the server has the search attributes of runs; False if it does not tell."""
        if self._search is None:
            try:
                known = await self._retry_call(
                    lambda: self.client.operator_service.list_search_attributes(
                        ListSearchAttributesRequest(namespace=self.client.namespace)
                    )
                )
                on_existing = {names.PIPELINE_KEY.name, names.STATUS_KEY.name}
                self._search = on_existing <= set(known.custom_attributes)
            except RPCError:
                self._search = False
        return self._search

    async def _continue(
        self,
        handle: WorkflowHandle[Any, Any],
        plan: Plan,
        known: KnownNodes,
        config: RunConfig,
        initial: Value | None,
    ) -> _StartedRun:
        """Start a run that continues where the last one of its id has stopped."""
        reply = await self._query(handle, names.STATE)
        before, state = cast("Plan", reply["plan"]), cast("RunState", unfold(reply["state"]))
        if initial is not None and not _same(initial, state["initial"]):
            raise _another_input(plan["run_id"])
        _check_unchanged(plan["run_id"], before["nodes"], plan["nodes"], state)
        plan["execution"] = before["execution"]
        return await self._start(plan, next_segment(state), known, config)

    async def _wake(
        self, handle: WorkflowHandle[Any, Any], known: KnownNodes, config: RunConfig, parked: SegmentReport
    ) -> _StartedRun:
        """Let a suspended run continue."""
        await handle.signal(names.RESUME, parked["segment"])
        return _StartedRun(self, parked["run_id"], handle, known, config, parked["segment"] + 1)

    # ------------------------------------------------------------------ calls to the server

    def _handle(self, run_id: str) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(_workflow_id(run_id), result_type=dict)

    async def _retry_call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until the server is reachable. Raises StoreError after ``server_seconds``, and other RPCErrors."""
        loop, pause = asyncio.get_running_loop(), 0.05
        deadline = loop.time() + self._server_seconds
        while True:
            try:
                return await call()
            except RPCError as error:
                if error.status not in _UNREACHABLE:
                    raise
                if loop.time() >= deadline:
                    address = self.client.service_client.config.target_host
                    raise StoreError(
                        f"the Temporal server at {address} cannot be reached ({error}), tried for {self._server_seconds:g} s; "
                        "start it, or correct the address, then try again"
                    ) from error
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)

    async def _describe(self, run_id: str) -> WorkflowExecutionDescription | None:
        try:
            workflow = await self._retry_call(lambda: self._handle(run_id).describe())
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return None
            raise
        if workflow.workflow_type != names.WORKFLOW:
            raise RunExists(
                f"{run_id!r} is the id of a workflow of type {workflow.workflow_type!r}, not of a run of Stroma; use another run id"
            )
        return workflow

    async def _query(self, handle: WorkflowHandle[Any, Any], name: str, *arguments: Any) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = await handle.query(name, args=arguments, result_type=dict)
        except RPCError as error:
            if error.status not in _NO_WORKER:
                raise
            raise StoreError(
                f"the state of run {handle.id!r} is unknown, as no worker answers: {error}; start a worker "
                f"(stroma_worker) on its task queue, then try again"
            ) from error
        return reply

    async def _parked_now(self, handle: WorkflowHandle[Any, Any]) -> SegmentReport | None:
        """Return the report of a suspended run; None for any other run."""
        report = cast("SegmentReport", await self._query(handle, names.REPORT))
        return report if report["status"] == RunStatus.SUSPENDED else None

    async def _report(self, handle: WorkflowHandle[Any, Any]) -> SegmentReport:
        """Return the report of a workflow when it has ended. Raises WorkflowFailureError for a workflow of other code."""
        try:
            return cast("SegmentReport", await handle.result())
        except WorkflowFailureError as error:
            cause = error.cause
            if isinstance(cause, ApplicationError) and (cause.type or "").startswith(names.FAILURE):
                return cast("SegmentReport", cause.details[0])
            # Terminated, or timed out: its commits are in its history.
            report = cast("SegmentReport", await self._query(handle, names.REPORT))
            return {**report, "status": RunStatus.INTERRUPTED.value}

    async def _outcome(self, handle: WorkflowHandle[Any, Any], segment: int) -> SegmentReport:
        """Return the report of a run at its end or at its next suspension."""
        ended = asyncio.ensure_future(self._report(handle))
        watch: asyncio.Future[SegmentReport | None] | None = None
        try:
            await asyncio.wait([ended], timeout=_PATIENCE)
            while not ended.done():
                watch = asyncio.ensure_future(self._suspended(handle, segment))
                await asyncio.wait([ended, watch], return_when=asyncio.FIRST_COMPLETED)
                if watch.done() and not ended.done():
                    parked = watch.result()
                    if parked is not None:
                        return parked
                    await asyncio.wait([ended], timeout=_PATIENCE)
            return ended.result()
        finally:
            for task in (ended, watch):
                if task is not None:
                    task.cancel()

    async def _suspended(self, handle: WorkflowHandle[Any, Any], segment: int) -> SegmentReport | None:
        latest = self.client.get_workflow_handle(handle.id)
        try:
            return cast(
                "SegmentReport", await latest.execute_update(names.SUSPENDED, segment, result_type=dict)
            )
        except (RPCError, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError):
            return None  # It has ended, or continues with a fresh history.

    async def _result(self, report: SegmentReport, known: KnownNodes, config: RunConfig) -> ExecutionResult:
        result = await result_of(report, known, self.payloads)
        broken = broken_of(report, result)
        if broken is not None:
            raise broken
        if result.hook_errors and config.hook_errors == "raise":
            first = result.hook_errors[0]
            raise HookError(
                f"{len(result.hook_errors)} hook calls raised; the first, {first.hook}: {first.exception}",
                result,
            ) from first.exception
        return result


class _StartedRun:
    """A run on the cluster whose result can be awaited."""

    def __init__(
        self,
        runner: TemporalRunner,
        run_id: str,
        handle: WorkflowHandle[Any, Any],
        known: KnownNodes,
        config: RunConfig,
        segment: int,
    ) -> None:
        self._runner = runner
        self.run_id = run_id
        self._handle = handle
        self._known = known
        self._config = config
        self._segment = segment

    async def result(self) -> ExecutionResult:
        report = await self._runner._outcome(self._handle, self._segment)
        return await self._runner._result(report, self._known, self._config)


def _workflow_id(run_id: str) -> str:
    if len(run_id.encode()) <= _MAX_ID_BYTES:
        return run_id
    return f"{run_id[:200]}-{hashlib.sha256(run_id.encode()).hexdigest()}"


def _not_found(run_id: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"there is no run {run_id!r} in this namespace; check its id, or start it with run()"
    )


def _busy(run_id: str, *, same_input: bool = True) -> RunBusy:
    which, fix = "", 'pass if_running="attach" to wait for its result, or use another run id'
    if not same_input:
        which, fix = " with another input", "use another run id"
    error = RunBusy(f"run {run_id!r} is already running{which} on the cluster; {fix}")
    error.holder, error.same_input = "a workflow of the cluster", same_input
    return error


def _another_input(run_id: str) -> PipelineChanged:
    return PipelineChanged(
        f"run {run_id!r} was started with another input; pass the same input, or use another run id"
    )


def _input_of(value: Value) -> str:
    """Return a digest of the input of a run."""
    return value.get("blob") or hashlib.sha256(value.get("text", "").encode()).hexdigest()


def _same(a: Value, b: Value) -> bool:
    return (a.get("text"), a.get("blob")) == (b.get("text"), b.get("blob"))


def _check_unchanged(
    run_id: str, before: Sequence[NodeSpec], now: Sequence[NodeSpec], state: RunState
) -> None:
    """Raise PipelineChanged if a committed position has another node or schema in the pipeline."""
    for position in range(state["position"]):
        then = before[position]
        if position >= len(now):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: it has the output of node {then['id']!r} at position {position}, and the "
                f"pipeline has only {len(now)} nodes; restore it, or start a new run"
            )
        if then["id"] != now[position]["id"]:
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: at position {position} it has the output of node {then['id']!r}, but the "
                f"pipeline has {now[position]['id']!r} there; restore the order of nodes, or start a new run"
            )
        if then.get("output") != now[position].get("output"):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: the output of node {then['id']!r} at position {position} was recorded with "
                "another schema; restore it, or start a new run"
            )
    for key in [*state["done"], *state["maps"], *state["answers"]]:
        where, _, branch = key.partition("|")
        steps = [int(where), *child_indexes(branch)]
        old, new = _spec_at(before, steps), _spec_at(now, steps)
        if old is not None and (new is None or _compatible_part(old) != _compatible_part(new)):
            raise PipelineChanged(
                f"run {run_id!r} cannot be resumed: at position {where} ({branch}) it has what came of node {old['id']!r} so far, and "
                f"the pipeline has {'nothing' if new is None else repr(new['id'])} there, or another contract; restore it, or "
                "start a new run"
            )


def _spec_at(specs: Sequence[NodeSpec], steps: Sequence[int]) -> NodeSpec | None:
    """Return the node at a position and the index of each child on the way, or None."""
    spec: NodeSpec | None = None
    for index in steps:
        if spec is not None:
            specs = spec.get("children", [])
            index = 0 if spec["kind"] == "map" else index
        if index >= len(specs):
            return None
        spec = specs[index]
    return spec


def _compatible_part(spec: NodeSpec) -> tuple[Any, ...]:
    """Return the part of a node by which recorded outputs of it can be used."""
    inner = spec.get("children", []) if spec["kind"] == "map" else []
    return (
        spec["id"],
        spec["kind"],
        spec.get("output"),
        spec.get("over"),
        [_compatible_part(one) for one in inner],
    )
