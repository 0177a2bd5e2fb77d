"""The workflow of a run: a loop of one activity that drives the run, and a wait for what its answer names.

Only ids and statuses cross Temporal. The workflow is not sandboxed: it imports no code of users, and uses
nothing but the functions of ``temporalio.workflow``.
"""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from typing import Any, Final, Literal, NotRequired, TypedDict

from temporalio import workflow
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import (
    Priority,
    RetryPolicy,
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
)
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError, RPCStatusCode

from stroma._utils.logs import get_logger
from stroma.checkpoint import RunRecord
from stroma.checkpoint.queue import Candidate

WORKFLOW: Final = "stroma.run"
DRIVE: Final = "stroma.drive"
WAKE: Final = "wake"
PIPELINE_KEY: Final = SearchAttributeKey.for_keyword("StromaPipeline")
STATUS_KEY: Final = SearchAttributeKey.for_keyword("StromaStatus")

#: A run that waits is driven again after this time, whatever it waits for: a lost signal delays it so long at
#: most.
RECHECK_SECONDS: float = 60.0
#: The clocks of the server and the store may differ: a run that is due is not driven again at once.
_MIN_WAIT_SECONDS: Final = 0.2
_RETRIES: Final = RetryPolicy(maximum_interval=timedelta(seconds=30))
#: An activity returns after its slice; a step inside may take longer. A lost worker is noticed by its
#: heartbeats.
START_TO_CLOSE: Final = timedelta(days=365)
#: Leases of the runs of this process in seconds, by task queue and pipeline: the pulse of heartbeats. Runs of
#: other pipelines are blocked at once.
LEASES: Final[dict[tuple[str, str], float]] = {}


class Answer(TypedDict):
    """Outcome of one activity."""

    outcome: Literal["ended", "suspended", "yielded", "busy", "blocked"]
    status: str  # Of the run; for an ended run its end.
    until_ms: NotRequired[int | None]  # When the run is due, or free, since the epoch.


@workflow.defn(name=WORKFLOW, sandboxed=False)
class StromaRun:
    """One run of a store."""

    def __init__(self) -> None:
        self._is_woken = False

    @workflow.run
    async def run(self, run_id: str, pipeline: str) -> str:
        """Drive the run until it has ended, and return its status."""
        try:
            status = await self._dispatch(run_id, pipeline)
        except (asyncio.CancelledError, ActivityError):
            # The server does not try a cancelled activity again, not even if its worker was lost.
            if not _is_cancelled():
                raise
            answer = await self._drive(run_id, pipeline, cancels=True)
            status = answer["status"] if answer["outcome"] == "ended" else "CANCELLED"
        if status == "CANCELLED" and _is_cancelled():
            raise asyncio.CancelledError  # The workflow is shown as cancelled, too.
        return status

    async def _dispatch(self, run_id: str, pipeline: str) -> str:
        while not _is_cancelled():
            self._is_woken = False
            answer = await self._drive(run_id, pipeline)
            is_ended = answer["outcome"] == "ended"
            if is_ended and not self._is_woken:  # Somebody may have resumed it while its end was reported.
                return answer["status"]
            if _is_cancelled():
                break
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(args=[run_id, pipeline])
            if not is_ended and answer["outcome"] != "yielded":
                await self._wait(answer.get("until_ms"))
        # The cancellation came as the activity or the wait ended: the server requests it once.
        raise asyncio.CancelledError

    async def _drive(self, run_id: str, pipeline: str, *, cancels: bool = False) -> Answer:
        lease_seconds = LEASES.get((workflow.info().task_queue, pipeline), 30.0)
        answer: Answer = await workflow.execute_activity(
            DRIVE,
            args=[run_id, pipeline, cancels],
            result_type=dict,
            start_to_close_timeout=START_TO_CLOSE,
            heartbeat_timeout=timedelta(seconds=lease_seconds),
            retry_policy=_RETRIES,
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )
        if workflow.info().typed_search_attributes.get(PIPELINE_KEY) is not None:
            workflow.upsert_search_attributes([STATUS_KEY.value_set(answer["status"])])
        return answer

    async def _wait(self, until_ms: int | None) -> None:
        """Return when a run is due, or may be, and once somebody has changed it in the store."""
        seconds = RECHECK_SECONDS
        if until_ms is not None:
            seconds = min(seconds, until_ms / 1000 - workflow.now().timestamp())
        try:
            await workflow.wait_condition(
                lambda: self._is_woken, timeout=timedelta(seconds=max(seconds, _MIN_WAIT_SECONDS))
            )
        except TimeoutError:
            pass

    @workflow.signal(name=WAKE)
    def wake(self) -> None:
        """Drive the run: somebody has changed it in the store."""
        self._is_woken = True


