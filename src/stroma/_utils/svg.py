"""Rows of plain data as SVG that stands by itself: no script, font or address; all text escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal, NamedTuple

from stroma._utils.text import visible

Tone = Literal["", "warning", "error", "unknown"]
Mood = Literal["", "failing", "hot"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a box: a name, and what is said of it."""

    name: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Box:
    """A box, or a frame around those whose ``parent`` it is; in a column, those are indented below it.

    Attributes:
        id: by which links and children name it.
        kind: a word for what it is; "" for a title alone.
        left, right: the lines that links end at, and those that they begin at.
        left_title, right_title: what stands above them.
        rates: figures about it, a line each; () for none.
        heat: its part of the time or cost of all, from 0 to 1.
        mood: "failing" or "hot" if it is marked as such.
    """

    id: str
    title: str
    kind: str
    parent: str = ""
    left: tuple[Line, ...] = ()
    right: tuple[Line, ...] = ()
    left_title: str = ""
    right_title: str = ""
    rates: tuple[str, ...] = ()
    heat: float = 0.0
    mood: Mood = ""


@dataclass(frozen=True, slots=True)
class Link:
    """From a line on the right of a box to one on the left of another; "" is the box as a whole."""

    source: str
    source_line: str
    target: str
    target_line: str
    tone: Tone = ""


_NO_XML: Final = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


#: Text that stands in XML as it is.
_PLAIN: Final = re.compile(r"[ !#-%(-;=?-~]*")


def as_xml(text: str) -> str:
    """Return text for any place in XML, quotes included; what XML cannot hold becomes U+FFFD.

    What is invisible, or turns the direction of a text, is shown as an escape.
    """
    if _PLAIN.fullmatch(text):  # 0.4 us instead of 2: pages have tens of thousands of such texts.
        return text
    # A carriage return that is not named is read as a line feed.
    return escape(visible(_NO_XML.sub("\ufffd", text), "\n\t\r"), quote=True).replace("\r", "&#13;")


# Sizes in pixels.
_CHAR: Final = 6.7  # of the monospaced 11 px that the lines are written in
_TITLE_CHAR: Final = 8.0
_LINE: Final = 20
_HEAD: Final = 44
_SECTION: Final = 20
_PAD: Final = 12
_GAP: Final = 84  # between columns, for the links
_STACK: Final = 18  # between what stands one below the other
_FRAME: Final = 34  # the title of a frame
_LANE: Final = 11
_MARGIN: Final = 24
_RATE: Final = 16  # a line of figures
_LONGEST: Final = 34  # characters of a line; the rest is in its tooltip
_LONGEST_TITLE: Final = 52
_ROW_GAP: Final = 34  # between boxes in a column, for the counts
_INDENT: Final = 26

