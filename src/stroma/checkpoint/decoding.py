"""Texts and records of stores: all that a store holds besides outputs and inputs.

Damage can change anything, so everything is checked here: encoding, depth, numbers and types. Whatever is
wrong is one kind of error, CorruptCheckpoint, which names the record.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stroma.checkpoint.errors import CorruptCheckpoint

MAX_INT: Final = 2**63 - 1


class RecordName(NamedTuple):
    """Name of a record for messages.

    Attributes:
        kind: such as "note" or "question".
        place: its key among the records of this kind; "" if there is only one.
    """

    run_id: str
    kind: str
    place: str = ""

    def __str__(self) -> str:
        return f"the {self.kind}{self.place and f' {self.place!r}'} of run {self.run_id!r}"

    def damaged(self, problem: str = "") -> CorruptCheckpoint:
        """Return the error for the record."""
        record, why = str(self), problem and f": {problem}"
        return CorruptCheckpoint(
            f"{record} is damaged{why}; restore the store from a backup, restart the run, or start a new one"
        )


def storable_text(value: str | None) -> str | None:
    """Return a text that every store accepts: lone surrogates and NULs are escaped."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def decode_json(data: bytes | str, shape: Any, name: RecordName) -> Any:
    """Return a record: a JSON type, a NamedTuple, or a container of them. Raises CorruptCheckpoint."""
    try:
        return _adapter(shape).validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise name.damaged(problem) from None


@lru_cache(maxsize=256)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape, config=ConfigDict(strict=True, allow_inf_nan=False))


def decode_number(text: str | bytes, name: RecordName) -> int:
    """Return a record, or a part of its key, that is a number from 0 on. Raises CorruptCheckpoint."""
    if not (text.isdigit() and text.isascii() and len(text) < 20 and int(text) <= MAX_INT):
        raise name.damaged(f"{text[:40]!a} is not a number")
    return int(text)
