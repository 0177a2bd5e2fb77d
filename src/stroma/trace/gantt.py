"""Texts and positions of the bars of a timeline: which are drawn, what they say, and where idle stretches fold."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from stroma._utils.text import clean, format_duration
from stroma.trace.events import SLEEPS
from stroma.trace.story import Bar

__all__ = ["ANSWERS", "MOST", "bar_title", "duration", "idle", "idle_ms", "places", "select_bars"]

#: Rows and attempts that are drawn; of a run with more, the failed ones go first.
MOST: Final = 2000
#: Texts of what became of a question, or of a wait for a message.
ANSWERS: Final = {
    "open": "waiting for an answer",
    "answered": "answered",
    "expired": "no answer in time",
    "receiving": "waiting",
    "received": "received",
    "missed": "none in time",
}
#: What is long for a stretch without work, and how it is drawn when folded: parts of the time with work.
_LONG: Final = 0.1
_SHORT: Final = 0.03


def idle_ms(bars: Iterable[Bar]) -> float:
    """Return the length of the idle stretches long enough to fold, in milliseconds."""
    return idle((bar.began_ms, bar.took_ms) for bar in bars)


def select_bars(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars to draw, at most ``MOST``: those of failures first."""
    if len(bars) <= MOST:
        return list(bars)
    ranked = sorted(range(len(bars)), key=lambda i: (bars[i].outcome == "success", i))[:MOST]
    return [bars[i] for i in sorted(ranked)]


def bar_title(bar: Bar) -> str:
    """Return the text of an attempt's bar for a reader without colours."""
    if bar.outcome in ANSWERS:
        return f"{clean(bar.node_id, 200)}, {ANSWERS[bar.outcome]}"
    if bar.outcome in SLEEPS:
        return clean(bar.node_id, 200)
    why = f": {bar.failure_class}{f' ({bar.reason})' if bar.reason else ''}" if bar.failure_class else ""
    message = f": {clean(bar.message, 200)}" if bar.message else ""
    return f"{clean(bar.node_id, 100)}, attempt {bar.attempt}, {bar.outcome}{why}, {duration(bar.took_ms, bar.function_ms)}{message}"


def duration(took_ms: float, function_ms: float | None) -> str:
    """Return how long an attempt took, and for how long functions ran in it where that is less: of a group with waits."""
    took = format_duration(took_ms / 1000)
    ran = took if function_ms is None or took_ms - function_ms < 1 else format_duration(function_ms / 1000)
    return took if ran == took else f"{took} (functions {ran})"


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
    """Return the length of the idle stretches long enough to fold. ``spans``: (start, duration)."""
    return sum(b - a for a, b in _gaps(spans)[0])


def places(spans: Iterable[tuple[float, float]]) -> Callable[[float], float]:
    """Return a monotonic function from a time to its position once the idle stretches are folded, in the same unit."""
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
