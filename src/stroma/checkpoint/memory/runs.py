"""The data of one run in memory."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from stroma.checkpoint.blocked import BlockedMark
from stroma.checkpoint.decisions import LastExecution, PriorWork, has_expired
from stroma.checkpoint.entries import NO_CONTROL, RunControl, SentMessage, StepCall, Waiting
from stroma.checkpoint.events import MAX_BATCHES, EventBatch
from stroma.checkpoint.queue import QueueEntry
from stroma.contracts.schema import Schema, Snapshot
from stroma.contracts.tagged_json import NotSerialisable
from stroma.trace.events import AttemptRow, contract_of

if TYPE_CHECKING:
    from stroma.trace.rejected import RecentOutputs

__all__ = [
    "Key",
    "MemoryRun",
    "SavedState",
    "as_state",
    "encode_state",
    "no_session",
    "position_of",
    "row_of",
]

_NUMBERS: Final = itertools.count(1)
_NOT_QUEUED: Final = QueueEntry(0)

#: What a restart does not delete.
_OF_RUN: Final = ("execution", "parent", "effects", "epoch", "session", "last_session")

Key = int | str | tuple[int, str]


class SavedState(NamedTuple):
    """A committed output, or a state that ``save()`` stored.

    Attributes:
        contract: see :func:`stroma.trace.events.contract_of`.
        row: the attempt that committed it; None if it was saved, or copied by a fork.
    """

    node_id: str
    schema: Schema
    snapshot: Snapshot
    contract: str
    row: AttemptRow | None


def no_session() -> None:
    """Return None, in place of a weak reference to a session."""
    return


@dataclass(slots=True, eq=False, repr=False)
class MemoryRun:
    """One run.

    Attributes:
        states: outputs by position or by (position, branch), and states that ``save()`` stored by node id;
            the newest last. Most are the rows of the trace.
        other_rows: the attempts without a current output.
        calls: the calls of plain code that the outputs belong to.
        places: the position of each step of plain code, by its identity.
        number: distinguishes runs of this process that started in the same millisecond.
        failure_sites: (attempt, started_ns, function that encodes the frames) of the last failed attempt at a
            place.
        control: the requests that hold; the next session takes back a cancel and a pause.
        rejected: outputs that broke their contract; None without any.
        epoch: incremented by each session that opens the run; only the last session may write.
        session: weak reference to that session while it owns the run, which only one that records its end
            does.
        last_session: weak reference to that session, for requests about the run.
        wake_ms: see :func:`stroma.checkpoint.decisions.merge_wake`.
        effects: ids of the nodes whose effect an execution of the run has called.
        queue: how the run was submitted.
        claim: token of the worker that has claimed it, and until when by the monotonic clock, in seconds.
        messages: by id, in the order of their numbers; ``last_message``: the number of the last one.
        version: see RunRow. blocked: the mark of a blocked run.
    """

    execution: int = 0
    input: Snapshot | None = None
    states: dict[Key, AttemptRow | SavedState] = field(default_factory=dict)
    other_rows: list[AttemptRow] = field(default_factory=list)
    calls: dict[Key, StepCall] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    waiting: dict[tuple[int, str], Waiting] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    messages: dict[str, SentMessage] = field(default_factory=dict)
    last_message: int = 0
    traceparent: str | None = None
    attribution: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    pipeline: str = ""
    tags: tuple[str, ...] = ()
    schema: Schema | None = None
    started_ms: int = 0
    number: int = 0
    failure_sites: dict[tuple[int, str], tuple[int, int, Callable[[], bytes]]] = field(default_factory=dict)
    control: RunControl = NO_CONTROL
    rejected: RecentOutputs | None = None
    status: str = "RUNNING"
    error: str | None = None
    epoch: int = 0
    session: Callable[[], Any] = no_session
    last_session: Callable[[], Any] = no_session
    wake_ms: int | None = None
    effects: frozenset[str] = frozenset()
    queue: QueueEntry = _NOT_QUEUED
    claim: tuple[str, float] | None = None
    version: str = ""
    blocked: BlockedMark | None = None
    events: deque[EventBatch] = field(default_factory=lambda: deque(maxlen=MAX_BATCHES))

    @property
    def live_claim(self) -> str | None:
        """The token of the claim; None if there is none, or it has expired."""
        return self.claim[0] if self.claim is not None and time.monotonic() <= self.claim[1] else None

    def claim_for(self, token: str, seconds: float) -> None:
        """Keep the run for a worker."""
        self.claim = (token, time.monotonic() + seconds)

    @property
    def has_expired(self) -> bool:
        """Return True if the run is queued, and must not start any more."""
        return has_expired(self.status, self.queue.expires_ms, time.time_ns() // 1_000_000)

    def discard_execution(self) -> None:
        """Delete what the last execution recorded: all but what belongs to the run, and states from ``save()``."""
        new = MemoryRun(states={k: v for k, v in self.states.items() if isinstance(k, str)})
        for kind in fields(self):
            if kind.name not in _OF_RUN:
                setattr(self, kind.name, getattr(new, kind.name))

    def start_execution(self) -> None:
        """Record that an execution starts now."""
        self.started_ms, self.number = time.time_ns() // 1_000_000, next(_NUMBERS)

    def last_execution(self) -> LastExecution | None:
        """Return the state of the last execution, or None if there is none."""
        if self.execution == 0:
            return None
        holder = "another task of this process" if self.session() is not None else None
        return LastExecution(
            self.execution,
            self.status,
            holder,
            math.inf,
            self.wake_ms,
            self.live_claim,
            self.pipeline,
            self.version,
        )

    def prior_work(self) -> PriorWork:
        """Return what a new execution discards."""
        is_answered = [waiting.payload is not None for waiting in self.waiting.values()]
        nodes = sum(1 for key in self.states if isinstance(key, int))
        return PriorWork(
            nodes, is_answered.count(False), is_answered.count(True), tuple(sorted(self.effects))
        )

    def attempts(self) -> list[AttemptRow]:
        """Return the rows of the last execution, by position and time."""
        rows = [*self.other_rows, *(row for row in map(row_of, self.states.values()) if row is not None)]
        # An attempt that was sent twice is one attempt.
        distinct = {(row.position, row.started_ns, row.branch, row.attempt): row for row in rows}
        return [distinct[key] for key in sorted(distinct)]

    def usage(self) -> tuple[int, float, float]:
        """Return tokens, USD and milliseconds of the last execution."""
        rows = self.attempts()
        usages = [usage for row in rows if (usage := row.usage) is not None]
        return (
            sum(usage.tokens for usage in usages),
            math.fsum(usage.cost_usd for usage in usages),
            sum(row.function_ns for row in rows if not row.branch) / 1e6,
        )

    def newest_states(self) -> Iterator[tuple[Key, SavedState]]:
        """Iterate over all states, the newest first."""
        for key, entry in reversed(self.states.items()):
            yield key, as_state(entry)


def as_state(entry: AttemptRow | SavedState) -> SavedState:
    """Return an entry of ``MemoryRun.states`` as a SavedState."""
    if isinstance(entry, SavedState):
        return entry
    schemas = entry.schemas
    assert schemas is not None  # The output of such a row is a snapshot.
    schema = schemas[1]
    return SavedState(
        entry.node_id, schema, cast("Snapshot", entry.output), contract_of(entry, schema), entry
    )


def row_of(entry: AttemptRow | SavedState) -> AttemptRow | None:
    """Return the attempt that committed a state; None for one that was saved, or copied by a fork."""
    return entry.row if isinstance(entry, SavedState) else entry


def position_of(key: Key) -> tuple[int, str]:
    """Return the (position, branch) of a key that is no node id."""
    return cast("tuple[int, str]", key if isinstance(key, tuple) else (key, ""))


def encode_state(state: SavedState) -> bytes | None:
    """Return a state in stored form; None if it has none."""
    try:
        return state.schema.encode(state.schema.restore(state.snapshot))
    except NotSerialisable:
        return None
