"""Rows of the live table: what happened to each node so far, and how a row is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from stroma._utils.text import clean, format_duration, format_usd, pluralize
from stroma.cli.output import Part, cell_width, fit
from stroma.hooks.sets import MapProgress

__all__ = ["Place", "Row", "bar", "fold_rows", "write_rows"]

#: Position and branch of one execution.
Place = tuple[int, str]

_STYLES: Final = {
    "running": "cyan",
    "ok": "green",
    "failed": "bold red",
    "restored": "blue",
    "pending": "dim",
    "waiting": "yellow",
    "suspended": "yellow",
    "cancelled": "yellow",
}
_MAX_NAME: Final = 32
_MIN_NAME: Final = 12
_MIN_DETAIL: Final = 12


class RowWait(NamedTuple):
    """A wait of one execution. ``until``: on the clock of the table; None if nobody can tell."""

    until: float | None
    text: str


@dataclass(slots=True)
class Row:
    """One line of the table: a node, or the calls of one node in a loop, or all items of a map.

    Attributes:
        running: start of each execution in progress.
        ended: the state of the last execution that ended, with its reason.
        retried: executions that needed more than one attempt.
        retries: attempts after the first, by the reason of the failure before.
    """

    name: str
    depth: int = 0
    is_group: bool = False
    progress: MapProgress | None = None
    attempts: int = 0
    calls: set[Place] = field(default_factory=set)
    tokens: int = 0
    cost_usd: float = 0.0
    first: float | None = None
    last: float | None = None
    state: str = "pending"
    why: str = ""
    running: dict[Place, float] = field(default_factory=dict)
    waiting: dict[Place, RowWait] = field(default_factory=dict)
    retried: set[Place] = field(default_factory=set)
    retries: Counter[str] = field(default_factory=Counter)

    @property
    def is_active(self) -> bool:
        if self.progress is not None:
            return not self.progress.ended and self.state in ("running", "pending")
        return bool(self.running or self.waiting)

    def detail(self, now: float, *, is_utf8: bool, cells: int) -> list[Part]:
        """Return the state in words, the most important first."""
        if self.progress is not None:
            return self._map_detail(now, is_utf8=is_utf8, cells=cells)
        if self.waiting:
            return [(_wait_text(list(self.waiting.values()), now), "yellow")]
        if self.running:
            many = f", call {len(self.calls):,}" if len(self.calls) > 1 else ""
            return [(f"running{many}", "cyan")]
        calls = f"{len(self.calls):,} calls: " if len(self.calls) > 1 else ""
        retried = f", {len(self.retried):,} retried" if self.retried and self.state == "ok" else ""
        why = f": {self.why}" if self.why else ""
        return [calls, (self.state, _STYLES.get(self.state, "")), f"{retried}{why}"]

    def _map_detail(self, now: float, *, is_utf8: bool, cells: int) -> list[Part]:
        progress = self.progress
        assert progress is not None
        if progress.ended or not self.is_active:
            failed = progress.failed
            parts: list[Part] = [f"{pluralize(progress.done, 'item')}: "]
            if self.state in ("failed", "cancelled", "suspended"):
                return [
                    f"{progress.done:,}/{progress.total or '?'} items, ",
                    (self.state, _STYLES[self.state]),
                    f": {self.why}" if self.why else "",
                ]
            if failed:
                parts += [(f"{failed:,} failed", "red"), ", "]
            parts.append((f"{progress.done - failed:,} ok", "green"))
            if self.retried:
                parts += [", ", (f"{len(self.retried):,} retried", "yellow")]
            return [*parts, f", {progress.restored:,} restored" if progress.restored else ""]
        of = "" if progress.total is None else f"/{progress.total:,}"
        parts = []
        if progress.total:
            parts = [(bar(progress.done / progress.total, 16 if cells >= 56 else 6, is_utf8), "cyan"), " "]
        parts.append(f"{progress.done:,}{of}")
        if progress.failed:
            parts += [" ", (f"{progress.failed:,} failed", "red")]
        if progress.rate:
            parts.append(f" {progress.rate:,.0f}/s" if progress.rate >= 10 else f" {progress.rate:.1f}/s")
        if progress.seconds_left is not None:
            parts.append(f" {_short_duration(progress.seconds_left)} left")
        if self.waiting:
            text = _wait_text(list(self.waiting.values()), now)
            parts += ["  ", (f"{len(self.waiting)} wait: {text}", "yellow")]
        return parts

    def seconds(self, now: float) -> float | None:
        """Return the seconds from the first start to the last end, or until now."""
        if self.first is None:
            return None
        return (now if self.is_active or self.last is None else self.last) - self.first


def _short_duration(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 100 else format_duration(seconds)


def _wait_text(waits: Sequence[RowWait], now: float) -> str:
    """Return what these wait for, and how long the first of them still does."""
    known = [one.until - now for one in waits if one.until is not None]
    left = f"{max(0.0, min(known)):.1f} s: " if known else ""
    texts = Counter(one.text for one in waits)
    return f"{left}{', '.join(text for text, _ in texts.most_common(2))}"


def bar(share: float, cells: int, is_utf8: bool) -> str:
    """Return a bar of as many cells."""
    done = min(cells, max(0, round(share * cells)))
    full, empty = ("█", "░") if is_utf8 else ("#", "-")
    return full * done + empty * (cells - done)


def fold_rows(rows: Sequence[Row], room: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to show, in order, and those without a line: what runs or failed comes first."""
    if len(rows) <= room:
        return list(rows), []
    ranks = {"failed": 1, "suspended": 1, "cancelled": 2, "ok": 3, "restored": 4, "pending": 5}

    def rank(numbered: tuple[int, Row]) -> tuple[int, int]:
        number, row = numbered
        return (0 if row.is_active else ranks.get(row.state, 2), -number if row.state == "ok" else number)

    chosen = {number for number, _ in sorted(enumerate(rows), key=rank)[: max(0, room - 1)]}
    return (
        [row for number, row in enumerate(rows) if number in chosen],
        [row for number, row in enumerate(rows) if number not in chosen],
    )


