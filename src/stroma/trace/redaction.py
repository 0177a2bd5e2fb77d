"""Redaction and display of results and traces: in a notebook, in a terminal, and as a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from stroma._utils.hiding import HIDDEN, SHORTEST, forms_of, without

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput
    from stroma.trace.story import Story

Redact = Callable[[dict[str, Any]], dict[str, Any]]

_MOST_WORDS: Final = (
    10_000  # values that are looked for in messages; where more are hidden, so is every message
)
_MOST_BYTES: Final = 2_000_000  # of a rejected output that was redacted
#: A name in a text that nobody has parsed, and what stands for its value when ``redact`` is asked.
_NAME: Final = re.compile(r"""([\w$-]{1,60})["'\\*`]*\s*[:=]""")
_MOST_NAMES: Final = 1000
_PROBE: Final = "a value"


def hide_state(redact: Redact | None, state: Any) -> Any:
    """Plain data as ``redact`` lets it be seen; where that raises, a word in its place."""
    if redact is None:
        return state
    try:
        shown = redact(state if isinstance(state, dict) else {"value": state})
        return shown if isinstance(state, dict) else shown["value"]
    except Exception as error:
        return {"redacted": f"redact raised {type(error).__name__}"}


def hide_rejected(redact: Redact | None, rejected: RejectedOutput) -> RejectedOutput:
    """Return a rejected output as ``redact`` lets it be seen; a word in its place where that raises.

    A text is shown only if ``redact`` hides none of the fields that it names: nobody has parsed it.
    """
    if redact is None:
        return rejected
    from stroma._utils.bounded_copy import BoundedCopy  # Few runs have one.

    value = json.loads(json.dumps(rejected.value))  # redact may change what it gets.
    shown: Any = None
    if isinstance(value, str) and not _may_show(redact, value):
        shown = HIDDEN
    else:
        shown = hide_state(redact, value)
    # What redact returns can be anything.
    copy = BoundedCopy(_MOST_BYTES)
    shown = copy.copy(shown)
    hidden = hidden_values([(rejected.value, shown)])
    complaints = tuple(
        one._replace(
            path=tuple(part if isinstance(part, int) else without(part, hidden) for part in one.path),
            message=hide_words(redact, one.message, hidden),
        )
        for one in rejected.complaints
    )
    return rejected._replace(value=shown, is_cut=rejected.is_cut or copy.is_cut, complaints=complaints)


def _may_show(redact: Redact, text: str) -> bool:
    """Return True if ``redact`` leaves alone what stands under any name in a text."""
    names = dict.fromkeys(islice(_NAME.findall(text), _MOST_NAMES + 1), _PROBE)
    if len(names) > _MOST_NAMES:
        return False
    try:
        shown = redact(dict(names))
        return all(shown[name] == _PROBE for name in names)
    except Exception:
        return not names


def hidden_values(states: Iterable[tuple[Any, Any]]) -> frozenset[str]:
    """Return the texts redacted from plain states, passed as (before, after); {""} if they are too many."""
    words: set[str] = set().union(*(_values(before) - _values(after) for before, after in states))
    if len(words) > _MOST_WORDS:
        return frozenset([""])
    return frozenset(form for word in words for form in forms_of(word))


def hide_words(redact: Redact | None, text: str, hidden: Iterable[str]) -> str:
    """Return a message as ``redact`` allows it to be seen.

    Of a broken contract the paths are kept. In any other message none of the ``hidden`` values stands; and
    redact sees it, as ``{"message": text}``.
    """
    if redact is None:
        return text
    from stroma.trace.story import without_values  # Few runs are shown.

    paths = without_values(text)
    if paths != text:
        return paths
    try:
        shown = redact({"message": without(text, hidden)})["message"]
    except Exception:
        return HIDDEN
    return shown if isinstance(shown, str) else HIDDEN


def _values(state: Any) -> set[str]:
    """Return the plain values in a state as texts."""
    words: set[str] = set()
    rest = [state]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
        elif value is not None and not isinstance(value, bool):
            word = str(value)
            if len(word) >= SHORTEST:
                words.add(word)
    return words


class Shown:
    """A trace or result that can be displayed."""

    __slots__ = ()

    def _story(self, redact: Redact | None = None) -> Story:
        """Return the run as plain data; ``redact`` is applied to each state and each message."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None, *, redact: Redact | None = None) -> str:
        """Return one self-contained HTML file, to attach to a bug report: it loads nothing and runs nothing.

        ``path``: also written there, readable by its owner only. ``redact``: applied to each state and each
        message; pass that of your RunConfig. Secrets of pydantic's types are masked all the same.
        """
        from stroma.trace.html import document

        text = document(self._story(redact))
        if path is not None:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        from stroma.trace.html import fragment

        return fragment(self._story())
