"""History of runs in a store, for the command line and the web interface.

Everything is read through the public reading functions of a journal store. No user code is imported or called
for it.
"""

from stroma.checkpoint.history.bars import (
    bar_of,
    find_progress,
    in_order,
    place_of,
    sum_waste,
)
from stroma.checkpoint.history.comparison import Change, NodeDiff, changes, compare
from stroma.checkpoint.history.facts import (
    answer_type,
    count_causes,
    effect_state,
    is_at_work,
    is_interrupted,
    is_resumable,
    node_text,
    status_of,
    unanswered,
)
from stroma.checkpoint.history.reader import History, Inputs
from stroma.checkpoint.history.redaction import Payload, too_large
from stroma.checkpoint.records import FAILED, FINISHED
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
    "answer_type",
    "bar_of",
    "changes",
    "compare",
    "count_causes",
    "effect_state",
    "find_progress",
    "in_order",
    "is_at_work",
    "is_interrupted",
    "is_resumable",
    "node_text",
    "place_of",
    "status_of",
    "sum_waste",
    "too_large",
    "unanswered",
]
