"""Exceptions of the user's code in a few lines."""

from __future__ import annotations

import os
import sysconfig
import traceback

import stroma
from stroma.cli.words import clean

__all__ = ["last_frame", "said"]

_OURS = os.path.dirname(os.path.abspath(stroma.__file__))
_LIBRARIES = tuple(
    {os.path.realpath(path) + os.sep for path in map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))}
)


def said(error: BaseException) -> str:
    """The type and message of an exception, whatever its ``str()`` does."""
    name = type(error).__name__
    try:
        text = str(error.msg) if isinstance(error, SyntaxError) else str(error)
    except Exception:
        return name
    return clean(f"{name}: {text}" if text else name, 600)


def last_frame(error: BaseException, *, of_any: bool = True) -> list[str]:
    """The last line of the user's own code in a traceback, as Python shows it.

    If there is none: the last line of any code but ours, unless ``of_any`` is false.
    """
    if isinstance(error, SyntaxError) and error.filename:
        lines = [f'File "{error.filename}", line {error.lineno}']
        return [*lines, *([f"  {clean(error.text)}"] if error.text else [])]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS + os.sep, "<frozen"))
    ]
    own = [f for f in frames if not os.path.realpath(f.filename).startswith(_LIBRARIES)]
    for frame in (own or (frames if of_any else []))[-1:]:
        place = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        return [place, *([f"  {clean(frame.line)}"] if frame.line else [])]
    return []
