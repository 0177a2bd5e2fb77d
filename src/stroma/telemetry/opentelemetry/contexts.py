"""Trace contexts: the one that is current, and those that cross processes as W3C ``traceparent``."""

from __future__ import annotations

import sys
from contextvars import Token
from copy import copy
from math import inf
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.baggage import set_baggage
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stroma.engine.context import ReliabilityContext
from stroma.telemetry.conventions import LANGCHAIN, about_run

__all__ = [
    "attach",
    "context_of",
    "current_below",
    "detach",
    "is_span_of",
    "traceparent_of",
    "tracer_of_span",
]

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
    own: Any = copy(
        getattr(tracer, "_tracer", tracer)
    )  # A tracer of the global provider stands for the SDK's.
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
