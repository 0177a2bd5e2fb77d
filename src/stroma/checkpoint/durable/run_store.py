"""Base class of all stores with a journal: the operations on runs."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
from stroma.checkpoint.decisions import ENDED, OPEN, UNFINISHED, check_resubmission, not_waiting
from stroma.checkpoint.decoding import storable_text
from stroma.checkpoint.durable.annotations import RunRecords, annotate, find_waiting, record_waiting
from stroma.checkpoint.durable.control import (
    CANCEL,
    PAUSE,
    add_message,
    forget_requests,
    paused_due_ms,
    read_control,
    request,
    request_budget,
    request_pause,
)
from stroma.checkpoint.durable.conversion import open_step_input, to_committed
from stroma.checkpoint.durable.fork import fork_run
from stroma.checkpoint.durable.integrity import input_step
from stroma.checkpoint.durable.news import Listener
from stroma.checkpoint.durable.operations import CellChange, Transaction
from stroma.checkpoint.durable.owner import Owner, new_owner
from stroma.checkpoint.durable.reader import NO_INPUT, ReadableStore, stored_input
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, Rows, RunEnd, RunRow, Step, StepRow
from stroma.checkpoint.durable.session_open import finish_execution, has_same_input
from stroma.checkpoint.durable.worker import Operation
from stroma.checkpoint.entries import (
    Committed,
    Discard,
    RunRequest,
    SentMessage,
    Waiting,
    count_items,
    map_not_found,
)
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import BLOB, LARGE_BYTES, BlobStore, PayloadPlace, Payloads, Stored, collect
from stroma.checkpoint.queue import (
    COMPLETE,
    MAX_CLAIM_SECONDS,
    POSTPONED,
    QUEUED,
    Candidate,
    ClaimRequest,
    QueueEntry,
    QueueFigures,
    ServedCode,
    block,
    choose,
)
from stroma.contracts.codec import is_same_data
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema
from stroma.failures.errors import PAUSED

T = TypeVar("T")

_GC_PAGE_SIZE: Final = 5000  # expired runs of one query
_MAX_EXPIRED: Final = 1_000_000_000
_GC_BATCH_SIZE: Final = 50  # deletions submitted together: other operations wait for them


class Collected(NamedTuple):
    """Numbers of runs and blobs that gc() deleted."""

    runs: int
    blobs: int


class RunStore(ReadableStore):
    """A store of runs. Stores differ in the place of the rows, and in the thread that performs operations."""

    #: There was something to read at a claim.
    _had_file = False

    @abstractmethod
    def _submit(self, operation: Operation) -> Awaitable[Any]:
        """Perform an operation in a transaction. Awaited: raises StoreError."""

    async def _read_async(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Read as :meth:`read` does, without blocking the event loop. Raises StoreError."""
        return await asyncio.to_thread(self.read, query, nothing)

    def _notify_owner(self, run_id: str) -> None:
        """Have the owner of a run read the requests about it."""

    def _encode_input(self, request: RunRequest) -> Stored:
        data = self._encode(request.schema, request.initial_state)
        if isinstance(data, bytes) and len(data) > LARGE_BYTES:
            self._payloads.warn_of_size(len(data), f"the input of run {request.run_id!r}")
        return data

    @property
    def keeps_secrets(self) -> bool:
        """True if secrets may be stored: a codec encrypts them."""
        return self._payloads.codec is not None

    def _encode(self, schema: Schema, state: BaseModel) -> Stored:
        return schema.encode(state, secrets=self.keeps_secrets)

    async def _step(self, schema: Schema, data: Stored, place: PayloadPlace) -> Step:
        sealed = await self._payloads.seal(data, place)
        return Step(schema.fingerprint, schema_ref(schema.model), sealed, b"")

    async def _seal_input(self, request: RunRequest, data: Stored) -> Stored:
        sealed: Stored = await self._payloads.seal(data, PayloadPlace(request.run_id, 1, "input"))
        return sealed

    def _opening(self, request: RunRequest, sealed: Stored, owner: object) -> Opening:
        return Opening(
            run_id=request.run_id,
            pipeline=request.pipeline,
            owner=str(owner),
            lease_seconds=request.lease_seconds,
            input=input_step(request.schema.fingerprint, sealed),
            discard=Discard(request.discard_from),
            tags=tuple(dict.fromkeys(request.tags)),
            version=request.version,
        )

    # ------------------------------------------------------------------ queue

    async def submit(self, request: RunRequest, entry: QueueEntry) -> bool:
        """Create a QUEUED run, which a worker starts. Return False if it exists already, whatever its status.

        Raises ValueError for an illegal run id, NotSerialisable, RunExists for a run with another pipeline or
        input, StoreError.
        """
        check_id(request.run_id, "run id")
        data = self._encode_input(request)
        sealed = await self._seal_input(request, data)
        opening = self._opening(request, sealed, new_owner(None))

        def submit(rows: Rows) -> bool:
            return submit_run(rows, self._payloads, request, opening, data, entry)

        is_new: bool = await self._submit(Transaction(request.run_id, submit, opening))
        return is_new

    async def load_input(self, run_id: str) -> bytes:
        """Return the same as :meth:`input_of`, read in the thread that writes: at once for several runs."""

        def read(rows: Rows) -> tuple[int, StepRow | None]:
            run = rows.find(run_id)
            return NO_INPUT if run is None else stored_input(RunRecords.of(rows, run, self._payloads))

        execution, stored = await self._submit(Transaction(run_id, read))
        if self._payloads.plain:
            return self._open_input(run_id, execution, stored)
        return await asyncio.to_thread(self._open_input, run_id, execution, stored)

    async def attribute(self, run_id: str, ids: Mapping[str, str]) -> None:
        """Store the ids that a run belongs to, by kind, such as "target", without a session.

        Raises StoreError.
        """

        def write(rows: Rows) -> None:
            for kind, value in ids.items():
                annotate(rows, rows.key_of(run_id), Annotation.ATTRIBUTION, kind, value)

        await self._submit(Transaction(run_id, write))

    async def claim(self, request: ClaimRequest) -> list[Candidate]:
        """Claim due runs for a worker, the first ones first. Raises StoreError."""
        if self.exists():
            self._had_file = True
        elif self._had_file:
            raise StoreError(
                f"{self._display_name()} was deleted or moved while this process used it; restore it, or end "
                "this process to begin with an empty store"
            )
        else:
            return []
        claimed: list[Candidate] = await self._submit(
            Transaction(None, lambda rows: claim_runs(rows, request))
        )
        return claimed

    def listen(self, on_news: Callable[[], None]) -> Listener | None:
        """Call a function, in another thread, when a run was made due; None if that is not reported."""
        return None

    async def postpone(self, run_id: str, token: str, due_ms: int | None) -> None:
        """Give back a claimed run that was not continued, and make it due later; None: as it was.

        Raises StoreError.
        """

        def postpone(rows: Rows) -> None:
            run = rows.find(run_id, lock=True)
            if run is not None and run.claim == token:
                one = Candidate(run.run, run_id, run.pipeline)
                if due_ms is None or run.status in UNFINISHED:
                    if due_ms is not None:
                        rows.wake(run, due_ms)
                    rows.claim([one], token, -1.0)
                else:  # Its owner is gone, and how often that happened is counted when somebody opens it.
                    seconds = (due_ms - rows.now_ms()) / 1000
                    rows.claim([one], POSTPONED, min(seconds, MAX_CLAIM_SECONDS))

        await self._submit(Transaction(run_id, postpone))

    async def block(self, run_id: str, message: str, code: str, token: str | None, now_ms: int) -> None:
        """Mark a run as blocked for code that cannot continue it, and end the claim with this token.

        Nothing happens if the run has ended, or has an owner. Raises StoreError.
        """

        def mark(rows: Rows) -> None:
            run = rows.find(run_id, lock=True)
            if run is None or run.holder is not None:
                return
            if run.status in OPEN:
                place = PayloadPlace(run_id, run.execution, "blocked")
                sealed = self._payloads.seal_text(storable_text(message), place) or ""
                rows.block(run, block(run.mark, sealed, code, now_ms))
            if token is not None and run.claim == token:
                rows.claim([Candidate(run.run, run_id, run.pipeline)], token, -1.0)

        await self._submit(Transaction(run_id, mark))

    def queue_figures(self, served: Mapping[str, ServedCode], now_ms: int) -> dict[str, QueueFigures]:
        """Return the figures of the queues of these pipelines at a time. Blocking. Raises StoreError."""
        nothing = dict.fromkeys(served, QueueFigures(0, None))
        if not self.exists():
            return nothing
        return self.read(
            lambda rows: {
                name: rows.queue_figures(name, code.versions, now_ms) for name, code in served.items()
            },
            nothing,
        )

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Return the statuses of these runs by id, without unknown ones. Blocking. Raises StoreError."""
        return self.read(lambda rows: rows.statuses(run_ids), dict[str, str]()) if self.exists() else {}

    async def cancel(self, run_id: str) -> bool:
        """Ask the owner of a run to end it; a run without an owner is CANCELLED at once.

        Returns False if the run had ended. Raises CheckpointNotFound, StoreError.
        """
        new = str(new_owner(None))

        def do(records: RunRecords, run: RunRow) -> bool:
            if run.holder is not None:
                request(records, CANCEL)
            elif run.status in ENDED:
                return run.owner == new  # An earlier try, whose answer was lost, has ended it.
            else:
                finish_execution(records, _fence_off(records.rows, run, new), RunEnd("CANCELLED"))
                if not _records_end(run):
                    request(records, CANCEL)
            return True

        return await self._request(run_id, do)

    async def pause(self, run_id: str) -> bool:
        """Ask the owner of a run to begin no further attempt; one without an owner is SUSPENDED at once.

        It stays so until it is resumed. Returns False if the run had ended. Raises CheckpointNotFound,
        StoreError.
        """
        new = str(new_owner(None))

        def do(records: RunRecords, run: RunRow) -> bool:
            if run.holder is None and run.status not in OPEN:
                return False
            request_pause(records, run)
            if run.holder is None:
                finish_execution(records, _fence_off(records.rows, run, new), RunEnd("SUSPENDED", PAUSED))
                records.rows.wake(run, None)
            return True

        return await self._request(run_id, do)

    async def unpause(self, run_id: str) -> bool:
        """End a pause: the run is due, so that a worker continues it.

        A run that had not started is queued again, as it was. Returns False if it was not paused, or has
        ended. Raises CheckpointNotFound, StoreError.
        """
        new = str(new_owner(None))

        def do(records: RunRecords, run: RunRow) -> bool:
            if not read_control(records).pause:
                return False
            due_ms = paused_due_ms(records)
            forget_requests(records, PAUSE)
            if run.holder is None and run.status not in OPEN:
                return False
            _end_pause(records.rows, run, due_ms, new)
            return True

        return await self._request(run_id, do)

    async def reopen(self, run_id: str) -> bool:
        """Make a run due that stopped, failed or was cancelled, and take a pause back as unpause() does.

        Returns False if it is complete, or has an owner. Raises CheckpointNotFound, StoreError.
        """
        new = str(new_owner(None))

        def do(records: RunRecords, run: RunRow) -> bool:
            if run.holder is not None or run.status in COMPLETE:
                return False
            due_ms = paused_due_ms(records)
            forget_requests(records, CANCEL, PAUSE)
            if run.mark is not None:
                records.rows.block(run, None)
            if run.status in UNFINISHED:
                _end_pause(records.rows, run, due_ms, new)
            elif run.status != "RUNNING":  # One whose owner died is due as it is.
                finish_execution(records, _fence_off(records.rows, run, new), RunEnd("INTERRUPTED"))
            return True

        return await self._request(run_id, do)

    async def set_budget(self, run_id: str, limits: Mapping[str, float]) -> bool:
        """Change limits of a run, by field of ExecutionBudget; a suspended one is due at once.

        They apply to the current execution, in every process. An owner that did not renew its lease loses the
        run, since it might start an attempt before it reads them. Returns False if the run is complete.
        Raises CheckpointNotFound, StoreError.
        """

        def do(records: RunRecords, run: RunRow) -> bool:
            if run.holder is None and run.status in COMPLETE:
                return False
            request_budget(records, limits)
            if run.holder is not None or run.status == "SUSPENDED":
                # Any of its branches may wait for the budget, or be about to; a replay too many is free.
                if not read_control(records).pause:
                    records.rows.wake(run)
            elif run.status == "RUNNING":
                owner = Owner.read(run.owner)
                if owner is not None and owner.records_end and run.left_seconds < 0:
                    # Still a run of that process, which may have died: the one that takes it over counts
                    # that.
                    records.rows.replace_owner(run, str(owner.fenced_off()))
            return True

        return await self._request(run_id, do)

    async def _request(self, run_id: str, do: Callable[[RunRecords, RunRow], bool]) -> bool:
        """Store a request about a run. Raises CheckpointNotFound, StoreError."""
        check_id(run_id, "run id")

        def operation(rows: Rows) -> bool:
            run = rows.find(run_id, lock=True)
            if run is None or not run.execution:
                raise self._no_run(run_id)
            return do(RunRecords.of(rows, run, self._payloads), run)

        done: bool = await self._submit(Transaction(run_id, operation))
        self._notify_owner(run_id)
        return done

    def is_request_pending(self, run_id: str) -> bool:
        """Return True while the owner of a run has not read all requests. Blocking. Raises StoreError."""

        def query(rows: Rows) -> bool:
            run = rows.find(run_id)
            return run is not None and run.holder is not None and bool(rows.with_requests([run.run]))

        return self.read(query, False)

    async def signal(self, run_id: str, waiting: Waiting) -> None:
        """Store the answer that a node waits for; ``waiting`` has the payload.

        Raises CheckpointNotFound, StoreError, RequestRefused if the node no longer waits for an answer.
        """
        check_id(run_id, "run id")
        await self._submit(Transaction(run_id, partial(self._answer, run_id, waiting)))

    def _answer(self, run_id: str, waiting: Waiting, rows: Rows) -> None:
        run = rows.find(run_id, lock=True)
        if run is None:
            raise self._no_run(run_id)
        records = RunRecords.of(rows, run, self._payloads)
        stored = find_waiting(records, waiting)
        if stored is None or stored.id != waiting.id or not _takes(stored, waiting):
            raise not_waiting(run_id, waiting.id, stored)
        if stored.payload is None:  # An equal answer may be sent twice.
            answered = stored._replace(payload=waiting.payload, answered_ms=rows.now_ms())
            record_waiting(records, answered)
            rows.wake(run)

    async def send(self, run_id: str, message: SentMessage) -> None:
        """Store a message to a run, which is due then if it is suspended; ``message.number`` is 0.

        Nothing happens if the message of this id is stored. Raises CheckpointNotFound, StoreError,
        RequestRefused if the run has ended and for another message with this id.
        """

        def do(records: RunRecords, run: RunRow) -> bool:
            add_message(records, run, message)
            return True

        await self._request(run_id, do)

    async def fork(
        self,
        run_id: str,
        new_run_id: str,
        before: int,
        *,
        edited: tuple[Schema, BaseModel] | None = None,
        edited_node: str | None = None,
        state: tuple[Schema, BaseModel] | None = None,
        call: str | None = None,
    ) -> None:
        """Copy what a run committed before a position into a new run.

        ``edited`` replaces the last output, that of the node ``edited_node``, which may have none; ``state``
        replaces the input. ``call``: a call of the flow at that position, by its node id or its place: what
        the flow got before the end of that call is copied too, and ``edited`` is the output of that call.
        Raises CheckpointNotFound, RunExists, StoreError, NotSerialisable.
        """
        check_id(run_id, "run id")
        check_id(new_run_id, "run id")
        step = None
        if edited is not None:
            place = PayloadPlace(new_run_id, 1, "output", before - 1)
            step = await self._step(edited[0], self._encode(*edited), place)
        initial = None
        if state is not None:
            place = PayloadPlace(new_run_id, 1, "input")
            sealed = await self._payloads.seal(self._encode(*state), place)
            initial = input_step(state[0].fingerprint, sealed)
        opening = Opening(new_run_id, "", str(new_owner(None)), 0.0, initial)

        def fork(rows: Rows) -> None:
            fork_run(rows, self._payloads, run_id, opening, before, step, edited_node, call)

        await self._submit(Transaction(None, fork, opening))

    # ------------------------------------------------------------------ items

    def map_items(self, run_id: str, node_id: str, first: int, count: int) -> list[tuple[int, Committed]]:
        """Return committed items of a map in the last execution, from an index on; [] after the last one.

        Raises CheckpointNotFound if there is no such completed map, CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> tuple[int, list[StepRow]]:
            run, output = rows.find(run_id), rows.newest_output(run_id, node_id)
            if run is None or output is None or output.step.input_key is None:
                return 0, []
            position, branch = output.position, output.branch
            total = count_items(open_step_input(self._payloads, run_id, run.execution, output) or b"")
            prefix = f"{branch}." if branch else ""
            places = [(position, f"{prefix}{index}") for index in range(first, min(total, first + count))]
            return run.execution, list(rows.steps_at(run.run, run.execution, places))

        execution, steps = self.read(query, (0, list[StepRow]()))
        if not execution:
            raise map_not_found(run_id, node_id)
        items = [
            (int(row.branch.rpartition(".")[2]), to_committed(self._payloads, run_id, execution, row))
            for row in steps
        ]
        return sorted(items, key=itemgetter(0))

    # ------------------------------------------------------------------ cells

    def change_cell(self, name: str, change: Change[T]) -> Awaitable[T]:
        """Change a cell as one transaction; see CellStore. Raises ValueError; awaited: StoreError."""
        return self._submit(changing(name, change))

    def read_cell(self, name: str) -> tuple[bytes | None, int]:
        """Return the data of a cell, or None, and the clock in milliseconds. Blocking. Raises StoreError."""
        check_id(name, "cell name")
        nothing: tuple[bytes | None, int] = (None, time.time_ns() // 1_000_000)
        return self.read(lambda rows: rows.read_cell(name), nothing) if self.exists() else nothing

    # ------------------------------------------------------------------ retention

    def expired(self, keep_for: timedelta, *, unfinished: bool = False) -> list[str]:
        """Return the ids of the runs that :meth:`gc` would delete if none has an owner. Raises StoreError."""
        ms, most = int(keep_for.total_seconds() * 1000), _MAX_EXPIRED
        return self.read(
            lambda rows: rows.expired_run_ids(rows.now_ms() - ms, unfinished=unfinished, limit=most), []
        )

    async def gc(
        self, *, keep_for: timedelta, unfinished: bool = False, blobs: BlobStore | None = None
    ) -> Collected:
        """Delete the runs that ended longer ago than ``keep_for``, and then the blobs that no run references.

        ``unfinished``: also runs that could be resumed. ``blobs``: the blob store, if the store has none.
        Runs with an owner and blobs younger than an hour are never deleted. Ages are measured by the clock of
        the store's server, if it has one; the clock of the blobs must differ by less than an hour. Raises
        StoreError.
        """
        blobs = blobs or self._payloads.blobs
        now_ms = await self._read_async(lambda rows: rows.now_ms(), 0)
        before = now_ms - int(keep_for.total_seconds() * 1000)
        deleted = 0
        while run_ids := await self._read_async(
            lambda rows: rows.expired_run_ids(before, unfinished=unfinished, limit=_GC_PAGE_SIZE), list[str]()
        ):
            results: list[bool] = []
            for first in range(0, len(run_ids), _GC_BATCH_SIZE):
                # The transaction that deletes a run checks it again.
                results += await asyncio.gather(
                    *(
                        self._submit(Transaction(run_id, partial(_delete_if_free, run_id, before)))
                        for run_id in run_ids[first : first + _GC_BATCH_SIZE]
                    )
                )
            deleted += sum(results)
            if not any(results):
                break  # The remaining runs have owners.
        swept = 0
        if blobs is not None:
            in_use = await self._read_async(_referenced_blobs, set[str]())
            swept = await asyncio.to_thread(collect, blobs, in_use, now_ms / 1000)
        return Collected(deleted, swept)


def _takes(stored: Waiting, answer: Waiting) -> bool:
    """Return True if a question is open, or has this answer already."""
    if stored.payload is None or answer.payload is None:
        return stored.payload is None
    return is_same_data(stored.payload, answer.payload)


def changing(name: str, change: Change[Any]) -> CellChange:
    """Return the change of a cell as an operation. Raises ValueError for an illegal name."""
    return CellChange(check_id(name, "cell name"), change)


def _records_end(run: RunRow) -> bool:
    owner = Owner.read(run.owner)
    return owner is None or owner.records_end


def _fence_off(rows: Rows, run: RunRow, owner: str) -> Fence:
    """Return the fence for the end of a run without an owner.

    A process that only lost its lease loses the run too. Plain code whose session records no end keeps it: it
    has no lease, and its outputs are stored.
    """
    if _records_end(run):
        return rows.replace_owner(run, owner)
    return Fence(run.run, run.execution, run.epoch, run.owner or "", 0.0)


def _end_pause(rows: Rows, run: RunRow, due_ms: int | None, owner: str) -> None:
    """Make a run due; one that was paused before it started is queued again, as it was."""
    if run.status == QUEUED:
        rows.wake(run, min(run.wake_ms or 0, rows.now_ms()))
    elif due_ms is None or run.holder is not None:
        rows.wake(run)
    else:
        entry = QueueEntry(due_ms, run.priority or 0, run.key, run.expires_ms)
        rows.enqueue(_fence_off(rows, run, owner), entry)


def submit_run(
    rows: Rows, payloads: Payloads, request: RunRequest, opening: Opening, data: Stored, entry: QueueEntry
) -> bool:
    """Create a QUEUED run. Return False if it exists with the same pipeline and input.

    Raises RunExists, and CorruptCheckpoint for an input that cannot be read.
    """
    run = rows.find(request.run_id, lock=True)
    if run is not None and run.execution:
        stored = next(iter(rows.annotations(run.run, Annotation.INPUT)), None)
        compared = request._replace(if_exists="return")
        is_same = has_same_input(stored, run, payloads, compared, opening, data)
        check_resubmission(request, run.pipeline, is_same, run.execution, run.status)
        return False
    rows.enqueue(rows.begin(run, opening), entry)
    return True


def claim_runs(rows: Rows, request: ClaimRequest) -> list[Candidate]:
    """Claim due runs for a worker, the first ones first; see :func:`stroma.checkpoint.queue.choose`."""
    limited = [name for name, limits in request.pipelines.items() if any(one is not None for one in limits)]
    for name in sorted(limited):  # Of two workers that count live runs, one waits for the other.
        _, _ = rows.read_cell(f"stroma claims of {name}", lock=True)
    candidates = [one for name in request.pipelines for one in rows.candidates(name, request)]
    counted = {*limited, *(one.pipeline for one in candidates if one.key is not None)}
    chosen = choose(candidates, {name: rows.live_runs(name) for name in counted}, request)
    if not chosen:
        return []
    for name in limited:
        rows.write_cell(f"stroma claims of {name}", request.token.encode())
    return rows.claim(chosen, request.token, request.seconds)


def _referenced_blobs(rows: Rows) -> set[str]:
    return {reference[len(BLOB) :].hex() for reference in rows.blobs()}


def _delete_if_free(run_id: str, before_ms: int, rows: Rows) -> bool:
    run = rows.find(run_id, lock=True)
    if run is None or run.holder is not None or run.updated_ms >= before_ms:
        return False
    rows.delete(run_id)
    return True
