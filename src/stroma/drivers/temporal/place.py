"""Nodes with a place: how the owner of a run calls them, and the worker without a store that answers."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, Final, Literal, NoReturn, TypeVar

from pydantic import BaseModel
from temporalio import activity
from temporalio.client import ActivityFailureError, ActivityHandle, Client
from temporalio.common import ActivityIDReusePolicy, RetryPolicy
from temporalio.exceptions import ActivityAlreadyStartedError, ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from stroma._utils.access import type_name
from stroma._utils.logs import get_logger
from stroma._utils.text import one_line
from stroma.checkpoint import CheckpointManager, InMemoryStore, RunRequest
from stroma.contracts.codec import describe_error
from stroma.contracts.contract import ContractRegistry, ContractViolation, NodeContract, output_violation
from stroma.contracts.node import Node, held_by, marked_nodes, output_class
from stroma.contracts.schema import schema_of
from stroma.cost.budget import ExecutionBudget
from stroma.cost.usage import Report, UsageError
from stroma.drivers.temporal.workflow import START_TO_CLOSE, UNREACHABLE
from stroma.engine.commit import encode_rejected, violation_of
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode, leave
from stroma.engine.metering import count_returned
from stroma.engine.placed_calls import OpenCall
from stroma.engine.tasks import CONTINUES, call_in_thread, passes_through
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PlaceError, RecordedVerdict, RunFailed, Suspend, WorkerLost
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.failures.mistakes import explain_mistake
from stroma.failures.providers import requested_waits
from stroma.failures.refusals import is_refusal
from stroma.hooks.dispatch import Hooks
from stroma.runner.events import EventHooks, EventHub
from stroma.runner.pipeline import Pipeline, leaves_in, nodes_of
from stroma.runner.runner import StromaRunner
from stroma.trace.rejected import read_rejected

CALL: Final = "stroma.call"


class SentFailure(BaseModel):
    """A failure of another process. ``rejected``: the output that broke its contract, in stored form."""

    message: str
    type_name: str | None
    verdict: RecordedVerdict
    rejected: str | None = None

    def error(self) -> RunFailed:
        """Return an exception that stands for the one in the other process."""
        return RunFailed.recorded(self.message, self.type_name, self.verdict)


class PlaceRequest(BaseModel):
    """A call."""

    run_id: str
    pipeline: str
    node_id: str
    kind: Literal["node", "group", "item"]
    position: int
    branch: str
    attempt: int
    idempotency_key: str
    state: str  # The input in stored form.
    model: str | None  # The fallback that is due.
    budget: ExecutionBudget  # Remaining of that of the run.
    last_failure: SentFailure | None  # Of the attempt before.
    takes_events: bool = False  # Emitted events have receivers.

    @classmethod
    def of(cls, run: RunningNode, call: OpenCall) -> PlaceRequest:
        """Return the request for a call."""
        rest, last = run.remaining_budget, run.last_failure
        budget = ExecutionBudget(
            max_tokens_total=rest.tokens,
            max_cost_usd=rest.cost_usd,
            max_latency_ms=None if rest.latency_ms is None else int(rest.latency_ms),
        )
        return cls(
            run_id=run.run_id,
            pipeline=run.pipeline,
            node_id=run.node_id,
            kind=run.kind,
            position=run.position,
            branch=run.branch,
            attempt=run.attempt,
            idempotency_key=run.idempotency_key,
            state=call.state.decode(),
            model=run.ctx.fallback_model(),
            budget=budget,
            last_failure=None if last is None else _sent(run, last),
            takes_events=bool(run.ctx.fire.receivers),
        )

    def failure_before(self, schema: type[BaseModel]) -> Failure | None:
        """Return the failure of the attempt before. ``schema``: of the node's output."""
        last = self.last_failure
        if last is None:
            return None
        rejected = None if last.rejected is None else read_rejected(last.rejected)
        error = last.error() if rejected is None else violation_of(self.node_id, rejected, schema)
        kind, reason, seconds = last.verdict[:3]
        return Failure(error, kind, self.node_id, self.attempt - 1, last.message, reason, seconds)