def write_rows(
    rows: Sequence[Row], hidden: Sequence[Row], columns: int, now: float, *, is_utf8: bool
) -> list[list[Part]]:
    """Return a line for each row, none wider than ``columns``, and one for what is hidden."""
    cells = [_figures(row, now) for row in rows]
    figures = list(zip(*cells, strict=True)) if cells else []
    heads = ["TRY", "TIME", "TOKENS", "COST"]
    widths = [max(len(head), *map(len, column)) for head, column in zip(heads, figures, strict=False)]
    names = [f"{'  ' * min(row.depth, 4)}{clean(row.name, 200)}" for row in rows]
    shown = list(range(len(widths)))
    for unneeded in (2, 0, 1, 3):  # A narrow terminal: tokens go first, the cost last.
        if columns - sum(widths[i] + 2 for i in shown) >= _MIN_NAME + 2 + _MIN_DETAIL:
            break
        shown = [i for i in shown if i != unneeded]
    free = max(0, columns - sum(widths[i] + 2 for i in shown))
    longest = max(map(cell_width, names), default=0)
    share = 2 * free // 5 if free < 70 else _MAX_NAME
    name_cells = max(0, min(longest, max(_MIN_NAME, share), free - 2 - min(_MIN_DETAIL, free // 2)))
    detail_cells = max(0, free - name_cells - 2)
    lines: list[list[Part]] = []
    if rows and shown:
        head = "".join(f"  {heads[i]:>{widths[i]}}" for i in shown)
        lines.append([(" " * free + head, "dim")])
    for row, name, of_row in zip(rows, names, cells, strict=True):
        line: list[Part] = [_pad(fit(name, name_cells), name_cells), "  "]
        line += _fit_all(row.detail(now, is_utf8=is_utf8, cells=detail_cells), detail_cells)
        line += [f"  {of_row[i]:>{widths[i]}}" for i in shown]
        lines.append(line)
    if hidden:
        counts = Counter("running" if row.is_active else row.state for row in hidden)
        text = ", ".join(f"{count:,} {state}" for state, count in counts.most_common())
        lines.append([fit((f"and {len(hidden):,} more: {text}", "dim"), columns)])
    return lines


def _figures(row: Row, now: float) -> list[str]:
    seconds = row.seconds(now)
    return [
        f"{row.attempts:,}" if row.attempts else "",
        "" if seconds is None else format_duration(seconds),
        f"{row.tokens:,}" if row.tokens else "",
        format_usd(row.cost_usd) if row.cost_usd else "",
    ]


def _pad(part: Part, cells: int) -> Part:
    text, style = (part, "") if isinstance(part, str) else part
    text += " " * (cells - cell_width(text))
    return (text, style) if style else text


def _fit_all(parts: Sequence[Part], cells: int) -> list[Part]:
    """Return parts cut or padded to as many cells together."""
    fitted: list[Part] = []
    for part in parts:
        width = cell_width(part)
        if width > cells:
            fitted.append(fit(part, cells))
            cells = 0
            break
        fitted.append(part)
        cells -= width
    return [*fitted, " " * cells]
