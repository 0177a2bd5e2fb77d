"""One execution of a run in a durable store, behind a fence.

All decisions are made here and in ``session_open``, once for all stores. A store only reads and writes plain
rows (:class:`Rows`), in one transaction for each operation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final, cast

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import Change
from stroma.checkpoint.decisions import COMPLETE
from stroma.checkpoint.durable.annotations import (
    Notes,
    annotate,
    due_hooks_key,
    put_waiting,
    read_annotations,
    read_waiting,
    record_due_hooks,
    record_notes,
    record_rejected,
)
from stroma.checkpoint.durable.control import accept_requests
from stroma.checkpoint.durable.conversion import payload_reference, seal_events, to_attempt, to_committed
from stroma.checkpoint.durable.integrity import checksum, seal, storable_text
from stroma.checkpoint.durable.messages import read_messages
from stroma.checkpoint.durable.operations import (
    CellChange,
    Commit,
    EventAppend,
    Submit,
    Transaction,
    fence_error,
)
from stroma.checkpoint.durable.owner import LIVE_SESSIONS
from stroma.checkpoint.durable.references import BlobReferences
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, Rows, RunEnd, RunRow, Step, StepRow
from stroma.checkpoint.durable.session_open import RunOpener, finish_execution, record_end
from stroma.checkpoint.entries import (
    Committed,
    Finished,
    PriorUsage,
    RunControl,
    RunRequest,
    SentMessage,
    StepCall,
    Tried,
    Waiting,
)
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import BLOB, LARGE_BYTES, PayloadPlace, Payloads
from stroma.checkpoint.protocols import Charge
from stroma.checkpoint.records import AttemptRecord
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow, contract_of

__all__ = ["DurableSession"]

logger = get_logger()

_TRIM_INTERVAL: Final = 100  # batches of events of a session between two that delete old ones


class DurableSession:
    """One execution of a run, owned by this process until it ends, or until another process takes it over.

    Attributes: see :class:`stroma.checkpoint.protocols.Session`.

    Args:
        decrypted: payloads that were decrypted before, by place and checksum of the stored form.
    """

    __slots__ = (
        "__weakref__",
        "_appended",
        "_completed",
        "_decrypted",
        "_deliver",
        "_failure_sites",
        "_identities",
        "_payloads",
        "_pending_notes",
        "_read_messages",
        "_references",
        "_rejected",
        "_release",
        "_submit",
        "address",
        "attribution",
        "charges",
        "continued",
        "control",
        "ended",
        "execution",
        "fence",
        "finished",
        "lost_start_ms",
        "notes",
        "on_control",
        "places",
        "prior",
        "restored",
        "run_id",
        "traceparent",
        "tried",
        "undelivered",
        "version",
        "waiting",
    )

    stores_inputs: ClassVar[bool] = True
    attribution: Mapping[str, str]
    fence: Fence
    execution: int
    continued: bool
    control: RunControl
    waiting: dict[tuple[int, str], Waiting]
    finished: Finished | None
    lost_start_ms: int | None
    notes: Mapping[str, bytes]
    places: Mapping[str, int]
    prior: PriorUsage
    restored: Mapping[tuple[int, str], Committed]
    tried: Mapping[tuple[int, str], Tried]
    traceparent: str | None
    undelivered: list[AttemptRow]
    version: str

    def __init__(
        self,
        run_id: str,
        submit: Submit,
        payloads: Payloads,
        decrypted: Mapping[tuple[PayloadPlace, bytes], bytes] | None = None,
        address: str = "",
    ) -> None:
        self.run_id, self.address = run_id, address
        self._payloads = payloads
        self._decrypted = decrypted or {}
        self.on_control: Callable[[RunControl], None] | None = None
        #: The lease need not be renewed any more.
        self.ended = False
        self._submit = submit
        self._failure_sites: dict[tuple[int, str], tuple[int, int, bytes]] = {}
        #: Outputs that broke their contract, until their attempts are stored: (start of the attempt, stored
        #: form).
        self._rejected: dict[tuple[int, str], tuple[int, bytes]] = {}
        self.charges: dict[tuple[int, str], Charge] = {}
        #: Notes by kind of annotation and key that no transaction has stored yet.
        self._pending_notes: Notes = {}
        #: Number of the last message that was read; None before the first look.
        self._read_messages: int | None = None
        #: The run as it was opened, if it had completed and nothing was recorded since.
        self._completed: RunRow | None = None
        #: What undoes the claim of the run; None before it.
        self._release: Callable[[Rows], None] | None = None
        #: The identity of the step of plain code at each position.
        self._identities: dict[int, str] = {}
        self._references = BlobReferences(payloads)
        #: Number of batches of events.
        self._appended = 0

    def open(self, request: RunRequest, opening: Opening, plain_input: bytes, rows: Rows) -> DurableSession:
        """Open the run. One operation; see :class:`RunOpener`."""
        opener = RunOpener(self._payloads, request, opening, plain_input, self._decrypted)
        opened = opener.open(rows)
        self.fence, self.execution = opened.fence, opened.fence.execution
        self.finished, self.continued = opened.finished, opened.continued
        self.restored, self.places, self.tried = opened.restored, opened.places, opened.tried
        self.prior, self.traceparent, self.attribution = opened.prior, opened.traceparent, opened.attribution
        self.control, self.version, self.lost_start_ms = opened.control, opened.version, opened.lost_start_ms
        self.waiting, self.undelivered, self.notes = opened.waiting, opened.undelivered, opened.notes
        self._identities = {position: identity for identity, position in opened.places.items()}
        self._completed = opened.completed
        self._release = opener.release
        self._deliver = request.deliver
        self._decrypted = {}
        return self

    def _place(self, kind: str, execution: int, position: int = 0, branch: str = "") -> PayloadPlace:
        return PayloadPlace(self.run_id, execution, kind, position, branch)

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None]:
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
            self._references.add(row.position, row.branch, content, stored)
        del plain
        if call is not None and call.input_key is not None:
            place = self._place("step input", *at)
            call = call._replace(input_key=await self._payloads.seal(call.input_key, place))
        await self._commit(row, schema, data, call)

    def with_references(self, row: AttemptRow) -> AttemptRow:
        """See Session."""
        return self._references.replace_in(row)

    def _commit(self, row: AttemptRow, schema: Schema, data: bytes, call: StepCall | None) -> Awaitable[None]:
        contract, ref = contract_of(row, schema), schema_ref(schema.model)
        number, input_key = (None, None) if call is None else (call.number, call.input_key)
        step = Step(contract, ref, data, b"", number, input_key)
        step = seal(row.position, row.branch, row.node_id, step)
        return self._submit_commit(Commit(self.run_id, self.fence, self._attempt(row), step))

    def note_call(self, position: int, identity: str) -> None:
        """See Session."""
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

    @property
    def epoch(self) -> int:
        """Incremented by each session that opens the run."""
        return self.fence.epoch

    def holds_lease(self) -> bool:
        """See Session."""
        return self.fence.holds_lease()

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """See Session. Replaces the site of an earlier failure at the same place.

        Nothing is stored with a codec: source lines may contain what the codec encrypts.
        """
        if self._payloads.codec is None and (data := write()):
            self._failure_sites[position, branch] = (attempt, started_ns, data)

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        """See Session."""
        self._rejected[position, branch] = (started_ns, data)

    def _rejected_of(self, attempt: AttemptRecord) -> bytes | None:
        """Return the output that broke its contract in an attempt, or None."""
        started_ns, data = self._rejected.get((attempt.position, attempt.branch), (0, None))
        return data if started_ns == attempt.started_ns else None

    def _forget_rejected(self, place: tuple[int, str], data: bytes, pending: asyncio.Future[Any]) -> None:
        """Drop a rejected output that a transaction has stored; another is written with the next try."""
        if pending.cancelled() or pending.exception() is not None:
            return
        if self._rejected.get(place, (0, None))[1] is data:
            del self._rejected[place]

    def _submit_commit(self, commit: Commit) -> Awaitable[None]:
        attempt, self._completed = commit.attempt, None
        site = self._failure_sites.pop((attempt.position, attempt.branch), None)
        if site is not None and site[1] != attempt.started_ns:
            site = None
        if (
            not self._deliver
            and site is None
            and not self._rejected
            and not self.charges
            and not self._pending_notes
        ):
            return self._submit(commit)

        def write_site(rows: Rows) -> None:
            if site is not None:
                number, started_ns, data = site
                step = Step(str(started_ns), "", data, b"", number)
                key = f"{attempt.position}:{attempt.branch}"
                annotate(rows, self.run_id, Annotation.FAILURE_SITE, key, attempt.node_id, step)

        return self._submit_with(commit, write_site)

    def _submit_with(self, commit: Commit, write: Callable[[Rows], object]) -> asyncio.Future[Any]:
        """Commit together with its annotations and the changes of its cells, in one transaction."""
        attempt, self._completed = commit.attempt, None
        place = attempt.position, attempt.branch
        charge, rejected = self.charges.get(place), self._rejected_of(attempt)
        notes = dict(self._pending_notes)
        changes: list[tuple[str, Change[Any]]] = []
        if charge is not None:
            changes = charge.changes(attempt.tokens, attempt.cost_pico, committed=commit.step is not None)

        def operation(rows: Rows) -> list[Any]:
            commit(rows)
            if self._deliver:
                record_due_hooks(rows, self.run_id, attempt)
            write(rows)
            if rejected is not None:
                execution = self.fence.execution
                record_rejected(rows, self.run_id, execution, attempt, rejected, self._payloads)
            self._write_notes(rows, notes)
            # Cells last, to hold their locks briefly: other runs wait for them.
            return [CellChange(name, change)(rows) for name, change in changes]

        pending = self._submit(Transaction(self.run_id, operation))
        if charge is not None:
            pending.add_done_callback(partial(_settle_charge, charge))
        if rejected is not None:
            pending.add_done_callback(partial(self._forget_rejected, place, rejected))
        if notes:
            pending.add_done_callback(partial(self._forget_notes, notes))
        return pending

    def append_events(self, last: int, lines: bytes) -> Awaitable[None]:
        """See Session."""
        batch = seal_events(self._payloads, self.run_id, self.fence, last, lines)
        trims = self._appended % _TRIM_INTERVAL == 0
        self._appended += 1
        return self._submit(EventAppend(self.run_id, batch._replace(trims=trims)))

    def note(self, key: str, data: bytes | None) -> None:
        """See Session."""
        self._pending_notes[Annotation.NOTE, key] = data

    def mark_effect(self, node_id: str) -> None:
        """See Session."""
        self._pending_notes[Annotation.EFFECT, node_id] = b"called"

    def flush(self) -> Awaitable[None] | None:
        """Store the notes now. Awaited: raises Fenced, or another StoreError."""
        return self._submit_fenced(lambda rows: None) if self._pending_notes else None

    def ask(self, waiting: Waiting) -> Awaitable[Waiting]:
        """See Session. Awaited: raises Fenced, or another StoreError."""
        return self._know(waiting, self._submit_fenced(partial(self._put, waiting)))

    def _know(self, waiting: Waiting, pending: asyncio.Future[Any]) -> asyncio.Future[Any]:
        """Have ``waiting`` hold a question once it is stored."""

        def stored(pending: asyncio.Future[Any]) -> None:
            if not pending.cancelled() and pending.exception() is None:
                known = pending.result()
                self.waiting[waiting.position, waiting.branch] = (
                    known if isinstance(known, Waiting) else waiting
                )

        pending.add_done_callback(stored)
        return pending

    def _put(self, waiting: Waiting, rows: Rows) -> Waiting:
        run, execution = self.fence.run, self.fence.execution
        return put_waiting(rows, run, self.run_id, execution, waiting, self._payloads)

    async def answers(self) -> Mapping[tuple[int, str], Waiting]:
        """See Session."""
        run, execution = self.fence.run, self.fence.execution

        def read(rows: Rows) -> list[StepRow]:
            return read_annotations(rows, run, self.run_id, Annotation.WAITING)

        annotations = await self._submit(Transaction(self.run_id, read))
        waiting = [read_waiting(row, self.run_id, execution, self._payloads) for row in annotations]
        self.waiting = {(one.position, one.branch): one for one in waiting}
        return self.waiting

    async def messages(self, after: int) -> list[SentMessage]:
        """See Session."""

        def read(rows: Rows) -> tuple[int, list[SentMessage]]:
            run = rows.find(self.run_id)
            if run is None:
                raise fence_error(rows, self.fence, self.run_id)
            return read_messages(rows, run, after, self._payloads)

        last, messages = await self._submit(Transaction(self.run_id, read))
        self._read_messages = last
        return cast("list[SentMessage]", messages)

    def _submit_fenced(self, do: Callable[[Rows], Any]) -> asyncio.Future[Any]:
        """Write beside the commits, with the notes, in one transaction that the fence may refuse."""
        notes, fence = dict(self._pending_notes), self.fence

        def operation(rows: Rows) -> Any:
            run = rows.find(self.run_id, lock=True)
            if run is None or (run.epoch, run.owner) != (fence.epoch, fence.owner):
                raise fence_error(rows, fence, self.run_id)
            done = do(rows)
            self._write_notes(rows, notes)
            return done

        pending = self._submit(Transaction(self.run_id, operation))
        pending.add_done_callback(partial(self._forget_notes, notes))
        return pending

    def _write_notes(self, rows: Rows, notes: Notes) -> None:
        if notes:
            record_notes(rows, self.fence.run, self.run_id, self.fence.execution, notes, self._payloads)

    def _forget_notes(self, stored: Notes, pending: asyncio.Future[Any]) -> None:
        """Drop notes that a transaction has stored; others are written again with the next one."""
        if pending.cancelled() or pending.exception() is not None:
            return
        for key, data in stored.items():
            if self._pending_notes.get(key, b"") is data:
                del self._pending_notes[key]

    async def committed(self, position: int, branches: Sequence[str]) -> Mapping[str, Committed]:
        """Return the commits in some branches of a position. Raises StoreError (CorruptCheckpoint ...)."""
        fence = self.fence

        def read(rows: Rows) -> list[StepRow]:
            return list(rows.steps_at(fence.run, fence.execution, position, branches))

        steps: list[StepRow] = await self._submit(Transaction(self.run_id, read))
        if self._payloads.plain:
            return self._to_commits(steps)
        return await asyncio.to_thread(self._to_commits, steps)

    def _to_commits(self, steps: Iterable[StepRow]) -> dict[str, Committed]:
        execution = self.fence.execution
        return {row.branch: to_committed(self._payloads, self.run_id, execution, row, {}) for row in steps}

    def delivered(self, row: AttemptRow) -> None:
        """Record, without waiting, that end hooks were called. If this is lost, they are called again."""
        run, key = self.fence.run, due_hooks_key(to_attempt(row))
        pending = self._submit(
            Transaction(
                self.run_id, lambda rows: rows.delete_annotations(run, Annotation.DUE_HOOKS, branch=key)
            )
        )
        pending.add_done_callback(lambda done: done.cancelled() or done.exception())

    def note_traceparent(self, traceparent: str) -> asyncio.Future[None]:
        """Store the trace context without waiting. If this is lost, the trace of a resumed run is not linked."""
        return self._post_fenced(lambda rows: annotate(rows, self.run_id, Annotation.TRACE, "", traceparent))

    def note_attribution(self, ids: Mapping[str, str]) -> None:
        """Store ids of what the run belongs to, without waiting. If this is lost, a resumed run belongs to nothing."""

        def write(rows: Rows) -> None:
            for kind, value in ids.items():
                annotate(rows, self.run_id, Annotation.ATTRIBUTION, kind, value)

        _ = self._post_fenced(write)

    def _post_fenced(self, do: Callable[[Rows], None]) -> asyncio.Future[None]:
        """Write without waiting, unless the run was deleted or has another owner: what is written would reach it."""
        pending = self._submit_fenced(do)
        pending.add_done_callback(lambda done: done.cancelled() or done.exception())
        return pending

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None]:
        """Store a suspended attempt and its question. Awaited: raises Fenced, or another StoreError."""
        attempt = to_attempt(row)
        attempt.identity, attempt.message = self._identities.get(row.position), storable_text(waiting.reason)
        self._seal_message(attempt)
        commit = Commit(self.run_id, self.fence, attempt, None)

        def write(rows: Rows) -> Waiting:
            rows.find(self.run_id, lock=True)  # Its answer may arrive between the read and the write.
            return self._put(waiting, rows)

        return self._know(waiting, self._submit_with(commit, write))

    def read_requests(self, rows: Rows) -> None:
        """Make the requests about the run hold. One operation; the owner knows them before they are acknowledged."""
        notify, run = self.on_control, rows.find(self.run_id, lock=True)
        if notify is None or run is None or (run.epoch, run.owner) != (self.fence.epoch, self.fence.owner):
            return
        try:
            control = accept_requests(rows, self.run_id, run.run)
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
        if self._release is not None and self.fence.owner:
            self._release(rows)
        self.abandon()

    def abandon(self) -> None:
        """Release the run without waiting: the next session need not wait for the lease to expire."""
        self.ended = True
        if hasattr(self, "fence"):
            LIVE_SESSIONS.pop(self.fence.owner.rpartition("|")[2], None)

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> Awaitable[None] | None:
        """Record how the run stopped. Awaited: raises Fenced, or another StoreError."""
        if self.finished is not None:
            if not self.fence.owner:
                return None
            status, error = self.finished.status, self.finished.error
        self.ended = True
        end = RunEnd(str(status), storable_text(error), wake_ms)
        pending = self._submit(Transaction(self.run_id, partial(self._finish, end)))
        # Only after it is stored: otherwise the run looks like one whose process died.
        pending.add_done_callback(lambda _: self.abandon())
        return pending

    def _finish(self, end: RunEnd, rows: Rows) -> None:
        before = self._completed
        if before is None or end.status not in COMPLETE:
            finish_execution(rows, self._payloads, self.fence, self.run_id, end, self._read_messages)
        else:  # A resume without anything to do leaves the run unchanged.
            unchanged = RunEnd(before.status, before.error, updated_ms=before.updated_ms)
            record_end(rows, self.fence, self.run_id, unchanged)
        self._write_notes(rows, self._pending_notes)


def _settle_charge(charge: Charge, pending: asyncio.Future[Any]) -> None:
    if not pending.cancelled() and pending.exception() is None:
        charge.settled(pending.result())