def _sent(run: RunningNode, failure: Failure) -> SentFailure:
    error, rejected = failure.exception, None
    if isinstance_by_type(error, ContractViolation):
        rejected = encode_rejected(error.raw, error, "full", run.ctx.redactor).decode()
    verdict = RecordedVerdict(failure.failure_class, failure.reason, failure.retry_after_seconds)
    return SentFailure(
        message=failure.message, type_name=type_name(error), verdict=verdict, rejected=rejected
    )


class PlaceAnswer(BaseModel):
    """The end of a call."""

    output: str | None = None  # In stored form; None of a call that failed.
    is_typed: bool = True  # The output satisfies its contract; otherwise it is plain data.
    reports: tuple[Report, ...] = ()  # What the call used.
    usage_error: str | None = None  # What is wrong with its usage.
    events: tuple[tuple[str, Any], ...] = ()  # Names and data of the newest emitted events.
    failure: SentFailure | None = None


T = TypeVar("T")
logger = get_logger()
#: Type of the failure of a call that a worker without the node refuses.
_REFUSED: Final = "stroma.failures.errors.WorkerLost"
#: Verdicts of failures of the activity by their type; temporalio makes the first one of an output over the
#: limit of the server.
_VERDICTS: Final = {
    "PayloadsTooLarge": RecordedVerdict(FailureClass.TERMINAL, "too_large"),
    _REFUSED: RecordedVerdict(FailureClass.RECOVERABLE, "worker_lost", is_refusal=True),
}


