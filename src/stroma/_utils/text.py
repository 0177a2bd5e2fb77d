"""Figures and foreign text as people read them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, tzinfo
from typing import Final

#: Characters to look at: all but ASCII, letters and digits, and the letters that have no shape.
_ODD: Final = re.compile("[^\\w\x20-\x7e]|[\u115f\u1160\u3164\uffa0]")
#: Of no shape, although Unicode calls them marks, letters or symbols: fillers, joiners of graphemes, blank
#: Braille, and selectors of variants but for the two that choose between a character as text and as an emoji.
_SHAPELESS: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\uffa0\ufe00-\ufe0d\U000e0100-\U000e01ef]"
)
#: Emoji sequences and several scripts need the two joiners.
_JOINERS: Final = "\u200c\u200d"
#: Blocks of emoji and ideographs, which grow: what this Python does not know there is shown.
_GROWING: Final = re.compile("[\U0001f000-\U0001faff\U00020000-\U0003ffff]")

_HEX = frozenset("0123456789abcdef")
_MAX_COMPARED_CHARACTERS: Final = 200  # of a name; comparing takes the square of its length


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
    text = _ODD.sub(_shown_in_columns, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return the question that offers at most ``count`` near names; "" if none is near."""
    from difflib import get_close_matches  # 5 ms to import, only after a mistake.

    by_lower = {
        one.lower(): one for one in sorted(known, reverse=True) if len(one) <= _MAX_COMPARED_CHARACTERS
    }
    near = get_close_matches(name[:_MAX_COMPARED_CHARACTERS].lower(), by_lower, count)
    return f"did you mean {' or '.join(repr(by_lower[one]) for one in near)}?" if near else ""


def one_line(text: str) -> str:
    """Return text in one line that shows as it is; see :func:`visible`."""
    return visible(text, "")


def visible(text: str, keep: str = "\n\t") -> str:
    """Return text that shows as it is: what is invisible or turns the direction becomes an escape of JSON.

    ``keep``: control characters that stay.
    """
    return _ODD.sub(lambda match: match[0] if match[0] in keep else _shown(match[0]), text)


def _shown(ch: str) -> str:
    return ch if ch in _JOINERS or _has_shape(ch) else json.dumps(ch)[1:-1]


def _shown_in_columns(match: re.Match[str]) -> str:
    ch = match[0]  # A joiner would change the width of the text around it.
    return ch if _has_shape(ch) else ch.encode("unicode_escape").decode()


def _has_shape(ch: str) -> bool:
    """Return True if a person sees the character: not a control, mark of direction, tag or unassigned."""
    category = unicodedata.category(ch)
    if category == "Cn":
        return _GROWING.match(ch) is not None
    return category[0] != "C" and category not in ("Zl", "Zp") and _SHAPELESS.match(ch) is None


def typed(kind: str | None, message: str) -> str:
    """Return an exception's message as ``Type: message``, or the type alone where it says no more.

    ``kind``: of which the module is not shown; None for what is no exception's.
    """
    kind = kind and kind.rpartition(".")[2]
    return message if kind is None or message == kind else f"{kind}: {message}"


_UTC_TIME: Final = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", re.ASCII)


def format_host(host: str) -> str:
    """Return a host as it stands in an address: of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def format_time(ms: float, form: str, zone: tzinfo | None = UTC) -> str:
    """Format ``ms`` since the epoch; "?" for an invalid time. ``zone``: None for the local one."""
    try:
        return datetime.fromtimestamp(ms / 1000, zone).strftime(form)
    except (ValueError, OverflowError, OSError):
        return "?"


def format_utc(ms: float) -> str:
    """Format a time as ISO 8601 in UTC, for a text. ``ms``: since the epoch."""
    return format_time(ms, "%Y-%m-%dT%H:%M:%S+00:00")


def replace_utc(text: str, write: Callable[[int], str]) -> str:
    """Return a text with each time that :func:`format_utc` wrote replaced by that of ``write``, given ms."""

    def written(match: re.Match[str]) -> str:
        try:
            return write(int(datetime.fromisoformat(match[0]).timestamp() * 1000))
        except ValueError:  # The 99th of a month, in a text of a user.
            return match[0]

    return _UTC_TIME.sub(written, text)


def format_usd(usd: float) -> str:
    """Format an amount in US dollars to the micro-dollar.

    A store has whole pico-dollars, a result the sum of floats: both are the same text.
    """
    return f"${round(usd, 12):,.6f}"


def format_amount(value: float, unit: str) -> str:
    """Format an amount exactly: "$0.00003" for the unit "USD", else "10 tokens"."""
    if unit != "USD":
        return f"{value:.12g} {unit}"
    text = f"{value:.12g}"
    return "$" + (f"{value:.15f}".rstrip("0") if "e-" in text else text)


def format_tokens(tokens: int) -> str:
    """Format a number of tokens."""
    return f"{tokens:,} tok"


def format_usage(tokens: int, cost_usd: float) -> str:
    """Format what was used."""
    return f"{format_tokens(tokens)}, {format_usd(cost_usd)}"


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
