"""One run for a terminal, as rich prints it. Imported where rich asks for it, so rich is there."""

from __future__ import annotations

from typing import Any, Final

from stroma._utils.text import clean, format_duration, format_tokens, format_usd
from stroma.trace.gantt import duration
from stroma.trace.story import Bar, Story, waits

__all__ = ["renderable"]

_WIDE: Final = 32
_MOST: Final = 200
_STYLES: Final = {"success": "green", "failure": "red", "forked": "dim"}


def renderable(story: Story) -> Any:
    """Return a panel with the cause, and a table with a bar for every attempt and dots for every wait."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    tone = {"COMPLETED": "green", "RESUMED": "green", "FAILED": "bold red", "PARTIAL": "red"}.get(
        story.status, "yellow"
    )
    tokens, cost = story.wasted
    head = Text.assemble(
        (f"{clean(story.pipeline or 'run', 60)} ", "bold"), (story.status, tone),
        f"  {clean(story.run_id, 60)}  {format_duration(story.seconds)}, {format_tokens(story.tokens)}, {format_usd(story.cost_usd)}",
        f" (wasted {format_tokens(tokens)}, {format_usd(cost)})" if tokens else "",
    )  # fmt: skip
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
    end = max((bar.began_ms + bar.took_ms for bar in story.bars), default=0.0) or 1.0
    paused = {bar.key: (began, took) for bar, began, took in waits(story.bars)}
    for bar in story.bars[:_MOST]:
        depth = bar.at.count(".")
        table.add_row(
            bar.at, "  " * depth + clean(bar.node_id, 40), str(bar.attempt), _drawn(bar, paused.get(bar.key), end),
            duration(bar.took_ms, bar.function_ms), f"{bar.tokens:,}" if bar.tokens else "", format_usd(bar.cost_usd) if bar.tokens else "",
        )  # fmt: skip
    parts.append(table)
    left_out = max(0, len(story.bars) - _MOST) + story.left_out
    if left_out:
        parts.append(Text(f"and {left_out:,} attempts more", "dim"))
    return Group(*parts)


def _drawn(bar: Bar, pause: tuple[float, float] | None, end: float) -> Any:
    from rich.text import Text

    def column(ms: float) -> int:
        return min(_WIDE - 1, int(ms / end * _WIDE))

    start, stop = column(bar.began_ms), column(bar.began_ms + bar.took_ms)
    waited = column(pause[0]) if pause is not None else start
    return Text.assemble(
        " " * waited, ("·" * (start - waited), "dim"), ("█" * (stop - start + 1), _STYLES.get(bar.outcome, "yellow")),
        " " * (_WIDE - stop - 1),
    )  # fmt: skip