class TemporalCaller:
    """Calls the functions of nodes with a place on workers of other task queues, for the runs of one process.

    Attributes:
        own_place: where runs are driven; no node may have this place.
    """

    def __init__(self, client: Client, own_place: str) -> None:
        self._client = client
        self.own_place = own_place

    async def call(self, run: RunningNode, contract: NodeContract[Any, Any], call: OpenCall) -> Any:
        """Return what the function returns, and record its usage. A call that was sent is awaited.

        Raises RunFailed for what the function raises, WorkerLost, PlaceError.
        """
        handle: ActivityHandle[Any] = self._client.get_activity_handle(call.id)
        if not (call.is_sent and contract.effect):  # The server may have forgotten the call of an effect.
            await self._send(run, contract, call)
        try:
            data = await _until_reached(handle.result)
        except (ActivityFailureError, RPCError) as error:
            cause = error.__cause__ or error
            text = (
                f"the worker of place {contract.place!r} did not answer call {call.id!r} of node "
                f"{run.node_id!r}: {one_line(str(cause))}"
            )
            kind = getattr(cause, "type", None)
            if kind in _VERDICTS:
                raise RunFailed.recorded(text, kind, _VERDICTS[kind]) from None
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
        """End a call whose result nobody needs. Never raises."""
        handle: ActivityHandle[Any] = self._client.get_activity_handle(call.id)
        try:
            await handle.cancel(rpc_timeout=timedelta(seconds=5))
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                logger.warning("call %r could not be cancelled: %s", call.id, error)

    async def _send(self, run: RunningNode, contract: NodeContract[Any, Any], call: OpenCall) -> None:
        """Send a call, unless it was sent before. Raises PlaceError if the server refuses it."""
        assert contract.place is not None
        place, request = contract.place, PlaceRequest.of(run, call).model_dump(mode="json")
        start = partial(
            self._client.start_activity,
            CALL,
            request,
            id=call.id,
            task_queue=place,
            start_to_close_timeout=START_TO_CLOSE,
            heartbeat_timeout=timedelta(seconds=run.ctx.config.lease_seconds),
            retry_policy=RetryPolicy(maximum_attempts=1),  # The policies of the run decide.
            id_reuse_policy=ActivityIDReusePolicy.REJECT_DUPLICATE,
            summary=run.node_id[:30],  # A server takes 400 bytes of JSON: 12 for an emoji.
        )
        try:
            await _until_reached(start)
        except ActivityAlreadyStartedError:
            pass
        except RPCError as error:
            raise PlaceError(
                f"the Temporal server refused to call node {run.node_id!r} at place {place!r}: "
                f"{one_line(str(error))}; places need standalone activities, and states below 2 MB"
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


#: Output and events of an answer as JSON; the server takes 2 MB.
_MAX_ANSWER_BYTES: Final = 500_000


class _PlacedRun(ReliabilityContext):
    """The run around a call, of which there is no journal here."""

    model: str | None = None

    def fallback_model(self) -> str | None:
        return self.model


class _NoJournal(CheckpointManager):
    def open_run(self, request: RunRequest) -> NoReturn:
        raise NotImplementedError(
            "a node with a place cannot call steps or agents under a guard; call them in another node"
        )


class _PlacedNode(RunningNode):
    """The current node of a call."""

    key = ""

    @property
    def idempotency_key(self) -> str:
        return self.key


class CallActivity:
    """Calls the nodes of some pipelines that have a place, in one worker, with the config of their runs."""

    def __init__(self, place: str, pipelines: Sequence[Pipeline], config: RunConfig | None) -> None:
        self._place = place
        self._runner = StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()), config)
        self._served = self._runner._stored.served(pipelines)

    @activity.defn(name=CALL)
    async def call(self, data: dict[str, Any]) -> dict[str, Any]:
        """Call the function of a node. An exception of the function is an answer."""
        request = PlaceRequest.model_validate(data)
        try:
            node, config = self._find(request)
            assert node.contract is not None
            state = schema_of(node.contract.input_schema).decode(request.state.encode())
        except ValueError as error:
            message = (
                f"a worker of place {self._place!r} cannot call node {request.node_id!r} of "
                f"{request.pipeline!r}: {describe_error(error)[0]}; start it with the code of the run"
            )
            raise ApplicationError(message, type=_REFUSED) from None
        with _beating():
            answer = await _answer(request, node, state, config)
        return answer.model_dump(mode="json")

    def _find(self, request: PlaceRequest) -> tuple[Node, RunConfig]:
        """Return a node of its pipeline or of this process, and its configuration. Raises ValueError."""
        served, wanted = self._served.get(request.pipeline), (request.node_id, self._place)
        for nodes in () if served is None else (leaves_in(nodes_of(served.nodes)), marked_nodes()):
            matching = {one for one in nodes if one.contract and (one.node_id, one.contract.place) == wanted}
            if served is not None and len(matching) == 1:
                return matching.pop(), self._runner._config_of(served.nodes)
        raise ValueError("it has no such node with this place, or several")


async def _answer(request: PlaceRequest, node: Node, state: BaseModel, config: RunConfig) -> PlaceAnswer:
    """Call a function, and return its end."""
    config = config.with_run_id(request.run_id).model_copy(update={"budget": request.budget})
    ctx = _PlacedRun.for_run(config, ContractRegistry(), _NoJournal(InMemoryStore()))
    ctx.pipeline, ctx.model = request.pipeline, request.model
    run = _PlacedNode(ctx, request.node_id, request.kind, request.position, request.branch)
    contract = node.contract
    assert contract is not None
    run.attempt, run.key = request.attempt, request.idempotency_key
    run.last_failure = request.failure_before(contract.output_schema)
    hub = EventHub()
    if request.takes_events:
        ctx.fire = Hooks((EventHooks(hub=hub),), run_id=ctx.run_id, limit_seconds=None, failures=[])
        hub.publish("node_start", ctx.run_id, request.node_id, attempt_id=run.identify_attempt())
    answer, usage_error = PlaceAnswer(), None
    token = CURRENT.set(run)
    try:
        arguments = (state, ctx.node_context())
        if node.is_async:
            output = await node.call(*arguments)
        else:
            warn = partial(ctx.run_logger.warning, CONTINUES, node.node_id)
            output = await call_in_thread(node.call, arguments, warn)
        if type(output) is tuple:
            output, usage_error = count_returned(run, output)
        answer.output, answer.is_typed = _encode(contract, output)
    except BaseException as error:
        if passes_through(error, 0, in_group=False):
            raise
        answer.failure = _judge(run, state, error)
    finally:
        leave(token)
        run.close()
    answer.reports = tuple(run.reported or ())
    usage_error = run.misreported or usage_error
    answer.usage_error = None if usage_error is None else str(usage_error)
    events = [(one.name or "", one.data) for one in iter(hub.take, None) if one.kind == "node_event"]
    sizes = accumulate(len(json.dumps(one)) for one in (answer.output, *reversed(events)))
    count = sum(size <= _MAX_ANSWER_BYTES for size in sizes) - 1  # Without the output.
    answer.events = tuple(events[len(events) - max(count, 0) :])
    return answer


