"""Gantt chart of one run: a bar for every attempt, a hatched one for every wait, idle stretches folded."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from stroma._utils.svg import as_xml
from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.trace.story import Bar, waits

__all__ = ["MOST", "bar_title", "duration", "gantt", "idle", "idle_ms", "places", "select_bars"]

#: Rows and attempts that are drawn; of a run with more, the failed ones go first.
MOST: Final = 2000
_HATCH: Final = (
    '<svg class="defs" aria-hidden="true"><defs><pattern id="stroma-hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path class="hatch" d="M0 0V6" stroke-width="2"/>'
    "</pattern></defs></svg>"
)
_WIDE: Final = 1000
#: What is long for a stretch without work, and how it is drawn when folded: parts of the time with work.
_LONG: Final = 0.1
_SHORT: Final = 0.03


class _Chart(NamedTuple):
    """Settings of all rows: the position of a time, the end, the link of a bar, the key of the selected attempt."""

    at_ms: Callable[[float], float]
    end: float
    link: Callable[[Bar], str] | None
    selected: str | None


def gantt(
    bars: Sequence[Bar],
    *,
    link: Callable[[Bar], str] | None = None,
    selected: str | None = None,
    fold_idle: bool = False,
) -> str:
    """Return a row for every node, with a bar for every attempt and a hatched one for every wait; groups fold.

    ``link``: where a bar leads to. ``selected``: the key of an attempt that is marked; its group is open. ``fold_idle``:
    stretches in which nothing ran are drawn as short ones.
    """
    shown = select_bars(bars)
    if not shown:
        return '<p class="dim">no attempt has ended yet</p>'
    at_ms = places((bar.began_ms, bar.took_ms) for bar in shown) if fold_idle else float
    end = max(at_ms(bar.began_ms + bar.took_ms) for bar in shown) or 1.0
    chart = _Chart(at_ms, end, link, selected)
    rows: dict[str, list[Bar]] = {}
    for bar in shown:
        rows.setdefault(bar.at, []).append(bar)
    pauses: dict[str, list[tuple[float, float, float]]] = {}
    for bar, began, took in waits(shown):
        drawn_at = at_ms(began)
        pauses.setdefault(bar.at, []).append((drawn_at, at_ms(began + took) - drawn_at, took))
    children: dict[str, list[str]] = {}
    for at in sorted(rows, key=_order):
        parent = at.rpartition(".")[0]
        while parent and parent not in rows:  # A group that has not ended has no row.
            parent = parent.rpartition(".")[0]
        children.setdefault(parent, []).append(at)

    def draw(at: str) -> str:
        line = _row(rows[at], pauses.get(at, []), chart, folds=at in children)
        if at not in children:
            return f'<div class="row">{line}</div>'
        inside = "".join(draw(child) for child in children[at])
        is_open = " open" if _has_selected(at, rows, selected) else ""
        return f'<details{is_open}><summary class="row">{line}</summary><div class="kids">{inside}</div></details>'

    drawn = "".join(draw(at) for at in children.get("", []))
    left_out = len(bars) - len(shown)
    more = f'<p class="dim">and {pluralize(left_out, "attempt")} more</p>' if left_out else ""
    return f'{_HATCH}<div class="gantt">{drawn}</div>{more}'


def idle_ms(bars: Iterable[Bar]) -> float:
    """Return the length of the idle stretches long enough to fold, in milliseconds."""
    return idle((bar.began_ms, bar.took_ms) for bar in bars)


def select_bars(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars to draw, at most ``MOST``: those of failures first."""
    if len(bars) <= MOST:
        return list(bars)
    ranked = sorted(range(len(bars)), key=lambda i: (bars[i].outcome == "success", i))[:MOST]
    return [bars[i] for i in sorted(ranked)]


def _order(at: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in at.split("."))


def _has_selected(at: str, rows: dict[str, list[Bar]], selected: str | None) -> bool:
    inside = [bar for place, row in rows.items() if place.startswith(f"{at}.") for bar in row]
    return any(bar.key == selected for bar in inside)


def _row(bars: list[Bar], pauses: list[tuple[float, float, float]], chart: _Chart, *, folds: bool) -> str:
    last, at_ms = bars[-1], chart.at_ms
    scale = _WIDE / chart.end
    link = None if folds else chart.link  # A click on a row that folds must open it.
    drawn = [
        f'<rect class="b-wait" x="{began * scale:.1f}" y="7" width="{max(width * scale, 2):.1f}" height="8">'
        f"<title>waited {format_duration(took / 1000)}</title></rect>"
        for began, width, took in pauses
    ]
    for bar in bars:
        on = " b-on" if bar.key == chart.selected else ""
        began = at_ms(bar.began_ms)
        width = at_ms(bar.began_ms + bar.took_ms) - began
        x = min(began * scale, _WIDE - 7)
        rect = f'<rect class="b-{as_xml(bar.outcome)}{on}" x="{x:.1f}" y="2" width="{max(width * scale, 6):.1f}" height="18"'
        title = f"<title>{as_xml(bar_title(bar))}</title>"
        drawn.append(
            f"{rect}>{title}</rect>" if link is None else f'<a href="{as_xml(link(bar))}">{title}{rect}/></a>'
        )
    used = sum(bar.tokens for bar in bars)
    cost = sum(bar.cost_usd for bar in bars)
    tries = f" · {pluralize(len(bars), 'attempt')}" if len(bars) > 1 else ""
    spent = f" · {format_tokens(used)} · {format_usd(cost)}" if used or cost else ""
    tone = {"success": "good", "failure": "bad", "forked": "dim"}.get(last.outcome, "warn")
    fold = "fold " if folds else ""
    # Without a link, nothing in the image can be pressed.
    role, label = (
        ("img", bar_title(last)) if link is None else ("group", f"attempts of {clean(last.node_id, 100)}")
    )
    took = sum(bar.took_ms for bar in bars)
    ran = sum(bar.took_ms if bar.function_ms is None else bar.function_ms for bar in bars)
    return (
        f'<span class="name {fold}{tone}" title="{as_xml(last.node_id)}"><span class="dim mono">{as_xml(last.at)}</span> '
        f"{as_xml(clean(last.node_id, 60))}</span>"
        f'<svg viewBox="0 0 {_WIDE} 22" preserveAspectRatio="none" role="{role}" aria-label="{as_xml(label)}">{"".join(drawn)}</svg>'
        f'<span class="fig">{duration(took, ran)}{tries}{spent}</span>'
    )


def bar_title(bar: Bar) -> str:
    """Return the text of an attempt's bar for a reader without colours."""
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
