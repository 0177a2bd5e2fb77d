"""What a store in memory keeps of a run, and how it is read."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from stroma.checkpoint.errors import CheckpointNotFound
from stroma.checkpoint.journal import Committed, Held, StepCall, Waiting, items_in, no_map
from stroma.contracts import check_id
from stroma.schemas import NotSerialisable, Schema, Snapshot
from stroma.trace import (
    ATTEMPT,
    BRANCH,
    FUNCTION,
    NODE,
    OUTPUT,
    POSITION,
    SCHEMAS,
    STARTED,
    USAGE,
    Row,
    contract_of,
)

if TYPE_CHECKING:
    from stroma._frames import Trouble
    from stroma.checkpoint._memory_records import MemoryRecords
    from stroma.checkpoint.records import (
        AttemptPage,
        AttemptRecord,
        RunPage,
        RunQuery,
        RunRecord,
        StoreFacts,
        Tally,
    )

__all__ = ["Kept", "Key", "MemoryReading", "MemoryRun", "nobody", "position_of", "row_of", "stored"]

_NUMBERS: Final = itertools.count(1)

Key = int | str | tuple[int, str]
#: Node id, schema, output and what it is filed under; and the row of the attempt, if there was one.
Kept = tuple[str, Schema, Snapshot, str, Row | None]


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
    kept: dict[Key, Row | Kept] = field(default_factory=dict)
    spent: list[Row] = field(default_factory=list)
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

    def attempts(self) -> list[Row]:
        """The rows of the last execution, by position and time."""
        rows = [*self.spent, *(row for row in map(row_of, self.kept.values()) if row is not None)]
        # One that was sent again is one attempt.
        one = {(row[POSITION], row[STARTED], row[BRANCH], row[ATTEMPT]): row for row in rows}
        return [one[key] for key in sorted(one)]

    def used(self) -> tuple[int, float, float]:
        """Tokens, USD and milliseconds of the last execution."""
        rows = self.attempts()
        usages = [usage for row in rows if (usage := row[USAGE]) is not None]
        return (
            sum(usage.tokens for usage in usages),
            math.fsum(usage.cost_usd for usage in usages),
            sum(row[FUNCTION] for row in rows if not row[BRANCH]) / 1e6,
        )

    def entries(self) -> Iterator[tuple[Key, Kept]]:
        """What is kept, the newest first."""
        for key, entry in reversed(self.kept.items()):
            yield key, self.entry(entry)

    def entry(self, entry: Row | Kept) -> Kept:
        """One of what is kept."""
        if len(entry) == 5:
            return entry
        schemas = entry[SCHEMAS]
        assert schemas is not None  # Its output is a snapshot.
        schema = schemas[1]
        return entry[NODE], schema, cast("Snapshot", entry[OUTPUT]), contract_of(entry, schema), entry


def row_of(entry: Row | Kept) -> Row | None:
    """The attempt that committed what is kept; None for what was saved, or came with a fork."""
    return entry[4] if len(entry) == 5 else entry


def position_of(key: Key) -> tuple[int, str]:
    return cast("tuple[int, str]", key if isinstance(key, tuple) else (key, ""))


class MemoryReading:
    """What every journal store tells of its runs. Nothing here awaits."""

    _runs: dict[str, MemoryRun]

    @property
    def _records(self) -> MemoryRecords:
        from stroma.checkpoint._memory_records import MemoryRecords

        return MemoryRecords(self._runs)

    def exists(self) -> bool:
        """Whether there is anything to read from."""
        return True

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown."""
        run = self._runs.get(check_id(run_id, "run id"))
        return [] if run is None else list(run.waiting.values())

    def _known(self, run_id: str) -> MemoryRun:
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or not run.execution:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this process; check the id")
        return run

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first."""
        return self._records.list_runs(limit, pipeline, status)

    def run_page(
        self, query: RunQuery | None = None, *, limit: int = 50, after: str | None = None
    ) -> RunPage:
        """The last executions of the runs that are asked for, the one begun last first, with the cause of failures.

        ``after``: the ``next`` of the page before. Raises ValueError for one that is none.
        """
        return self._records.run_page(query, limit, after)

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id."""
        return self._records.get_run(check_id(run_id, "run id"))

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id for "last". A whole id stands alone."""
        runs = self.list_runs(limit=len(self._runs))
        if prefix_or_last == "last":
            return [run.run_id for run in runs[:1]]
        prefix = check_id(prefix_or_last, "run id")
        found = [run.run_id for run in runs if run.run_id.startswith(prefix)]
        return [prefix] if prefix in found else found[:limit]

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of the last execution, by position and time; earlier ones are not kept. [] if unknown."""
        return self._records.attempts(check_id(run_id, "run id"), execution)

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """The same, page by page, without outputs. Raises ValueError for an ``after`` that is none."""
        return self._records.attempt_page(check_id(run_id, "run id"), execution, limit, after)

    def attempts_at(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> list[AttemptRecord]:
        """Every attempt of the last execution at one place, without outputs. [] if unknown."""
        return self._records.attempts_at(check_id(run_id, "run id"), position, branch, execution)

    def trouble_of(self, run_id: str, position: int, branch: str = "") -> Trouble | None:
        """Where the last failed attempt at a place failed; None if nothing is known."""
        return self._records.trouble_of(check_id(run_id, "run id"), position, branch)

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """What is committed at a place, in its stored form (see Schema.decode); None if nothing is, or it has none."""
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or execution not in (None, run.execution):
            return None
        entry = run.kept.get((position, branch) if branch else position)
        return None if entry is None else stored(run.entry(entry))

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """The attempts of the runs begun since, summed up by span of time, pipeline, node, model and class.

        Of so many runs and attempts at the most, the newest runs first.
        """
        return self._records.tally(since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        """What the store says of itself."""
        return self._records.facts()

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form. Raises CheckpointNotFound, NotSerialisable."""
        run = self._known(run_id)
        assert run.schema is not None
        assert run.input is not None
        return run.schema.encode(run.schema.restore(run.input))

    def map_items(self, run_id: str, node_id: str, first: int, count: int) -> list[tuple[int, Committed]]:
        """What a map committed of its items, from one on, of the last execution of a run; [] behind the last one.

        Raises CheckpointNotFound if there is no such map that is done.
        """
        run = self._known(run_id)
        for key, kept in run.entries():
            call = run.calls.get(key)
            if kept[0] == node_id and call is not None and call.given is not None:
                position, branch = position_of(key)
                prefix = f"{branch}." if branch else ""
                found: list[tuple[int, Committed]] = []
                for index in range(first, min(items_in(call.given), first + count)):
                    entry = run.kept.get((position, f"{prefix}{index}"))
                    if entry is not None:
                        node, schema, snapshot, contract, _ = run.entry(entry)
                        found.append((index, Committed(node, snapshot, contract, None, schema)))
                return found
        raise no_map(run_id, node_id)


def stored(kept: Kept) -> bytes | None:
    """One of what is kept in its stored form; None if it has none."""
    _, schema, snapshot, *_ = kept
    try:
        return schema.encode(schema.restore(snapshot))
    except NotSerialisable:
        return None
