"""The one workflow: an interpreter of frozen plans, whose driver is Temporal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    FailureError,
    TimeoutError,
    TimeoutType,
)
from temporalio.workflow import ActivityCancellationType, HandlerUnfinishedPolicy

with workflow.unsafe.imports_passed_through():
    from stroma.drivers.remote.interpreter import Interpreter
    from stroma.drivers.remote.state import Continue, next_segment
    from stroma.drivers.remote.wire import ActivityRequest, Plan, Reply, SegmentReport, fold, unfold
    from stroma.drivers.temporal import names
    from stroma.failures.classes import FailureClass
    from stroma.trace.result import RunStatus

__all__ = ["StromaRun"]


class _Driver:
    """Driver of an interpreter: activities, timers, and random numbers that replay."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._retries = RetryPolicy(
            initial_interval=timedelta(seconds=options["redelivery_seconds"]),
            maximum_interval=timedelta(seconds=30),
            # Lost workers, and workers that lack the node: what a node raises is no concern of Temporal's.
            maximum_attempts=options["deliveries"],
            # It used all the time that it may take: another attempt would fail in the same way.
            non_retryable_error_types=["TemporalTimeout:StartToClose"],
        )

    async def ask(self, request: ActivityRequest) -> tuple[Reply, bool]:
        of_run = request["op"] in ("begin", "end")
        handle = workflow.start_activity(
            names.RUN if of_run else names.NODE,
            cast("Any", request),
            result_type=dict,
            start_to_close_timeout=timedelta(seconds=self._options["attempt_seconds"]),
            heartbeat_timeout=timedelta(seconds=self._options["heartbeat_seconds"]),
            retry_policy=self._retries,
            cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )
        cancelled = False
        while True:
            try:
                return cast("Reply", await asyncio.shield(handle)), cancelled
            except asyncio.CancelledError:
                if cancelled and handle.done():
                    raise
                cancelled = True
                # What came in the same moment is not lost: the activity's own task needs a turn to take it.
                for _ in range(3):
                    if not handle.done():
                        await asyncio.sleep(0)
                if not handle.done():
                    handle.cancel()
            except ActivityError as error:
                cause = error.cause
                if isinstance(cause, CancelledError):
                    raise asyncio.CancelledError from None
                return _reply_of(cause, error, request), cancelled

    async def sleep(self, seconds: float) -> None:
        await workflow.sleep(seconds)

    def draw(self) -> float:
        return workflow.random().random()

    def full(self) -> bool:
        info = workflow.info()
        return (
            info.is_continue_as_new_suggested()
            or info.get_current_history_length() >= self._options["history_events"]
        )


def _reply_of(cause: BaseException | None, error: ActivityError, request: ActivityRequest) -> Reply:
    """Return the failure that a worker reported; or one that no worker was found or all were lost."""
    if isinstance(cause, ApplicationError) and (cause.type or "").startswith(names.FAILURE) and cause.details:
        return cast("Reply", cause.details[0])
    kind, message = "WorkerLost", f"{str(cause or error) or type(cause).__name__}"
    if isinstance(cause, ApplicationError):
        kind = cause.type or kind
    elif isinstance(cause, TimeoutError) and cause.type is TimeoutType.START_TO_CLOSE:
        message += ": it took longer than any attempt may; raise attempt_seconds=, then resume the run"
    else:
        message += (
            ": the workers that were given it ended, or were silent for longer than heartbeat_seconds= (a node that blocks "
            "its event loop is); look at their logs, then resume the run"
        )
    return {
        "failure": {
            "failure_class": FailureClass.RECOVERABLE.value,
            "message": message,
            "reason": "worker",
            "retry_after": None,
            "node_id": request["spec"]["id"] if "spec" in request else "run",
            "attempt": request.get("attempt", 1),
            "type": kind,
            "data": None,
        },
        "halt": {"partial": True, "spent": False, "suspended": False},
    }


@contextmanager
def _failing() -> Iterator[None]:
    """Make a failed workflow of what nobody foresaw: a plain exception would be tried again for ever.

    A history that does not replay is none of it: that waits for a worker with the right code.
    """
    try:
        yield
    except FailureError:
        raise
    except Exception as error:
        raise ApplicationError(
            f"{type(error).__name__}: {error}", type=type(error).__name__, non_retryable=True
        ) from error


