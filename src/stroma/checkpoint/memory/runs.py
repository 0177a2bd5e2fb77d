"""What a store in memory keeps of a run, and how it is read."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from stroma.checkpoint.protocols import Held, StepCall, Waiting
from stroma.contracts.schema import Schema, Snapshot
from stroma.contracts.tagged_json import NotSerialisable
from stroma.trace.events import AttemptRow, contract_of

if TYPE_CHECKING:
    pass

__all__ = ["Kept", "Key", "MemoryRun", "nobody", "position_of", "row_of", "stored"]

_NUMBERS: Final = itertools.count(1)

Key = int | str | tuple[int, str]
#: Node id, schema, output and what it is filed under; and the row of the attempt, if there was one.
Kept = tuple[str, Schema, Snapshot, str, AttemptRow | None]


def nobody() -> None:
    """The session of a run that nobody is at work on."""
    return


@dataclass(slots=True, eq=False, repr=False)
class MemoryRun:
    """One run. ``kept`` holds what was committed by position or by (position, branch), and what the simple calls saved
    by node id; the newest last. Most entries are the very row of the trace.
    ``spent`` holds the rows of all other attempts, ``calls`` which calls of plain code the commits were."""

    execution: int = 0
    input: Snapshot | None = None
    kept: dict[Key, AttemptRow | Kept] = field(default_factory=dict)
    spent: list[AttemptRow] = field(default_factory=list)
    calls: dict[Key, StepCall] = field(default_factory=dict)
    #: The position of each step of plain code, by its identity.
    places: dict[str, int] = field(default_factory=dict)
    waiting: dict[tuple[int, str], Waiting] = field(default_factory=dict)
    traceparent: str | None = None
    parent: str | None = None
    pipeline: str = ""
    tags: tuple[str, ...] = ()
    schema: Schema | None = None
    started_ms: int = 0
    #: Which of the runs of this process it is: of those begun in one millisecond too, one is the first.
    number: int = 0
    #: (attempt, started_ns, what writes its frames) of the last attempt that failed at a place.
    troubles: dict[tuple[int, str], tuple[int, int, Callable[[], bytes]]] = field(default_factory=dict)
    #: Whether cancel() was acknowledged; until somebody opens the run.
    cancelled: bool = False
    status: str = "RUNNING"
    error: str | None = None
    #: Raised by each session that opens the run; only the last one may write.
    epoch: int = 0
    #: That session, while somebody has it.
    session: Callable[[], Any] = nobody

    def forget(self) -> None:
        """What the execution before has left. What was saved by hand belongs to none."""
        self.kept = {k: v for k, v in self.kept.items() if isinstance(k, str)}
        self.spent, self.calls, self.waiting, self.places = [], {}, {}, {}
        self.traceparent, self.tags = None, ()

    def begins(self) -> None:
        """An execution of it begins now."""
        self.started_ms, self.number, self.troubles = time.time_ns() // 1_000_000, next(_NUMBERS), {}

    def held(self) -> Held | None:
        """What is known of the last execution."""
        if self.execution == 0:
            return None
        running = self.session() is not None
        return Held(
            self.execution, self.status, "another task of this process" if running else None, math.inf
        )

    def attempts(self) -> list[AttemptRow]:
        """The rows of the last execution, by position and time."""
        rows = [*self.spent, *(row for row in map(row_of, self.kept.values()) if row is not None)]
        # One that was sent again is one attempt.
        one = {(row.position, row.started_ns, row.branch, row.attempt): row for row in rows}
        return [one[key] for key in sorted(one)]

    def used(self) -> tuple[int, float, float]:
        """Tokens, USD and milliseconds of the last execution."""
        rows = self.attempts()
        usages = [usage for row in rows if (usage := row.usage) is not None]
        return (
            sum(usage.tokens for usage in usages),
            math.fsum(usage.cost_usd for usage in usages),
            sum(row.function_ns for row in rows if not row.branch) / 1e6,
        )

    def entries(self) -> Iterator[tuple[Key, Kept]]:
        """What is kept, the newest first."""
        for key, entry in reversed(self.kept.items()):
            yield key, self.entry(entry)

    def entry(self, entry: AttemptRow | Kept) -> Kept:
        """One of what is kept."""
        if len(entry) == 5:
            return entry
        schemas = entry.schemas
        assert schemas is not None  # Its output is a snapshot.
        schema = schemas[1]
        return entry.node_id, schema, cast("Snapshot", entry.output), contract_of(entry, schema), entry


def row_of(entry: AttemptRow | Kept) -> AttemptRow | None:
    """The attempt that committed what is kept; None for what was saved, or came with a fork."""
    return entry[4] if len(entry) == 5 else entry


def position_of(key: Key) -> tuple[int, str]:
    return cast("tuple[int, str]", key if isinstance(key, tuple) else (key, ""))


def stored(kept: Kept) -> bytes | None:
    """One of what is kept in its stored form; None if it has none."""
    _, schema, snapshot, *_ = kept
    try:
        return schema.encode(schema.restore(snapshot))
    except NotSerialisable:
        return None
