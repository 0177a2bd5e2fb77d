"""What a durable store keeps of a run beside its commits: what nodes wait for, and end hooks that may not have been told."""

from __future__ import annotations

import json
from typing import cast

from stroma.checkpoint._rows import DUE, WAITING, Attempt, Rows, Step, StepRow, checksum, intact, text
from stroma.checkpoint.journal import Waiting
from stroma.checkpoint.payloads import Payloads
from stroma.checkpoint.records import PICO
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage, Outcome, Row

__all__ = ["due_key", "keep_due", "keep_waiting", "read_due", "read_waiting", "waiting_branch"]


def due_key(attempt: Attempt) -> str:
    return f"{attempt.position}:{attempt.started_ns}:{attempt.attempt}:{attempt.branch}"


def keep_due(rows: Rows, run_id: str, attempt: Attempt) -> None:
    # All that its hooks are to be told, but for its output: that stands with its commit.
    data = json.dumps(attempt._asdict()).encode()
    rows.keep(run_id, DUE, due_key(attempt), attempt.node_id, Step("", "", data, checksum(data)))


def read_due(kept: StepRow) -> Row | None:
    """What :func:`keep_due` noted, as the row that it was made of; None for what is damaged."""
    if not intact(kept.step.output, kept.step.sha256):
        return None
    try:
        found = Attempt(**json.loads(kept.step.output))
        usage = AttemptUsage(found.tokens, found.output_tokens, found.cost_pico / PICO, found.model)
        failed = None
        if found.failure_class is not None:
            failed = (FailureClass(found.failure_class), found.message or "", found.reason)
        elif found.message is not None:
            failed = (FailureClass.RECOVERABLE, found.message, found.reason)  # Why it waits.
    except (TypeError, ValueError):
        return None
    return (
        found.node_id, found.attempt, found.started_ns, found.duration_ns, {}, None,
        cast("Outcome", found.outcome), failed, usage, found.position, found.branch, found.group_id, None, None,
        found.function_ns,
    )  # fmt: skip


def keep_waiting(rows: Rows, run_id: str, waiting: Waiting) -> None:
    """Note what a node waits for, or the answer."""
    data = waiting.payload or b""
    number = None if waiting.payload is None else 1
    step = Step(text(waiting.reason) or "", waiting.schema_ref, data, checksum(data), number)
    rows.keep(run_id, WAITING, waiting_branch(waiting), waiting.node_id, step)


def waiting_branch(waiting: Waiting) -> str:
    """Where :func:`keep_waiting` keeps it."""
    return f"{waiting.position}:{waiting.branch}"


def read_waiting(kept: StepRow, payloads: Payloads) -> Waiting | None:
    """What :func:`keep_waiting` noted; None for what it did not."""
    position, _, branch = kept.branch.partition(":")
    step = kept.step
    if not position.isdecimal() or not intact(step.output, step.sha256):
        return None
    payload = None
    if step.number is not None:
        payload = payloads.open(step.output, f"the answer for node {kept.node_id!r}")
    return Waiting(int(position), branch, kept.node_id, step.contract, step.schema_ref, payload)
