"""A receiver of OTLP over HTTP, for exporters in this process and in others."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_DECOMPRESS = {"identity": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}


class OtlpReceiver(ThreadingHTTPServer):
    """Takes what OTLP/HTTP exporters send in protobuf, and can refuse it.

    Attributes:
        url: for `OTEL_EXPORTER_OTLP_ENDPOINT`; the signals are at `/v1/traces` and `/v1/metrics`.
    """

    daemon_threads = True
    # Exporters of many processes may come at once.
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Posts)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._spans: list[dict[str, Any]] = []
        self._points: dict[str, dict[str, Any]] = {}
        self.statuses: list[int] = []
        self._refusals = 0

    def refuse(self, posts: int) -> None:
        """Answer the next posts with 503, to be sent again at once, and keep nothing of them."""
        self._refusals = posts

    def spans(self) -> list[dict[str, Any]]:
        """All spans so far, in the order of their arrival."""
        return list(self._spans)

    def span(self, name: str) -> dict[str, Any]:
        """The one span of that name."""
        (result,) = [span for span in self.spans() if span["name"] == name]
        return result

    def points(self, name: str) -> list[dict[str, Any]]:
        """The newest point of each series of one metric."""
        return [point for point in self._points.values() if point["name"] == name]

    def take(self, path: str, body: bytes) -> int:
        """Record what a post has, and return the status of its answer."""
        if self._refusals:
            self._refusals -= 1
            return 503
        if path == "/v1/traces":
            self._spans += _decode_spans(ExportTraceServiceRequest.FromString(body))
        elif path == "/v1/metrics":
            # A cumulative series is sent whole each time: only its newest point counts.
            for point in _decode_metrics(ExportMetricsServiceRequest.FromString(body)):
                self._points[str([point["name"], point["resource"], point["attributes"]])] = point
        else:
            return 404
        return 200

    def __enter__(self) -> OtlpReceiver:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Posts(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OtlpReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.take(
            self.path, _DECOMPRESS[self.headers.get("Content-Encoding", "identity")](body)
        )
        self.server.statuses.append(status)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def _value(encoded: Any) -> Any:
    kind = encoded.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in encoded.array_value.values]
    if kind == "kvlist_value":
        return _attributes(encoded.kvlist_value.values)
    return None if kind is None else getattr(encoded, kind)


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _decode_spans(request: Any) -> Iterator[dict[str, Any]]:
    """Yield spans with their ids in hex."""
    for resource in request.resource_spans:
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            yield {
                "name": span.name,
                "trace_id": span.trace_id.hex(),
                "span_id": span.span_id.hex(),
                "parent_span_id": span.parent_span_id.hex(),
                "attributes": _attributes(span.attributes),
                "events": [event.name for event in span.events],
                "resource": _attributes(resource.resource.attributes),
            }


def _decode_metrics(request: Any) -> Iterator[dict[str, Any]]:
    """Yield points: the value of a sum or gauge, the count of a histogram."""
    for resource in request.resource_metrics:
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in getattr(metric, metric.WhichOneof("data")).data_points:
                kind = point.WhichOneof("value") if hasattr(point, "as_double") else "count"
                yield {
                    "name": metric.name,
                    "attributes": _attributes(point.attributes),
                    "value": None if kind is None else getattr(point, kind),
                    "resource": _attributes(resource.resource.attributes),
                }
