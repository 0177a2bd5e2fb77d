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