@workflow.defn(name=names.WORKFLOW)
class StromaRun:
    """One run. Its input is the plan and the state that it begins with, which is where a fresh history goes on, too."""

    @workflow.init
    def __init__(self, start: dict[str, Any]) -> None:
        with _failing():
            self._plan: Plan = start["plan"]
            self._options: dict[str, Any] = self._plan["options"]
            self._driver = _Driver(self._options)
            self._run = Interpreter(self._plan, unfold(start["state"]), self._driver)
        #: What the last segment came to, while the run waits for a person.
        self._parked: SegmentReport | None = None
        self._go_on = False

    @workflow.run
    async def run(self, start: dict[str, Any]) -> dict[str, Any]:
        with _failing():
            return await self._go()

    async def _go(self) -> dict[str, Any]:
        while True:
            try:
                report = await self._run.run()
            except Continue:
                workflow.continue_as_new({"plan": self._plan, "state": fold(self._run.state)})
            if report["status"] != RunStatus.SUSPENDED:
                break
            self._parked, self._go_on = report, False
            self._say(report["status"])
            try:
                await workflow.wait_condition(lambda: self._go_on or self._answered)
            except asyncio.CancelledError:
                # No worker executes it: there is no attempt to cancel.
                report = {**report, "status": RunStatus.CANCELLED.value, "suspended": []}
                break
            self._parked = None
            self._run = Interpreter(self._plan, next_segment(self._run.state), self._driver)
            self._say("RUNNING")
        self._say(report["status"])
        if report["status"] in (RunStatus.FAILED, RunStatus.PARTIAL):
            failure = report["failure"]
            what = "" if failure is None else f" at node {failure['node_id']!r} ({failure['failure_class']})"
            # Its words may hold values of states: they stand in the report, which goes through the codec.
            raise ApplicationError(
                f"the run is {report['status']}{what}",
                report,
                type=names.FAILURE + report["status"],
                non_retryable=True,
            )
        return cast("dict[str, Any]", report)

    @property
    def _answered(self) -> bool:
        waiting = self._run.state["waiting"]
        return bool(waiting) and all(key in self._run.state["answers"] for key in waiting)

    def _say(self, status: str) -> None:
        if self._options["search"]:
            workflow.upsert_search_attributes([names.STATUS_KEY.value_set(status)])

    # ------------------------------------------------------------------ who asks

    @workflow.signal(name=names.ANSWER)
    def answer(self, answer: dict[str, Any]) -> None:
        """Accept the answer of a person; the run continues once all nodes are answered."""
        key = f"{answer.get('position')}|{answer.get('branch')}"
        payload = answer.get("payload")
        waits = self._run.state["waiting"].get(key)
        if waits is None or not isinstance(payload, str):
            # Anybody may send a signal. One that raises would stop the workflow's task for good.
            workflow.logger.warning(
                "an answer to %s is left out: nothing waits for it, or it has no payload", key
            )
            return
        self._run.state["answers"].setdefault(key, {**waits, "payload": payload})

    @workflow.signal(name=names.RESUME)
    def resume(self, segment: int) -> None:
        """Go on without all answers, if the run still waits in this segment."""
        if self._parked is not None and self._parked["segment"] == segment:
            self._go_on = True

    @workflow.query(name=names.REPORT)
    def report(self) -> dict[str, Any]:
        """Return the report of the run so far, with its trace."""
        return cast("dict[str, Any]", self._parked or self._run.report())

    @workflow.query(name=names.ROWS)
    def rows(self, since: int) -> dict[str, Any]:
        """Return the rows of the current segment from a number on."""
        state = self._run.state
        status = self._parked["status"] if self._parked is not None else "RUNNING"
        return {"segment": state["segment"], "status": status, "rows": state["rows"][since:]}

    @workflow.query(name=names.STATE)
    def state(self) -> dict[str, Any]:
        """Return the state of the run, for another run that continues from it."""
        return {"plan": self._plan, "state": fold(self._run.state)}

    @workflow.update(name=names.SUSPENDED, unfinished_policy=HandlerUnfinishedPolicy.ABANDON)
    async def suspended(self, segment: int) -> dict[str, Any]:
        """Wait until the run waits, in this segment or a later one."""
        await workflow.wait_condition(lambda: self._parked is not None and self._parked["segment"] >= segment)
        return cast("dict[str, Any]", self._parked)
