"""A transport for the Sentry SDK that keeps what would have been sent."""

from __future__ import annotations

import json
from typing import Any

import sentry_sdk
from sentry_sdk.envelope import Envelope, Item
from sentry_sdk.transport import Transport

# Of the right form, and of a host that there never is.
DSN = "https://public@sentry.invalid/1"


class RecordingTransport(Transport):
    """Keeps whole envelopes, as they are after they were written out and read again.

    The SDK sends gen_ai spans not in their transaction but beside it: `transactions` has the others, `streamed_spans`
    has these, `spans` has both in one form.
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
        found = [span for payload in self._payloads("span") for span in payload["items"]]
        return [
            {**span, "attributes": {key: at["value"] for key, at in (span.get("attributes") or {}).items()}}
            for span in found
        ]

    @property
    def spans(self) -> list[dict[str, Any]]:
        """Every span: `name` (the description), `op`, `status`, `trace_id`, `span_id`, `parent_span_id`, `data`. A
        transaction stands here as its root span."""
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
        (found,) = [span for span in self.spans if span["name"] == name]
        return found


def _span(name: Any, op: Any, span: dict[str, Any]) -> dict[str, Any]:
    keys = ("status", "trace_id", "span_id", "parent_span_id", "data")
    return {"name": name, "op": op, **{key: span.get(key) for key in keys}}


class RecordedSentry:
    """A client of its own with that transport; the global one is left alone. It has no integrations unless asked for.

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
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