def _is_cancelled() -> bool:
    """Return True if somebody has cancelled this workflow."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


logger = get_logger()

_MAX_ID_BYTES: Final = 900  # A server accepts 1,000.
#: Status codes of a server that may answer later.
UNREACHABLE: Final = (
    RPCStatusCode.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED,
    RPCStatusCode.CANCELLED,  # The client's own time limit.
    RPCStatusCode.RESOURCE_EXHAUSTED,
)


def workflow_id(run_id: str) -> str:
    """Return the id of the workflow of a run: the run id, or a hash of one that is too long for a server."""
    if len(run_id.encode()) <= _MAX_ID_BYTES:
        return run_id
    return f"stroma-{hashlib.sha256(run_id.encode()).hexdigest()}"


class Dispatcher:
    """The workflows of runs on one task queue.

    The store is the truth: a run whose workflow could not be started is found by the workers, and one that
    could not be woken by its own timer. So an unreachable server is a warning.
    """

    def __init__(self, client: Client, task_queue: str) -> None:
        self._client = client
        self._task_queue = task_queue
        self._has_search_attributes: bool | None = None

    async def wake(self, record: RunRecord) -> None:
        """Start the workflow of a run, or let it look at the store; a server out of reach is a warning."""
        try:
            await self.start(record, start_signal=WAKE)
        except RPCError as error:
            if error.status not in UNREACHABLE:
                raise
            fix = "is stored, and continues once it can be"
            logger.warning("the Temporal server cannot be reached (%s); run %r %s", error, record.run_id, fix)

    async def start(self, record: RunRecord | Candidate, **options: Any) -> None:
        """Start the workflow of a run, unless it is running. Raises RPCError."""
        run_id, pipeline = record.run_id, record.pipeline
        pairs: list[SearchAttributePair[str]] = []
        if await self._can_search():
            pairs = [SearchAttributePair(PIPELINE_KEY, pipeline), SearchAttributePair(STATUS_KEY, "QUEUED")]
        # Temporal has priorities from 1 to 5, and keys of 64 bytes.
        key = None if record.key is None else record.key.encode()[:64].decode(errors="ignore")
        settings = {
            "id_conflict_policy": WorkflowIDConflictPolicy.USE_EXISTING,
            "search_attributes": TypedSearchAttributes(pairs),
            "priority": Priority(priority_key=min(max(3 + record.priority, 1), 5), fairness_key=key),
            **options,
        }
        await self._client.start_workflow(
            WORKFLOW, args=[run_id, pipeline], id=workflow_id(run_id), task_queue=self._task_queue, **settings
        )

    async def _can_search(self) -> bool:
        """Return True if the server has the search attributes of runs; asked once."""
        if self._has_search_attributes is None:
            try:
                known = await self._client.operator_service.list_search_attributes(
                    ListSearchAttributesRequest(namespace=self._client.namespace)
                )
                names = known.custom_attributes
                self._has_search_attributes = PIPELINE_KEY.name in names and STATUS_KEY.name in names
            except RPCError as error:
                if error.status in UNREACHABLE:
                    raise
                self._has_search_attributes = False  # Not everybody may ask.
        return self._has_search_attributes
