"""Outputs that broke their contract, below the attempts of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.history import place_of
from stroma.checkpoint.records import AttemptRecord
from stroma.cli.output import out
from stroma.trace.rejected import MISSING, RejectedOutput

__all__ = ["print_all_rejected"]

_SHOWN_REJECTED: Final = 3  # rejected outputs below the attempts
_SHOWN_COMPLAINTS: Final = 10  # of each


def print_all_rejected(outputs: Sequence[tuple[AttemptRecord, RejectedOutput]]) -> None:
    """Print the last outputs that broke their contract, and how many there are if these are not all."""
    for attempt, rejected in outputs[-_SHOWN_REJECTED:]:
        _print_rejected(attempt, rejected)
    if len(outputs) > _SHOWN_REJECTED:
        out.line(
            (f"the last {_SHOWN_REJECTED} of {len(outputs)} rejected outputs; all of them: --rejected", "dim")
        )


def _print_rejected(attempt: AttemptRecord, rejected: RejectedOutput) -> None:
    """Print what came beside each complaint of the contract."""
    out.line()
    out.line(
        (
            f"rejected output of {clean(attempt.node_id, 100)} at {place_of(attempt)}, attempt {attempt.attempt}",
            "bold",
        )
    )
    for one in rejected.complaints[:_SHOWN_COMPLAINTS]:
        value = rejected.at(one.path)
        came = "" if value is MISSING else f"; got {clean(json.dumps(value, ensure_ascii=False), 160)}"
        out.fitted(f"  {clean(one.field, 100)}: ", (clean(one.message, 300), "red"), came)
    more = rejected.more + max(0, len(rejected.complaints) - _SHOWN_COMPLAINTS)
    if more:
        out.line((f"  ... and {pluralize(more, 'complaint')} more", "dim"))
