"""Trace and result of a run, redaction, and how they are shown."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.failures.classes import FailureClass
    from stroma.trace.events import AttemptUsage, TraceEvent, TraceMark
    from stroma.trace.result import ExecutionResult, Question, RunStatus
    from stroma.trace.trace import ExecutionTrace

__all__ = [
    "AttemptUsage",
    "ExecutionResult",
    "ExecutionTrace",
    "FailureClass",
    "Question",
    "RunStatus",
    "TraceEvent",
    "TraceMark",
]

_HOMES = {
    "AttemptUsage": "trace.events",
    "ExecutionResult": "trace.result",
    "ExecutionTrace": "trace.trace",
    "FailureClass": "failures.classes",
    "Question": "trace.result",
    "RunStatus": "trace.result",
    "TraceEvent": "trace.events",
    "TraceMark": "trace.events",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
