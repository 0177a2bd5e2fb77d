"""Annotations of a run besides its commits: questions, notes, end hooks that may not have been called."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

from stroma.checkpoint.decisions import is_answered
from stroma.checkpoint.decoding import RecordName, decode_json, decode_number, storable_text
from stroma.checkpoint.durable.integrity import is_intact, seal
from stroma.checkpoint.durable.rows import Annotation, Rows, RunRow, Step, StepRow
from stroma.checkpoint.entries import UnknownCall, Waiting, is_effect_note
from stroma.checkpoint.identity import parse_mark
from stroma.checkpoint.payloads import UNREADABLE, PayloadPlace, Payloads
from stroma.checkpoint.records import ATTEMPT_SHAPE, AttemptRecord, stored_values
from stroma.failures.classes import FailureClass
from stroma.trace.events import AttemptRow, AttemptUsage, Failed, Outcome

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput


#: Data by the kind of annotation, NOTE or EFFECT, and its key; None deletes it.
Notes: TypeAlias = dict[tuple[Annotation, str], bytes | None]
#: A step without anything, for annotations whose value is their node id.
_NO_STEP: Final = Step("", "", b"", b"")


def annotate(
    rows: Rows, run: Any, kind: Annotation, branch: str, node_id: str, step: Step = _NO_STEP
) -> None:
    """Write an annotation of a run with its checksum, in place of an existing one. ``run``: its key."""
    rows.annotate(run, kind, branch, node_id, seal(kind, branch, node_id, step))


class RunRecords(NamedTuple):
    """The annotations of one execution of a run, read and written in one transaction.

    Attributes:
        run: the key of the run in the store.
    """

    rows: Rows
    run: Any
    run_id: str
    execution: int
    payloads: Payloads

    @classmethod
    def of(cls, rows: Rows, run: RunRow, payloads: Payloads) -> RunRecords:
        """Return those of the last execution of a run."""
        return cls(rows, run.run, run.run_id, run.execution, payloads)

    def place(self, kind: str, position: int = 0, branch: str = "") -> PayloadPlace:
        """Return the place of a payload of the execution."""
        return PayloadPlace(self.run_id, self.execution, kind, position, branch)

    def put(self, kind: Annotation, branch: str, node_id: str, step: Step = _NO_STEP) -> None:
        """Write an annotation with its checksum, in place of an existing one."""
        annotate(self.rows, self.run, kind, branch, node_id, step)

    def all(self, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        """Return the annotations of these kinds; branch None: in all branches. Raises CorruptCheckpoint."""
        return require_intact(self.rows.annotations(self.run, *kinds, branch=branch), self.run_id)

    def one(self, kind: Annotation, branch: str = "") -> StepRow | None:
        """Return one annotation, or None. Raises CorruptCheckpoint if it is damaged."""
        return next(iter(self.all(kind, branch=branch)), None)

    def delete(self, *kinds: Annotation, branch: str | None = None) -> None:
        """Delete the annotations of these kinds; branch None: in all branches."""
        self.rows.delete_annotations(self.run, *kinds, branch=branch)


def place_of_cause(run_id: str, mark: str) -> tuple[int, str]:
    """Return position and branch in the mark of the attempt that stopped a run. Raises CorruptCheckpoint."""
    try:
        _, position, _, _, branch = parse_mark(mark, 4, has_text=True)
    except ValueError:
        raise RecordName(run_id, "field", "cause").damaged() from None
    return position, branch


def require_intact(annotations: Iterable[StepRow], run_id: str) -> list[StepRow]:
    """Return annotations that were read. Raises CorruptCheckpoint for a damaged one."""
    annotations = list(annotations)
    for row in annotations:
        if not is_intact(row):
            raise name_of(row, run_id).damaged()
    return annotations


def name_of(row: StepRow, run_id: str) -> RecordName:
    """Return the name of an annotation for messages."""
    return RecordName(run_id, Annotation(row.position).name.lower().replace("_", " "), str(row.branch))


def due_hooks_key(attempt: AttemptRecord) -> str:
    """Return the key of an attempt's pending end hooks."""
    return f"{attempt.position}:{attempt.started_ns}:{attempt.attempt}:{attempt.branch}"


def record_due_hooks(records: RunRecords, attempt: AttemptRecord) -> None:
    """Record that the end hooks of an attempt are pending."""
    # The arguments of its hooks, except the output, which is stored with its commit.
    step = _NO_STEP._replace(output=json.dumps(stored_values(attempt)).encode())
    records.put(Annotation.DUE_HOOKS, due_hooks_key(attempt), attempt.node_id, step)


def read_due_hooks(records: RunRecords, row: StepRow) -> AttemptRow:
    """Return the row that :func:`record_due_hooks` stored. Raises CorruptCheckpoint."""
    name = name_of(row, records.run_id)
    attempt = AttemptRecord(*decode_json(row.step.output, ATTEMPT_SHAPE, name))
    place = records.place("message", attempt.position, attempt.branch)
    message = records.payloads.open_text(attempt.message, place)
    usage = AttemptUsage(attempt.tokens, attempt.output_tokens, attempt.cost_usd, attempt.model)
    failed = None
    if attempt.failure_class is not None:
        if attempt.failure_class not in list(FailureClass):
            raise name.damaged(f"{attempt.failure_class!r:.40} is not a failure class")
        failed = Failed(
            FailureClass(attempt.failure_class), message or "", attempt.reason, attempt.error_type
        )
    elif message is not None:  # The reason of a suspension.
        failed = Failed(FailureClass.RECOVERABLE, message, attempt.reason)
    return AttemptRow(
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ns=attempt.started_ns,
        duration_ns=attempt.duration_ns,
        input={},
        output=None,
        outcome=cast("Outcome", attempt.outcome),
        failure=failed,
        usage=usage,
        position=attempt.position,
        branch=attempt.branch,
        group=attempt.group_id,
        schemas=None,
        children=None,
        function_ns=attempt.function_ns,
    )


