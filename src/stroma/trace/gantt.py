"""Gantt chart of one run: a bar for every attempt, a hatched one for every wait, idle stretches folded."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from stroma._utils.svg import as_xml
from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.trace.events import SLEEPS
from stroma.trace.outline import OutlineEntry, fold, outline
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
#: How much of the time until the last attempt ended is drawn, for waits that go on after it.
_WAIT_ROOM: Final = 1.05
_SHORT: Final = 0.03


class _Chart(NamedTuple):
    """Settings of all rows: the position of a time, the end, the link of a bar, the key of the selected attempt."""

    at_ms: Callable[[float], float]
    end: float
    link: Callable[[Bar], str] | None
    selected: str | None


def gantt(
    bars: Sequence[Bar],
    flow_waits: Sequence[Bar] = (),
    *,
    link: Callable[[Bar], str] | None = None,
    selected: str | None = None,
    fold_idle: bool = False,
) -> str:
    """Return a row for every node, with a bar for every attempt and a hatched one for every wait.

    Groups, flows and repeated calls of one node are rows that fold. ``flow_waits``: sleeps and questions. ``link``: where a
    bar leads to. ``selected``: the key of an attempt that is marked; what is around it is open. ``fold_idle``: stretches in
    which nothing ran are drawn as short ones.
    """
    shown = select_bars(bars)
    if not shown and not flow_waits:
        return '<p class="dim">no attempt has ended yet</p>'
    at_ms = places((bar.began_ms, bar.took_ms) for bar in shown) if fold_idle else float
    end = max((at_ms(bar.began_ms + bar.took_ms) for bar in shown), default=0.0)
    # A wait of a week after the last attempt must not make the attempts too small to see.
    latest = max((at_ms(bar.began_ms + bar.took_ms) for bar in flow_waits), default=0.0)
    end = max(end, min(latest, end * _WAIT_ROOM)) or 1.0
    chart = _Chart(at_ms, end, link, selected)
    pauses: dict[str, list[tuple[float, float, float]]] = {}
    for bar, began, took in waits(shown):
        drawn_at = at_ms(began)
        pauses.setdefault(bar.at, []).append((drawn_at, at_ms(began + took) - drawn_at, took))

    def draw(entry: OutlineEntry) -> str:
        line = _row(entry, pauses, chart)
        if not entry.entries:
            return f'<div class="row">{line}</div>'
        inside = "".join(draw(child) for child in entry.entries)
        # The steps of a flow are shown at once; children of a group and repeated calls on a click.
        is_open = entry.has_steps or not entry.bars or _has_selected(entry, selected)
        return f'<details{" open" if is_open else ""}><summary class="row">{line}</summary><div class="kids">{inside}</div></details>'

    drawn = "".join(draw(entry) for entry in fold(outline(shown, flow_waits)))
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


def _has_selected(entry: OutlineEntry, selected: str | None) -> bool:
    if selected is None:
        return False
    return any(bar.key == selected for child in entry.entries for _, one in child.walk() for bar in one.bars)


def _row(entry: OutlineEntry, pauses: dict[str, list[tuple[float, float, float]]], chart: _Chart) -> str:
    bars, at_ms = entry.bars, chart.at_ms
    scale = _WIDE / chart.end
    folds, is_wait = bool(entry.entries), entry.kind in ("sleep", "question")
    link = None if folds or is_wait else chart.link  # A click on a row that folds must open it.
    calls = entry.entries if entry.kind == "fold" else [entry]
    drawn = [
        f'<rect class="b-wait" x="{began * scale:.1f}" y="7" width="{max(width * scale, 2):.1f}" height="8">'
        f"<title>waited {format_duration(took / 1000)}</title></rect>"
        for call in calls
        for began, width, took in pauses.get(call.at, ())
    ]
    for bar in entry.drawn_bars:
        on = " b-on" if bar.key == chart.selected else ""
        began = at_ms(bar.began_ms)
        width = min(at_ms(bar.began_ms + bar.took_ms), chart.end) - began
        x = min(began * scale, _WIDE - 7)
        kind = "wait" if is_wait else as_xml(bar.outcome)
        rect = f'<rect class="b-{kind}{on}" x="{x:.1f}" y="2" width="{max(width * scale, 6):.1f}" height="18"'
        title = f"<title>{as_xml(bar_title(bar))}</title>"
        drawn.append(
            f"{rect}>{title}</rect>" if link is None else f'<a href="{as_xml(link(bar))}">{title}{rect}/></a>'
        )
    name = clean(entry.label, 200)
    # Without a link, nothing in the image can be pressed.
    if link is not None:
        role, label = "group", f"attempts of {clean(entry.label, 100)}"
    else:
        role = "img"
        label = bar_title(bars[-1]) if len(calls) == 1 and bars else name
    return (
        f'<span class="name {"fold " if folds else ""}{_tone(entry)}" title="{as_xml(name)}">'
        f'<span class="dim mono">{as_xml(entry.at)}</span> {as_xml(clean(entry.label, 60))}</span>'
        f'<svg viewBox="0 0 {_WIDE} 22" preserveAspectRatio="none" role="{role}" aria-label="{as_xml(label)}">{"".join(drawn)}</svg>'
        f'<span class="fig">{_figures(entry, calls)}</span>'
    )


_TONES: Final = {"success": "good", "failure": "bad", "forked": "dim", "slept": "dim", "answered": "good"}


def _tone(entry: OutlineEntry) -> str:
    """Return the class of a row's colour. Of repeated calls the failed ones count."""
    calls = [call for call in (entry.entries if entry.kind == "fold" else [entry]) if call.bars]
    if not calls:
        return "dim"
    tones = [_TONES.get(call.bars[-1].outcome, "warn") for call in calls]
    return min(tones, key=("bad", "warn", "good", "dim").index)


def _figures(entry: OutlineEntry, calls: Sequence[OutlineEntry]) -> str:
    bars = entry.bars
    if entry.kind == "question":
        return _ANSWERS.get(bars[0].outcome, "")
    if entry.kind == "sleep":
        return format_duration(bars[0].took_ms / 1000) + (" so far" if bars[0].outcome == "sleeping" else "")
    if not bars:
        return ""
    used = sum(bar.tokens for bar in bars)
    cost = sum(bar.cost_usd for bar in bars)
    tries = f" · {pluralize(len(bars), 'attempt')}" if len(bars) > len(calls) else ""
    failed = sum(bool(call.bars) and call.bars[-1].outcome == "failure" for call in calls)
    lost = f" · {failed:,} of {len(calls):,} failed" if failed and len(calls) > 1 else ""
    spent = f" · {format_tokens(used)} · {format_usd(cost)}" if used or cost else ""
    took = sum(bar.took_ms for bar in bars)
    ran = sum(bar.took_ms if bar.function_ms is None else bar.function_ms for bar in bars)
    return f"{duration(took, ran)}{tries}{lost}{spent}"


_ANSWERS: Final = {"open": "waiting for an answer", "answered": "answered", "expired": "no answer in time"}


def bar_title(bar: Bar) -> str:
    """Return the text of an attempt's bar for a reader without colours."""
    if bar.outcome in _ANSWERS:
        return f"{clean(bar.node_id, 200)}, {_ANSWERS[bar.outcome]}"
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
