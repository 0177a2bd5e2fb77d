"""Figures and foreign text as people read them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from stroma._utils.text import clean, count, money, plural, short_id, span

__all__ = ["ago", "clean", "count", "id_word", "iso", "local", "money", "plural", "short_id", "span"]


def id_word(run_id: str) -> str:
    """What names a run in a command: the beginning of a generated id, all of any other."""
    return short_id(run_id) if run_id.startswith(short_id(run_id)) else run_id


def ago(ms: int) -> str:
    return f"{span(time.time() - ms / 1000)} ago"


def local(ms: int) -> str:
    """A time of this machine's zone; ``ms`` since the epoch."""
    try:
        return datetime.fromtimestamp(ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def iso(ms: int) -> str | None:
    """ISO 8601 in UTC, to the millisecond."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
