"""Runs on Temporal in the form of stored runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history import in_order
from stroma.checkpoint.records import AttemptRecord, RunQuery, RunRecord
from stroma.cli.temporal import TemporalCluster
from stroma.failures.failure import text_of
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from temporalio.client import Client, WorkflowExecution

__all__ = ["list_runs", "read_run", "record_of"]

#: Queries at the same time.
_MAX_QUERIES: Final = 10
#: Runs to read per run to show, with a filter that the server does not have.
_SCAN_FACTOR: Final = 10
_OWNER: Final = "the workers of its task queue"


def list_runs(cluster: TemporalCluster, query: RunQuery, limit: int) -> list[RunRecord]:
    """Return runs on Temporal, newest first. Raises Problem."""

    async def read() -> list[RunRecord]:
        client = await cluster.connect()
        where = []
        if query.since_ms is not None:
            where.append(f"StartTime >= '{datetime.fromtimestamp(query.since_ms / 1000, UTC).isoformat()}'")
        narrowed = bool(query.statuses or query.pipeline)
        executions = await cluster.list(client, limit=limit * (_SCAN_FACTOR if narrowed else 1), where=where)
        turn = asyncio.Semaphore(_MAX_QUERIES)

        async def one(execution: WorkflowExecution) -> RunRecord:
            async with turn:
                return await record_of(cluster, client, execution)

        records = await asyncio.gather(*[one(execution) for execution in executions])
        return [record for record in records if _matches(record, query)][:limit]

    return cluster.run(read())


def _matches(record: RunRecord, query: RunQuery) -> bool:
    return (not query.statuses or record.status in query.statuses) and query.pipeline in (
        None,
        record.pipeline,
    )


def read_run(cluster: TemporalCluster, run: str) -> tuple[RunRecord, list[AttemptRecord], list[Waiting]]:
    """Return a run, its attempts so far, and its pending questions. Raises Problem."""

    async def read() -> tuple[RunRecord, list[AttemptRecord], list[Waiting]]:
        client = await cluster.connect()
        execution = await cluster.find(client, run)
        runner = cluster.runner(client)
        result = await cluster.query(runner.trace([], execution.id))
        record = await _record(execution, result)
        attempts = in_order(_attempt(event) for event in result.trace.walk())
        return record, attempts, await cluster.query(runner.waiting(execution.id))

    return cluster.run(read())


async def record_of(cluster: TemporalCluster, client: Client, execution: WorkflowExecution) -> RunRecord:
    """Return a run in the form of a stored one, without figures if no worker answers."""
    from temporalio.service import RPCError

    result: ExecutionResult | None = None
    try:
        result = await cluster.query(cluster.runner(client).trace([], execution.id))
    except (TimeoutError, RPCError):
        pass  # Listed without figures.
    return await _record(execution, result)


async def _record(execution: WorkflowExecution, result: ExecutionResult | None) -> RunRecord:
    from temporalio.client import WorkflowExecutionStatus

    memo = await execution.memo()
    is_open = execution.status is WorkflowExecutionStatus.RUNNING
    updated = execution.close_time or datetime.now(UTC)
    status = "RUNNING" if is_open else execution.status.name if execution.status is not None else "?"
    error = "no worker of its task queue answers" if result is None else None
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
        _OWNER if status == "RUNNING" else None,
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
