"""Outputs that broke their contract, below the attempts of a run."""

from __future__ import annotations

import json
from typing import Final

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.history import History, place_of
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.output import out
from stroma.trace.rejected import MISSING, RejectedOutput

__all__ = ["last_rejected", "print_rejected"]

_SHOWN_REJECTED: Final = 3  # rejected outputs below the attempts
_SHOWN_COMPLAINTS: Final = 10  # of each


def last_rejected(
    history: History, record: RunRecord, selected: list[AttemptRecord]
) -> list[tuple[AttemptRecord, RejectedOutput]]:
    """Return the last outputs of these attempts that broke their contract."""
    failed = [one for one in selected if one.reason == "contract" or one.outcome == "suspended"]
    failed.sort(key=lambda one: one.started_ns)
    outputs = ((one, history.rejected_of(record.run_id, one)) for one in failed[-_SHOWN_REJECTED:])
    return [(one, rejected) for one, rejected in outputs if rejected is not None]


def print_rejected(attempt: AttemptRecord, rejected: RejectedOutput) -> None:
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
