"""The spans of runs and nodes until they end, and trace contexts that cross processes."""

from __future__ import annotations

import sys
from copy import copy
from math import inf
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context, metrics, trace
from opentelemetry.baggage import set_baggage
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stroma._utils.distributions import installed_version
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.telemetry.conventions import LANGCHAIN, SCHEMA_URL, SCOPE, about_run
from stroma.telemetry.observer import AttemptEnd

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, SpanContext, Tracer, TracerProvider


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
    return source.get_tracer(SCOPE, installed_version("stroma-runner"), schema_url=SCHEMA_URL)


def meter_of(source: Meter | MeterProvider) -> Meter:
    """Return a meter as it is, or that of a provider under our name, version and schema."""
    if isinstance(source, metrics.Meter):
        return source
    return source.get_meter(SCOPE, installed_version("stroma-runner") or "", SCHEMA_URL)


def place_of(node: RunningNode) -> dict[str, Any]:
    """Return the attributes that say where in its run a node stands."""
    return {"stroma.node.position": node.position} | (
        {"stroma.node.branch": node.branch} if node.branch else {}
    )


_W3C: Final = TraceContextTextMapPropagator()


def attach(span: Span, run: ReliabilityContext, *, baggage: bool) -> Token[Context]:
    """Make a span current, with the ids of its run as baggage if wanted; undo it with :func:`detach`."""
    current = trace.set_span_in_context(span)
    if baggage:
        about = about_run(run)
        for name in ("stroma.run.id", "session.id", "user.id"):
            if name in about:
                current = set_baggage(name, about[name], current)
    return context.attach(current)


def detach(token: Token[Context] | None) -> None:
    """Undo :func:`attach`; None does nothing."""
    if token is not None:
        context.detach(token)


def traceparent_of(span: Span) -> str | None:
    """Return what other processes link to, or put their spans under; None for a span that is nowhere."""
    if not span.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier["traceparent"]


def context_of(traceparent: str) -> Context:
    """Return the context of a span of another process."""
    return _W3C.extract({"traceparent": traceparent})


def current_below(above: Span) -> Span:
    """Return the innermost span here, such as a framework's own, of the trace of ``above``, which is around.

    OpenInference's instrumentation of LangChain makes none of its spans current, and has its own way to ask.
    """
    langchain: Any = sys.modules.get(LANGCHAIN)
    inside = [trace.get_current_span(), None if langchain is None else langchain.get_current_span()]
    trace_id = above.get_span_context().trace_id
    around = [span for span in inside if span is not None and span.get_span_context().trace_id == trace_id]
    return max([*around, above], key=lambda span: getattr(span, "start_time", None) or inf)


def is_span_of(span: Span, node_id: str) -> bool:
    """Return True for the span of a graph's node that LangChain's instrumentation has begun for our node."""
    scope = getattr(span, "instrumentation_scope", None)
    about: Any = getattr(span, "attributes", None) or {}
    return (
        scope is not None
        and scope.name == LANGCHAIN
        and getattr(span, "name", None) == node_id
        and "stroma.node.kind" not in about  # Of an earlier call in the same node.
    )


def tracer_of_span(tracer: Tracer, about: SpanContext) -> Tracer | None:
    """Return an SDK tracer whose next span has the ids of another one; None for other tracers."""
    # A tracer of the global provider stands for the SDK's.
    own: Any = copy(getattr(tracer, "_tracer", tracer))
    if not hasattr(own, "id_generator"):
        return None
    own.id_generator = _FixedIds(about)
    return own  # type: ignore[no-any-return]


class _FixedIds:
    """Generates the ids of one span."""

    def __init__(self, about: SpanContext) -> None:
        self._about = about

    def generate_span_id(self) -> int:
        return self._about.span_id

    def generate_trace_id(self) -> int:
        return self._about.trace_id

    def is_trace_id_random(self) -> bool:
        return False
