"""Runs and their attempts, as a store lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, get_type_hints

from stroma._utils.text import typed
from stroma.checkpoint.identity import idempotency_key, mark_of
from stroma.checkpoint.queue import BlockedMark
from stroma.failures.errors import BUDGET, LAST_FAILURE, PAUSED

#: Statuses of runs that failed.
FAILED: Final = ("FAILED", "PARTIAL")
#: Smaller due times stand for what made a run due at once; see ``MESSAGE_SENT`` in decisions.py.
_FIRST_MS: Final = 1000
PICO: Final = 10**12  # Costs are stored in whole pico-dollars: sums are exact in any order.


@dataclass(frozen=True, slots=True)
class RunQuery:
    """Filter for runs; a run matches if it meets every condition that is set.

    Attributes:
        statuses: any of these; () for all.
        tag: a tag of the run, compared exactly.
        since_ms: earliest start, in milliseconds since the epoch.
        failure_class, node: an attempt failed with this class, at this node; if both are set, the same
            attempt.
        text: part of the run id, the name of the pipeline or the error; ASCII letters match in either case.
        blocked: the run is blocked.
    """

    pipeline: str | None = None
    statuses: tuple[str, ...] = ()
    tag: str | None = None
    since_ms: int | None = None
    failure_class: str | None = None
    node: str | None = None
    text: str | None = None
    blocked: bool = False

    @property
    def needs_scan(self) -> bool:
        """Return True if no index serves the query, so that runs are examined one by one."""
        return (self.tag, self.failure_class, self.node, self.text) != (None, None, None, None)

    def matches_failure(self, failed: AttemptRecord) -> bool:
        """Return True if a failed attempt has this class and node."""
        return self.failure_class in (None, failed.failure_class) and self.node in (None, failed.node_id)


def ascii_lower(text: str) -> str:
    """Return a text with its ASCII letters in lower case, as the search for a text compares them."""
    return "".join(ch.lower() if ch.isascii() else ch for ch in text)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as a store lists it.

    Attributes:
        status: "RUNNING" while it runs, or after its process died; otherwise a RunStatus.
        parent: the run that it was forked from.
        holder: description of its owner; None without an owner, also if its process died.
        started_ms, updated_ms: milliseconds since the epoch.
        tokens, cost_usd: sums over all attempts of the last execution.
        nodes: number of committed positions, without those inside groups and flows.
        commits: number of all commits: a flow in progress has none of its own, but those of its calls.
        latency_ms: time for which functions of its attempts ran; concurrent children of a group count once.
        tags: sorted.
        cause: the failed attempt that stopped the run, of a group that of its child; of a run that has not
            failed, the last one to begin. None without one. Not set by list_runs().
        failures: number of failed attempts, at most 20. Not set by list_runs().
        epoch: incremented by each process that opens the run.
        due_ms: when a run without an owner is due, in ms since the epoch, 0: at once; None: never by itself.
        priority, key, expires_ms: of a submitted run; see :class:`stroma.checkpoint.queue.QueueEntry`.
        version: that of the pipeline when the execution began; None without a version.
        blocked: mark of a run that some code could not continue; None of any other run.
    """

    run_id: str
    pipeline: str
    status: str
    execution: int
    started_ms: int
    updated_ms: int
    tokens: int
    cost_usd: float
    nodes: int
    error: str | None
    holder: str | None = None
    parent: str | None = None
    latency_ms: float = field(default=0.0, compare=False)
    tags: tuple[str, ...] = field(default=(), compare=False)
    cause: AttemptRecord | None = field(default=None, compare=False)
    failures: int = field(default=0, compare=False)
    epoch: int = field(default=0, compare=False)
    due_ms: int | None = field(default=None, compare=False)
    priority: int = field(default=0, compare=False)
    key: str | None = field(default=None, compare=False)
    expires_ms: int | None = field(default=None, compare=False)
    version: str | None = field(default=None, compare=False)
    blocked: BlockedMark | None = field(default=None, compare=False)
    commits: int = field(default=0, compare=False)

    @property
    def seconds(self) -> float:
        """The time from its start to its last record."""
        return max(0, self.updated_ms - self.started_ms) / 1000

    @property
    def waits_for(self) -> Literal["resume", "budget"] | None:
        """The need of a suspended run that no answer continues: the end of a pause, or a larger budget."""
        if self.status != "SUSPENDED" or self.is_due_at_once:
            return None
        return "resume" if self.error == PAUSED else "budget" if self.error == BUDGET else None

    @property
    def stop_text(self) -> str | None:
        """The cause of a failed run ("node: reason: message"), or the need of a stopped one, for people."""
        if self.cause is None or self.status not in FAILED or self.budget_text is not None:
            is_due = self.status == "INTERRUPTED" and self.holder is None
            return self.wait_text or self.error or ("due for a worker" if is_due else None)
        cause = self.cause
        return f"{cause.node_id}: {cause.reason or cause.failure_class}: {cause.text or self.error or ''}"

    @property
    def budget_text(self) -> str | None:
        """The limit that stopped the run after a failure that is another one; None of any other run."""
        text, mark, _ = (self.error or "").partition(LAST_FAILURE)
        return text if mark and text.startswith("BudgetExceeded: ") else None

    @property
    def wait_text(self) -> str | None:
        """The need of a suspended run, for people, such as "waiting for ..."; None for any other."""
        if self.status != "SUSPENDED":
            return None
        text = describe_wait(self.error or "")
        return f"due for a worker; no longer {text}" if self.is_due_at_once else text

    @property
    def is_due_at_once(self) -> bool:
        """True if it got what it waited for, such as an answer or a message, and is not paused."""
        return self.due_ms is not None and self.due_ms < _FIRST_MS and self.error != PAUSED


