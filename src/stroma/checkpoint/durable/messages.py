"""Messages to a run. Each is an annotation by its number, which is one more than that of the message before.

The annotation of an id has the number of its message, and :data:`_LAST` that of the last one. None of them
changes.
"""

from __future__ import annotations

from typing import Any, Final

from stroma.checkpoint.decisions import (
    ENDED,
    MESSAGE_SENT,
    add_news,
    other_message,
    takes_no_message,
)
from stroma.checkpoint.durable.annotations import annotate, name_of, read_annotation, read_annotations
from stroma.checkpoint.durable.rows import Annotation, Rows, RunRow, Step, StepRow
from stroma.checkpoint.entries import SentMessage
from stroma.checkpoint.payloads import PayloadPlace, Payloads

__all__ = ["add_message", "last_number", "note_last", "read_messages"]

_LAST: Final = "last"
#: From so many new messages on, all of the run are read at once.
_MANY: Final = 5


def add_message(rows: Rows, payloads: Payloads, run: RunRow, message: SentMessage) -> None:
    """Store a message to a locked run, unless it is stored, and make the run due. Raises StoreError."""
    known = _read(rows, run.run, run.run_id, f"id {message.id}")
    if known is not None:
        stored = _read(rows, run.run, run.run_id, _key(known.step.number or 0))
        if stored is None or not _open(stored, run, payloads).is_same_as(message):
            raise other_message(run.run_id, message.id)
        return
    if run.status in ENDED:
        raise takes_no_message(run.run_id, run.status)
    number = last_number(rows, run.run, run.run_id) + 1
    sealed = payloads.seal_now(message.payload, _place(run, number))
    step = Step("", message.id, sealed, b"", number)
    annotate(rows, run.run_id, Annotation.MESSAGE, _key(number), message.topic, step)
    _note_number(rows, run.run_id, f"id {message.id}", number)
    note_last(rows, run.run_id, number)
    if run.status == "SUSPENDED":
        rows.wake(run)
    elif run.status == "RUNNING":
        rows.wake(run, add_news(run.wake_ms, MESSAGE_SENT))


def read_messages(rows: Rows, run: RunRow, after: int, payloads: Payloads) -> tuple[int, list[SentMessage]]:
    """Return the number of the last message to a run, and the messages after a number. Raises StoreError."""
    last = last_number(rows, run.run, run.run_id)
    if last - after < _MANY:
        numbered = [_read(rows, run.run, run.run_id, _key(number)) for number in range(after + 1, last + 1)]
    else:
        numbered = [
            row
            for row in read_annotations(rows, run.run, run.run_id, Annotation.MESSAGE)
            if row.branch.isdecimal() and int(row.branch) > after
        ]
    return last, [_open(row, run, payloads) for row in numbered if row is not None]


def last_number(rows: Rows, run: Any, run_id: str) -> int:
    """Return the number of the last message to a run; 0 if there is none. Raises CorruptCheckpoint."""
    row = _read(rows, run, run_id, _LAST)
    return 0 if row is None else row.step.number or 0


def note_last(rows: Rows, run_id: str, number: int) -> None:
    """Record the number of the last message to a run."""
    _note_number(rows, run_id, _LAST, number)


def _note_number(rows: Rows, run_id: str, branch: str, number: int) -> None:
    annotate(rows, run_id, Annotation.MESSAGE, branch, "", Step("", "", b"", b"", number))


def _read(rows: Rows, run: Any, run_id: str, branch: str) -> StepRow | None:
    return read_annotation(rows, run, run_id, Annotation.MESSAGE, branch)


def _key(number: int) -> str:
    return f"{number:012d}"


def _place(run: RunRow, number: int) -> PayloadPlace:
    return PayloadPlace(run.run_id, run.execution, "sent message", 0, _key(number))


def _open(row: StepRow, run: RunRow, payloads: Payloads) -> SentMessage:
    number, name = row.step.number or 0, str(name_of(row, run.run_id))
    payload = payloads.open(row.step.output, _place(run, number), name)
    return SentMessage(number, row.node_id, row.step.schema_ref, payload)
