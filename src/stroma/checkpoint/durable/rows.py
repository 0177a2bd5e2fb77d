"""The plain rows that a durable store reads and writes.

Decisions about them are made in ``session`` and ``session_open``, once for all stores.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote, unquote

from stroma.checkpoint.durable.owner import Owner, is_gone
from stroma.checkpoint.entries import Discard
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.identity import parse_mark
from stroma.checkpoint.queue import QUEUED, BlockedMark, Candidate, ClaimRequest, QueueEntry, QueueFigures
from stroma.checkpoint.records import AttemptRecord, RunQuery, StoreFacts, Tally, ascii_lower, sum_attempts


class Annotation(IntEnum):
    """Positions, below those of commits, of what a store records of a run besides its commits.

    The only list of these kinds: the keys of a store that has one for each kind are made from it.
    """

    SAVED = -1  #: a state from ``save()``; branch: the node id
    WAITING = -2  #: an approval that a node waits for, and its answer; branch: "position:branch"
    REQUEST = -3  #: a request about the run that no owner has read; branch: its key, see ``control``
    INPUT = -4  #: the input of the execution
    DUE_HOOKS = -6  #: an attempt whose end hooks may not have been called; branch: :func:`due_hooks_key`
    FAILURE_SITE = -7  #: where the last failed attempt at a place failed; branch: "position:branch"
    DEATHS = -8  #: number of deaths of the owner; see :meth:`DurableSession._recover`
    NOTE = -9  #: data of the driver of the execution; branch: its key, which begins with a position
    CONTROL = -10  #: a request that an owner has read and that holds; branch: its key
    REJECTED = -11  #: an output that broke its contract; branch: "position:start:branch"
    ATTRIBUTION = (
        -12
    )  #: what the run belongs to, as node id; branch: "user", "session", "target", "trace" ...
    EFFECT = -13  #: a node whose effect an execution of the run has called; branch: its id
    MESSAGE = -14  #: a message to the run; branch: its number, see ``messages``


#: Annotations that belong to the run, and those that belong to one execution: a restart deletes them.
_OF_RUN: Final = (Annotation.SAVED, Annotation.EFFECT)
OF_EXECUTION: Final = tuple(kind for kind in Annotation if kind not in _OF_RUN)


def is_free(owner: str | None, left_seconds: float) -> bool:
    """Return True if a running run has lost its owner. ``left_seconds``: of its lease; infinite in memory."""
    holder = Owner.read(owner)
    return holder is None or left_seconds < 0 or (left_seconds < math.inf and is_gone(holder))


#: Unlike the monotonic clock of Linux, it also counts while the machine is suspended.
_LEASE_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)
#: The last part of a lease, which is left for the start of a call and for clocks that run at different rates.
_MARGIN: Final = 0.1


def lease_clock() -> float:
    """Return the seconds by which this process measures its own leases, which never jump."""
    return time.monotonic() if _LEASE_CLOCK is None else time.clock_gettime(_LEASE_CLOCK)


@dataclass(slots=True)
class Fence:
    """The right of a session to write: rows change only while these are the last epoch and owner of the run.

    Attributes:
        run: the key of the run in the store; never reused for another run.
        leased_at: when the last lease that the store has acknowledged was asked for, by :func:`lease_clock`.
            It ends ``lease_seconds`` later at the earliest.
        acknowledged: attempts of the execution, of all sessions, as the last acknowledged commit of this one
            counted them: a run that counts fewer has lost some. Written by the thread of the store.
    """

    run: Any
    execution: int
    epoch: int
    owner: str
    lease_seconds: float
    acknowledged: int = field(default=0, compare=False)
    leased_at: float = field(default=-math.inf, compare=False)

    def holds_lease(self) -> bool:
        """Return True if no other process can have taken the run over, and there is time to begin a call."""
        return lease_clock() - self.leased_at < self.lease_seconds * (1 - _MARGIN)

    def acknowledge(self, attempts: int) -> None:
        """Record that the store committed a transaction after which the execution has so many attempts."""
        self.acknowledged = max(self.acknowledged, attempts)


class RunRow(NamedTuple):
    """A run.

    Attributes:
        execution: 0 if it has only states from ``save()``.
        left_seconds: remaining time of the lease by the clock of the store; negative if it has expired.
        nodes: positions with a commit in the last execution, except those inside groups.
        attempt_count, commit_count: rows that the last execution must have, counted in the transaction of
            each.
        wake_ms: from when on it is due if it stops unfinished, in ms since the epoch, 0: at once, or its
            news (MESSAGE_SENT); None: never by itself.
        expires_ms, priority, key: see :class:`stroma.checkpoint.queue.QueueEntry`; None of a run that was not
            submitted, and some stores have 0 for its priority.
        version: that of the pipeline when the execution began; "" without a version.
        blocked, blocked_since_ms, blocked_until_ms, blocked_codes: see :attr:`mark`; None of a run that is
            not blocked.
        claim: token of the worker that has claimed the run; None if there is no claim, or it has expired.
        parent: the run that it was forked from.
        tags: those of the last execution, as :func:`pack_tags` returns them.
        cause: see RunEnd.
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
    attempt_count: int = 0
    commit_count: int = 0
    wake_ms: int | None = None
    expires_ms: int | None = None
    priority: int | None = None
    key: str | None = None
    version: str = ""
    blocked: str | None = None
    blocked_since_ms: int | None = None
    blocked_until_ms: int | None = None
    blocked_codes: str | None = None
    claim: str | None = None
    parent: str | None = None
    tags: str = ""
    cause: str | None = None

    @property
    def tag_list(self) -> list[str]:
        """The tags, in their order."""
        return list(map(unquote, self.tags.split()))

    @property
    def mark(self) -> BlockedMark | None:
        """The mark of a blocked run, with its message in stored form."""
        if self.blocked is None:
            return None
        codes = tuple((self.blocked_codes or "").split())
        return BlockedMark(self.blocked, self.blocked_since_ms or 0, self.blocked_until_ms or 0, codes)

    @property
    def holder(self) -> Owner | None:
        """The owner of the run; None if it is not running, or if its owner is gone."""
        is_held = self.status == "RUNNING" and not is_free(self.owner, self.left_seconds)
        return Owner.read(self.owner) if is_held else None


