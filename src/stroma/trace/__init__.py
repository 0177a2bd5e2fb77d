"""Trace and result of a run, redaction, and how they are shown."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.failures.classes import FailureClass as FailureClass
    from stroma.trace.events import AttemptUsage as AttemptUsage
    from stroma.trace.events import TraceEvent as TraceEvent
    from stroma.trace.events import TraceMark as TraceMark
    from stroma.trace.result import ExecutionResult as ExecutionResult
    from stroma.trace.result import Question as Question
    from stroma.trace.result import RunStatus as RunStatus
    from stroma.trace.trace import ExecutionTrace as ExecutionTrace

_HOMES = {
    "failures.classes": ("FailureClass",),
    "trace.events": ("AttemptUsage", "TraceEvent", "TraceMark"),
    "trace.result": ("ExecutionResult", "Question", "RunStatus"),
    "trace.trace": ("ExecutionTrace",),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
