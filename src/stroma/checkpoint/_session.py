"""One execution of a run in a durable store: how it begins, what it keeps, and the fence around it.

Everything that is decided is decided here, once for all stores. A store only has to read and write plain rows
(:class:`Rows`): all of one operation in one transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, cast

from pydantic import BaseModel

from stroma.checkpoint._owner import LIVE, Owner, is_gone
from stroma.checkpoint.cells import Change
from stroma.checkpoint.journal import (
    CheckpointNotFound,
    Committed,
    CorruptCheckpoint,
    Fenced,
    Finished,
    Held,
    PriorUsage,
    RunExists,
    RunQuery,
    RunRequest,
    StepCall,
    StoreError,
    StoreFacts,
    Waiting,
    decide,
)
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import Payloads
from stroma.failures import FailureClass
from stroma.schemas import Schema
from stroma.trace import (
    ATTEMPT,
    BRANCH,
    DURATION,
    FAILURE,
    NO_USAGE,
    NODE,
    OUTCOME,
    POSITION,
    STARTED,
    USAGE,
    AttemptUsage,
    Outcome,
    Row,
    contract_of,
)

__all__ = [
    "CANCEL",
    "PARENT",
    "PICO",
    "SAVED",
    "TRACE",
    "TROUBLE",
    "WAITING",
    "Attempt",
    "Beside",
    "CellChange",
    "Commit",
    "Doing",
    "DurableSession",
    "Fence",
    "Opening",
    "Rows",
    "RunRow",
    "Step",
    "StepRow",
    "Tally",
    "Told",
    "change_together",
    "fork",
    "intact",
    "keep_waiting",
    "read_waiting",
    "verify",
    "waiting_branch",
]

PICO: Final = 10**12  # Costs are kept in whole pico-dollars: sums are exact in any order.
# What is kept of a run beside its commits stands at positions of its own.
SAVED: Final = -1  # what save() keeps; branch: the node id
WAITING: Final = -2  # what nodes wait for; branch: "position:branch"
CANCEL: Final = -3  # somebody wants the run to end
PARENT: Final = -4  # node id: the run that this one was forked from
TRACE: Final = -5  # node id: the trace context of the process that began the execution
TROUBLE: Final = -7  # where the last failed attempt at a place failed; branch: "position:branch"
DUE: Final = (
    -6
)  # attempts whose end hooks may not have been told yet; branch: what tells an attempt from others


class Fence(NamedTuple):
    """What a session may write under: rows change only while these are the last epoch and owner of the run."""

    run: Any  # the store's own key of the run, never used again for another one
    execution: int
    epoch: int
    owner: str
    lease_seconds: float


class RunRow(NamedTuple):
    """A run as its store has it.

    Attributes:
        execution: 0 while it has only what ``save()`` kept.
        left_seconds: how long its lease is good for, by the clock that the store goes by; below 0 it has expired.
        nodes: positions with a commit in the last execution, those inside groups not counted.
    """

    run: Any
    run_id: str
    pipeline: str
    execution: int
    status: str
    error: str | None
    started_ms: int
    updated_ms: int
    tokens: int
    cost_pico: int
    latency_ns: int
    owner: str | None
    epoch: int
    left_seconds: float
    nodes: int

    @property
    def holder(self) -> Owner | None:
        """Who is at work on the run, as far as anybody can tell."""
        owner = Owner.read(self.owner) if self.status == "RUNNING" else None
        return None if owner is None or self.left_seconds < 0 or is_gone(owner) else owner


class Attempt(NamedTuple):
    """One attempt, as it is kept. What tells it from a repeated call for the same one is its start: a resumed run, and
    a group that is tried again, count attempts from 1."""

    position: int
    started_ns: int
    branch: str
    attempt: int
    node_id: str
    duration_ns: int
    outcome: str
    failure_class: str | None
    message: str | None
    reason: str | None
    tokens: int
    output_tokens: int
    cost_pico: int
    model: str | None


class Step(NamedTuple):
    """One committed output, as it is kept. ``number`` and ``given``: see StepCall."""

    contract: str
    schema_ref: str
    output: bytes
    sha256: bytes
    number: int | None = None
    given: bytes | None = None


class StepRow(NamedTuple):
    """A Step and the place it has in its execution."""

    position: int
    branch: str
    node_id: str
    step: Step


class Opening(NamedTuple):
    """What a session writes when it begins. ``discard_from``: see RunRequest."""

    run_id: str
    pipeline: str
    owner: str
    lease_seconds: float
    contract: str
    input: bytes
    sha256: bytes
    discard_from: int | None
    tags: tuple[str, ...] = ()


class Told(NamedTuple):
    """An attempt without its output. ``size``: of that as it is stored; None if nothing was committed. ``epoch``: see Fence."""

    attempt: Attempt
    size: int | None
    epoch: int


class Tally(NamedTuple):
    """Attempts of some runs, summed up.

    Attributes:
        bucket: which span of time the runs began in, counted from the epoch.
        wasted_pico: the cost of those that committed nothing.
    """

    bucket: int
    pipeline: str
    node_id: str
    model: str | None
    failure_class: str | None
    attempts: int
    tokens: int
    cost_pico: int
    wasted_pico: int
    duration_ns: int
    longest_ns: int


class Beside(NamedTuple):
    """What is told of a run beside its row. ``failed``: its last failed attempts, the one that ended last first."""

    parent: str | None
    tags: tuple[str, ...]
    failed: list[Attempt]


class Rows(Protocol):
    """The rows of a store inside one transaction. Whoever raises in it undoes it."""

    # ---- runs
    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        """The row of a run; with ``lock`` nobody else changes it before the transaction ends."""
        ...

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        """Begin an execution: number 1, or the next one of a run that was found. Raises the epoch."""
        ...

    def go_on(self, found: RunRow, opening: Opening) -> Fence:
        """Take over the last execution, without its commits from ``discard_from`` on. Raises the epoch."""
        ...

    def input(self, run: Any, execution: int) -> tuple[str, bytes, bytes] | None:
        """(contract, input, sha256) of an execution."""
        ...

    def steps(self, run: Any, execution: int, apart: Sequence[tuple[int, str]] = ()) -> Iterable[StepRow]:
        """The commits of an execution; not what ``save()`` kept, nor what is ``apart`` (see RunRequest)."""
        ...

    def some(self, run: Any, execution: int, position: int, branches: Sequence[str]) -> Iterable[StepRow]:
        """The commits in these branches of a position."""
        ...

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        """Keep an attempt, its usage and its output; renew the lease. False if the fence is in the way.

        An attempt that is kept already is left as it is, with its usage, and so is its output.
        """
        ...

    def finish(self, fence: Fence, status: str, error: str | None) -> bool:
        """Note how an execution stopped, and give up the lease. False if the fence is in the way."""
        ...

    def renew(self, fences: list[Fence]) -> None:
        """Renew leases; those of runs that somebody else has taken over stay as they are."""

    # ---- beside the commits
    def keep(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        """Keep something at a position below 0, in place of what was there, outside of any session.

        Makes the run, without an execution, if there is none.
        """

    def kept(self, run: Any, position: int, branch: str | None = None) -> Iterable[StepRow]:
        """What is kept at a position below 0; None: in all branches."""
        ...

    def drop(self, run: Any, position: int, branch: str | None = None) -> None:
        """Forget what is kept at a position below 0; None: in all branches."""

    def wanted(self, runs: list[Any]) -> list[Any]:
        """Which of these runs somebody wants to end: those with something kept at position CANCEL."""
        ...

    def newest(self, run_id: str, node_id: str) -> StepRow | None:
        """The newest output of a node in the last execution, or what was saved since."""
        ...

    def delete(self, run_id: str) -> None: ...

    # ---- beside all runs
    def cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        """A cell's data, None if there is none, and the clock in ms since the epoch; with ``lock`` nobody else changes
        the cell before the transaction ends."""
        ...

    def put_cell(self, name: str, data: bytes) -> None:
        """Put data into a cell that this transaction has locked."""

    # ---- retention
    def expired(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        """Runs that have ended (with ``unfinished``: any, also what only ``save()`` kept) and were last written before."""
        ...

    def blobs(self) -> Iterable[bytes]:
        """All payloads that stand in blobs, of all runs: what begins with BLOB."""
        ...

    # ---- reading
    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, look_at: int | None
    ) -> tuple[list[RunRow], str | None]:
        """The runs that have an execution, the one begun last first, and what ``after`` is of those that follow.

        ``look_at``: how many may be looked at one by one, at least about; None for all. Raises ValueError for an ``after`` that is
        none.
        """
        ...

    def beside(self, runs: list[RunRow], *, failed: int) -> list[Beside]:
        """What is kept beside each of these runs, with so many failed attempts at the most."""
        ...

    def ids(self, prefix: str, limit: int) -> list[str]:
        """Ids of runs that have an execution and begin with a text: that very one first, then the newest."""
        ...

    def attempts(self, run: Any, execution: int) -> Iterable[tuple[Attempt, Step | None]]:
        """By process, position and time; a group before its children. With what each one committed."""
        ...

    def attempt_page(
        self, run: Any, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[Told], str | None]:
        """The same page by page, with the stored size of what each one committed, which is not read."""
        ...

    def attempts_at(self, run: Any, execution: int, position: int, branch: str) -> list[Told]:
        """The same of one place."""
        ...

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        """The attempts of the runs begun since, of so many runs and attempts at the most, the newest runs first."""
        ...

    def facts(self) -> StoreFacts:
        """What the store says of itself."""
        ...

    def step_at(self, run: Any, execution: int, position: int, branch: str) -> StepRow | None:
        """The commit at one place."""
        ...


class Commit(NamedTuple):
    """The operation that happens most; a store may do many of them in a way of its own."""

    run_id: str
    fence: Fence
    attempt: Attempt
    step: Step | None

    def __call__(self, rows: Rows) -> None:
        if not rows.commit(self.fence, self.attempt, self.step):
            raise fenced(rows.find(self.run_id), self.run_id)


@dataclass(frozen=True, slots=True)
class CellChange:
    """A change of a cell. A store may do many of one cell together, see :func:`change_together`."""

    name: str
    change: Change[Any]

    @property
    def run_id(self) -> str:
        """What keeps its order among the changes of this cell; NUL is in no run id, so that no run waits for it."""
        return f"\0{self.name}"

    def __call__(self, rows: Rows) -> Any:
        return change_together(rows, [self])[0]


def change_together(rows: Rows, changes: Sequence[CellChange]) -> list[Any]:
    """Changes of one cell, each on what the one before made: read once, written once. If one raises, none is done."""
    data, now = rows.cell(changes[0].name, lock=True)
    made: bytes | None = None
    told: list[Any] = []
    for asked in changes:
        fresh, said = asked.change(data if made is None else made, now)
        made = made if fresh is None else fresh
        told.append(said)
    if made is not None:
        rows.put_cell(changes[0].name, made)
    return told


@dataclass(frozen=True, slots=True)
class Doing:
    """Any other operation.

    Attributes:
        run_id: the only run that it concerns; None if there are others.
        opening: of one that opens a run, which must not be done twice: its owner's name is given once, so a run that
            has it was opened by an earlier try whose answer was lost. That has come to ``result``.
    """

    run_id: str | None
    do: Callable[[Rows], Any]
    opening: Opening | None = None
    result: Any = None

    def __call__(self, rows: Rows) -> Any:
        return self.do(rows)


class Submit(Protocol):
    """Has an operation done in a transaction; what it returns ends when it is kept."""

    def __call__(self, operation: Any, /) -> asyncio.Future[Any]: ...


class DurableSession:
    """One execution of a run, held by this process until it ends, or until another one takes it over.

    Attributes: see :class:`stroma.checkpoint.journal.Session`.
    """

    __slots__ = (
        "__weakref__",
        "_deliver",
        "_opened",
        "_payloads",
        "_submit",
        "_troubles",
        "continued",
        "ended",
        "execution",
        "fence",
        "finished",
        "on_cancel",
        "prior",
        "restored",
        "run_id",
        "traceparent",
        "undelivered",
        "waiting",
    )

    fence: Fence
    execution: int
    continued: bool
    waiting: dict[tuple[int, str], Waiting]
    finished: Finished | None
    prior: PriorUsage
    restored: Mapping[tuple[int, str], Committed]
    traceparent: str | None
    undelivered: list[Row]

    def __init__(
        self, run_id: str, submit: Submit, payloads: Payloads, opened: Mapping[bytes, bytes] | None = None
    ) -> None:
        """``opened``: payloads that were opened before, by the checksum of what is stored."""
        self.run_id = run_id
        self._payloads = payloads
        self._opened = opened or {}
        self.on_cancel: Callable[[], None] | None = None
        #: Whether its lease need not be kept up any more.
        self.ended = False
        self._submit = submit
        self._troubles: dict[tuple[int, str], tuple[int, int, bytes]] = {}

    def open(self, request: RunRequest, opening: Opening, given: bytes, rows: Rows) -> DurableSession:
        """One operation: a request that is refused changes nothing and fences nobody off. ``given``: the plain input."""
        run_id = request.run_id
        found = rows.find(run_id, lock=True)
        kept = None
        if found is not None and found.execution > 0:
            kept = rows.input(found.run, found.execution)
        same = kept is not None and (kept[2] == opening.sha256 or self._is(given, kept, request))
        way = decide(request, None if kept is None or found is None else _held(found), same)
        self.restored, self.prior, self.traceparent = {}, PriorUsage(), None
        self.undelivered, self._deliver = [], request.deliver
        self.continued, self.finished, self.waiting = way == "continue", None, {}
        if way == "begin" or found is None:
            self.fence = rows.begin(found, opening)
        else:
            self.prior = PriorUsage(found.tokens, found.cost_pico / PICO, found.latency_ns / 1e6)
            commits = {
                (position, branch): self._committed(position, branch, node_id, step)
                for position, branch, node_id, step in rows.steps(found.run, found.execution, request.apart)
                if request.discard_from is None or position < request.discard_from
            }
            if request.retry_failed:
                request = request.going_on(commits)
                opening = opening._replace(discard_from=request.discard_from)
            self.restored = request.accepted(commits)
            if way == "return":
                self.finished = Finished(found.status, found.error)
                self.fence = Fence(found.run, found.execution, found.epoch, "", 0.0)
            else:
                self.fence = rows.go_on(found, opening)
        if found is not None:
            self._look_beside(rows, found, request)
        self.execution = self.fence.execution
        self._opened = {}
        return self

    def _is(self, given: bytes, kept: tuple[str, bytes, bytes], request: RunRequest) -> bool:
        """Whether an input with another checksum is the same all the same: a codec need not give the same bytes twice."""
        if self._payloads.is_plain(kept[1]) or not intact(kept[1], kept[2]):
            return False
        try:
            return self._payloads.open(kept[1], f"the input of run {request.run_id!r}") == given
        except StoreError:
            if request.if_exists in ("restart", "error") or request.discard_from is not None:
                return False  # What the run began with is no matter to who does not go on with it.
            raise

    def _look_beside(self, rows: Rows, found: RunRow, request: RunRequest) -> None:
        """What nodes wait for belongs to an execution and its commits; whoever wanted its end has had it."""
        ours = self.finished is None
        if ours:
            rows.drop(found.run, CANCEL)
        if ours and not self.continued:
            rows.drop(found.run, TRACE)
            rows.drop(found.run, DUE)
            rows.drop(found.run, TROUBLE)
        else:
            self.traceparent = next((kept.node_id for kept in rows.kept(found.run, TRACE)), None)
        if ours and self.continued and self._deliver:
            due = [row for kept in rows.kept(found.run, DUE) if (row := _read_due(kept)) is not None]
            self.undelivered = sorted(due, key=lambda row: row[STARTED])
        for kept in list(rows.kept(found.run, WAITING)):
            waiting = read_waiting(kept, self._payloads)
            first = request.discard_from
            if (
                waiting is None
                or (ours and not self.continued)
                or (first is not None and waiting.position >= first)
            ):
                rows.drop(found.run, WAITING, kept.branch)
            else:
                self.waiting[waiting.position, waiting.branch] = waiting

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None]:
        """Keep one attempt and, with ``output``, its commit: together or not at all.

        Raises NotSerialisable at once; awaited: Fenced, or another StoreError. Repeating the call after an error is
        safe: an attempt that was kept all the same is not counted twice.
        """
        if output is None or schema is None:
            return self._keep(Commit(self.run_id, self.fence, _attempt(row), None))
        data = schema.encode(output, secrets=self._payloads.codec is not None)
        if not self._payloads.plain:
            return self._record_sealed(row, schema, data, call)
        return self._commit(row, schema, data, call)

    async def _record_sealed(self, row: Row, schema: Schema, data: bytes, call: StepCall | None) -> None:
        data = await self._payloads.seal(data)
        if call is not None and call.given is not None:
            call = call._replace(given=await self._payloads.seal(call.given))
        await self._commit(row, schema, data, call)

    def _commit(self, row: Row, schema: Schema, data: bytes, call: StepCall | None) -> Awaitable[None]:
        contract, ref = contract_of(row, schema), schema_ref(schema.model)
        step = Step(contract, ref, data, checksum(data), *(call or (None, None)))
        return self._keep(Commit(self.run_id, self.fence, _attempt(row), step))

    def note_trouble(self, position: int, branch: str, attempt: int, started_ns: int, data: bytes) -> None:
        """Keep where an attempt failed together with it, when it is recorded; in place of what failed there before.

        Not under a codec: lines of source would stand beside what it hides.
        """
        if data and self._payloads.codec is None:
            self._troubles[position, branch] = (attempt, started_ns, data)

    def _keep(self, commit: Commit) -> Awaitable[None]:
        attempt = commit.attempt
        trouble = self._troubles.pop((attempt.position, attempt.branch), None)
        if trouble is not None and trouble[1] != attempt.started_ns:
            trouble = None
        if not self._deliver and trouble is None:
            return self._submit(commit)

        def operation(rows: Rows) -> None:
            commit(rows)
            if self._deliver:
                _keep_due(rows, self.run_id, attempt)
            if trouble is not None:
                number, started_ns, data = trouble
                step = Step(str(started_ns), "", data, checksum(data), number)
                rows.keep(self.run_id, TROUBLE, f"{attempt.position}:{attempt.branch}", attempt.node_id, step)

        return self._submit(Doing(self.run_id, operation))

    async def committed(self, position: int, branches: Sequence[str]) -> Mapping[str, Committed]:
        """What is committed in some branches of a position. Raises StoreError (CorruptCheckpoint ...)."""
        fence = self.fence

        def read(rows: Rows) -> list[StepRow]:
            return list(rows.some(fence.run, fence.execution, position, branches))

        found: list[StepRow] = await self._submit(Doing(self.run_id, read))
        if self._payloads.plain:
            return self._opened_rows(found)
        return await asyncio.to_thread(self._opened_rows, found)

    def _opened_rows(self, found: Iterable[StepRow]) -> dict[str, Committed]:
        return {row.branch: self._committed(row.position, row.branch, row.node_id, row.step) for row in found}

    def delivered(self, row: Row) -> None:
        """The end hooks of an attempt were told. Nobody waits for it: what is not kept is told once more."""
        run, key = self.fence.run, _due_key(_attempt(row))
        self._post(lambda rows: rows.drop(run, DUE, key))

    def _committed(self, position: int, branch: str, node_id: str, step: Step) -> Committed:
        verify(step, self.run_id, position, node_id, branch)
        what = f"the output of node {node_id!r} at position {position} of run {self.run_id!r}"
        call = None
        if step.number is not None:
            given = (
                None if step.given is None else self._payloads.open(step.given, f"what was given for {what}")
            )
            call = StepCall(step.number, given)
        output = self._opened.get(step.sha256)
        if output is None:
            output = self._payloads.open(step.output, what)
        return Committed(node_id, output, step.contract, call)

    def note_traceparent(self, traceparent: str) -> None:
        """Keep the trace context of this execution. Nobody waits for it; without it a resumed run is not linked."""
        step = Step("", "", b"", checksum(b""))
        self._post(lambda rows: rows.keep(self.run_id, TRACE, "", traceparent, step))

    def _post(self, do: Callable[[Rows], Any]) -> None:
        pending = asyncio.ensure_future(self._submit(Doing(self.run_id, do)))
        pending.add_done_callback(lambda done: done.cancelled() or done.exception())

    def suspend(self, row: Row, waiting: Waiting) -> Awaitable[None]:
        """Keep an attempt that waits, and what for. Awaited: raises Fenced, or another StoreError."""
        commit = Commit(self.run_id, self.fence, _attempt(row)._replace(message=text(waiting.reason)), None)

        def operation(rows: Rows) -> None:
            commit(rows)
            if self._deliver:
                _keep_due(rows, self.run_id, commit.attempt)
            keep_waiting(rows, self.run_id, waiting)

        return self._submit(Doing(self.run_id, operation))

    def abandon(self) -> None:
        """Nothing more comes from here, and nothing can be awaited: whoever resumes the run need not wait."""
        self.ended = True
        LIVE.pop(self.fence.owner.rpartition("|")[2], None)

    def end(self, status: str, error: str | None) -> Awaitable[None] | None:
        """Note how the run stopped. Awaited: raises Fenced, or another StoreError."""
        if self.finished is not None:
            return None
        self.ended = True
        pending = self._submit(Doing(self.run_id, partial(self._finish, str(status), text(error))))
        # Not before it is kept: who looks meanwhile would take the run for one whose process died.
        pending.add_done_callback(lambda _: self.abandon())
        return pending

    def _finish(self, status: str, error: str | None, rows: Rows) -> None:
        if not rows.finish(self.fence, status, error):
            raise fenced(rows.find(self.run_id), self.run_id)


def _attempt(row: Row) -> Attempt:
    failure, message, reason = row[FAILURE] or (None, None, None)
    usage = row[USAGE] or NO_USAGE
    return Attempt(
        row[POSITION],
        row[STARTED],
        row[BRANCH],
        row[ATTEMPT],
        row[NODE],
        row[DURATION],
        row[OUTCOME],
        failure and failure.value,
        text(message),
        text(reason),
        usage.tokens,
        usage.output_tokens,
        round(usage.cost_usd * PICO),
        text(usage.model),
    )


def _due_key(attempt: Attempt) -> str:
    return f"{attempt.position}:{attempt.started_ns}:{attempt.attempt}:{attempt.branch}"


def _keep_due(rows: Rows, run_id: str, attempt: Attempt) -> None:
    # All that its hooks are to be told, but for its output: that stands with its commit.
    data = json.dumps(attempt._asdict()).encode()
    rows.keep(run_id, DUE, _due_key(attempt), attempt.node_id, Step("", "", data, checksum(data)))


def _read_due(kept: StepRow) -> Row | None:
    """What :func:`_keep_due` noted, as the row that it was made of; None for what is damaged."""
    if not intact(kept.step.output, kept.step.sha256):
        return None
    try:
        found = Attempt(**json.loads(kept.step.output))
        usage = AttemptUsage(found.tokens, found.output_tokens, found.cost_pico / PICO, found.model)
        failed = None
        if found.failure_class is not None:
            failed = (FailureClass(found.failure_class), found.message or "", found.reason)
        elif found.message is not None:
            failed = (FailureClass.RECOVERABLE, found.message, found.reason)  # Why it waits.
    except (TypeError, ValueError):
        return None
    return (
        found.node_id, found.attempt, found.started_ns, found.duration_ns, {}, None,
        cast("Outcome", found.outcome), failed, usage, found.position, found.branch, None, None,
    )  # fmt: skip


def keep_waiting(rows: Rows, run_id: str, waiting: Waiting) -> None:
    """Note what a node waits for, or the answer."""
    data = waiting.payload or b""
    number = None if waiting.payload is None else 1
    step = Step(text(waiting.reason) or "", waiting.schema_ref, data, checksum(data), number)
    rows.keep(run_id, WAITING, waiting_branch(waiting), waiting.node_id, step)


def waiting_branch(waiting: Waiting) -> str:
    """Where :func:`keep_waiting` keeps it."""
    return f"{waiting.position}:{waiting.branch}"


def read_waiting(kept: StepRow, payloads: Payloads) -> Waiting | None:
    """What :func:`keep_waiting` noted; None for what it did not."""
    position, _, branch = kept.branch.partition(":")
    step = kept.step
    if not position.isdecimal() or not intact(step.output, step.sha256):
        return None
    payload = None
    if step.number is not None:
        payload = payloads.open(step.output, f"the answer for node {kept.node_id!r}")
    return Waiting(int(position), branch, kept.node_id, step.contract, step.schema_ref, payload)


def fork(rows: Rows, source: str, opening: Opening, before: int, edited: Step | None) -> None:
    """Make a new run of what another one committed before a position; ``edited`` stands in for the last of that.

    Raises CheckpointNotFound, RunExists, CorruptCheckpoint.
    """
    found = rows.find(source)
    kept = None if found is None else rows.input(found.run, found.execution)
    if found is None or kept is None:
        raise CheckpointNotFound(f"there is no run {source!r} to fork; check the id and the store")
    if before and all(
        (row.position, row.branch) != (before - 1, "") for row in rows.steps(found.run, found.execution)
    ):
        raise CheckpointNotFound(
            f"run {source!r} has no output at position {before - 1}, before which it is forked; fork at an earlier node"
        )
    taken = rows.find(opening.run_id, lock=True)
    if taken is not None and taken.execution:
        raise RunExists(f"run {opening.run_id!r} exists already; give the fork another id")
    if not opening.sha256:
        opening = opening._replace(contract=kept[0], input=kept[1], sha256=kept[2])
    steps = [row for row in rows.steps(found.run, found.execution) if row.position < before]
    fence = rows.begin(taken, opening._replace(pipeline=found.pipeline))
    for number, (position, branch, node_id, step) in enumerate(steps):
        verify(step, source, position, node_id, branch)
        if edited is not None and (position, branch) == (before - 1, ""):
            step = edited._replace(contract=step.contract)
        attempt = Attempt(position, number, branch, 1, node_id, 0, "forked", None, None, None, 0, 0, 0, None)
        rows.commit(fence, attempt, step)
    parent = Step("", "", b"", checksum(b""), before)
    rows.keep(opening.run_id, PARENT, "", source, parent)
    rows.finish(fence, "INTERRUPTED", f"forked from run {source!r} before position {before}")


def _held(found: RunRow) -> Held:
    holder = found.holder
    return Held(found.execution, found.status, None if holder is None else holder.place, found.left_seconds)


def fenced(found: RunRow | None, run_id: str) -> Fenced:
    """Why a session may not write any more."""
    owner = None if found is None else Owner.read(found.owner)
    if owner is None:
        what = f"run {run_id!r} is no longer in the store: it was deleted"
    else:
        what = f"run {run_id!r} was taken over meanwhile, by {owner.place}"
    return Fenced(f"{what}; nothing more of this execution is kept, see what the other one makes of it")


def checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def text(value: str | None) -> str | None:
    """Text that every store can keep: an exception's message may hold a lone surrogate or a NUL."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def intact(data: Any, sha: Any) -> bool:
    """Whether data has its checksum. In a store from elsewhere, either may be anything."""
    return isinstance(data, bytes) and checksum(data) == sha


def verify(step: Step, run_id: str, position: int, node_id: str, branch: str = "") -> None:
    """Raise CorruptCheckpoint, with the way out, if an output is not what was committed."""
    if intact(step.output, step.sha256):
        return
    if position == SAVED:
        raise CorruptCheckpoint(
            f"the saved state of node {node_id!r} in run {run_id!r} is damaged; save it again"
        )
    target = f"that node (resume_from={node_id!r})"
    if branch:  # Children of groups are no targets of a resume.
        group = step.contract.partition(":")[2]
        named = repr(group) if group and "." not in branch else ""
        target = f"the outermost group around it (resume_from={named})"
    raise CorruptCheckpoint(
        f"the output of node {node_id!r} at position {position} of run {run_id!r} is damaged; resume from {target} "
        "to make it anew"
    )
