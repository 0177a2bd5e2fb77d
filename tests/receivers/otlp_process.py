"""The program behind `OtlpReceiver`: takes OTLP over HTTP in protobuf, keeps it decoded, and misbehaves when
told to.

It listens on two ports of loopback and prints them: one for the exporters, one for the test. It ends when its
standard input does, so it cannot outlive the test process.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import socket
import sys
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from tests.receivers.otlp_decode import decode_logs, decode_metrics, decode_spans

Decoder = Callable[[Any], Iterator[dict[str, Any]]]
SIGNALS: dict[str, tuple[str, Any, Any, Decoder]] = {
    "/v1/traces": ("spans", ExportTraceServiceRequest, ExportTraceServiceResponse, decode_spans),
    "/v1/metrics": ("metrics", ExportMetricsServiceRequest, ExportMetricsServiceResponse, decode_metrics),
    "/v1/logs": ("logs", ExportLogsServiceRequest, ExportLogsServiceResponse, decode_logs),
}


class State:
    """What arrived, and how the next posts are answered. `changed` guards all of it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.clear()

    def clear(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {"spans": [], "metrics": [], "logs": [], "posts": []}
        self.fail = 0
        self.status = 503
        self.retry_after: float | None = None
        self.delay = 0.0

    def keep(self, signal: str, found: list[dict[str, Any]]) -> None:
        if signal != "metrics":
            self.kept[signal] += found
            return
        # A cumulative series is sent whole each time: only its newest point counts.
        known = {_series(point): at for at, point in enumerate(self.kept[signal])}
        for point in found:
            at = known.get(_series(point))
            if at is None or point["temporality"] == "DELTA":
                self.kept[signal].append(point)
            else:
                self.kept[signal][at] = point


def _series(point: dict[str, Any]) -> str:
    return json.dumps([point[key] for key in ("resource", "scope", "name", "attributes")], sort_keys=True)


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    # Exporters of many processes may come at once.
    request_queue_size = 128

    def __init__(self, state: State, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        self.state = state
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was thrown out by `refuse`, is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what arrived is asked for over the other port."""

    def answer(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


class Intake(Handler):
    """The port of the exporters."""

    def do_POST(self) -> None:
        state, body = self.server.state, self.body()
        with state.changed:
            delay = state.delay
            failing = state.fail > 0
            state.fail -= failing
            status, retry_after = state.status, state.retry_after
        if delay:
            time.sleep(delay)
        answer, headers = b"", {}
        if failing:
            if retry_after is not None:
                headers = {"Retry_After": f"{retry_after:g}"}
        else:
            status, answer = self.take(body)
        with state.changed:
            state.kept["posts"].append(
                {"path": self.path, "status": status, "bytes": len(body), "time": time.time()}
            )
            state.changed.notify_all()
        self.answer(status, answer, "application/x-protobuf", **headers)

    def take(self, body: bytes) -> tuple[int, bytes]:
        if self.path not in SIGNALS:
            return 404, b""
        kind = self.headers.get("Content-Type")
        if kind not in ("application/x-protobuf", "application/json"):
            return 415, b""
        signal, request, response, decode = SIGNALS[self.path]
        try:
            encoding = self.headers.get("Content-Encoding", "identity")
            body = {"identity": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[encoding](body)
            message = from_json(request, body) if kind == "application/json" else request.FromString(body)
            findings = list(decode(message))
        except (DecodeError, ParseError, KeyError, ValueError, OSError, EOFError, zlib.error):
            return 400, b""
        with self.server.state.changed:
            self.server.state.keep(signal, findings)
        return 200, response().SerializeToString()


def from_json(request: Any, body: bytes) -> Any:
    """OTLP's JSON is protobuf's, but ids are hex and enumerations numbers. Unknown fields are errors."""

    def ids(value: Any) -> Any:
        if isinstance(value, list):
            return [ids(item) for item in value]
        if not isinstance(value, dict):
            return value
        events = {name: ids(item) for name, item in value.items()}
        for name, size in (("traceId", 16), ("spanId", 8), ("parentSpanId", 8)):
            if name in events:
                argument = bytes.fromhex(events[name])
                if len(argument) != size or not any(argument):
                    raise ValueError(f"{name} {events[name]!r}")
                events[name] = base64.b64encode(argument).decode()
        for name in ("kind", "code"):
            if name in events and type(events[name]) is not int:
                raise ValueError(f"{name} {events[name]!r}")
        return events

    return Parse(json.dumps(ids(json.loads(body))), request())


class Control(Handler):
    """The port of the test: what arrived, and what to do from now on."""

    intake: Intakes

    def do_GET(self) -> None:
        """`/spans?at_least=2&seconds=10` waits for two or answers with what there is after that."""
        at = urllib.parse.urlsplit(self.path)
        requests = dict(urllib.parse.parse_qsl(at.query))
        signal, state = at.path.removeprefix("/"), self.server.state
        with state.changed:
            state.changed.wait_for(
                lambda: len(state.kept[signal]) >= int(requests.get("at_least", 0)),
                timeout=float(requests.get("seconds", 0)),
            )
            body = json.dumps(state.kept[signal]).encode()
        self.answer(200, body, "application/json")

    def do_POST(self) -> None:
        events, state = json.loads(self.body()), self.server.state
        with state.changed:
            if events.pop("clear", False):
                state.clear()
            refuse = events.pop("refuse", None)
            for name, value in events.items():
                setattr(state, name, value)
        if refuse is not None:
            self.intake.refuse() if refuse else self.intake.listen()
        self.answer(200, b"{}", "application/json")


class Intakes:
    """Listens for exporters, always on the same port; refused in between, nobody else can get that port."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._listener: Listener | None = Listener(state, Intake)
        self.port = self._listener.server_address[1]
        self._held: socket.socket | None = None
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()

    def refuse(self) -> None:
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        listener.shutdown()
        listener.server_close()
        # A connection that was kept open would still be served.
        for connection in list(listener.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        # Bound but not listening: whoever connects is refused.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", self.port))

    def listen(self) -> None:
        if self._held is None:
            return
        self._held.close()
        self._held = None
        self._listener = Listener(self._state, Intake, self.port)
        self._serve()


def main() -> None:
    state = State()
    Control.intake = Intakes(state)
    control = Listener(state, Control)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    print(Control.intake.port, control.server_address[1], flush=True)
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
