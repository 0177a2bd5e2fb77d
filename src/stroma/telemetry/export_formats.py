"""A recorded run in the formats of other tools: OTLP as JSON, and the trace events that Perfetto and Chrome load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from stroma.checkpoint.history import bar_of, is_gone, place_of
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.trace.html import waits

__all__ = ["chrome_trace", "otlp"]

_INTERNAL: Final = 1  # SpanKind
_ERROR: Final = 2  # Status.code
_ENDED_WELL: Final = ("COMPLETED", "RESUMED")


# ---------------------------------------------------------------------- OTLP


def otlp(record: RunRecord, attempts: Sequence[AttemptRecord]) -> dict[str, Any]:
    """The body of a POST to ``/v1/traces`` of any OTLP/HTTP receiver, as JSON.

    A span for the run, under it one for each node and for each attempt, with the names and attributes of the live
    exporter. Their ids come of the run's: sent again, they are the same spans.
    """
    seed = f"{record.run_id}\0{record.execution}"
    trace = _digest(seed, 16)
    run_span = _digest(f"{seed}\0run", 8)
    end_ns = max([record.updated_ms * 1_000_000, *(_ended_ns(a) for a in attempts)])
    failed = record.status not in (*_ENDED_WELL, "RUNNING", "SUSPENDED", "INTERRUPTED", "CANCELLED")
    spans = [
        _span(
            trace, run_span, "", f"invoke_workflow {record.pipeline}", record.started_ms * 1_000_000, end_ns,
            {
                "gen_ai.operation.name": "invoke_workflow", "gen_ai.workflow.name": record.pipeline,
                "stroma.run.id": record.run_id, "stroma.run.execution": record.execution,
                "stroma.status": "INTERRUPTED" if is_gone(record) else record.status,
                "stroma.tokens": record.tokens, "stroma.cost_usd": record.cost_usd,
                "stroma.tags": list(record.tags) or None,
            },
            (record.error or record.status) if failed else None,
        )
    ]  # fmt: skip
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for attempt in attempts:
        places.setdefault((attempt.position, attempt.branch), []).append(attempt)
    extents = {place: (tried[0].started_ns, max(map(_ended_ns, tried))) for place, tried in places.items()}
    for (position, branch), (began, ended) in sorted(extents.items(), reverse=True):
        # A group is over when its children are, by whichever of the clocks that is later.
        group = (position, branch.rpartition(".")[0])
        if branch and group in extents:
            extents[group] = min(began, extents[group][0]), max(ended, extents[group][1])
    for (position, branch), tried in places.items():
        node_span = _digest(f"{seed}\0{position}\0{branch}", 8)
        parent, above = run_span, branch
        while above:
            above = above.rpartition(".")[0]
            if (position, above) in places:
                parent = _digest(f"{seed}\0{position}\0{above}", 8)
                break
        spans.append(_node(trace, node_span, parent, record, tried, extents[position, branch]))
        spans += [
            _attempt(trace, _digest(f"{seed}\0{position}\0{branch}\0{number}", 8), node_span, attempt)
            for number, attempt in enumerate(tried)
        ]
    resource = {"attributes": _attributes({"service.name": "stroma"})}
    return {
        "resourceSpans": [
            {"resource": resource, "scopeSpans": [{"scope": {"name": "stroma"}, "spans": spans}]}
        ]
    }


def _node(
    trace: str,
    span: str,
    parent: str,
    record: RunRecord,
    tried: Sequence[AttemptRecord],
    extent: tuple[int, int],
) -> dict[str, Any]:
    last = tried[-1]
    about = {
        "stroma.run.id": record.run_id,
        "stroma.node.id": last.node_id,
        "gen_ai.workflow.name": record.pipeline,
        "stroma.node.position": last.position,
        "stroma.node.branch": last.branch or None,
        "stroma.node.attempts": len(tried),
        "stroma.outcome": last.outcome,
        "stroma.failure_class": last.failure_class,
        "stroma.tokens": sum(a.tokens for a in tried),
        "stroma.cost_usd": sum(a.cost_usd for a in tried),
    }
    name = f"stroma.node {last.node_id}"
    return _span(trace, span, parent, name, *extent, about, _why(last))


def _attempt(trace: str, span: str, parent: str, attempt: AttemptRecord) -> dict[str, Any]:
    about = {
        "stroma.node.id": attempt.node_id,
        "stroma.node.attempt": attempt.attempt,
        "stroma.outcome": attempt.outcome,
        "stroma.failure_class": attempt.failure_class,
        "stroma.reason": attempt.reason,
        "stroma.model": attempt.model,
        "stroma.duration_s": attempt.duration_ms / 1000,
        "stroma.tokens": attempt.tokens,
        "stroma.cost_usd": attempt.cost_usd,
    }
    name = f"stroma.attempt {attempt.node_id}"
    return _span(trace, span, parent, name, attempt.started_ns, _ended_ns(attempt), about, _why(attempt))


def _ended_ns(attempt: AttemptRecord) -> int:
    return attempt.started_ns + round(attempt.duration_ms * 1e6)


def _why(attempt: AttemptRecord) -> str | None:
    return (attempt.text or attempt.failure_class) if attempt.failure_class else None


def _span(
    trace: str, span: str, parent: str, name: str, start_ns: int, end_ns: int, about: dict[str, Any],
    error: str | None,
) -> dict[str, Any]:  # fmt: skip
    made = {
        "traceId": trace,
        "spanId": span,
        "name": name,
        "kind": _INTERNAL,
        # 64 bit integers are text in this JSON.
        "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(max(start_ns, end_ns)),
        "attributes": _attributes(about),
        "status": {} if error is None else {"code": _ERROR, "message": error},
    }
    return made | ({"parentSpanId": parent} if parent else {})


def _attributes(about: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in about.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": str(value)}


def _digest(seed: str, size: int) -> str:
    return hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * size]


# ---------------------------------------------------------------------- trace events


def chrome_trace(record: RunRecord, attempts: Sequence[AttemptRecord]) -> dict[str, Any]:
    """What https://ui.perfetto.dev and chrome://tracing load: a slice for each attempt and each wait.

    Slices of one thread must nest: children of groups that ran side by side are put on as many lanes as they need.
    """
    first = min((a.started_ns for a in attempts), default=0)
    bars = [(a, bar_of(a, first)) for a in attempts]
    slices: list[tuple[int, float, float, dict[str, Any]]] = []
    for attempt, bar in bars:
        about = {
            "at": place_of(attempt), "attempt": attempt.attempt, "outcome": attempt.outcome,
            "class": attempt.failure_class, "reason": attempt.reason, "message": attempt.text,
            "tokens": attempt.tokens, "output_tokens": attempt.output_tokens, "cost_usd": attempt.cost_usd,
            "model": attempt.model,
        }  # fmt: skip
        event = {
            "name": attempt.node_id, "cat": attempt.outcome,
            "args": {key: value for key, value in about.items() if value is not None},
        }  # fmt: skip
        if attempt.outcome == "failure":
            event["cname"] = "terrible"
        slices.append((_depth(attempt), bar.began_ms, bar.took_ms, event))
    depths = {bar.key: _depth(attempt) for attempt, bar in bars}
    for bar, began, took in waits(bar for _, bar in bars):
        event = {
            "name": f"wait for attempt {bar.attempt}",
            "cat": "wait",
            "cname": "grey",
            "args": {"at": bar.at},
        }
        slices.append((depths[bar.key], began, took, event))
    events: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for depth, lane, began, took, event in _lanes(slices):
        thread = depth * 1000 + lane
        names[thread] = "nodes" if not depth else f"in groups, {'deep ' * (depth - 1)}{lane}"
        place = {
            "ph": "X",
            "ts": round(began * 1000),
            "dur": max(1, round(took * 1000)),
            "pid": 1,
            "tid": thread,
        }
        events.append(event | place)
    told = [("process_name", 0, f"{record.pipeline} {record.run_id}")]
    told += [("thread_name", thread, name) for thread, name in sorted(names.items())]
    metadata = [
        {"name": name, "ph": "M", "pid": 1, "tid": thread, "args": {"name": said}}
        for name, thread, said in told
    ]
    facts = {
        "run_id": record.run_id, "pipeline": record.pipeline, "status": record.status, "tokens": record.tokens,
        "cost_usd": record.cost_usd, "began_ms": record.started_ms,
    }  # fmt: skip
    return {"traceEvents": metadata + events, "displayTimeUnit": "ms", "otherData": facts}


def _depth(attempt: AttemptRecord) -> int:
    return attempt.branch.count(".") + 1 if attempt.branch else 0


def _lanes(
    slices: list[tuple[int, float, float, dict[str, Any]]],
) -> list[tuple[int, int, float, float, dict[str, Any]]]:
    """Each slice with the first lane of its depth that is free when it begins."""
    free: dict[int, list[float]] = {}
    placed = []
    for depth, began, took, event in sorted(slices, key=lambda one: one[:3]):
        lanes = free.setdefault(depth, [])
        lane = next((i for i, until in enumerate(lanes) if until <= began), len(lanes))
        # A slice has a length that can be seen, of a microsecond at least.
        lanes[lane : lane + 1] = [began + max(took, 0.001)]
        placed.append((depth, lane, began, took, event))
    return placed
