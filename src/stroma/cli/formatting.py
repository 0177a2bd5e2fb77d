"""Formatting of run ids, times and figures for people."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from stroma._utils.text import clean, count, money, plural, short_id, span

__all__ = ["ago", "clean", "count", "id_word", "iso", "local", "money", "plural", "short_id", "span"]


def id_word(run_id: str) -> str:
    """Return the name of a run for a command: the first characters of a generated id, any other id in full."""
    return short_id(run_id) if run_id.startswith(short_id(run_id)) else run_id


def ago(ms: int) -> str:
    """Format the time since ``ms``, milliseconds since the epoch."""
    return f"{span(time.time() - ms / 1000)} ago"


def local(ms: int) -> str:
    """Format ``ms`` since the epoch in the local time zone."""
    try:
        return datetime.fromtimestamp(ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def iso(ms: int) -> str | None:
    """Format ``ms`` since the epoch as ISO 8601 in UTC, with milliseconds."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
