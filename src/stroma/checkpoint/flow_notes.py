"""Forms of the notes that flows record beside their commits. ``runner/flows/journal.py`` writes them."""

from __future__ import annotations

from typing import Any, Final, Literal, TypedDict

from stroma.checkpoint.decoding import RecordName, decode_json, decode_text

__all__ = ["FailureNote", "decode_flow_note"]


class FailureNote(TypedDict):
    """The failure of a call. ``input_key``: its input in stored form."""

    node: str
    #: A FailureClass.
    kind: Literal["RECOVERABLE", "TERMINAL", "AMBIGUOUS"]
    message: str
    reason: str | None
    attempt: int
    type: str | None
    retry_after: float | None
    input_key: str | None


class _CancelledNote(TypedDict):
    seconds: float
    input_key: str | None


class _StartedNote(TypedDict):
    input_key: str | None


#: By kind; a sleep is its end and its start in ms since the epoch. The order of results ("o") is a text, a seed any bytes.
_SHAPES: Final[dict[str, Any]] = {
    "b": int, "c": _CancelledNote, "f": FailureNote, "i": _StartedNote, "p": list[str], "s": tuple[int, float], "v": int,
    "w": float, "x": bool,
}  # fmt: skip
_MAX_MS: Final = 253_402_300_799_000  # the last second that a datetime has


def decode_flow_note(run_id: str, key: str, kind: str, data: bytes) -> Any:
    """Return the value of a note of a flow; the data of a kind without a form. Raises CorruptCheckpoint."""
    name = RecordName(run_id, "note", key)
    if kind == "o":
        return decode_text(data, name)
    if kind not in _SHAPES:
        return data
    value = decode_json(data, _SHAPES[kind], name)
    if kind == "v" and not 0 <= value <= _MAX_MS:
        raise name.damaged("its time is not a date")
    return value
