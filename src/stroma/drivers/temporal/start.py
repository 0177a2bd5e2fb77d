"""Start of runs on a Temporal cluster: new ones, existing ones that continue, and running ones to attach to."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, cast

from pydantic import BaseModel
from temporalio.client import WorkflowExecutionDescription, WorkflowHandle
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from stroma._utils.logs import get_logger
from stroma.checkpoint import PipelineChanged, RunBusy, RunExists, StoreError
from stroma.checkpoint.decisions import UNFINISHED, PriorWork
from stroma.checkpoint.payloads import BlobStore
from stroma.contracts.contract import ContractRegistry, check_id
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.drivers.remote.pipeline_changes import check_unchanged
from stroma.drivers.remote.plans import KnownNodes, freeze, plain_context
from stroma.drivers.remote.results import broken_of, result_of
from stroma.drivers.remote.state import RunState, new_state, next_segment
from stroma.drivers.remote.wire import LARGE, Plan, SegmentReport, Value, fold, json_size
from stroma.drivers.temporal import names
from stroma.drivers.temporal.cluster import OPEN, Cluster, workflow_id
from stroma.engine.config import RunConfig
from stroma.failures.failure import NodeContext, diagnose
from stroma.hooks.sets import HookError
from stroma.runner.sequence import refuse_unknown_ids
from stroma.trace.result import ExecutionResult, RunStatus
from stroma.trace.trace import ExecutionTrace

__all__ = ["RunStarter", "StartOptions", "StartedRun", "busy_error"]

logger = get_logger()


@dataclass(frozen=True, slots=True)
class StartOptions:
    """The options of one call of :meth:`TemporalRunner.run`; None takes the config's."""

    run_id: str | None = None
    context: dict[str, Any] | None = None
    resume: bool | None = None
    if_exists: str | None = None
    if_running: str | None = None
    traceparent: str | None = None

    def resolve(self, config: RunConfig) -> tuple[str, bool]:
        """Return what to do with an existing run, and True if a running one may be attached to."""
        resume = config.resume if self.resume is None else self.resume
        on_existing = "resume" if resume else self.if_exists or config.if_exists
        attaches = (self.if_running or config.if_running) == "attach" and on_existing != "error"
        return on_existing, attaches


class _NewRun(NamedTuple):
    """A run to start on the cluster."""

    plan: Plan
    state: RunState
    known: KnownNodes
    config: RunConfig


