"""What a durable store keeps of a run beside its commits: what nodes wait for, and end hooks that may not have been told."""

from __future__ import annotations

import json
from typing import cast

from stroma.checkpoint.durable.integrity import checksum, is_intact, storable_text
from stroma.checkpoint.durable.rows import Annotation, Rows, Step, StepRow
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import PICO, Attempt
from stroma.failures.classes import FailureClass
from stroma.trace.events import AttemptRow, AttemptUsage, Failed, Outcome

__all__ = [
    "answer_place",
    "due_hooks_key",
    "read_due_hooks",
    "read_waiting",
    "record_due_hooks",
    "record_waiting",
    "waiting_key",
]


def due_hooks_key(attempt: Attempt) -> str:
    return f"{attempt.position}:{attempt.started_ns}:{attempt.attempt}:{attempt.branch}"


def record_due_hooks(rows: Rows, run_id: str, attempt: Attempt) -> None:
    # All that its hooks are to be told, but for its output: that stands with its commit.
    data = json.dumps(attempt._asdict()).encode()
    rows.annotate(
        run_id,
        Annotation.DUE_HOOKS,
        due_hooks_key(attempt),
        attempt.node_id,
        Step("", "", data, checksum(data)),
    )


def read_due_hooks(kept: StepRow, run_id: str, execution: int, payloads: Payloads) -> AttemptRow | None:
    """Return what :func:`record_due_hooks` saved, as the row that it was made of; None for what is damaged."""
    if not is_intact(kept.step.output, kept.step.sha256):
        return None
    try:
        found = Attempt(**json.loads(kept.step.output))
        place = PayloadPlace(run_id, execution, "message", found.position, found.branch)
        found = found._replace(message=payloads.open_text(found.message, place))
        usage = AttemptUsage(found.tokens, found.output_tokens, found.cost_pico / PICO, found.model)
        failed = None
        if found.failure_class is not None:
            failed = Failed(
                FailureClass(found.failure_class), found.message or "", found.reason, found.error_type
            )
        elif found.message is not None:
            failed = Failed(FailureClass.RECOVERABLE, found.message, found.reason)  # Why it waits.
    except (TypeError, ValueError):
        return None
    return AttemptRow(
        found.node_id, found.attempt, found.started_ns, found.duration_ns, {}, None,
        cast("Outcome", found.outcome), failed, usage, found.position, found.branch, found.group_id, None, None,
        found.function_ns,
    )  # fmt: skip


def record_waiting(rows: Rows, run_id: str, execution: int, waiting: Waiting, payloads: Payloads) -> None:
    """Save what a node waits for, or the answer."""
    data, number = b"", None
    if waiting.payload is not None:
        data, number = payloads.seal_now(waiting.payload, answer_place(run_id, execution, waiting)), 1
    place = PayloadPlace(run_id, execution, "question", waiting.position, waiting.branch)
    question = payloads.seal_text(storable_text(waiting.reason), place)
    step = Step(question or "", waiting.schema_ref, data, checksum(data), number)
    rows.annotate(run_id, Annotation.WAITING, waiting_key(waiting), waiting.node_id, step)


def waiting_key(waiting: Waiting) -> str:
    """Where :func:`record_waiting` keeps it."""
    return f"{waiting.position}:{waiting.branch}"


def answer_place(run_id: str, execution: int, waiting: Waiting) -> PayloadPlace:
    """Return the place of an answer: one question's, so that it answers no other one that is asked there."""
    question = f"answer\0{waiting.schema_ref}\0{storable_text(waiting.reason)}"
    return PayloadPlace(run_id, execution, question, waiting.position, waiting.branch)


def read_waiting(kept: StepRow, run_id: str, execution: int, payloads: Payloads) -> Waiting | None:
    """Return what :func:`record_waiting` saved; None for anything else."""
    number, _, branch = kept.branch.partition(":")
    step = kept.step
    if not number.isdecimal() or not is_intact(step.output, step.sha256):
        return None
    position = int(number)
    reason = payloads.open_text(step.contract, PayloadPlace(run_id, execution, "question", position, branch))
    waiting = Waiting(position, branch, kept.node_id, reason or "", step.schema_ref)
    if step.number is None:
        return waiting
    place = answer_place(run_id, execution, waiting)
    return waiting._replace(
        payload=payloads.open(step.output, place, f"the answer for node {kept.node_id!r}")
    )
