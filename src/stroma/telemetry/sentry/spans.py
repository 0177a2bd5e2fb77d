"""Spans in the two modes of Sentry's SDK, behind the same methods."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


class Transactions:
    """Spans of transactions, as the SDK has them by default."""

    is_streamed = False

    def __init__(self, sdk: Any) -> None:
        self._sdk = sdk

    def current(self, scope: Any) -> Any:
        """Return the current span of a scope, or None."""
        return scope.span

    def start(
        self, scope: Any, name: str, op: str, above: Any, traceparent: str | None, *, is_root: bool = False
    ) -> Any:
        """Start a span under ``above``, or in the trace of ``traceparent``; make it current in a scope."""
        about = {"op": op, "name": name}
        with self._sdk.scope.use_scope(scope):  # A transaction goes by the client of the current one.
            if traceparent is not None:
                header = {"sentry-trace": _sentry_trace(traceparent)}
                span = self._sdk.start_transaction(self._sdk.continue_trace(header, **about))
            elif above is not None:
                span = above.start_child(**about)
            else:
                span = self._sdk.start_transaction(**about) if is_root else self._sdk.start_span(**about)
        scope.span = span
        return span

    def start_lost(self, scope: Any, name: str, op: str, outer: str | None, lost: tuple[str, int]) -> Any:
        """Start the transaction that a killed process could not end, and make it current in a scope."""
        _, trace_id, span_id, _ = lost[0].split("-")
        about = {"trace_id": trace_id, "span_id": span_id, "parent_span_id": _parent_in(outer, trace_id)}
        with self._sdk.scope.use_scope(scope):
            span = self._sdk.start_transaction(
                op=op, name=name, start_timestamp=lost[1] / 1e9, sampled=True, **about
            )
        scope.span = span
        return span

    def backdate(self, span: Any, start_ns: int) -> None:
        """Set the start of a span that began before now."""
        span.start_timestamp = datetime.fromtimestamp(start_ns / 1e9, UTC)

    def put(self, span: Any, name: str, value: Any) -> None:
        """Set an attribute of a span."""
        span.set_data(name, value)

    def end(self, span: Any, status: str, scope: Any, ended_s: float | None = None) -> None:
        """End a span, by the client of a scope. ``ended_s``: since the epoch, if that was before now."""
        span.set_status(status)
        with self._sdk.scope.use_scope(scope):
            span.finish(scope, ended_s)


class SpanStream:
    """Spans that are sent one by one (``trace_lifecycle="stream"``): transactions do nothing there."""

    is_streamed = True

    def __init__(self, sdk: Any) -> None:
        self._sdk = sdk

    def current(self, scope: Any) -> Any:
        """Return the current span of a scope, or None."""
        return scope.streamed_span

    def start(
        self, scope: Any, name: str, op: str, above: Any, traceparent: str | None, *, is_root: bool = False
    ) -> Any:
        """Start a span under ``above``, or in the trace of ``traceparent``; make it current in a scope."""
        with self._sdk.scope.use_scope(scope):
            scope.streamed_span = above if traceparent is None else None
            if traceparent is not None:
                scope.generate_propagation_context({"sentry-trace": _sentry_trace(traceparent)})
            elif above is None and is_root:
                scope.set_new_propagation_context()
            return self._sdk.traces.start_span(name=name, attributes={"sentry.op": op})

    def start_lost(self, scope: Any, name: str, op: str, outer: str | None, lost: tuple[str, int]) -> Any:
        """Start the span that a killed process could not end, and make it current in a scope."""
        _, trace_id, span_id, _ = lost[0].split("-")
        span = self.start(scope, name, op, None, lost[0])
        span._parent_span_id = _parent_in(outer, trace_id)
        self.move(span, int(span_id, 16), lost[1])
        return span

    def move(self, span: Any, span_id: int, start_ns: int | None) -> None:
        """Set the id of a span, and its start if it began in another process."""
        span._span_id = f"{span_id:016x}"
        if start_ns is not None:
            self.backdate(span, start_ns)

    def backdate(self, span: Any, start_ns: int) -> None:
        """Set the start of a span that began before now."""
        span._start_timestamp = datetime.fromtimestamp(start_ns / 1e9, UTC)

    def put(self, span: Any, name: str, value: Any) -> None:
        """Set an attribute of a span."""
        span.set_attribute(name, value)

    def end(self, span: Any, status: str, scope: Any, ended_s: float | None = None) -> None:
        """End a span, by the client of a scope. ``ended_s``: since the epoch, if that was before now."""
        span.status = "ok" if status in ("ok", "cancelled", "aborted") else "error"
        span.set_attribute("sentry.status.message", status)
        with self._sdk.scope.use_scope(scope):
            span.end(ended_s)


def _parent_in(outer: str | None, trace_id: str) -> str | None:
    """Return the id of a span around a trace's root, if it is of that trace."""
    return outer.split("-")[2] if outer is not None and outer.split("-")[1] == trace_id else None


def _sentry_trace(traceparent: str) -> str:
    _, trace_id, span_id, flags, *_ = traceparent.split("-")
    return f"{trace_id}-{span_id}-{int(flags, 16) & 1}"
