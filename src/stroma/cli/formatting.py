"""Run ids, times and spans: as people read them, and as they type them (30d, 12h, 90s)."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from stroma._utils.text import format_duration, format_time, replace_utc, short_id
from stroma.trace.terminal import style_of


def id_word(run_id: str) -> str:
    """Return the name of a run for a command: the beginning of a generated id, any other id in full."""
    return short_id(run_id) if run_id.startswith(short_id(run_id)) else run_id


def format_age(ms: int) -> str:
    """Format the time since ``ms``, milliseconds since the epoch."""
    return f"{format_duration(time.time() - ms / 1000)} ago"


def format_local_time(ms: int) -> str:
    """Format ``ms`` since the epoch in the local time zone."""
    return format_time(ms, "%Y-%m-%d %H:%M:%S", None)


def localize(text: str) -> str:
    """Return a text with each time in UTC replaced by that in the local time zone."""
    return replace_utc(text, format_local_time)


def to_iso(ms: int) -> str | None:
    """Format ``ms`` since the epoch as ISO 8601 in UTC, with milliseconds."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


def style_status(status: str) -> tuple[str, str]:
    """Return a status with its colour."""
    return status, style_of(status)


_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST: Final = 86_400 * 365 * 1000


class _Span(click.ParamType[timedelta]):
    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value).strip(), re.ASCII)
        seconds = float(match[1]) * _SECONDS[match[2]] if match else _LONGEST + 1
        if seconds > _LONGEST:
            self.fail(
                f"{value!r} is not a time span; pass a number and one of s, m, h, d and w: 30d, 12h",
                param,
                ctx,
            )
        return timedelta(seconds=seconds)


SPAN: Final = _Span()
