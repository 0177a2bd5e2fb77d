"""Annotations of a run besides its commits: pending approvals, and end hooks that may not have been called."""

from __future__ import annotations

import json
from typing import Any, TypeAlias, cast

from stroma.checkpoint.durable.integrity import checksum, is_intact, storable_text
from stroma.checkpoint.durable.rows import Annotation, Rows, Step, StepRow
from stroma.checkpoint.entries import UnknownCall, Waiting, is_effect_note
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.records import PICO, Attempt
from stroma.failures.classes import FailureClass
from stroma.trace.events import AttemptRow, AttemptUsage, Failed, Outcome
from stroma.trace.rejected import RejectedOutput, read_rejected

__all__ = [
    "Notes",
    "answer_place",
    "due_hooks_key",
    "open_rejected",
    "read_due_hooks",
    "read_notes",
    "read_waiting",
    "record_due_hooks",
    "record_notes",
    "record_rejected",
    "record_waiting",
    "rejected_key",
    "waiting_key",
]


#: Data by the kind of annotation, NOTE or EFFECT, and its key; None deletes it.
Notes: TypeAlias = dict[tuple[Annotation, str], bytes | None]


def due_hooks_key(attempt: Attempt) -> str:
    """Return the key of an attempt's pending end hooks."""
    return f"{attempt.position}:{attempt.started_ns}:{attempt.attempt}:{attempt.branch}"


def record_due_hooks(rows: Rows, run_id: str, attempt: Attempt) -> None:
    """Record that the end hooks of an attempt are pending."""
    # The arguments of its hooks, except the output, which is stored with its commit.
    data = json.dumps(attempt._asdict()).encode()
    rows.annotate(
        run_id,
        Annotation.DUE_HOOKS,
        due_hooks_key(attempt),
        attempt.node_id,
        Step("", "", data, checksum(data)),
    )


def read_due_hooks(row: StepRow, run_id: str, execution: int, payloads: Payloads) -> AttemptRow | None:
    """Return the row that :func:`record_due_hooks` stored; None if it is damaged."""
    if not is_intact(row.step.output, row.step.sha256):
        return None
    try:
        attempt = Attempt(**json.loads(row.step.output))
        place = PayloadPlace(run_id, execution, "message", attempt.position, attempt.branch)
        attempt = attempt._replace(message=payloads.open_text(attempt.message, place))
        usage = AttemptUsage(attempt.tokens, attempt.output_tokens, attempt.cost_pico / PICO, attempt.model)
        failed = None
        if attempt.failure_class is not None:
            failed = Failed(
                FailureClass(attempt.failure_class), attempt.message or "", attempt.reason, attempt.error_type
            )
        elif attempt.message is not None:
            failed = Failed(
                FailureClass.RECOVERABLE, attempt.message, attempt.reason
            )  # The reason of a suspension.
    except (TypeError, ValueError):
        return None
    return AttemptRow(
        attempt.node_id, attempt.attempt, attempt.started_ns, attempt.duration_ns, {}, None,
        cast("Outcome", attempt.outcome), failed, usage, attempt.position, attempt.branch, attempt.group_id, None, None,
        attempt.function_ns,
    )  # fmt: skip


def record_waiting(rows: Rows, run_id: str, execution: int, waiting: Waiting, payloads: Payloads) -> None:
    """Store the question that a node waits for, or its answer."""
    data, number = b"", None
    if waiting.payload is not None:
        data, number = payloads.seal_now(waiting.payload, answer_place(run_id, execution, waiting)), 1
    place = PayloadPlace(run_id, execution, "question", waiting.position, waiting.branch)
    effect = waiting.effect and waiting.effect._replace(cause=storable_text(waiting.effect.cause) or "")
    question = payloads.seal_text(json.dumps([storable_text(waiting.reason), effect]), place)
    step = Step(question or "", waiting.schema_ref, data, checksum(data), number)
    rows.annotate(run_id, Annotation.WAITING, waiting_key(waiting), waiting.node_id, step)


