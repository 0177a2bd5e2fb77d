"""Durations on the command line: 30d, 12h, 90s."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Final

import click

__all__ = ["SPAN"]

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
