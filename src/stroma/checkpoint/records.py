"""Runs and their attempts, as a store tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from stroma._utils.text import typed

__all__ = [
    "PICO",
    "Attempt",
    "AttemptPage",
    "AttemptRecord",
    "Cause",
    "RunPage",
    "RunQuery",
    "RunRecord",
    "StoreFacts",
    "Tally",
    "attempt_mark",
    "cause_of",
    "marked",
]


PICO: Final = 10**12  # Costs are kept in whole pico-dollars: sums are exact in any order.


@dataclass(frozen=True, slots=True)
class RunQuery:
    """Which runs are wanted: those of which all that is given holds.

    Attributes:
        statuses: any of them; none given is all.
        tag: one that the run was given, as it was given.
        since_ms: begun then or later; milliseconds since the epoch.
        failure_class, node: an attempt failed so, at that node; both of one attempt.
        text: a part of the run id, the pipeline's name or the error; the case of ASCII letters does not matter.
    """

    pipeline: str | None = None
    statuses: tuple[str, ...] = ()
    tag: str | None = None
    since_ms: int | None = None
    failure_class: str | None = None
    node: str | None = None
    text: str | None = None

    @property
    def looks_closer(self) -> bool:
        """Return True if no index serves the query, so that runs are examined one by one."""
        return (self.failure_class, self.node, self.text) != (None, None, None)


class Cause(NamedTuple):
    """The failed attempt that stopped a run, or the last one that failed on the way; of a group, its child's."""

    node_id: str
    position: int
    branch: str
    attempt: int
    failure_class: str
    reason: str | None
    message: str | None
    error_type: str | None = None

    @property
    def text(self) -> str | None:
        """The failure as people read it: ``Type: message``."""
        return None if self.message is None else typed(self.error_type, self.message)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as a store lists it.

    Attributes:
        status: "RUNNING" while it runs (or since its process died), "DAMAGED" if its row in the store is (then ``error``
            says what is wrong with it, and other fields may be 0 or empty), else a RunStatus.
        parent: the run that it was forked from.
        holder: who is at work on it, in words; None if nobody is, also of a RUNNING one whose process died.
        started_ms, updated_ms: milliseconds since the epoch.
        tokens, cost_usd: of all attempts of the last execution.
        nodes: how many positions of it are committed, those inside groups not counted.
        latency_ms: time that functions of its attempts ran, those of a group's children at the same time counted once.
        tags: in the order of their text.
        cause: None if no attempt of the last execution failed. Not told by list_runs().
        failures: how many attempts failed, counted up to 20. Not told by list_runs().
        epoch: raised by every process that opens the run.
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
    cause: Cause | None = field(default=None, compare=False)
    failures: int = field(default=0, compare=False)
    epoch: int = field(default=0, compare=False)


class RunPage(NamedTuple):
    """Some of the runs that were asked for, the one begun last first.

    Attributes:
        next: where the following page begins; None if there is none. A page may be short, or empty, and have a next one:
            no call looks at more than some thousand runs one by one.
    """

    runs: list[RunRecord]
    next: str | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt as a store lists it. ``output`` is in its stored form; None unless it was committed and can be read.

    ``damaged``: what stands in the store is not what was committed; with ``outcome`` "DAMAGED" that is the row of the
    attempt, else its output. ``output_bytes``: how large what was
    committed is as it is stored; None if nothing was. ``started_ns``: since 1970. ``epoch``: of the
    process that made it, as in RunRecord; 0 where it is not told. ``duration_ms``: of a group from the first start of a function
    inside it to the last end of one; ``function_ms``: for how long its function ran, or any function inside a group.
    ``group_id``: of the group around it. ``identity``: of the step of plain code that its
    position is of; None in a pipeline. ``error_type``: the name of the exception's type; None if nothing was raised.
    """

    position: int
    branch: str
    node_id: str
    attempt: int
    started_ms: int
    duration_ms: float
    outcome: str
    failure_class: str | None
    message: str | None
    reason: str | None
    tokens: int
    output_tokens: int
    cost_usd: float
    model: str | None
    output: bytes | None
    damaged: bool = False
    output_bytes: int | None = field(default=None, compare=False)
    started_ns: int = field(default=0, compare=False)
    epoch: int = field(default=0, compare=False)
    function_ms: float = field(default=0.0, compare=False)
    group_id: str | None = field(default=None, compare=False)
    identity: str | None = field(default=None, compare=False)
    error_type: str | None = None

    @property
    def text(self) -> str | None:
        """The failure as people read it: ``Type: message``; of a suspension what for. None if there is neither."""
        return None if self.message is None else typed(self.error_type, self.message)

    def idempotency_key(self, run_id: str, execution: int) -> str:
        """Return the ``current_node().idempotency_key`` of the attempt."""
        return f"{run_id}:{execution}:{self.identity or self.position}:{self.branch}"


class StoreFacts(NamedTuple):
    """Facts about a store as a whole.

    Attributes:
        system: what keeps it, with its version.
        format: of what is kept; this release writes ``writes``.
        clock_ms: the time by the clock that leases go by, where that is another machine's; else None.
        warnings: what of its settings puts runs at risk, with the mend.
    """

    system: str
    format: int
    writes: int
    clock_ms: int | None = None
    warnings: tuple[str, ...] = ()


class AttemptPage(NamedTuple):
    """Some attempts of an execution without their outputs, and where the following page begins, if there is one."""

    attempts: list[AttemptRecord]
    next: str | None


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


def cause_of(failed: Sequence[Attempt | AttemptRecord]) -> Cause | None:
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
        deepest.error_type,
    )


def marked(mark: str) -> tuple[int, int]:
    """(start in ms, run) of where a page ended. Raises ValueError for what no page gave."""
    started, _, run = mark.partition(".")
    if not (started.isdecimal() and run.isdecimal() and len(mark) < 50 and mark.isascii()):
        raise ValueError(f"{mark[:100]!r} is not where a page ended; give the `next` of a page")
    return int(started), int(run)


def attempt_mark(mark: str) -> tuple[int, int, int, int, str]:
    """(epoch, position, start in ns, attempt, branch) of where a page ended. Raises ValueError for what no page gave."""
    epoch, position, started, attempt, branch = [*mark.split(":", 4), *[""] * 5][:5]
    numbers = (epoch, position, started, attempt)
    if not all(number.isdecimal() and number.isascii() and len(number) < 20 for number in numbers):
        raise ValueError(f"{mark[:100]!r} is not where a page ended; give the `next` of a page")
    return int(epoch), int(position), int(started), int(attempt), branch


class Attempt(NamedTuple):
    """One attempt, as it is kept. What tells it from a repeated call for the same one is its start: a resumed run, and
    a group that is tried again, count attempts from 1.

    Attributes:
        function_ns: for how long its function ran; of a group, any function inside it.
        group_id: of the group around it.
        identity: of the step of plain code that the position is of (see ``stroma.checkpoint.identity``); None in a pipeline.
        error_type: the name of the type of the exception; None if nothing was raised.
    """

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
    function_ns: int = 0
    group_id: str | None = None
    identity: str | None = None
    error_type: str | None = None
