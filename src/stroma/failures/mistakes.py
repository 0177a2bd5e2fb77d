"""Additions to the messages of failures: probable mistakes in a node, and why a connection failed."""

from __future__ import annotations

import itertools
import linecache
import re
from opcode import opmap
from types import TracebackType
from typing import Any, Final

from stroma._utils.access import causes_of, kind_of, message_of
from stroma._utils.text import clean, typed
from stroma.cost.fallback import FallbackView
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.failures.tracebacks import is_library_file, is_stroma_frame

_MISTAKES: Final = frozenset({TypeError, AttributeError})
_RAISES: Final = frozenset({opmap["RAISE_VARARGS"], opmap["RERAISE"]})
_SUBSCRIPT: Final = re.compile(r"(\w+)\[[^\[\]]*\]")
#: Messages of asyncio.
_OTHER_LOOP: Final = re.compile("Event loop is closed|to a different (event )?loop")
_OWN_LOOP: Final = (
    "; an async client or lock belongs to another event loop: create it in the node, or call asyncio.run() "
    "once around all runs, because each run_sync() has its own"
)
_MAX_KEYS: Final = 20
_PASS_CONTEXT: Final = "pass context= to run(), or set RunConfig(context=) on the pipeline or runner"


def explain_mistake(failure: Failure, context: Any) -> str:
    """Return what to add to the message of a failure; "" for nothing.

    ``context``: the object that the node gets as its second argument.
    """
    error = failure.exception
    if type(error) is KeyError:
        return _explain_key(error, context)
    if type(error) is AttributeError and isinstance(context, dict) and _is_context(error.obj, context):
        return f"; the context is a dict, {_keys_of(context)}; {_PASS_CONTEXT}"
    cause: BaseException = error
    for cause in causes_of(error, 6):
        if type(cause) is RuntimeError and _OTHER_LOOP.search(message_of(cause)):
            return _OWN_LOOP
    if cause is not error and failure.reason == "connection" and isinstance_by_type(cause, OSError):
        text = typed(kind_of(cause), clean(message_of(cause)))  # Such as the refused address.
        return "" if message_of(cause) in failure.message else f" ({text})"
    if _may_be_mistake(failure) and _own_line(error) is not None:
        return "; this is probably a bug in the node"
    return ""


def is_repeated_mistake(before: Failure | None, failure: Failure) -> bool:
    """Return True if two attempts failed at one line of user code with one TypeError or AttributeError."""
    if before is None or before is failure or not _may_be_mistake(failure):
        return False
    if type(before.exception) is not type(failure.exception) or before.message != failure.message:
        return False
    line = _own_line(failure.exception)
    return line is not None and line == _own_line(before.exception)


def _may_be_mistake(failure: Failure) -> bool:
    return type(failure.exception) in _MISTAKES and failure.failure_class is FailureClass.AMBIGUOUS


def _own_line(error: BaseException) -> tuple[str, int] | None:
    """Return file and line of the innermost frame, if it is of the user's code, and no ``raise`` of it."""
    at = _innermost(error)
    if at is None or is_library_file(at.tb_frame.f_code.co_filename):
        return None
    if at.tb_next is None and at.tb_frame.f_code.co_code[at.tb_lasti] in _RAISES:
        return None
    return at.tb_frame.f_code.co_filename, at.tb_lineno


def _innermost(error: BaseException) -> TracebackType | None:
    """Return the innermost entry of a traceback that is not of Stroma's own code."""
    at, entry = error.__traceback__, None
    while at is not None:
        if not is_stroma_frame(at.tb_frame):
            entry = at
        at = at.tb_next
    return entry


def _explain_key(error: BaseException, context: Any) -> str:
    """Return which keys the context has, if ``context[key]`` raised a KeyError."""
    at = _innermost(error)
    if at is None or not isinstance(context, dict) or len(error.args) != 1:
        return ""
    match = _SUBSCRIPT.fullmatch(_expression(at))
    value = None if match is None else at.tb_frame.f_locals.get(match[1])
    if not _is_context(value, context):
        return ""
    fix = "" if context else f"; {_PASS_CONTEXT}"
    return f"; the context has no key {_key_text(error.args[0])}, {_keys_of(context)}{fix}"


def _is_context(value: Any, context: Any) -> bool:
    return value is context or type(value) is FallbackView


def _keys_of(context: dict[Any, Any]) -> str:
    keys = ", ".join(map(_key_text, itertools.islice(dict.keys(context), _MAX_KEYS))) or "none"
    more = f" and {len(context) - _MAX_KEYS:,} more" if len(context) > _MAX_KEYS else ""
    return f"its keys are: {keys}{more}"


def _key_text(key: Any) -> str:
    return clean(repr(key), 100) if type(key) in (str, int) else f"<{type(key).__name__}>"


def _expression(at: TracebackType) -> str:
    """Return the source of the expression that raised; "" where it cannot be read."""
    code = at.tb_frame.f_code
    position = next(itertools.islice(code.co_positions(), at.tb_lasti // 2, None), None)
    if position is None:
        return ""
    line, end_line, start, end = position
    if line is None or line != end_line:
        return ""
    source = linecache.getline(code.co_filename, line, at.tb_frame.f_globals)
    return source.encode("utf-8", "replace")[start:end].decode("utf-8", "replace")
