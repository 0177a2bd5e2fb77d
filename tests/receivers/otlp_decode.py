"""OTLP messages as plain dicts: ids in hex, enumerations by their short names, times in nanoseconds."""

from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


def value(encoded: Any) -> Any:
    kind = encoded.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [value(item) for item in encoded.array_value.values]
    if kind == "kvlist_value":
        return attributes(encoded.kvlist_value.values)
    if kind == "bytes_value":
        return encoded.bytes_value.hex()
    return getattr(encoded, kind)


def attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in pairs}


def decode_spans(request: Any) -> Iterator[dict[str, Any]]:
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield {
                    "name": span.name,
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent_span_id": span.parent_span_id.hex(),
                    "kind": Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    "start": span.start_time_unix_nano,
                    "end": span.end_time_unix_nano,
                    "attributes": attributes(span.attributes),
                    "events": [
                        {
                            "name": event.name,
                            "time": event.time_unix_nano,
                            "attributes": attributes(event.attributes),
                        }
                        for event in span.events
                    ],
                    "links": [
                        {
                            "trace_id": link.trace_id.hex(),
                            "span_id": link.span_id.hex(),
                            "attributes": attributes(link.attributes),
                        }
                        for link in span.links
                    ],
                    "status": Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    "status_message": span.status.message,
                    "scope": scope.scope.name,
                    "resource": attributes(resource.resource.attributes),
                }


def decode_metrics(request: Any) -> Iterator[dict[str, Any]]:
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                kind = metric.WhichOneof("data")
                data = getattr(metric, kind)
                temporality = getattr(data, "aggregation_temporality", 0)
                for point in data.data_points:
                    yield {
                        "name": metric.name,
                        "unit": metric.unit,
                        "description": metric.description,
                        "kind": kind,
                        "temporality": AggregationTemporality.Name(temporality).removeprefix(
                            "AGGREGATION_TEMPORALITY_"
                        ),
                        "monotonic": getattr(data, "is_monotonic", False),
                        "attributes": attributes(point.attributes),
                        "time": point.time_unix_nano,
                        **_numbers(point),
                        "scope": scope.scope.name,
                        "resource": attributes(resource.resource.attributes),
                    }


def _numbers(point: Any) -> dict[str, Any]:
    """`value` of a sum or gauge; of a histogram `count` and `sum`, and explicit buckets."""
    if hasattr(point, "as_double"):
        kind = point.WhichOneof("value")
        return {"value": None if kind is None else getattr(point, kind), "exemplars": _exemplars(point)}
    numbers: dict[str, Any] = {"count": point.count, "sum": point.sum}
    if hasattr(point, "explicit_bounds"):
        numbers["bounds"] = list(point.explicit_bounds)
        numbers["buckets"] = list(point.bucket_counts)
    if hasattr(point, "exemplars"):
        numbers["exemplars"] = _exemplars(point)
    return numbers


def _exemplars(point: Any) -> list[dict[str, str]]:
    return [
        {"trace_id": result.trace_id.hex(), "span_id": result.span_id.hex()} for result in point.exemplars
    ]


def decode_logs(request: Any) -> Iterator[dict[str, Any]]:
    for resource in request.resource_logs:
        for scope in resource.scope_logs:
            for record in scope.log_records:
                yield {
                    "body": value(record.body),
                    "severity": record.severity_text,
                    "severity_number": record.severity_number,
                    "attributes": attributes(record.attributes),
                    "trace_id": record.trace_id.hex(),
                    "span_id": record.span_id.hex(),
                    "time": record.time_unix_nano,
                    "scope": scope.scope.name,
                    "resource": attributes(resource.resource.attributes),
                }
