"""W3C trace contexts of one run, one for each system that traces it, as one text."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["join_traces", "trace_of", "traces_of"]


def traces_of(text: str | None) -> dict[str, str]:
    """Return the trace contexts in a text by system; "" is that of every system without one of its own."""
    if text is None:
        return {}
    pairs = [part.rpartition("=") for part in text.split(";")]
    return {system: traceparent for system, _, traceparent in pairs}


def join_traces(traces: Mapping[str, str]) -> str | None:
    """Return trace contexts by system as one text, a plain one as it is; None without any."""
    return (
        ";".join(
            f"{system}={traceparent}" if system else traceparent for system, traceparent in traces.items()
        )
        or None
    )


def trace_of(text: str | None, system: str) -> str | None:
    """Return the trace context for a system, or None."""
    traces = traces_of(text)
    return traces.get(system, traces.get(""))
