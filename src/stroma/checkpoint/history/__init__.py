"""History of runs in a store, for the command line and the web interface.

Everything is read through the public reading functions of a journal store. No user code is imported or called
for it.
"""

from stroma.checkpoint.history.bars import (
    attempts_by_end,
    bar_of,
    find_progress,
    first_start_ns,
    in_order,
    is_at_work,
    place_of,
    sum_waste,
)
from stroma.checkpoint.history.comparison import Change, NodeDiff, changes, compare
from stroma.checkpoint.history.reader import (
    FAILED,
    FINISHED,
    History,
    Inputs,
    describe_effects,
    effect_state,
    is_interrupted,
    status_of,
    story_of,
)
from stroma.checkpoint.history.redaction import Payload, too_large
from stroma.trace.redaction import Redact

__all__ = [
    "FAILED",
    "FINISHED",
    "Change",
    "History",
    "Inputs",
    "NodeDiff",
    "Payload",
    "Redact",
    "attempts_by_end",
    "bar_of",
    "changes",
    "compare",
    "describe_effects",
    "effect_state",
    "find_progress",
    "first_start_ns",
    "in_order",
    "is_at_work",
    "is_interrupted",
    "place_of",
    "status_of",
    "story_of",
    "sum_waste",
    "too_large",
]
