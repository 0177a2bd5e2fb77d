"""Reading the runs of durable stores. Nothing here creates or changes a store."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from stroma.checkpoint.decoding import RecordName, decode_json, decode_number
from stroma.checkpoint.durable.annotations import (
    RunRecords,
    find_rejected,
    name_of,
    place_of_cause,
    read_notes,
    read_waiting,
)
from stroma.checkpoint.durable.control import read_control
from stroma.checkpoint.durable.conversion import open_events, open_message, open_output, open_step_input
from stroma.checkpoint.durable.integrity import is_intact, lost_error, verify_step
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Annotation, Rows, RunRow, StepRow
from stroma.checkpoint.entries import (
    ALL_FAILED_ITEMS,
    NO_CONTROL,
    OF_FLOW,
    Intent,
    RunControl,
    RunFacts,
    Waiting,
    is_effect_note,
)
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint
from stroma.checkpoint.events import EventPage, EventPlace
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.records import (
    FAILED,
    PICO,
    AttemptPage,
    AttemptRecord,
    RunPage,
    RunQuery,
    RunRecord,
    StoreFacts,
    Tally,
)
from stroma.contracts.contract import check_id
from stroma.contracts.tagged_json import NotSerialisable
from stroma.failures.tracebacks import FailureSite, read_failure_site

if TYPE_CHECKING:
    from stroma.trace.rejected import RejectedOutput

T = TypeVar("T")

_MAX_FILTERED: Final = 20_000  # runs that one page filters one by one
_MAX_FAILED: Final = 20  # failed attempts of a run that are read; its cause may be an earlier one
#: Outcomes after which an earlier failure at the same place no longer counts as the cause.
_FIXES: Final = ("success", "suspended")
_ALL_RUNS: Final = RunQuery()
_ALL: Final = 1_000_000_000  # attempts


class ReadableStore(ABC):
    """A store whose runs can be read. All methods block, work in any thread, and raise StoreError."""

    _payloads: Payloads

    @abstractmethod
    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Read in the calling thread; ``nothing`` while the store is empty. Raises StoreError."""

    def exists(self) -> bool:
        """Return True if there is something to read: the first run creates the file."""
        return True

    @abstractmethod
    def _display_name(self) -> str:
        """Return the name of the store for messages, without a password."""

    def _read_run(self, run_id: str, query: Callable[[Rows, RunRow], T], nothing: T) -> T:
        """Read something of a run; ``nothing`` of an unknown one. Raises ValueError for an illegal id."""
        check_id(run_id, "run id")

        def read(rows: Rows) -> T:
            run = rows.find(run_id)
            return nothing if run is None else query(rows, run)

        return self.read(read, nothing)

    def _read_records(
        self, run_id: str, query: Callable[[RunRecords], T], nothing: T, execution: int | None = None
    ) -> T:
        """Read something of an execution (None: the last), as :meth:`_read_run` does."""

        def read(rows: Rows, run: RunRow) -> T:
            records = RunRecords.of(rows, run, self._payloads)
            return query(records if execution is None else records._replace(execution=execution))

        return self._read_run(run_id, read, nothing)

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """Return the last execution of each run, the newest first.

        Raises StoreError.
        """
        query = RunQuery(pipeline=pipeline, statuses=() if status is None else (str(status),))

        def read(rows: Rows) -> list[RunRecord]:
            runs, _ = rows.runs(query, limit=limit, after=None, max_filtered=None)
            return self._run_records(rows, runs, failed=0)

        return self.read(read, [])

    def run_page(self, query: RunQuery = _ALL_RUNS, *, limit: int = 50, after: str | None = None) -> RunPage:
        """Return the last executions of the runs that match a query, the newest first, with causes.

        ``after``: the ``next`` of the previous page. Raises ValueError for any other text, StoreError.
        """

        def read(rows: Rows) -> RunPage:
            runs, following = rows.runs(query, limit=limit, after=after, max_filtered=_MAX_FILTERED)
            return RunPage(self._run_records(rows, runs, failed=_MAX_FAILED), following)

        return self.read(read, RunPage([], None))

    def get_run(self, run_id: str) -> RunRecord | None:
        """Return the last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""

        def query(rows: Rows, run: RunRow) -> RunRecord | None:
            return self._run_records(rows, [run], failed=_MAX_FAILED)[0] if run.execution else None

        return self._read_run(run_id, query, None)

    def read_events(self, run_id: str, after: EventPlace, limit: int) -> EventPage | None:
        """Return at most ``limit`` batches of events of a run after a place; None for an unknown run.

        Raises ValueError for an illegal id, StoreError.
        """

        def query(rows: Rows, run: RunRow) -> EventPage | None:
            if not run.execution:
                return None
            record = None
            if run.status != "RUNNING":
                (record,) = self._run_records(rows, [run], failed=_MAX_FAILED)
            batches = rows.events(run.run, run.execution, after, limit)
            opened = [open_events(self._payloads, run_id, batch) for batch in batches]
            return EventPage(run.run, run.execution, run.epoch, record, opened)

        return self._read_run(run_id, query, None)

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """Return the ids with a prefix, the newest first; for "last" the newest id. A complete id is alone.

        Raises StoreError.
        """
        if prefix_or_last == "last":
            return [row.run_id for row in self.list_runs(limit=1)]
        prefix = check_id(prefix_or_last, "run id")
        run_ids = self.read(lambda rows: rows.find_run_ids(prefix, limit), list[str]())
        return run_ids[:1] if run_ids[:1] == [prefix] else run_ids

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Return each attempt of an execution (None: the last), by process, position and time; [] if unknown.

        A group comes before its children. Raises StoreError.
        """

        def query(records: RunRecords) -> list[AttemptRecord]:
            rows, run, number = records.rows, records.run, records.execution
            attempts, _ = rows.attempt_page(run, number, limit=_ALL, after=None)
            places = [(one.position, one.branch) for one in attempts if one.output_bytes is not None]
            steps = {row[:2]: row for row in rows.steps_at(run, number, places)}
            for one in self._with_messages(records, attempts):
                row = None if one.output_bytes is None else steps.get((one.position, one.branch))
                if row is not None:
                    try:
                        one.output = open_output(self._payloads, run_id, number, row)
                    except CorruptCheckpoint:
                        one.damaged = True  # The rest of the history is still readable.
            return attempts

        return self._read_records(run_id, query, [], execution)

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """Return a page of the attempts, without outputs. Raises ValueError for any other ``after``."""

        def query(records: RunRecords) -> AttemptPage:
            attempts, following = records.rows.attempt_page(
                records.run, records.execution, limit=limit, after=after
            )
            return AttemptPage(self._with_messages(records, attempts), following)

        return self._read_records(run_id, query, AttemptPage([], None), execution)

    def attempts_at(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> list[AttemptRecord]:
        """Return each attempt of an execution (None: the last) at one place, without outputs; [] if unknown.

        Raises StoreError.
        """

        def query(records: RunRecords) -> list[AttemptRecord]:
            attempts = records.rows.attempts_at(records.run, records.execution, position, branch)
            return self._with_messages(records, attempts)

        return self._read_records(run_id, query, [], execution)

    def failure_site_of(self, run_id: str, position: int, branch: str = "") -> FailureSite | None:
        """Return where the last failed attempt at a place failed; None if unknown. Raises StoreError."""
        row = self._read_records(
            run_id, lambda records: records.one(Annotation.FAILURE_SITE, f"{position}:{branch}"), None
        )
        if row is None:
            return None
        name, step = name_of(row, run_id), row.step
        site = read_failure_site(step.output, step.number or 0, decode_number(step.contract, name))
        if site is None:
            raise name.damaged()
        return site

    def rejected_of(self, run_id: str, position: int, branch: str, started_ns: int) -> RejectedOutput | None:
        """Return the output that broke its contract in an attempt of the last execution, or None.

        Raises CorruptCheckpoint, StoreError.
        """
        return self._read_records(
            run_id, lambda records: find_rejected(records, position, branch, started_ns), None
        )

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """Return the output committed at a place in stored form (see Schema.decode); None if it has none.

        Raises CorruptCheckpoint, StoreError.
        """
        number, row = self._step_at(run_id, position, branch, execution)
        if row is None:
            return None
        try:
            return open_output(self._payloads, run_id, number, row)
        except NotSerialisable:
            return None

    def _step_at(
        self, run_id: str, position: int, branch: str, execution: int | None = None
    ) -> tuple[int, StepRow | None]:
        """Return the number of an execution (None: the last), and its commit at a place."""

        def query(records: RunRecords) -> tuple[int, StepRow | None]:
            steps = records.rows.steps_at(records.run, records.execution, [(position, branch)])
            return records.execution, next(iter(steps), None)

        nothing: tuple[int, StepRow | None] = (0, None)
        return self._read_records(run_id, query, nothing, execution)

    def _run_records(self, rows: Rows, runs: list[RunRow], *, failed: int) -> list[RunRecord]:
        records: list[RunRecord] = []
        failures = rows.failed(runs, failed) if failed else [[] for _ in runs]
        for run, attempts in zip(runs, failures, strict=True):
            of_run = RunRecords.of(rows, run, self._payloads)
            error = self._payloads.open_text(run.error, of_run.place("error"))
            blocked = self._payloads.open_text(run.blocked, of_run.place("blocked"))
            cause = _find_cause(of_run, run, attempts)
            records.append(_run_record(run._replace(error=error, blocked=blocked), cause, len(attempts)))
        return records

    def _with_messages(self, records: RunRecords, attempts: list[AttemptRecord]) -> list[AttemptRecord]:
        for one in attempts:
            open_message(self._payloads, records.run_id, records.execution, one)
        return attempts

    def input_of(self, run_id: str) -> bytes:
        """Return the initial state of a run in stored form (see Schema.decode).

        Raises CheckpointNotFound for an unknown run, CorruptCheckpoint, StoreError.
        """
        return self._open_input(run_id, *self._read_records(run_id, stored_input, NO_INPUT))

    def _open_input(self, run_id: str, execution: int, stored: StepRow | None) -> bytes:
        if stored is None:
            raise lost_error(run_id, "its input is missing") if execution else self._no_run(run_id)
        place = PayloadPlace(run_id, execution, "input")
        return self._payloads.open(stored.step.output, place, f"the input of run {run_id!r}")

    def waiting(self, run_id: str) -> list[Waiting]:
        """Return the approvals that nodes of the last execution wait for, or waited for; [] if unknown.

        Raises CorruptCheckpoint, StoreError.
        """

        def query(records: RunRecords) -> list[Waiting]:
            return [read_waiting(records, row) for row in records.all(Annotation.WAITING)]

        return self._read_records(run_id, query, [])

    def attribution(self, run_id: str) -> dict[str, str]:
        """Return the ids that a run belongs to, by kind, such as "user" or "target"; {} if unknown.

        Raises CorruptCheckpoint, StoreError.
        """

        def query(records: RunRecords) -> dict[str, str]:
            return {row.branch: row.node_id for row in records.all(Annotation.ATTRIBUTION)}

        return self._read_records(run_id, query, {})

    def facts_of(self, run_id: str) -> RunFacts:
        """Return facts about the last execution of a run beside its record. Raises StoreError."""

        def query(rows: Rows, run: RunRow) -> RunFacts:
            records = RunRecords.of(rows, run, self._payloads)
            owner = Owner.read(run.owner)
            annotations = rows.annotations(run.run, Annotation.DEATHS, Annotation.EFFECT)
            deaths = sum(
                row.step.number or 0
                for row in annotations
                if row.position == Annotation.DEATHS and is_intact(row)
            )
            has_effects = any(row.position == Annotation.EFFECT for row in annotations)
            facts = RunFacts(
                None if owner is None else owner.place,
                deaths=deaths,
                effects=_effect_calls(records) if has_effects else {},
                live_runs=rows.live_runs(run.pipeline) if run.status == QUEUED else {},
                failed_items=int(_intact_notes(records, ALL_FAILED_ITEMS).get(ALL_FAILED_ITEMS, 0)),
            )
            if run.status != "RUNNING" or owner is None or math.isinf(run.left_seconds):
                return facts  # In memory, there are no leases.
            if run.holder is None:
                return facts._replace(is_lost=True, deaths=deaths + owner.may_die)
            return facts._replace(lease_until_ms=int(1000 * (time.time() + run.left_seconds)))

        return self._read_run(run_id, query, RunFacts())

    def control(self, run_id: str) -> RunControl:
        """Return the requests that apply to a run, read by its owner or not. Raises StoreError."""
        return self._read_records(run_id, read_control, NO_CONTROL)

    def traceparents(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Return the recorded trace contexts of runs, of each system in one text. Raises StoreError."""

        def query(rows: Rows) -> dict[str, str]:
            runs = [run for run_id in run_ids if (run := rows.find(run_id)) is not None]
            records = [RunRecords.of(rows, run, self._payloads) for run in runs]
            traces = {one.run_id: one.one(Annotation.ATTRIBUTION, "trace") for one in records}
            return {run_id: trace.node_id for run_id, trace in traces.items() if trace is not None}

        return self.read(query, dict[str, str]())

    def flow_notes(self, run_id: str) -> dict[str, bytes]:
        """Return the notes of the flows of the last execution, by key, without damaged ones.

        Raises StoreError.
        """
        return self._read_records(run_id, _intact_notes, {})

    def call_input_of(self, run_id: str, position: int, branch: str) -> bytes | None:
        """Return the input of a committed call of a flow in stored form; None if there is none.

        Raises CorruptCheckpoint, StoreError.
        """
        execution, row = self._step_at(run_id, position, branch)
        if row is None or row.step.number is None or row.step.number > OF_FLOW:
            return None
        verify_step(row.step, run_id, position, row.node_id, branch)
        return open_step_input(self._payloads, run_id, execution, row)

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """Return sums over attempts of runs started since, by time, pipeline, node, model and failure class.

        Reads at most so many runs and attempts, the newest runs first. Raises StoreError.
        """
        return self.read(
            lambda rows: rows.tally(since_ms, bucket_ms, runs=runs, attempts=attempts), list[Tally]()
        )

    def facts(self) -> StoreFacts | None:
        """Return version and settings of the store; None while it is empty. Raises StoreError."""
        return self.read(lambda rows: rows.facts(), None)

    def _no_run(self, run_id: str) -> CheckpointNotFound:
        return CheckpointNotFound(
            f"there is no run {run_id!r} in {self._display_name()}; check the id and the store"
        )


NO_INPUT: Final[tuple[int, StepRow | None]] = (0, None)


def stored_input(records: RunRecords) -> tuple[int, StepRow | None]:
    """Return the number of an execution, and its input as it is stored. Raises CorruptCheckpoint."""
    return records.execution, records.one(Annotation.INPUT)


def _intact_notes(records: RunRecords, key: str | None = None) -> dict[str, bytes]:
    """Return the notes of an execution by key, without damaged ones; or the one with this key."""
    notes: dict[str, bytes] = {}
    for row in filter(is_intact, records.rows.annotations(records.run, Annotation.NOTE, branch=key)):
        with contextlib.suppress(CorruptCheckpoint):
            notes.update(read_notes(records, [row], None))
    return notes


def _effect_calls(records: RunRecords) -> dict[tuple[int, str], Intent]:
    """Return the last calls of the effects of an execution, without damaged records."""
    calls: dict[tuple[int, str], Intent] = {}
    for key, data in _intact_notes(records).items():
        if is_effect_note(key):
            position, _, branch = key.split(":", 2)
            with contextlib.suppress(CorruptCheckpoint):
                calls[int(position), branch] = decode_json(
                    data, Intent, RecordName(records.run_id, "note", key)
                )
    return calls


def _find_cause(records: RunRecords, run: RunRow, failed: list[AttemptRecord]) -> AttemptRecord | None:
    """Return the cause of a run, see RunRecord. ``failed``: its last failed attempts."""
    possible = failed
    if run.status in FAILED:
        possible = [one for one in failed if one.mark == run.cause]
        if run.cause is not None and not possible and len(failed) == _MAX_FAILED:
            place = place_of_cause(run.run_id, run.cause)
            attempts = records.rows.attempts_at(run.run, run.execution, *place)
            possible = [one for one in attempts if one.mark == run.cause]
    elif run.status in ("RUNNING", "SUSPENDED"):
        last = {(one.position, one.branch): one for one in reversed(failed)}
        possible = [one for one in last.values() if not _is_fixed(records.rows, run, one)]
    if not possible:
        return None
    one = max(possible, key=lambda one: (one.started_ns, one.branch))  # A group begins before its children.
    open_message(records.payloads, records.run_id, records.execution, one)
    return one


def _is_fixed(rows: Rows, run: RunRow, failed: AttemptRecord) -> bool:
    """Return True if the same place had a success later, or asks a question."""
    attempts = rows.attempts_at(run.run, run.execution, failed.position, failed.branch)
    return any(one.started_ns >= failed.started_ns and one.outcome in _FIXES for one in attempts)


def _run_record(row: RunRow, cause: AttemptRecord | None, failures: int) -> RunRecord:
    holder = row.holder
    return RunRecord(
        run_id=row.run_id,
        pipeline=row.pipeline,
        status=row.status,
        execution=row.execution,
        started_ms=row.started_ms,
        updated_ms=row.updated_ms,
        tokens=row.tokens,
        cost_usd=row.cost_pico / PICO,
        nodes=row.nodes,
        error=row.error,
        holder=None if holder is None else holder.place,
        parent=row.parent,
        latency_ms=row.latency_ns / 1e6,
        tags=tuple(sorted(row.tag_list)),
        cause=cause,
        failures=failures,
        epoch=row.epoch,
        due_ms=row.wake_ms,
        priority=row.priority or 0,
        key=row.key,
        expires_ms=row.expires_ms,
        version=row.version or None,
        blocked=row.mark,
        commits=row.commit_count,
    )
