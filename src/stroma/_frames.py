"""Where an exception came from, as data: the frames of the user's own code, and all others."""

from __future__ import annotations

import json
import os
import sysconfig
import traceback
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

__all__ = ["Frame", "Trouble", "frames_of", "read_trouble", "write_trouble"]

_OURS: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES: Final = tuple(
    {os.path.realpath(path) + os.sep for path in map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))}
)
_MOST: Final = 20  # frames of each kind that are kept, the innermost ones
_LONGEST: Final = 300  # characters of one text


class Frame(NamedTuple):
    """One frame of a traceback. ``line``: 1-based; ``source``: "" where it cannot be read. No values of variables."""

    file: str
    line: int
    name: str
    source: str


class Trouble(NamedTuple):
    """Where a failed attempt failed.

    Attributes:
        attempt, started_ns: which one; see AttemptRecord.
        own: the frames of the user's code, the innermost last.
        others: those of libraries in between and below.
    """

    attempt: int
    started_ns: int
    own: tuple[Frame, ...]
    others: tuple[Frame, ...]


def frames_of(error: BaseException) -> tuple[list[traceback.FrameSummary], list[traceback.FrameSummary]]:
    """The frames of the user's own code, and those of libraries; ours and the interpreter's are neither."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS, "<frozen"))
    ]
    own = [frame for frame in frames if not os.path.realpath(frame.filename).startswith(_LIBRARIES)]
    return own, [frame for frame in frames if frame not in own]


def write_trouble(error: BaseException) -> bytes:
    """What of an exception's traceback is kept; b"" if there is nothing to tell."""
    own, others = frames_of(error)
    if not own and not others:
        return b""
    told = [
        [
            [
                frame.filename[-_LONGEST:],
                frame.lineno or 0,
                frame.name[:_LONGEST],
                (frame.line or "")[:_LONGEST],
            ]
            for frame in kind[-_MOST:]
        ]
        for kind in (own, others)
    ]
    return json.dumps(told).encode()


def read_trouble(data: bytes, attempt: int, started_ns: int) -> Trouble | None:
    """What was written; None for what was not."""
    try:
        own, others = json.loads(data)
        return Trouble(attempt, started_ns, _frames(own), _frames(others))
    except (ValueError, TypeError):
        return None


def _frames(told: Sequence[Sequence[Any]]) -> tuple[Frame, ...]:
    return tuple(Frame(str(file), int(line), str(name), str(source)) for file, line, name, source in told)
