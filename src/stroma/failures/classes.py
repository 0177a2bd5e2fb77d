"""Classes of failures."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["FailureClass"]


class FailureClass(StrEnum):
    """What a failure means for trying again."""

    RECOVERABLE = "RECOVERABLE"
    TERMINAL = "TERMINAL"
    AMBIGUOUS = "AMBIGUOUS"

    # The same number, without a call of Python for each look into a policy map: names are values here.
    __hash__ = str.__hash__
