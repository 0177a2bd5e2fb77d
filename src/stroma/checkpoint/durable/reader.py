"""What durable stores know of runs, as callers read it. Nothing here makes a store, or changes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, TypeVar

from stroma.checkpoint.durable.annotations import read_waiting
from stroma.checkpoint.durable.integrity import is_intact, verify_step
from stroma.checkpoint.durable.rows import (
    DAMAGED,
    Annotation,
    AttemptSummary,
    Rows,
    RunExtras,
    RunRow,
    Step,
    StepRow,
)
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import (
    PICO,
    Attempt,
    AttemptPage,
    AttemptRecord,
    RunPage,
    RunQuery,
    RunRecord,
    StoreFacts,
    Tally,
    cause_of,
)
from stroma.contracts.contract import check_id
from stroma.failures.tracebacks import Trouble, read_trouble

__all__ = ["ReadableStore"]

T = TypeVar("T")

_LOOK_AT: Final = 20_000  # runs that one page looks at one by one
_FAILED: Final = 20  # failed attempts in which the cause is looked for
#: Outcomes of attempts after which an earlier failure at their place is no matter any more.
_FIXES: Final = ("success", "suspended")
_ALL_RUNS: Final = RunQuery()


class ReadableStore(ABC):
    """A store whose runs can be read. All of it blocks, from any thread, and raises StoreError."""

    _payloads: Payloads

    @abstractmethod
    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        """Read in the calling thread; ``nothing`` while the store is empty. Raises StoreError."""

    def exists(self) -> bool:
        """Whether there is anything to read from: a file is made by the first run."""
        return True

    @abstractmethod
    def _named(self) -> str:
        """What messages call the store."""

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first.

        Blocking, like all of this section; none of it makes a store. Raises StoreError.
        """
        wanted = None if status is None else str(status)

        def query(rows: Rows) -> list[RunRecord]:
            asked = RunQuery(pipeline=pipeline, statuses=() if wanted is None else (wanted,))
            found, _ = rows.runs(asked, limit=limit, after=None, look_at=None)
            return self._run_records(rows, found, failed=0)

        return self.read(query, [])

    def run_page(self, query: RunQuery = _ALL_RUNS, *, limit: int = 50, after: str | None = None) -> RunPage:
        """The last executions of the runs that are asked for, the one begun last first, with the cause of failures.

        ``after``: the ``next`` of the page before. Raises ValueError for one that is none, StoreError.
        """

        def read(rows: Rows) -> RunPage:
            found, following = rows.runs(query, limit=limit, after=after, look_at=_LOOK_AT)
            return RunPage(self._run_records(rows, found, failed=_FAILED), following)

        return self.read(read, RunPage([], None))

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id, StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> RunRecord | None:
            found = rows.find(run_id)
            if found is None or not (found.execution or found.is_damaged):
                return None
            return self._run_records(rows, [found], failed=_FAILED)[0]

        return self.read(query, None)

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id of all for "last". A whole id stands alone.

        Raises StoreError.
        """
        if prefix_or_last == "last":
            return [row.run_id for row in self.list_runs(limit=1)]
        prefix = check_id(prefix_or_last, "run id")
        found = self.read(lambda rows: rows.find_run_ids(prefix, limit), list[str]())
        return found[:1] if found[:1] == [prefix] else found

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of an execution (1-based; None is the last), by process, position and time. [] if unknown.

        A group stands before its children. Raises StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            if found is None:
                return []
            number = found.execution if execution is None else execution
            kept = rows.attempts(found.run, number)
            return [self._attempt_record(run_id, number, attempt, step) for attempt, step in kept]

        return self.read(query, [])

    def attempt_page(
        self, run_id: str, *, execution: int | None = None, limit: int = 1000, after: str | None = None
    ) -> AttemptPage:
        """The same, page by page, without outputs. Raises ValueError for an ``after`` that is none, StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> AttemptPage:
            found = rows.find(run_id)
            if found is None:
                return AttemptPage([], None)
            number = found.execution if execution is None else execution
            kept, following = rows.attempt_page(found.run, number, limit=limit, after=after)
            return AttemptPage([self._told(run_id, number, told) for told in kept], following)

        return self.read(query, AttemptPage([], None))

    def attempts_at(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> list[AttemptRecord]:
        """Every attempt of an execution (None: the last) at one place, without outputs. [] if unknown.

        Raises StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[AttemptRecord]:
            found = rows.find(run_id)
            if found is None:
                return []
            number = found.execution if execution is None else execution
            kept = rows.attempts_at(found.run, number, position, branch)
            return [self._told(run_id, number, told) for told in kept]

        return self.read(query, [])

    def trouble_of(self, run_id: str, position: int, branch: str = "") -> Trouble | None:
        """Where the last failed attempt at a place failed; None if nothing is known. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> StepRow | None:
            found = rows.find(run_id)
            kept = (
                []
                if found is None
                else rows.annotations(found.run, Annotation.FAILURE_SITE, f"{position}:{branch}")
            )
            return next(iter(kept), None)

        kept = self.read(query, None)
        if (
            kept is None
            or not is_intact(kept.step.output, kept.step.sha256)
            or not kept.step.contract.isdecimal()
        ):
            return None
        return read_trouble(kept.step.output, kept.step.number or 0, int(kept.step.contract))

    def output_of(
        self, run_id: str, position: int, branch: str = "", *, execution: int | None = None
    ) -> bytes | None:
        """What is committed at a place, in its stored form (see Schema.decode); None if nothing is.

        Raises CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> tuple[int, StepRow | None]:
            found = rows.find(run_id)
            if found is None:
                return 0, None
            number = found.execution if execution is None else execution
            return number, rows.step_at(found.run, number, position, branch)

        nothing: tuple[int, StepRow | None] = (0, None)
        number, kept = self.read(query, nothing)
        if kept is None:
            return None
        verify_step(kept.step, run_id, position, kept.node_id, branch)
        what = f"the output of node {kept.node_id!r} at position {position} of run {run_id!r}"
        return self._payloads.open(
            kept.step.output, PayloadPlace(run_id, number, "output", position, branch), what
        )

    def _with_message(self, run_id: str, execution: int, attempt: Attempt) -> Attempt:
        place = PayloadPlace(run_id, execution, "message", attempt.position, attempt.branch)
        return attempt._replace(message=self._payloads.open_text(attempt.message, place))

    def _told(self, run_id: str, execution: int, told: AttemptSummary) -> AttemptRecord:
        return _record_of(self._with_message(run_id, execution, told.attempt), told.size, told.epoch)

    def _run_records(self, rows: Rows, found: list[RunRow], *, failed: int) -> list[RunRecord]:
        records: list[RunRecord] = []
        for row, beside in zip(found, rows.run_extras(found, failed=failed), strict=True):
            error = self._payloads.open_text(row.error, PayloadPlace(row.run_id, row.execution, "error"))
            failed_ones = [self._with_message(row.run_id, row.execution, one) for one in beside.failed]
            unsettled = _unsettled(rows, row, failed_ones)
            records.append(_run_record(row._replace(error=error), beside, unsettled))
        return records

    def _attempt_record(
        self, run_id: str, execution: int, attempt: Attempt, step: Step | None
    ) -> AttemptRecord:
        attempt, output, damaged = self._with_message(run_id, execution, attempt), None, False
        if step is not None:
            what = f"the output of node {attempt.node_id!r} at position {attempt.position} of run {run_id!r}"
            try:
                verify_step(step, run_id, attempt.position, attempt.node_id, attempt.branch)
                place = PayloadPlace(run_id, execution, "output", attempt.position, attempt.branch)
                output = self._payloads.open(step.output, place, what)
            except CorruptCheckpoint:
                damaged = True  # The rest of the history can be told all the same.
        size = None if step is None else len(step.output)
        return _record_of(attempt, size, 0, output=output, damaged=damaged)

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form (see Schema.decode).

        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint, StoreError.
        """
        check_id(run_id, "run id")

        def query(rows: Rows) -> tuple[int, tuple[str, bytes, bytes] | None]:
            found = rows.find(run_id)
            return (0, None) if found is None else (found.execution, rows.input(found.run, found.execution))

        nothing: tuple[int, tuple[str, bytes, bytes] | None] = (0, None)
        execution, kept = self.read(query, nothing)
        if kept is None:
            raise self._no_run(run_id)
        if not is_intact(kept[1], kept[2]):
            raise CorruptCheckpoint(
                f"the input of run {run_id!r} is damaged; begin a new run with the input it had"
            )
        place = PayloadPlace(run_id, execution, "input")
        return self._payloads.open(kept[1], place, f"the input of run {run_id!r}")

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown. Raises StoreError."""
        check_id(run_id, "run id")

        def query(rows: Rows) -> list[Waiting]:
            found = rows.find(run_id)
            if found is None:
                return []
            kept = [
                read_waiting(row, run_id, found.execution, self._payloads)
                for row in rows.annotations(found.run, Annotation.WAITING)
            ]
            return [waiting for waiting in kept if waiting is not None]

        return self.read(query, [])

    def tally(
        self, since_ms: int, bucket_ms: int, *, runs: int = 2000, attempts: int = 200_000
    ) -> list[Tally]:
        """The attempts of the runs begun since, summed up by span of time, pipeline, node, model and class.

        Of so many runs and attempts at the most, the newest runs first. Raises StoreError.
        """
        return self.read(
            lambda rows: rows.tally(since_ms, bucket_ms, runs=runs, attempts=attempts), list[Tally]()
        )

    def facts(self) -> StoreFacts | None:
        """What the store says of itself; None while it is empty. Raises StoreError."""
        return self.read(lambda rows: rows.facts(), None)

    def _no_run(self, run_id: str) -> CheckpointNotFound:
        return CheckpointNotFound(
            f"there is no run {run_id!r} in {self._named()}; check the id and the store"
        )


def _unsettled(rows: Rows, row: RunRow, failed: list[Attempt]) -> list[Attempt]:
    """Failed attempts of a run that may be its cause: while it runs or waits, not those that a later attempt has fixed."""
    if row.status not in ("RUNNING", "SUSPENDED"):
        return failed
    fixed: dict[tuple[int, str], int] = {}
    for one in failed:
        at = one.position, one.branch
        if at not in fixed:
            tried = (told.attempt for told in rows.attempts_at(row.run, row.execution, *at))
            fixed[at] = max((a.started_ns for a in tried if a.outcome in _FIXES), default=0)
    return [one for one in failed if one.started_ns > fixed[one.position, one.branch]]


def _run_record(row: RunRow, beside: RunExtras, failed: list[Attempt]) -> RunRecord:
    holder = row.holder
    return RunRecord(
        row.run_id,
        row.pipeline,
        row.status,
        row.execution,
        row.started_ms,
        row.updated_ms,
        row.tokens,
        row.cost_pico / PICO,
        row.nodes,
        row.error,
        None if holder is None else holder.place,
        beside.parent,
        row.latency_ns / 1e6,
        tuple(sorted(beside.tags)),
        cause_of(failed),
        len(beside.failed),
        row.epoch,
    )


def _record_of(
    attempt: Attempt, size: int | None, epoch: int, *, output: bytes | None = None, damaged: bool = False
) -> AttemptRecord:
    return AttemptRecord(
        position=attempt.position,
        branch=attempt.branch,
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ms=attempt.started_ns // 1_000_000,
        duration_ms=attempt.duration_ns / 1e6,
        outcome=attempt.outcome,
        failure_class=attempt.failure_class,
        message=attempt.message,
        reason=attempt.reason,
        tokens=attempt.tokens,
        output_tokens=attempt.output_tokens,
        cost_usd=attempt.cost_pico / PICO,
        model=attempt.model,
        output=output,
        damaged=damaged or attempt.outcome == DAMAGED,
        output_bytes=size,
        started_ns=attempt.started_ns,
        epoch=epoch,
        function_ms=attempt.function_ns / 1e6,
        group_id=attempt.group_id,
        identity=attempt.identity,
        error_type=attempt.error_type,
    )
