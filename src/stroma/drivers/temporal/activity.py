"""The activity: the seam's ``perform``, with a heart that beats."""

from __future__ import annotations

import asyncio
import json
from time import monotonic
from typing import Any, Final, cast

from temporalio import activity
from temporalio.client import AsyncActivityCancelledError
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError, RPCStatusCode

from stroma._utils.logs import get_logger
from stroma.checkpoint import StoreError
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.plans import MissingNode
from stroma.drivers.remote.wire import ActivityRequest, Reply
from stroma.drivers.temporal import names

__all__ = ["Activities"]

logger = get_logger()

_LARGEST: Final = 1_900_000  # bytes; a server takes 2 MiB


class Activities:
    """The activities that a worker registers."""

    def __init__(self, attempts: Attempts, beat_seconds: float | None = None) -> None:
        self._attempts = attempts
        self._beat_seconds = beat_seconds

    @activity.defn(name=names.NODE)
    async def node(self, request: dict[str, Any]) -> dict[str, Any]:
        """Exactly one attempt of a node, or one end of a group."""
        return await self._perform(request)

    @activity.defn(name=names.RUN)
    async def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Perform the start or end of a run: call its hooks."""
        return await self._perform(request)

    async def _perform(self, request: dict[str, Any]) -> dict[str, Any]:
        info = activity.info()
        timeout = info.heartbeat_timeout
        heart: _Heart | None = None
        if timeout is not None:
            limit = timeout.total_seconds()
            heart = _Heart(self._beat_seconds or limit / 2, limit, str(request.get("run_id")))
        try:
            reply = await self._attempts.perform(
                cast("ActivityRequest", request), redelivered=info.attempt > 1, confirm=_confirm
            )
        except (MissingNode, StoreError) as error:
            # Nothing was begun. Another worker of this queue may have the node, while new code is rolled out, say; and a
            # payload store may be there again in a moment.
            last = isinstance(error, StoreError) and not error.transient
            raise ApplicationError(str(error), type=type(error).__name__, non_retryable=last) from error
        except ApplicationError:
            raise
        except Exception as error:
            # The node may have run: nobody runs it again because of something else.
            raise ApplicationError(str(error), type=type(error).__name__, non_retryable=True) from error
        finally:
            if heart is not None:
                heart.stop()
        return cast("dict[str, Any]", _reply_when_stopped(reply, request))


async def _confirm() -> None:
    """Raise StoreError if the server takes this worker for lost, and another one may have the attempt."""
    try:
        await activity.client().get_async_activity_handle(task_token=activity.info().task_token).heartbeat()
    except AsyncActivityCancelledError:
        await activity.wait_for_cancelled()  # The attempt ends as cancelled.
    except RPCError as error:
        refusal = StoreError(
            f"the server refuses that this worker continues its attempt: {error}; the effect is not called, and another attempt follows"
        )
        refusal.transient = error.status != RPCStatusCode.NOT_FOUND
        raise refusal from error


class _Heart:
    """Beats let the server know a worker that is lost, and let the worker know of a cancellation."""

    def __init__(self, every_seconds: float, timeout_seconds: float, run: str) -> None:
        self._every, self._timeout, self._run = every_seconds, timeout_seconds, run
        self._since = monotonic()
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            self._look()
            activity.heartbeat()
            await asyncio.sleep(self._every)

    def _look(self) -> None:
        silent, self._since = monotonic() - self._since, monotonic()
        if silent > self._timeout:
            logger.warning(
                "the event loop of this worker was blocked for %.1f s: run %r, like all that it was at, is taken for lost "
                "and begun again; put blocking work of nodes into threads (asyncio.to_thread), or raise heartbeat_seconds=",
                silent,
                self._run,
            )

    def stop(self) -> None:
        self._beating.cancel()
        self._look()


def _reply_when_stopped(reply: Reply, request: dict[str, Any]) -> Reply:
    details = activity.cancellation_details()
    was_requested = details is not None and details.cancel_requested
    if reply.get("cancelled") and not was_requested and not request.get("cancelled"):
        # It is this worker that ends, not the run.
        if "output" not in reply:
            may_have_happened = reply.get("effect", [0, True])[1]
            kind = "WorkerShutdown" if may_have_happened else "NotCalled"
            raise ApplicationError("the worker was shut down", type=kind)
        del reply["cancelled"]
    _check_size(reply)
    if "failure" in reply and not reply.get("halt", {}).get("suspended") and "broken" not in reply:
        failure = reply["failure"]
        # So that an operator sees it. Its words may hold values of states: they go with the rest, through the codec.
        raise ApplicationError(
            f"node {failure['node_id']!r} failed ({failure['failure_class']}, {failure['reason'] or failure['type']})",
            reply,
            type=names.FAILURE + failure["failure_class"],
            non_retryable=True,
            category=ApplicationErrorCategory.BENIGN,
        )
    return reply


def _check_size(reply: Reply) -> None:
    size = len(json.dumps(reply))
    if size > _LARGEST:
        # The server would refuse it, and have the node called again.
        raise ApplicationError(
            f"the reply has {size} bytes, and Temporal takes {_LARGEST}; let the node say less",
            type="TooLarge",
            non_retryable=True,
        )
