"""Calls to a Temporal server about the workflows of runs."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from stroma.checkpoint import CheckpointNotFound, PipelineChanged, RunExists, StoreError
from stroma.drivers.remote.interpreter import Interpreter
from stroma.drivers.remote.state import NO_FAILURE, RunState
from stroma.drivers.remote.wire import Plan, SegmentReport, unfold
from stroma.drivers.temporal import names
from stroma.trace.result import RunStatus

__all__ = ["OPEN", "Cluster", "workflow_id"]

T = TypeVar("T")

#: Seconds until a run is asked for its next suspension: most runs have ended by then.
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
#: Statuses of workflows that have not ended.
OPEN: Final = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)


class Cluster:
    """A Temporal server, which may be unreachable for a while, and the workflows of runs on it."""

    def __init__(self, client: Client, server_seconds: float) -> None:
        self.client = client
        self._server_seconds = server_seconds
        self._search: bool | None = None

    def handle(self, run_id: str) -> WorkflowHandle[Any, Any]:
        """Return a handle of a run's workflow."""
        return self.client.get_workflow_handle(workflow_id(run_id), result_type=dict)

    async def retry_call(self, call: Callable[[], Awaitable[T]]) -> T:
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

    async def describe_existing(self, run_id: str) -> WorkflowExecutionDescription:
        """Return the description of a run's workflow. Raises CheckpointNotFound, RunExists for a workflow of other code."""
        workflow = await self.describe(run_id)
        if workflow is None:
            raise CheckpointNotFound(
                f"there is no run {run_id!r} in this namespace; check its id, or start it with run()"
            )
        return workflow

    async def describe(self, run_id: str) -> WorkflowExecutionDescription | None:
        """Return the description of a run's workflow, None if there is none. Raises RunExists for a workflow of other code."""
        try:
            workflow = await self.retry_call(lambda: self.handle(run_id).describe())
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return None
            raise
        if workflow.workflow_type not in (names.WORKFLOW, names.FLOW):
            raise RunExists(
                f"{run_id!r} is the id of a workflow of type {workflow.workflow_type!r}, not of a run of Stroma; use another run id"
            )
        return workflow

    async def query(self, handle: WorkflowHandle[Any, Any], name: str, *arguments: Any) -> dict[str, Any]:
        """Query a workflow. Raises StoreError if no worker answers, and other RPCErrors."""
        try:
            reply: dict[str, Any] = await handle.query(name, args=arguments, result_type=dict)
        except WorkflowQueryFailedError as error:
            if "Nondeterminism" not in str(error):
                raise
            raise PipelineChanged(_changed_message(handle.id, "the flow", str(error))) from error
        except RPCError as error:
            if error.status not in _NO_WORKER:
                raise
            raise StoreError(
                f"the state of run {handle.id!r} is unknown, as no worker answers: {error}; start a worker "
                f"(stroma_worker) on its task queue, then try again"
            ) from error
        return reply

    async def suspended_report(self, handle: WorkflowHandle[Any, Any]) -> SegmentReport | None:
        """Return the report of a suspended run; None for any other run."""
        report = cast("SegmentReport", await self.query(handle, names.REPORT))
        return report if report["status"] == RunStatus.SUSPENDED else None

    async def final_report(self, handle: WorkflowHandle[Any, Any]) -> SegmentReport:
        """Return the report of a workflow when it has ended. Raises WorkflowFailureError for a workflow of other code."""
        try:
            return _report_in(await handle.result())
        except WorkflowFailureError as error:
            cause = error.cause
            if isinstance(cause, ApplicationError) and (cause.type or "").startswith(names.FAILURE):
                return _report_in(cause.details[0])
            if "Nondeterminism" in str(cause):
                return await self._changed_report(handle, str(cause))
            # Terminated, or timed out: its commits are in its history.
            report = cast("SegmentReport", await self.query(handle, names.REPORT))
            return {**report, "status": RunStatus.INTERRUPTED.value}

    async def _changed_report(self, handle: WorkflowHandle[Any, Any], problem: str) -> SegmentReport:
        """Return the report of a flow whose body did not do what its history says: no worker can replay that history."""
        start = await self._start_of(handle)
        plan, state = start["plan"], unfold(start["state"])
        node_id = next(spec["id"] for spec in plan["nodes"] if spec["kind"] == "flow")
        report = Interpreter(plan, state, cast("Any", None)).report()
        report["status"] = RunStatus.FAILED.value
        report["failure"] = {
            **NO_FAILURE,
            "message": _changed_message(plan["run_id"], f"flow {node_id!r}", problem),
            "reason": "changed",
            "node_id": node_id,
            "attempt": 1,
            "type": "PipelineChanged",
        }
        return report

    async def _start_of(self, handle: WorkflowHandle[Any, Any]) -> dict[str, Any]:
        """Return what the last history of a workflow began with."""
        async for event in handle.fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            (start,) = await self.client.data_converter.decode(payloads, [dict])
            return cast("dict[str, Any]", start)
        raise AssertionError(handle.id)

    async def final_state(self, handle: WorkflowHandle[Any, Any]) -> tuple[Plan, RunState]:
        """Return the plan of a run that has ended, and the state for another run that continues from it."""
        try:
            result = await handle.result()
        except WorkflowFailureError as error:
            details = error.cause.details if isinstance(error.cause, ApplicationError) else ()
            result = details[0] if details else {}
        if "tree" in result:  # Of a flow.
            ended = unfold(result)
            return ended["plan"], ended["state"]
        reply = await self.query(handle, names.STATE)
        return reply["plan"], unfold(reply["state"])

    async def outcome(self, handle: WorkflowHandle[Any, Any], segment: int) -> SegmentReport:
        """Return the report of a run at its end or at its next suspension."""
        ended = asyncio.ensure_future(self.final_report(handle))
        watch: asyncio.Future[SegmentReport | None] | None = None
        try:
            await asyncio.wait([ended], timeout=_PATIENCE)
            while not ended.done():
                watch = asyncio.ensure_future(self._next_suspension(handle, segment))
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

    async def _next_suspension(self, handle: WorkflowHandle[Any, Any], segment: int) -> SegmentReport | None:
        latest = self.client.get_workflow_handle(handle.id)
        try:
            return cast(
                "SegmentReport", await latest.execute_update(names.SUSPENDED, segment, result_type=dict)
            )
        except (RPCError, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError):
            return None  # It has ended, or continues with a fresh history.

    async def has_search_attributes(self) -> bool:
        """Return True if the server has the search attributes of runs; False if it does not tell."""
        if self._search is None:
            try:
                known = await self.retry_call(
                    lambda: self.client.operator_service.list_search_attributes(
                        ListSearchAttributesRequest(namespace=self.client.namespace)
                    )
                )
                on_existing = {names.PIPELINE_KEY.name, names.STATUS_KEY.name}
                self._search = on_existing <= set(known.custom_attributes)
            except RPCError:
                self._search = False
        return self._search


