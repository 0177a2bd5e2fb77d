"""Figures about the nodes of a pipeline in its latest runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from stroma._utils.svg import Box
from stroma._utils.text import format_duration, format_usd, pluralize
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.records import RunQuery

__all__ = ["Figures", "figures_of", "rate_boxes"]

#: Maximum number of runs read, and of attempts read from each.
RUNS: Final = 50
_ATTEMPTS: Final = 1000
#: Part of the attempts that failed, from which on a node is marked as failing; of the time or cost of all, as
#: hot.
_FAILING: Final = 0.1
_HOT: Final = 0.4


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures about one node.

    Attributes:
        calls: number of places with an attempt, in all runs.
        p50, p95: percentiles of its attempts in seconds.
        seconds, cost_usd: sums over its attempts.
        inside: True for a child of a group or a step.
    """

    node_id: str
    calls: int
    attempts: int
    failed: int
    p50: float
    p95: float
    seconds: float
    cost_usd: float
    inside: bool = False

    @property
    def failure_rate(self) -> float:
        return self.failed / self.attempts

    @property
    def is_failing(self) -> bool:
        return self.failure_rate > _FAILING

    @property
    def lines(self) -> tuple[str, str]:
        """The figures as text."""
        cost = f" · {format_usd(self.cost_usd / self.calls)} a call" if self.cost_usd else ""
        return (
            f"{pluralize(self.calls, 'call')} · {self.failure_rate:.1%} of attempts failed",
            f"p50 {format_duration(self.p50)} · p95 {format_duration(self.p95)}{cost}",
        )


def rate_boxes(nodes: Sequence[Figures]) -> Callable[[Box], Box]:
    """Return a function that adds figures to the box of a node, and marks failing and expensive ones."""
    by_id = {one.node_id: one for one in nodes}
    seconds, cost = sum(one.seconds for one in nodes), sum(one.cost_usd for one in nodes)

    def rate(box: Box) -> Box:
        one = by_id.get(box.title)
        if one is None or box.kind in ("parallel", "map_over", "sequence"):
            return box
        heat = max(one.seconds / seconds if seconds else 0.0, one.cost_usd / cost if cost else 0.0)
        return replace(
            box,
            rates=one.lines,
            heat=heat,
            mood="failing" if one.is_failing else "hot" if heat > _HOT else "",
        )

    return rate


def figures_of(store: AsyncStates, pipeline: str) -> tuple[int, list[Figures]]:
    """Return the number of runs read, and the nodes in order of position. Raises StoreError."""
    if not store.exists():
        return 0, []
    runs = store.run_page(RunQuery(pipeline=pipeline), limit=RUNS).runs
    places: dict[str, tuple[int, str]] = {}
    took: dict[str, list[float]] = {}
    failed: dict[str, int] = {}
    calls: dict[str, set[tuple[str, int, str]]] = {}
    cost: dict[str, float] = {}
    for run in runs:
        for one in store.attempt_page(run.run_id, limit=_ATTEMPTS).attempts:
            took.setdefault(one.node_id, []).append(one.duration_ms / 1000)
            calls.setdefault(one.node_id, set()).add((run.run_id, one.position, one.branch))
            cost[one.node_id] = cost.get(one.node_id, 0.0) + one.cost_usd
            failed[one.node_id] = failed.get(one.node_id, 0) + (one.failure_class is not None)
            place = (one.position, one.branch)
            places[one.node_id] = min(place, places.get(one.node_id, place))
    figures = [
        Figures(
            node,
            len(calls[node]),
            len(took[node]),
            failed[node],
            _quantile(took[node], 0.5),
            _quantile(took[node], 0.95),
            sum(took[node]),
            cost[node],
            bool(places[node][1]),
        )
        for node in sorted(places, key=lambda node: places[node])
    ]
    return len(runs), figures


def _quantile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that at least this fraction of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
