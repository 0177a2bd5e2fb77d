"""One run as lines for terminals: `stroma show` and `tail` print their cells, rich draws a bar in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.trace.outline import WAITS, OutlineEntry, cost_text, duration, fold, outline, tone_of
from stroma.trace.story import Bar, Story, waits

__all__ = ["STYLES", "RunLine", "cells_of", "lines_of", "renderable"]

_WIDE: Final = 32
_MOST: Final = 200
_SHOWN_FAILED: Final = 5  # calls that failed, below the line that folds them
#: Style of each tone.
STYLES: Final = {"good": "green", "bad": "red", "warn": "yellow", "dim": "dim"}


@dataclass(frozen=True, slots=True)
class RunLine:
    """One line of a run: an attempt, repeated calls as one, a wait, or what has no attempt of its own.

    Attributes:
        bar: the attempt; None for any other line.
    """

    depth: int
    entry: OutlineEntry
    bar: Bar | None = None

    def cells(self) -> dict[str, str]:
        """Return the texts of the line by column; empty columns are left out."""
        entry, bar = self.entry, self.bar
        if bar is not None:
            return cells_of(bar)
        cells = {"AT": entry.at, "NODE": clean(entry.label, 60 if entry.kind in WAITS else 40)}
        if entry.kind in WAITS:
            cells["OUTCOME"] = entry.bars[0].outcome
        if entry.kind == "fold":
            tokens, cost = entry.spent
            cells["TRY"] = f"{len(entry.bars):,}" if len(entry.bars) > len(entry.entries) else ""
            cells["OUTCOME"] = _fold_outcome(entry)
            cells["TIME"] = entry.took
            cells["TOKENS"] = f"{tokens:,}" if tokens else ""
            cells["COST"] = cost_text(tokens, cost)
            what = "call" if entry.call is not None or not entry.bars else "item"
            cells["MESSAGE"] = f"{pluralize(len(entry.entries), what)}: {entry.counts}" if entry.bars else ""
        return cells

    @property
    def style(self) -> str:
        """The style of its outcome."""
        return STYLES[self.entry.tone if self.bar is None else tone_of(self.bar.outcome)]


def cells_of(bar: Bar) -> dict[str, str]:
    """Return the texts of an attempt by column; those that it does not have are empty."""
    damaged = ", damaged" if bar.is_damaged else ""
    stored = ", output stored" if bar.is_committed and bar.outcome != "success" else ""
    return {
        "AT": bar.at,
        "NODE": clean(bar.node_id, 40),
        "TRY": str(bar.attempt),
        "OUTCOME": f"{bar.outcome}{damaged or stored}",
        "CLASS": bar.failure_class or "",
        "REASON": clean(bar.reason or "", 20),
        "TIME": duration(bar.took_ms, bar.function_ms),
        "TOKENS": f"{bar.tokens:,}" if bar.tokens else "",
        "COST": cost_text(bar.tokens, bar.cost_usd),
        "MODEL": clean(bar.model or "", 30),
        "MESSAGE": clean(bar.message or "", 120),
    }


def _fold_outcome(entry: OutlineEntry) -> str:
    """Return the outcome of repeated calls: how many failed, or the first other end than a success."""
    failed = sum(call.has_failed for call in entry.entries)
    if failed:
        return f"{failed:,} failed"
    ends = [call.bars[-1].outcome for call in entry.entries if call.bars]
    return next((end for end in ends if end != "success"), "success") if ends else ""


def lines_of(
    entries: Sequence[OutlineEntry], is_selected: Callable[[Bar], bool] = lambda _bar: True
) -> Iterator[RunLine]:
    """Yield the lines of an outline: selected attempts in their groups; folds with their first failures."""
    for entry in entries:
        yield from _lines(entry, 0, is_selected)


def _lines(entry: OutlineEntry, depth: int, is_selected: Callable[[Bar], bool]) -> list[RunLine]:
    if entry.kind == "fold":
        failed = [call for call in entry.entries if call.has_failed][:_SHOWN_FAILED]
        return [RunLine(depth, entry), *(RunLine(depth + 1, call, call.bars[-1]) for call in failed)]
    if entry.kind in WAITS:
        return [RunLine(depth, entry)]
    own = [RunLine(depth, entry, bar) for bar in entry.bars if is_selected(bar)]
    inside = [line for child in entry.entries for line in _lines(child, depth + 1, is_selected)]
    if not own and not inside:
        return []
    return [*(own or [RunLine(depth, entry)]), *inside]


def renderable(story: Story) -> Any:
    """Return for rich a panel with the cause, and a table with bars for attempts and dots for waits."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    tone = {"COMPLETED": "green", "RESUMED": "green", "FAILED": "bold red", "PARTIAL": "red"}.get(
        story.status, "yellow"
    )
    tokens, cost = story.wasted
    spent = f"{format_tokens(story.tokens)}, {format_usd(story.cost_usd)}"
    head = Text.assemble(
        (f"{clean(story.pipeline or 'run', 60)} ", "bold"),
        (story.status, tone),
        f"  {clean(story.run_id, 60)}  {format_duration(story.seconds)}, {spent}",
        f" (wasted {format_tokens(tokens)}, {format_usd(cost)})" if tokens or cost else "",
    )
    parts: list[Any] = [head]
    box = story.box
    if box is not None:
        message = Text(clean(box.message, 1000))
        if box.fields:
            message.append(f"\nfield {', '.join(clean(path, 100) for path in box.fields[:10])}", "bold")
        title = Text(f"{box.why} at node {clean(box.node_id, 60)} (at {box.at}, attempt {box.attempt})")
        parts.append(Panel(message, title=title, title_align="left", border_style="red"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("AT", "NODE", "TRY", "", "TIME", "TOKENS", "COST")
    for name in columns:
        table.add_column(
            name, justify="right" if name in ("TRY", "TIME", "TOKENS", "COST") else "left", no_wrap=True
        )
    end = max((bar.began_ms + bar.took_ms for bar in [*story.bars, *story.waits]), default=0.0) or 1.0
    paused = {bar.key: (began, took) for bar, began, took in waits(story.bars)}
    shown = 0
    for line in lines_of(fold(outline(story.bars, story.waits, story.pipeline))):
        if shown >= _MOST:
            break
        cells, bar = line.cells(), line.bar
        shown += len(line.entry.all_bars) if line.entry.kind == "fold" else bar is not None
        cells["NODE"] = "  " * line.depth + cells["NODE"]
        bars = line.entry.drawn_bars if bar is None else [bar]
        cells[""] = _drawn(bars, None if bar is None else paused.get(bar.key), end)
        table.add_row(*(cells.get(name, "") for name in columns))
    parts.append(table)
    left_out = max(0, len(story.bars) - shown) + story.left_out
    if left_out:
        parts.append(Text(f"and {left_out:,} attempts more", "dim"))
    return Group(*parts)


def _drawn(bars: Sequence[Bar], pause: tuple[float, float] | None, end: float) -> Any:
    from rich.text import Text

    def column(ms: float) -> int:
        return min(_WIDE - 1, int(ms / end * _WIDE))

    cells: list[tuple[str, str]] = [(" ", "")] * _WIDE
    if pause is not None:
        for at in range(column(pause[0]), column(pause[0] + pause[1]) + 1):
            cells[at] = ("·", "dim")
    for bar in bars:
        for at in range(column(bar.began_ms), column(bar.began_ms + bar.took_ms) + 1):
            cells[at] = ("█", STYLES[tone_of(bar.outcome)])
    return Text.assemble(*cells)
