"""Start and wake the workflows of runs."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from typing import Any, Final

from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from stroma._utils.logs import get_logger
from stroma.drivers.temporal.workflow import PIPELINE_KEY, STATUS_KEY, WAKE, WORKFLOW

__all__ = ["UNREACHABLE", "Dispatcher", "workflow_id"]

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

    async def start(self, run_id: str, pipeline: str) -> None:
        """Start the workflow of a run, unless it is running; one that is running is woken."""
        await self._if_reachable(run_id, self.restart(run_id, pipeline))

    async def restart(self, run_id: str, pipeline: str) -> None:
        """As :meth:`start`, for a run that had ended: workers do not look for it. Raises RPCError without a server."""
        await self._start(run_id, pipeline, start_signal=WAKE)

    async def start_first(self, run_id: str, pipeline: str) -> None:
        """Start the workflow of a run that never had one."""
        try:
            await self._if_reachable(
                run_id,
                self._start(
                    run_id,
                    pipeline,
                    id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                    id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                ),
            )
        except WorkflowAlreadyStartedError:
            pass

    async def wake(self, run_id: str) -> None:
        """Let the workflow of a run look at the store; no-op without one."""
        handle = self._client.get_workflow_handle(workflow_id(run_id))
        try:
            await self._if_reachable(run_id, handle.signal(WAKE))
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise

    async def _start(self, run_id: str, pipeline: str, **options: Any) -> None:
        pairs: list[SearchAttributePair[str]] = []
        if await self._can_search():
            pairs = [
                SearchAttributePair(PIPELINE_KEY, pipeline),
                SearchAttributePair(STATUS_KEY, "QUEUED"),
            ]
        settings = {
            "id_reuse_policy": WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            "id_conflict_policy": WorkflowIDConflictPolicy.USE_EXISTING,
            "search_attributes": TypedSearchAttributes(pairs),
            **options,
        }
        await self._client.start_workflow(
            WORKFLOW, args=[run_id, pipeline], id=workflow_id(run_id), task_queue=self._task_queue, **settings
        )

    async def _if_reachable(self, run_id: str, call: Awaitable[None]) -> None:
        try:
            await call
        except RPCError as error:
            if error.status not in UNREACHABLE:
                raise
            logger.warning(
                "the Temporal server cannot be reached (%s); run %r is stored, and continues once it can be",
                error,
                run_id,
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
