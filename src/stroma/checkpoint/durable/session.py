"""One execution of a run in a durable store: how it begins, what it keeps, and the fence around it.

Everything that is decided is decided here, once for all stores. A store only has to read and write plain rows
(:class:`Rows`): all of one operation in one transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.annotations import (
    due_hooks_key,
    record_due_hooks,
    record_waiting,
    read_due_hooks,
    read_waiting,
    waiting_key,
)
from stroma.checkpoint.durable.owner import LIVE_SESSIONS, Owner
from stroma.checkpoint.durable.rows import (
    CANCEL,
    DEATHS,
    DUE,
    PARENT,
    TRACE,
    TROUBLE,
    WAITING,
    CellChange,
    Commit,
    Transaction,
    Fence,
    Opening,
    Rows,
    RunRow,
    Step,
    StepRow,
    Submit,
    checksum,
    is_intact,
    lost_error,
    fence_error,
    require_undamaged,
    storable_text,
    verify_step,
)
from stroma.checkpoint.errors import CheckpointNotFound, RunExists, StoreError
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import BLOB, Payloads, PayloadPlace
from stroma.checkpoint.protocols import (
    COMPLETE,
    ENDED,
    Charge,
    Committed,
    Finished,
    LastExecution,
    PriorUsage,
    RunRequest,
    StepCall,
    Tried,
    Waiting,
    decide,
    is_answered_meanwhile,
)
from stroma.checkpoint.records import PICO, Attempt
from stroma.contracts.copying import Packed
from stroma.contracts.schema import Given, Schema, Snapshot, Stored
from stroma.trace.events import NO_USAGE, AttemptRow, contract_of

__all__ = ["DurableSession", "fork"]

Opened = tuple[PayloadPlace, bytes]


class DurableSession:
    """One execution of a run, held by this process until it ends, or until another one takes it over.

    Attributes: see :class:`stroma.checkpoint.protocols.Session`.
    """

    __slots__ = (
        "__weakref__",
        "_called",
        "_deliver",
        "_large",
        "_opened",
        "_packed",
        "_payloads",
        "_placed",
        "_submit",
        "_troubles",
        "_was",
        "address",
        "charges",
        "continued",
        "ended",
        "execution",
        "fence",
        "finished",
        "on_cancel",
        "places",
        "prior",
        "restored",
        "run_id",
        "traceparent",
        "tried",
        "undelivered",
        "waiting",
    )

    fence: Fence
    execution: int
    continued: bool
    waiting: dict[tuple[int, str], Waiting]
    finished: Finished | None
    places: Mapping[str, int]
    prior: PriorUsage
    restored: Mapping[tuple[int, str], Committed]
    tried: Mapping[tuple[int, str], Tried]
    traceparent: str | None
    undelivered: list[AttemptRow]

    def __init__(
        self,
        run_id: str,
        submit: Submit,
        payloads: Payloads,
        opened: Mapping[Opened, bytes] | None = None,
        address: str = "",
    ) -> None:
        """``opened``: payloads that were opened before, by their place and the checksum of what is stored."""
        self.run_id, self.address = run_id, address
        self._payloads = payloads
        self._opened = opened or {}
        self.on_cancel: Callable[[], None] | None = None
        #: Whether its lease need not be kept up any more.
        self.ended = False
        self._submit = submit
        self._troubles: dict[tuple[int, str], tuple[int, int, bytes]] = {}
        self.charges: dict[tuple[int, str], Charge] = {}
        #: The run as it was found, if it had completed and nothing was recorded since.
        self._was: RunRow | None = None
        #: The identity of the step of plain code at each position.
        self._called: dict[int, str] = {}
        #: References to payloads that this session put into blobs, by the checksums of their contents, and by the places of
        #: commits that nobody has asked for yet.
        self._large: dict[bytes, Stored] = {}
        self._placed: dict[tuple[int, str], Stored] = {}
        #: The snapshot of the last output that stands in a blob, and the reference to it.
        self._packed: tuple[Packed | None, Stored | None] = (None, None)

    def open(self, request: RunRequest, opening: Opening, given: bytes, rows: Rows) -> DurableSession:
        """One operation: a request that is refused changes nothing and fences nobody off. ``given``: the plain input."""
        run_id = request.run_id
        found = rows.find(run_id, lock=True)
        kept = None
        if found is not None and found.execution > 0:
            kept = rows.input(found.run, found.execution)
        # Without its input a run is damaged, which is said below, unless it begins anew.
        same = (
            found is None
            or kept is None
            or kept[2] == opening.sha256
            or self._is(given, kept, request, found.execution)
        )
        way = decide(request, None if found is None or not found.execution else _last_execution(found), same)
        if way != "begin" and found is not None and not rows.is_whole(found):
            raise lost_error(run_id, "some of its rows are missing")
        self.restored, self.prior, self.traceparent, self.tried = {}, PriorUsage(), None, {}
        self.places = {}
        self.undelivered, self._deliver = [], request.deliver
        self.finished, self.waiting = None, {}
        if way == "begin" or found is None:
            self.fence = rows.begin(found, self._sealed_for_next(found, opening, given))
        else:
            self.prior = PriorUsage(found.tokens, found.cost_pico / PICO, found.latency_ns / 1e6)
            self.places = dict(rows.identities(found.run, found.execution))
            self._called = {position: identity for identity, position in self.places.items()}
            commits = {
                (row.position, row.branch): self._committed(found.execution, row)
                for row in rows.steps(found.run, found.execution, request.lazily_loaded)
                if request.discard_from is None or row.position < request.discard_from
            }
            if request.retry_failed:
                request = request.resolve_discard(commits)
                opening = opening._replace(discard_from=request.discard_from)
            self.restored = request.accept_commits(commits)
            if way == "return":
                self.finished = Finished(found.status, self._error_of(found))
                self.fence = Fence(found.run, found.execution, found.epoch, "", 0.0)
            elif found.status not in ENDED and any(rows.annotations(found.run, CANCEL)):
                # Acknowledged, and its owner stopped before it knew.
                self._claim_to_end(rows, found, request, opening, Finished("CANCELLED", None))
            else:
                self._recover(rows, found, request, opening)
                if found.status in COMPLETE and request.discard_from is None:
                    self._was = found
        self.continued = way == "continue" and self.finished is None
        if found is not None:
            self._look_beside(rows, found, request)
        self.execution = self.fence.execution
        self._opened = {}
        return self

    def _recover(self, rows: Rows, found: RunRow, request: RunRequest, opening: Opening) -> None:
        """Go on with the execution, or give it up: its process may have died under it too often.

        A death is a run that is RUNNING though its owner, which says when it ends, is gone; it is counted when the run is
        taken over, and so costs no write before. Deaths that follow one another stand in one row: their number, and the
        epochs in which they began and of the one who counted last.
        """
        owner = Owner.read(found.owner)
        died = found.status == "RUNNING" and owner is not None and owner.may_die
        kept = (
            next(iter(rows.annotations(found.run, DEATHS)), None)
            if died or found.status == "FAILED" or request.force
            else None
        )
        number, first = 0, found.epoch
        if kept is not None:
            number = kept.step.number or 0
            if kept.step.schema_ref == str(found.epoch):
                first = int(kept.step.contract)
        number += died
        if request.force:
            rows.delete_annotations(found.run, DEATHS)
        elif (
            request.max_recoveries is not None
            and number >= request.max_recoveries
            and (died or kept is not None)
        ):
            error = (
                f"poison: the process died {number} times under this run; see what kills it, then resume it with "
                "force_resume=True, or stroma resume --force"
            )
            if died:
                self._claim_to_end(rows, found, request, opening, Finished("FAILED", error, "poison"))
                self._count_deaths(rows, number, first)
            else:
                self.fence = Fence(found.run, found.execution, found.epoch, "", 0.0)
                self.finished = Finished("FAILED", self._error_of(found), "poison")
            return
        self.fence = rows.take_over(found, opening)
        if died and not request.force:
            self._count_deaths(rows, number, first)
            if request.discard_from is None:
                failed = map(self._readable, rows.failed_since(found.run, found.execution, first))
                self.tried = _tried(failed, self.restored)

    def _claim_to_end(
        self, rows: Rows, found: RunRow, request: RunRequest, opening: Opening, finished: Finished
    ) -> None:
        """Take the execution over only to end it: by :meth:`end`, or at once for who never calls that.

        The claim fences off an owner that is only late.
        """
        self.fence = rows.take_over(found, opening._replace(discard_from=None))
        self.finished = finished
        if not request.ends:
            self._finish(finished.status, finished.error, rows)

    def _count_deaths(self, rows: Rows, number: int, first: int) -> None:
        step = Step(str(first), str(self.fence.epoch), b"", checksum(b""), number)
        rows.annotate(self.run_id, DEATHS, "", "deaths", step)

    def _error_of(self, found: RunRow) -> str | None:
        return self._payloads.open_text(found.error, self._place("error", found.execution))

    def _readable(self, attempt: Attempt) -> Attempt:
        place = self._place("message", self.fence.execution, attempt.position, attempt.branch)
        return attempt._replace(message=self._payloads.open_text(attempt.message, place))

    def _place(self, kind: str, execution: int, position: int = 0, branch: str = "") -> PayloadPlace:
        return PayloadPlace(self.run_id, execution, kind, position, branch)

    def _sealed_for_next(self, found: RunRow | None, opening: Opening, given: bytes) -> Opening:
        """Seal the input again if somebody else has begun the execution that it was sealed for."""
        execution = 1 if found is None else found.execution + 1
        if self._payloads.codec is None or execution == opening.execution:
            return opening
        sealed = self._payloads.seal_now(given, self._place("input", execution))
        return opening._replace(input=sealed, sha256=checksum(sealed), execution=execution)

    def _is(self, given: bytes, kept: tuple[str, bytes, bytes], request: RunRequest, execution: int) -> bool:
        """Whether an input with another checksum is the same all the same: a codec need not give the same bytes twice."""
        if self._payloads.is_plain(kept[1]) or not is_intact(kept[1], kept[2]):
            return False
        try:
            place = self._place("input", execution)
            return self._payloads.open(kept[1], place, f"the input of run {request.run_id!r}") == given
        except StoreError:
            if request.if_exists in ("restart", "error") or request.discard_from is not None:
                return False  # What the run began with is no matter to who does not go on with it.
            raise

    def _look_beside(self, rows: Rows, found: RunRow, request: RunRequest) -> None:
        """What nodes wait for belongs to an execution and its commits; a cancel() that came too late ends no other."""
        ours = self.finished is None
        if ours:
            rows.delete_annotations(found.run, CANCEL)
        if ours and not self.continued:
            rows.delete_annotations(found.run, TRACE)
            rows.delete_annotations(found.run, DUE)
            rows.delete_annotations(found.run, TROUBLE)
            rows.delete_annotations(found.run, DEATHS)
            rows.delete_annotations(found.run, WAITING)
            return  # A store that writes at the end of an operation would still read what was dropped.
        self.traceparent = next((kept.node_id for kept in rows.annotations(found.run, TRACE)), None)
        if ours and self.continued and self._deliver:
            kept_due = [
                read_due_hooks(kept, self.run_id, found.execution, self._payloads)
                for kept in rows.annotations(found.run, DUE)
            ]
            due = [row for row in kept_due if row is not None]
            self.undelivered = sorted(due, key=lambda row: row.started_ns)
        for kept in list(rows.annotations(found.run, WAITING)):
            waiting = read_waiting(kept, self.run_id, found.execution, self._payloads)
            first = request.discard_from
            if waiting is None or (first is not None and waiting.position >= first):
                rows.delete_annotations(found.run, WAITING, kept.branch)
            else:
                self.waiting[waiting.position, waiting.branch] = waiting

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None]:
        """Keep one attempt and, with ``output``, its commit: together or not at all.

        Raises NotSerialisable at once; awaited: Fenced, or another StoreError. Repeating the call after an error is
        safe: an attempt that was kept all the same is not counted twice.
        """
        if output is None or schema is None:
            return self._keep(Commit(self.run_id, self.fence, self._attempt(row), None))
        data = schema.encode(output, secrets=self._payloads.codec is not None)
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
            stored = self._reference(data, place, "a state of the trace")
            self._large[await asyncio.to_thread(checksum, plain)] = stored
            self._placed[row.position, row.branch] = stored
        del plain
        if call is not None and call.given is not None:
            call = call._replace(given=await self._payloads.seal(call.given, self._place("given", *at)))
        await self._commit(row, schema, data, call)

    def with_references(self, row: AttemptRow) -> AttemptRow:
        """Return the row of an attempt with references in place of states that stand in blobs, for who keeps it in memory."""
        made = self._placed.pop((row.position, row.branch), None)
        schemas = row.schemas
        if not self._large or schemas is None:
            return row
        given = row.input
        stored = self._stored_input(schemas[0], given)
        if stored is not None:
            given = Given(stored) if isinstance(given, Given) else stored
        output = row.output
        if made is not None:
            if isinstance(output, Packed):  # The input of the next node may be the very same.
                self._packed = output, made
            output = made
        return row._replace(input=given, output=output)

    def _stored_input(self, schema: Schema, snapshot: Snapshot) -> Stored | None:
        """Return a reference to a large input: mostly it is the output before it."""
        if isinstance(snapshot, Given) and snapshot.source is self._packed[0]:
            return self._packed[1]
        found = snapshot.source if isinstance(snapshot, Given) else snapshot
        data = found if isinstance(found, bytes) else None
        size = 0
        if isinstance(found, tuple):
            size = sum(len(value) for value in found if isinstance(value, (str, bytes)))
        elif isinstance(found, Packed) and found is snapshot:
            size = found.size
        if 4 * size >= self._payloads.blob_bytes:  # In UTF-8 it may be that much larger, and in JSON smaller.
            try:
                data = schema.encode(schema.restore(snapshot), secrets=self._payloads.codec is not None)
            except Exception:  # It has no stored form.
                return None
        if data is None or len(data) < self._payloads.blob_bytes:
            return None
        return self._large.get(checksum(data))

    def _reference(self, stored: bytes, place: PayloadPlace, what: str) -> Stored:
        return Stored(partial(self._payloads.open, stored, place, what))

    def _commit(self, row: AttemptRow, schema: Schema, data: bytes, call: StepCall | None) -> Awaitable[None]:
        contract, ref = contract_of(row, schema), schema_ref(schema.model)
        number, given = (None, None) if call is None else (call.number, call.given)
        step = Step(contract, ref, data, checksum(data), number, given)
        return self._keep(Commit(self.run_id, self.fence, self._attempt(row), step))

    def note_call(self, position: int, identity: str) -> None:
        """Have each attempt that is recorded at a position, or inside it, say which step of plain code it is of."""
        self._called[position] = identity

    def _attempt(self, row: AttemptRow) -> Attempt:
        attempt = self._called_attempt(row)
        if self._payloads.codec is None or attempt.message is None:
            return attempt
        return attempt._replace(message=self._sealed_message(attempt, attempt.message))

    def _called_attempt(self, row: AttemptRow) -> Attempt:
        attempt = _attempt(row)
        return attempt._replace(identity=self._called.get(row.position)) if self._called else attempt

    def _sealed_message(self, attempt: Attempt, message: str) -> str | None:
        place = self._place("message", self.fence.execution, attempt.position, attempt.branch)
        return self._payloads.seal_text(storable_text(message), place)

    @property
    def epoch(self) -> int:
        """Raised by each session that opens the run."""
        return self.fence.epoch

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """Keep where an attempt failed together with it, when it is recorded; in place of what failed there before.

        Not under a codec: lines of source would stand beside what it hides.
        """
        if self._payloads.codec is None and (data := write()):
            self._troubles[position, branch] = (attempt, started_ns, data)

    def _keep(self, commit: Commit) -> Awaitable[None]:
        attempt, self._was = commit.attempt, None
        trouble = self._troubles.pop((attempt.position, attempt.branch), None)
        if trouble is not None and trouble[1] != attempt.started_ns:
            trouble = None
        if not self._deliver and trouble is None and not self.charges:
            return self._submit(commit)

        def beside(rows: Rows) -> None:
            if trouble is not None:
                number, started_ns, data = trouble
                step = Step(str(started_ns), "", data, checksum(data), number)
                rows.annotate(self.run_id, TROUBLE, f"{attempt.position}:{attempt.branch}", attempt.node_id, step)

        return self._with(commit, beside)

    def _with(self, commit: Commit, beside: Callable[[Rows], None]) -> asyncio.Future[Any]:
        """Make a commit, and in its transaction all that belongs to it: hooks that are due, and what it settles."""
        attempt, self._was = commit.attempt, None
        charge = self.charges.get((attempt.position, attempt.branch))
        changes: list[tuple[str, Change[Any]]] = []
        if charge is not None:
            changes = charge.changes(attempt.tokens, attempt.cost_pico, committed=commit.step is not None)

        def operation(rows: Rows) -> list[Any]:
            commit(rows)
            if self._deliver:
                record_due_hooks(rows, self.run_id, attempt)
            beside(rows)
            # Cells last: others wait for their locks.
            return [CellChange(name, change)(rows) for name, change in changes]

        pending = self._submit(Transaction(self.run_id, operation))
        if charge is not None:
            pending.add_done_callback(partial(_settled, charge))
        return pending

    async def committed(self, position: int, branches: Sequence[str]) -> Mapping[str, Committed]:
        """What is committed in some branches of a position. Raises StoreError (CorruptCheckpoint ...)."""
        fence = self.fence

        def read(rows: Rows) -> list[StepRow]:
            return list(rows.steps_at(fence.run, fence.execution, position, branches))

        found: list[StepRow] = await self._submit(Transaction(self.run_id, read))
        if self._payloads.plain:
            return self._opened_rows(found)
        return await asyncio.to_thread(self._opened_rows, found)

    def _opened_rows(self, found: Iterable[StepRow]) -> dict[str, Committed]:
        return {row.branch: self._committed(self.fence.execution, row) for row in found}

    def delivered(self, row: AttemptRow) -> None:
        """The end hooks of an attempt were told. Nobody waits for it: what is not kept is told once more."""
        run, key = self.fence.run, due_hooks_key(_attempt(row))
        self._post(lambda rows: rows.delete_annotations(run, DUE, key))

    def _committed(self, execution: int, row: StepRow) -> Committed:
        position, branch, node_id, step = row
        verify_step(step, self.run_id, position, node_id, branch)
        what = f"the output of node {node_id!r} at position {position} of run {self.run_id!r}"
        call = None
        if step.number is not None:
            given = step.given
            if given is not None:
                place = self._place("given", execution, position, branch)
                given = self._payloads.open(given, place, f"what was given for {what}")
            call = StepCall(step.number, given)
        place = self._place("output", execution, position, branch)
        output: Snapshot | None = self._opened.get((place, step.sha256))
        if output is None:
            if step.output.startswith(BLOB) and self._payloads.blobs is not None:
                output = self._reference(step.output, place, what)
            else:
                output = self._payloads.open(step.output, place, what)
        return Committed(node_id, output, step.contract, call)

    def note_traceparent(self, traceparent: str) -> None:
        """Keep the trace context of this execution. Nobody waits for it; without it a resumed run is not linked."""
        step = Step("", "", b"", checksum(b""))
        self._post(lambda rows: rows.annotate(self.run_id, TRACE, "", traceparent, step))

    def _post(self, do: Callable[[Rows], Any]) -> None:
        pending = asyncio.ensure_future(self._submit(Transaction(self.run_id, do)))
        pending.add_done_callback(lambda done: done.cancelled() or done.exception())

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None]:
        """Keep an attempt that waits, and what for. Awaited: raises Fenced, or another StoreError."""
        attempt = self._called_attempt(row)
        message = self._sealed_message(attempt, waiting.reason)
        commit = Commit(self.run_id, self.fence, attempt._replace(message=message), None)

        execution = self.fence.execution

        def ask(rows: Rows) -> None:
            found = rows.find(self.run_id, lock=True)
            asked = [] if found is None else rows.annotations(found.run, WAITING, waiting_key(waiting))
            before = next(
                (read_waiting(kept, self.run_id, execution, self._payloads) for kept in asked), None
            )
            seen = self.waiting.get((waiting.position, waiting.branch))
            if not is_answered_meanwhile(before, seen, waiting):
                record_waiting(rows, self.run_id, execution, waiting, self._payloads)

        return self._with(commit, ask)

    def abandon(self) -> None:
        """Nothing more comes from here, and nothing can be awaited: whoever resumes the run need not wait."""
        self.ended = True
        LIVE_SESSIONS.pop(self.fence.owner.rpartition("|")[2], None)

    def end(self, status: str, error: str | None) -> Awaitable[None] | None:
        """Note how the run stopped. Awaited: raises Fenced, or another StoreError."""
        if self.finished is not None:
            if not self.fence.owner:
                return None
            status, error = self.finished.status, self.finished.error
        self.ended = True
        pending = self._submit(Transaction(self.run_id, partial(self._finish, str(status), storable_text(error))))
        # Not before it is kept: who looks meanwhile would take the run for one whose process died.
        pending.add_done_callback(lambda _: self.abandon())
        return pending

    def _finish(self, status: str, error: str | None, rows: Rows) -> None:
        updated_ms = None
        if (
            self._was is not None and status in COMPLETE
        ):  # A resume that had nothing to do leaves it as it was.
            status, error, updated_ms = self._was.status, self._was.error, self._was.updated_ms
        else:
            error = self._payloads.seal_text(error, self._place("error", self.fence.execution))
        if not rows.finish(self.fence, status, error, updated_ms):
            raise fence_error(rows, self.fence, self.run_id)
        if status == "CANCELLED":
            rows.delete_annotations(self.fence.run, CANCEL)


def _settled(charge: Charge, pending: asyncio.Future[Any]) -> None:
    if not pending.cancelled() and pending.exception() is None:
        charge.settled(pending.result())


def _tried(
    failed: Iterable[Attempt], restored: Mapping[tuple[int, str], Committed]
) -> dict[tuple[int, str], Tried]:
    """How often what is not committed was tried; ``failed``: in the order of their ends."""
    found: dict[tuple[int, str], Tried] = {}
    for attempt in failed:
        at = attempt.position, attempt.branch
        # A group that is tried again tries its children anew.
        inside = f"{attempt.branch}." if attempt.branch else ""
        for other in [
            other for other in found if other[0] == at[0] and other != at and other[1].startswith(inside)
        ]:
            del found[other]
        before = found.get(at)
        if at not in restored:
            found[at] = Tried(
                1 if before is None else before.attempts + 1,
                attempt.node_id,
                attempt.failure_class or "",
                attempt.message or "",
                attempt.reason,
                attempt.error_type,
            )
    return found


def _attempt(row: AttemptRow) -> Attempt:
    failure, message, reason, error_type = row.failure or (None, None, None, None)
    usage = row.usage or NO_USAGE
    return Attempt(
        row.position,
        row.started_ns,
        row.branch,
        row.attempt,
        row.node_id,
        row.duration_ns,
        row.outcome,
        failure and failure.value,
        storable_text(message),
        storable_text(reason),
        usage.tokens,
        usage.output_tokens,
        round(usage.cost_usd * PICO),
        storable_text(usage.model),
        row.function_ns,
        storable_text(row.group),
        error_type=storable_text(error_type),
    )


def fork(
    rows: Rows, payloads: Payloads, source: str, opening: Opening, before: int, edited: Step | None
) -> None:
    """Make a new run of what another one committed before a position; ``edited`` stands in for the last of that.

    Raises CheckpointNotFound, RunExists, CorruptCheckpoint.
    """
    found = require_undamaged(rows.find(source))
    kept = None if found is None else rows.input(found.run, found.execution)
    if found is None or kept is None:
        raise CheckpointNotFound(f"there is no run {source!r} to fork; check the id and the store")
    if before and all(
        (row.position, row.branch) != (before - 1, "") for row in rows.steps(found.run, found.execution)
    ):
        raise CheckpointNotFound(
            f"run {source!r} has no output at position {before - 1}, so it cannot be forked before position {before}; fork at an "
            "earlier node"
        )
    taken = rows.find(opening.run_id, lock=True)
    if taken is not None and taken.execution:
        raise RunExists(f"run {opening.run_id!r} already exists; use another id for the fork")
    old, new = partial(PayloadPlace, source, found.execution), partial(PayloadPlace, opening.run_id, 1)
    if not opening.sha256:
        contract, given, sha = kept
        if payloads.codec is not None:
            given = payloads.move(given, old("input"), new("input"), f"the input of run {source!r}")
            sha = checksum(given)
        opening = opening._replace(contract=contract, input=given, sha256=sha)
    steps = [row for row in rows.steps(found.run, found.execution) if row.position < before]
    called = {position: identity for identity, position in rows.identities(found.run, found.execution)}
    fence = rows.begin(taken, opening._replace(pipeline=found.pipeline))
    for number, (position, branch, node_id, step) in enumerate(steps):
        verify_step(step, source, position, node_id, branch)
        if edited is not None and (position, branch) == (before - 1, ""):
            step = edited._replace(contract=step.contract)
        elif payloads.codec is not None:
            step = _moved(payloads, step, old, new, position, branch)
        attempt = Attempt(
            position,
            number,
            branch,
            1,
            node_id,
            0,
            "forked",
            None,
            None,
            None,
            0,
            0,
            0,
            None,
            identity=called.get(position),
        )
        rows.commit(fence, attempt, step)
    parent = Step("", "", b"", checksum(b""), before)
    rows.annotate(opening.run_id, PARENT, "", source, parent)
    why = f"forked from run {source!r} before position {before}"
    rows.finish(fence, "INTERRUPTED", payloads.seal_text(storable_text(why), new("error")))


def _moved(
    payloads: Payloads,
    step: Step,
    old: Callable[..., PayloadPlace],
    new: Callable[..., PayloadPlace],
    position: int,
    branch: str,
) -> Step:
    """Seal what is copied from one run to another for its new place."""

    def move(stored: bytes, kind: str) -> bytes:
        what = f"the {kind} at position {position}"
        return payloads.move(stored, old(kind, position, branch), new(kind, position, branch), what)

    output = move(step.output, "output")
    given = None if step.given is None else move(step.given, "given")
    return step._replace(output=output, sha256=checksum(output), given=given)


def _last_execution(found: RunRow) -> LastExecution:
    holder = found.holder
    return LastExecution(
        found.execution, found.status, None if holder is None else holder.place, found.left_seconds
    )
