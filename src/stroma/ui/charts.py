"""Charts over time: stacked columns with axes, as SVG of any width. All text is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from markupsafe import Markup

from stroma._utils.svg import as_xml

__all__ = ["Part", "columns_chart", "round_up"]

_TOP: Final = 16  # pixels
_BOTTOM: Final = 154
_LABEL_Y: Final = 173
_LABELS: Final = 6


class Part(NamedTuple):
    """Part of a column. ``tone``: the class of its colour."""

    value: float
    tone: str
    title: str


def round_up(value: float) -> float:
    """Return a round number that is at least as large: 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))


def columns_chart(
    columns: Sequence[Sequence[Part]],
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
        figure = f"{unit}{most * step:,.6g}"
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
                f'<rect class="c-{part.tone}" x="{at * wide + 0.12 * wide:.2f}%" y="{y:.1f}" width="{0.76 * wide:.2f}%" height="{height:.1f}">'
                f"<title>{as_xml(part.title)}</title></rect>"
            )
    known = [(at, rate) for at, rate in enumerate(rates) if rate is not None]
    for (a, first), (b, second) in itertools.pairwise(known):
        y1, y2 = (_BOTTOM - rate * (_BOTTOM - _TOP) for rate in (first, second))
        drawn.append(
            f'<line class="rate-line" x1="{(a + 0.5) * wide:.2f}%" y1="{y1:.1f}" x2="{(b + 0.5) * wide:.2f}%" y2="{y2:.1f}"/>'
        )
    if known:
        drawn.append(f'<text x="100%" y="{_TOP - 4}" text-anchor="end">100 %</text>')
    return Markup(f'<svg class="chart" role="img" aria-label="{as_xml(label)}">{"".join(drawn)}</svg>')
