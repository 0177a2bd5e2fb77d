"""JSON of a bounded size for readers that take in every token of it, such as coding agents."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from pydantic_core import to_json

__all__ = ["MAX_ANSWER_BYTES", "bound_answer", "bound_text"]

MAX_ANSWER_BYTES: Final = 64 * 1024
_NOTE_BYTES: Final = 1024  # room for the note of an answer that is cut
#: A value that is cut keeps at least this; of a list, as many entries are head as this allows.
_SHARE_BYTES: Final = 1024
_MARK_BYTES: Final = 100  # room for the mark of a value that is cut
_MAX_KEY: Final = 100  # characters
_HALVES: Final = re.compile("[\ud800-\udfff]")


def bound_answer(answer: dict[str, Any], fix: str) -> dict[str, Any]:
    """Return an answer that JSON can hold, of at most 64 KiB of indented text.

    Of a larger one, the largest values are cut, and ``cut`` tells the size and the fix. Lone surrogates,
    which UTF-8 cannot encode, become U+FFFD.
    """
    answer = _well_formed(answer)
    size = _size(answer, 0)
    if size <= MAX_ANSWER_BYTES:
        return answer
    note = f"the answer has {size:,} bytes, and was cut to {MAX_ANSWER_BYTES:,}; {fix}"
    return {
        "cut": bound_text(note, _NOTE_BYTES - _MARK_BYTES),
        **_fit(answer, MAX_ANSWER_BYTES - _NOTE_BYTES, 0),
    }


def bound_text(text: str, max_bytes: int = MAX_ANSWER_BYTES) -> str:
    """Return a text that UTF-8 can encode, of at most ``max_bytes`` as a JSON string."""
    cut: str = _fit(_well_formed(text), max_bytes, 0)
    return cut


def _well_formed(value: Any) -> Any:
    """Return plain data without lone surrogates and numbers that are not finite."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {_well_formed(str(key)): _well_formed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_well_formed(inner) for inner in value]
    return value


def _size(value: Any, depth: int) -> int:
    """Return the bytes of a value in an indented JSON text, ``depth`` levels deep."""
    text = to_json(value, indent=2, fallback=str)
    return len(text) + 2 * depth * text.count(b"\n")


def _fit(value: Any, room: int, depth: int) -> Any:
    """Return a value cut to ``room`` bytes: small entries stay whole, and large ones share the rest."""
    if _size(value, depth) <= room:
        return value
    if isinstance(value, str):
        head = value[:room]
        while _size(head, depth) > room - _MARK_BYTES:
            head = head[: len(head) * 3 // 4]
        return f"{head}… ({len(value) - len(head):,} more characters)"
    is_list = isinstance(value, list)
    entries = list(enumerate(value)) if is_list else [(key[:_MAX_KEY], inner) for key, inner in value.items()]
    heads = [2 * depth + (4 if is_list else 6 + _size(key, 0)) for key, _ in entries]
    sizes = [head + _size(inner, depth + 1) for head, (_, inner) in zip(heads, entries, strict=True)]
    room -= _MARK_BYTES
    count = used = 0
    for size in sizes:
        used += min(size, _SHARE_BYTES)
        if used > room:
            break
        count += 1
    share = _share(sizes[:count], room)
    cut = [
        (key, _fit(inner, share - head, depth + 1))
        for head, (key, inner) in zip(heads[:count], entries, strict=False)
    ]
    more = [] if count == len(entries) else [("omitted", f"{len(entries) - count:,} more")]
    return [inner for _, inner in cut] + [dict([mark]) for mark in more] if is_list else dict(cut + more)


def _share(sizes: list[int], room: int) -> int:
    """Return the most bytes that each entry may take, so that all together take ``room``."""
    for n, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - n)
        if size > share:
            return share
        room -= size
    return max(sizes, default=0)
