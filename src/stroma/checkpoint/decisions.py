"""Decisions that are the same in all stores: about an existing run, and about an answer to a question."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from stroma._utils.text import pluralize
from stroma.checkpoint.entries import RunRequest, Waiting
from stroma.checkpoint.errors import PipelineChanged, RequestRefused, RunBusy, RunExists
from stroma.checkpoint.queue import QUEUED

#: Statuses of completed executions, of those that cancel() cannot change any more, and of those after which a
#: new execution may follow unasked.
COMPLETE: Final = ("COMPLETED", "RESUMED")
ENDED: Final = (*COMPLETE, "FAILED", "CANCELLED")
_GIVEN_UP: Final = (*ENDED, "PARTIAL")
#: Statuses of executions without an owner and an end, which may have a time from which they are due.
UNFINISHED: Final = ("SUSPENDED", "INTERRUPTED", QUEUED)
#: In place of 0, from when on a run is due that was sent a message while it ran: only if its session has not
#: read it.
MESSAGE_SENT: Final = 1
#: A fork that its process does not open in this time is due.
FORK_DUE_MS: Final = 60_000


class LastExecution(NamedTuple):
    """The last execution of a run.

    Attributes:
        holder: description of the process that is running it; None if there is none.
        claim: token of the worker that has claimed it; None if there is no claim, or it has expired.
        wake_ms: see :class:`stroma.checkpoint.durable.rows.RunRow`.
        pipeline, version: as it began; "" without a version.
    """

    execution: int
    status: str
    holder: str | None = None
    left_seconds: float = 0.0
    wake_ms: int | None = None
    claim: str | None = None
    pipeline: str = ""
    version: str = ""


class PriorWork(NamedTuple):
    """Records of a run that a new execution discards, and effects that it may call again.

    Attributes:
        nodes: number of committed nodes.
        questions, answers: number of questions without and with an answer.
        effects: ids of the nodes whose effect was called, in any execution.
    """

    nodes: int
    questions: int
    answers: int
    effects: tuple[str, ...]

    def refusal(self, run_id: str, status: str) -> RunExists:
        """Return the error for a run that starts again only on request."""
        counts = (
            (self.nodes, "committed node"),
            (self.questions, "open question"),
            (self.answers, "answered question"),
        )
        has_ended = status in _GIVEN_UP
        lost = [] if has_ended else [pluralize(number, noun) for number, noun in counts if number]
        harm = [f"would discard {', '.join(lost)}"] if lost else []
        if self.effects:
            harm.append(f"may call the effect of {', '.join(map(repr, self.effects))} again")
        why = f"; a new execution {' and '.join(harm)}" if harm else ""
        return RunExists(
            f"run {run_id!r} {'has a recorded effect' if has_ended else 'has not ended'} ({status}){why}; "
            'pass resume=True to continue it, or if_exists="restart" to run it from the start'
        )


def is_due(last: LastExecution, now_ms: int) -> bool:
    """Return True if a worker may continue a run: its owner is gone, or it stopped and its time has come."""
    if last.status == "RUNNING":
        return last.holder is None
    return last.status in UNFINISHED and last.wake_ms is not None and last.wake_ms <= now_ms


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
        f"expired: run {run_id!r} was not started in time; start more workers, or submit it again with a "
        "later expires="
    )


def decide(
    request: RunRequest, last: LastExecution, same_input: bool, prior_work: Callable[[], PriorWork]
) -> Literal["begin", "continue", "return"]:
    """Return what to do with the last execution. Raises RunBusy, RunExists, PipelineChanged.

    Args:
        prior_work: called for a request that begins a new execution only if nothing is lost.
    """
    if last.holder is not None and request.if_running != "take_over":
        what = "" if same_input else " with another input"
        left = max(last.left_seconds, 0.0)
        lease = f" (lease expires in {left:.1f} s)" if math.isfinite(left) else ""
        error = RunBusy(
            f"run {request.run_id!r} is already running{what} in {last.holder}{lease}; "
            'pass if_running="attach" to wait for its result, or use another run id'
        )
        error.holder, error.left_seconds, error.same_input = last.holder, last.left_seconds, same_input
        raise error
    if request.claim is not None and request.claim != last.claim:
        raise RunExists(
            f"run {request.run_id!r} is no longer claimed by this worker; another one may continue it"
        )
    if request.due_ms is not None and not is_due(last, request.due_ms):
        raise RunExists(f"run {request.run_id!r} is not due, its status is {last.status}; resume it instead")
    if request.if_exists == "read":
        if last.status in ("RUNNING", "INTERRUPTED", QUEUED):
            raise RunExists(
                f"run {request.run_id!r} has neither ended nor been suspended, its status is "
                f"{last.status}; wait for it"
            )
        return "return"
    if request.if_exists == "error":
        raise RunExists(
            f"run {request.run_id!r} already exists (execution {last.execution}, {last.status}); use another "
            'run id, or pass if_exists="resume", "return" or "restart"'
        )
    if request.if_exists == "new":
        lost = prior_work()
        if last.status not in _GIVEN_UP or lost.effects:
            raise lost.refusal(request.run_id, last.status)
        return "begin"
    if request.if_exists == "restart":
        return "begin"
    if request.discard_from is None and not (same_input or request.any_input):
        raise PipelineChanged(
            f"run {request.run_id!r} was started with another input (or {request.schema.model.__name__} has "
            "changed); pass the same input, or use another run id"
        )
    finished = last.status in COMPLETE
    if request.if_exists == "attach":  # An owner that died is continued.
        finished = last.status != "RUNNING"
    if finished and request.if_exists in ("return", "attach"):
        return "return"
    if request.versions is not None and last.version not in ("", *request.versions):
        raise _other_version(request, last)
    return "continue"


def _other_version(request: RunRequest, last: LastExecution) -> PipelineChanged:
    """Return the error for a run whose version the code cannot continue."""
    served = " and ".join(map(repr, request.versions or ())) or "no version"
    return PipelineChanged(
        f"run {request.run_id!r} started with version {last.version!r} of pipeline {last.pipeline!r}, and "
        f"this code serves {served}; resume it with code of that version, or pass "
        f"accepts=({last.version!r},) and keep its steps"
    )


def is_answered(stored: Waiting | None, question: Waiting) -> bool:
    """Return True if the question that a session stores has an answer: an accepted answer stays."""
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
        why = "it has another answer, and an accepted answer stays"
        if not stored.is_answered:
            why = "the run no longer waits for its answer"
        return RequestRefused(f"question {question_id!r} of run {run_id!r} is not open: {why}")
    if stored is not None and number.isdecimal() and int(number) < stored.number:
        return RequestRefused(
            f"question {question_id!r} of run {run_id!r} is not open: {stored.id!r} was asked there later; "
            "answer that one, or resume the run"
        )
    return RequestRefused(
        f"run {run_id!r} has no question {question_id!r}: its last execution did not ask it; pass an id from "
        "result.questions"
    )
