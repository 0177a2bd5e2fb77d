"""Boxes in one column with arcs between them, as SVG: steps in the order in which they were first taken.

Arcs on the right lead down, those on the left lead back up. Every word in it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from stroma._utils.svg import as_xml, cut

__all__ = ["ArcBox", "arc_diagram"]

_BOX_WIDTH: Final = 420
_BOX_HEIGHT: Final = 40
_GAP: Final = 34
_INDENT: Final = 26
_MARGIN: Final = 24
_LONGEST_TITLE: Final = 26
_LONGEST_NOTE: Final = 52
_STYLE: Final = """
svg{background:#fff;font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
.box{fill:#eef2ff;stroke:#94a3b8}.failing .box{stroke:#dc2626;stroke-width:2}.end .box{fill:#f8fafc}
.title{font-size:13px;font-weight:600;fill:#0f172a}.note{font-size:11px;fill:#475569}
.link{fill:none;stroke:#6366f1}.tip{fill:#6366f1}
.count{font-size:11px;fill:#334155;paint-order:stroke;stroke:#fff;stroke-width:3px}
@media(prefers-color-scheme:dark){svg{background:#0f172a}.box{fill:#312e81;stroke:#64748b}
.failing .box{stroke:#f87171}
.end .box{fill:#1e293b}.title{fill:#f1f5f9}.note{fill:#cbd5e1}.link{stroke:#a5b4fc}.tip{fill:#a5b4fc}
.count{fill:#e2e8f0;stroke:#0f172a}}
"""


@dataclass(frozen=True, slots=True)
class ArcBox:
    """A box. ``depth``: of its indentation below its parent. ``rates``: figures at its right edge."""

    id: str
    title: str
    note: str
    depth: int = 0
    is_failing: bool = False
    rates: str = ""


def arc_diagram(boxes: Sequence[ArcBox], links: Iterable[tuple[str, str, int]], *, title: str) -> str:
    """Return an image of boxes in a column. ``links``: source, target and count, drawn as the width."""
    rows = {box.id: number for number, box in enumerate(boxes)}
    links = [link for link in links if link[0] in rows and link[1] in rows]
    spans = [abs(rows[target] - rows[source]) for source, target, _ in links]
    reach = 30 + 16 * max(spans, default=0) ** 0.75
    left = _MARGIN + reach
    depth = max((box.depth for box in boxes), default=0)
    width = left + _BOX_WIDTH + depth * _INDENT + reach + _MARGIN
    height = 2 * _MARGIN + len(boxes) * (_BOX_HEIGHT + _GAP) - _GAP
    most = max((count for _, _, count in links), default=1)
    ends = [_edges(box, rows[box.id], left) for box in boxes]
    drawn = [
        _arc(
            ends[rows[source]],
            ends[rows[target]],
            rows[target] - rows[source],
            count,
            1 + 3 * math.sqrt(count / most),
        )
        for source, target, count in links
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{as_xml(title)}">',
            f"<title>{as_xml(title)}</title>",
            f"<style>{_STYLE}</style>",
            *(arc for arc, _ in drawn),
            *(_box(box, place) for box, place in zip(boxes, ends, strict=True)),
            *(count for _, count in drawn),
            "</svg>",
            "",
        ]
    )


#: Left and right edge, top and bottom.
_Edges = tuple[float, float, float, float]


def _edges(box: ArcBox, row: int, left: float) -> _Edges:
    top = _MARGIN + row * (_BOX_HEIGHT + _GAP)
    x = left + box.depth * _INDENT
    return x, x + _BOX_WIDTH, top, top + _BOX_HEIGHT


def _arc(source: _Edges, target: _Edges, span: int, count: int, width: float) -> tuple[str, str]:
    """Return the path of a link with its tip, and its count."""
    if span == 1:
        x, y1, y2 = (max(source[0], target[0]) + _BOX_WIDTH / 4, source[3], target[2])
        path, tip = f"M{x:.1f} {y1:.1f}V{y2 - 6:.1f}", f"M{x - 5:.1f} {y2 - 7:.1f}h10l-5 7z"
        at, anchor = (x + 8, (y1 + y2) / 2 + 4), "start"
    else:
        side, sign = (1, 1) if span > 1 else (0, -1)
        x1, x2 = source[side], target[side]
        y1, y2 = source[2] + _BOX_HEIGHT * 0.7, target[2] + _BOX_HEIGHT * 0.3
        if span == 0:  # A call of the same node again.
            y1, y2 = y2, y1
        far = (max(x1, x2) if sign > 0 else min(x1, x2)) + sign * (30 + 16 * abs(span) ** 0.75) * 4 / 3
        path = f"M{x1:.1f} {y1:.1f}C{far:.1f} {y1:.1f} {far:.1f} {y2:.1f} {x2 + sign * 6:.1f} {y2:.1f}"
        tip = f"M{x2 + sign * 7:.1f} {y2 - 5:.1f}v10l{-sign * 7} -5z"
        at, anchor = ((x1 + x2) / 8 + far * 3 / 4, (y1 + y2) / 2 + 4), "middle"
    return (
        f'<path class="link" d="{path}" stroke-width="{width:.1f}"/><path class="tip" d="{tip}"/>',
        f'<text class="count" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">{count:,}</text>',
    )


def _box(box: ArcBox, place: _Edges) -> str:
    x, _, top, _ = place
    kind = "failing" if box.is_failing else "step" if box.note else "end"
    middle = top + (18 if box.note else 25)
    note = (
        f'<text class="note" x="{x + 14:.1f}" y="{top + 33:.1f}">'
        f"{as_xml(cut(box.note, _LONGEST_NOTE))}</text>"
    )
    rates = ""
    if box.rates:
        at = f'x="{x + _BOX_WIDTH - 12:.1f}" y="{top + 18:.1f}" text-anchor="end"'
        rates = f'<text class="note" {at}>{as_xml(box.rates)}</text>'
    return (
        f'<g class="{kind}"><rect class="box" x="{x:.1f}" y="{top:.1f}" width="{_BOX_WIDTH}" '
        f'height="{_BOX_HEIGHT}" rx="8"/>'
        f'<text class="title" x="{x + 14:.1f}" y="{middle:.1f}">'
        f"{as_xml(cut(box.title, _LONGEST_TITLE))}<title>{as_xml(box.title)}</title></text>"
        f"{note if box.note else ''}{rates}</g>"
    )
