"""One run as lines of a table: `stroma show` and `tail` print their cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from stroma._utils.text import clean, pluralize
from stroma.trace.outline import WAITS, OutlineEntry, cost_text, duration, shown_place, tone_of
from stroma.trace.story import Bar

_SHOWN_FAILED: Final = 5  # calls that failed, below the line that folds them
#: Style of each tone.
_STYLES: Final = {
    "good": "green",
    "bad": "red",
    "warn": "yellow",
    "run": "cyan",
    "queued": "yellow",
    "dim": "dim",
}


def style_of(word: str) -> str:
    """Return the style of a status or outcome."""
    return _STYLES[tone_of(word)]


@dataclass(frozen=True, slots=True)
class RunLine:
    """One line of a run: an attempt, repeated calls as one, a wait, or what has no attempt of its own.

    Attributes:
        bar: the attempt; None for any other line.
    """

    depth: int
    entry: OutlineEntry
    bar: Bar | None = None

    def cells(self, message_length: int = 120) -> dict[str, str]:
        """Return the texts of the line by column; empty columns are left out."""
        entry, bar = self.entry, self.bar
        if bar is not None:
            return cells_of(bar, message_length)
        cells = {"AT": shown_place(entry.at), "NODE": clean(entry.label, 60 if entry.kind in WAITS else 40)}
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
            # Calls without attempts of their own may be in progress: only their failures are certain.
            counts = entry.counts if entry.bars else cells["OUTCOME"]
            cells["MESSAGE"] = f"{pluralize(len(entry.entries), what)}: {counts}" if counts else ""
        return cells

    @property
    def style(self) -> str:
        """The style of its outcome."""
        return _STYLES[self.entry.tone] if self.bar is None else style_of(self.bar.outcome)


def cells_of(bar: Bar, message_length: int = 120) -> dict[str, str]:
    """Return the texts of an attempt by column; those that it does not have are empty."""
    damaged = ", damaged" if bar.is_damaged else ""
    stored = ", output stored" if bar.is_committed and bar.outcome not in ("success", "forked") else ""
    return {
        "AT": shown_place(bar.at),
        "NODE": clean(bar.node_id, 40),
        "TRY": str(bar.attempt),
        "OUTCOME": f"{bar.outcome}{damaged or stored}",
        "CLASS": bar.failure_class or "",
        "REASON": clean(bar.reason or "", 20),
        "TIME": duration(bar.took_ms, bar.function_ms),
        "TOKENS": f"{bar.tokens:,}" if bar.tokens else "",
        "COST": cost_text(bar.tokens, bar.cost_usd),
        "MODEL": clean(bar.model or "", 30),
        "MESSAGE": clean(bar.message or "", message_length),
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
        failed = [(call, bar) for call in entry.entries if (bar := call.last_failure) is not None]
        return [RunLine(depth, entry), *(RunLine(depth + 1, *one) for one in failed[:_SHOWN_FAILED])]
    if entry.kind in WAITS:
        return [RunLine(depth, entry)]
    own = [RunLine(depth, entry, bar) for bar in entry.bars if is_selected(bar)]
    inside = [line for child in entry.entries for line in _lines(child, depth + 1, is_selected)]
    if not own and not inside:
        return []
    return [*(own or [RunLine(depth, entry)]), *inside]
