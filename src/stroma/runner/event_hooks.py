"""Hooks that publish the events of a run in a hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stroma.engine.emitted import attempt_id_of
from stroma.engine.execution import current_node
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.runner.events import EventHub, EventKind
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult

__all__ = ["describe_result", "event_hooks"]


def event_hooks(
    hub: EventHub, on_end: Callable[[ExecutionResult], None] | None = None, *, with_trace: bool = True
) -> NodeHooks:
    """Return hooks that publish the events of one run in a hub, and have what its nodes emit put there.

    They publish no "run_end": ``on_end`` is called with the result as hooks may see it. ``with_trace``: ends
    of attempts have their event in the trace.
    """
    calls = _EventHooks(hub, with_trace)

    async def run_end(run_id: str, result: ExecutionResult) -> None:
        if on_end is not None:
            on_end(result)

    return _HubHooks(
        hub=hub,
        on_run_start=calls.run_start,
        on_run_end=run_end,
        on_node_start=calls.start,
        on_node_success=calls.success,
        on_node_failure=calls.failure,
        on_node_retry=calls.retry,
        on_node_skipped=calls.skipped,
        on_node_cancelled=calls.cancelled,
        on_node_suspended=calls.suspended,
        on_budget_warning=calls.budget,
        on_map_progress=calls.progress,
    )


def describe_result(result: ExecutionResult) -> dict[str, Any]:
    """Return the details of a "run_end": a result as JSON data."""
    details = {
        "status": str(result.status),
        "final_state": None if result.final_state is None else jsonable(result.final_state),
        "total_tokens": result.total_tokens,
        "total_cost_usd": result.total_cost_usd,
        "failed_items": result.failed_items,
        "suspended": list(result.suspended),
        "questions": [jsonable(asdict(question)) for question in result.questions],
    }
    failure = result.failure
    if failure is not None:
        details["failure"] = {
            "class": str(failure.failure_class),
            "message": failure.message,
            "reason": failure.reason,
        }
    return details


@dataclass
class _HubHooks(NodeHooks):
    hub: EventHub = field(kw_only=True)

    _has_time_limit = False

    def _event_receiver(self) -> EventHub:
        return self.hub


class _EventHooks:
    def __init__(self, hub: EventHub, with_trace: bool) -> None:
        self._hub = hub
        self._with_trace = with_trace

    async def _publish(self, kind: EventKind, run_id: str, node_id: str, **fields: Any) -> None:
        """Publish an event of the current node, and wait until the readers have room."""
        self._hub.publish(kind, run_id, node_id, **{**_place(), **fields})
        await self._hub.wait_for_room()

    def _end(self) -> dict[str, Any]:
        """Return what an event says about the end of an attempt; nothing where no attempt has ended."""
        node = current_node()
        row, redactor = node.ended, node.ctx.redactor
        if row is None:  # A question of a flow.
            return {}
        usage = node.usage
        details: dict[str, Any] = {
            "tokens": usage.tokens,
            "cost_usd": usage.cost_usd,
            "duration_ms": node.duration_ms,
        }
        if row.failure is not None and row.outcome == "failure":
            details["failure"] = {
                "class": str(row.failure.failure_class),
                "message": redactor.failure_message(row.failure.message, row),
                "reason": row.failure.reason,
            }
        fields: dict[str, Any] = {
            "details": details,
            "attempt_id": None if node.redelivered else attempt_id_of(node),
        }
        if self._with_trace:
            event = node.ctx.trace.event_of(row)
            output = event.output_state
            fields["event"] = replace(
                event,
                input_state=redactor.redact_state(event.input_state),
                output_state=None if output is None else redactor.redact_state(output),
            )
        return fields

    async def run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self._hub.publish("run_start", run_id, state=state, details={"pipeline": pipeline})
        await self._hub.wait_for_room()

    async def start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await self._publish(
            "node_start", run_id, node_id, state=state, attempt_id=attempt_id_of(current_node())
        )

    async def success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        await self._publish("node_success", run_id, node_id, state=state, **self._end())

    async def failure(self, run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
        await self._publish("node_failure", run_id, node_id, **self._end())

    async def retry(self, run_id: str, node_id: str, attempt: int, delay: float, kind: FailureClass) -> None:
        details = {"delay_seconds": delay, "failure_class": kind}
        await self._publish("node_retry", run_id, node_id, attempt=attempt, details=details)

    async def skipped(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await self._publish("node_skipped", run_id, node_id, state=state)

    async def cancelled(self, run_id: str, node_id: str) -> None:
        await self._publish("node_cancelled", run_id, node_id, **self._end())

    async def suspended(self, run_id: str, node_id: str, reason: str) -> None:
        fields = self._end()
        question = current_node().question
        details = {"reason": reason, "question": None if question is None else asdict(question)}
        fields["details"] = {**fields.get("details", {}), **details}
        await self._publish("node_suspended", run_id, node_id, **fields)

    async def budget(self, run_id: str, dimension: str, used: float, limit: float) -> None:
        details = {"dimension": dimension, "used": used, "limit": limit}
        self._hub.publish("budget_warning", run_id, details=details)

    async def progress(self, run_id: str, node_id: str, progress: MapProgress) -> None:
        fields = {**_place(), "attempt": None}
        self._hub.publish("map_progress", run_id, node_id, progress=progress, **fields)


def _place() -> dict[str, Any]:
    node = current_node()
    return {"position": node.position, "branch": node.branch, "attempt": node.attempt or None}
