"""How a result and a trace show themselves: in a notebook, in a terminal, and as a file; and what they do not show."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    from stroma.page import Story

__all__ = ["HIDDEN", "Redact", "Shown", "hidden_values", "hide_state", "hide_words", "without"]

Redact = Callable[[dict[str, Any]], dict[str, Any]]

#: What stands in place of what is hidden.
HIDDEN: Final = "[redacted]"
_SHORTEST: Final = 4  # characters; shorter values would be found in half of all words
_ENCODED: Final = 10_000  # characters; longer values stand in no URL, and in no message as a whole
_URL_SAFE: Final = str.maketrans("+/", "-_")
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
    words: set[str] = set().union(*(_values(before) - _values(after) for before, after in states))
    return frozenset(form for word in words for form in _forms(word))


def hide_words(redact: Redact | None, text: str, hidden: Iterable[str]) -> str:
    """A message as ``redact`` lets it be seen.

    Of a broken contract the paths are kept. In any other message none of the ``hidden`` values stands; and redact sees
    it, as ``{"message": text}``.
    """
    if redact is None:
        return text
    from stroma.page import without_values  # Few runs are shown, so none has to load what shows them.

    paths = without_values(text)
    if paths != text:
        return paths
    try:
        shown = redact({"message": without(text, hidden)})["message"]
    except Exception:
        return HIDDEN
    return shown if isinstance(shown, str) else HIDDEN


def without(text: str, hidden: Iterable[str]) -> str:
    """A text without values in any case, and without the halves of them that are left of ones that were cut off."""
    low = _folded(text)
    spans: list[tuple[int, int]] = []
    for value in map(_folded, hidden):
        spans += _places(low, value)
        if len(value) > _TELLING:
            spans += [(len(low) - end, len(low) - at) for at, end in _places(low[::-1], value[::-1])]
    # All are found before any is taken out: two values can begin alike.
    kept: list[str] = []
    behind = 0
    for at, end in sorted(spans):
        if at > behind or not kept:
            kept += [text[behind:at], HIDDEN]
        behind = max(behind, end)
    return "".join(kept) + text[behind:]


def _values(state: Any) -> set[str]:
    """The plain values in a state, as words."""
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
            if len(word) >= _SHORTEST:
                found.add(word)
    return found


def _forms(word: str) -> set[str]:
    """A word as it can stand in a message: escaped, in a URL, in base64 wherever it begins there, in hex."""
    import html

    quoted = {
        word,
        repr(word)[1:-1],
        ascii(word)[1:-1],
        json.dumps(word)[1:-1],
        json.dumps(word, ensure_ascii=False)[1:-1],
    }
    forms = (
        quoted
        | {json.dumps(form)[1:-1] for form in quoted}
        | {html.escape(word), html.escape(word, quote=False)}
    )
    if len(word) > _ENCODED:
        return forms
    data = word.encode("utf-8", "surrogatepass")
    forms |= {repr(data)[2:-1], data.hex(), quote(data), quote(data, safe=""), quote_plus(data)}
    for before in range(3):
        # Without the characters that what stands beside it has a part in.
        coded = base64.b64encode(bytes(before) + data).decode()
        own = coded[(0, 2, 3)[before] : (len(data) + before) * 8 // 6]
        forms |= {own, own.translate(_URL_SAFE)}
    return {form for form in forms if len(form) >= _SHORTEST}


def _places(text: str, value: str) -> Iterator[tuple[int, int]]:
    """Where a value stands in a text, or a beginning of it that tells what it is: (from, to)."""
    start, at = value[:_TELLING], 0
    while (at := text.find(start, at)) >= 0:
        pairs = enumerate(zip(text[at : at + len(value)], value, strict=False))
        end = at + next((i for i, (a, b) in pairs if a != b), min(len(value), len(text) - at))
        yield at, end
        at = end


def _folded(text: str) -> str:
    """The same in lower case, character by character."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


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
        from stroma.page import document

        text = document(self._story(redact))
        if path is not None:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        from stroma.page import fragment

        return fragment(self._story())

    def __rich__(self) -> Any:
        from stroma._rich import renderable

        return renderable(self._story())
