"""Texts without some values: in any case, in the forms that messages have them in, and cut off."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from typing import Final, final
from urllib.parse import quote, quote_plus

#: Stands in place of what is hidden.
HIDDEN: Final = "[redacted]"
_SHORTEST: Final = 4  # characters; shorter values would be found in half of all words: only whole ones count
_ENCODED: Final = 10_000  # characters; longer values stand in no URL, and in no message as a whole
_URL_SAFE: Final = str.maketrans("+/", "-_")
_TELLING: Final = 12  # characters of a longer value that tell what it is; messages cut values off
_LONGEST_TIME: Final = 40  # characters of a date or time
_FEW: Final = 50  # texts that are looked for one by one
_MOST_COMPARED: Final = 200_000  # characters, beside 4 for each of the text; some 0.1 s

#: Beginnings of values by their length: each with the values that begin so.
_Starts = dict[int, dict[str, list[str]]]


def without(text: str, hidden: Iterable[str], mask: str = HIDDEN) -> str:
    """Return a text without values; see :meth:`Needles.hide`."""
    return Needles(hidden).hide(text, mask)


@final
class Needles:
    """Values that must not be shown. An empty one among them hides every text."""

    __slots__ = ("_backward", "_forward", "_hides_all")

    def __init__(self, values: Iterable[str]) -> None:
        folded = {_folded(value) for value in values}
        self._hides_all = "" in folded
        self._forward = _by_start(folded)
        self._backward = _by_start({value[::-1] for value in folded if len(value) > _TELLING})

    def hide(self, text: str, mask: str) -> str:
        """Return a text without the values in any case, and without the rest of a value that was cut off.

        Takes time linear in the text: where values and text are made to be slow, all of the text is hidden.
        """
        if self._hides_all:
            return mask
        low = _folded(text)
        room = [_MOST_COMPARED + 4 * len(low)]
        spans = _places(low, self._forward, room)
        spans += [(len(low) - end, len(low) - at) for at, end in _places(low[::-1], self._backward, room)]
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


def forms_of(word: str) -> set[str]:
    """Return the forms of a text in messages: escaped, in a URL, in base64 at any offset, in hex.

    A date or time, which plain data has in ISO format, has the forms of ``str()`` and ``repr()`` too.
    """
    if len(word) < _SHORTEST:
        return {word}
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
    if word[0].isdigit() and len(word) <= _LONGEST_TIME:
        forms |= _times(word)
    if len(word) <= _ENCODED:
        data = word.encode("utf-8", "surrogatepass")
        forms |= {repr(data)[2:-1], quote(data), quote(data, safe=""), quote_plus(data)}
    return _encodings(word, forms)


def _times(word: str) -> set[str]:
    forms: set[str] = set()
    for kind in (date, time, datetime):
        try:
            moment: date | time = kind.fromisoformat(word)
        except ValueError:
            continue
        forms.add(str(moment))
        if isinstance(moment, (datetime, time)):
            moment = moment.replace(tzinfo=None)  # It is at the end, and has many forms.
        forms.add(repr(moment)[:-1])
    return forms


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


def _by_start(values: Iterable[str]) -> _Starts:
    by_start: _Starts = {}
    for value in values:
        start = value[:_TELLING]
        by_start.setdefault(len(start), {}).setdefault(start, []).append(value)
    return by_start


def _places(text: str, by_start: _Starts, room: list[int]) -> list[tuple[int, int]]:
    """Return the positions of values in a text, or of beginnings that reveal them: (from, to).

    ``room``: how many characters may be compared, counted down; below 0 the answer is not complete.
    """
    spans: list[tuple[int, int]] = []
    for length, starts in by_start.items():
        for at, start in _starts(text, length, starts, room):
            end = at + length
            if length < _SHORTEST and (text[at - 1 : at].isalnum() or text[end : end + 1].isalnum()):
                continue  # A short value inside of a word.
            for value in starts[start]:
                end = max(end, at + _common(text, at, value, length, room))
                if room[0] < 0:
                    return spans
            spans.append((at, end))
    return spans


def _starts(
    text: str, length: int, starts: dict[str, list[str]], room: list[int]
) -> Iterator[tuple[int, str]]:
    """Yield the places of any of these texts of one length in a text."""
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