class RunStarter:
    """Starts the runs of one runner on a task queue, and reads their results."""

    def __init__(
        self,
        cluster: Cluster,
        task_queue: str,
        registry: ContractRegistry,
        payloads: BlobStore | None,
        settings: dict[str, Any],
        task_seconds: float,
    ) -> None:
        self.cluster = cluster
        self.task_queue = task_queue
        self.registry = registry
        self.payloads = payloads
        self._settings = settings
        self._task_timeout = timedelta(seconds=task_seconds)

    async def begin(
        self, known: KnownNodes, config: RunConfig, initial: BaseModel, options: StartOptions
    ) -> StartedRun | ExecutionResult:
        """Start a run, resume the one of this id, or attach to it, as the options say."""
        if not isinstance(initial, BaseModel):
            raise TypeError(f"the initial state must be a pydantic model, not {type(initial).__name__}")
        if config.on_budget == "wait":
            raise ValueError(
                'on_budget="wait" needs a StromaRunner; a run on Temporal stops as PARTIAL at its budget'
            )
        run_id = config.take_run_id() if options.run_id is None else check_id(options.run_id, "run id")
        context = plain_context(config.context if options.context is None else options.context)
        plan = freeze(known.pipeline, known.nodes, config, self.registry, run_id=run_id)
        refuse_unknown_ids(config, known.nodes, self.registry, known.pipeline)
        try:
            text = schema_of(type(initial)).encode(initial).decode()
        except NotSerialisable as error:
            failure = diagnose(error, NodeContext("input", 1, run_id))
            return ExecutionResult(
                run_id, RunStatus.FAILED, initial, ExecutionTrace(run_id), 0.0, 0, failure=failure
            )
        kind = type(initial)
        value = await self._value(text, f"{kind.__module__}:{kind.__qualname__}")
        new = _NewRun(plan, new_state(value, context=context, traceparent=options.traceparent), known, config)
        on_existing, attaches = options.resolve(config)
        workflow = await self.cluster.describe(run_id)
        if workflow is None:
            try:
                return await self._start(new)
            except RunBusy:  # Another client was faster.
                workflow = await self.cluster.describe(run_id)
                if not attaches or workflow is None:
                    raise
        return await self._begin_existing(new, workflow, on_existing, attaches=attaches)

    async def _begin_existing(
        self, new: _NewRun, workflow: WorkflowExecutionDescription, on_existing: str, *, attaches: bool
    ) -> StartedRun | ExecutionResult:
        """Start, resume or attach to a run whose id exists."""
        run_id, known, config = new.plan["run_id"], new.known, new.config
        handle = self.cluster.handle(run_id)
        memo = await workflow.memo()
        same_input = memo.get("stroma_input") in (None, _input_of(new.state["initial"]))
        suspended: SegmentReport | None = None
        if workflow.status in OPEN:
            suspended = await self.cluster.suspended_report(handle)
            if suspended is None or on_existing == "error":
                if attaches and same_input:
                    return StartedRun(self, run_id, handle, known, config, 0)
                raise busy_error(run_id, same_input=same_input)
        if on_existing == "new":
            # Of a run that has ended, the cluster does not know which effects were called.
            report = suspended or await self.cluster.final_report(handle)
            if report["status"] in UNFINISHED:
                raise PriorWork(0, len(report["waiting"]), 0, ()).refusal(run_id, report["status"])
        if on_existing in ("resume", "return") and not same_input:
            raise _another_input(run_id)
        if workflow.status in OPEN:
            if on_existing == "resume" and suspended is not None:
                return await self.wake(handle, known, config, suspended)
        elif on_existing == "return":
            report = await self.cluster.final_report(handle)
            if report["status"] in (RunStatus.COMPLETED, RunStatus.RESUMED):
                return await self.result(report, known, config)
            on_existing = "resume"
        if on_existing == "error":
            raise RunExists(
                f"run {run_id!r} already exists; use another run id, or pass "
                'if_exists="resume", "return" or "restart"'
            )
        if on_existing == "resume":
            return await self.resume(handle, new.plan, known, config, new.state["initial"])
        new.plan["execution"] = int(memo.get("stroma_execution", 1)) + 1
        return await self._start(new, over_another=workflow.status in OPEN)

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

    async def _start(self, new: _NewRun, *, over_another: bool = False) -> StartedRun:
        plan, state = new.plan, new.state
        run_id = plan["run_id"]
        search = await self.cluster.has_search_attributes()
        plan["options"] = {**self._settings, "search": search}
        attributes = [
            SearchAttributePair(names.PIPELINE_KEY, plan["pipeline"]),
            SearchAttributePair(names.STATUS_KEY, "RUNNING"),
        ]
        conflict = WorkflowIDConflictPolicy
        mark = os.urandom(8).hex()

        async def start() -> WorkflowHandle[Any, Any]:
            return await self.cluster.client.start_workflow(
                names.FLOW if new.known.has_flow else names.WORKFLOW,
                cast("Any", {"plan": plan, "state": fold(state)}),
                id=workflow_id(run_id),
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
            handle = await self.cluster.retry_call(start)
        except WorkflowAlreadyStartedError:
            # Perhaps by an earlier call whose reply was lost with the server.
            workflow = await self.cluster.describe(run_id)
            if workflow is None or (await workflow.memo()).get("stroma_mark") != mark:
                raise busy_error(run_id) from None
            handle = self.cluster.handle(run_id)
        return StartedRun(self, run_id, handle, new.known, new.config, state["segment"])

    async def resume(
        self,
        handle: WorkflowHandle[Any, Any],
        plan: Plan,
        known: KnownNodes,
        config: RunConfig,
        initial: Value | None,
    ) -> StartedRun:
        """Start a run that continues where the last one of its id has stopped."""
        before, state = await self.cluster.final_state(handle)
        if initial is not None and not _is_same_value(initial, state["initial"]):
            raise _another_input(plan["run_id"])
        check_unchanged(plan["run_id"], before["nodes"], plan["nodes"], state)
        plan["execution"] = before["execution"]
        return await self._start(_NewRun(plan, next_segment(state), known, config))

    async def wake(
        self, handle: WorkflowHandle[Any, Any], known: KnownNodes, config: RunConfig, parked: SegmentReport
    ) -> StartedRun:
        """Let a suspended run continue."""
        await handle.signal(names.RESUME, parked["segment"])
        return StartedRun(self, parked["run_id"], handle, known, config, parked["segment"] + 1)

    async def result(self, report: SegmentReport, known: KnownNodes, config: RunConfig) -> ExecutionResult:
        """Return the result of a report. Raises what ``run()`` raises after the end of a run."""
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


class StartedRun:
    """A run on the cluster whose result can be awaited."""

    def __init__(
        self,
        starter: RunStarter,
        run_id: str,
        handle: WorkflowHandle[Any, Any],
        known: KnownNodes,
        config: RunConfig,
        segment: int,
    ) -> None:
        self.run_id = run_id
        self._starter = starter
        self._handle = handle
        self._known = known
        self._config = config
        self._segment = segment

    async def result(self) -> ExecutionResult:
        """Wait for the end of the run or its next suspension."""
        report = await self._starter.cluster.outcome(self._handle, self._segment)
        return await self._starter.result(report, self._known, self._config)


def busy_error(run_id: str, *, same_input: bool = True) -> RunBusy:
    """Return the error for a run that is running already."""
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


def _is_same_value(a: Value, b: Value) -> bool:
    return (a.get("text"), a.get("blob")) == (b.get("text"), b.get("blob"))
