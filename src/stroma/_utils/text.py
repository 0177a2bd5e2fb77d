"""Figures and foreign text as people read them."""

from __future__ import annotations

import json
import re
from typing import Final

__all__ = [
    "as_mermaid",
    "break_command",
    "clean",
    "format_duration",
    "format_tokens",
    "format_usd",
    "one_line",
    "pluralize",
    "short_id",
    "typed",
    "visible",
    "with_marks",
]

_TURNS: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
#: Besides those: controls, line and paragraph separators, halves of characters, and what has no width or is not assigned.
_HIDES: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff0-\uffff]"
)

_HEX = frozenset("0123456789abcdef")


def as_mermaid(text: str) -> str:
    """Return text for a label: nothing of it is the language of Mermaid, or HTML."""
    text = " ".join(text.split())
    return "".join(ch if ch.isalnum() or ch in " _-.,:()[]|→…" else f"#{ord(ch)};" for ch in text)


def break_command(command: str, columns: int) -> str:
    """Return a shell command in lines of this width, broken before its options; it can be pasted as it is."""
    if len(command) <= columns or "\n" in command:
        return command
    lines = [""]
    for part in re.split(r" (?=--\w)", command) if "' --" not in command else [command]:
        if lines[-1] and len(lines[-1]) + len(part) + 3 > columns:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


def clean(text: str, limit: int = 300) -> str:
    """Return one line of text that cannot move the cursor or hide anything, cut at ``limit`` characters."""
    text = " ".join(text[: 4 * limit].split())
    if not text.isprintable():
        text = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str) -> str:
    """Return text in one line that shows as it is: control characters and marks of direction become escapes."""
    return _HIDES.sub(_escaped, text)


def visible(text: str) -> str:
    """Return text that shows as it is, like :func:`one_line`, but with its lines and tabs."""
    return _HIDES.sub(lambda match: match[0] if match[0] in "\n\t" else _escaped(match), text)


def with_marks(text: str) -> str:
    """Return text with its marks of direction as escapes: they can make it read as something else."""
    return _TURNS.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def typed(kind: str | None, message: str) -> str:
    """Return an exception's message as people read it: ``Type: message``, or the type alone where it says no more.

    ``kind``: None for what is no exception's.
    """
    return message if kind is None or message == kind else f"{kind}: {message}"


def format_usd(usd: float) -> str:
    """Format an amount in US dollars to the micro-dollar."""
    return f"${usd:,.6f}"


def format_tokens(tokens: int) -> str:
    """Format a number of tokens."""
    return f"{tokens:,} tok"


def pluralize(n: int, noun: str) -> str:
    """Format a number with its noun: "1 node", "2 nodes"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def format_duration(seconds: float) -> str:
    """Format a duration in at most two units."""
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
    """Return a run id as tables show it; the beginning is enough to name a run."""
    if len(run_id) == 32 and _HEX.issuperset(run_id):
        return run_id[:12]
    return clean(run_id, 40)
