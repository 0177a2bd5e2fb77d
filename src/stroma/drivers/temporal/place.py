"""The worker of a place: calls the functions of nodes for the owners of runs. It needs no store."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Final

from pydantic import BaseModel
from temporalio import activity

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointManager, InMemoryStore
from stroma.contracts.contract import ContractRegistry, NodeContract, output_violation
from stroma.contracts.node import Node, marked_nodes, output_class
from stroma.contracts.schema import describe_error, schema_of
from stroma.cost.budget import ExecutionBudget
from stroma.drivers.temporal.activity import Pulse
from stroma.drivers.temporal.wire import CALL, PlaceAnswer, PlaceRequest, SentFailure
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT, leave
from stroma.engine.emitted import attempt_id_of
from stroma.engine.execution import NodeExecution
from stroma.engine.metering import count_returned
from stroma.engine.tasks import CONTINUES, call_in_thread, passes_through
from stroma.failures.classes import FailureClass
from stroma.failures.errors import PlaceError, RecordedVerdict, Suspend
from stroma.failures.failure import isinstance_by_type, type_name
from stroma.failures.mistakes import explain_mistake
from stroma.failures.providers import requested_waits
from stroma.failures.refusals import is_refusal
from stroma.runner.pipeline import Pipeline, nodes_of
from stroma.runner.runner import StromaRunner
from stroma.runner.sequence import leaves_in

__all__ = ["CallActivity"]

logger = get_logger()
_BEAT_SECONDS: Final = 1.0
#: Emitted events of one call that come back with its answer, of which the server takes 2 MB.
_MAX_EVENTS: Final = 1000
_MAX_EVENT_CHARACTERS: Final = 250_000
_MAX_OUTPUT_CHARACTERS: Final = 1_000_000


class _PlacedRun(ReliabilityContext):
    """The run around a call, of which there is no journal here."""

    model: str | None = None

    def fallback_model(self) -> str | None:
        return self.model

    async def open(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "a node with a place cannot call steps, nor agents under a guard; call them in a node without a place"
        )


class _PlacedNode(NodeExecution):
    """The current node of a call."""

    key = ""

    @property
    def idempotency_key(self) -> str:
        return self.key


class _Emitted:
    """The newest events that a call has emitted; see EventReceiver."""

    def __init__(self) -> None:
        self.events: deque[tuple[str, Any]] = deque(maxlen=_MAX_EVENTS)

    def emit(self, node: NodeExecution, attempt_id: str, name: str, data: Any) -> None:
        self.events.append((name, data))

    def flush(self) -> None:
        """Do nothing: the answer takes what is pending."""

    def that_fit(self, output: str | None) -> tuple[tuple[str, Any], ...]:
        """Return the newest events that an answer with this output has room for."""
        room = _MAX_EVENT_CHARACTERS if output is None or len(output) < _MAX_OUTPUT_CHARACTERS else 0
        events = list(self.events)  # A thread that was given up may still emit.
        sizes = accumulate(len(json.dumps(event)) for event in reversed(events))
        count = sum(size <= room for size in sizes)
        return tuple(events[len(events) - count :])


class CallActivity:
    """Calls the nodes of some pipelines that have a place, in one worker.

    Args:
        config: as that of the workers that drive runs.
    """

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
                f"a worker of place {self._place!r} cannot call node {request.node_id!r} of {request.pipeline!r}: "
                f"{describe_error(error)[0]}; start workers of the place with the code of the run"
            )
            logger.warning("%s", message)
            verdict = RecordedVerdict(FailureClass.RECOVERABLE, "worker_lost", is_refusal=True)
            answer = PlaceAnswer(
                failure=SentFailure(
                    message=message, type_name="stroma.failures.errors.WorkerLost", verdict=verdict
                )
            )
        else:
            with _heartbeats():
                answer = await _answer(request, node, state, config)
        return answer.model_dump(mode="json")

    def _find(self, request: PlaceRequest) -> tuple[Node, RunConfig]:
        """Return a node, of its pipeline or of those that flows may call, and its configuration. Raises ValueError."""
        served, wanted = self._served.get(request.pipeline), (request.node_id, self._place)
        for nodes in () if served is None else (leaves_in(nodes_of(served.nodes)), marked_nodes()):
            matching = {one for one in nodes if one.contract and (one.node_id, one.contract.place) == wanted}
            if served is not None and len(matching) == 1:
                return matching.pop(), self._runner._config_of(served.nodes)
        raise ValueError("it has no such node with this place, or several")


async def _answer(request: PlaceRequest, node: Node, state: BaseModel, config: RunConfig) -> PlaceAnswer:
    """Call a function, and return its end."""
    tokens, cost_usd, latency_ms = request.remaining
    rest = ExecutionBudget(max_tokens_total=tokens, max_cost_usd=cost_usd, max_latency_ms=latency_ms)
    config = config.with_run_id(request.run_id).model_copy(update={"budget": rest})
    ctx = _PlacedRun.for_run(config, ContractRegistry(), CheckpointManager(InMemoryStore()))
    ctx.pipeline, ctx.model = request.pipeline, request.model
    run = _PlacedNode(ctx, request.node_id, request.kind, request.position, request.branch)
    contract = node.contract
    assert contract is not None
    run.attempt, run.key = request.attempt, request.idempotency_key
    run.last_failure = request.failure_before(contract.output_schema)
    emitted = _Emitted()
    if request.takes_events:
        ctx.event_receivers, ctx.takes_events = (emitted,), True
        attempt_id_of(run)
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
        answer.failure = _judge(run, error)
    finally:
        leave(token)
        run.close()
    answer.reports = tuple(run.reported or ())
    usage_error = run.misreported or usage_error
    answer.usage_error = None if usage_error is None else str(usage_error)
    answer.events = emitted.that_fit(answer.output)
    return answer


def _encode(contract: NodeContract[Any, Any], output: Any) -> tuple[str, bool]:
    """Return an output in stored form, and if it satisfies its contract. The owner of the run refuses one that does not."""
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


def _judge(run: NodeExecution, error: BaseException) -> SentFailure:
    """Return what an exception means, as it would be judged in the process that owns the run."""
    if isinstance_by_type(error, Suspend):
        error = PlaceError(
            f"node {run.node_id!r} asks {error.reason!r}, and no answer reaches a place; ask in a node without one before it"
        )
    failure = run.ctx.diagnose(error, run.node_id, run.attempt)
    verdict = RecordedVerdict(
        failure.failure_class,
        failure.reason,
        failure.retry_after_seconds,
        is_refusal(error),
        tuple(requested_waits(error)),
    )
    message = failure.message + run.ctx.redactor.mask(explain_mistake(failure, run.ctx.context))
    return SentFailure(message=message, type_name=type_name(error), verdict=verdict)


@contextmanager
def _heartbeats() -> Iterator[None]:
    """Send heartbeats from a thread, so that a function that blocks the event loop stops none."""
    pulse, is_over = Pulse(), threading.Event()
    timeout = activity.info().heartbeat_timeout
    seconds = _BEAT_SECONDS if timeout is None else min(_BEAT_SECONDS, timeout.total_seconds() / 3)

    def beat() -> None:
        while not is_over.wait(seconds):
            try:
                pulse.beat({})
            except Exception:
                logger.exception("a heartbeat of a call could not be sent")

    threading.Thread(target=beat, name="stroma-heartbeats", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        pulse.end()
