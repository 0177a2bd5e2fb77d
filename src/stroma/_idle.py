"""Stretches of time in which nothing ran, and a scale on which they are short."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable
from typing import Final

__all__ = ["idle", "places"]

#: What is long for a stretch without work, and how it is drawn when folded: parts of the time with work.
_LONG: Final = 0.1
_SHORT: Final = 0.03


def _gaps(spans: Iterable[tuple[float, float]]) -> tuple[list[tuple[float, float]], float]:
    """(from, to) of each long stretch in which nothing ran, and how long something did. ``spans``: (start, duration)."""
    gaps: list[tuple[float, float]] = []
    busy = reached = 0.0
    for began, took in sorted(spans):
        if began > reached:
            gaps.append((reached, began))
        busy += max(0.0, began + took - max(reached, began))
        reached = max(reached, began + took)
    return [(a, b) for a, b in gaps if b - a > _LONG * busy], busy


def idle(spans: Iterable[tuple[float, float]]) -> float:
    """How long nothing ran, in stretches so long that folding them shows the rest better. ``spans``: (start, duration)."""
    return sum(b - a for a, b in _gaps(spans)[0])


def places(spans: Iterable[tuple[float, float]]) -> Callable[[float], float]:
    """Where a time is once those stretches are folded; in the same unit, and never before an earlier one."""
    gaps, busy = _gaps(spans)
    short = _SHORT * busy
    ends = [b for _, b in gaps]
    saved = [0.0, *itertools.accumulate(b - a - short for a, b in gaps)]

    def place(time: float) -> float:
        past = bisect.bisect_right(ends, time)
        if past < len(gaps) and time > gaps[past][0]:  # In the midst of one.
            a, b = gaps[past]
            return a - saved[past] + (time - a) / (b - a) * short
        return time - saved[past]

    return place
