"""Timeline of a run as HTML: a row for every node, and a strip of cells for many repeated calls.

It draws the outline of a run (:mod:`stroma.trace.outline`) for a page: bars are links, positions are
percentages, so that nothing is distorted at any width. All text is escaped.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from stroma._utils.svg import as_xml
from stroma._utils.text import clean, format_duration, format_time, pluralize, replace_utc
from stroma.failures.classes import describe_class
from stroma.trace.events import SLEEPS
from stroma.trace.outline import (
    ANSWERS,
    WAITS,
    CallState,
    OutlineEntry,
    bar_title,
    cost_text,
    count_states,
    fold,
    outline,
    parse_call,
)
from stroma.trace.story import Bar, InProgress, Story, waits

#: Patterns of waits, which a page must have once.
HATCHES: Final = (
    '<svg class="defs" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path class="hatch" d="M0 0V6" stroke-width="2"/></pattern>'
    '<pattern id="hatch-open" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path class="hatch-open" d="M0 0V6" stroke-width="2.5"/></pattern>'
    "</defs></svg>"
)

#: Children of one row, from which on they are drawn as cells.
_MANY: Final = 12
#: Failed children that have a row of their own beside the cells.
_MAX_FAILED_ROWS: Final = 10
#: Bars in one lane, from which on they are merged into columns.
_MAX_BARS: Final = 300
#: Rows from which on the timeline scrolls in itself.
_TALL: Final = 40
#: Smallest width of a bar, in percent.
_LEAST: Final = 0.4
#: How much of the time so far is drawn beside it while a run goes on, and for waits that go on.
_ROOM: Final = 1.12
#: What is long for a stretch without work, and how it is drawn when folded: parts of the time with work.
_LONG: Final = 0.1
_SHORT: Final = 0.03
#: Columns of a strip and the size of its cells in pixels, up to so many cells.
_SIZES: Final = ((600, 60, 14), (4000, 100, 10), (1 << 60, 200, 6))
#: Letter of each state of a cell, and the class of its colour.
_CELLS: Final[dict[CallState, tuple[str, str]]] = {
    "ok": ("g", "good"),
    "retried": ("r", "warn"),
    "failed": ("b", "bad"),
    "stopped": ("w", "run"),
    "none": ("x", "dim"),
}
_STEPS_MS: Final = [
    *(n * 10**power for power in range(3) for n in (1, 2, 5)),
    *(1000 * n for n in (1, 2, 5, 10, 15, 30)),
    *(60_000 * n for n in (1, 2, 5, 10, 15, 30)),
    *(3_600_000 * n for n in (1, 2, 3, 6, 12)),
    *(86_400_000 * n for n in (1, 2, 5, 10, 30, 100, 365, 1000, 5000)),
]


#: The legend of a timeline as HTML: the colours that may be in it.
LEGEND: Final = (
    '<span class="legend"><span class="dotted k-good">succeeded</span>'
    '<span class="dotted k-warn">succeeded after a retry</span><span class="dotted k-bad">failed</span>'
    '<span class="dotted k-wait">waited</span><span class="dotted k-run">in progress</span></span>'
)


def axis_of(start: float, end: float) -> tuple[float, float, int]:
    """Return (start, step, number of steps) of a round axis around a span in milliseconds: 4 to 10 steps."""
    span = max(end - start, 1.0)
    best = None
    for step in _STEPS_MS:
        first = math.floor(start / step + 1e-9) * step
        count = math.ceil((end - first) / step - 1e-9)
        if 4 <= count <= 10 and (best is None or count * step < best[1] * best[2]):
            best = (first, float(step), count)
    return best or (start, span / 4, 4)


def _tick(ms: float, step: float) -> str:
    if ms == 0:
        return "0"
    if step < 1000:
        return f"{ms:,.0f} ms" if ms < 1000 else f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + " s"
    if step < 60_000:
        minutes, seconds = divmod(round(ms / 1000), 60)
        return f"{minutes}:{seconds:02d} m" if minutes else f"{seconds} s"
    hours, minutes = divmod(round(ms / 60_000), 60)
    if step < 3_600_000 or hours < 48:
        return f"{hours}:{minutes:02d} h" if hours else f"{minutes} m"
    return f"{hours // 24} d" if not hours % 24 else f"{hours // 24} d {hours % 24} h"


@dataclass
class Timeline:
    """Timeline of a run: its contents, its settings, and its drawing.

    Attributes:
        link: address of an attempt; None if its bars lead nowhere.
        attempt_prefix: address of the attempts of the run, without the place.
        selected: the attempt that stopped the run; None without one.
        fold_idle: stretches in which nothing ran are drawn as short ones.
        window: the part of the time to show, in milliseconds; None for all.
        now_ms: the time of this drawing, of a run that goes on; None for others.
        progress: what runs now; None if nothing does.
    """

    story: Story
    link: Callable[[Bar], str] | None
    attempt_prefix: str = ""
    selected: Bar | None = None
    fold_idle: bool = False
    window: tuple[float, float] | None = None
    now_ms: float | None = None
    progress: InProgress | None = None

    def __post_init__(self) -> None:
        shown = self.story.bars
        self.place: Callable[[float], float] = float
        if self.fold_idle:
            self.place = places((bar.began_ms, bar.took_ms) for bar in shown)
        end = max((self.place(bar.began_ms + bar.took_ms) for bar in shown), default=0.0)
        latest = max((self.place(bar.began_ms + bar.took_ms) for bar in self.story.waits), default=0.0)
        end = max([end, *(self.place(bar.began_ms) for bar in self.story.waits)])
        end = max(end, min(latest, end * _ROOM))
        if self.story.open_waits:
            end *= _ROOM
        if self.now_ms is not None:
            end = max(end, self.place(self.now_ms) * _ROOM)
        start, self.end = (0.0, end or 1.0) if self.window is None else self.window
        if self.fold_idle:  # Its axis has no times.
            self.start, self.step, self.count = start, (self.end - start) / 4, 4
        else:
            self.start, self.step, self.count = axis_of(start, self.end)
        self.span = self.step * self.count
        self.pauses: dict[str, list[tuple[float, float, str]]] = {}
        before = {(bar.at, bar.attempt): bar for bar in shown if bar.failure_class is not None}
        for bar, began, took in waits(shown):
            failed = before.get((bar.at, bar.attempt - 1))
            text = _why_waited(took, failed)
            if any(a < began + took and began < b for a, b, _ in self.story.resumes):
                text = f"{_took(took)} until attempt {bar.attempt}; the run was continued in between"
            self.pauses.setdefault(bar.at, []).append((began, began + took, text))

    def draw(self) -> str:
        """Return the timeline as HTML, for a page with ``static/design.css`` and :data:`HATCHES`."""
        self.rows = 0
        entries = fold(outline(self.story.bars, self.story.waits, self.story.pipeline))
        drawn = self.resumes_row() + "".join(map(self.entry, entries))
        progress = self.progress
        if progress is not None and not any(entry.at == progress.at for entry in entries):
            drawn += self.progress_row(progress)
        if not drawn:
            return '<p class="pad dim">No attempt has ended yet.</p>'
        live = ""
        now = ""
        if self.now_ms is not None and not self.fold_idle and self.window is None:
            live = f' data-began="{self.story.first_ns / 1e6 + self.start:.0f}" data-span="{self.span:.0f}"'
            at = self.x(self.now_ms)
            now = (
                '<div class="now" aria-hidden="true"><div class="row"><span></span><svg class="lane">'
                f'<line x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/></svg><span></span></div></div>'
            )
        zoom = f' data-from="{self.start / 1000:.3f}" data-to="{(self.start + self.span) / 1000:.3f}"'
        if self.fold_idle:
            zoom = ""
        tall = ' class="tall"' if self.rows > _TALL else ""
        return (
            f'<div{tall}><div class="gantt g{self.count}"{live}{zoom}>{self.axis()}{drawn}{now}</div></div>'
        )

    # ------------------------------------------------------------------ rows

    def axis(self) -> str:
        if self.fold_idle:
            label, ticks = "time, idle stretches folded", '<text x="4" y="19">idle time folded</text>'
        else:
            marks = [self.start + k * self.step for k in range(self.count)]
            texts = [_tick(mark, self.step) for mark in marks]
            label = f"time axis, from {texts[0]} to {_tick(self.start + self.span, self.step)}"
            lefts = [f'x="{100 * k / self.count:.4g}%"' for k in range(self.count)]
            ticks = "".join(
                f'<text {left} dx="4" y="19">{text}</text>' for left, text in zip(lefts, texts, strict=True)
            )
        return (
            '<div class="row axis"><span class="name dim">Node</span><svg class="lane" role="img" '
            f'aria-label="{label}">'
            f'{ticks}<rect class="pick" x="0" y="0" width="0" height="30"/></svg>'
            '<span class="fig"><span>Took</span><span class="tr">Attempts</span><span>Cost</span>'
            "</span></div>"
        )

    def entry(self, entry: OutlineEntry) -> str:
        self.rows += 1
        line = self.line(entry)
        if not entry.entries:
            return f'<div class="row">{line}</div>'
        cells = [child for child in entry.entries if entry.is_map or not child.entries]
        strip = ""
        inside = entry.entries
        all_failed: list[OutlineEntry] = []
        failed: list[OutlineEntry] = []
        if len(cells) > _MANY:
            strip = strip_of(entry, cells, self.attempt_prefix)
            all_failed = [one for one in cells if one.has_failed]
            failed = all_failed[:_MAX_FAILED_ROWS]
            chosen = [one for one in cells if self.has_selected(one) and one not in failed]
            others = [child for child in entry.entries if child.entries and not entry.is_map]
            inside = [*failed, *chosen, *others[:_MANY]]
        # The steps of a flow are shown at once; children of a group and repeated calls on a click.
        is_open = entry.has_steps or not entry.bars or bool(strip)
        is_open = is_open or any(map(self.has_selected, entry.entries))
        rows = self.rows
        kids = "".join(map(self.entry, inside))
        if strip and len(all_failed) > len(failed):
            kids += f'<p class="strip dim">and {len(all_failed) - len(failed):,} more that failed</p>'
        if not is_open:
            self.rows = rows
        return (
            f'<details{" open" if is_open else ""}><summary class="row">{line}</summary>'
            f'<div class="kids">{strip}{kids}</div></details>'
        )

    def has_selected(self, entry: OutlineEntry) -> bool:
        if self.selected is None:
            return False
        return any(bar is self.selected for _, one in entry.walk() for bar in one.bars)

    def resumes_row(self) -> str:
        """Return the row of the stretches after which the run was continued; "" without any."""
        resumes = self.story.resumes
        if not resumes:
            return ""
        self.rows += 1
        parts = []
        for began, ended, cause in resumes:
            text = f"continued after {_took(ended - began)}: {clean(cause, 200)}"
            parts.append(self.rect("b-wait", began, ended, 9, 10, text))
        took = _took(sum(ended - began for began, ended, _ in resumes))
        figures = f'<span class="fig"><span class="all">after {took}</span></span>'
        return f'<div class="row">{_row(("dim", "", "continued"), "".join(parts), figures)}</div>'

    def progress_row(self, progress: InProgress) -> str:
        self.rows += 1
        name = ("run", progress.at, progress.label)
        label = f"{clean(progress.label, 200)}, in progress"
        return f'<div class="row">{_row(name, self.running(progress), self.ticking(progress), label)}</div>'

    def running(self, progress: InProgress) -> str:
        assert self.now_ms is not None
        x = self.x(progress.since_ms)
        width = max(self.x(self.now_ms) - x, _LEAST)
        return (
            f'<rect class="b-running" x="{x:.2f}%" y="5" width="{width:.2f}%" height="18" rx="3">'
            "<title>in progress since what was recorded last</title></rect>"
        )

    def ticking(self, progress: InProgress) -> str:
        assert self.now_ms is not None
        since = self.story.first_ns / 1e6 + progress.since_ms
        return (
            f'<span class="fig run"><span data-since="{since:.0f}">'
            f"{format_duration((self.now_ms - progress.since_ms) / 1000)}"
            '</span><span class="tr"></span><span></span></span>'
        )

    def line(self, entry: OutlineEntry) -> str:
        bars = entry.bars
        folds, is_wait = bool(entry.entries), entry.kind in WAITS
        # A click on a row that folds must open it.
        is_link = self.link is not None and not (folds or is_wait)
        calls = entry.entries if entry.kind == "fold" else [entry]
        drawn_bars = entry.drawn_bars
        parts: list[str] = []
        if len(drawn_bars) > _MAX_BARS:
            parts.append(self.merged(drawn_bars))
        else:
            for call in calls:
                for began, ended, why in self.pauses.get(call.at, ()):
                    parts.append(self.rect("b-wait", began, ended, 9, 10, why))
            for bar in drawn_bars:
                parts.append(self.bar(bar, is_wait, is_link))
        text = self.story.open_waits.get(entry.at)
        if text and drawn_bars and not is_wait:
            ended = max(bar.began_ms + bar.took_ms for bar in drawn_bars)
            parts.append(self.rect("b-open", ended, None, 9, 10, text))
        progress = self.progress if self.progress is not None and self.progress.at == entry.at else None
        if progress is not None:
            parts.append(self.running(progress))
        elif self.now_ms is not None and folds and not bars and entry.kind == "node":
            # A flow or group that has not ended.
            x = self.x(entry.began_ms)
            width = max(self.x(self.now_ms) - x, _LEAST)
            parts.append(
                f'<rect class="b-running" x="{x:.2f}%" y="24" width="{width:.2f}%" height="3"><title>'
                "in progress</title></rect>"
            )
        label = bar_title(bars[-1]) if len(calls) == 1 and bars else ""
        if is_link:
            label = f"attempts of {clean(entry.label, 100)}"
        tone = "run" if progress is not None else "" if entry.tone == "good" else entry.tone
        figures = f'<span class="fig">{_figures(entry, calls)}</span>'
        if progress is not None:
            figures = self.ticking(progress)
        name = (f"{'fold ' if folds else ''}{tone}", _short_place(entry.at), entry.label)
        return _row(name, "".join(parts), figures, label, role="group" if is_link else "img")

    # ------------------------------------------------------------------ bars

    def x(self, ms: float) -> float:
        """Return the position of a time in percent."""
        return 100 * (self.place(ms) - self.start) / self.span

    def bar(self, bar: Bar, is_wait: bool, is_link: bool) -> str:
        kind = "wait" if is_wait else bar.outcome
        on = " b-on" if bar is self.selected else ""
        ended = bar.began_ms + bar.took_ms
        if not is_link:
            return self.rect(f"b-{as_xml(kind)}{on}", bar.began_ms, ended, 5, 18, bar_title(bar))
        box = self.span_of(bar.began_ms, ended)
        if box is None or self.link is None:
            return ""
        return (
            f'<a href="{as_xml(self.link(bar))}"><title>{as_xml(bar_title(bar))}</title>'
            f'<rect class="b-{as_xml(kind)}{on}" x="{box[0]:.2f}%" y="5" width="{box[1]:.2f}%" '
            'height="18" rx="3"/></a>'
        )

    def span_of(self, began: float, ended: float | None) -> tuple[float, float] | None:
        """Return the left edge and width of a stretch in percent; None if it is outside the window."""
        left = self.x(began)
        right = 100.0 if ended is None else self.x(ended)
        if right < 0 or (right == 0 and left < 0) or left > 100:
            return None
        left = min(max(left, 0.0), 100 - _LEAST)
        return left, max(min(right, 100.0) - left, _LEAST)

    def rect(self, kind: str, began: float, ended: float | None, y: int, height: int, title: str) -> str:
        box = self.span_of(began, ended)
        if box is None:
            return ""
        return (
            f'<rect class="{kind}" x="{box[0]:.2f}%" y="{y}" width="{box[1]:.2f}%" height="{height}" rx="3">'
            f"<title>{as_xml(title)}</title></rect>"
        )

    def merged(self, bars: Sequence[Bar]) -> str:
        """Return many bars as stretches: one in which an attempt failed is marked as failed."""
        columns = [""] * 250
        for bar in sorted(bars, key=lambda bar: bar.outcome == "failure"):
            box = self.span_of(bar.began_ms, bar.began_ms + bar.took_ms)
            if box is not None:
                kind = "failure" if bar.outcome == "failure" else "success"
                for column in range(int(box[0] * 2.5), min(249, int(sum(box) * 2.5)) + 1):
                    columns[column] = kind
        drawn, x = "", 0.0
        for kind, same in itertools.groupby(columns):
            width = len(list(same)) / 2.5
            if kind:
                drawn += f'<rect class="b-{kind}" x="{x:.1f}%" y="5" width="{width:.1f}%" height="18"/>'
            x += width
        return drawn


def _row(name: tuple[str, str, str], lane: str, figures: str, label: str = "", *, role: str = "img") -> str:
    """Return the cells of a row. ``name``: its class, place and text. ``label``: of the lane, if not that."""
    kind, at, text = name
    place = f'<span class="dim mono">{as_xml(at)}</span> ' if at else ""
    whole = clean(text, 200)
    shown = replace_utc(as_xml(clean(text, 60)), time_tag)  # The end of a sleep.
    return (
        f'<span class="name {kind}" title="{as_xml(whole)}">{place}{shown}</span>'
        f'<svg class="lane" role="{role}" aria-label="{as_xml(label or whole)}">{lane}</svg>{figures}'
    )


def time_tag(ms: int) -> str:
    """Return a time as HTML: a page shows it in the zone of its reader, a file in UTC."""
    return f'<time data-ms="{ms}" data-full>{format_time(ms, "%Y-%m-%d %H:%M:%S UTC")}</time>'


def _took(ms: float) -> str:
    return format_duration(ms / 1000)


def _why_waited(took_ms: float, failed: Bar | None) -> str:
    text = f"waited {_took(took_ms)}"
    if failed is None or failed.failure_class is None:
        return text
    why = describe_class(failed.failure_class, failed.reason)
    return f"{text} after {why} in attempt {failed.attempt}"


def _short_place(at: str) -> str:
    """Return a place as it is beside the name of its node: of a call in a flow the number, or the key."""
    call = parse_call(at.rpartition(".")[2])
    if call is not None:
        return f"#{call.number}"
    # Checksums of inputs tell a reader nothing.
    return unquote(".".join(part.partition("@")[0] for part in at.split(".")))


def _figures(entry: OutlineEntry, calls: Sequence[OutlineEntry]) -> str:
    bars = entry.bars
    if entry.kind in ("question", "message"):
        return f'<span class="all">{ANSWERS.get(bars[0].outcome, "")}</span>'
    if entry.kind == "sleep":
        so_far = " so far" if bars and bars[0].outcome in SLEEPS and bars[0].outcome != "slept" else ""
        return f'<span class="all">{format_duration(bars[0].took_ms / 1000)}{so_far}</span>'
    if not bars:
        return ""
    failed = sum(call.has_failed for call in calls)
    tries = f'<span class="bad">{failed:,} failed</span>' if failed and len(calls) > 1 else f"{len(bars):,}"
    if len(bars) == 1:
        tries = ""
    whole = entry.took
    short, more, _ = whole.partition(" (")
    title = f' title="{as_xml(whole)}"' if more else ""
    return f'<span{title}>{short}</span><span class="tr">{tries}</span><span>{cost_text(*entry.spent)}</span>'


def strip_of(entry: OutlineEntry, children: Sequence[OutlineEntry], attempt_prefix: str) -> str:
    """Return a cell for each of these children. ``attempt_prefix``: address of attempts without the place."""
    prefix = f"{entry.at}."
    parts = [child.at.removeprefix(prefix) for child in children]
    states: list[CallState]
    if all(part.isdecimal() and len(part) < 7 for part in parts) and children[0].at.startswith(prefix):
        states = ["none"] * (max(map(int, parts)) + 1)
        for part, child in zip(parts, children, strict=True):
            states[int(part)] = child.state
        where = f'data-prefix="{as_xml(prefix)}"'
    else:
        states = [child.state for child in children]
        where = f'data-places="{as_xml(" ".join(child.at for child in children))}"'
    columns, size = next((wide, size) for most, wide, size in _SIZES if len(states) <= most)
    columns = min(columns, len(states))
    inner = size - (1 if size < 8 else 2)
    paths: dict[CallState, list[str]] = {}
    for at, state in enumerate(states):
        row, column = divmod(at, columns)
        paths.setdefault(state, []).append(f"M{column * size} {row * size}h{inner}v{inner}h-{inner}z")
    marks = [f'<path class="f-{_CELLS[state][1]}" d="{"".join(path)}"/>' for state, path in paths.items()]
    words = f"{pluralize(len(states), 'item')}: {count_states(states)}"
    height = math.ceil(len(states) / columns) * size
    data = {
        "cells": "".join(_CELLS[state][0] for state in states),
        "columns": columns,
        "size": size,
        "attempt": as_xml(attempt_prefix),
    }
    settings = " ".join(f'data-{name}="{value}"' for name, value in data.items())
    box = f'width="{columns * size}" height="{height}" viewBox="0 0 {columns * size} {height}"'
    return (
        f'<div class="strip"><p>{words} <output class="dim"></output></p>'
        f'<svg class="cells" {box} role="img" aria-label="{words}" {settings} {where}>'
        f'{"".join(marks)}<path class="at" d=""/></svg></div>'
    )


def idle_ms(bars: Iterable[Bar]) -> float:
    """Return the length of the idle stretches long enough to fold, in milliseconds."""
    return sum(b - a for a, b in _gaps((bar.began_ms, bar.took_ms) for bar in bars)[0])


def _gaps(spans: Iterable[tuple[float, float]]) -> tuple[list[tuple[float, float]], float]:
    """Return (from, to) of each long idle stretch, and the busy time. ``spans``: (start, duration)."""
    gaps: list[tuple[float, float]] = []
    busy = reached = 0.0
    for began, took in sorted(spans):
        if began > reached:
            gaps.append((reached, began))
        busy += max(0.0, began + took - max(reached, began))
        reached = max(reached, began + took)
    return [(a, b) for a, b in gaps if b - a > _LONG * busy], busy


def places(spans: Iterable[tuple[float, float]]) -> Callable[[float], float]:
    """Return a function from a time to its position once the idle stretches are folded."""
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
