"""Parts that pages share, as markup: icons, status chips, bars in cells, sparklines, charts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from markupsafe import Markup

from stroma._utils.svg import as_xml
from stroma.trace.outline import tone_of

#: Icon of each tone, and of the statuses, outcomes and classes that have one of their own; else "dot".
_TONE_ICONS: Final = {"good": "check", "bad": "cross", "run": "run", "queued": "queue", "dim": "ban"}
_ICONS: Final = {
    "forked": "fork",
    "RECOVERABLE": "again",
    "AMBIGUOUS": "ask",
    "SUSPENDED": "hand",
    "suspended": "hand",
    "INTERRUPTED": "alert",
    "DAMAGED": "alert",
    "PAUSED": "pause",
}
_TOP: Final = 16  # pixels
_BOTTOM: Final = 154
_LABEL_Y: Final = 173
_LABELS: Final = 6


@lru_cache(maxsize=64)
def icon(name: str) -> Markup:
    """Return an icon of the sprite in ``base.html``, hidden from screen readers: a word stands beside it."""
    return Markup(f'<svg class="i" aria-hidden="true"><use href="#i-{as_xml(name)}"/></svg>')


@lru_cache(maxsize=256)
def chip(status: str, word: str | None = None) -> Markup:
    """Return the chip of a status: an icon and a word, in the colour of its tone."""
    tone = tone_of(status)
    image = icon(_ICONS.get(status) or _TONE_ICONS.get(tone, "dot"))
    return Markup(f'<span class="chip {tone}">{image}<b>{as_xml(word or status)}</b></span>')


def meter(value: float, most: float, tone: str = "dim") -> Markup:
    """Return a thin bar that is full at ``most``. It repeats a figure that stands beside it."""
    return stacked([(min(value, most), tone)], most)


class Column(NamedTuple):
    """A column of a sparkline, or a part of one in a chart. ``tone``: the class of its colour."""

    value: float
    tone: str
    title: str


def sparkline(columns: Sequence[Column], label: str, places: int = 50, *, least: float = 4) -> Markup:
    """Return small columns, the last at the right edge of ``places`` places. ``least``: least height."""
    most = max((column.value for column in columns), default=0.0)
    start = places - len(columns)
    drawn = "".join(_column(start + at, column, most, least) for at, column in enumerate(columns))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {places * 6} 32" preserveAspectRatio="none" role="img" '
        f'aria-label="{as_xml(label)}">{drawn}</svg>'
    )


def _column(at: int, column: Column, most: float, least: float) -> str:
    if column.value <= 0 and not least:
        return ""
    height = 32.0 if most <= 0 else least + (32 - least) * (column.value / most) ** 0.5
    return (
        f'<rect class="f-{column.tone}" x="{at * 6 + 1}" y="{32 - height:.1f}" width="4" '
        f'height="{height:.1f}">'
        f"<title>{as_xml(column.title)}</title></rect>"
    )


def stacked(parts: Iterable[tuple[float, str]], total: float) -> Markup:
    """Return one bar of several parts, each a value and a tone."""
    x, drawn = 0.0, []
    for value, tone in parts:
        width = 0.0 if total <= 0 else 100 * value / total
        drawn.append(f'<path class="f-{tone}" d="M{x:.1f} 0h{width:.1f}v4h-{width:.1f}z"/>')
        x += width
    return Markup(
        '<svg class="meter" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(drawn)}</svg>"
    )


def round_up(value: float) -> float:
    """Return a round number that is at least as large: 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))


def columns_chart(
    columns: Sequence[Sequence[Column]],
    labels: Sequence[str],
    label: str,
    *,
    rates: Sequence[float | None] = (),
    unit: str = "",
) -> Markup:
    """Return a chart of stacked columns.

    ``labels``: what stands under each column; some are shown. ``rates``: a line over them, from 0 to 1; None
    where there is no value. ``unit``: stands before the figures of the axis.
    """
    most = round_up(max((sum(part.value for part in column) for column in columns), default=0))
    if not unit:
        most = max(most, 2)
    wide = 100 / max(1, len(columns))
    drawn = []
    for step in (0.0, 0.5, 1.0):
        y = _BOTTOM - step * (_BOTTOM - _TOP)
        figure = unit + f"{most * step:,.8f}".rstrip("0").rstrip(".")
        drawn.append(f'<line class="gl" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        if step:
            drawn.append(f'<text x="0" y="{y - 4:.1f}">{as_xml(figure)}</text>')
    every = max(1, math.ceil(len(labels) / _LABELS))
    for at, text in enumerate(labels):
        if at % every == 0:
            drawn.append(f'<text x="{at * wide:.2f}%" y="{_LABEL_Y}">{as_xml(text)}</text>')
    for at, column in enumerate(columns):
        y = float(_BOTTOM)
        for part in column:
            if part.value <= 0:
                continue
            height = max(1.0, part.value / most * (_BOTTOM - _TOP))
            y -= height
            drawn.append(
                f'<rect class="c-{part.tone}" x="{at * wide + 0.12 * wide:.2f}%" y="{y:.1f}" '
                f'width="{0.76 * wide:.2f}%" height="{height:.1f}">'
                f"<title>{as_xml(part.title)}</title></rect>"
            )
    known = [(at, rate) for at, rate in enumerate(rates) if rate is not None]
    for (a, first), (b, second) in itertools.pairwise(known):
        y1, y2 = (_BOTTOM - rate * (_BOTTOM - _TOP) for rate in (first, second))
        drawn.append(
            f'<line class="rate-line" x1="{(a + 0.5) * wide:.2f}%" y1="{y1:.1f}" '
            f'x2="{(b + 0.5) * wide:.2f}%" y2="{y2:.1f}"/>'
        )
    if known:
        drawn.append(f'<text x="100%" y="{_TOP - 4}" text-anchor="end">100 %</text>')
    return Markup(f'<svg class="chart" role="img" aria-label="{as_xml(label)}">{"".join(drawn)}</svg>')