def pack_tags(tags: Iterable[str]) -> str:
    """Return tags as one text: each percent-encoded, with spaces around it, and once."""
    return "".join(f" {quote(tag, safe='', errors='backslashreplace')} " for tag in dict.fromkeys(tags))


class Step(NamedTuple):
    """One committed output in stored form. ``number`` and ``input_key``: see StepCall."""

    contract: str
    schema_ref: str
    output: Any
    sha256: bytes
    number: int | None = None
    input_key: bytes | None = None


class StepRow(NamedTuple):
    """A Step and its place in the execution."""

    position: int
    branch: str
    node_id: str
    step: Step


class Opening(NamedTuple):
    """The values that a session writes when it opens a run.

    Attributes:
        input: of the execution that begins, sealed; None: that of the origin of a fork.
        version: that of the pipeline; "" without one.
    """

    run_id: str
    pipeline: str
    owner: str
    lease_seconds: float
    input: Step | None
    discard: Discard = Discard()
    tags: tuple[str, ...] = ()
    version: str = ""


class RunEnd(NamedTuple):
    """The end of an execution.

    Attributes:
        error: why, if it did not complete; in stored form for :meth:`Rows.finish`.
        wake_ms: from when on a worker may continue a run that stays unfinished; None: never by itself.
        updated_ms: when it stopped; None: now.
        cause: mark of the attempt that stopped it; None if no failed attempt did.
    """

    status: str
    error: str | None = None
    wake_ms: int | None = None
    updated_ms: int | None = None
    cause: str | None = None


class EventRow(NamedTuple):
    """A batch of events in stored form.

    Attributes:
        trims: delete what is too old when it is appended.
    """

    run: Any
    execution: int
    last: EventPlace
    data: bytes
    trims: bool = False


class Delay(NamedTuple):
    """A time in so many milliseconds, as the value of a field of a run."""

    ms: int


