"""Conversion between rows of the trace, rows of a store, and commits."""

from __future__ import annotations

from functools import partial
from typing import Final

from stroma.checkpoint.decoding import storable_text
from stroma.checkpoint.durable.integrity import checksum, verify_step
from stroma.checkpoint.durable.rows import EventRow, Fence, StepRow
from stroma.checkpoint.entries import Committed, StepCall
from stroma.checkpoint.events import EventBatch, EventPlace
from stroma.checkpoint.payloads import BLOB, PayloadPlace, Payloads, UnencodedState
from stroma.checkpoint.records import PICO, AttemptRecord
from stroma.contracts.copying import Snapshot, StoredSnapshot
from stroma.trace.events import NO_USAGE, AttemptRow

_CHECKSUM_BYTES: Final = 32


def to_attempt(row: AttemptRow) -> AttemptRecord:
    """Return the attempt of a row of the trace, as a store records it."""
    failure, message, reason, error_type = row.failure or (None, None, None, None)
    usage = row.usage or NO_USAGE
    return AttemptRecord(
        position=row.position,
        started_ns=row.started_ns,
        branch=row.branch,
        attempt=row.attempt,
        node_id=row.node_id,
        duration_ns=row.duration_ns,
        outcome=row.outcome,
        failure_class=failure and failure.value,
        message=storable_text(message),
        reason=storable_text(reason),
        tokens=usage.tokens,
        output_tokens=usage.output_tokens,
        cost_pico=round(usage.cost_usd * PICO),
        model=storable_text(usage.model),
        function_ns=row.function_ns,
        group_id=storable_text(row.group),
        error_type=storable_text(error_type),
    )


def open_message(payloads: Payloads, run_id: str, execution: int, attempt: AttemptRecord) -> None:
    """Replace the stored form of the message of an attempt by the message."""
    place = PayloadPlace(run_id, execution, "message", attempt.position, attempt.branch)
    attempt.message = payloads.open_text(attempt.message, place)


def to_committed(
    payloads: Payloads, run_id: str, execution: int, row: StepRow, *, is_lazy: bool = False
) -> Committed:
    """Return a commit of a store. ``is_lazy``: an encrypted output is decrypted when it is needed.

    Raises CorruptCheckpoint.
    """
    position, branch, node_id, step = row
    verify_step(step, run_id, position, node_id, branch)
    call = None
    if step.number is not None:
        call = StepCall(step.number, open_step_input(payloads, run_id, execution, row))
    if isinstance(step.output, UnencodedState):
        return Committed(node_id, step.output.snapshot, step.contract, call, step.output.schema)
    output: Snapshot
    is_blob = step.output.startswith(BLOB) and payloads.blobs is not None
    if is_blob or (is_lazy and payloads.codec is not None):
        place = PayloadPlace(run_id, execution, "output", position, branch)
        output = payload_reference(payloads, step.output, place, _output_of(run_id, row))
    else:
        output = open_output(payloads, run_id, execution, row)
    return Committed(node_id, output, step.contract, call)


def open_output(payloads: Payloads, run_id: str, execution: int, row: StepRow) -> bytes:
    """Return the output of a commit in stored form, decrypted.

    Raises CorruptCheckpoint; StoreError if a blob cannot be read; NotSerialisable in memory.
    """
    verify_step(row.step, run_id, row.position, row.node_id, row.branch)
    place = PayloadPlace(run_id, execution, "output", row.position, row.branch)
    return payloads.open(row.step.output, place, _output_of(run_id, row))


def open_step_input(payloads: Payloads, run_id: str, execution: int, row: StepRow) -> bytes | None:
    """Return the input of a step, decrypted; None if none is stored. Raises StoreError."""
    key = row.step.input_key
    if key is None:
        return None
    place = PayloadPlace(run_id, execution, "step input", row.position, row.branch)
    return payloads.open(key, place, f"the input of the step for {_output_of(run_id, row)}")


def _output_of(run_id: str, row: StepRow) -> str:
    place = "" if row.position < 0 else f" at position {row.position}"  # A state from save() has none.
    return f"the output of node {row.node_id!r}{place} of run {run_id!r}"


def payload_reference(payloads: Payloads, stored: bytes, place: PayloadPlace, what: str) -> StoredSnapshot:
    """Return a reference to a payload, which is read and decrypted when it is needed."""
    return StoredSnapshot(partial(payloads.open, stored, place, what))


def seal_events(payloads: Payloads, run_id: str, fence: Fence, last: int, lines: bytes) -> EventRow:
    """Return a batch of events in stored form, with a checksum of it and of its place. Raises StoreError."""
    place = _events_place(run_id, fence.execution, EventPlace(fence.epoch, last))
    sealed = payloads.seal_inline(lines, place)
    data = checksum(place.digest() + sealed) + sealed
    return EventRow(fence.run, fence.execution, EventPlace(fence.epoch, last), data)


def open_events(payloads: Payloads, run_id: str, row: EventRow) -> EventBatch:
    """Return a stored batch of events. Raises CorruptCheckpoint if it needs another codec."""
    place = _events_place(run_id, row.execution, row.last)
    digest, sealed = row.data[:_CHECKSUM_BYTES], row.data[_CHECKSUM_BYTES:]
    if checksum(place.digest() + sealed) != digest:
        return EventBatch(row.last, None)
    return EventBatch(row.last, payloads.open(sealed, place, f"a batch of events of run {run_id!r}"))


def _events_place(run_id: str, execution: int, last: EventPlace) -> PayloadPlace:
    return PayloadPlace(run_id, execution, "events", last.number, str(last.epoch))
