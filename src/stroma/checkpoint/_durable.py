"""What all durable stores have in common: the journal, the simple protocol, reading, and leases that are kept up."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple, Self, TypeVar

from pydantic import BaseModel

from stroma._frames import Trouble, read_trouble
from stroma.checkpoint._leases import Keeper
from stroma.checkpoint._owner import new_owner
from stroma.checkpoint._session import (
    CANCEL,
    PICO,
    TROUBLE,
    WAITING,
    Attempt,
    Beside,
    Doing,
    DurableSession,
    Fence,
    Opening,
    Rows,
    RunRow,
    Step,
    StepRow,
    Tally,
    checksum,
    fork,
    intact,
    keep_waiting,
    read_waiting,
    verify,
    waiting_branch,
)
from stroma.checkpoint._worker import Connection, Operation, Worker, generation
from stroma.checkpoint.journal import (
    AttemptPage,
    AttemptRecord,
    Cause,
    CheckpointNotFound,
    CorruptCheckpoint,
    RunPage,
    RunQuery,
    RunRecord,
    RunRequest,
    StoreFacts,
    Waiting,
    waits_no_longer,
)
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import BLOB, BlobStore, Payloads, collect
from stroma.contracts import check_id
from stroma.schemas import Schema

__all__ = ["DurableStore"]

T = TypeVar("T")
logger = logging.getLogger("stroma")

_AT_ONCE: Final = 500  # runs that one look for old ones gives
_TOGETHER: Final = 50  # runs that one transaction deletes: others wait for it
_LOOK_AT: Final = 20_000  # runs that one page looks at one by one
_FAILED: Final = 20  # failed attempts in which the cause is looked for
_ALL_RUNS: Final = RunQuery()


class Collected(NamedTuple):
    """What a gc() deleted: how many runs, and how many blobs."""

    runs: int
    blobs: int


class DurableStore(ABC):
    """A journal store whose data outlives the process. Safe to share between tasks, threads and event loops.

    Async calls are done by a thread of ours, which does together what waits together; cancelling a caller does not
    undo what it asked for. Whatever the store cannot do is a StoreError that says how to mend it. A forked child
    connects anew.
    """

    _thread_name = "stroma-store"

    def __init__(self, payloads: Payloads | None = None) -> None:
        self._payloads = Payloads() if payloads is None else payloads
        #: By generation: a forked child finds its parent's worker here, whose thread it does not have.
        self._workers: dict[int, Worker] = {}
        self._keepers: dict[int, Keeper] = {}

    @abstractmethod
    def _connect(self) -> Connection:
        """What the worker thread does its operations on."""

    @abstractmethod
    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Read in the calling thread; ``nothing`` while the store is empty. Raises StoreError."""

    def exists(self) -> bool:
        """Whether there is anything to read from: a file is made by the first run."""
        return True

    @abstractmethod
    def _named(self) -> str:
        """What messages call the store."""

    def _worker(self) -> Worker:
        worker = self._workers.get(generation())
        if worker is None:
            fresh = Worker(self._connect(), self._thread_name)
            worker = self._workers.setdefault(generation(), fresh)
            # Not a lock, which a forked child might find held by nobody.
            if worker is fresh:
                weakref.finalize(self, fresh.stop).atexit = False
                fresh.start()
        return worker

    def post(self, operation: Callable[[Any], None]) -> None:
        """Have an operation done that nobody waits for. From any thread."""
        self._worker().post(operation)

    def _submit(self, operation: Operation) -> asyncio.Future[Any]:
        return self._worker().submit(operation)

    # ------------------------------------------------------------------ the journal

    def open_run(self, request: RunRequest) -> Awaitable[DurableSession]:
        """Begin an execution of a run, or continue its last one. Earlier sessions of the run are fenced off.

        Raises ValueError for an illegal run id and NotSerialisable for an input that cannot be kept, both at once;
        awaited: RunBusy, RunExists, PipelineChanged if the run to continue was begun with another input,
        CorruptCheckpoint, StoreError.
        """
        check_id(request.run_id, "run id")
        return self._open(request, self._encode(request.schema, request.initial_state))

    def _encode(self, schema: Schema, state: BaseModel) -> bytes:
        return schema.encode(state, secrets=self._payloads.codec is not None)

    async def _step(self, schema: Schema, data: bytes) -> Step:
        sealed = await self._payloads.seal(data)
        return Step(schema.fingerprint, schema_ref(schema.model), sealed, checksum(sealed))

    async def _open(self, request: RunRequest, data: bytes) -> DurableSession:
        opened = {} if self._payloads.plain else await asyncio.to_thread(self._open_ahead, request.run_id)
        session = DurableSession(request.run_id, self._submit, self._payloads, opened)
        sealed = await self._payloads.seal(data)
        opening = Opening(
            request.run_id,
            request.pipeline,
            str(new_owner(session, ends=request.ends)),
            request.lease_seconds,
            request.schema.fingerprint,
            sealed,
            checksum(sealed),
            request.discard_from,
            tuple(dict.fromkeys(request.tags)),
        )
        open_it = partial(session.open, request, opening, data)
        await self._submit(Doing(request.run_id, open_it, opening, session))
        if session.finished is None:
            keeper = self._keepers.get(generation())
            if keeper is None:
                keeper = self._keepers.setdefault(generation(), Keeper(self))
            keeper.watch(session)
        return session

    def _open_ahead(self, run_id: str) -> dict[bytes, bytes]:
        """What the commits of a run hold, opened outside of the transaction that claims it: that can take long."""

        def query(rows: Rows) -> list[Step]:
            found = rows.find(run_id)
            kept = [] if found is None else rows.steps(found.run, found.execution)
            return [row.step for row in kept if intact(row.step.output, row.step.sha256)]

        opened: dict[bytes, bytes] = {}
        for step in self.read(query, list[Step]()) if self.exists() else []:
            try:
                opened[step.sha256] = self._payloads.open(step.output, "")
            except CorruptCheckpoint:
                pass  # It is told in its place, if it is needed at all.
        return opened

    async def cancel(self, run_id: str) -> bool:
        """Ask whoever is at work on a run to end it; a run that nobody holds is CANCELLED at once.

        False if it had ended already. Raises CheckpointNotFound, StoreError.
        """
        check_id(run_id, "run id")

        def operation(rows: Rows) -> bool:
            found = rows.find(run_id, lock=True)
            if found is None or not found.execution:
                raise self._no_run(run_id)
            if found.holder is not None:
                rows.keep(run_id, CANCEL, "", "cancel", Step("", "", b"", checksum(b"")))
            elif found.status in ("COMPLETED", "RESUMED", "FAILED", "CANCELLED"):
                return False
            else:
                last = Fence(found.run, found.execution, found.epoch, found.owner or "", 0.0)
                rows.finish(last, "CANCELLED", None)
            return True

        done: bool = await self._submit(Doing(run_id, operation))
        return done

    async def signal(self, run_id: str, waiting: Waiting) -> None:
        """Keep the answer that a node waits for; ``waiting`` with its payload.

        Raises CheckpointNotFound, StoreError, also if the node has an answer or waits no longer.
        """
        check_id(run_id, "run id")
        answer = waiting.payload
        if answer is not None:
            waiting = waiting._replace(payload=await self._payloads.seal(answer))
        await self._submit(Doing(run_id, partial(self._answer, run_id, waiting, answer)))

    def _answer(self, run_id: str, waiting: Waiting, answer: bytes | None, rows: Rows) -> None:
        found = rows.find(run_id, lock=True)
        if found is None:
            raise self._no_run(run_id)
        branch = waiting_branch(waiting)
        asked = next((row for row in rows.kept(found.run, WAITING) if row.branch == branch), None)
        if asked is None or asked.node_id != waiting.node_id:
            raise waits_no_longer(run_id, waiting)
        if asked.step.number is None:
            keep_waiting(rows, run_id, waiting)
        elif (
            self._payloads.open(asked.step.output, "the answer it has") != answer
        ):  # Else it was sent once more.
            raise waits_no_longer(run_id, waiting)

    async def fork(
        self,
        run_id: str,
        new_run_id: str,
        before: int,
        *,
        edited: tuple[Schema, BaseModel] | None = None,
        state: tuple[Schema, BaseModel] | None = None,
    ) -> None:
        """Make a new run of what a run committed before a position: ``edited`` in place of the last of that,
        ``state`` in place of its input. Raises CheckpointNotFound, RunExists, StoreError, NotSerialisable."""
        check_id(run_id, "run id")
        check_id(new_run_id, "run id")
        step = None if edited is None else await self._step(edited[0], self._encode(*edited))
        contract, given, sha = "", b"", b""
        if state is not None:
            contract, given = state[0].fingerprint, await self._payloads.seal(self._encode(*state))
            sha = checksum(given)
        opening = Opening(new_run_id, "", str(new_owner(self, ends=False)), 0.0, contract, given, sha, None)
        await self._submit(Doing(None, lambda rows: fork(rows, run_id, opening, before, step), opening))

    # ------------------------------------------------------------------ reading

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first.

        Blocking, like all of this section; none of it makes a store. Raises StoreError.
        """
        wanted = None if status is None else str(status)

        def query(rows: Rows) -> list[RunRecord]:
            asked = RunQuery(pipeline=pipeline, statuses=() if wanted is None else (wanted,))
            found, _ = rows.runs(asked, limit=limit, after=None, look_at=None)
            return _run_records(rows, found, failed=0)

        return self.read(query, [])

    def run_page(self, query: RunQuery = _ALL_RUNS, *, limit: int = 50, after: str | None = None) -> RunPage:
        """The last executions of the runs that are asked for, the one begun last first, with the cause of failures.

        ``after``: the ``next`` of the page before. Raises ValueError for one that is none, StoreError.
        """

        def read(rows: Rows) -> RunPage:
            found, following = rows.runs(query, limit=limit, after=after, look_at=_LOOK_AT)
            return RunPage(_run_records(rows, found, failed=_FAILED), following)

        return self.read(read, RunPage([], None))

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> RunRecord | None:
            found = rows.find(run_id)
            if found is None or not found.execution:
                return None
            return _run_records(rows, [found], failed=_FAILED)[0]

        return self.read(query, None)

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id of all for "last". A whole id stands alone.

        Raises StoreError.
        """
        if prefix_or_last == "last":
            return [row.run_id for row in self.list_runs(limit=1)]
        prefix = check_id(prefix_or_last, "run id")
        found = self.read(lambda rows: rows.ids(prefix, limit), list[str]())
        return found[:1] if found[:1] == [prefix] else found

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of an execution (1-based; None is the last), by process, position and time. [] if unknown.

        A group stands before its children. Raises StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            if found is None:
                return []
            kept = rows.attempts(found.run, found.execution if execution is None else execution)
            return [self._attempt_record(run_id, attempt, step) for attempt, step in kept]

        return self.read(query, [])

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """The same, page by page, without outputs. Raises ValueError for an ``after`` that is none, StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> AttemptPage:
            found = rows.find(run_id)
            if found is None:
                return AttemptPage([], None)
            number = found.execution if execution is None else execution
            kept, following = rows.attempt_page(found.run, number, limit=limit, after=after)
            return AttemptPage([_record_of(*told) for told in kept], following)

        return self.read(query, AttemptPage([], None))

    def attempts_at(self, run_id: str, position: int, branch: str = "") -> list[AttemptRecord]:
        """Every attempt of the last execution at one place, without outputs. [] if unknown. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            kept = [] if found is None else rows.attempts_at(found.run, found.execution, position, branch)
            return [_record_of(*told) for told in kept]

        return self.read(query, [])

    def trouble_of(self, run_id: str, position: int, branch: str = "") -> Trouble | None:
        """Where the last failed attempt at a place failed; None if nothing is known. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> StepRow | None:
            found = rows.find(run_id)
            kept = [] if found is None else rows.kept(found.run, TROUBLE, f"{position}:{branch}")
            return next(iter(kept), None)

        kept = self.read(query, None)
        if (
            kept is None
            or not intact(kept.step.output, kept.step.sha256)
            or not kept.step.contract.isdecimal()
        ):
            return None
        return read_trouble(kept.step.output, kept.step.number or 0, int(kept.step.contract))

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """What is committed at a place, in its stored form (see Schema.decode); None if nothing is.

        Raises CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> StepRow | None:
            found = rows.find(run_id)
            if found is None:
                return None
            number = found.execution if execution is None else execution
            return rows.step_at(found.run, number, position, branch)

        kept = self.read(query, None)
        if kept is None:
            return None
        verify(kept.step, run_id, position, kept.node_id, branch)
        what = f"the output of node {kept.node_id!r} at position {position} of run {run_id!r}"
        return self._payloads.open(kept.step.output, what)

    def _attempt_record(self, run_id: str, attempt: Attempt, step: Step | None) -> AttemptRecord:
        output, damaged = None, False
        if step is not None:
            what = f"the output of node {attempt.node_id!r} at position {attempt.position} of run {run_id!r}"
            try:
                verify(step, run_id, attempt.position, attempt.node_id, attempt.branch)
                output = self._payloads.open(step.output, what)
            except CorruptCheckpoint:
                damaged = True  # The rest of the history can be told all the same.
        size = None if step is None else len(step.output)
        return _record_of(attempt, size, 0, output=output, damaged=damaged)

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form (see Schema.decode).

        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> tuple[str, bytes, bytes] | None:
            found = rows.find(run_id)
            return None if found is None else rows.input(found.run, found.execution)

        kept = self.read(query, None)
        if kept is None:
            raise self._no_run(run_id)
        if not intact(kept[1], kept[2]):
            raise CorruptCheckpoint(
                f"the input of run {run_id!r} is damaged; begin a new run with the input it had"
            )
        return self._payloads.open(kept[1], f"the input of run {run_id!r}")

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[Waiting]:
            found = rows.find(run_id)
            kept = (
                []
                if found is None
                else [read_waiting(row, self._payloads) for row in rows.kept(found.run, WAITING)]
            )
            return [waiting for waiting in kept if waiting is not None]

        return self.read(query, [])

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """The attempts of the runs begun since, summed up by span of time, pipeline, node, model and class.

        Of so many runs and attempts at the most, the newest runs first. Raises StoreError.
        """
        return self.read(
            lambda rows: rows.tally(since_ms, bucket_ms, runs=runs, attempts=attempts), list[Tally]()
        )

    def facts(self) -> StoreFacts | None:
        """What the store says of itself; None while it is empty. Raises StoreError."""
        return self.read(lambda rows: rows.facts(), None)

    def _no_run(self, run_id: str) -> CheckpointNotFound:
        return CheckpointNotFound(
            f"there is no run {run_id!r} in {self._named()}; check the id and the store"
        )

    # ------------------------------------------------------------------ retention

    async def gc(
        self, *, keep_for: timedelta, unfinished: bool = False, blobs: BlobStore | None = None
    ) -> Collected:
        """Delete the runs that ended longer ago than ``keep_for``, and then the blobs that nobody names.

        ``unfinished``: also those that could be resumed. ``blobs``: where those are, unless the store was given them.
        A run that somebody is at work on is never touched, nor is a blob younger than an hour. Raises StoreError.
        """
        before = time.time_ns() // 1_000_000 - int(keep_for.total_seconds() * 1000)
        deleted = 0
        while found := await asyncio.to_thread(
            self.read,
            lambda rows: rows.expired(before, unfinished=unfinished, limit=_AT_ONCE),
            list[str](),
        ):
            gone: list[bool] = []
            for first in range(0, len(found), _TOGETHER):
                # Each is looked at again in the transaction that deletes it.
                gone += await asyncio.gather(
                    *(
                        self._submit(Doing(run_id, partial(_delete_if_free, run_id, before)))
                        for run_id in found[first : first + _TOGETHER]
                    )
                )
            deleted += sum(gone)
            if not any(gone):
                break  # What is left is somebody's.
        swept, blobs = 0, blobs or self._payloads.blobs
        if blobs is not None:
            start = len(BLOB)
            named: Callable[[Rows], set[str]] = lambda rows: {kept[start:].hex() for kept in rows.blobs()}  # noqa: E731
            in_use = await asyncio.to_thread(self.read, named, set[str]())
            swept = await asyncio.to_thread(collect, blobs, in_use)
        return Collected(deleted, swept)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Write what is queued, then disconnect. Blocks until that is done; the store cannot write afterwards."""
        keeper = self._keepers.get(generation())
        if keeper is not None:
            keeper.stop()
        worker = self._worker()
        worker.stop()
        worker.join()

    async def aclose(self) -> None:
        """The same without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _delete_if_free(run_id: str, before_ms: int, rows: Rows) -> bool:
    found = rows.find(run_id, lock=True)
    if found is None or found.holder is not None or found.updated_ms >= before_ms:
        return False
    rows.delete(run_id)
    return True


