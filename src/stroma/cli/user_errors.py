"""Short descriptions of exceptions in user code."""

from __future__ import annotations

from stroma._utils.text import clean
from stroma.failures.tracebacks import frames_of

__all__ = ["describe_error", "last_frame"]


def describe_error(error: BaseException) -> str:
    """Return type and message of an exception; never raises, whatever its ``str()`` does."""
    name = type(error).__name__
    try:
        text = str(error.msg) if isinstance(error, SyntaxError) else str(error)
    except Exception:
        return name
    return clean(f"{name}: {text}" if text else name, 600)


def last_frame(error: BaseException, *, of_any: bool = True) -> list[str]:
    """Return the last frame of user code in a traceback, in the form of Python.

    Without such a frame, the last one outside of stroma; none if ``of_any`` is false.
    """
    if isinstance(error, SyntaxError) and error.filename:
        lines = [f'File "{error.filename}", line {error.lineno}']
        return [*lines, *([f"  {clean(error.text)}"] if error.text else [])]
    own, others = frames_of(error)
    for frame in (own or (others if of_any else []))[-1:]:
        place = f'File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        return [place, *([f"  {clean(frame.line)}"] if frame.line else [])]
    return []