_STYLE: Final = """
svg{background:#fff;font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
.box{fill:#fff;stroke:#cbd5e1}.head{fill:#eef2ff}.input .head{fill:#ecfdf5}.bare .head{fill:#f1f5f9}
.frame{fill:#f8fafc;stroke:#94a3b8;stroke-dasharray:5 4}
.title{font-size:13px;font-weight:600;fill:#0f172a}.kind{font-size:10px;fill:#64748b}
.at{font-size:10px;fill:#94a3b8;text-anchor:end}.top{font-size:10px;font-weight:600;fill:#475569}
.line{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#0f172a}
.note{fill:#64748b}.rule{stroke:#e2e8f0}.dot{fill:#fff;stroke:#94a3b8}
.error .line,.error .note{fill:#b91c1c}.warning .line,.warning .note{fill:#a16207}
.link{fill:none;stroke:#818cf8;stroke-width:1.4}.link.error{stroke:#dc2626;stroke-width:2}
.link.warning{stroke:#d97706;stroke-width:2}.link.unknown{stroke:#94a3b8;stroke-dasharray:3 4}
.mark.error{fill:#fee2e2}.mark.warning{fill:#fef3c7}
.legend,.rate,.count{font-size:11px;fill:#475569}.tip{fill:#818cf8}
.failing .box{stroke:#dc2626;stroke-width:2}
.count{paint-order:stroke;stroke:#fff;stroke-width:3px}
@media(prefers-color-scheme:dark){svg{background:#0f172a}.box{fill:#1e293b;stroke:#475569}.head{fill:#312e81}
.input .head{fill:#064e3b}.bare .head{fill:#334155}.frame{fill:#172033;stroke:#64748b}
.title,.line{fill:#f1f5f9}
.kind,.note,.top,.legend,.rate,.count{fill:#cbd5e1}.count{stroke:#0f172a}.failing .box{stroke:#f87171}
.rule{stroke:#334155}.dot{fill:#1e293b}
.error .line,.error .note{fill:#fca5a5}.warning .line,.warning .note{fill:#fcd34d}
.mark.error{fill:#450a0a}.mark.warning{fill:#422006}}
"""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The position of a box, and the heights at which its lines meet the links."""

    box: Box
    x: float
    y: float
    width: float
    height: float
    column: int


def svg(
    boxes: Sequence[Box], links: Iterable[Link], *, title: str, href: Callable[[Box], str] | None = None
) -> str:
    """Return an image of boxes from left to right, frames around children, and links between lines.

    ``href``: address of a box, for an image inside a page, which has the style; without it the image stands
        by itself.
    """
    children: dict[str, list[Box]] = {}
    for box in boxes:
        children.setdefault(box.parent, []).append(box)
    places: dict[str, _Layout] = {}
    x: float = _MARGIN
    top = _MARGIN + 30
    for column, box in enumerate(children.get("", [])):
        width, _ = _size(box, children)
        _put(box, children, places, _Slot(x, top, width, column))
        x += width + _GAP
    bottom = max((p.y + p.height for p in places.values()), default=top)
    drawn, lowest = _links(links, places)
    width = max(x - _GAP + _MARGIN, 420)
    height = max(bottom, lowest) + _MARGIN + 26
    body = [_box(place, bool(children.get(place.box.id)), href) for place in places.values()]
    frames = [part for part in body if part.startswith('<g class="group')]
    others = [part for part in body if not part.startswith('<g class="group')]
    heading = f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 8}">{as_xml(title)}</text>'
    return _document((width, height), title, [heading, *frames, *drawn, *others, _legend(height)], href)


def steps_svg(boxes: Sequence[Box], links: Iterable[tuple[str, str, int]], *, title: str) -> str:
    """Return an image of boxes in a column that stands by itself. A box goes before those whose parent it is.

    ``links``: source, target and count, which is the width of an arc.
    """
    rows = {box.id: row for row, box in enumerate(boxes)}
    links = [link for link in links if link[0] in rows and link[1] in rows]
    most = max((count for _, _, count in links), default=1)
    reach = _reach(max((abs(rows[target] - rows[source]) for source, target, _ in links), default=0))
    box_width = max(_size(box, {})[0] for box in boxes)
    depths: dict[str, int] = {}
    places: dict[str, _Layout] = {}
    y: float = _MARGIN
    for row, box in enumerate(boxes):
        depth = depths[box.id] = depths[box.parent] + 1 if box.parent in depths else 0
        height = _size(box, {})[1]
        places[box.id] = _Layout(box, _MARGIN + reach + depth * _INDENT, y, box_width, height, row)
        y += height + _ROW_GAP
    width = 2 * (_MARGIN + reach) + box_width + max(depths.values()) * _INDENT
    arcs = [
        _arc(places[source], places[target], count, 1 + 3 * math.sqrt(count / most))
        for source, target, count in links
    ]
    drawn = [_box(place, False, None) for place in places.values()]
    parts = [*(arc for arc, _ in arcs), *drawn, *(count for _, count in arcs)]
    return _document((width, y - _ROW_GAP + _MARGIN), title, parts, None)


def _document(
    size: tuple[float, float], title: str, parts: Iterable[str], href: Callable[[Box], str] | None
) -> str:
    """Return an image of these parts; with ``href`` without a style, for a page that has it."""
    width, height = size
    start = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    label = f'aria-label="{as_xml(title)}"'
    head = [f'<svg class="lin" {start} role="group" {label}>']
    if href is None:
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {start} role="img" {label}>',
            f"<title>{as_xml(title)}</title>",
            f"<style>{_STYLE}</style>",
        ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _reach(rows: int) -> float:
    """Return how far an arc over so many rows goes beside the boxes."""
    return 30 + 16 * math.pow(rows, 0.75)


def _arc(source: _Layout, target: _Layout, count: int, width: float) -> tuple[str, str]:
    """Return an arc with its tip, and its count: on the right if it leads down, else on the left."""
    span = target.column - source.column
    if span == 1:
        x, y1, y2 = max(source.x, target.x) + source.width / 4, source.y + source.height, target.y
        path, tip = f"M{x:.1f} {y1:.1f}V{y2 - 6:.1f}", f"M{x - 5:.1f} {y2 - 7:.1f}h10l-5 7z"
        at, anchor = (x + 8, (y1 + y2) / 2 + 4), "start"
    else:
        sign = 1 if span > 1 else -1
        x1, x2 = ((place.x + place.width if sign > 0 else place.x) for place in (source, target))
        y1, y2 = source.y + source.height * 0.7, target.y + target.height * 0.3
        if span == 0:  # A call of the same node again.
            y1, y2 = y2, y1
        far = (max(x1, x2) if sign > 0 else min(x1, x2)) + sign * _reach(abs(span)) * 4 / 3
        path = f"M{x1:.1f} {y1:.1f}C{far:.1f} {y1:.1f} {far:.1f} {y2:.1f} {x2 + sign * 6:.1f} {y2:.1f}"
        tip = f"M{x2 + sign * 7:.1f} {y2 - 5:.1f}v10l{-sign * 7} -5z"
        at, anchor = ((x1 + x2) / 8 + far * 3 / 4, (y1 + y2) / 2 + 4), "middle"
    return (
        f'<path class="link" d="{path}" style="stroke-width:{width:.1f}"/><path class="tip" d="{tip}"/>',
        f'<text class="count" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">{count:,}</text>',
    )


def _size(box: Box, children: Mapping[str, list[Box]]) -> tuple[float, float]:
    inside = children.get(box.id)
    if inside:
        sizes = [_size(child, children) for child in inside]
        width = max(
            max(w for w, _ in sizes) + 2 * _PAD, len(cut(box.title, _LONGEST_TITLE)) * _TITLE_CHAR + 2 * _PAD
        )
        return width, _FRAME + sum(h for _, h in sizes) + _STACK * (len(sizes) - 1) + _PAD
    left, right = _columns(box)
    head = len(cut(box.title, _LONGEST_TITLE)) * _TITLE_CHAR + 2 * _PAD + 30
    lines = max(len(box.left), len(box.right))
    titled = _SECTION if box.left_title or box.right_title else 0
    rates = max((len(rate) for rate in box.rates), default=0) * 5.9 + 2 * _PAD
    return max(left + right + 3 * _PAD, head, rates, 150), _top(box) + titled + lines * _LINE + (
        8 if lines else 0
    )


def _top(box: Box) -> float:
    """Return the height of what stands above the lines of a box."""
    return _HEAD + (len(box.rates) * _RATE + 10 if box.rates else 0)


def _columns(box: Box) -> tuple[float, float]:
    def wide(lines: tuple[Line, ...], title: str) -> float:
        longest = max((len(cut(_line_text(line))) for line in lines), default=0)
        return max(longest * _CHAR, len(cut(title)) * 6.2)

    return wide(box.left, box.left_title), wide(box.right, box.right_title)


def _line_text(line: Line) -> str:
    return f"{line.name}: {line.note}" if line.note else line.name


def cut(text: str, longest: int = _LONGEST) -> str:
    """Return text in one line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


