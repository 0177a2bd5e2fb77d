"""Forms of the notes that flows record beside their commits. ``runner/flows/journal.py`` writes them."""

from __future__ import annotations

from typing import Any, Final, Literal, TypedDict

from stroma.checkpoint.decoding import RecordName, decode_json

__all__ = ["FailureNote", "decode_flow_note"]


class FailureNote(TypedDict):
    """The failure of a call.

    ``event``: the number of the event; ``input_key``: the input in stored form.
    """

    event: int
    node: str
    #: A FailureClass.
    kind: Literal["RECOVERABLE", "TERMINAL", "AMBIGUOUS"]
    message: str
    reason: str | None
    attempt: int
    type: str | None
    retry_after: float | None
    input_key: str | None


#: By kind: the function time of a flow ("b"), discarded events ("d"), an event ("e": branch, time), a failure ("f"), the end and
#: the start of a sleep ("s"), the time that a body observed ("v"), when a question was asked ("w") and that it expired ("x").
_SHAPES: Final[dict[str, Any]] = {
    "b": int, "d": list[tuple[int, int]], "e": tuple[str, int], "f": FailureNote, "s": tuple[int, float], "v": int,
    "w": float, "x": bool,
}  # fmt: skip
_MAX_MS: Final = 253_402_300_799_000  # the last second that a datetime has


def decode_flow_note(run_id: str, key: str, kind: str, data: bytes) -> Any:
    """Return the value of a note of a flow; the data of a kind without a form. Raises CorruptCheckpoint."""
    name = RecordName(run_id, "note", key)
    if kind not in _SHAPES:
        return data
    value = decode_json(data, _SHAPES[kind], name)
    time_ms = value if kind == "v" else value[1] if kind == "e" else 0
    if not 0 <= time_ms <= _MAX_MS:
        raise name.damaged("its time is not a date")
    return value
