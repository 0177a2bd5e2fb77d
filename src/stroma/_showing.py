"""How a result and a trace show themselves: in a notebook, in a terminal, and as a file; and what they do not show."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

from stroma.page import Story, document, fragment, without_values

__all__ = ["HIDDEN", "Redact", "Shown", "hidden_values", "hide_state", "hide_words", "without"]

Redact = Callable[[dict[str, Any]], dict[str, Any]]

#: What stands in place of what is hidden.
HIDDEN: Final = "[redacted]"
_SHORTEST: Final = 4  # characters; shorter values would be found in half of all words
_TELLING: Final = 12  # characters of a longer value that tell what it is; messages cut values off


def hide_state(redact: Redact | None, state: Any) -> Any:
    """Plain data as ``redact`` lets it be seen; where that raises, a word in its place."""
    if redact is None:
        return state
    try:
        shown = redact(state if isinstance(state, dict) else {"value": state})
        return shown if isinstance(state, dict) else shown["value"]
    except Exception as error:
        return {"redacted": f"redact raised {type(error).__name__}"}


def hidden_values(states: Iterable[tuple[Any, Any]]) -> frozenset[str]:
    """What was taken out of states of plain data, (before, after), as it stands in a message."""
    return frozenset().union(*(_values(before) - _values(after) for before, after in states))


def hide_words(redact: Redact | None, text: str, hidden: Iterable[str]) -> str:
    """A message as ``redact`` lets it be seen.

    Of a broken contract the paths are kept. In any other message none of the ``hidden`` values stands; and redact sees
    it, as ``{"message": text}``.
    """
    if redact is None:
        return text
    paths = without_values(text)
    if paths != text:
        return paths
    try:
        shown = redact({"message": without(text, hidden)})["message"]
    except Exception:
        return HIDDEN
    return shown if isinstance(shown, str) else HIDDEN


def without(text: str, hidden: Iterable[str]) -> str:
    """A text without values, and without the halves of them that are left of ones that were cut off."""
    for value in sorted(hidden, key=len, reverse=True):  # One may stand in another.
        if len(value) <= _TELLING:
            text = text.replace(value, HIDDEN)
        else:
            text = _cut(text, value)
            text = _cut(text[::-1], value[::-1], HIDDEN[::-1])[::-1]
    return text


def _values(state: Any) -> set[str]:
    """The plain values in a state, as they stand in a message."""
    found: set[str] = set()
    rest = [state]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
        elif value is not None and not isinstance(value, bool):
            word = str(value)
            found |= {w for w in (word, repr(word)[1:-1], json.dumps(word)[1:-1]) if len(w) >= _SHORTEST}
    return found


def _cut(text: str, value: str, mark: str = HIDDEN) -> str:
    """A text without each beginning of a value that tells what it is."""
    start, at = value[:_TELLING], 0
    while (at := text.find(start, at)) >= 0:
        pairs = enumerate(zip(text[at : at + len(value)], value, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(value), len(text) - at))
        text = text[:at] + mark + text[at + same :]
        at += len(mark)
    return text


class Shown:
    """What can be told as a story of a run."""

    __slots__ = ()

    def _story(self, redact: Redact | None = None) -> Story:
        """All of it as plain data; ``redact`` is applied to each state and each message."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None, *, redact: Redact | None = None) -> str:
        """One HTML file that stands by itself, to attach to a bug report: it loads nothing and runs nothing.

        ``path``: also written there, readable by its owner only. ``redact``: applied to each state and each message; give the
        one of your RunConfig. Secrets of pydantic's types are masked all the same.
        """
        text = document(self._story(redact))
        if path is not None:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        return fragment(self._story())

    def __rich__(self) -> Any:
        from stroma._rich import renderable

        return renderable(self._story())
