"""Statuses, and decisions that are the same in all stores: about a submission, an answer, a message."""

from __future__ import annotations

from typing import Final

from stroma.checkpoint.entries import RunRequest, Waiting
from stroma.checkpoint.errors import RequestRefused, RunExists
from stroma.checkpoint.queue import COMPLETE, QUEUED

#: Statuses of executions that cancel() cannot change any more, and of those after which a new execution may
#: follow unasked.
ENDED: Final = (*COMPLETE, "FAILED", "CANCELLED")
GIVEN_UP: Final = (*ENDED, "PARTIAL")
#: Statuses of executions without an owner and an end, which may have a time from which they are due.
UNFINISHED: Final = ("SUSPENDED", "INTERRUPTED", QUEUED)
#: Statuses of executions that have not ended, nor been given up.
OPEN: Final = ("RUNNING", *UNFINISHED)
#: In place of 0, from when on a run is due that was sent a message while it ran: only if its session has not
#: read it.
MESSAGE_SENT: Final = 1
#: A fork that its process does not open in this time is due.
FORK_DUE_MS: Final = 60_000


def check_resubmission(
    request: RunRequest, pipeline: str, same_input: bool, execution: int, status: str
) -> None:
    """Raise RunExists for a run that exists with another pipeline or input than it is submitted with."""
    if request.pipeline == pipeline and same_input:
        return
    what = "input" if request.pipeline == pipeline else "pipeline"
    raise RunExists(
        f"run {request.run_id!r} already exists with another {what} (execution {execution}, {status}); use "
        "another run id"
    )


def has_expired(status: str, expires_ms: int | None, now_ms: int) -> bool:
    """Return True if a queued run may no longer start."""
    return status == QUEUED and expires_ms is not None and now_ms > expires_ms


def expired_error(run_id: str) -> str:
    """Return the error of a run that did not start before its time was over."""
    return (
        f"expired: run {run_id!r} was not started in time; start more workers and resume it, or submit "
        "another run with a later expires="
    )


def is_answered(stored: Waiting | None, question: Waiting) -> bool:
    """Return True if the question that a session stores has an answer already."""
    return stored is not None and stored.payload is not None and stored.number == question.number


def takes_no_message(run_id: str, status: str) -> RequestRefused:
    """Return the error for a message to a run that has ended."""
    return RequestRefused(
        f"run {run_id!r} has ended ({status}), and takes no message; send it to another run"
    )


def other_message(run_id: str, message_id: str) -> RequestRefused:
    """Return the error for a message with the id of another one."""
    return RequestRefused(
        f"run {run_id!r} was sent another message with the id {message_id!r}; send this one with another id"
    )


def not_waiting(run_id: str, question_id: str, stored: Waiting | None) -> RequestRefused:
    """Return the error for an answer to a question that is not open. ``stored``: the one at its place."""
    number = question_id.rpartition(":")[2]
    if stored is not None and stored.id == question_id:
        why = "it has another answer, and an accepted answer cannot be changed"
        if not stored.is_answered:
            why = "the run no longer waits for its answer"
        return RequestRefused(
            f"question {question_id!r} of run {run_id!r} is not open: {why}; see its questions with "
            "`stroma show`"
        )
    if stored is not None and number.isdecimal() and int(number) < stored.number:
        return RequestRefused(
            f"question {question_id!r} of run {run_id!r} is not open: {stored.id!r} was asked there later; "
            "answer that one, or resume the run"
        )
    return RequestRefused(
        f"run {run_id!r} has no question {question_id!r}: its last execution did not ask it; pass an id from "
        "result.questions"
    )
