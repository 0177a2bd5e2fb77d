"""The one workflow: an interpreter of frozen plans, whose driver is Temporal."""

# Which keys a request has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import builtins
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, cast

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
from temporalio.worker import Interceptor, WorkflowInterceptorClassInput
from temporalio.workflow import ActivityCancellationType, HandlerUnfinishedPolicy

with workflow.unsafe.imports_passed_through():
    from stroma._utils.text import one_line
    from stroma.checkpoint import StoreError
    from stroma.drivers.remote.attempts import Attempts
    from stroma.drivers.remote.flow_bodies import FlowSite
    from stroma.drivers.remote.interpreter import Interpreter
    from stroma.drivers.remote.plans import MissingNode
    from stroma.drivers.remote.state import Continue, next_segment
    from stroma.drivers.remote.wire import ActivityRequest, Plan, Reply, SegmentReport, fold, unfold
    from stroma.drivers.temporal import names
    from stroma.failures.classes import FailureClass
    from stroma.trace.result import RunStatus

__all__ = ["FlowPipelines", "StromaFlow", "StromaRun"]

_MAX_CALL: Final = 200  # characters of a call in the id of its activity
_ONCE: Final = RetryPolicy(maximum_attempts=1)
#: Types of failures of a worker that has not called the effect.
_NOT_CALLED: Final = ("MissingNode", "StoreError", "NotCalled")


