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
    "failures.classes": ("FailureClass",),
    "trace.events": ("AttemptUsage", "TraceEvent", "TraceMark"),
    "trace.result": ("ExecutionResult", "Question", "RunStatus"),
    "trace.trace": ("ExecutionTrace",),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