def _encode(contract: NodeContract[Any, Any], output: Any) -> tuple[str, bool]:
    """Return an output in stored form, and True if it satisfies its contract."""
    schema = schema_of(contract.output_schema)
    try:
        model, _ = schema.accept_output(output)
    except Exception as error:
        violation = output_violation(contract.node_id, output, error, schema.model)
        schema = schema_of(output_class(None))
        try:
            return schema.encode(schema.accept_output(output)[0]).decode(), False
        except Exception:
            raise violation from error
    return schema.encode(model).decode(), True


def _judge(run: RunningNode, state: BaseModel, error: BaseException) -> SentFailure:
    """Return what an exception means, as it would be judged in the process that owns the run."""
    if isinstance_by_type(error, Suspend):
        error = PlaceError(
            f"node {run.node_id!r} asks {error.reason!r}, and no answer reaches a place; ask in another node"
        )
    is_own, failure = run.raised_itself(error), run.ctx.diagnose(error, run.node_id, run.attempt)
    verdict = RecordedVerdict(
        failure.failure_class,
        failure.reason,
        failure.retry_after_seconds,
        is_own and is_refusal(error),
        tuple(requested_waits(error)) if is_own else (),
    )
    redactor = run.ctx.redactor
    message = failure.message + redactor.mask(explain_mistake(failure, run.ctx.context))
    message = redactor.redact_message(message, [schema_of(type(state)).state(state)])  # Temporal stores it.
    return SentFailure(message=message, type_name=type_name(error), verdict=verdict)


@contextmanager
def _beating() -> Iterator[None]:
    """Send heartbeats from a thread."""
    is_over = threading.Event()
    timeout = activity.info().heartbeat_timeout or timedelta(seconds=3)
    seconds = min(1.0, timeout.total_seconds() / 3)

    def run(beat: Callable[[dict[str, Any]], None]) -> None:
        while not is_over.wait(seconds):
            beat({})

    with heartbeats() as beat:
        threading.Thread(target=run, args=[beat], name="stroma-heartbeats", daemon=True).start()
        try:
            yield
        finally:
            is_over.set()


@contextmanager
def heartbeats() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that sends a heartbeat of this activity with details. It never raises.

    It is for another thread, so that a node that blocks the event loop stops no heartbeat. The context ends
    once a heartbeat under way was sent.
    """
    context, lock, is_open = contextvars.copy_context(), threading.Lock(), True

    def beat(details: dict[str, Any]) -> None:
        with lock:
            if is_open:
                try:
                    context.run(asyncio.run, _send(details))
                except Exception:  # The thread must survive: it may renew the leases of this process.
                    logger.exception("a heartbeat could not be sent")

    try:
        yield beat
    finally:
        with lock:
            is_open = False


async def _send(details: dict[str, Any]) -> None:
    # The SDK encodes the details in a task of the running loop, then hands them to its core, in any thread.
    activity.heartbeat(details)
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
