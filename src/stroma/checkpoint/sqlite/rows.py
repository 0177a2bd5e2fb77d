"""The rows of an SQLite store, read and written on one connection."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from stroma.checkpoint.blocked import BlockedMark
from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.durable.integrity import parse_attempt, parse_run, require_undamaged
from stroma.checkpoint.durable.operations import Commit
from stroma.checkpoint.durable.owner import Owner, boot_id
from stroma.checkpoint.durable.rows import (
    Annotation,
    EventRow,
    Fence,
    Opening,
    RunEnd,
    RunExtras,
    RunRow,
    Step,
    StepRow,
    is_free,
)
from stroma.checkpoint.events import EXPIRY_MS, MAX_BATCHES, EventPlace
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.queue import (
    MAX_CLAIM_SECONDS,
    POSTPONED,
    Candidate,
    ClaimRequest,
    QueueEntry,
    QueueFigures,
)
from stroma.checkpoint.records import (
    ATTEMPT_COLUMNS,
    AttemptMark,
    AttemptRecord,
    RunQuery,
    StoreFacts,
    Tally,
    parse_attempt_mark,
    stored_values,
)
from stroma.checkpoint.sql import Dialect, attempt_page, find_runs, tally
from stroma.checkpoint.sqlite import statements as sql
from stroma.checkpoint.sqlite.file import SCHEMA_VERSION

__all__ = ["SqliteRows"]

_MAX_VALUES: Final = 500  # parameters of a statement: old builds of SQLite accept 999
_DAY_MS: Final = 24 * 3600 * 1000
#: From so many ids with a prefix on, a search through all runs finds the newest sooner than sorting them.
_MANY: Final = 5000
_LAST_CHARACTERS: Final = "\U0010ffff" * 16


class SqliteRows:
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        #: Fences under which attempts were recorded in this transaction, by identity.
        self._fences: dict[int, Fence] = {}
        #: The WAL is to be merged into the file after the commit.
        self.merges_log = False

    def merge_log(self) -> None:
        """Merge the WAL into the database file once the transaction is committed."""
        self.merges_log = True

    def attempt_counts(self) -> list[tuple[Fence, int]]:
        """Return the fences under which attempts were recorded, and how many attempts their runs have now."""
        return [
            (fence, attempts)
            for fence in self._fences.values()
            for (attempts,) in self.db.execute(sql.ATTEMPT_COUNT, (fence.run,)).fetchall()
        ]

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        row = self.db.execute(f"{sql.RUN} WHERE run_id = ?", (run_id,)).fetchone()
        run = None if row is None else _run_row(row)
        return require_undamaged(run) if lock else run

    def begin(self, run: RunRow | None, opening: Opening) -> Fence:
        key = self._new_run(opening.run_id) if run is None else run.run
        execution = 1 if run is None else run.execution + 1
        # Earlier executions stay in the history; their commits are not read any more.
        self.db.execute(sql.RESTART, (execution, opening.pipeline, opening.version, _now_ms(), key))
        self.db.execute(sql.NEW_INPUT, (key, execution, opening.contract, opening.input, opening.sha256))
        if run is not None:
            self.db.execute(sql.UNTAG, (key,))
            self.db.execute(sql.DISCARD_EVENTS, (key,))
        return self._claim(key, execution, opening)

    def take_over(self, run: RunRow, opening: Opening) -> Fence:
        if opening.discard_from is not None:
            place = (run.run, run.execution, max(opening.discard_from, 0))
            self.db.execute(sql.DISCARDED, (self.db.execute(sql.DISCARD, place).rowcount, run.run))
        return self._claim(run.run, run.execution, opening)

    def replace_owner(self, run: RunRow, owner: str) -> Fence:
        self.db.execute(sql.REPLACE_OWNER, (owner, run.run))
        return Fence(run.run, run.execution, run.epoch, owner, 0.0)

    def _new_run(self, run_id: str) -> int:
        now = _now_ms()
        run = self.db.execute(sql.NEW_RUN, (run_id, now, now)).lastrowid
        assert run is not None
        return run

    def _claim(self, run: int, execution: int, opening: Opening) -> Fence:
        until = _lease_end(opening.lease_seconds)
        if opening.tags:
            self.db.executemany(sql.TAG, [(tag, run) for tag in opening.tags])
        claim = (opening.version, _now_ms(), opening.owner, until, run)
        ((epoch, attempts),) = self.db.execute(sql.CLAIM, claim).fetchall()
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds, attempts)

    def input(self, run: int, execution: int) -> tuple[str, bytes, bytes] | None:
        row: tuple[str, bytes, bytes] | None = self.db.execute(sql.INPUT, (run, execution)).fetchone()
        return row

    def steps(self, run: int, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        # All at once: an unfinished statement would hold its snapshot beyond the transaction.
        statement, values = sql.STEPS, list[Any]([run, execution])
        for position, prefix in lazily_loaded:
            statement += sql.NOT_LAZILY_LOADED
            values += [position, len(prefix), prefix]
        return [_step_row(row) for row in self.db.execute(statement, values).fetchall()]

    def steps_at(self, run: int, execution: int, position: int, branches: Sequence[str]) -> list[StepRow]:
        steps: list[StepRow] = []
        for first in range(0, len(branches), _MAX_VALUES):
            part = branches[first : first + _MAX_VALUES]
            statement = f"{sql.STEPS} AND position = ? AND branch IN ({', '.join('?' * len(part))})"
            steps += map(_step_row, self.db.execute(statement, (run, execution, position, *part)).fetchall())
        return steps

    def is_complete(self, run: RunRow) -> bool:
        values = {"run": run.run, "execution": run.execution}
        ((has_input, *counts),) = self.db.execute(sql.ROW_COUNTS, values).fetchall()
        return bool(has_input) and counts == [run.attempt_count, run.commit_count]

    def was_deleted(self, run: int) -> bool:
        return bool(self.db.execute("SELECT 1 FROM deleted WHERE run = ?", (run,)).fetchall())

    def identities(self, run: int, execution: int) -> list[tuple[str, int]]:
        return self.db.execute(sql.IDENTITIES, (run, execution)).fetchall()

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        values = (fence.run, fence.execution, fence.epoch, *stored_values(attempt))
        # Otherwise an earlier call recorded it, with its output and usage, and its acknowledgement was lost.
        is_new = self.db.execute(sql.ATTEMPT, values).rowcount == 1
        if is_new:
            if self.db.execute(sql.COUNT, self._count_values(_now_ms(), fence, attempt, step)).rowcount != 1:
                return False
            if step is not None:
                self.db.execute(sql.STEP, _step_values(fence, attempt, step))
        self._fences[id(fence)] = fence
        return True

    def commit_all(self, commits: Sequence[Commit]) -> bool:
        """Record many commits with three statements. Returns False if one needs commit(); then the caller rolls back."""
        db, now, count = self.db, _now_ms(), len(commits)
        steps = [_step_values(f, attempt, step) for _, f, attempt, step in commits if step is not None]
        if len({values[:4] for values in steps}) != len(steps):
            return False  # Two outputs for one place count as one commit.
        attempts = [(f.run, f.execution, f.epoch, *stored_values(attempt)) for _, f, attempt, _ in commits]
        if db.executemany(sql.ATTEMPT, attempts).rowcount != count:
            return False
        counts = [self._count_values(now, f, attempt, step) for _, f, attempt, step in commits]
        if db.executemany(sql.COUNT, counts).rowcount != count:
            return False
        db.executemany(sql.STEP, steps)
        self._fences.update((id(f), f) for _, f, _, _ in commits)
        return True

    def _count_values(
        self, now_ms: int, fence: Fence, attempt: AttemptRecord, step: Step | None
    ) -> tuple[Any, ...]:
        place = (fence.run, fence.execution, attempt.position, attempt.branch)
        is_new = step is not None and not self.db.execute(sql.IS_COMMITTED, place).fetchall()
        return (now_ms, _lease_end(fence.lease_seconds), *_usage(attempt), is_new, *_fence_values(fence))

    def finish(self, fence: Fence, end: RunEnd) -> bool:
        at = _now_ms() if end.updated_ms is None else end.updated_ms
        wake = (end.status in UNFINISHED, end.wake_ms, end.wake_ms)
        values = (end.status, end.error, at, *wake, *_fence_values(fence))
        return self.db.execute(sql.END, values).rowcount == 1

    def wake(self, run: RunRow, wake_ms: int | None = 0) -> None:
        self.db.execute(sql.WAKE, (wake_ms, run.run))

    def block(self, run: RunRow, mark: BlockedMark | None) -> None:
        values = (None,) * 4 if mark is None else (*mark[:3], " ".join(mark.codes))
        self.db.execute(sql.BLOCK, (*values, run.run))

    # ------------------------------------------------------------------ queue

    def enqueue(self, fence: Fence, entry: QueueEntry) -> None:
        self.db.execute(sql.ENQUEUE, (entry.due_ms, entry.priority, entry.key, entry.expires_ms, fence.run))

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        code = request.code_of(pipeline)
        values = {
            "pipeline": pipeline,
            "now": request.now_ms,
            "limit": request.limit,
            "clock": _clock_ms(),
            "versions": _versions_value(code.versions),
            "code": code.name,
        }
        candidates = [
            Candidate(*row)
            for statement in (sql.STOPPED, sql.QUEUED, sql.QUEUED_BY_KEY, sql.BLOCKED)
            for row in self.db.execute(statement, values).fetchall()
        ]
        if not request.with_lost:
            return candidates
        gone = [
            Candidate(run, run_id, name, priority, 0, key)
            for run, run_id, name, priority, key, owner, until_ms, free, _ in self.db.execute(
                sql.SERVED_RUNNING, values
            )
            if free and is_free(owner, _seconds_left(owner, until_ms))
        ]
        return candidates + gone[: request.limit]

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        values = {"pipeline": pipeline, "clock": _clock_ms()}
        live = dict(self.db.execute(sql.CLAIMED, values).fetchall())
        for *_, key, owner, until_ms, free, claim in self.db.execute(sql.RUNNING, values).fetchall():
            is_claimed = not free and claim != POSTPONED
            if is_claimed or not is_free(owner, _seconds_left(owner, until_ms)):
                live[key] = live.get(key, 0) + 1
        return live

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        until = _lease_end(seconds)
        self.db.executemany(sql.KEEP_CLAIM, [(token, until, one.run) for one in candidates])
        return list(candidates)

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        values = {"pipeline": pipeline, "versions": _versions_value(versions), "now": now_ms}
        return QueueFigures(*self.db.execute(sql.QUEUE_FIGURES, values).fetchone())

    def inputs_of(self, candidates: Sequence[Candidate]) -> dict[Any, tuple[bytes, bytes]]:
        inputs: dict[Any, tuple[bytes, bytes]] = {}
        runs = [one.run for one in candidates]
        for first in range(0, len(runs), _MAX_VALUES):
            part = runs[first : first + _MAX_VALUES]
            rows = self.db.execute(sql.INPUTS % ", ".join("?" * len(part)), part).fetchall()
            inputs.update((run, (data, sha256)) for run, data, sha256 in rows)
        return inputs

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        statuses: dict[str, str] = {}
        for first in range(0, len(run_ids), _MAX_VALUES):
            part = run_ids[first : first + _MAX_VALUES]
            statuses.update(self.db.execute(sql.STATUSES % ", ".join("?" * len(part)), part).fetchall())
        return statuses

    def renew(self, fences: list[Fence]) -> list[Fence]:
        def renew(fence: Fence) -> int:
            values = (_lease_end(fence.lease_seconds), *_fence_values(fence))
            return self.db.execute(sql.RENEW, values).rowcount

        return [fence for fence in fences if renew(fence)]

    # ------------------------------------------------------------------ annotations

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        run = self.find(run_id)
        key = self._new_run(run_id) if run is None else run.run
        self.db.execute(sql.STEP, (key, 0, position, branch, node_id, 0, 0, 0, *step))

    def annotations(self, run: int, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        statement = sql.ANNOTATIONS % ", ".join("?" * len(kinds))
        return [_step_row(row) for row in self.db.execute(statement, (run, *kinds, branch)).fetchall()]

    def delete_annotations(self, run: int, *kinds: Annotation, branch: str | None = None) -> None:
        statement = sql.DELETE_ANNOTATIONS % ", ".join("?" * len(kinds))
        self.db.execute(statement, (run, *kinds, branch))

    def with_requests(self, runs: list[int]) -> list[int]:
        rows = self.db.execute(sql.WITH_REQUESTS).fetchall()
        requested = {run for (run,) in rows}
        return [run for run in runs if run in requested]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        row = self.db.execute(sql.NEWEST, (run_id, node_id)).fetchone()
        return None if row is None else _step_row(row)

    def delete(self, run_id: str) -> None:
        self.db.execute(sql.DELETED, (_now_ms(), run_id))
        self.db.execute(sql.FORGET_DELETED, (_now_ms() - _DAY_MS,))
        for statement in sql.DELETE:
            self.db.execute(statement, (run_id,))

    # ------------------------------------------------------------------ events

    def append_events(self, batches: Sequence[EventRow]) -> None:
        now = _now_ms()
        values = [(*one.last, now, one.data, one.run, one.execution) for one in batches]
        self.db.executemany(sql.APPEND_EVENTS, values)
        for one in batches:
            if one.trims:
                self.db.execute(sql.TRIM_EVENTS, {"run": one.run, "most": MAX_BATCHES})
                self.db.execute(sql.EXPIRE_EVENTS, (now - EXPIRY_MS,))

    def events(self, run: int, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        rows = self.db.execute(sql.EVENTS, (run, *after, execution, limit)).fetchall()
        return [EventRow(run, execution, EventPlace(epoch, last), data) for epoch, last, data in rows]

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        row = self.db.execute("SELECT data FROM cells WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0], _now_ms()

    def write_cell(self, name: str, data: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO cells (name, data) VALUES (?, ?)", (name, data))

    # ------------------------------------------------------------------ retention

    def now_ms(self) -> int:
        return _now_ms()

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        rows = self.db.execute(sql.EXPIRED, (before_ms, unfinished, limit)).fetchall()
        return [run_id for (run_id,) in rows]

    def blobs(self) -> Iterator[bytes]:
        for (payload,) in self.db.execute(sql.BLOBS, {"blob": BLOB, "length": len(BLOB)}):
            yield payload

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        return find_runs(
            self._fetch_all, _DIALECT, query, limit=limit, after=after, max_filtered=max_filtered
        )

    def _fetch_all(self, statement: str, values: list[Any]) -> list[Any]:
        return self.db.execute(statement, values).fetchall()

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        return [self._extras_of(run, failed) for run in runs]

    def _extras_of(self, run: RunRow, failed: int) -> RunExtras:
        parent = self.db.execute(sql.PARENTS, (run.run,)).fetchone()
        tags = self.db.execute("SELECT tag FROM tags WHERE run = ?", (run.run,)).fetchall()
        rows = self.db.execute(sql.FAILED, (run.run, run.execution, failed)).fetchall() if failed else []
        return RunExtras(parent and parent[0], tuple(tag for (tag,) in tags), list(map(parse_attempt, rows)))

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        first, last, size = prefix, prefix + _LAST_CHARACTERS, len(prefix)
        ((count,),) = self.db.execute(sql.COUNT_WITH_PREFIX, (first, last, _MANY)).fetchall()
        if count < _MANY:
            rows = self.db.execute(sql.BY_PREFIX, (first, last, size, prefix, prefix, limit)).fetchall()
            return [run_id for (run_id,) in rows]
        exact_match = self.find(prefix)
        rows = self.db.execute(sql.NEWEST_OF_MANY, (size, prefix, prefix, limit)).fetchall()
        run_ids = [prefix] if exact_match is not None and exact_match.execution else []
        return [*run_ids, *(run_id for (run_id,) in rows)][:limit]

    def attempts(self, run: int, execution: int) -> Iterator[tuple[AttemptRecord, Step | None]]:
        for row in self.db.execute(sql.ATTEMPTS, (run, execution)).fetchall():
            step = row[len(ATTEMPT_COLUMNS) :]
            yield parse_attempt(row[: len(ATTEMPT_COLUMNS)]), None if step[2] is None else Step(*step)

    def attempt_page(
        self, run: int, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        mark = AttemptMark(-1, 0, 0, 0, "") if after is None else parse_attempt_mark(after)
        start = (mark.epoch, mark.position, mark.started_ns, mark.branch, mark.attempt)
        rows = self.db.execute(sql.ATTEMPT_PAGE, (run, execution, *start, limit + 1)).fetchall()
        return attempt_page(rows, limit)

    def attempts_at(self, run: int, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        rows = self.db.execute(sql.ATTEMPTS_AT, (run, execution, position, branch)).fetchall()
        return attempt_page(rows, len(rows))[0]

    def failed_since(self, run: int, execution: int, epoch: int) -> list[AttemptRecord]:
        rows = self.db.execute(sql.FAILED_SINCE, (run, execution, epoch)).fetchall()
        return [parse_attempt(row) for row in reversed(rows)]

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        return tally(self._fetch_all, "?", since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        (version,) = self.db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchone()
        return StoreFacts(f"SQLite {sqlite3.sqlite_version}", int(version), SCHEMA_VERSION)

    def step_at(self, run: int, execution: int, position: int, branch: str) -> StepRow | None:
        row = self.db.execute(sql.STEP_AT, (run, execution, position, branch)).fetchone()
        return None if row is None else _step_row(row)


def _versions_value(versions: Sequence[str]) -> str:
    """Return versions as a parameter of statements, with that of runs without one. No line break is in a version."""
    return "\n".join(["", "", *versions, ""])


def _usage(attempt: AttemptRecord) -> tuple[int, int, int]:
    """Return the tokens, cost and time that an attempt adds to its run; a group's time includes its children's."""
    return attempt.tokens, attempt.cost_pico, 0 if attempt.branch else attempt.function_ns


def _fence_values(fence: Fence) -> tuple[Any, ...]:
    return fence.run, fence.epoch, fence.owner, fence.acknowledged


def _step_values(fence: Fence, attempt: AttemptRecord, step: Step) -> tuple[Any, ...]:
    place = (fence.run, fence.execution, attempt.position, attempt.branch)
    return (*place, attempt.node_id, fence.epoch, attempt.attempt, attempt.started_ns, *step)


def _run_row(row: Any) -> RunRow:
    *row, claim, claim_until_ms = row
    left_ms = claim_until_ms - _clock_ms() if isinstance(claim_until_ms, int) else -1
    has_claim = 0 <= left_ms <= 1000 * MAX_CLAIM_SECONDS
    return parse_run((*row[:13], _seconds_left(row[11], row[13]), *row[14:], claim if has_claim else None))


def _step_row(row: Any) -> StepRow:
    position, branch, node_id, *step = row
    return StepRow(position, branch, node_id, Step._make(step))


# CROSS JOIN: the tags first, in the order of their index.
_DIALECT: Final = Dialect(
    sql.COLUMNS, _run_row, "?", "instr(lower({}), ?) > 0", "tags t CROSS JOIN runs r ON r.run = t.run"
)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# ---------------------------------------------------------------------- leases
#
# All processes that use the file are on one machine. If the system has a clock that counts from its start and
# cannot be set, leases use that; leases from before the last start have expired.

_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)
_BOOT: Final = boot_id() if _CLOCK is not None else ""


def _clock_ms() -> int:
    return (time.clock_gettime_ns(_CLOCK) if _BOOT and _CLOCK is not None else time.time_ns()) // 1_000_000


def _lease_end(lease_seconds: float) -> int:
    return _clock_ms() + int(lease_seconds * 1000)


def _seconds_left(owner: str | None, until_ms: int | None) -> float:
    """Return the remaining seconds of a lease; below 0 if it has expired or was released."""
    holder = Owner.read(owner) if isinstance(owner, str) else None
    if not isinstance(until_ms, int) or holder is None or holder.boot != _BOOT:
        return -1.0
    return (until_ms - _clock_ms()) / 1000