def waiting_key(waiting: Waiting) -> str:
    """Return the branch of the annotation for an approval."""
    return f"{waiting.position}:{waiting.branch}"


def answer_place(run_id: str, execution: int, waiting: Waiting) -> PayloadPlace:
    """Return the place of an answer. It includes the question, so that the answer fits no other question."""
    question = f"answer\0{waiting.schema_ref}\0{waiting.call_number}\0{storable_text(waiting.reason)}"
    return PayloadPlace(run_id, execution, question, waiting.position, waiting.branch)


def read_waiting(row: StepRow, run_id: str, execution: int, payloads: Payloads) -> Waiting | None:
    """Return the approval that :func:`record_waiting` stored; None for anything else."""
    number, _, branch = row.branch.partition(":")
    step = row.step
    if not number.isdecimal() or not is_intact(step.output, step.sha256):
        return None
    position = int(number)
    question = payloads.open_text(
        step.contract, PayloadPlace(run_id, execution, "question", position, branch)
    )
    try:
        reason, effect = json.loads(question or "")
        unknown = None if effect is None else UnknownCall(*effect)
    except (TypeError, ValueError):
        return None
    waiting = Waiting(position, branch, row.node_id, reason, step.schema_ref, None, unknown)
    if step.number is None:
        return waiting
    place = answer_place(run_id, execution, waiting)
    return waiting._replace(payload=payloads.open(step.output, place, f"the answer for node {row.node_id!r}"))


def record_rejected(
    rows: Rows, run_id: str, execution: int, attempt: Attempt, data: bytes, payloads: Payloads
) -> None:
    """Store the output of an attempt that broke its contract."""
    key = rejected_key(attempt.position, attempt.branch, attempt.started_ns)
    # As a text: one that cannot be opened later must not hide the attempt.
    sealed = payloads.seal_text(data.decode(), PayloadPlace(run_id, execution, "rejected", 0, key)) or ""
    stored = sealed.encode()
    rows.annotate(run_id, Annotation.REJECTED, key, attempt.node_id, Step("", "", stored, checksum(stored)))


def rejected_key(position: int, branch: str, started_ns: int) -> str:
    """Return the branch of the annotation for a rejected output."""
    return f"{position}:{started_ns}:{branch}"


def open_rejected(row: StepRow, run_id: str, execution: int, payloads: Payloads) -> RejectedOutput | None:
    """Return the rejected output that :func:`record_rejected` stored; None if it cannot be read."""
    if not is_intact(row.step.output, row.step.sha256):
        return None
    place = PayloadPlace(run_id, execution, "rejected", 0, row.branch)
    text = payloads.open_text(row.step.output.decode("utf-8", "replace"), place)
    return None if text is None else read_rejected(text)


def record_notes(rows: Rows, run: Any, run_id: str, execution: int, notes: Notes, payloads: Payloads) -> None:
    """Store notes; delete those without data."""
    for (kind, key), data in notes.items():
        if data is None:
            rows.delete_annotations(run, kind, key)
        else:
            sealed = payloads.seal_now(data, PayloadPlace(run_id, execution, "note", 0, key))
            rows.annotate(run_id, kind, key, "note", Step("", "", sealed, checksum(sealed)))


def read_notes(
    rows: Rows, run: Any, run_id: str, execution: int, payloads: Payloads, first: int | None
) -> dict[str, bytes]:
    """Return the notes of an execution by key, and delete those of positions from ``first`` on, except those of effects.

    Raises StoreError.
    """
    notes: dict[str, bytes] = {}
    for row in list(rows.annotations(run, Annotation.NOTE)):
        key, step = row.branch, row.step
        if first is not None and int(key.partition(":")[0]) >= first and not is_effect_note(key):
            rows.delete_annotations(run, Annotation.NOTE, key)
            continue
        if not is_intact(step.output, step.sha256):
            raise CorruptCheckpoint(f"note {key!r} of run {run_id!r} is damaged; start a new run")
        place = PayloadPlace(run_id, execution, "note", 0, key)
        notes[key] = payloads.open(step.output, place, f"note {key!r} of run {run_id!r}")
    return notes
