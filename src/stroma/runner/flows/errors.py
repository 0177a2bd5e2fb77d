"""Exceptions that the body of a flow meets."""

from __future__ import annotations

import asyncio
from typing import Any

from stroma.failures.failure import Failure, text_of

__all__ = ["FlowClosed", "StepFailed"]


class StepFailed(Exception):
    """A step of a flow stopped for good, after its last attempt.

    Attributes:
        failure: class, reason, message and node id of the last failure: the same live and on replay. Its
            exception, which is the ``__cause__`` too, is the original one only in the process in which the
            step failed.
        path: the flows around the step, from the outermost inwards, then the step: ``("triage", "lookup")``.

    Where: out of ``flow.step``, ``flow.map`` and ``flow.run``, in the body of a flow.
    Cause: the step failed, and its retry policy grants no further attempt.
    Fix: catch it to continue without the step; uncaught, it ends the run, and a resume tries the step again.
    """

    def __init__(self, failure: Failure, path: tuple[str, ...] = ()) -> None:
        super().__init__(f"step {failure.node_id!r} failed: {text_of(failure)}")
        self.failure = failure
        self.path = path
        #: Number of the event that it is in its flow; 0 for the failure of a flow inside.
        self.event = 0

    def __reduce__(self) -> Any:
        return StepFailed, (self.failure, self.path)


class FlowClosed(asyncio.CancelledError):
    """A flow was used while it is being suspended or stopped, by a body or a task that goes on although it was cancelled.

    No ``except Exception`` catches it: the body is to end.
    """