NOW: Final = Delay(0)
#: Fields of times by the clock of leases: until when a run has its owner, and its claim.
LEASE_TIMES: Final = ("until_ms", "claim_until_ms")
_MARK: Final = ("blocked", "blocked_since_ms", "blocked_until_ms", "blocked_codes")
#: Fields that every opening and every end deletes.
_UNMARKED: Final[dict[str, Any]] = dict.fromkeys((*_MARK, "claim", "claim_until_ms"))
#: Fields of every run that is opened, of one whose execution begins, and of one that stops.
_OPENED: Final[dict[str, Any]] = {
    **_UNMARKED,
    **dict.fromkeys(("error", "wake_ms", "cause")),
    "status": "RUNNING",
    "updated_ms": NOW,
}
_NEW: Final[dict[str, Any]] = {
    **_OPENED,
    **dict.fromkeys(("tokens", "cost_pico", "latency_ns", "attempt_count", "commit_count", "priority"), 0),
    **dict.fromkeys(("key", "expires_ms")),
    "started_ms": NOW,
    "tags": "",
}
_STOPPED: Final[dict[str, Any]] = {**_UNMARKED, "until_ms": None}


class Rows(Protocol):
    """The rows of a store inside one transaction. An exception rolls it back.

    A server that cannot roll back executes the writes in their order up to the first one that is refused: a
    write that the fence may refuse (claim, commit, end) comes before those that depend on it.
    """

    # ---- runs
    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        """Return a run, or None. With ``lock`` no other transaction changes it before this one ends."""
        ...

    def add_execution(self, run: RunRow | None, opening: Opening, execution: int) -> Any:
        """Add an execution without attempts to a run; None: to a new one. Return its key.

        Events of the execution before are deleted, and so are its commits where only the last ones are
        stored.
        """
        ...

    def continue_execution(self, run: RunRow, discard: Discard) -> Any:
        """Discard commits of the last execution. Return its key."""
        ...

    def update(
        self, run: Any, fields: Mapping[str, Any], *, fence: Fence | None = None, is_news: bool = False
    ) -> bool:
        """Set fields of a run: those of a RunRow, and ``until_ms`` and ``claim_until_ms``, see LEASE_TIMES.

        A value may be a :class:`Delay`. Returns False if the fence refuses it. ``is_news``: workers that
        listen are woken.
        """
        ...

    def begin(self, run: RunRow | None, opening: Opening) -> Fence:
        """Begin an execution: number 1, or the next one of an existing run. Increments the epoch.

        Annotations of the execution before are deleted.
        """
        execution, epoch = (1, 1) if run is None else (run.execution + 1, run.epoch + 1)
        key = self.add_execution(run, opening, execution)
        fields = {**_NEW, "pipeline": opening.pipeline, "execution": execution}
        if opening.tags:
            fields["tags"] = pack_tags(opening.tags)
        fence = self._write_opening(key, execution, epoch, opening, fields)
        if run is not None:
            self.delete_annotations(key, *OF_EXECUTION)
        if opening.input is not None:
            self.annotate(key, Annotation.INPUT, "", "", opening.input)
        return fence

    def take_over(self, run: RunRow, opening: Opening) -> Fence:
        """Take over the last execution, without the commits to discard. Increments the epoch.

        Adds the tags. Deletes its mark.
        """
        key = self.continue_execution(run, opening.discard)
        fields = {**_OPENED}
        if opening.tags:
            fields["tags"] = pack_tags((*run.tag_list, *opening.tags))
        return self._write_opening(key, run.execution, run.epoch + 1, opening, fields)

    def _write_opening(
        self, run: Any, execution: int, epoch: int, opening: Opening, fields: dict[str, Any]
    ) -> Fence:
        fields["owner"], fields["epoch"], fields["version"] = opening.owner, epoch, opening.version
        fields["until_ms"] = Delay(int(opening.lease_seconds * 1000))
        self.update(run, fields)
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds)

    def replace_owner(self, run: RunRow, owner: str) -> Fence:
        """Give the last execution to another owner, which only ends it. Fences off the one before."""
        self.update(run.run, {"owner": owner})
        return Fence(run.run, run.execution, run.epoch, owner, 0.0)

    def steps(
        self, run: Any, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()
    ) -> Iterable[StepRow]:
        """Return the commits of an execution, except the lazily loaded ones (see RunRequest)."""
        ...

    def steps_at(self, run: Any, execution: int, places: Sequence[tuple[int, str]]) -> Iterable[StepRow]:
        """Return the commits at these places: (position, branch)."""
        ...

    def is_complete(self, run: RunRow) -> bool:
        """Return True if the last execution has all attempts and commits that are counted."""
        ...

    def identities(self, run: Any, execution: int) -> Iterable[tuple[str, int]]:
        """Return (identity, position) of each step of plain code with an attempt, or one inside it."""
        ...

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        """Record an attempt, its usage and its output, count them, and renew the lease.

        Returns False if the fence refuses it, also for a run that counts fewer attempts than were
        acknowledged. An attempt that is recorded already stays unchanged, with its usage and output.
        """
        ...

    def finish(self, fence: Fence, end: RunEnd) -> bool:
        """Record how an execution stopped, and release the lease. Returns False if fenced off.

        Deletes its mark.
        """
        updated_ms = NOW if end.updated_ms is None else end.updated_ms
        fields = {**end._asdict(), "updated_ms": updated_ms}
        return self.update(fence.run, {**_STOPPED, **fields}, fence=fence)

    def wake(self, run: RunRow, wake_ms: int | None = 0) -> None:
        """Set from when on a run is due if it is suspended, or will be; 0: at once, None: never by itself."""
        self.update(run.run, {"wake_ms": wake_ms}, is_news=wake_ms == 0)

    def block(self, run: RunRow, mark: BlockedMark | None) -> None:
        """Mark a run without an owner as blocked, with the message in stored form; None deletes the mark."""
        values = (None,) * 4 if mark is None else (*mark[:3], " ".join(mark.codes))
        self.update(run.run, dict(zip(_MARK, values, strict=True)))

    # ---- queue
    def enqueue(self, fence: Fence, entry: QueueEntry) -> None:
        """Release an execution that has not started as QUEUED, until a worker opens it."""
        place = {"priority": entry.priority, "key": entry.key, "expires_ms": entry.expires_ms}
        released = {"status": QUEUED, "error": None, "until_ms": None, "wake_ms": entry.due_ms}
        self.update(fence.run, place | released, is_news=True)

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        """Return runs of a pipeline that are due and have no claim; see ``session_open.is_due``.

        The first ``limit`` runs of each key, by priority and due time: of those that are queued, of those
        that stopped, of those whose owner is gone, and of those that are blocked for other code, or were for
        long enough. All are of a version that the code serves. No other transaction returns them before this
        one ends, or claim() does not claim them.
        """
        ...

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        """Return how many runs of a pipeline have an owner, or a claim of a worker, by key."""
        ...

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        """Claim runs; return those that were still free. For Redis: known when the transaction has ended."""
        ...

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        """Return the figures of the queue of a pipeline at a time; see :class:`QueueFigures`."""
        ...

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Return the statuses of these runs by id, without those that have no execution."""
        ...

    def renew(self, fences: list[Fence]) -> list[Fence]:
        """Renew leases, except those of runs that another session has taken over. Return the renewed ones."""
        ...

    # ---- annotations
    def key_of(self, run_id: str) -> Any:
        """Return the key of a run, which is created without an execution if there is none."""
        ...

    def annotate(self, run: Any, position: int, branch: str, node_id: str, step: Step) -> None:
        """Write an annotation, in place of an existing one, without a session."""

    def annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> Iterable[StepRow]:
        """Return the annotations of these kinds, by branch; branch None: in all branches."""
        ...

    def delete_annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> None:
        """Delete the annotations of these kinds; branch None: in all branches."""

    def with_requests(self, runs: list[Any]) -> list[Any]:
        """Return those of these runs that have requests which no owner has read."""
        ...

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        """Return the newest output of a node in the last execution, or a state saved since."""
        ...

    def delete(self, run_id: str) -> None: ...

    # ---- events
    def append_events(self, batches: Sequence[EventRow]) -> None:
        """Append batches of events, except of deleted runs and earlier executions, and those that are there.

        No fence applies. Redis refuses a batch of an earlier session than the last one.
        """

    def events(self, run: Any, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        """Return the batches of an execution that end after a place, the first ones first."""
        ...

    # ---- cells
    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        """Return the data of a cell, or None, and the clock in ms since the epoch.

        With ``lock`` no other transaction changes the cell before this one ends.
        """
        ...

    def write_cell(self, name: str, data: bytes) -> None:
        """Write a cell that this transaction has locked."""

    # ---- retention
    def now_ms(self) -> int:
        """Return the clock of the rows in milliseconds since the epoch."""
        ...

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        """Return ids of ended runs (``unfinished``: of all runs) that were last written before a time."""
        ...

    def blobs(self) -> Iterable[bytes]:
        """Return the references to blobs of all runs: payloads that begin with BLOB."""
        ...

    # ---- reading
    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        """Return the runs with an execution, the newest first, and the ``after`` of the next page.

        ``max_filtered``: approximate maximum of runs to filter one by one; None: no maximum. Raises
        ValueError for an ``after`` that is not from a page.
        """
        ...

    def failed(self, runs: Sequence[RunRow], limit: int) -> list[list[AttemptRecord]]:
        """Return the last failed attempts of each run, the latest end first; in Redis at most 20."""
        ...

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        """Return ids with a prefix of runs with an execution: an equal id first, then the newest."""
        ...

    def attempt_page(
        self, run: Any, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        """Return a page of the attempts, with the epoch of each, and the stored size of its output.

        By process, position and time; a group before its children.
        """
        ...

    def attempts_at(self, run: Any, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        """Return the attempts of one place, as those of a page."""
        ...

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        """Return sums over attempts of at most so many runs started since, the newest runs first."""
        ...

    def facts(self) -> StoreFacts:
        """Return version and settings of the store."""
        ...


def matches(query: RunQuery, run: Any) -> bool:
    """Return True if a run matches a query, except for its attempts. ``run``: has the names of a RunRow."""
    if query.pipeline not in (None, run.pipeline) or (query.statuses and run.status not in query.statuses):
        return False
    if (query.tag is not None and query.tag not in run.tag_list) or (query.blocked and run.blocked is None):
        return False
    if query.since_ms is not None and run.started_ms < query.since_ms:
        return False
    part = ascii_lower(query.text or "")
    return any(part in ascii_lower(text) for text in (run.run_id, run.pipeline, run.error or ""))


_TALLY_PAGE: Final = 20  # runs whose attempts are read together to be summed up


class ScannedRows(Rows, Protocol):
    """The rows of a store without queries: what it cannot find or sum up is read, and filtered here."""

    @abstractmethod
    def _attempts_of(self, runs: Sequence[tuple[Any, int]]) -> list[list[AttemptRecord]]:
        """Return the attempts of executions in the order of the history, without outputs.

        ``output_bytes``: set for each commit; 0 until :meth:`_with_sizes`.
        """
        ...

    def _with_sizes(self, run: Any, attempts: list[AttemptRecord]) -> list[AttemptRecord]:
        """Return attempts of a run with the sizes of their outputs."""
        return attempts

    def attempt_page(
        self, run: Any, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        place = (-1, 0, 0, 0, "") if after is None else parse_mark(after, 4, has_text=True)
        epoch, position, started_ns, attempt, branch = place
        end = (epoch, (position, started_ns, branch, attempt))
        (attempts,) = self._attempts_of([(run, execution)])
        rest = [one for one in attempts if (one.epoch, one.key) > end]
        page = self._with_sizes(run, rest[:limit])
        return page, page[-1].mark if len(rest) > limit else None

    def attempts_at(self, run: Any, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        (attempts,) = self._attempts_of([(run, execution)])
        at = [one for one in attempts if (one.position, one.branch) == (position, branch)]
        return self._with_sizes(run, at)

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        rows, _ = self.runs(RunQuery(since_ms=since_ms), limit=runs, after=None, max_filtered=None)
        pages = (rows[first : first + _TALLY_PAGE] for first in range(0, len(rows), _TALLY_PAGE))
        figures = (
            (run.started_ms, run.pipeline, one, one.output_bytes is not None)
            for page in pages
            for run, of_run in zip(
                page, self._attempts_of([(run.run, run.execution) for run in page]), strict=True
            )
            for one in of_run
        )
        return sum_attempts(itertools.islice(figures, attempts), bucket_ms)

    def is_complete(self, run: RunRow) -> bool:
        return True