def describe_wait(reason: str) -> str:
    """Return the need of a run that is suspended for a reason of its own, for people."""
    return "waiting for a larger budget" if reason == BUDGET else reason


class RunPage(NamedTuple):
    """A page of runs, the newest first.

    Attributes:
        next: start of the next page; None after the last page. A page may be short or empty and have a next
            one, since a call examines at most some thousand runs one by one.
    """

    runs: list[RunRecord]
    next: str | None


@dataclass(slots=True)  # Not frozen: 0.7 us instead of 6 to make one, and a page of a large map makes 10,000.
class AttemptRecord:
    """An attempt as a session stores it, and as a store lists it. Treat a listed one as immutable.

    Its start distinguishes it from other attempts of the same number: a resumed run, and a retried group,
    count from 1. The fields up to ``error_type`` are those that are stored with it, in this order.

    Attributes:
        started_ns: since the epoch.
        duration_ns: for a group, from the first start to the last end of a function inside it.
        function_ns: time for which its function ran; for a group, any function inside it.
        group_id: id of the group around it.
        identity: that of the step of plain code at its position; None in a pipeline.
        error_type: name of the exception's type; None if nothing was raised.
        epoch: that of its process, as in RunRecord; 0 if unknown.
        output_bytes: size of the stored output; None without a commit.
        output: in stored form; None without a readable commit, and in records without outputs.
        damaged: the store holds another output than was committed.
    """

    position: int
    started_ns: int
    branch: str
    attempt: int
    node_id: str
    duration_ns: int
    outcome: str
    failure_class: str | None = None
    message: str | None = None
    reason: str | None = None
    tokens: int = 0
    output_tokens: int = 0
    cost_pico: int = 0
    model: str | None = None
    function_ns: int = field(default=0, compare=False)
    group_id: str | None = field(default=None, compare=False)
    identity: str | None = field(default=None, compare=False)
    error_type: str | None = None
    epoch: int = field(default=0, compare=False)
    output_bytes: int | None = field(default=None, compare=False)
    output: bytes | None = None
    damaged: bool = False

    @property
    def started_ms(self) -> int:
        """Its start in milliseconds since the epoch."""
        return self.started_ns // 1_000_000

    @property
    def duration_ms(self) -> float:
        """Its duration, see ``duration_ns``."""
        return self.duration_ns / 1e6

    @property
    def function_ms(self) -> float:
        """Time for which its function ran, see ``function_ns``."""
        return self.function_ns / 1e6

    @property
    def cost_usd(self) -> float:
        """Its cost in US dollars."""
        return self.cost_pico / PICO

    @property
    def key(self) -> tuple[int, int, str, int]:
        """The key that no other attempt of its process has, in the order of the history."""
        return self.position, self.started_ns, self.branch, self.attempt

    @property
    def text(self) -> str | None:
        """The failure as text: ``Type: message``; for a suspension, its reason. None if there is neither."""
        return None if self.message is None else typed(self.error_type, self.message)

    @property
    def mark(self) -> str:
        """The ``next`` of a page of attempts that ends with it."""
        return mark_of(self.epoch, self.position, self.started_ns, self.attempt, self.branch)

    def idempotency_key(self, run_id: str, execution: int) -> str:
        """Return the ``current_node().idempotency_key`` of the attempt."""
        return idempotency_key(run_id, execution, self.identity or self.position, self.branch)


