"""The rows of a store in memory: objects in dictionaries, and states as snapshots."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, cast

from stroma.checkpoint.decisions import ENDED, MESSAGE_SENT, UNFINISHED
from stroma.checkpoint.durable.conversion import to_attempt
from stroma.checkpoint.durable.integrity import seal
from stroma.checkpoint.durable.rows import (
    NOW,
    Annotation,
    EventRow,
    Fence,
    Opening,
    RunRow,
    ScannedRows,
    Step,
    StepRow,
    matches,
)
from stroma.checkpoint.entries import OF_FLOW, Discard, StepCall, is_failed_item
from stroma.checkpoint.events import MAX_BATCHES, EventPlace
from stroma.checkpoint.identity import is_called, mark_of, parse_mark
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import UnencodedState
from stroma.checkpoint.queue import POSTPONED, QUEUED, Candidate, ClaimRequest, QueueFigures
from stroma.checkpoint.records import AttemptRecord, RunQuery, StoreFacts
from stroma.contracts.copying import Snapshot
from stroma.contracts.schema import Schema
from stroma.contracts.tagged_json import NotSerialisable
from stroma.trace.events import COLLECTED, AttemptRow, contract_of

_NUMBERS: Final = itertools.count(1)

Place = tuple[int, str]
#: A place, or the position alone of one without a branch: a tuple for each node costs 5 % of a node.
Key = int | Place


class _Commit(NamedTuple):
    """A committed output. ``attempt``: the attempt that committed it; None for a state from ``save()``."""

    row: StepRow
    attempt: AttemptRow | AttemptRecord | None


class MemoryRun:
    """One run: the fields of its row that are not counted when it is read, and its records.

    Attributes:
        steps: outputs, and at the position of SAVED the states that ``save()`` stored; the newest last. Most
            are the row of the attempt, whose output is a snapshot.
        calls: the calls of the outputs that are such rows.
        log: attempts of the present epoch that are rows of the trace.
        attempts: all others, by epoch and key.
        number: distinguishes runs of this process that started in the same millisecond.
        session: weak reference to the session that opened it last, for requests.
        claim: token of the worker that has claimed it, and until when by the monotonic clock, in seconds.
        failure_sites: (attempt, start, function that encodes the frames) of the last failure at a place.
    """

    pipeline = version = ""
    status = "RUNNING"
    execution = epoch = started_ms = updated_ms = number = 0
    error: str | None = None
    owner: str | None = None
    wake_ms: int | None = None
    expires_ms: int | None = None
    priority: int | None = None
    key: str | None = None
    blocked: str | None = None
    blocked_since_ms: int | None = None
    blocked_until_ms: int | None = None
    blocked_codes: str | None = None
    parent: str | None = None
    tags: str = ""
    cause: str | None = None
    mark: Any = RunRow.mark  # Made of these fields.
    tag_list: Any = RunRow.tag_list

    claim: tuple[str, float] | None = None
    events: deque[EventRow] | None = None
    session: Callable[[], Any] | None = None

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.annotations: dict[Place, StepRow] = {}
        self.steps: dict[Key, AttemptRow | _Commit] = {}
        self.empty()

    def empty(self) -> None:
        """Forget what executions have recorded, except for outputs and annotations."""
        self.calls: dict[Key, StepCall] = {}
        self.log: list[AttemptRow] = []
        self.attempts: dict[tuple[Any, ...], AttemptRow | AttemptRecord] = {}
        self.identities: dict[str, int] = {}
        self.failure_sites: dict[Place, tuple[int, int, Callable[[], bytes]]] = {}

    @property
    def place(self) -> tuple[int, int]:
        """Its place in the list of all runs."""
        return self.started_ms, self.number

    @property
    def live_claim(self) -> str | None:
        """The token of the claim; None if there is none, or it has expired."""
        return self.claim[0] if self.claim is not None and time.monotonic() <= self.claim[1] else None

    @property
    def is_held(self) -> bool:
        """Return True if a session that records its end has the run."""
        session = None if self.session is None else self.session()
        return self.status == "RUNNING" and session is not None and session.owns_run

    def commit(self, row: AttemptRow, schema: Schema, output: Any, call: StepCall | None) -> None:
        """Store the output of an attempt."""
        key = (row.position, row.branch) if row.branch else row.position
        if call is not None:
            self.calls[key] = call
        elif self.calls:
            self.calls.pop(key, None)
        entry: AttemptRow | _Commit = row
        schemas = row.schemas
        if schemas is None or schemas[1] is not schema or type(row.output) is dict:  # It is for display only.
            state = UnencodedState(schema, schema.snapshot(output))
            step = Step(contract_of(row, schema), schema_ref(schema.model), state, b"")
            entry = _Commit(StepRow(row.position, row.branch, row.node_id, step), row)
        if key not in self.steps:
            self.steps[key] = entry
        elif self.steps[key] is not entry:  # One that is sent again does not become the newest.
            self.replace(key, entry)

    def replace(self, key: Key, entry: AttemptRow | _Commit) -> None:
        """Store an output as the newest one."""
        self.steps.pop(key, None)
        self.steps[key] = entry

    def all_attempts(self) -> dict[tuple[Any, ...], AttemptRow | AttemptRecord]:
        """Return all attempts by epoch and key. One that was sent twice is one attempt."""
        attempts = dict(self.attempts)
        for row in list(self.log):
            attempts.setdefault((self.epoch, row.position, row.started_ns, row.branch, row.attempt), row)
        return attempts

    def committed(self) -> list[Place]:
        """Return the places with an output of the execution."""
        places = map(_place_of, list(self.steps))
        return [place for place in places if place[0] >= 0]

    def steps_at(self, places: Iterable[Place]) -> Iterator[StepRow]:
        """Yield the outputs of those places that have one."""
        for place in places:
            entry = self.steps.get(_key_of(place))
            if entry is not None:
                yield self._step_row(place, entry)

    def _step_row(self, place: Place, entry: AttemptRow | _Commit) -> StepRow:
        if isinstance(entry, _Commit):
            row, attempt = entry
            if row.step.number is not None:  # A fork's.
                return row
        else:
            assert entry.schemas is not None  # The output of such a row is a snapshot.
            schema, attempt = entry.schemas[1], entry
            state = UnencodedState(schema, cast("Snapshot", entry.output))
            step = Step(contract_of(entry, schema), schema_ref(schema.model), state, b"")
            row = StepRow(*place, entry.node_id, step)
        call = _with_input(self.calls.get(_key_of(place)), attempt, place[1])
        if call is None:
            return row
        return row._replace(step=row.step._replace(number=call.number, input_key=call.input_key))

    def failure_site(self, key: str) -> list[StepRow]:
        """Return the annotation about the last failure at a place. Frames are encoded when they are read."""
        position, _, branch = key.partition(":")
        site = self.failure_sites.get((int(position), branch))
        if site is None:
            return []
        attempt, started_ns, encode_frames = site
        step = Step(str(started_ns), "", encode_frames(), b"", attempt)
        return [StepRow(Annotation.FAILURE_SITE, key, "", seal(Annotation.FAILURE_SITE, key, "", step))]

    def discard(self, discard: Discard) -> None:
        """Discard outputs of the execution."""
        failed = (place for place in self.committed() if place[0] in discard.failed_at)
        gone = {
            *discard.places,
            *(row[:2] for row in self.steps_at(failed) if is_failed_item(row.step.contract)),
        }
        if discard.first is not None:
            gone.update(place for place in self.committed() if place[0] >= discard.first)
        for key in map(_key_of, gone):
            del self.steps[key]
            self.calls.pop(key, None)


def _key_of(place: Place) -> Key:
    return place if place[1] else place[0]


def _place_of(key: Key) -> Place:
    return (key, "") if isinstance(key, int) else key


def _with_input(
    call: StepCall | None, attempt: AttemptRow | AttemptRecord | None, branch: str
) -> StepCall | None:
    """Return a call with its input in stored form, which is made here: most are never asked for it."""
    if call is None and is_called(branch.rpartition(".")[2]):
        call = StepCall(OF_FLOW, None)  # What other code calls is recorded with its call.
    if call is None or call.number > OF_FLOW or call.input_key is not None:
        return call
    if not isinstance(attempt, AttemptRow) or attempt.schemas is None:
        return call
    schema = attempt.schemas[0]
    return call._replace(input_key=schema.input_key(schema.restore(attempt.input), is_sealed=False))


class MemoryRows(ScannedRows):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The key of a run is its MemoryRun."""

    def __init__(self, runs: dict[str, MemoryRun]) -> None:
        self._runs = runs
        self._cells: dict[str, bytes] = {}

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        run = self._runs.get(run_id)
        return None if run is None else _run_row(run)

    def add_execution(self, run: RunRow | None, opening: Opening, execution: int) -> MemoryRun:
        one: MemoryRun = MemoryRun(opening.run_id) if run is None else run.run
        if run is None:
            self._runs[opening.run_id] = one
        else:
            one.discard(Discard(0))
            one.empty()
            one.events = None
        one.number = next(_NUMBERS)
        return one

    def continue_execution(self, run: RunRow, discard: Discard) -> MemoryRun:
        one: MemoryRun = run.run
        one.attempts, one.log = one.all_attempts(), []
        if discard != Discard():
            one.discard(discard)
        return one

    def update(
        self, run: MemoryRun, fields: Mapping[str, Any], *, fence: Fence | None = None, is_news: bool = False
    ) -> bool:
        if fence is not None and (run.epoch, run.owner) != (fence.epoch, fence.owner):
            return False
        values, now_ms = vars(run), self.now_ms()
        values.update(fields)  # With times of leases, which memory does not have.
        for name in ("started_ms", "updated_ms"):
            if values.get(name) is NOW:
                values[name] = now_ms
        return True

    def steps(
        self, run: MemoryRun, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()
    ) -> list[StepRow]:
        def is_lazy(at: int, branch: str) -> bool:
            return any(
                at == other and branch and branch.startswith(prefix) for other, prefix in lazily_loaded
            )

        return list(run.steps_at(place for place in run.committed() if not is_lazy(*place)))

    def steps_at(self, run: MemoryRun, execution: int, places: Sequence[Place]) -> list[StepRow]:
        return list(run.steps_at(places)) if execution == run.execution else []

    def identities(self, run: MemoryRun, execution: int) -> list[tuple[str, int]]:
        return list(run.identities.items())

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        run: MemoryRun = fence.run
        if run.epoch != fence.epoch:
            return False
        if (fence.epoch, *attempt.key) not in run.attempts:
            run.attempts[fence.epoch, *attempt.key] = attempt
            if attempt.identity is not None:
                run.identities[attempt.identity] = attempt.position
            if step is not None:
                place = attempt.position, attempt.branch
                run.replace(_key_of(place), _Commit(StepRow(*place, attempt.node_id, step), attempt))
        return True

    # ------------------------------------------------------------------ queue

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        code = request.code_of(pipeline)
        candidates: list[Candidate] = []
        for run in self._of(pipeline, code.versions):
            mark = run.mark
            is_lost = run.status == "RUNNING" and request.with_lost and not run.is_held
            is_due = run.status in UNFINISHED and run.wake_ms is not None and run.wake_ms <= request.now_ms
            is_kept = mark is not None and mark.until_ms > request.now_ms and code.name in mark.codes
            if (is_lost or is_due) and not is_kept and run.live_claim is None:
                place = run.priority or 0, run.wake_ms or 0, run.key
                candidates.append(Candidate(run, run.run_id, pipeline, *place))
        return candidates

    def _of(self, pipeline: str, versions: Sequence[str]) -> list[MemoryRun]:
        """Return the runs of a pipeline, of these versions or none."""
        return [
            run
            for run in list(self._runs.values())
            if run.execution and run.pipeline == pipeline and run.version in ("", *versions)
        ]

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        live: dict[str | None, int] = {}
        for run in list(self._runs.values()):
            if run.pipeline == pipeline and (run.live_claim not in (None, POSTPONED) or run.is_held):
                live[run.key] = live.get(run.key, 0) + 1
        return live

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        for one in candidates:
            one.run.claim = (token, time.monotonic() + seconds)
        return list(candidates)

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        runs = self._of(pipeline, versions)
        since = [run.mark.since_ms for run in runs if run.mark is not None]
        runs = [run for run in runs if run.status in UNFINISHED and run.mark is None]
        due = [ms for run in runs if MESSAGE_SENT < (ms := run.wake_ms or 0) <= now_ms]
        queued = sum(run.status == QUEUED for run in runs)
        return QueueFigures(queued, min(due, default=None), len(since), min(since, default=None))

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        runs = map(self._runs.get, run_ids)
        return {run.run_id: run.status for run in runs if run is not None and run.execution}

    def renew(self, fences: list[Fence]) -> list[Fence]:
        return fences

    # ------------------------------------------------------------------ annotations

    def key_of(self, run_id: str) -> MemoryRun:
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = MemoryRun(run_id)
        return run

    def annotate(self, run: MemoryRun, position: int, branch: str, node_id: str, step: Step) -> None:
        row = StepRow(position, branch, node_id, step)
        if position == Annotation.SAVED:
            run.replace((position, branch), _Commit(row, None))
        else:
            run.annotations[position, branch] = row

    def annotations(self, run: MemoryRun, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        if branch is not None:
            if kinds == (Annotation.FAILURE_SITE,):
                return run.failure_site(branch)
            named = [run.annotations.get((kind, branch)) for kind in kinds]
            return [row for row in named if row is not None]
        rows = [row for (position, _), row in list(run.annotations.items()) if position in kinds]
        return sorted(rows, key=lambda row: row.branch)

    def delete_annotations(self, run: MemoryRun, *kinds: Annotation, branch: str | None = None) -> None:
        if branch is not None:
            for kind in kinds:
                run.annotations.pop((kind, branch), None)
        else:
            for place in [place for place in run.annotations if place[0] in kinds]:
                del run.annotations[place]

    def with_requests(self, runs: list[MemoryRun]) -> list[MemoryRun]:
        return [run for run in runs if any(kind == Annotation.REQUEST for kind, _ in list(run.annotations))]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        run = self._runs.get(run_id)
        keys = () if run is None else reversed(list(run.steps))
        rows = () if run is None else run.steps_at(map(_place_of, keys))
        return next((row for row in rows if row.node_id == node_id), None)

    def delete(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.epoch += 1  # Fences off the session that has the run open.

    # ------------------------------------------------------------------ events

    def append_events(self, batches: Sequence[EventRow]) -> None:
        for one in batches:
            run: MemoryRun = one.run
            if run.events is None:
                run.events = deque(maxlen=MAX_BATCHES)
            is_new = not run.events or run.events[-1].last < one.last
            if is_new and run.execution == one.execution and self._runs.get(run.run_id) is run:
                run.events.append(one)

    def events(self, run: MemoryRun, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        events = list(run.events or ())
        return [one for one in events if one.last > after and one.execution == execution][:limit]

    # ------------------------------------------------------------------ cells, retention

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        return self._cells.get(name), self.now_ms()

    def write_cell(self, name: str, data: bytes) -> None:
        self._cells[name] = data

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        runs = [run for run in list(self._runs.values()) if run.updated_ms < before_ms]
        return [run.run_id for run in runs if unfinished or (run.execution and run.status in ENDED)][:limit]

    def blobs(self) -> Iterable[bytes]:
        return ()

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        end = (math.inf, 0) if after is None else parse_mark(after, 2)
        runs = [
            run
            for run in list(self._runs.values())
            if run.execution and run.place < end and matches(query, run)
            if query.failure_class is query.node is None or any(map(query.matches_failure, _failed(run)))
        ]
        runs.sort(key=lambda run: run.place, reverse=True)
        page = runs[:limit]
        following = mark_of(*page[-1].place) if len(runs) > limit else None
        return list(map(_run_row, page)), following

    def failed(self, runs: Sequence[RunRow], limit: int) -> list[list[AttemptRecord]]:
        return [_failed(one.run)[:limit] for one in runs]

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        runs = [run for run in list(self._runs.values()) if run.run_id.startswith(prefix)]
        runs.sort(key=lambda run: (run.run_id == prefix, run.place), reverse=True)
        return [run.run_id for run in runs if run.execution][:limit]

    def _attempts_of(self, runs: Sequence[tuple[Any, int]]) -> list[list[AttemptRecord]]:
        return [_records(run, execution) for run, execution in runs]

    def _with_sizes(self, run: MemoryRun, attempts: list[AttemptRecord]) -> list[AttemptRecord]:
        for one in attempts:
            if one.output_bytes is not None:
                one.output_bytes = None
                for row in run.steps_at([(one.position, one.branch)]):
                    output = row.step.output
                    with contextlib.suppress(NotSerialisable):
                        encoded = output.encode() if isinstance(output, UnencodedState) else output
                        one.output_bytes = len(encoded)
        return attempts

    def facts(self) -> StoreFacts:
        return StoreFacts("the memory of this process", 1)


_STORED: Final = tuple(name for name in RunRow._fields if hasattr(MemoryRun, name) and name != "claim")


def _run_row(run: MemoryRun) -> RunRow:
    records, places = _records(run, run.execution), run.committed()
    stored = {name: getattr(run, name) for name in _STORED}
    if run.status == "RUNNING":
        ends = [(one.started_ns + one.duration_ns) // 1_000_000 for one in records]
        stored["updated_ms"] = max([run.updated_ms, *ends])
    return RunRow(
        **stored,
        run=run,
        run_id=run.run_id,
        tokens=sum(one.tokens for one in records),
        cost_pico=sum(one.cost_pico for one in records),
        latency_ns=sum(one.function_ns for one in records if not one.branch),
        left_seconds=math.inf if run.is_held else -1.0,
        nodes=sum(not branch for _, branch in places),
        attempt_count=len(records),
        commit_count=len(places),
        claim=run.live_claim,
    )


def _records(run: MemoryRun, execution: int) -> list[AttemptRecord]:
    """Return the attempts of the last execution in their order; ``output_bytes`` is 0 for each commit."""
    if execution != run.execution:
        return []
    positions = {position: identity for identity, position in list(run.identities.items())}
    records: list[AttemptRecord] = []
    for key, row in run.all_attempts().items():
        if row.outcome == COLLECTED:
            continue
        entry = run.steps.get(_key_of((row.position, row.branch)))
        if isinstance(row, AttemptRecord):
            record = replace(row)
        else:
            record = to_attempt(row)
            record.identity = positions.get(row.position)
        record.epoch = key[0]
        if (entry.attempt if isinstance(entry, _Commit) else entry) is row:
            record.output_bytes = 0
        records.append(record)
    return sorted(records, key=lambda one: (one.epoch, one.key))


def _failed(run: MemoryRun) -> list[AttemptRecord]:
    """Return the failed attempts of the last execution, the latest end first."""
    failed = [one for one in _records(run, run.execution) if one.failure_class is not None]
    return sorted(failed, key=lambda one: one.started_ns + one.duration_ns, reverse=True)