def _report_in(result: dict[str, Any]) -> SegmentReport:
    """Return the report in the result of a workflow."""
    return cast("SegmentReport", unfold(result)["report"] if "tree" in result else result)


_CHANGED: Final = re.compile(
    r"Activity id of scheduled event '(.*)' does not match activity id of activity command '(.*)'", re.DOTALL
)


def _changed_message(run_id: str, flow: str, problem: str) -> str:
    match = _CHANGED.search(problem)
    if match is not None:
        recorded, now = ("the end of the flow" if call == "end" else call for call in match.groups())
        what = f"its history has {recorded}, and now comes {now}"
    else:
        _, _, text = problem.partition("Nondeterminism error: ")
        what = f"it does not wait, or begin a step, where its history does ({text or problem})"
    return (
        f"run {run_id!r} cannot continue: {flow} has changed: {what}. A flow may depend only on its input, its steps, and "
        "flow.now(), flow.random() and flow.uuid(); restore the code that recorded this and reset the workflow to before its "
        "end, or start a new run"
    )


def workflow_id(run_id: str) -> str:
    """Return the workflow id of a run: the run id, shortened if it is too long for a server."""
    if len(run_id.encode()) <= _MAX_ID_BYTES:
        return run_id
    return f"{run_id[:200]}-{hashlib.sha256(run_id.encode()).hexdigest()}"