#: Names of the fields that are stored, in the order of an AttemptRecord.
ATTEMPT_COLUMNS: Final = tuple(one.name for one in fields(AttemptRecord))[:18]
#: Returns the stored fields of an attempt, in this order.
stored_values: Final[Callable[[AttemptRecord], tuple[Any, ...]]] = attrgetter(*ATTEMPT_COLUMNS)
_HINTS: Final = get_type_hints(AttemptRecord)
#: The shape of them as JSON, for :func:`stroma.checkpoint.decoding.decode_json`.
ATTEMPT_SHAPE: Final[Any] = tuple[tuple(_HINTS[name] for name in ATTEMPT_COLUMNS)]  # type: ignore[misc]


def to_record(values: Iterable[Any], epoch: int = 0, output_bytes: int | None = None) -> AttemptRecord:
    """Return the attempt of its stored fields."""
    record = AttemptRecord(*values)
    record.epoch, record.output_bytes = epoch, output_bytes
    return record


class StoreFacts(NamedTuple):
    """Facts about a store as a whole.

    Attributes:
        system: name and version of its software.
        format: version of the stored data. A store of another version is refused.
        clock_ms: clock of the store's server, which leases use, in milliseconds since the epoch; None without
            a server.
        warnings: settings that put runs at risk, each with the fix.
    """

    system: str
    format: int
    clock_ms: int | None = None
    warnings: tuple[str, ...] = ()


class AttemptPage(NamedTuple):
    """A page of the attempts of an execution, without outputs. ``next``: start of the next page, or None."""

    attempts: list[AttemptRecord]
    next: str | None


class Tally(NamedTuple):
    """Sums over attempts.

    Attributes:
        bucket: number of the time bucket in which the runs started, counted from the epoch.
        wasted_pico: cost of the attempts without a commit.
        digits: the duration that all of them have, to two digits, as :func:`duration_digits` returns it.
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
    digits: int = 0


def sum_attempts(attempts: Iterable[tuple[int, str, AttemptRecord, bool]], bucket_ms: int) -> list[Tally]:
    """Return sums over attempts: (start of the run in ms, pipeline, attempt, True with a commit)."""
    sums: dict[tuple[Any, ...], Tally] = {}
    for started_ms, pipeline, one, is_committed in attempts:
        key = (started_ms // bucket_ms, pipeline, one.node_id, one.model, one.failure_class)
        digits = duration_digits(one.duration_ns)
        before = sums.get((*key, digits)) or Tally(*key, 0, 0, 0, 0, 0, 0, digits)
        is_wasted = one.outcome != "success" and not is_committed
        sums[*key, digits] = before._replace(
            attempts=before.attempts + 1,
            tokens=before.tokens + one.tokens,
            cost_pico=before.cost_pico + one.cost_pico,
            wasted_pico=before.wasted_pico + (one.cost_pico if is_wasted else 0),
            duration_ns=before.duration_ns + one.duration_ns,
            longest_ns=max(before.longest_ns, one.duration_ns),
        )
    return list(sums.values())


def duration_digits(duration_ns: int) -> int:
    """Return 100 times the number of digits of a duration, plus its first two, to sum up for percentiles."""
    text = str(duration_ns)
    return 100 * len(text) + int(text[:2])


def digits_seconds(digits: int) -> float:
    """Return the seconds of a duration from its :func:`duration_digits`."""
    length, first = divmod(digits, 100)
    return float(first * 10 ** min(max(0, length - 2), 20)) / 1e9
