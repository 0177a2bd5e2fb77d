"""Calls of nodes with a place, for the owner of a run: activities of no workflow, on the task queue of the place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from temporalio.client import ActivityFailureError, ActivityHandle, Client
from temporalio.common import ActivityIDReusePolicy, RetryPolicy
from temporalio.exceptions import ActivityAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from stroma._utils.logs import get_logger
from stroma._utils.text import one_line
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import held_by, output_class
from stroma.contracts.schema import schema_of
from stroma.cost.usage import UsageError
from stroma.drivers.temporal.dispatch import UNREACHABLE, workflow_id
from stroma.drivers.temporal.wire import CALL, PlaceAnswer, PlaceRequest
from stroma.engine.execution import NodeExecution
from stroma.engine.placed_calls import OpenCall
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PlaceError, RecordedVerdict, RunFailed, WorkerLost

__all__ = ["TemporalCaller"]

T = TypeVar("T")
logger = get_logger()
#: A call may take as long as it likes; a lost worker is noticed by its heartbeats.
_START_TO_CLOSE: Final = timedelta(days=365)
#: Type of the failure that temporalio makes of an output over the limit of the server.
_TOO_LARGE: Final = "PayloadsTooLarge"


class TemporalCaller:
    """Calls functions on workers of other task queues; see :class:`stroma.engine.placed_calls.PlaceCaller`."""

    def __init__(self, client: Client, own_place: str) -> None:
        self._client = client
        self.own_place = own_place

    async def call(self, run: NodeExecution, contract: NodeContract[Any, Any], call: OpenCall) -> Any:
        """See PlaceCaller."""
        handle: ActivityHandle[Any] = self._client.get_activity_handle(workflow_id(call.id))
        if not (call.is_sent and contract.effect):  # The server may have forgotten the call of an effect.
            await self._send(run, contract, call)
        try:
            data = await _until_reached(handle.result)
        except (ActivityFailureError, RPCError) as error:
            cause = error.__cause__ or error
            text = (
                f"the worker of place {contract.place!r} did not answer call {call.id!r} of node {run.node_id!r}: "
                f"{one_line(str(cause))}"
            )
            if getattr(cause, "type", None) == _TOO_LARGE:
                raise RunFailed.recorded(
                    text, _TOO_LARGE, RecordedVerdict(FailureClass.TERMINAL, "too_large")
                ) from None
            raise WorkerLost(text) from error
        answer = PlaceAnswer.model_validate(data)
        if answer.reports or answer.usage_error is not None:
            run.reported = list(answer.reports)
            run.misreported = None if answer.usage_error is None else UsageError(answer.usage_error)
        for name, data in answer.events:
            run.emit(data, name)
        if answer.failure is not None:
            raise answer.failure.error()
        assert answer.output is not None
        schema = schema_of(contract.output_schema if answer.is_typed else output_class(None))
        return held_by(schema.decode(answer.output.encode()))

    async def cancel(self, call: OpenCall) -> None:
        """See PlaceCaller."""
        handle: ActivityHandle[Any] = self._client.get_activity_handle(workflow_id(call.id))
        try:
            await handle.cancel(rpc_timeout=timedelta(seconds=5))
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                logger.warning("call %r could not be cancelled: %s", call.id, error)

    async def _send(self, run: NodeExecution, contract: NodeContract[Any, Any], call: OpenCall) -> None:
        """Send a call, unless it was sent before. Raises PlaceError if the server refuses it."""
        assert contract.place is not None
        place, request = contract.place, PlaceRequest.of(run, call).model_dump(mode="json")

        start = partial(
            self._client.start_activity,
            CALL,
            request,
            id=workflow_id(call.id),
            task_queue=place,
            start_to_close_timeout=_START_TO_CLOSE,
            heartbeat_timeout=timedelta(seconds=run.ctx.config.lease_seconds),
            retry_policy=RetryPolicy(maximum_attempts=1),  # The policies of the run decide.
            id_reuse_policy=ActivityIDReusePolicy.REJECT_DUPLICATE,
            summary=run.node_id[:200],
        )
        try:
            await _until_reached(start)
        except ActivityAlreadyStartedError:
            pass
        except RPCError as error:
            raise PlaceError(
                f"the Temporal server refused to call node {run.node_id!r} at place {place!r}: {one_line(str(error))}; places "
                "need a server with standalone activities, and states below its limit of 2 MB"
            ) from error


async def _until_reached(ask: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of the server, once it can be reached; temporalio logs that it cannot."""
    while True:
        try:
            return await ask()
        except RPCError as error:
            # gRPC gives a message that is too large the status of a server that is busy.
            if error.status not in UNREACHABLE or "larger than max" in error.message:
                raise
        await asyncio.sleep(1)
