"""Redaction and display of results and traces: in a notebook, in a terminal, and as a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from stroma._utils.hiding import HIDDEN, forms_of, without
from stroma._utils.secrets import MASK
from stroma.contracts.copying import isolate
from stroma.trace.plain import jsonable

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput
    from stroma.trace.story import Story

Redact = Callable[[dict[str, Any]], dict[str, Any]]

MAX_WORDS: Final = (
    10_000  # values that are looked for in messages; where more are hidden, so is every message
)
_MOST_BYTES: Final = 2_000_000  # of a rejected output that was redacted
#: A name in a text that nobody has parsed, and what stands for its value when ``redact`` is asked.
_NAME: Final = re.compile(r"""([\w$-]{1,60})["'\\*`]*\s*[:=]""")
_MOST_NAMES: Final = 1000
_PROBE: Final = "a value"


def hide_state(redact: Redact | None, state: Any) -> Any:
    """Return a state as ``redact`` lets it be seen; a word in its place where that raises.

    Nothing else calls ``redact``, which gets a copy that it may change.
    """
    if redact is None:
        return state
    try:
        shown: Any = redact(isolate(state if isinstance(state, dict) else {"value": state}))
        if isinstance(shown, dict):
            return shown if isinstance(state, dict) else shown["value"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return {"redacted": f"redact raised {type(error).__name__}"}
    return {"redacted": f"redact returned {type(shown).__name__}, not a dict"}


def hide_rejected(redact: Redact | None, rejected: RejectedOutput) -> RejectedOutput:
    """Return a rejected output as ``redact`` lets it be seen; a word in its place where that raises.

    A text is shown only if ``redact`` hides none of the fields that it names: nobody has parsed it.
    """
    if redact is None:
        return rejected
    from stroma._utils.bounded_copy import BoundedCopy  # Few runs have one.

    value = rejected.value
    if isinstance(value, str) and not _may_show(redact, value):
        shown: Any = HIDDEN
    else:
        shown = hide_state(redact, value)
    # What redact returns can be anything.
    copy = BoundedCopy(_MOST_BYTES)
    shown = copy.copy(shown)
    hidden = forms_to_hide(_removed(value, shown))
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
    shown = hide_state(redact, names)
    return all(shown.get(name) == _PROBE for name in names)


def removed_values(redact: Redact, states: Iterable[Any]) -> set[str]:
    """Return the values that ``redact`` removes from states, and the keys of dicts in them, as texts."""
    words: set[str] = set()
    for state in states:
        words |= _removed(jsonable(state), jsonable(hide_state(redact, state)))
        if len(words) > MAX_WORDS:
            break
    return words


def forms_to_hide(words: Collection[str]) -> frozenset[str]:
    """Return the texts that :func:`hide_words` removes; only "", which hides all, for too many words."""
    if len(words) > MAX_WORDS:
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
    shown = hide_state(redact, {"message": without(text, hidden)}).get("message")
    return shown if isinstance(shown, str) else HIDDEN


def _removed(before: Any, after: Any) -> set[str]:
    return {word for word, _ in _words(before) - _words(after)} - {"", MASK}


def _words(state: Any) -> set[tuple[str, bool]]:
    """Return the plain values in a state as texts, and, marked as such, the keys of dicts inside it."""
    words: set[tuple[str, bool]] = set()
    rest = [*state.values()] if isinstance(state, dict) else [state]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            words.update((key, True) for key in value)  # They may be data: a dict by address, say.
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
        elif value is not None and not isinstance(value, bool):
            words.add((str(value), False))
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
