"""The workflow of a run: a loop of one activity that drives the run, and a wait for what its answer names.

Only ids and statuses cross Temporal. The workflow is not sandboxed: it imports no code of users, and uses
nothing but the functions of ``temporalio.workflow``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Final, Literal, NotRequired, TypedDict, cast

from temporalio import workflow
from temporalio.common import RetryPolicy, SearchAttributeKey
from temporalio.exceptions import ActivityError
from temporalio.worker import Interceptor, WorkflowInterceptorClassInput

__all__ = ["DRIVE", "PIPELINE_KEY", "STATUS_KEY", "WAKE", "WORKFLOW", "Answer", "LeaseSettings", "StromaRun"]

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
_RETRIES: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1), backoff_coefficient=2.0, maximum_interval=timedelta(seconds=30)
)
#: An activity returns after its slice; a step inside may take longer. A lost worker is noticed by its
#: heartbeats.
_START_TO_CLOSE: Final = timedelta(days=365)
#: Name of the function outside of the workflow that returns the lease of the runs of a pipeline.
_LEASE_OF: Final = "stroma.lease_seconds"


class Answer(TypedDict):
    """Outcome of one activity.

    Attributes:
        status: status of the run; for an ended run its end.
        until_ms: when the run is due, or free, in ms since the epoch.
    """

    outcome: Literal["ended", "suspended", "yielded", "busy", "blocked"]
    status: str
    until_ms: NotRequired[int | None]


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
        while True:
            self._is_woken = False
            answer = await self._drive(run_id, pipeline)
            is_ended = answer["outcome"] == "ended"
            if is_ended and not self._is_woken:  # Somebody may have resumed it while its end was reported.
                return answer["status"]
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(args=[run_id, pipeline])
            if not is_ended and answer["outcome"] != "yielded":
                await self._wait(answer.get("until_ms"))

    async def _drive(self, run_id: str, pipeline: str, *, cancels: bool = False) -> Answer:
        lease_of = cast("Callable[[str], float]", workflow.extern_functions()[_LEASE_OF])
        answer: Answer = await workflow.execute_activity(
            DRIVE,
            args=[run_id, pipeline, cancels],
            result_type=dict,
            start_to_close_timeout=_START_TO_CLOSE,
            heartbeat_timeout=timedelta(seconds=lease_of(pipeline)),
            retry_policy=_RETRIES,
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )
        if workflow.info().typed_search_attributes.get(PIPELINE_KEY) is not None:
            workflow.upsert_search_attributes([STATUS_KEY.value_set(answer["status"])])
        return answer

    async def _wait(self, until_ms: int | None) -> None:
        """Return when a run is due, when it may have become due, and once somebody has changed it in the store."""
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


class LeaseSettings(Interceptor):
    """Gives the workflows of a worker the leases of its pipelines: heartbeats are sent when a lease was renewed."""

    def __init__(self, lease_of: Callable[[str], float]) -> None:
        self._lease_of = lease_of

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> None:
        input.unsafe_extern_functions[_LEASE_OF] = self._lease_of
