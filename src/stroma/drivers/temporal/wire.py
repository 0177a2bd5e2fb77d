"""Calls of nodes with a place, as they cross Temporal: JSON in both directions."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel

from stroma.contracts.contract import ContractViolation
from stroma.cost.usage import Report
from stroma.engine.execution import NodeExecution
from stroma.engine.placed_calls import OpenCall
from stroma.engine.rejected import encode_rejected, violation_of
from stroma.failures.errors import RecordedVerdict, RunFailed
from stroma.failures.failure import Failure, isinstance_by_type, type_name
from stroma.trace.rejected import read_rejected

__all__ = ["CALL", "PlaceAnswer", "PlaceRequest", "SentFailure"]

#: Name of the activity.
CALL: Final = "stroma.call"


class SentFailure(BaseModel):
    """A failure of another process. ``rejected``: the output that broke its contract, as it is stored."""

    message: str
    type_name: str | None
    verdict: RecordedVerdict
    rejected: str | None = None

    def error(self) -> RunFailed:
        """Return an exception that stands for the one in the other process."""
        return RunFailed.recorded(self.message, self.type_name, self.verdict)


class PlaceRequest(BaseModel):
    """A call.

    Attributes:
        state: the input in stored form.
        model: the fallback that is due.
        remaining: the rest of the limits of the run: tokens, US dollars, ms.
        last_failure: of the attempt before.
        takes_events: emitted events have receivers.
    """

    run_id: str
    pipeline: str
    node_id: str
    kind: Literal["node", "group", "item"]
    position: int
    branch: str
    attempt: int
    idempotency_key: str
    state: str
    model: str | None
    remaining: tuple[int | None, float | None, int | None]
    last_failure: SentFailure | None
    takes_events: bool = False

    @classmethod
    def of(cls, run: NodeExecution, call: OpenCall) -> PlaceRequest:
        """Return the request for a call."""
        rest, last = run.remaining_budget, run.last_failure
        latency_ms = None if rest.latency_ms is None else int(rest.latency_ms)
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
            remaining=(rest.tokens, rest.cost_usd, latency_ms),
            last_failure=None if last is None else _sent(run, last),
            takes_events=bool(run.ctx.event_receivers),
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


def _sent(run: NodeExecution, failure: Failure) -> SentFailure:
    error, rejected = failure.exception, None
    if isinstance_by_type(error, ContractViolation):
        rejected = encode_rejected(error.raw, error, "full", run.ctx.redactor).decode()
    verdict = RecordedVerdict(failure.failure_class, failure.reason, failure.retry_after_seconds)
    return SentFailure(
        message=failure.message, type_name=type_name(error), verdict=verdict, rejected=rejected
    )


class PlaceAnswer(BaseModel):
    """The end of a call.

    Attributes:
        output: in stored form; None of a call that failed.
        is_typed: the output satisfies its contract; otherwise it is plain data.
        reports: what the call used.
        usage_error: what is wrong with its usage.
        events: names and data of the newest emitted events.
    """

    output: str | None = None
    is_typed: bool = True
    reports: tuple[Report, ...] = ()
    usage_error: str | None = None
    events: tuple[tuple[str, Any], ...] = ()
    failure: SentFailure | None = None