class _Slot(NamedTuple):
    """Space for a box: its left and upper edge, its width, and its column."""

    x: float
    y: float
    width: float
    column: int


def _put(box: Box, children: Mapping[str, list[Box]], places: dict[str, _Layout], slot: _Slot) -> float:
    """Place a box and all inside it. Return its height."""
    _, height = _size(box, children)
    places[box.id] = _Layout(box, slot.x, slot.y, slot.width, height, slot.column)
    below = slot.y + _FRAME
    for child in children.get(box.id, ()):
        inner = _Slot(slot.x + _PAD, below, slot.width - 2 * _PAD, slot.column)
        below += _put(child, children, places, inner) + _STACK
    return height


def _line_at(place: _Layout, name: str, *, right: bool) -> float:
    lines = place.box.right if right else place.box.left
    for index, line in enumerate(lines):
        if line.name == name:
            titled = _SECTION if place.box.left_title or place.box.right_title else 0
            return place.y + _top(place.box) + titled + index * _LINE + _LINE / 2
    return place.y + _HEAD / 2


def _links(links: Iterable[Link], places: Mapping[str, _Layout]) -> tuple[list[str], float]:
    """Return the paths of the links, and the height of the lowest."""
    drawn: list[str] = []
    lowest = 0.0
    edges = {p.column: (p.x, p.x + p.width) for p in places.values() if not p.box.parent}
    ends = {p.column: p.y + p.height for p in places.values() if not p.box.parent}
    #: What one line feeds in one column goes there together.
    lanes: dict[tuple[str, str, int], int] = {}
    for link in links:
        source, target = places.get(link.source), places.get(link.target)
        if source is None or target is None:
            continue
        x1, y1 = source.x + source.width, _line_at(source, link.source_line, right=True)
        x2, y2 = target.x, _line_at(target, link.target_line, right=False)
        between = [ends[column] for column in range(source.column + 1, target.column)]
        if not between:
            bend = max((x2 - x1) / 2, 24)
            path = f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        else:
            # Around the boxes between: below the lowest of them, in a lane of its own.
            lane = lanes.setdefault((link.source, link.source_line, target.column), len(lanes))
            y = max(between) + 16 + lane * _LANE
            lowest = max(lowest, y)
            # Between the columns, whatever frames the two boxes are in.
            out = edges[source.column][1] + 14 + (lane * 7) % 56
            back = edges[target.column][0] - 14 - (lane * 7) % 56
            path = _around((x1, y1), out, y, back, (x2, y2))
        words = f"{link.source_line or source.box.title} → {link.target_line or target.box.title}"
        kind = as_xml(link.tone)
        ends_at = f'data-from="{as_xml(link.source)}" data-to="{as_xml(link.target)}"'
        drawn.append(f'<path class="link {kind}" {ends_at} d="{path}"><title>{as_xml(words)}</title></path>')
        drawn += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in ((x1, y1), (x2, y2))]
    return drawn, lowest


