"""One run for a terminal, as rich prints it. Imported where rich asks for it, so rich is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from stroma._utils.text import clean, format_duration, format_tokens, format_usd
from stroma.trace.gantt import duration
from stroma.trace.outline import WAITS, OutlineEntry, fold, outline
from stroma.trace.story import Bar, Story, waits

__all__ = ["renderable"]

_WIDE: Final = 32
_MOST: Final = 200
_STYLES: Final = {
    "success": "green",
    "failure": "red",
    "forked": "dim",
    "slept": "dim",
    "answered": "green",
    "received": "green",
}


def renderable(story: Story) -> Any:
    """Return a panel with the cause, and a table with a bar for every attempt and dots for every wait; repeated calls are folded."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    tone = {"COMPLETED": "green", "RESUMED": "green", "FAILED": "bold red", "PARTIAL": "red"}.get(
        story.status, "yellow"
    )
    tokens, cost = story.wasted
    head = Text.assemble(
        (f"{clean(story.pipeline or 'run', 60)} ", "bold"),
        (story.status, tone),
        f"  {clean(story.run_id, 60)}  {format_duration(story.seconds)}, {format_tokens(story.tokens)}, {format_usd(story.cost_usd)}",
        f" (wasted {format_tokens(tokens)}, {format_usd(cost)})" if tokens or cost else "",
    )
    parts: list[Any] = [head]
    box = story.box
    if box is not None:
        why = f"{box.failure_class}{f' ({box.reason})' if box.reason else ''}"
        message = Text(clean(box.message, 1000))
        if box.fields:
            message.append(f"\nfield {', '.join(clean(path, 100) for path in box.fields[:10])}", "bold")
        title = Text(f"{why} at node {clean(box.node_id, 60)} (at {box.at}, attempt {box.attempt})")
        parts.append(Panel(message, title=title, title_align="left", border_style="red"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (
        ("AT", False),
        ("NODE", False),
        ("TRY", True),
        ("", False),
        ("TIME", True),
        ("TOKENS", True),
        ("COST", True),
    ):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    end = max((bar.began_ms + bar.took_ms for bar in [*story.bars, *story.waits]), default=0.0) or 1.0
    paused = {bar.key: (began, took) for bar, began, took in waits(story.bars)}
    shown = 0
    for depth, entry in (line for top in fold(outline(story.bars, story.waits)) for line in _lines(top, 0)):
        if shown >= _MOST:
            break
        name = "  " * depth + clean(entry.label, 60)
        if entry.kind == "fold" or not entry.bars:
            if entry.kind == "fold":
                shown += sum(len(one.bars) for call in entry.entries for _, one in call.walk())
            _add_fold(table, entry, name, end)
            continue
        for bar in entry.bars:
            shown += entry.kind not in WAITS
            table.add_row(
                bar.at,
                name,
                str(bar.attempt) if entry.kind == "node" else "",
                _drawn([bar], paused.get(bar.key), end),
                duration(bar.took_ms, bar.function_ms),
                f"{bar.tokens:,}" if bar.tokens else "",
                format_usd(bar.cost_usd) if bar.tokens or bar.cost_usd else "",
            )
    parts.append(table)
    left_out = max(0, len(story.bars) - shown) + story.left_out
    if left_out:
        parts.append(Text(f"and {left_out:,} attempts more", "dim"))
    return Group(*parts)


def _lines(entry: OutlineEntry, depth: int) -> Iterator[tuple[int, OutlineEntry]]:
    """Yield the entry and what is inside it, but nothing of what is folded."""
    yield depth, entry
    for child in () if entry.kind == "fold" else entry.entries:
        yield from _lines(child, depth + 1)


def _add_fold(table: Any, entry: OutlineEntry, name: str, end: float) -> None:
    """Add a row for repeated calls, or for what has no attempt of its own."""
    spending = entry.all_bars if entry.kind == "fold" else []
    tokens = sum(bar.tokens for bar in spending)
    took = duration(sum(bar.took_ms for bar in entry.bars), None) if entry.bars else ""
    cost = sum(bar.cost_usd for bar in spending)
    table.add_row(
        entry.at,
        name,
        "",
        _drawn(entry.drawn_bars, None, end),
        took,
        f"{tokens:,}" if tokens else "",
        format_usd(cost) if tokens or cost else "",
    )


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
            cells[at] = ("█", _STYLES.get(bar.outcome, "yellow"))
    return Text.assemble(*cells)
