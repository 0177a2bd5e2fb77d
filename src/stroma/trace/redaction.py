"""Redaction and display of results and traces: in a notebook, in a terminal, and as a file."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, quote_plus

from stroma._utils.text import one_line

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput
    from stroma.trace.story import Story

__all__ = [
    "HIDDEN",
    "Redact",
    "Shown",
    "forms_of",
    "hidden_values",
    "hide_rejected",
    "hide_state",
    "hide_words",
    "scrubbed_error",
    "without",
    "without_secrets",
]

Redact = Callable[[dict[str, Any]], dict[str, Any]]

#: What stands in place of what is hidden.
HIDDEN: Final = "[redacted]"
_SHORTEST: Final = 4  # characters; shorter values would be found in half of all words
_ENCODED: Final = 10_000  # characters; longer values stand in no URL, and in no message as a whole
_URL_SAFE: Final = str.maketrans("+/", "-_")
_TELLING: Final = 12  # characters of a longer value that tell what it is; messages cut values off
_MOST_WORDS: Final = (
    10_000  # values that are looked for in messages; where more are hidden, so is every message
)
_DEEPEST_CAUSE: Final = 10  # causes of causes
_FEW: Final = 50  # texts that are looked for one by one
_MOST_COMPARED: Final = 200_000  # characters, beside 4 for each of the text; some 0.1 s
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
    """Return a rejected output as ``redact`` lets it be seen; where that raises, a word in place of its value.

    A text is shown only if ``redact`` hides none of the fields that it names: nobody has parsed it.
    """
    if redact is None:
        return rejected
    from stroma.trace.bounded_copy import BoundedCopy  # Few runs have one.

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
    """Return the texts redacted from states of plain data, passed as (before, after); {""} if they are too many."""
    words: set[str] = set().union(*(_values(before) - _values(after) for before, after in states))
    if len(words) > _MOST_WORDS:
        return frozenset([""])
    return frozenset(form for word in words for form in forms_of(word))


def hide_words(redact: Redact | None, text: str, hidden: Iterable[str]) -> str:
    """Return a message as ``redact`` allows it to be seen.

    Of a broken contract the paths are kept. In any other message none of the ``hidden`` values stands; and redact sees
    it, as ``{"message": text}``.
    """
    if redact is None:
        return text
    from stroma.trace.story import without_values  # Fewrunsareshown, sononehastoloadwhatshowsthem.

    paths = without_values(text)
    if paths != text:
        return paths
    try:
        shown = redact({"message": without(text, hidden)})["message"]
    except Exception:
        return HIDDEN
    return shown if isinstance(shown, str) else HIDDEN


def without(text: str, hidden: Iterable[str], mask: str = HIDDEN) -> str:
    """Return a text without values in any case, and without the remaining part of a value that was cut off.

    Takes time linear in the text and in the values: where values and text are made to be slow, all of the text is hidden.
    """
    low = _folded(text)
    values = {_folded(value) for value in hidden}
    if "" in values:
        return mask
    ends = {value[::-1] for value in values if len(value) > _TELLING}
    room = [_MOST_COMPARED + 4 * len(low)]
    spans = _places(low, values, room)
    spans += [(len(low) - end, len(low) - at) for at, end in _places(low[::-1], ends, room)]
    if room[0] < 0:
        return mask
    # All are found before any is taken out: two values can begin alike.
    parts: list[str] = []
    behind = 0
    for at, end in sorted(spans):
        if at > behind or not parts:
            parts += [text[behind:at], mask]
        behind = max(behind, end)
    return "".join(parts) + text[behind:]


def without_secrets(text: str, secrets: Mapping[str, set[str]]) -> str:
    """Return a text without secrets. ``secrets``: each with its forms, see forms_of()."""
    if not secrets:
        return text
    from stroma.contracts.masking import MASK

    return without(text, set().union(*secrets.values()), MASK)


def scrubbed_error(error: BaseException, secrets: Mapping[str, set[str]]) -> BaseException:
    """Return an exception as a log may show it with its traceback: in its messages are no secrets and no line breaks.

    That is the exception itself where nothing has to be taken out, else one of the same name, without its attributes.
    """
    return _scrubbed(error, lambda text: one_line(without_secrets(text, secrets)), _DEEPEST_CAUSE) or error


def _scrubbed(error: BaseException, scrub: Callable[[str], str], depth: int) -> BaseException | None:
    """Return what stands in for an exception; None where it can stand for itself."""
    try:
        text = str(error)
    except Exception:
        return None
    cause, context = error.__cause__, error.__context__
    inner = [
        None if one is None or not depth else _scrubbed(one, scrub, depth - 1) for one in (cause, context)
    ]
    message = scrub(text)
    if message == text and inner == [None, None] and not hasattr(error, "__notes__"):
        return None
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    shown: BaseException = type(kind.__name__, (Exception,), names)(message)
    shown.__traceback__, shown.__cause__, shown.__context__ = (
        error.__traceback__, inner[0] or cause, inner[1] or context,
    )  # fmt: skip
    shown.__suppress_context__ = error.__suppress_context__
    for note in getattr(error, "__notes__", ()):
        shown.add_note(scrub(str(note)))
    return shown


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
            if len(word) >= _SHORTEST:
                words.add(word)
    return words


def forms_of(word: str) -> set[str]:
    """Return the forms of a text in messages: escaped, in a URL, in base64 at any offset, in hex."""
    if word.isascii() and word.isalnum():
        return _encodings(word, {word})
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
    if len(word) <= _ENCODED:
        data = word.encode("utf-8", "surrogatepass")
        forms |= {repr(data)[2:-1], quote(data), quote(data, safe=""), quote_plus(data)}
    return _encodings(word, forms)


def _encodings(word: str, forms: set[str]) -> set[str]:
    """Add a word in hex and base64 to its forms."""
    if len(word) > _ENCODED:
        return forms
    data = word.encode("utf-8", "surrogatepass")
    forms.add(data.hex())
    for before in range(3):
        # Without the characters that what stands beside it has a part in.
        coded = base64.b64encode(bytes(before) + data).decode()
        own = coded[(0, 2, 3)[before] : (len(data) + before) * 8 // 6]
        forms |= {own, own.translate(_URL_SAFE)}
    return {form for form in forms if len(form) >= _SHORTEST}


def _places(text: str, values: Iterable[str], room: list[int]) -> list[tuple[int, int]]:
    """Return the positions of values in a text, or of beginnings that reveal them: (from, to).

    ``room``: how many characters may be compared, counted down; below 0 the answer is not complete.
    """
    by_start: dict[int, dict[str, list[str]]] = {}
    for value in values:
        start = value[:_TELLING]
        by_start.setdefault(len(start), {}).setdefault(start, []).append(value)
    spans: list[tuple[int, int]] = []
    for length, starts in by_start.items():
        for at, start in _starts(text, length, starts, room):
            end = at + length
            for value in starts[start]:
                end = max(end, at + _common(text, at, value, length, room))
                if room[0] < 0:
                    return spans
            spans.append((at, end))
    return spans


def _starts(text: str, length: int, starts: Iterable[str], room: list[int]) -> Iterator[tuple[int, str]]:
    """Yield the places of any of these texts of one length in a text."""
    starts = set(starts)
    if len(starts) <= _FEW:
        for start in starts:
            at = -1
            while (at := text.find(start, at + 1)) >= 0:
                yield at, start
        return
    room[0] -= len(text)
    for at in range(len(text) - length + 1 if room[0] >= 0 else 0):
        if (part := text[at : at + length]) in starts:
            yield at, part


def _common(text: str, at: int, value: str, known: int, room: list[int]) -> int:
    """Return how many characters of ``value`` stand in a text at a place; ``known`` do."""
    room[0] -= 16
    step, growing = 16, True
    while step and known < len(value) and room[0] >= 0:
        part = value[known : known + step]
        room[0] -= len(part)
        if text.startswith(part, at + known):
            known += len(part)
            step = 2 * step if growing else step
        else:
            step, growing = step // 2, False
    return known


def _folded(text: str) -> str:
    """Return a text in lower case, character by character."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


class Shown:
    """A trace or result that can be displayed."""

    __slots__ = ()

    def _story(self, redact: Redact | None = None) -> Story:
        """Return the run as plain data; ``redact`` is applied to each state and each message."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None, *, redact: Redact | None = None) -> str:
        """Return one self-contained HTML file, to attach to a bug report: it loads nothing and runs nothing.

        ``path``: also written there, readable by its owner only. ``redact``: applied to each state and each message; pass that
        of your RunConfig. Secrets of pydantic's types are masked all the same.
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

    def __rich__(self) -> Any:
        from stroma.trace.terminal import renderable

        return renderable(self._story())