def _around(start: tuple[float, float], out: float, y: float, back: float, end: tuple[float, float]) -> str:
    """Return a path with round corners that leaves a column, follows a lane and reaches another column."""
    (x1, y1), (x2, y2) = start, end
    down, up = (
        r if abs(y - level) >= 2 * abs(r) else 0
        for r, level in ((6 if y > y1 else -6, y1), (6 if y2 > y else -6, y2))
    )
    return (
        f"M{x1:.1f} {y1:.1f}H{out - 6:.1f}q6 0 6 {down}V{y - down:.1f}q0 {down} 6 {down}H{back - 6:.1f}"
        f"q6 0 6 {up}V{y2 - up:.1f}q0 {up} 6 {up}H{x2:.1f}"
    )


def _box(place: _Layout, is_frame: bool, href: Callable[[Box], str] | None) -> str:
    box, x, y, width, height = place.box, place.x, place.y, place.width, place.height
    title = _text("title", x + _PAD, y + 19, cut(box.title, _LONGEST_TITLE), box.title)
    if href is not None and box.kind != "input" and not is_frame:
        title = f'<a href="{as_xml(href(box))}">{title}</a>'
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    if is_frame:
        return f'<g class="group"><rect class="frame" {size} rx="10"/>{title}</g>'
    bare = "" if box.left or box.right else " bare"
    parts = [
        f'<g class="node {as_xml(box.kind)}{bare} {box.mood}" data-at="{as_xml(box.id)}">',
        f'<rect class="box" {size} rx="8"/>',
        f'<path class="head" d="M{x + 0.5:.1f} {y + _HEAD - 8:.1f}v-{_HEAD - 16}q0 -7.5 7.5 '
        f'-7.5h{width - 16:.1f}q7.5 0 7.5 7.5v{_HEAD - 16}z"/>',
        title,
    ]
    if box.kind:
        parts.append(_text("at", x + width - _PAD, y + 20, box.id))
        parts.append(_text("kind", x + _PAD, y + 31, box.kind))
    if box.heat:
        wide = max(2.0, box.heat * (width - 2))
        parts.append(f'<path class="heat" d="M{x + 1:.1f} {y + _HEAD:.1f}h{wide:.1f}v3H{x + 1:.1f}z"/>')
    for number, rate in enumerate(box.rates):
        at = y + _HEAD + 15 + number * _RATE
        parts.append(_text("rate" if number else "rate f", x + _PAD, at, rate))
    top = y + _top(box)
    start = top + (_SECTION if box.left_title or box.right_title else 0)
    left, right = _columns(box)
    middle = x + _PAD + left + _PAD / 2 if box.left else x + _PAD / 2
    for lines, head, at, wide in (
        (box.left, box.left_title, x + _PAD, left),
        (box.right, box.right_title, middle + _PAD / 2, right),
    ):
        if head:
            parts.append(_text("top", at, top + 12, cut(head), head))
        parts += [_line(line, at, start + index * _LINE, wide) for index, line in enumerate(lines)]
    if box.left and box.right:
        parts.append(
            f'<path class="rule" d="M{middle:.1f} {top:.1f}V{y + height - 6:.1f}" stroke-width="1"/>'
        )
    return "\n".join([*parts, "</g>"])


