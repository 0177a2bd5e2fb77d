"""Formatting of run ids, times and figures for people."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

from stroma._utils.text import format_duration, short_id

__all__ = ["format_age", "format_local_time", "id_word", "style_status", "to_iso"]

_STYLES: Final = {
    "COMPLETED": "green",
    "RESUMED": "green",
    "FAILED": "bold red",
    "PARTIAL": "red",
    "RUNNING": "cyan",
    "DAMAGED": "bold red",
}


def id_word(run_id: str) -> str:
    """Return the name of a run for a command: the beginning of a generated id, any other id in full."""
    return short_id(run_id) if run_id.startswith(short_id(run_id)) else run_id


def format_age(ms: int) -> str:
    """Format the time since ``ms``, milliseconds since the epoch."""
    return f"{format_duration(time.time() - ms / 1000)} ago"


def format_local_time(ms: int) -> str:
    """Format ``ms`` since the epoch in the local time zone."""
    try:
        return datetime.fromtimestamp(ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def to_iso(ms: int) -> str | None:
    """Format ``ms`` since the epoch as ISO 8601 in UTC, with milliseconds."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


def style_status(status: str) -> tuple[str, str]:
    """Return a status with its colour."""
    return status, _STYLES.get(status, "yellow")
