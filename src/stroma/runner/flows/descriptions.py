"""Text of the calls and inputs of a flow, as its messages show them."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

__all__ = ["describe", "describe_difference", "shorten"]


def describe(branch: str) -> str:
    """Return a call as people read it: ``step 'judge' (call 2) of step 'triage' (call 1)``."""
    return " of ".join(map(_describe_call, reversed(branch.split("."))))


def _describe_call(identity: str) -> str:
    name, mark, number = identity.partition("@")[0].rpartition("#")
    if not mark:
        return f"the item at index {number}"
    if name in ("", "!", "?", "*"):
        return f"the call with key={unquote(number)!r}"
    if name == "!wait":
        return f"flow.wait_for (call {int(number) + 1})"
    if name == "?receive":
        return f"flow.receive (call {int(number) + 1})"
    kind = "map over" if name.startswith("*") else "step"
    return f"{kind} {unquote(name.lstrip('*'))!r} (call {int(number) + 1})"


def shorten(encoded: bytes) -> str:
    """Return a stored value as text, cut to 200 characters."""
    text = encoded.decode(errors="replace")
    return text if len(text) <= 200 else f"{text[:196]} ..."


def describe_difference(before: bytes, now: bytes) -> str:
    """Return the names of the fields in which two stored values differ."""
    try:
        one, two = _fields_of(before), _fields_of(now)
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "another value"
    return f"other values of {', '.join(map(repr, names))}"


def _fields_of(encoded: bytes) -> Any:
    """Return the fields of a stored value, which may be behind the mark of its form."""
    value = json.loads(encoded)
    return value[1] if type(value) is list else value
