"""Messages to a run. Each is an annotation by its number, which is one more than that of the message before.

The annotation of an id has the number of its message, and :data:`_LAST` that of the last one. None of them
changes.
"""

from __future__ import annotations

from typing import Final

from stroma.checkpoint.decisions import ENDED, MESSAGE_SENT, add_news, other_message, takes_no_message
from stroma.checkpoint.durable.annotations import RunRecords, name_of
from stroma.checkpoint.durable.rows import Annotation, RunRow, Step, StepRow
from stroma.checkpoint.entries import SentMessage
from stroma.checkpoint.payloads import PayloadPlace

__all__ = ["add_message", "last_number", "note_last", "read_messages"]

_LAST: Final = "last"
#: From so many new messages on, all of the run are read at once.
_MANY: Final = 5


def add_message(records: RunRecords, run: RunRow, message: SentMessage) -> None:
    """Store a message to a locked run, unless it is stored, and make the run due. Raises StoreError."""
    known = records.one(Annotation.MESSAGE, f"id {message.id}")
    if known is not None:
        stored = records.one(Annotation.MESSAGE, _key(known.step.number or 0))
        if stored is None or not _open(records, stored).is_same_as(message):
            raise other_message(run.run_id, message.id)
        return
    if run.status in ENDED:
        raise takes_no_message(run.run_id, run.status)
    number = last_number(records) + 1
    sealed = records.payloads.seal_now(message.payload, _place(records, number))
    step = Step("", message.id, sealed, b"", number)
    records.put(Annotation.MESSAGE, _key(number), message.topic, step)
    _note_number(records, f"id {message.id}", number)
    note_last(records, number)
    if run.status == "SUSPENDED":
        records.rows.wake(run)
    elif run.status == "RUNNING":
        records.rows.wake(run, add_news(run.wake_ms, MESSAGE_SENT))


def read_messages(records: RunRecords, after: int) -> tuple[int, list[SentMessage]]:
    """Return the number of the last message to a run, and the messages after a number. Raises StoreError."""
    last = last_number(records)
    if last - after < _MANY:
        keys = map(_key, range(after + 1, last + 1))
        numbered = [records.one(Annotation.MESSAGE, key) for key in keys]
    else:
        numbered = [
            row
            for row in records.all(Annotation.MESSAGE)
            if row.branch.isdecimal() and int(row.branch) > after
        ]
    return last, [_open(records, row) for row in numbered if row is not None]


def last_number(records: RunRecords) -> int:
    """Return the number of the last message to a run; 0 if there is none. Raises CorruptCheckpoint."""
    row = records.one(Annotation.MESSAGE, _LAST)
    return 0 if row is None else row.step.number or 0


def note_last(records: RunRecords, number: int) -> None:
    """Record the number of the last message to a run."""
    _note_number(records, _LAST, number)


def _note_number(records: RunRecords, branch: str, number: int) -> None:
    records.put(Annotation.MESSAGE, branch, "", Step("", "", b"", b"", number))


def _key(number: int) -> str:
    return f"{number:012d}"


def _place(records: RunRecords, number: int) -> PayloadPlace:
    return records.place("sent message", 0, _key(number))


def _open(records: RunRecords, row: StepRow) -> SentMessage:
    number, name = row.step.number or 0, str(name_of(row, records.run_id))
    payload = records.payloads.open(row.step.output, _place(records, number), name)
    return SentMessage(number, row.node_id, row.step.schema_ref, payload)
