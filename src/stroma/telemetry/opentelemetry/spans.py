"""The spans of runs and nodes until they end, and what their ends need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace

from stroma.engine.execution import RunningNode
from stroma.telemetry.conventions import SCHEMA_URL, SCOPE, version
from stroma.telemetry.observer import AttemptEnd

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

__all__ = ["NodeSpan", "RunSpan", "SpanEvents", "meter_of", "place_of", "tracer_of"]


class RunSpan:
    """The span of a run."""

    __slots__ = ("events", "here", "restored", "span", "token")

    def __init__(self) -> None:
        self.span: Span | None = None
        self.events = SpanEvents()
        self.restored = 0
        #: What undoes that the run, and its span, are current.
        self.here: Token[Any] | None = None
        self.token: Token[Context] | None = None


class SpanEvents:
    """The number of events of a span: its SDK keeps 128, and drops the oldest ones without a word."""

    __slots__ = ("dropped", "sent")

    def __init__(self) -> None:
        self.sent = self.dropped = 0

    def add(self, span: Span, name: str, about: dict[str, Any], most: int = 100) -> None:
        """Add an event to the span unless it has ``most``; the others are counted."""
        if self.sent < most:
            self.sent += 1
            span.add_event(name, about)
        else:
            self.dropped += 1

    def note(self, span: Span) -> None:
        """Set the attribute that says how many are missing, if any are."""
        if self.dropped:
            span.set_attribute("stroma.events.dropped", self.dropped)


class NodeSpan:
    """The span of a node, and what its end needs."""

    __slots__ = (
        "attempt",
        "attempt_end_ns",
        "attempt_token",
        "cost",
        "ended",
        "events",
        "is_ours",
        "output",
        "span",
        "token",
        "tokens",
    )

    def __init__(self, span: Span, *, is_ours: bool = True) -> None:
        self.span, self.is_ours = span, is_ours
        self.events = SpanEvents()
        self.output: dict[str, str] = {}
        self.token: Token[Context] | None = None
        #: The span of an attempt, until it is known if another one follows; and when the attempt ended.
        self.attempt: Span | None = None
        self.attempt_end_ns: int | None = None
        self.attempt_token: Token[Context] | None = None
        self.ended: AttemptEnd | None = None
        self.tokens = 0
        self.cost = 0.0


def tracer_of(source: Tracer | TracerProvider) -> Tracer:
    """Return a tracer as it is, or that of a provider under our name, version and schema."""
    if isinstance(source, trace.Tracer):
        return source
    return source.get_tracer(SCOPE, version(), schema_url=SCHEMA_URL)


def meter_of(source: Meter | MeterProvider) -> Meter:
    """Return a meter as it is, or that of a provider under our name, version and schema."""
    if isinstance(source, metrics.Meter):
        return source
    return source.get_meter(SCOPE, version() or "", SCHEMA_URL)


def place_of(node: RunningNode) -> dict[str, Any]:
    """Return the attributes that say where in its run a node stands."""
    return {"stroma.node.position": node.position} | (
        {"stroma.node.branch": node.branch} if node.branch else {}
    )
