"""A transport for the Sentry SDK that keeps what would have been sent, and a server that keeps what was."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from typing import Any

import sentry_sdk
from sentry_sdk.envelope import Envelope, Item
from sentry_sdk.transport import Transport

# Of the right form, and of a host that there never is.
DSN = "https://public@sentry.invalid/1"


class RecordingTransport(Transport):
    """Keeps whole envelopes, as they are after they were written out and read again.

    The SDK sends gen_ai spans not in their transaction but beside it: `transactions` has the others,
    `streamed_spans` has these, `spans` has both in one form.
    """

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.envelopes: list[Envelope] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.envelopes.append(Envelope.deserialize(envelope.serialize()))

    def items(self, kind: str) -> list[Item]:
        return [item for envelope in self.envelopes for item in envelope.items if item.type == kind]

    def _payloads(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(item.get_bytes()) for item in self.items(kind)]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Errors and messages: what becomes an issue."""
        return self._payloads("event")

    @property
    def transactions(self) -> list[dict[str, Any]]:
        return self._payloads("transaction")

    @property
    def streamed_spans(self) -> list[dict[str, Any]]:
        """Spans that travel without a transaction, with plain values in `attributes`."""
        findings = [span for payload in self._payloads("span") for span in payload["items"]]
        return [
            {**span, "attributes": {key: at["value"] for key, at in (span.get("attributes") or {}).items()}}
            for span in findings
        ]

    @property
    def spans(self) -> list[dict[str, Any]]:
        """Every span: `name` (the description), `op`, `status`, `trace_id`, `span_id`, `parent_span_id`,
        `data`. A transaction stands here as its root span."""
        spans: list[dict[str, Any]] = []
        for transaction in self.transactions:
            root = transaction["contexts"]["trace"]
            spans.append(_span(transaction["transaction"], root.get("op"), root))
            spans += [_span(span.get("description"), span.get("op"), span) for span in transaction["spans"]]
        for span in self.streamed_spans:
            spans.append(
                _span(span["name"], span["attributes"].get("sentry.op"), {**span, "data": span["attributes"]})
            )
        return spans

    def span(self, name: str) -> dict[str, Any]:
        """The one span of that name."""
        (result,) = [span for span in self.spans if span["name"] == name]
        return result


def _span(name: Any, op: Any, span: dict[str, Any]) -> dict[str, Any]:
    keys = ("status", "trace_id", "span_id", "parent_span_id", "data", "start_timestamp", "timestamp")
    return {"name": name, "op": op, **{key: span.get(key) for key in keys}}


class RecordedSentry:
    """A client of its own with that transport; the global one is left alone. It has no integrations unless
    asked for.

    Attributes:
        client: what to give to what is tested.
        transport: what it sent.
    """

    def __init__(self, **options: Any) -> None:
        self.transport = RecordingTransport()
        defaults = {"dsn": DSN, "traces_sample_rate": 1.0, "default_integrations": False, "debug": False}
        self.client = sentry_sdk.Client(**{**defaults, **options, "transport": self.transport})

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> RecordedSentry:
        # The process's own scope outlives a test: steps of plain code have left theirs there.
        sentry_sdk.get_isolation_scope().clear_breadcrumbs()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SentryServer(http.server.ThreadingHTTPServer):
    """Takes envelopes.

    Attributes:
        items: every line of JSON in them: headers, events, transactions.
        dsn: for `SENTRY_DSN`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Envelopes)
        self.items: list[dict[str, Any]] = []
        self.dsn = f"http://key@127.0.0.1:{self.server_address[1]}/7"

    def __enter__(self) -> SentryServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What becomes an issue."""
        return [item for item in self.items if "fingerprint" in item]


class _Envelopes(http.server.BaseHTTPRequestHandler):
    server: SentryServer

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        self.server.items += [json.loads(line) for line in data.splitlines() if line.startswith(b"{")]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None: ...
