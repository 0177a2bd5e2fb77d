"""Failures, costs and durations over all runs of some days."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from markupsafe import Markup

from stroma._utils.svg import as_xml
from stroma._utils.text import pluralize
from stroma.checkpoint.records import PICO, Tally
from stroma.trace.html import utc

__all__ = ["BUCKETS", "AttemptTotals", "Overview"]

#: Number of time buckets of the chart.
BUCKETS: Final = 24
_MAX_ROWS: Final = 10
_CLASSES: Final = ("TERMINAL", "RECOVERABLE", "AMBIGUOUS")
_BAR_WIDTH: Final = 40
_CHART_HEIGHT: Final = 120


@dataclass(slots=True)
class AttemptTotals:
    """Totals of one pipeline, node or model."""

    name: str
    attempts: int = 0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    wasted_usd: float = 0.0
    seconds: float = 0.0
    longest: float = 0.0

    def add(self, one: Tally) -> None:
        self.attempts += one.attempts
        self.failed += one.attempts if one.failure_class is not None else 0
        self.tokens += one.tokens
        self.cost_usd += one.cost_pico / PICO
        self.wasted_usd += one.wasted_pico / PICO
        self.seconds += one.duration_ns / 1e9
        self.longest = max(self.longest, one.longest_ns / 1e9)

    @property
    def mean(self) -> float:
        """Mean seconds of an attempt."""
        return self.seconds / self.attempts if self.attempts else 0.0


@dataclass(slots=True)
class Overview:
    """Totals of some days."""

    total: AttemptTotals
    pipelines: list[AttemptTotals]
    nodes: list[AttemptTotals]
    models: list[AttemptTotals]
    slowest: list[AttemptTotals]
    failures: dict[int, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> Overview:
        total = AttemptTotals("all")
        failures: dict[int, dict[str, int]] = {}
        for one in tallies:
            total.add(one)
            if one.failure_class is not None:
                at = failures.setdefault(one.bucket, {})
                at[one.failure_class] = at.get(one.failure_class, 0) + one.attempts
        nodes = _group_by(tallies, lambda one: one.node_id)
        return cls(
            total,
            _most_expensive(_group_by(tallies, lambda one: one.pipeline)),
            _most_expensive(nodes),
            _most_expensive(
                _group_by((one for one in tallies if one.model is not None), lambda one: one.model or "")
            ),
            sorted(nodes, key=lambda row: -row.mean)[:_MAX_ROWS],
            failures,
        )

    def chart(self, first: int, bucket_ms: int) -> Markup:
        """Draw failed attempts by class, one column per bucket from ``first`` on."""
        highest = max([1, *(sum(at.values()) for at in self.failures.values())])
        bars = []
        for place in range(BUCKETS + 1):
            at, y = self.failures.get(first + place, {}), float(_CHART_HEIGHT)
            when = utc((first + place) * bucket_ms)
            for kind in sorted(at, key=lambda kind: _CLASSES.index(kind) if kind in _CLASSES else 9):
                height = at[kind] / highest * (_CHART_HEIGHT - 10)
                y -= height
                title = f"{when}: {kind}, {pluralize(at[kind], 'attempt')}"
                tone = kind.lower() if kind in _CLASSES else "other"
                bars.append(
                    f'<rect class="c-{tone}" x="{place * _BAR_WIDTH + 3}" y="{y:.1f}" width="{_BAR_WIDTH - 6}" '
                    f'height="{max(height, 1):.1f}"><title>{as_xml(title)}</title></rect>'
                )
        label = f"failed attempts by class over time, {highest:,} at the most in one span"
        return Markup(
            f'<svg class="chart" viewBox="0 0 {(BUCKETS + 1) * _BAR_WIDTH} {_CHART_HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{as_xml(label)}">{"".join(bars)}</svg>'
        )


def _group_by(tallies: Iterable[Tally], name: Callable[[Tally], str]) -> list[AttemptTotals]:
    rows: dict[str, AttemptTotals] = {}
    for one in tallies:
        rows.setdefault(name(one), AttemptTotals(name(one))).add(one)
    return list(rows.values())


def _most_expensive(rows: list[AttemptTotals]) -> list[AttemptTotals]:
    return sorted(rows, key=lambda row: (-row.cost_usd, -row.attempts))[:_MAX_ROWS]