def _text(kind: str, x: float, y: float, text: str, whole: str = "") -> str:
    """Return a text, with ``whole`` as its tooltip."""
    tooltip = f"<title>{as_xml(whole)}</title>" if whole else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{as_xml(text)}{tooltip}</text>'


def _line(line: Line, x: float, y: float, width: float) -> str:
    text = cut(_line_text(line))
    name, colon, note = text.partition(": ") if line.note else (text, "", "")
    mark = (
        f'<rect class="mark {as_xml(line.tone)}" x="{x - 4:.1f}" y="{y + 1:.1f}" '
        f'width="{width + 8:.1f}" height="{_LINE - 2}" rx="4"/>'
        if line.tone
        else ""
    )
    return (
        f'<g class="{as_xml(line.tone)}">{mark}<text class="line" x="{x:.1f}" y="{y + 14:.1f}">{as_xml(name)}'
        f'<tspan class="note">{as_xml(colon + note)}</tspan><title>{as_xml(_line_text(line))}</title>'
        "</text></g>"
    )


def _legend(height: float) -> str:
    y = height - 16
    parts = []
    x = float(_MARGIN)
    for tone, words in (
        ("", "fits"),
        ("warning", "may fail"),
        ("error", "can never work"),
        ("unknown", "no contract"),
    ):
        parts.append(f'<path class="link {tone}" d="M{x:.0f} {y - 4:.0f}h22"/>')
        parts.append(f'<text class="legend" x="{x + 28:.0f}" y="{y:.0f}">{words}</text>')
        x += 46 + len(words) * 6
    return "\n".join(parts)
