"""Text of the calls and inputs of a flow, as its messages show them."""

from __future__ import annotations

import json
from typing import Final
from urllib.parse import unquote

__all__ = ["describe", "describe_difference", "shorten"]

_WORDS: Final = {"!sleep": "flow.sleep", "!wait": "flow.wait_for", "!now": "flow.now"}


def describe(identity: str) -> str:
    """Return a call as people read it: ``call 2 of step 'judge' in branch 1``."""
    path, _, text = identity.rpartition("/")
    name, mark, number = text.rpartition("#")
    number = number.partition("@")[0]
    if not mark:
        return f"the item of the map at index {number}"
    where = f" in branch {path.lstrip('-')}" if path else ""
    if name in ("", "!", "*"):
        return f"the call with key={unquote(number)!r}{where}"
    if name in _WORDS:
        return f"call {int(number) + 1} of {_WORDS[name]}{where}"
    kind = "map over" if name.startswith("*") else "step"
    return f"call {int(number) + 1} of {kind} {unquote(name.lstrip('*'))!r}{where}"


def shorten(encoded: bytes) -> str:
    """Return a stored value as text, cut to 200 characters."""
    text = encoded.decode(errors="replace")
    return text if len(text) <= 200 else f"{text[:196]} ..."


def describe_difference(before: bytes, now: bytes) -> str:
    """Return the names of the fields in which two stored values differ."""
    try:
        one, two = json.loads(before), json.loads(now)
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    except (ValueError, AttributeError, RecursionError):
        return "another value"
    return f"other values of {', '.join(map(repr, names))}"
