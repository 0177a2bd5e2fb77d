"""Figures and foreign text as people read them."""

from __future__ import annotations

__all__ = ["clean", "count", "money", "plural", "short_id", "span"]

_HEX = frozenset("0123456789abcdef")


def clean(text: str, limit: int = 300) -> str:
    """One line of text that cannot move the cursor or hide anything, cut at ``limit`` characters."""
    text = " ".join(text[: 4 * limit].split())
    if not text.isprintable():
        text = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def money(usd: float) -> str:
    """To the micro-dollar."""
    return f"${usd:,.6f}"


def count(tokens: int) -> str:
    return f"{tokens:,} tok"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def span(seconds: float) -> str:
    """A duration in at most two units."""
    seconds = max(0.0, seconds)
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} m"
    return f"{hours // 24} d {hours % 24} h"


def short_id(run_id: str) -> str:
    """A run id as tables show it; the beginning is enough to name a run."""
    if len(run_id) == 32 and _HEX.issuperset(run_id):
        return run_id[:12]
    return clean(run_id, 40)