class _Driver:
    """Driver of an interpreter: activities, timers, and random numbers that replay."""

    def __init__(self, plan: Plan) -> None:
        options = plan["options"]
        self._options = options
        self._is_flow = any(spec["kind"] == "flow" for spec in plan["nodes"])
        self._alone = len(plan["nodes"]) == 1
        self._requests = itertools.count()
        self._last_ms = 0
        #: What is to be cancelled in this turn of the event loop, by the number of its request.
        self._cancelled: list[tuple[int, Callable[[], Any]]] = []
        self._retries = RetryPolicy(
            initial_interval=timedelta(seconds=options["redelivery_seconds"]),
            maximum_interval=timedelta(seconds=30),
            # Lost workers, and workers that lack the node: what a node raises is no concern of Temporal's.
            maximum_attempts=options["deliveries"],
            # It used all the time that it may take: another attempt would fail in the same way.
            non_retryable_error_types=["TemporalTimeout:StartToClose"],
        )

    async def ask(self, request: ActivityRequest) -> tuple[Reply, bool]:
        if "effect" not in request:
            return await self._deliver(request, self._retries)
        # The server gives an attempt of an effect to one worker only; what none has begun, another may.
        seconds, most = self._options["redelivery_seconds"], self._options["deliveries"]
        for delivery in itertools.count(1):
            reply, cancelled = await self._deliver(request, _ONCE)
            if cancelled or not reply.get("not_begun") or delivery == most:
                return reply, cancelled
            await self.sleep(min(seconds * 2 ** min(delivery - 1, 10), 30))
        raise AssertionError

    async def _deliver(self, request: ActivityRequest, retries: RetryPolicy) -> tuple[Reply, bool]:
        of_run = request["op"] in ("begin", "end")
        number = next(self._requests)
        handle = workflow.start_activity(
            # All of one type in a flow: where a history does not fit the body, Temporal then names the ids of the steps.
            names.RUN if of_run and not self._is_flow else names.NODE,
            cast("Any", request),
            activity_id=self._id_of(request) if self._is_flow else None,
            result_type=dict,
            start_to_close_timeout=timedelta(seconds=self._options["attempt_seconds"]),
            heartbeat_timeout=timedelta(seconds=self._options["heartbeat_seconds"]),
            retry_policy=retries,
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
                    self._cancel_in_order(number, handle.cancel)
            except ActivityError as error:
                cause = error.cause
                if isinstance(cause, CancelledError):
                    raise asyncio.CancelledError from None
                return _reply_of(cause, error, request), cancelled

    def _id_of(self, request: ActivityRequest) -> str:
        """Return the id of an activity: the call in its flow, the attempt, and a hash of its input."""
        op, value = request["op"], request["value"]
        if "spec" not in request:
            return op
        digest = hashlib.sha256((value.get("text") or value.get("blob") or "").encode()).hexdigest()[:8]
        call = request["branch"] or request["spec"]["id"]
        if not self._alone:
            call = f"{request['position']} {call}"
        if op != "attempt":
            call = f"{call} {op}" if op != "items" else f"{call} items from {request['first']}"
        if len(call) > _MAX_CALL:
            call = f"{call[:_MAX_CALL]}~{hashlib.sha256(call.encode()).hexdigest()[:16]}"
        return f"{call} attempt {request.get('attempt', 1)} with input {digest}"

    def _cancel_in_order(self, number: int, cancel: Callable[[], Any]) -> None:
        """Cancel in the order of the requests: a TaskGroup cancels its tasks in another order in each replay."""
        if not self._cancelled:
            asyncio.get_running_loop().call_soon(self._cancel_all)
        self._cancelled.append((number, cancel))

    def _cancel_all(self) -> None:
        for _, cancel in sorted(self._cancelled, key=lambda one: one[0]):
            cancel()
        self._cancelled.clear()

    async def sleep(self, seconds: float) -> None:
        if not self._is_flow:
            await workflow.sleep(seconds)
            return
        number = next(self._requests)
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        timer = loop.call_later(seconds, _end, done)
        try:
            await done
        except asyncio.CancelledError:
            self._cancel_in_order(number, timer.cancel)
            raise

    # ------------------------------------------------------------------ bodies of flows

    def site(self, pipeline: str) -> FlowSite:
        pipelines = workflow.extern_functions().get(names.PIPELINES)
        if pipelines is None:
            raise MissingNode("this worker has no pipelines; pass them to its StromaPlugin")
        return cast("FlowSite", pipelines(pipeline))

    def now_ms(self) -> int:
        # Outside is a body that is collected after its workflow was evicted: its last wait ends there.
        if workflow.in_workflow():
            self._last_ms = round(workflow.now().timestamp() * 1000)
        return self._last_ms

    def is_replaying(self) -> bool:
        return workflow.unsafe.is_replaying()

    def draw(self) -> float:
        return workflow.random().random()

    def full(self) -> bool:
        info = workflow.info()
        return (
            info.is_continue_as_new_suggested()
            or info.get_current_history_length() >= self._options["history_events"]
        )


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
    reply: Reply = {
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
    if "effect" in request:
        if isinstance(cause, ApplicationError) and cause.type in _NOT_CALLED:
            reply["not_begun"] = not cause.non_retryable
        else:
            reply["lost"] = f"{kind}: {cause or error}"
    return reply


@contextmanager
def _failing() -> Iterator[None]:
    """Make a failed workflow of what nobody foresaw: a plain exception would be tried again for ever.

    A history that does not replay is none of it: that waits for a worker with the right code. So do a flow that this
    worker lacks, and a payload store that cannot be reached.
    """
    try:
        yield
    except (FailureError, MissingNode):
        raise
    except StoreError as error:
        if error.transient:
            raise
        raise ApplicationError(str(error), type="StoreError", non_retryable=True) from error
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
            self._driver = _Driver(self._plan)
            self._run = Interpreter(self._plan, unfold(start["state"]), self._driver, self._driver)
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
            self._parked = report
            self._say(report["status"])
            try:
                await workflow.wait_condition(
                    lambda: self._go_on or self._answered, timeout=self._seconds_to_wake()
                )
            except builtins.TimeoutError:
                pass
            except asyncio.CancelledError:
                # No worker executes it: there is no attempt to cancel.
                ended = {**report, "status": RunStatus.CANCELLED.value, "suspended": []}
                report = cast("SegmentReport", ended)
                break
            self._parked, self._go_on = None, False
            self._run = Interpreter(self._plan, next_segment(self._run.state), self._driver, self._driver)
            self._say("RUNNING")
        self._say(report["status"])
        if report["status"] in (RunStatus.FAILED, RunStatus.PARTIAL):
            failure = report["failure"]
            what = "" if failure is None else f" at node {failure['node_id']!r} ({failure['failure_class']})"
            # Its words may hold values of states: they stand in the report, which goes through the codec.
            raise ApplicationError(
                f"the run is {report['status']}{what}",
                self._result(report),
                type=names.FAILURE + report["status"],
                non_retryable=True,
            )
        return self._result(report)

    def _result(self, report: SegmentReport) -> dict[str, Any]:
        return cast("dict[str, Any]", report)

    @property
    def _answered(self) -> bool:
        state = self._run.state
        answered = [key in state["answers"] for key in state["waiting"]]
        # A list continues with what is missing; the body of a flow may need no more than one answer.
        return any(answered) if "flow" in state else bool(answered) and all(answered)

    def _seconds_to_wake(self) -> float | None:
        wake_ms = self._run.wake_ms
        return None if wake_ms is None else max(0.001, (wake_ms - self._driver.now_ms()) / 1000)

    def _say(self, status: str) -> None:
        if self._options["search"]:
            workflow.upsert_search_attributes([names.STATUS_KEY.value_set(status)])

    # ------------------------------------------------------------------ who asks

    @workflow.signal(name=names.ANSWER)
    def answer(self, answer: dict[str, Any]) -> None:
        """Accept the answer of a person; the run continues once all nodes are answered."""
        key = f"{answer.get('position')}|{answer.get('branch')}"
        payload = answer.get("payload")
        state = self._run.state
        waits = state["waiting"].get(key)
        if waits is None and "flow" in state:  # Its body is on the way to the question again.
            waits = state["flow"]["questions"].get(key)
        # The question about a call may have become one about the next call.
        if waits is None or not isinstance(payload, str) or waits.get("effect") != answer.get("effect"):
            # Anybody may send a signal. One that raises would stop the workflow's task for good.
            workflow.logger.warning(
                "an answer to %s is left out: nothing waits for it, it is for another call, or it has no payload",
                one_line(key),
            )
            return
        state["answers"].setdefault(key, {**waits, "payload": payload})
        if self._run.wake_flow is not None:
            self._run.wake_flow()

    @workflow.signal(name=names.RESUME)
    def resume(self, segment: int) -> None:
        """Go on without all answers, if the run still waits in this segment."""
        # Its report says so before its hooks have been called, and it waits.
        is_suspended = self._run.status is RunStatus.SUSPENDED
        if is_suspended and self._run.state["segment"] == segment:
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


@workflow.defn(name=names.FLOW, failure_exception_types=[workflow.NondeterminismError])
class StromaFlow(StromaRun):
    """One run with a flow in it. A body that does not do what its history says ends the run."""

    @workflow.init
    def __init__(self, start: dict[str, Any]) -> None:
        super().__init__(start)

    @workflow.run
    async def run(self, start: dict[str, Any]) -> dict[str, Any]:
        return await super().run(start)

    def _result(self, report: SegmentReport) -> dict[str, Any]:
        # With the state: no worker can replay the history once the body was corrected, and that is when one resumes.
        return fold({"report": report, "state": {**self._run.state, "rows": []}, "plan": self._plan})


class FlowPipelines(Interceptor):
    """Lets the workflows of a worker reach its pipelines: the bodies of their flows."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> None:
        input.unsafe_extern_functions[names.PIPELINES] = self._attempts.site
