"""One execution of a run in a durable store, behind a fence.

All decisions are made here and in ``session_open``, once for all stores. A store only reads and writes plain
rows (:class:`Rows`), in one transaction for each operation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import Change
from stroma.checkpoint.decoding import storable_text
from stroma.checkpoint.durable.annotations import (
    Notes,
    RunRecords,
    due_hooks_key,
    put_waiting,
    read_waiting,
    record_due_hooks,
    record_failure_site,
    record_notes,
    record_rejected,
)
from stroma.checkpoint.durable.control import accept_requests, read_messages
from stroma.checkpoint.durable.conversion import payload_reference, seal_events, to_attempt, to_committed
from stroma.checkpoint.durable.integrity import checksum, seal
from stroma.checkpoint.durable.operations import CellChange, Commit, EventAppend, Transaction, fence_error
from stroma.checkpoint.durable.owner import LIVE_SESSIONS
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, Rows, RunEnd, RunRow, Step, StepRow
from stroma.checkpoint.durable.session_open import RunOpener, finish_execution, record_end, release_run
from stroma.checkpoint.entries import (
    NO_CONTROL,
    Committed,
    RunControl,
    RunRequest,
    SentMessage,
    StepCall,
    Waiting,
)
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import BLOB, LARGE_BYTES, PayloadPlace, Payloads, Stored
from stroma.checkpoint.queue import COMPLETE
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sessions import Charge, Session
from stroma.contracts.copying import PickledSnapshot, Snapshot, StoredSnapshot
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow, contract_of


class BlobReferences:
    """The outputs that one session has stored in blobs."""

    __slots__ = ("_by_content", "_by_place", "_last", "_payloads")

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads
        self._by_content: dict[bytes, StoredSnapshot] = {}  # by checksum
        #: By position and branch, until the row of the attempt is replaced.
        self._by_place: dict[tuple[int, str], StoredSnapshot] = {}
        #: The snapshot of the last of these outputs, and the reference to it.
        self._last: tuple[Snapshot | None, StoredSnapshot | None] = (None, None)

    def add(self, position: int, branch: str, content: bytes, stored: StoredSnapshot) -> None:
        """Add an output; ``content`` is the checksum of its plain form."""
        self._by_content[content] = self._by_place[position, branch] = stored

    def replace_in(self, row: AttemptRow) -> AttemptRow:
        """Return a row for the trace, with references in place of states that are stored in blobs."""
        stored_output = self._by_place.pop((row.position, row.branch), None)
        schemas = row.schemas
        if not self._by_content or schemas is None:
            return row
        input_snapshot, output = row.input, row.output
        stored_input = self._find_input(schemas[0], input_snapshot)
        if stored_input is not None:
            input_snapshot = stored_input
        if stored_output is not None:
            self._last = output, stored_output  # The next node may get this object as its input.
            output = stored_output
        return row._replace(input=input_snapshot, output=output)

    def _find_input(self, schema: Schema, snapshot: Snapshot) -> StoredSnapshot | None:
        """Return a reference to a large input, which usually is the previous output; None for any other."""
        if snapshot is self._last[0]:
            return self._last[1]
        data = snapshot if isinstance(snapshot, bytes) else None
        size = 0
        if isinstance(snapshot, tuple):
            size = sum(len(value) for value in snapshot if isinstance(value, (str, bytes)))
        elif isinstance(snapshot, PickledSnapshot):
            size = snapshot.size
        if 4 * size >= self._payloads.blob_bytes:  # UTF-8 may be 4 times larger, JSON smaller.
            try:
                data = schema.encode(schema.restore(snapshot), secrets=self._payloads.codec is not None)
            except Exception:  # It has no stored form.
                return None
        if data is None or len(data) < self._payloads.blob_bytes:
            return None
        return self._by_content.get(checksum(data))


logger = get_logger()

_TRIM_INTERVAL: Final = 100  # batches of events of a session between two that delete old ones


class DurableSession(Session):
    """One execution of a run, owned by this process until it ends, or until another process takes it over."""

    stores_inputs = True
    fence: Fence
    #: The lease is no longer renewed.
    ended = False
    #: The run as it was opened, if it had completed, nothing is discarded, and nothing was recorded since.
    completed: RunRow | None = None
    #: The run as it was, if it is continued; the requests that held; whether commits were discarded.
    before: RunRow | None = None
    held = NO_CONTROL
    discards = False
    #: Number of the last message that was read; None before the first look.
    _read_messages: int | None = None
    #: Number of batches of events.
    _appended = 0
    _deliver = False

    def __init__(
        self, run_id: str, submit: Callable[[Any], asyncio.Future[Any]], payloads: Payloads, address: str = ""
    ) -> None:
        self.run_id, self.address = run_id, address
        self._submit_to_store = submit
        self._payloads, self.stores_secrets = payloads, payloads.codec is not None
        #: Functions that store what belongs to an attempt with it, by its position, branch and start.
        self._attached: dict[tuple[int, str, int], list[Callable[[RunRecords, AttemptRecord], None]]] = {}
        self.charges: dict[tuple[int, str], Charge] = {}
        self.waiting: dict[tuple[int, str], Waiting] = {}
        #: Notes by kind of annotation and key that no transaction has stored yet.
        self._pending_notes: Notes = {}
        self.undelivered: list[AttemptRow] = []  # pyright: ignore[reportIncompatibleVariableOverride]
        #: The identity of the step of plain code at each position.
        self._identities: dict[int, str] = {}
        self._references = None if payloads.blobs is None else BlobReferences(payloads)

    def open(self, request: RunRequest, opening: Opening, plain_input: Stored, rows: Rows) -> DurableSession:
        """Open the run. One operation; see :class:`RunOpener`."""
        RunOpener(self, self._payloads, request, opening, plain_input).open(rows)
        self.execution, self.epoch = self.fence.execution, self.fence.epoch
        if self.places:
            self._identities = {position: identity for identity, position in self.places.items()}
        self._deliver = request.deliver
        return self

    def _submit(self, operation: Any, then: Callable[[Any], object] | None = None) -> Awaitable[Any]:
        """Submit an operation. ``then`` is called with its result once it is stored."""
        pending = self._submit_to_store(operation)
        if then is not None:
            pending.add_done_callback(partial(_settle, then))
        return pending

    def _post(self, operation: Any) -> asyncio.Future[None] | None:
        """Submit an operation without waiting for it. An error of it is dropped."""
        pending = self._submit_to_store(operation)
        pending.add_done_callback(lambda done: done.cancelled() or done.exception())
        return pending

    def _place(self, kind: str, execution: int, position: int = 0, branch: str = "") -> PayloadPlace:
        return PayloadPlace(self.run_id, execution, kind, position, branch)

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        """Store one attempt and, with ``output``, its commit: both or nothing.

        Raises NotSerialisable at once; awaited: Fenced, or another StoreError. Repeating the call after an
        error is
        safe: an attempt that was stored in spite of the error is not counted twice.
        """
        if output is None or schema is None:
            return self._submit_commit(Commit(self.run_id, self.fence, self._attempt(row), None))
        data = schema.encode(output, secrets=self._payloads.codec is not None)
        if len(data) > LARGE_BYTES:
            self._payloads.warn_of_size(
                len(data), f"the output of node {row.node_id!r} in run {self.run_id!r}"
            )
        if not self._payloads.plain:
            return self._record_sealed(row, schema, data, call)
        return self._commit(row, schema, data, call)

    async def _record_sealed(
        self, row: AttemptRow, schema: Schema, data: bytes, call: StepCall | None
    ) -> None:
        at = self.fence.execution, row.position, row.branch
        place = self._place("output", *at)
        plain, data = data, await self._payloads.seal(data, place)
        if data.startswith(BLOB):
            stored = payload_reference(self._payloads, data, place, "a state of the trace")
            content = await asyncio.to_thread(checksum, plain)
            assert self._references is not None
            self._references.add(row.position, row.branch, content, stored)
        del plain
        if call is not None and call.input_key is not None:
            place = self._place("step input", *at)
            call = call._replace(input_key=await self._payloads.seal(call.input_key, place))
        await self._commit(row, schema, data, call)

    def with_references(self, row: AttemptRow) -> AttemptRow:
        return row if self._references is None else self._references.replace_in(row)

    def _commit(self, row: AttemptRow, schema: Schema, data: bytes, call: StepCall | None) -> Awaitable[None]:
        contract, ref = contract_of(row, schema), schema_ref(schema.model)
        number, input_key = (None, None) if call is None else (call.number, call.input_key)
        step = Step(contract, ref, data, b"", number, input_key)
        step = seal(row.position, row.branch, row.node_id, step)
        return self._submit_commit(Commit(self.run_id, self.fence, self._attempt(row), step))

    def note_call(self, position: int, identity: str) -> None:
        self._identities[position] = identity

    def _attempt(self, row: AttemptRow) -> AttemptRecord:
        attempt = to_attempt(row)
        attempt.identity = self._identities.get(row.position)
        if self._payloads.codec is not None:
            self._seal_message(attempt)
        return attempt

    def _seal_message(self, attempt: AttemptRecord) -> None:
        place = self._place("message", self.fence.execution, attempt.position, attempt.branch)
        attempt.message = self._payloads.seal_text(attempt.message, place)

    def holds_lease(self) -> bool:
        return self.fence.holds_lease()

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """See Session. Replaces the site of an earlier failure at the same place.

        Nothing is stored with a codec: source lines may contain what the codec encrypts.
        """
        if self._payloads.codec is None and (data := write()):
            write_site = partial(record_failure_site, number=attempt, started_ns=started_ns, data=data)
            self._attached.setdefault((position, branch, started_ns), []).append(write_site)

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        write_output = partial(record_rejected, data=data)
        self._attached.setdefault((position, branch, started_ns), []).append(write_output)

    def _submit_commit(self, commit: Commit, question: Waiting | None = None) -> Awaitable[Any]:
        """Commit an attempt with its annotations and the changes of its cells, in one transaction."""
        attempt, self.completed = commit.attempt, None
        place = attempt.position, attempt.branch
        attached = self._attached.get((*place, attempt.started_ns), ())
        is_alone = question is None and not attached and not self._deliver
        if is_alone and not (self.charges or self._pending_notes):
            return self._submit(commit)
        charge, notes = self.charges.get(place), dict(self._pending_notes)
        changes: list[tuple[str, Change[Any]]] = []
        if charge is not None:
            changes = charge.changes(attempt.tokens, attempt.cost_pico, committed=commit.step is not None)

        def operation(rows: Rows) -> tuple[Waiting | None, list[Any]]:
            commit(rows)
            records = self._records(rows)
            if self._deliver:
                record_due_hooks(records, attempt)
            for write in attached:
                write(records, attempt)
            stored = None
            if question is not None:
                rows.find(self.run_id, lock=True)  # Its answer may arrive between the read and the write.
                stored = put_waiting(records, question)
            record_notes(records, notes)
            # Cells last, to hold their locks briefly: other runs wait for them.
            return stored, [CellChange(name, change)(rows) for name, change in changes]

        def then(result: tuple[Waiting | None, list[Any]]) -> None:
            stored, answers = result
            if stored is not None:
                self._know(stored)
            if charge is not None:
                charge.settled(answers)
            self._attached.pop((*place, attempt.started_ns), None)
            self._forget_notes(notes)

        return self._submit(Transaction(self.run_id, operation, changes_cells=bool(changes)), then)

    def append_events(self, last: int, lines: bytes) -> Awaitable[None]:
        batch = seal_events(self._payloads, self.run_id, self.fence, last, lines)
        trims = self._appended % _TRIM_INTERVAL == 0
        self._appended += 1
        return self._submit(EventAppend(self.run_id, batch._replace(trims=trims)))

    def note(self, key: str, data: bytes | None) -> None:
        self._pending_notes[Annotation.NOTE, key] = data

    def mark_effect(self, node_id: str) -> None:
        self._pending_notes[Annotation.EFFECT, node_id] = b"called"

    def flush(self) -> Awaitable[None] | None:
        """Store the notes now. Awaited: raises Fenced, or another StoreError."""
        return self._submit_fenced(lambda records: None) if self._pending_notes else None

    def ask(self, waiting: Waiting) -> Awaitable[Waiting]:
        """See Session. Awaited: raises Fenced, or another StoreError."""
        return self._submit_fenced(lambda records: put_waiting(records, waiting), self._know)

    def _know(self, stored: Waiting) -> None:
        self.waiting[stored.position, stored.branch] = stored

    async def answers(self) -> Mapping[tuple[int, str], Waiting]:

        def read(rows: Rows) -> list[Waiting]:
            records = self._records(rows)
            return [read_waiting(records, row) for row in records.all(Annotation.WAITING)]

        waiting = await self._submit(Transaction(self.run_id, read))
        self.waiting = {(one.position, one.branch): one for one in waiting}  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.waiting

    async def messages(self, after: int) -> list[SentMessage]:

        def read(rows: Rows) -> tuple[int, list[SentMessage]]:
            run = rows.find(self.run_id)
            if run is None:
                raise fence_error(rows, self.fence, self.run_id)
            return read_messages(RunRecords.of(rows, run, self._payloads), after)

        last, messages = await self._submit(Transaction(self.run_id, read))
        self._read_messages = last
        return cast("list[SentMessage]", messages)

    def _records(self, rows: Rows) -> RunRecords:
        return RunRecords(rows, self.fence.run, self.run_id, self.fence.execution, self._payloads)

    def _submit_fenced(
        self, do: Callable[[RunRecords], Any], then: Callable[[Any], object] | None = None
    ) -> Awaitable[Any]:
        """Write beside the commits, with the notes, in one transaction that the fence may refuse."""
        notes = dict(self._pending_notes)

        def operation(rows: Rows) -> Any:
            self._require_fence(rows)
            records = self._records(rows)
            done = do(records)
            record_notes(records, notes)
            return done

        def stored(result: Any) -> None:
            self._forget_notes(notes)
            if then is not None:
                then(result)

        return self._submit(Transaction(self.run_id, operation), stored)

    def _require_fence(self, rows: Rows) -> None:
        """Raise StoreError if the run was deleted or has another owner."""
        run = rows.find(self.run_id, lock=True)
        if run is None or (run.epoch, run.owner) != (self.fence.epoch, self.fence.owner):
            raise fence_error(rows, self.fence, self.run_id)

    def _forget_notes(self, stored: Notes) -> None:
        """Drop notes that a transaction has stored; others are written again with the next one."""
        for key, data in stored.items():
            if self._pending_notes.get(key, b"") is data:
                del self._pending_notes[key]

    async def committed(self, position: int, branches: Sequence[str]) -> Mapping[str, Committed]:
        """Return the commits in some branches of a position. Raises StoreError (CorruptCheckpoint ...)."""
        fence, places = self.fence, [(position, branch) for branch in branches]

        def read(rows: Rows) -> list[StepRow]:
            return list(rows.steps_at(fence.run, fence.execution, places))

        steps: list[StepRow] = await self._submit(Transaction(self.run_id, read))
        if self._payloads.plain:
            return self._to_commits(steps)
        return await asyncio.to_thread(self._to_commits, steps)

    def _to_commits(self, steps: Iterable[StepRow]) -> dict[str, Committed]:
        execution = self.fence.execution
        return {row.branch: to_committed(self._payloads, self.run_id, execution, row) for row in steps}

    def delivered(self, row: AttemptRow) -> None:
        """Record, without waiting, that end hooks were called. If this is lost, they are called again."""
        key = due_hooks_key(to_attempt(row))
        self._post(
            Transaction(
                self.run_id, lambda rows: self._records(rows).delete(Annotation.DUE_HOOKS, branch=key)
            )
        )

    def note_attribution(self, ids: Mapping[str, str]) -> asyncio.Future[None] | None:
        """Store ids of what the run belongs to, without waiting; they may be lost."""

        def write(rows: Rows) -> None:
            self._require_fence(rows)
            for kind, value in ids.items():
                self._records(rows).put(Annotation.ATTRIBUTION, kind, value)

        return self._post(Transaction(self.run_id, write))

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None]:
        """Store a suspended attempt and its question. Awaited: raises Fenced, or another StoreError."""
        attempt = to_attempt(row)
        attempt.identity, attempt.message = self._identities.get(row.position), storable_text(waiting.reason)
        self._seal_message(attempt)
        return self._submit_commit(Commit(self.run_id, self.fence, attempt, None), waiting)

    def read_requests(self, rows: Rows) -> None:
        """Apply the requests about the run; the owner knows them before they are acknowledged."""
        notify, run = self.on_control, rows.find(self.run_id, lock=True)
        if notify is None or run is None or (run.epoch, run.owner) != (self.fence.epoch, self.fence.owner):
            return
        try:
            control = accept_requests(self._records(rows))
        except CorruptCheckpoint as error:
            # It may be a smaller budget: no further attempt begins, and a resume raises the error.
            logger.warning("%s; the run pauses", error)
            control = RunControl(pause=True)
        if control is not None:
            notify(control)

    def give_back(self) -> Awaitable[None]:
        """See Session. Awaited: raises Fenced, or another StoreError."""
        return self._submit(Transaction(self.run_id, self.release))

    def release(self, rows: Rows) -> None:
        """Undo the claim of the run. One operation; does nothing without a claim."""
        if hasattr(self, "fence") and self.fence.owner:
            release_run(self._records(rows), self)
        self.abandon()

    def abandon(self) -> None:
        """Release the run without waiting: the next session need not wait for the lease to expire."""
        self.ended = True
        if hasattr(self, "fence"):
            LIVE_SESSIONS.pop(self.fence.owner.rpartition("|")[2], None)

    def end(
        self, status: str, error: str | None, wake_ms: int | None = None, cause: str | None = None
    ) -> Awaitable[None] | None:
        """Record how the run stopped. Awaited: raises Fenced, or another StoreError."""
        end = self._to_record(RunEnd(str(status), error, wake_ms, cause=cause))
        if end is None:
            return None
        self.ended = True
        # Abandoned only once it is stored: otherwise the run looks like one whose process died.
        pending = self._submit_to_store(Transaction(self.run_id, partial(self._finish, end)))
        pending.add_done_callback(lambda _: self.abandon())
        return pending

    def _to_record(self, end: RunEnd) -> RunEnd | None:
        """Return the end to record; None for a run that is returned unchanged."""
        if self.finished is not None:
            if not self.fence.owner:
                return None
            end = RunEnd(self.finished.status, self.finished.error, end.wake_ms)
        return end if end.error is None else end._replace(error=storable_text(end.error))

    def _finish(self, end: RunEnd, rows: Rows) -> None:
        before, records = self.completed, self._records(rows)
        if before is None or end.status not in COMPLETE:
            finish_execution(records, self.fence, end, self._read_messages)
        else:  # A resume without anything to do leaves the run unchanged.
            record_end(records, self.fence, RunEnd(before.status, before.error, updated_ms=before.updated_ms))
        if self._pending_notes:
            record_notes(records, self._pending_notes)


def _settle(then: Callable[[Any], object], done: asyncio.Future[Any]) -> None:
    if not done.cancelled() and done.exception() is None:
        then(done.result())
