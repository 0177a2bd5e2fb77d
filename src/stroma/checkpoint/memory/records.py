"""Records of the runs in memory. Imported on first use, since running a pipeline does not need them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from stroma.checkpoint.memory.runs import MemoryRun, SavedState, as_state, encode_state, row_of
from stroma.checkpoint.records import (
    PICO,
    AttemptMark,
    AttemptPage,
    AttemptRecord,
    RunPage,
    RunQuery,
    RunRecord,
    StoreFacts,
    Tally,
    cause_of,
    duration_digits,
    parse_attempt_mark,
    parse_run_mark,
)
from stroma.failures.tracebacks import FailureSite, read_failure_site
from stroma.trace.events import NO_USAGE, AttemptRow
from stroma.trace.rejected import RejectedOutput

__all__ = ["MemoryRecords"]

_MAX_FAILED: Final = 20  # failed attempts among which the cause is searched
#: Outcomes after which an earlier failure at the same place is no cause any more.
_FIXES: Final = ("success", "suspended")


class MemoryRecords:
    """Records of all runs, see MemoryReader."""

    def __init__(self, runs: Mapping[str, MemoryRun]) -> None:
        self._runs = runs

    def list_runs(self, limit: int, pipeline: str | None, status: str | None) -> list[RunRecord]:
        statuses = () if status is None else (str(status),)
        return self.run_page(RunQuery(pipeline=pipeline, statuses=statuses), limit, None).runs

    def run_page(self, query: RunQuery | None, limit: int, after: str | None) -> RunPage:
        end = None if after is None else parse_run_mark(after)
        query = query or RunQuery()
        runs = [
            (run.started_ms, run.number, run_id, run)
            for run_id, run in list(self._runs.items())
            if run.execution and _matches(query, run_id, run)
        ]
        runs.sort(key=lambda item: item[:2], reverse=True)
        runs = [item for item in runs if end is None or item[:2] < end]
        page = runs[:limit]
        following = f"{page[-1][0]}.{page[-1][1]}" if len(runs) > limit else None
        return RunPage([_record(run_id, run) for _, _, run_id, run in page], following)

    def get_run(self, run_id: str) -> RunRecord | None:
        run = self._runs.get(run_id)
        return None if run is None or not run.execution else _record(run_id, run)

    def attempts(self, run_id: str, execution: int | None) -> list[AttemptRecord]:
        run = self._runs.get(run_id)
        if run is None or execution not in (None, run.execution):
            return []
        return [_attempt(row, run) for row in run.attempts()]

    def attempt_page(self, run_id: str, execution: int | None, limit: int, after: str | None) -> AttemptPage:
        end = None if after is None else _place_of(parse_attempt_mark(after))
        attempts = [a for a in self.attempts(run_id, execution) if end is None or _place(a) > end]
        page = [replace(attempt, output=None) for attempt in attempts[:limit]]
        if len(attempts) <= limit:
            return AttemptPage(page, None)
        last = page[-1]
        return AttemptPage(
            page, str(AttemptMark(0, last.position, last.started_ns, last.attempt, last.branch))
        )

    def attempts_at(
        self, run_id: str, position: int, branch: str, execution: int | None
    ) -> list[AttemptRecord]:
        attempts = self.attempts(run_id, execution)
        return [replace(a, output=None) for a in attempts if (a.position, a.branch) == (position, branch)]

    def failure_site_of(self, run_id: str, position: int, branch: str) -> FailureSite | None:
        run = self._runs.get(run_id)
        site = None if run is None else run.failure_sites.get((position, branch))
        if site is None:
            return None
        attempt, started_ns, encode_frames = site
        return read_failure_site(encode_frames(), attempt, started_ns)

    def rejected_of(self, run_id: str, position: int, branch: str, started_ns: int) -> RejectedOutput | None:
        run = self._runs.get(run_id)
        outputs = None if run is None else run.rejected
        return None if outputs is None else outputs.find(position, branch, started_ns)

    def tally(self, since_ms: int, bucket_ms: int, runs: int, attempts: int) -> list[Tally]:
        sums: defaultdict[tuple[int, str, str, str | None, str | None, int], list[int]] = defaultdict(
            lambda: [0] * 6
        )
        count = 0
        for record in self.run_page(RunQuery(since_ms=since_ms), runs, None).runs:
            run = self._runs[record.run_id]
            for row in run.attempts()[: attempts - count]:
                usage, kind = row.usage or NO_USAGE, _class_of(row)
                digits = duration_digits(row.duration_ns)
                totals = sums[
                    run.started_ms // bucket_ms, run.pipeline, row.node_id, usage.model, kind, digits
                ]
                cost = round(usage.cost_usd * PICO)
                wasted = cost if row.outcome != "success" and _committed(row, run) is None else 0
                for i, number in enumerate((1, usage.tokens, cost, wasted, row.duration_ns)):
                    totals[i] += number
                totals[5] = max(totals[5], row.duration_ns)
                count += 1
        return [Tally(*key[:5], *totals)._replace(digits=key[5]) for key, totals in sums.items()]

    def facts(self) -> StoreFacts:
        return StoreFacts("the memory of this process", 1, 1)


def _record(run_id: str, run: MemoryRun) -> RunRecord:
    tokens, cost, _ = run.usage()
    rows = run.attempts()
    updated = max([run.started_ms, *((row.started_ns + row.duration_ns) // 1_000_000 for row in rows)])
    nodes = sum(isinstance(key, int) for key in run.states)
    failed = [row for row in rows if row.failure is not None]
    failed = sorted(failed, key=lambda row: row.started_ns + row.duration_ns, reverse=True)[:_MAX_FAILED]
    causes = failed
    if run.status in ("RUNNING", "SUSPENDED"):  # A failure that a later attempt fixed is no cause.
        fixed = {(row.position, row.branch): row.started_ns for row in rows if row.outcome in _FIXES}
        causes = [row for row in failed if row.started_ns > fixed.get((row.position, row.branch), 0)]
    last = run.last_execution()
    return RunRecord(
        run_id,
        run.pipeline,
        run.status,
        run.execution,
        run.started_ms,
        updated,
        tokens,
        cost,
        nodes,
        run.error,
        last and last.holder,
        run.parent,
        sum(row.function_ns for row in rows if not row.branch) / 1e6,
        tuple(sorted(run.tags)),
        cause_of([_attempt(row, run, with_output=False) for row in causes]),
        len(failed),
        run.epoch,
        run.wake_ms,
        run.queue.priority,
        run.queue.key,
        run.queue.expires_ms,
        run.version or None,
        run.blocked,
    )


def _matches(query: RunQuery, run_id: str, run: MemoryRun) -> bool:
    """Return True if a run matches a query."""
    if query.pipeline not in (None, run.pipeline) or (query.statuses and run.status not in query.statuses):
        return False
    if query.tag is not None and query.tag not in run.tags:
        return False
    if query.blocked and run.blocked is None:
        return False
    if query.since_ms is not None and run.started_ms < query.since_ms:
        return False
    if query.text is not None:
        part = _lower(query.text)
        if not any(part in _lower(text) for text in (run_id, run.pipeline, run.error or "")):
            return False
    if query.failure_class is None and query.node is None:
        return True
    return any(
        kind is not None and query.failure_class in (None, kind) and query.node in (None, row.node_id)
        for row in run.attempts()
        for kind in (_class_of(row),)
    )


def _class_of(row: AttemptRow) -> str | None:
    failure = row.failure
    return None if failure is None else failure[0].value


def _lower(text: str) -> str:
    return "".join(ch.lower() if ch.isascii() else ch for ch in text)


def _place(attempt: AttemptRecord) -> tuple[int, int, str, int]:
    return attempt.position, attempt.started_ns, attempt.branch, attempt.attempt


def _place_of(mark: AttemptMark) -> tuple[int, int, str, int]:
    return mark.position, mark.started_ns, mark.branch, mark.attempt


def _committed(row: AttemptRow, run: MemoryRun) -> SavedState | None:
    """Return what an attempt committed; None if it was replaced since."""
    branch = row.branch
    entry = run.states.get((row.position, branch) if branch else row.position)
    if row.output is None or entry is None or row_of(entry) is not row:
        return None
    return as_state(entry)


def _attempt(row: AttemptRow, run: MemoryRun, *, with_output: bool = True) -> AttemptRecord:
    usage = row.usage or NO_USAGE
    failure, message, reason, error_type = row.failure or (None, None, None, None)
    state = _committed(row, run) if with_output else None
    output = None if state is None else encode_state(state)
    identities = (identity for identity, position in run.places.items() if position == row.position)
    return AttemptRecord(
        position=row.position,
        started_ns=row.started_ns,
        branch=row.branch,
        attempt=row.attempt,
        node_id=row.node_id,
        duration_ns=row.duration_ns,
        outcome=row.outcome,
        failure_class=failure and failure.value,
        message=message,
        reason=reason,
        tokens=usage.tokens,
        output_tokens=usage.output_tokens,
        cost_pico=round(usage.cost_usd * PICO),
        model=usage.model,
        function_ns=row.function_ns,
        group_id=row.group,
        identity=next(identities, None),
        error_type=error_type,
        output_bytes=None if output is None else len(output),
        output=output,
    )
