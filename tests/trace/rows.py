"""Rows of a trace as the engine keeps them, and the events that they stand for."""

from datetime import UTC, datetime
from typing import Any

from stroma import ExecutionTrace, FailureClass, TraceEvent
from stroma.trace import AttemptUsage
from stroma.trace.events import AttemptRow, Failed

USED = AttemptUsage(7, 2, 0.5, "m", 3, 1)
#: 2023-11-14 22:13:20.123456789 UTC
START = 1_700_000_000_123_456_789
WHEN = datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)
FAILED = Failed(FailureClass.RECOVERABLE, "it broke", "rate_limit", "OSError")


def row(node_id: str = "node", **changed: Any) -> AttemptRow:
    """A row of an attempt that succeeded, but for what is given."""
    fields: dict[str, Any] = {
        "attempt": 1,
        "started": START,
        "took": 5_999_999,
        "given": {"a": 1},
        "made": {"b": 2},
        "outcome": "success",
        "failure": None,
        "usage": None,
        "position": 0,
        "branch": "",
        "group": None,
        "schemas": None,
        "children": None,
    }
    fields["function"] = changed.get("took", fields["took"])
    assert changed.keys() <= fields.keys()
    return AttemptRow(node_id, *(fields | changed).values())


def failed(node_id: str = "node", **changed: Any) -> AttemptRow:
    return row(node_id, **{"made": None, "outcome": "failure", "failure": FAILED, **changed})


def event(node_id: str = "node", **changed: Any) -> TraceEvent:
    """The event of row(), of a run that is called "run"."""
    fields: dict[str, Any] = {
        "run_id": "run",
        "attempt": 1,
        "timestamp_utc": WHEN,
        "input_state": {"a": 1},
        "output_state": {"b": 2},
        "duration_ms": 5,
        "function_ms": changed.get("duration_ms", 5),
    }
    return TraceEvent(node_id=node_id, **(fields | changed))


def failed_event(node_id: str = "node", **changed: Any) -> TraceEvent:
    what = {
        "failure": FAILED[0],
        "failure_message": "it broke",
        "reason": "rate_limit",
        "error_type": "OSError",
    }
    return event(node_id, **{"output_state": None, "outcome": "failure", **what, **changed})


def trace(*rows: Any) -> ExecutionTrace:
    instance = ExecutionTrace("run")
    instance.rows.extend(rows)
    return instance
