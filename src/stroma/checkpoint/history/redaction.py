"""States of a store as plain data."""

from __future__ import annotations

from typing import Any, NamedTuple

from stroma._utils.access import error_text
from stroma.contracts.codec import decode_raw
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact, hide_state


class Payload(NamedTuple):
    """A state as plain JSON data, or the reason why there is none."""

    value: Any
    problem: str | None = None

    @property
    def shown(self) -> Any:
        """The state, or the reason in its place."""
        return self.value if self.problem is None else {"problem": self.problem}


def decode_payload(data: bytes, max_bytes: int | None) -> Payload:
    """Return a state in stored form as plain data, without its content above ``max_bytes``."""
    if max_bytes is not None and len(data) > max_bytes:
        return too_large(len(data))
    try:
        return Payload(jsonable(decode_raw(data)))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        return Payload(None, f"it cannot be read back: {error_text(error)}")


def too_large(size: int) -> Payload:
    """Return the payload for a state that is too large to show."""
    return Payload(None, f"it has {size:,} bytes, too large to show here")


def redact_value(redact: Redact | None, value: Any) -> Any:
    """Return a redacted state; a note in its place if ``redact`` raises."""
    return value if redact is None else jsonable(hide_state(redact, value))
