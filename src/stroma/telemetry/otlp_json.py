"""Convert a recorded run to OTLP spans as JSON, with the names and attributes of the live exporter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from stroma.checkpoint.history import is_interrupted
from stroma.checkpoint.records import AttemptRecord, RunRecord

__all__ = ["otlp_spans"]

_INTERNAL: Final = 1  # SpanKind
_ERROR: Final = 2  # Status.code
_SUCCEEDED: Final = ("COMPLETED", "RESUMED")


def otlp_spans(record: RunRecord, attempts: Sequence[AttemptRecord]) -> dict[str, Any]:
    """Return the body of a POST to ``/v1/traces`` of an OTLP/HTTP receiver.

    One span for the run; below it one for each node and each attempt. Span ids are derived from the run id,
    so that a receiver that gets the body twice stores the same spans.
    """
    seed = f"{record.run_id}\0{record.execution}"
    trace = _derive_id(seed, 16)
    run_span = _derive_id(f"{seed}\0run", 8)
    end_ns = max([record.updated_ms * 1_000_000, *(_ended_ns(a) for a in attempts)])
    failed = record.status not in (*_SUCCEEDED, "RUNNING", "SUSPENDED", "INTERRUPTED", "CANCELLED")
    spans = [
        _span(
            _Ids(trace, run_span, ""),
            f"invoke_workflow {record.pipeline}",
            (record.started_ms * 1_000_000, end_ns),
            {
                "gen_ai.operation.name": "invoke_workflow",
                "gen_ai.agent.name": record.pipeline,
                "openinference.span.kind": "CHAIN",
                "stroma.pipeline": record.pipeline,
                "stroma.run.id": record.run_id,
                "stroma.run.execution": record.execution,
                "stroma.status": "INTERRUPTED" if is_interrupted(record) else record.status,
                "stroma.tokens": record.tokens,
                "stroma.cost_usd": record.cost_usd,
                "stroma.tags": list(record.tags) or None,
            },
            (record.error or record.status) if failed else None,
        )
    ]
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for attempt in attempts:
        places.setdefault((attempt.position, attempt.branch), []).append(attempt)
    extents = _extents(places)
    for (position, branch), tried in places.items():
        node_span = _derive_id(f"{seed}\0{position}\0{branch}", 8)
        parent, above = run_span, branch
        while above:
            above = above.rpartition(".")[0]
            if (position, above) in places:
                parent = _derive_id(f"{seed}\0{position}\0{above}", 8)
                break
        ids = _Ids(trace, node_span, parent)
        spans.append(_node_span(ids, record, tried, extents[position, branch]))
        for number, attempt in enumerate(tried):
            attempt_span = _derive_id(f"{seed}\0{position}\0{branch}\0{number}", 8)
            spans.append(
                _attempt_span(_Ids(trace, attempt_span, node_span), attempt, is_final=attempt is tried[-1])
            )
    resource = {"attributes": _attributes({"service.name": "stroma"})}
    return {
        "resourceSpans": [
            {"resource": resource, "scopeSpans": [{"scope": {"name": "stroma"}, "spans": spans}]}
        ]
    }


def _extents(
    places: Mapping[tuple[int, str], Sequence[AttemptRecord]],
) -> dict[tuple[int, str], tuple[int, int]]:
    """Return start and end of each node in ns. A group lasts at least as long as its children."""
    extents = {place: (tried[0].started_ns, max(map(_ended_ns, tried))) for place, tried in places.items()}
    for (position, branch), (start, end) in sorted(extents.items(), reverse=True):
        group = (position, branch.rpartition(".")[0])
        if branch and group in extents:
            extents[group] = min(start, extents[group][0]), max(end, extents[group][1])
    return extents


class _Ids(NamedTuple):
    """Ids of a span. ``parent``: "" for the root."""

    trace: str
    span: str
    parent: str


def _node_span(
    ids: _Ids, record: RunRecord, tried: Sequence[AttemptRecord], extent: tuple[int, int]
) -> dict[str, Any]:
    last = tried[-1]
    attributes = {
        "stroma.run.id": record.run_id,
        "stroma.node.id": last.node_id,
        "stroma.pipeline": record.pipeline,
        "openinference.span.kind": "CHAIN",
        "stroma.node.position": last.position,
        "stroma.node.branch": last.branch or None,
        "stroma.node.attempts": len(tried),
        "stroma.outcome": last.outcome,
        "stroma.failure_class": last.failure_class,
        "stroma.tokens": sum(a.tokens for a in tried),
        "stroma.cost_usd": sum(a.cost_usd for a in tried),
    }
    name = f"stroma.node {last.node_id}"
    return _span(ids, name, extent, attributes, _error_text(last))


def _attempt_span(ids: _Ids, attempt: AttemptRecord, *, is_final: bool) -> dict[str, Any]:
    attributes = {
        "stroma.node.id": attempt.node_id,
        "stroma.node.attempt": attempt.attempt,
        "stroma.outcome": attempt.outcome,
        "stroma.failure_class": attempt.failure_class,
        "stroma.reason": attempt.reason,
        "stroma.message": attempt.text or None,
        "stroma.model": attempt.model,
        "stroma.duration_s": attempt.duration_ms / 1000,
        "stroma.tokens": attempt.tokens,
        "stroma.cost_usd": attempt.cost_usd,
    }
    name = f"stroma.attempt {attempt.node_id}"
    extent = attempt.started_ns, _ended_ns(attempt)
    return _span(ids, name, extent, attributes, _error_text(attempt) if is_final else None)


def _ended_ns(attempt: AttemptRecord) -> int:
    return attempt.started_ns + round(attempt.duration_ms * 1e6)


def _error_text(attempt: AttemptRecord) -> str | None:
    return (attempt.text or attempt.failure_class) if attempt.failure_class else None


def _span(
    ids: _Ids, name: str, extent: tuple[int, int], attributes: dict[str, Any], error: str | None
) -> dict[str, Any]:
    """Return a span. ``extent``: its start and end in ns since the epoch."""
    start_ns, end_ns = extent
    span_data = {
        "traceId": ids.trace,
        "spanId": ids.span,
        "name": name,
        "kind": _INTERNAL,
        # 64 bit integers are text in this JSON.
        "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(max(start_ns, end_ns)),
        "attributes": _attributes(attributes),
        "status": {} if error is None else {"code": _ERROR, "message": error},
    }
    return span_data | ({"parentSpanId": ids.parent} if ids.parent else {})


def _attributes(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": str(value)}


def _derive_id(seed: str, size: int) -> str:
    """Return ``size`` bytes as hex, derived from ``seed``."""
    return hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * size]