def _run_records(rows: Rows, found: list[RunRow], *, failed: int) -> list[RunRecord]:
    beside = rows.beside(found, failed=failed)
    return [_run_record(row, about) for row, about in zip(found, beside, strict=True)]


def _run_record(row: RunRow, beside: Beside) -> RunRecord:
    holder = row.holder
    return RunRecord(
        row.run_id,
        row.pipeline,
        row.status,
        _number(row.execution),
        _number(row.started_ms),
        _number(row.updated_ms),
        _number(row.tokens),
        _number(row.cost_pico) / PICO,
        _number(row.nodes),
        row.error,
        None if holder is None else holder.place,
        beside.parent,
        _number(row.latency_ns) / 1e6,
        tuple(sorted(beside.tags)),
        _cause(beside.failed),
        len(beside.failed),
        _number(row.epoch),
    )


def _number(value: object) -> int:
    """A number of a row; 0 for what is none: a damaged row harms no list that it stands in."""
    return value if isinstance(value, int) else 0


def _cause(failed: list[Attempt]) -> Cause | None:
    """Of a group that failed, the child whose failure became its own: the group ends after it, with its message."""
    if not failed:
        return None
    said = (failed[0].position, failed[0].failure_class, failed[0].message)
    inside = [a for a in failed if (a.position, a.failure_class, a.message) == said]
    deepest = max(inside, key=lambda a: a.branch.count(".") + 1 if a.branch else 0)
    return Cause(
        deepest.node_id,
        deepest.position,
        deepest.branch,
        deepest.attempt,
        deepest.failure_class or "",
        deepest.reason,
        deepest.message,
    )


def _record_of(
    attempt: Attempt, size: int | None, epoch: int, *, output: bytes | None = None, damaged: bool = False
) -> AttemptRecord:
    return AttemptRecord(
        position=attempt.position,
        branch=attempt.branch,
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ms=attempt.started_ns // 1_000_000,
        duration_ms=attempt.duration_ns / 1e6,
        outcome=attempt.outcome,
        failure_class=attempt.failure_class,
        message=attempt.message,
        reason=attempt.reason,
        tokens=attempt.tokens,
        output_tokens=attempt.output_tokens,
        cost_usd=attempt.cost_pico / PICO,
        model=attempt.model,
        output=output,
        damaged=damaged,
        output_bytes=size,
        started_ns=attempt.started_ns,
        epoch=epoch,
    )
