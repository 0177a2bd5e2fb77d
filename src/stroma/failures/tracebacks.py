"""The origin of an exception as data: the frames of the user's own code, and all others."""

from __future__ import annotations

import functools
import json
import linecache
import os
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

_OURS: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_MOST: Final = 20  # frames of each kind that are kept, the innermost ones
_LONGEST: Final = 300  # characters of one text


class Frame(NamedTuple):
    """One frame of a traceback, without variables. ``line``: 1-based; ``source``: "" if it cannot be read."""

    file: str
    line: int
    name: str
    source: str


class FailureSite(NamedTuple):
    """The site of the failure of an attempt.

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
    """Return the frames of the user's own code and of libraries, without Stroma and the interpreter."""
    walked = zip(
        traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True
    )
    frames = [summary for (frame, _), summary in walked if not is_stroma_frame(frame)]
    return (
        [frame for frame in frames if not is_library_file(frame.filename)],
        [frame for frame in frames if is_library_file(frame.filename)],
    )


def is_stroma_frame(frame: FrameType) -> bool:
    """Return True for code of Stroma or of the interpreter, also for the generated one of a dataclass."""
    in_file = frame.f_code.co_filename.startswith((_OURS, "<frozen"))
    return in_file or str(frame.f_globals.get("__name__")).startswith("stroma.")


@functools.lru_cache(maxsize=4096)
def is_library_file(file: str) -> bool:
    """Return True for a file of the standard library or of an installed package."""
    return os.path.realpath(file).startswith(_libraries())


@functools.cache
def _libraries() -> tuple[str, ...]:
    places = map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))
    return tuple({os.path.realpath(place) + os.sep for place in places})


def failure_site_writer(error: BaseException) -> Callable[[], bytes]:
    """Return a function that encodes the origin of an exception; it returns b"" if there is none.

    Nothing is read from files before it is asked, and it holds no frame, so that no variable lives on in it.
    """
    places: list[tuple[CodeType, int]] = []
    at = error.__traceback__
    while at is not None:
        frame = at.tb_frame
        if not is_stroma_frame(frame):
            linecache.lazycache(frame.f_code.co_filename, frame.f_globals)
            places.append((frame.f_code, at.tb_lineno))
        at = at.tb_next
    return functools.partial(_written, places)


def _written(places: Sequence[tuple[CodeType, int]]) -> bytes:
    if not places:
        return b""
    own = [place for place in places if not is_library_file(place[0].co_filename)]
    others = [place for place in places if is_library_file(place[0].co_filename)]
    frames = [
        [
            [
                code.co_filename[-_LONGEST:],
                line,
                code.co_name[:_LONGEST],
                linecache.getline(code.co_filename, line).strip()[:_LONGEST],
            ]
            for code, line in kind[-_MOST:]
        ]
        for kind in (own, others)
    ]
    return json.dumps(frames).encode()


def read_failure_site(data: bytes, attempt: int, started_ns: int) -> FailureSite | None:
    """Decode a failure site; None for other data."""
    try:
        own, others = json.loads(data)
        return FailureSite(attempt, started_ns, _frames(own), _frames(others))
    except (ValueError, TypeError):
        return None


def _frames(rows: Sequence[Sequence[Any]]) -> tuple[Frame, ...]:
    return tuple(Frame(str(file), int(line), str(name), str(source)) for file, line, name, source in rows)