def record_waiting(records: RunRecords, waiting: Waiting) -> None:
    """Store the question that a node waits for, or its answer."""
    payloads, data = records.payloads, b""
    if waiting.payload is not None:
        data = payloads.seal_now(waiting.payload, _answer_place(records, waiting))
    place = records.place("question", waiting.position, waiting.branch)
    effect = waiting.effect and waiting.effect._replace(cause=storable_text(waiting.effect.cause) or "")
    question = [storable_text(waiting.reason), effect, waiting.schema, waiting.answered_ms]
    contract = payloads.seal_text(json.dumps(question), place)
    step = Step(contract or "", waiting.schema_ref, data, b"", waiting.number)
    records.put(Annotation.WAITING, _waiting_key(waiting), waiting.node_id, step)


def put_waiting(records: RunRecords, waiting: Waiting) -> Waiting:
    """Store a question, or how it ended, unless it has an answer. Return what is stored."""
    stored = find_waiting(records, waiting)
    if stored is not None and is_answered(stored, waiting):
        return stored
    record_waiting(records, waiting)
    return waiting


def find_waiting(records: RunRecords, waiting: Waiting) -> Waiting | None:
    """Return what is stored at the place of a question, or None. Raises StoreError."""
    row = records.one(Annotation.WAITING, _waiting_key(waiting))
    return None if row is None else read_waiting(records, row)


def _waiting_key(waiting: Waiting) -> str:
    return f"{waiting.position}:{waiting.branch}"


def _answer_place(records: RunRecords, waiting: Waiting) -> PayloadPlace:
    """Return the place of an answer, with the id of its question: the answer fits no other question."""
    return records.place(f"answer\0{waiting.id}", waiting.position, waiting.branch)


def read_waiting(records: RunRecords, row: StepRow) -> Waiting:
    """Return the approval that :func:`record_waiting` stored. Raises StoreError."""
    at, _, branch = row.branch.partition(":")
    name, step, payloads = name_of(row, records.run_id), row.step, records.payloads
    position = decode_number(at, name)
    place = records.place("question", position, branch)
    question = payloads.open_text(step.contract, place) or ""
    if question in UNREADABLE:  # It is listed, so that people see that there is one.
        fields = question, None, "", 0
    else:
        fields = decode_json(question, tuple[str, UnknownCall | None, str, int], name)
    reason, unknown, schema, answered_ms = fields
    ref, number = step.schema_ref, step.number or 0
    waiting = Waiting(position, branch, row.node_id, reason, ref, None, unknown, number, schema, answered_ms)
    if not step.output:
        return waiting
    place = _answer_place(records, waiting)
    return waiting._replace(payload=payloads.open(step.output, place, f"the answer for node {row.node_id!r}"))


def record_failure_site(
    records: RunRecords, attempt: AttemptRecord, number: int, started_ns: int, data: bytes
) -> None:
    """Store where an attempt failed, in place of an earlier failure at the same place."""
    step = Step(str(started_ns), "", data, b"", number)
    key = f"{attempt.position}:{attempt.branch}"
    records.put(Annotation.FAILURE_SITE, key, attempt.node_id, step)


def record_rejected(records: RunRecords, attempt: AttemptRecord, data: bytes) -> None:
    """Store the output of an attempt that broke its contract."""
    key = _rejected_key(attempt.position, attempt.branch, attempt.started_ns)
    # As a text: one that cannot be opened later must not hide the attempt.
    sealed = records.payloads.seal_text(data.decode(), records.place("rejected", 0, key)) or ""
    records.put(Annotation.REJECTED, key, attempt.node_id, _NO_STEP._replace(output=sealed.encode()))


def _rejected_key(position: int, branch: str, started_ns: int) -> str:
    return f"{position}:{started_ns}:{branch}"


def find_rejected(records: RunRecords, position: int, branch: str, started_ns: int) -> RejectedOutput | None:
    """Return the rejected output of an attempt; None without one, or if the codec cannot open it.

    Raises CorruptCheckpoint.
    """
    row = records.one(Annotation.REJECTED, _rejected_key(position, branch, started_ns))
    if row is None:
        return None
    from stroma.trace.rejected import read_rejected  # Few runs have one.

    place = records.place("rejected", 0, row.branch)
    text = records.payloads.open_text(row.step.output.decode("utf-8", "replace"), place) or ""
    rejected = read_rejected(text)
    if rejected is None and text not in UNREADABLE:
        raise name_of(row, records.run_id).damaged()
    return rejected


def record_notes(records: RunRecords, notes: Notes) -> None:
    """Store notes; delete those without data."""
    for (kind, key), data in notes.items():
        if data is None:
            records.delete(kind, branch=key)
        else:
            sealed = records.payloads.seal_now(data, records.place("note", 0, key))
            records.put(kind, key, "note", _NO_STEP._replace(output=sealed))


def read_notes(records: RunRecords, annotations: list[StepRow], first: int | None) -> dict[str, bytes]:
    """Return the notes of an execution; delete those from position ``first`` on, except of effects.

    Raises StoreError.
    """
    notes: dict[str, bytes] = {}
    for row in annotations:
        key, name = row.branch, name_of(row, records.run_id)
        position = decode_number(key.partition(":")[0], name)
        if first is not None and position >= first and not is_effect_note(key):
            records.delete(Annotation.NOTE, branch=key)
            continue
        notes[key] = records.payloads.open(row.step.output, records.place("note", 0, key), str(name))
    return notes
