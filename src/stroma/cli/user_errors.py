"""Exceptions of the user's code in a few lines."""

from __future__ import annotations

from stroma._utils.text import clean
from stroma.failures.tracebacks import frames_of

__all__ = ["last_frame", "said"]


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
    own, others = frames_of(error)
    for frame in (own or (others if of_any else []))[-1:]:
        place = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        return [place, *([f"  {clean(frame.line)}"] if frame.line else [])]
    return []
