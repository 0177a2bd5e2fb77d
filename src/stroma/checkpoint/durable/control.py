"""Requests about a run from any process: cancel, pause, change the budget; messages to it.

Each request is a separate annotation, so that none overwrites another. The owner, or the process that opens
the run next, applies it: a request that is no longer pending was read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from stroma.checkpoint.decisions import ENDED, MESSAGE_SENT, other_message, takes_no_message
from stroma.checkpoint.decoding import decode_json, decode_number
from stroma.checkpoint.durable.annotations import RunRecords, name_of
from stroma.checkpoint.durable.rows import Annotation, RunRow, Step, StepRow
from stroma.checkpoint.entries import RunControl, SentMessage
from stroma.checkpoint.payloads import PayloadPlace
from stroma.checkpoint.queue import QUEUED

#: Keys of requests. That of a budget ends with its number: the last one counts.
CANCEL: Final = "cancel"
PAUSE: Final = "pause"
_BUDGET: Final = "budget"
BudgetField = Literal["max_tokens_total", "max_cost_usd", "max_latency_ms"]
#: Requests that an owner has read, and those that none has.
KINDS: Final = (Annotation.CONTROL, Annotation.REQUEST)


def request(records: RunRecords, key: str, data: bytes = b"", number: int | None = None) -> None:
    """Store a request about an existing run."""
    records.put(Annotation.REQUEST, key, key, Step("", "", data, b"", number))


def request_pause(records: RunRecords, run: RunRow) -> None:
    """Store a request for a pause. The one of a queued run has its due time as its number."""
    request(records, PAUSE, number=run.wake_ms if run.status == QUEUED else paused_due_ms(records))


def paused_due_ms(records: RunRecords) -> int | None:
    """Return the due time of a run that was paused before it started, in ms since the epoch."""
    return next((row.step.number for row in records.all(*KINDS, branch=PAUSE)), None)


def request_budget(records: RunRecords, limits: Mapping[str, float]) -> None:
    """Store a request for other limits, by field of ExecutionBudget, about a locked run."""
    numbers = [_budget_number(row, records.run_id) for row in records.all(*KINDS)]
    key = f"{_BUDGET} {max(numbers, default=0) + 1:09d}"
    request(records, key, json.dumps(dict(limits)).encode())


def read_control(records: RunRecords) -> RunControl:
    """Return all requests about a run, read or not. Raises CorruptCheckpoint."""
    return to_control(records.all(*KINDS), records.run_id)


def accept_requests(records: RunRecords) -> RunControl | None:
    """Apply the pending requests. Return all that apply; None if none was pending.

    Raises CorruptCheckpoint.
    """
    pending = records.all(Annotation.REQUEST)
    if not pending:
        return None
    holding = records.all(Annotation.CONTROL)
    for row in pending:
        records.delete(Annotation.REQUEST, branch=row.branch)
        records.put(Annotation.CONTROL, row.branch, row.branch, row.step)
    return to_control([*holding, *pending], records.run_id)


def forget_requests(records: RunRecords, *keys: str) -> None:
    """Delete requests about a run, read or not."""
    for key in keys:
        records.delete(*KINDS, branch=key)


def _budget_number(row: StepRow, run_id: str) -> int:
    """Return the number of a request for other limits; 0 for any other request. Raises CorruptCheckpoint."""
    kind, _, number = row.branch.partition(" ")
    if kind == _BUDGET:
        return decode_number(number, name_of(row, run_id))
    if row.branch not in (CANCEL, PAUSE):
        raise name_of(row, run_id).damaged("there is no such request")
    return 0


def to_control(requests: Iterable[StepRow], run_id: str) -> RunControl:
    """Return what these requests ask for. Raises CorruptCheckpoint."""
    by_number = sorted((_budget_number(row, run_id), row.branch, row) for row in requests)
    budget: dict[str, float] = {}
    for number, _, row in by_number:
        if number:
            budget.update(decode_json(row.step.output, dict[BudgetField, float], name_of(row, run_id)))
    keys = {row.branch for _, _, row in by_number}
    return RunControl(CANCEL in keys, PAUSE in keys, budget)


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
    elif run.status == "RUNNING" and run.wake_ms is None:
        records.rows.wake(run, MESSAGE_SENT)


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
