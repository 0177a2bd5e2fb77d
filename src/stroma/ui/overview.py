"""Failures, costs and durations over all runs of some days."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from markupsafe import Markup

from stroma._utils.text import clean, format_usd, pluralize
from stroma.checkpoint.history.facts import status_of
from stroma.checkpoint.records import PICO, RunRecord, Tally, digits_seconds
from stroma.trace.html import utc
from stroma.trace.outline import tone_of
from stroma.ui.components import Column, columns_chart, sparkline, stacked

Number = TypeVar("Number", int, float)
#: Number of time buckets of the chart.
BUCKETS: Final = 24
_MAX_ROWS: Final = 10
_CLASSES: Final = ("TERMINAL", "RECOVERABLE", "AMBIGUOUS")


@dataclass(slots=True)
class AttemptTotals:
    """Totals of one pipeline, node or model.

    Attributes:
        pipeline: that of its longest attempt.
    """

    name: str
    pipeline: str = ""
    attempts: int = 0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    wasted_usd: float = 0.0
    longest: float = 0.0
    by_bucket: dict[int, float] = field(default_factory=dict)
    by_digits: dict[int, int] = field(default_factory=dict)

    def add(self, one: Tally) -> None:
        self.by_bucket[one.bucket] = self.by_bucket.get(one.bucket, 0.0) + one.cost_pico / PICO
        self.attempts += one.attempts
        self.failed += one.attempts if one.failure_class is not None else 0
        self.tokens += one.tokens
        self.cost_usd += one.cost_pico / PICO
        self.wasted_usd += one.wasted_pico / PICO
        self.by_digits[one.digits] = self.by_digits.get(one.digits, 0) + one.attempts
        longest = one.longest_ns / 1e9
        if longest >= self.longest:
            self.longest, self.pipeline = longest, one.pipeline

    def quantile(self, part: float) -> float:
        """Return the seconds, to two digits, that this fraction of the attempts does not exceed."""
        count = 0
        for digits in sorted(self.by_digits):
            count += self.by_digits[digits]
            if count >= part * self.attempts:
                return digits_seconds(digits)
        return 0.0

    def trend(self, buckets: Buckets) -> Markup:
        """Draw the cost over time."""
        costs = [(when, self.by_bucket.get(bucket, 0.0)) for bucket, when in buckets.times()]
        columns = [Column(cost, "dim", f"{when}: {format_usd(cost)}") for when, cost in costs]
        return sparkline(columns, f"cost of {clean(self.name, 60)} over time", BUCKETS + 1, least=0)

    def parts(self, most: float) -> Markup:
        """Draw the cost as a bar, the wasted part by itself."""
        return stacked([(self.cost_usd - self.wasted_usd, "run"), (self.wasted_usd, "warn")], most)


@dataclass(slots=True)
class Overview:
    """Totals of some days."""

    total: AttemptTotals
    pipelines: list[AttemptTotals]
    nodes: list[AttemptTotals]
    models: list[AttemptTotals]
    slowest: list[AttemptTotals]
    failures: dict[int, dict[str, int]] = field(default_factory=dict)
    costs: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> Overview:
        total = AttemptTotals("all")
        failures: dict[int, dict[str, int]] = {}
        costs: dict[int, tuple[float, float]] = {}
        for one in tallies:
            total.add(one)
            used, wasted = costs.get(one.bucket, (0.0, 0.0))
            costs[one.bucket] = used + one.cost_pico / PICO, wasted + one.wasted_pico / PICO
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
            sorted(nodes, key=lambda row: -row.quantile(0.95))[:_MAX_ROWS],
            failures,
            costs,
        )

    def chart(self, buckets: Buckets) -> Markup:
        """Draw failed attempts by class, one column per bucket."""
        highest = max([1, *(sum(at.values()) for at in self.failures.values())])
        tones = {kind: kind.lower() for kind in _CLASSES}
        columns = buckets.columns(self.failures, tones, lambda kind, n: f"{kind}, {pluralize(n, 'attempt')}")
        label = f"failed attempts by class over time, {highest:,} at the most in one span"
        return columns_chart(columns, buckets.labels(), label)

    def cost_chart(self, buckets: Buckets) -> Markup:
        """Draw what attempts cost, the wasted part by itself."""
        parts = {at: {"for outputs": used - lost, "wasted": lost} for at, (used, lost) in self.costs.items()}
        tones = {"for outputs": "run", "wasted": "warn"}
        columns = buckets.columns(parts, tones, lambda part, usd: f"{format_usd(usd)} {part}")
        return columns_chart(columns, buckets.labels(), "cost over time, and its wasted part", unit="$")


@dataclass(frozen=True, slots=True)
class Buckets:
    """Spans of equal length. ``first``: the number of the first one, counted from the epoch."""

    first: int
    bucket_ms: int

    def times(self) -> list[tuple[int, str]]:
        return [(self.first + n, utc((self.first + n) * self.bucket_ms)) for n in range(BUCKETS + 1)]

    def labels(self) -> list[str]:
        return [when[11:16] if self.bucket_ms < 7_200_000 else when[5:16] for _, when in self.times()]

    def of(self, ms: int) -> int:
        return ms // self.bucket_ms

    def columns(
        self,
        values: Mapping[int, Mapping[str, Number]],
        tones: Mapping[str, str],
        describe: Callable[[str, Number], str],
    ) -> list[list[Column]]:
        """Return the column of each span. ``values``: its parts, by span and kind. ``tones``: by kind."""
        columns = []
        for bucket, when in self.times():
            parts = [(kind, values[bucket][kind]) for kind in tones if kind in values.get(bucket, {})]
            columns.append([Column(n, tones[kind], f"{when}: {describe(kind, n)}") for kind, n in parts])
        return columns


def runs_chart(records: Iterable[RunRecord], buckets: Buckets) -> Markup:
    """Draw runs by how they ended, and the part of them that succeeded as a line."""
    counts: dict[int, dict[str, int]] = {}
    for record in records:
        at = counts.setdefault(buckets.of(record.started_ms), {})
        tone = tone_of(status_of(record))
        at[tone] = at.get(tone, 0) + 1
    columns = buckets.columns(
        counts, {tone: tone for tone in _TONES}, lambda tone, n: f"{pluralize(n, 'run')} {_TONES[tone]}"
    )
    rates: list[float | None] = []
    for bucket, _ in buckets.times():
        at = counts.get(bucket, {})
        ended = at.get("good", 0) + at.get("bad", 0)
        rates.append(at.get("good", 0) / ended if ended else None)
    return columns_chart(
        columns,
        buckets.labels(),
        "runs over time by how they ended, and the part that succeeded",
        rates=rates,
    )


def success_rate(records: Iterable[RunRecord]) -> tuple[str, int]:
    """Return the share of completed runs among completed and failed ones, as text, and how many failed."""
    tones = [tone_of(status_of(record)) for record in records]
    done, failed = tones.count("good"), tones.count("bad")
    return f"{done / (done + failed):.1%}" if done + failed else "no result", failed


_TONES: Final = {
    "good": "succeeded",
    "bad": "failed",
    "warn": "suspended or interrupted",
    "run": "in progress",
    "queued": "queued",
    "dim": "cancelled",
}


def _group_by(tallies: Iterable[Tally], name: Callable[[Tally], str]) -> list[AttemptTotals]:
    rows: dict[str, AttemptTotals] = {}
    for one in tallies:
        rows.setdefault(name(one), AttemptTotals(name(one))).add(one)
    return list(rows.values())


def _most_expensive(rows: list[AttemptTotals]) -> list[AttemptTotals]:
    return sorted(rows, key=lambda row: (-row.cost_usd, -row.attempts))[:_MAX_ROWS]
