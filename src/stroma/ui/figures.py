"""Figures about the nodes of a pipeline in its latest runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.records import RunQuery

__all__ = ["Figures", "figures_of"]

#: Maximum number of runs read, and of attempts read from each.
RUNS: Final = 50
_ATTEMPTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures about one node. ``p50``, ``p95``: percentiles of its attempts in seconds."""

    node_id: str
    attempts: int
    failed: int
    p50: float
    p95: float

    @property
    def failure_rate(self) -> float:
        return self.failed / self.attempts


def figures_of(store: AsyncStates, pipeline: str) -> tuple[int, list[Figures]]:
    """Return the number of runs read, and the nodes in order of position. Raises StoreError."""
    if not store.exists():
        return 0, []
    runs = store.run_page(RunQuery(pipeline=pipeline), limit=RUNS).runs
    places: dict[str, tuple[int, str]] = {}
    took: dict[str, list[float]] = {}
    failed: dict[str, int] = {}
    for run in runs:
        for one in store.attempt_page(run.run_id, limit=_ATTEMPTS).attempts:
            took.setdefault(one.node_id, []).append(one.duration_ms / 1000)
            failed[one.node_id] = failed.get(one.node_id, 0) + (one.failure_class is not None)
            place = (one.position, one.branch)
            places[one.node_id] = min(place, places.get(one.node_id, place))
    return len(runs), [
        Figures(node, len(took[node]), failed[node], _quantile(took[node], 0.5), _quantile(took[node], 0.95))
        for node in sorted(places, key=lambda node: places[node])
    ]


def _quantile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that at least this fraction of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]
