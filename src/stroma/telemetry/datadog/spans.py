"""The spans of runs and nodes until they end, and trace contexts that cross processes."""

from __future__ import annotations

from contextvars import Token
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ddtrace.propagation.http import HTTPPropagator

from stroma.telemetry.observer import AttemptEnd

if TYPE_CHECKING:
    from ddtrace.trace import Context, Span

__all__ = ["DatadogNode", "DatadogRun", "context_of", "traceparent_of"]


class DatadogRun:
    """The span of a run, and when it began."""

    __slots__ = ("before", "here", "restored", "since", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.restored = 0
        #: What undoes that the run is current, and what was active before.
        self.here: Token[Any] | None = None
        self.before: Span | Context | None = None
        self.since = perf_counter()


class DatadogNode:
    """The span of a node, and what its end needs."""

    __slots__ = ("active", "before", "cost", "ended", "span", "tokens")

    def __init__(self, span: Span) -> None:
        self.span = span
        #: Whether the span was made active, and what was before.
        self.active = False
        self.before: Span | Context | None = None
        self.ended: AttemptEnd | None = None
        self.tokens = 0
        self.cost = 0.0


def traceparent_of(span: Span) -> str:
    """Return what other processes link to, or put their spans under."""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-01"


def context_of(traceparent: str) -> Context | None:
    """Return the context of a span of another process; None for a text that is none."""
    parent_context = HTTPPropagator.extract({"traceparent": traceparent})  # type: ignore[no-untyped-call]
    return parent_context if parent_context.trace_id else None
