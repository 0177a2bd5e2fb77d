"""Classes of failures."""

from __future__ import annotations

from enum import StrEnum


class FailureClass(StrEnum):
    """The meaning of a failure for retries."""

    RECOVERABLE = "RECOVERABLE"
    TERMINAL = "TERMINAL"
    AMBIGUOUS = "AMBIGUOUS"

    # The same number, without a call of Python for each look into a policy map: names are values here.
    __hash__ = str.__hash__


def describe_class(failure_class: str, reason: str | None) -> str:
    """Return the class of a failure, and its reason if one is known: "RECOVERABLE (rate_limit)"."""
    return f"{failure_class} ({reason})" if reason else failure_class
