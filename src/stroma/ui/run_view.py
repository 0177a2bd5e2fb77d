"""Parts of the page of a run beside its attempts: totals, budget, progress, links to its trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from stroma._utils.text import format_duration, format_usd, pluralize
from stroma.checkpoint.history.facts import is_at_work
from stroma.checkpoint.records import RunRecord
from stroma.trace.story import Story
from stroma.ui.components import meter

if TYPE_CHECKING:
    from stroma.ui.settings import Settings

#: Number of runs among which a trace is looked up: no index serves it.
MOST_TRACES: Final = 1000
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def read_limits(settings: Settings, record: RunRecord) -> Mapping[str, float]:
    """Return the limits of a run by field of ExecutionBudget; a request overrides the config.

    Raises StoreError.
    """
    return {**settings.served(record).budget, **settings.store.control(record.run_id).budget}


def trace_link(settings: Settings, run_id: str) -> str | None:
    """Return the address of a run's trace in the telemetry backend, or None. Raises StoreError."""
    if settings.trace_url is None:
        return None
    traces = settings.store.traceparents([run_id]).get(run_id, "")
    match = _TRACEPARENT.search(traces.rpartition("otel=")[2])  # Without OpenTelemetry, any system's.
    if match is None:
        return None
    return settings.trace_url.replace("{trace_id}", match[1]).replace("{span_id}", match[2])


def find_by_trace(settings: Settings, trace_id: str) -> str | None:
    """Return the id of the newest run with a trace, of the last thousand, or None. Raises StoreError."""
    ids = [record.run_id for record in settings.store.list_runs(limit=MOST_TRACES)]
    traces = settings.store.traceparents(ids)
    return next((run_id for run_id, contexts in traces.items() if f"-{trace_id}-" in contexts), None)


def window_of(query: Mapping[str, str]) -> tuple[float, float] | None:
    """Return the part of the timeline in a query, in milliseconds; None for all of it."""
    try:
        start, end = 1000 * float(query.get("from", "")), 1000 * float(query.get("to", ""))
    except ValueError:
        return None
    return (start, end) if 0 <= start < end < 1e13 else None


def totals(record: RunRecord, story: Story, limits: Mapping[str, float], failed: int) -> list[dict[str, Any]]:
    """Return the cards above a run: each a name, a value, what is said of it, and a bar."""
    wasted_tokens, wasted_usd = story.wasted
    cost, tokens, latency = map(limits.get, ("max_cost_usd", "max_tokens_total", "max_latency_ms"))
    seconds: Any = format_duration(story.seconds)
    if is_at_work(record):
        seconds = Markup('<span data-since="{}">{}</span>').format(record.started_ms, seconds)
    took = of_budget = of_tokens = attempts = ""
    if latency is not None:
        took = (
            f"{format_duration(record.latency_ms / 1000)} of {format_duration(latency / 1000)} in functions"
        )
    if cost is not None:
        of_budget = f"{_percent(record.cost_usd, cost)} of the budget of {format_usd(cost)}"
    if tokens is not None:
        of_tokens = f"{_percent(record.tokens, tokens)} of {tokens:,.0f}"
    if failed or record.commits:
        attempts = f"{failed:,} failed" if failed else f"{pluralize(record.commits, 'output')} committed"
    wasted = f"{wasted_tokens:,} tokens without output"
    of_cost = record.cost_usd if wasted_usd else None
    return [
        _card("Duration", seconds, took, record.latency_ms, latency),
        _card("Cost", format_usd(record.cost_usd), of_budget, record.cost_usd, cost),
        _card("Tokens", f"{record.tokens:,}", of_tokens, record.tokens, tokens),
        _card("Attempts", f"{len(story.bars) + story.left_out:,}", attempts),
        _card("Wasted", format_usd(wasted_usd), wasted, wasted_usd, of_cost, tone="warn"),
    ]


def _percent(value: float, limit: float) -> str:
    return "100 %" if limit <= 0 else f"{100 * value / limit:.0f} %"


def _card(
    name: str, value: Any, more: str, used: float = 0.0, limit: float | None = None, tone: str = ""
) -> dict[str, Any]:
    if limit is None:
        return {"name": name, "value": value, "more": more, "bar": ""}
    part = 1.0 if limit <= 0 else used / limit
    level = tone or ("bad" if part >= 1 else "warn" if part > 0.8 else "run")
    return {"name": name, "value": value, "more": more, "bar": meter(used, limit, level)}
