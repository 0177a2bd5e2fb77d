"""The runs of a cluster as those of a store are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from stroma.checkpoint.history import in_order
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import AttemptRecord, RunQuery, RunRecord
from stroma.cli.temporal import Cluster
from stroma.failures.failure import text_of
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from temporalio.client import Client, WorkflowExecution

__all__ = ["look_at", "record_of", "runs_there"]

#: Runs that are asked at the same time.
_AT_ONCE: Final = 10
#: So many more are looked at than are shown, where not all match.
_LOOKED_AT: Final = 10
_HOLDER: Final = "the workers of its task queue"


def runs_there(cluster: Cluster, query: RunQuery, limit: int) -> list[RunRecord]:
    """Runs of a cluster, the newest first. Raises Problem."""

    async def look() -> list[RunRecord]:
        client = await cluster.connect()
        where = []
        if query.since_ms is not None:
            where.append(f"StartTime >= '{datetime.fromtimestamp(query.since_ms / 1000, UTC).isoformat()}'")
        narrowed = bool(query.statuses or query.pipeline)
        found = await cluster.list(client, limit=limit * (_LOOKED_AT if narrowed else 1), where=where)
        turn = asyncio.Semaphore(_AT_ONCE)

        async def one(execution: WorkflowExecution) -> RunRecord:
            async with turn:
                return await record_of(cluster, client, execution)

        records = await asyncio.gather(*[one(execution) for execution in found])
        return [record for record in records if _matches(record, query)][:limit]

    return cluster.run(look())


def _matches(record: RunRecord, query: RunQuery) -> bool:
    return (not query.statuses or record.status in query.statuses) and query.pipeline in (
        None,
        record.pipeline,
    )


def look_at(cluster: Cluster, run: str) -> tuple[RunRecord, list[AttemptRecord], list[Waiting]]:
    """One run, as far as it is. Raises Problem."""

    async def look() -> tuple[RunRecord, list[AttemptRecord], list[Waiting]]:
        client = await cluster.connect()
        execution = await cluster.find(client, run)
        runner = cluster.runner(client)
        result = await cluster.answer(runner.trace([], execution.id))
        record = await _record(execution, result)
        attempts = in_order(_attempt(event) for event in result.trace.walk())
        return record, attempts, await cluster.answer(runner.waiting(execution.id))

    return cluster.run(look())


async def record_of(cluster: Cluster, client: Client, execution: WorkflowExecution) -> RunRecord:
    """A run as a store would list it; one of which no worker tells has no figures."""
    from temporalio.service import RPCError

    result: ExecutionResult | None = None
    try:
        result = await cluster.answer(cluster.runner(client).trace([], execution.id))
    except (TimeoutError, RPCError):
        pass  # It is listed all the same.
    return await _record(execution, result)


async def _record(execution: WorkflowExecution, result: ExecutionResult | None) -> RunRecord:
    from temporalio.client import WorkflowExecutionStatus

    memo = await execution.memo()
    is_open = execution.status is WorkflowExecutionStatus.RUNNING
    updated = execution.close_time or datetime.now(UTC)
    status = "RUNNING" if is_open else execution.status.name if execution.status is not None else "?"
    error = "no worker of its task queue tells more" if result is None else None
    if result is not None:
        status = "RUNNING" if is_open and result.status == "INTERRUPTED" else result.status.value
        error = text_of(result.failure) if result.failure is not None else "; ".join(result.suspended) or None
    ends = _ends([] if result is None else list(result.trace))
    return RunRecord(
        execution.id,
        str(memo.get("stroma_pipeline", "?")),
        status,
        int(memo.get("stroma_execution", 1)),
        int(execution.start_time.timestamp() * 1000),
        max(
            [int(updated.timestamp() * 1000)]
            if not is_open
            else [int(execution.start_time.timestamp() * 1000), *ends]
        ),
        0 if result is None else result.total_tokens,
        0.0 if result is None else result.total_cost_usd,
        0 if result is None else sum(event.output_state is not None for event in result.trace),
        error,
        _HOLDER if status == "RUNNING" else None,
    )


def _ends(events: Sequence[TraceEvent]) -> list[int]:
    return [int(event.timestamp_utc.timestamp() * 1000) + event.duration_ms for event in events]


def _attempt(event: TraceEvent) -> AttemptRecord:
    usage: Any = event.usage
    began = int(event.timestamp_utc.timestamp() * 1_000_000) * 1000
    return AttemptRecord(
        event.position,
        event.branch,
        event.node_id,
        event.attempt,
        began // 1_000_000,
        event.duration_ms,
        event.outcome,
        None if event.failure is None else event.failure.value,
        event.failure_message,
        event.reason,
        usage.tokens,
        usage.output_tokens,
        usage.cost_usd,
        usage.model,
        None,
        output_bytes=None if event.output_state is None else 0,
        started_ns=began,
        function_ms=event.duration_ms if event.function_ms is None else event.function_ms,
        error_type=event.error_type,
    )
