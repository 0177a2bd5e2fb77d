"""Charts as SVG, in a light and a dark theme: bars, and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Theme:
    ground: str
    text: str
    faint: str
    ours: str
    others: str
    lines: tuple[str, ...]


THEMES = {
    "light": Theme(
        "#ffffff", "#1f2328", "#d1d9e0", "#0969da", "#8c959f", ("#0969da", "#8c959f", "#bc4c00", "#1a7f37")
    ),
    "dark": Theme(
        "#0d1117", "#e6edf3", "#30363d", "#4493f8", "#7d8590", ("#4493f8", "#7d8590", "#f0883e", "#3fb950")
    ),
}
_FONT = "font-family='system-ui, sans-serif' font-size='13'"


def _svg(width: int, height: int, title: str, theme: Theme, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
            f"role='img' aria-label='{escape(title, quote=True)}' {_FONT} fill='{theme.text}'>",
            f"<rect width='{width}' height='{height}' fill='{theme.ground}'/>",
            *parts,
            "</svg>\n",
        ]
    )


def bars(title: str, rows: Sequence[tuple[str, float, float]], ours: str, theme: Theme) -> str:
    """(label, microseconds, ratio to validation alone), each a bar whose length is the logarithm of the time."""
    width, left, step = 760, 210, 30
    longest = math.log10(max(us for _, us, _ in rows)) - math.log10(0.5)
    parts = [f"<text x='16' y='26' font-size='15' font-weight='600'>{escape(title)}</text>"]
    for number, (label, us, ratio) in enumerate(rows):
        y = 44 + number * step
        length = (math.log10(us) - math.log10(0.5)) / longest * (width - left - 150)
        weight, fill = ("600", theme.ours) if label == ours else ("400", theme.others)
        said = f"{us:.3g} us" if us < 1000 else f"{us:,.0f} us"
        times = f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
        parts += [
            f"<text x='{left - 10}' y='{y + 15}' text-anchor='end' font-weight='{weight}'>{escape(label)}</text>",
            f"<rect x='{left}' y='{y}' width='{length:.1f}' height='20' rx='3' fill='{fill}'/>",
            f"<text x='{left + length + 8:.1f}' y='{y + 15}' font-weight='{weight}'>{said}, {times}</text>",
        ]
    height = 44 + len(rows) * step + 26
    parts.append(
        f"<text x='{left}' y='{height - 10}' font-size='11'>logarithmic; less is better; x: times validation alone</text>"
    )
    return _svg(width, height, title, theme, parts)


def panels(
    title: str, given: Sequence[tuple[str, str, Mapping[str, Mapping[float, float]]]], theme: Theme
) -> str:
    """Plots in a row of two: (what is on the x axis, what on the y axis, by label the points). Both axes are logarithmic."""
    wide, high = 390, 270
    rows = math.ceil(len(given) / 2)
    parts = [f"<text x='16' y='26' font-size='15' font-weight='600'>{escape(title)}</text>"]
    for number, (across, up, series) in enumerate(given):
        x0, y0 = (number % 2) * wide, 36 + number // 2 * high
        parts += _panel(x0 + 56, y0 + 20, wide - 80, high - 80, across, up, series, theme)
    return _svg(2 * wide, 36 + rows * high, title, theme, parts)


def _panel(
    x0: int,
    y0: int,
    width: int,
    height: int,
    across: str,
    up: str,
    series: Mapping[str, Mapping[float, float]],
    theme: Theme,
) -> list[str]:
    xs = sorted({x for points in series.values() for x in points})
    ys = [y for points in series.values() for y in points.values()]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(x: float, y: float) -> tuple[float, float]:
        over = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        return x0 + over * width, y0 + height - (math.log10(y) - low) / (high - low) * height

    parts = []
    for power in range(low, high + 1):
        y = at(xs[0], 10**power)[1]
        parts.append(f"<line x1='{x0}' x2='{x0 + width}' y1='{y:.1f}' y2='{y:.1f}' stroke='{theme.faint}'/>")
        parts.append(
            f"<text x='{x0 - 6}' y='{y + 4:.1f}' font-size='11' text-anchor='end'>{10**power:,g}</text>"
        )
    for x in xs:
        parts.append(
            f"<text x='{at(x, 10**low)[0]:.1f}' y='{y0 + height + 16}' font-size='11' text-anchor='middle'>{_short(x)}</text>"
        )
    parts.append(f"<text x='{x0}' y='{y0 - 8}' font-size='12'>{escape(up)}</text>")
    parts.append(
        f"<text x='{x0 + width}' y='{y0 + height + 34}' font-size='12' text-anchor='end'>{escape(across)}</text>"
    )
    for number, (label, points) in enumerate(series.items()):
        color = theme.lines[number % len(theme.lines)]
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in sorted(points.items()))
        parts.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        parts.append(
            f"<text x='{x0 + number * 110}' y='{y0 + height + 34}' font-size='12' fill='{color}'>{escape(label)}</text>"
        )
    return parts


def _short(x: float) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"
