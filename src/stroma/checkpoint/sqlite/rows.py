"""The rows of an SQLite store, read and written on one connection."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.durable.integrity import parse_attempt, parse_run, require_undamaged
from stroma.checkpoint.durable.operations import Commit
from stroma.checkpoint.durable.owner import Owner, boot_id
from stroma.checkpoint.durable.rows import (
    AttemptSummary,
    Fence,
    Opening,
    RunExtras,
    RunRow,
    Step,
    StepRow,
    is_free,
)
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.records import Attempt, AttemptMark, RunQuery, StoreFacts, Tally, parse_attempt_mark
from stroma.checkpoint.sql import Dialect, attempt_page, find_runs, tally
from stroma.checkpoint.sqlite.file import SCHEMA_VERSION

__all__ = ["SqliteRows"]

_COLUMNS: Final = """r.run, r.run_id, r.pipeline, r.execution, r.status, r.error, r.started_ms, r.updated_ms, r.tokens,
    r.cost_pico, r.latency_ns, r.lease_owner, r.lease_epoch, r.lease_until_ms, (SELECT count(*) FROM steps s
    WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0 AND s.branch = ''), r.attempt_count,
    r.commit_count, r.wake_ms"""
_RUN: Final = f"SELECT {_COLUMNS} FROM runs r"
_NEW_RUN: Final = """INSERT INTO runs (run_id, pipeline, execution, status, started_ms, updated_ms, tokens, cost_pico,
    latency_ns, lease_epoch, attempt_count, commit_count) VALUES (?, '', 0, 'RUNNING', ?, ?, 0, 0, 0, 0, 0, 0)"""
_RESTART: Final = """UPDATE runs SET execution = ?, pipeline = ?, started_ms = ?, tokens = 0, cost_pico = 0,
    latency_ns = 0, attempt_count = 0, commit_count = 0 WHERE run = ?"""
_NEW_INPUT: Final = "INSERT INTO inputs (run, execution, contract, input, sha256) VALUES (?, ?, ?, ?, ?)"
_INPUT: Final = "SELECT contract, input, sha256 FROM inputs WHERE run = ? AND execution = ?"
_CLAIM: Final = """UPDATE runs SET status = 'RUNNING', error = NULL, updated_ms = ?, lease_owner = ?, lease_until_ms = ?,
    wake_ms = NULL, lease_epoch = lease_epoch + 1 WHERE run = ? RETURNING lease_epoch, attempt_count"""
_DISCARD: Final = "DELETE FROM steps WHERE run = ? AND execution = ? AND position >= ?"
_DISCARDED: Final = "UPDATE runs SET commit_count = commit_count - ? WHERE run = ?"
_ROW_COUNTS: Final = """SELECT EXISTS (SELECT 1 FROM inputs WHERE run = :run AND execution = :execution),
    (SELECT count(*) FROM attempts WHERE run = :run AND execution = :execution),
    (SELECT count(*) FROM steps WHERE run = :run AND execution = :execution AND position >= 0)"""
_STEPS: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = ? AND position >= 0"""
_NOT_LAZILY_LOADED: Final = " AND NOT (position = ? AND branch <> '' AND substr(branch, 1, ?) = ?)"
_MAX_VALUES: Final = 500  # parameters of a statement: old builds of SQLite accept 999
_ANNOTATIONS: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = 0 AND position = ? AND branch = coalesce(?, branch) ORDER BY branch"""
_DELETE_ANNOTATIONS: Final = """DELETE FROM steps WHERE run = ? AND execution = 0 AND position = ?
    AND branch = coalesce(?, branch)"""
_EXPIRED: Final = """SELECT run_id FROM runs WHERE updated_ms < ?
    AND (? OR (execution > 0 AND status IN ('COMPLETED', 'RESUMED', 'FAILED', 'CANCELLED'))) ORDER BY updated_ms LIMIT ?"""
_BLOBS: Final = """SELECT output FROM steps WHERE substr(output, 1, :length) = :blob
    UNION ALL SELECT input_key FROM steps WHERE substr(input_key, 1, :length) = :blob
    UNION ALL SELECT input FROM inputs WHERE substr(input, 1, :length) = :blob"""
_NEWEST: Final = """SELECT s.position, s.branch, s.node_id, s.contract, s.schema_ref, s.output, s.sha256, s.number, s.input_key
    FROM runs r JOIN steps s ON s.run = r.run AND (s.execution = r.execution OR s.position = -1)
    WHERE r.run_id = ? AND s.node_id = ? ORDER BY s.id DESC LIMIT 1"""
_ATTEMPT: Final = """INSERT INTO attempts (run, execution, epoch, position, started_ns, branch, attempt, node_id,
    duration_ns, outcome, failure_class, message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
_STEP: Final = """INSERT OR REPLACE INTO steps (run, execution, position, branch, node_id, epoch, attempt, started_ns,
    contract, schema_ref, output, sha256, number, input_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# The fence: rows change only while this session is the last one that opened the run, and the run counts all attempts
# that were acknowledged to it. An output that replaces another one does not count as a commit.
_FENCE: Final = "WHERE run = ? AND lease_epoch = ? AND lease_owner = ? AND attempt_count >= ?"
_COUNT: Final = f"""UPDATE runs SET updated_ms = ?, lease_until_ms = ?, tokens = tokens + ?, cost_pico = cost_pico + ?,
    latency_ns = latency_ns + ?, attempt_count = attempt_count + 1, commit_count = commit_count + ? {_FENCE}"""
# 2 us instead of 12: without the sign, SQLite compiles the statement again for each position, because of the partial
# index `requests`.
_IS_COMMITTED: Final = "SELECT 1 FROM steps WHERE run = ? AND execution = ? AND position = +? AND branch = ?"
_ATTEMPT_COUNT: Final = "SELECT attempt_count FROM runs WHERE run = ?"
# An answer that was stored since the run was claimed makes it due.
_END: Final = f"""UPDATE runs SET status = ?, error = ?, updated_ms = ?, lease_until_ms = NULL,
    wake_ms = CASE WHEN ? THEN coalesce(min(wake_ms, ?), wake_ms, ?) END {_FENCE}"""
_WAKE: Final = "UPDATE runs SET wake_ms = ? WHERE run = ?"
_DUE: Final = """SELECT run_id FROM runs WHERE pipeline = ? AND wake_ms <= ? AND status IN ('SUSPENDED', 'INTERRUPTED')
    ORDER BY wake_ms LIMIT ?"""
_RUNNING: Final = """SELECT run_id, lease_owner, lease_until_ms FROM runs WHERE status = 'RUNNING' AND pipeline = ?
    AND execution > 0 ORDER BY started_ms"""
_RENEW: Final = f"UPDATE runs SET lease_until_ms = ? {_FENCE} AND lease_until_ms IS NOT NULL"
_TAG: Final = """INSERT INTO tags (run, tag, started_ms) SELECT run, ?, started_ms FROM runs WHERE run = ?
    ON CONFLICT DO NOTHING"""
_UNTAG: Final = "DELETE FROM tags WHERE run = ?"
# For a day, a session of a deleted run gets the error that it was deleted; after that, that it was lost.
_DELETED: Final = "INSERT OR REPLACE INTO deleted (run, deleted_ms) SELECT run, ? FROM runs WHERE run_id = ?"
_FORGET_DELETED: Final = "DELETE FROM deleted WHERE deleted_ms < ?"
_DAY_MS: Final = 24 * 3600 * 1000
_DELETE: Final = (
    "DELETE FROM tags WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM steps WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM inputs WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM attempts WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM runs WHERE run_id = ?",
)
_ATTEMPTS: Final = """SELECT a.position, a.started_ns, a.branch, a.attempt, a.node_id, a.duration_ns, a.outcome,
    a.failure_class, a.message, a.reason, a.tokens, a.output_tokens, a.cost_pico, a.model, a.function_ns, a.group_id, a.identity, a.error_type,
    s.contract, s.schema_ref, s.output, s.sha256, s.number, s.input_key FROM attempts a
    LEFT JOIN steps s ON s.run = a.run AND s.execution = a.execution AND s.position = a.position
    AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt AND s.started_ns = a.started_ns
    WHERE a.run = ? AND a.execution = ? ORDER BY a.epoch, a.position, a.started_ns, a.branch, a.attempt"""
# In the order of the key; a page begins after the end of the previous one.
_WITH_SIZE: Final = """SELECT a.position, a.started_ns, a.branch, a.attempt, a.node_id, a.duration_ns, a.outcome,
    a.failure_class, a.message, a.reason, a.tokens, a.output_tokens, a.cost_pico, a.model, a.function_ns, a.group_id, a.identity, a.error_type, a.epoch,
    (SELECT length(s.output) FROM steps s WHERE s.run = a.run AND s.execution = a.execution AND s.position = a.position
    AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt AND s.started_ns = a.started_ns)
    FROM attempts a WHERE a.run = ? AND a.execution = ?"""
_IN_ORDER: Final = "ORDER BY a.epoch, a.position, a.started_ns, a.branch, a.attempt"
_ATTEMPT_PAGE: Final = f"""{_WITH_SIZE} AND (a.epoch, a.position, a.started_ns, a.branch, a.attempt) > (?, ?, ?, ?, ?)
    {_IN_ORDER} LIMIT ?"""
_ATTEMPTS_AT: Final = f"{_WITH_SIZE} AND a.position = ? AND a.branch = ? {_IN_ORDER}"
_STEP_AT: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = ? AND position = ? AND branch = ?"""
# In the order of the index `failed`.
_FAILED: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = ? AND execution = ?
    AND failure_class IS NOT NULL ORDER BY started_ns + duration_ns DESC LIMIT ?"""
_FAILED_SINCE: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = ? AND execution = ? AND epoch >= ?
    AND failure_class IS NOT NULL ORDER BY started_ns + duration_ns DESC LIMIT 1000"""
# Uses the index `called`, which has no rows of pipelines.
_IDENTITIES: Final = """SELECT DISTINCT identity, position FROM attempts
    WHERE run = ? AND execution = ? AND identity IS NOT NULL"""
_PARENTS: Final = "SELECT node_id FROM steps WHERE run = ? AND execution = 0 AND position = -4"
# Ids with a prefix: a range of the index. LIKE would interpret wildcards and ignore case.
_BY_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0 AND run_id >= ? AND run_id < ?
    AND substr(run_id, 1, ?) = ? ORDER BY run_id = ? DESC, started_ms DESC, run DESC LIMIT ?"""
#: From so many ids with a prefix on, a search through all runs finds the newest sooner than sorting them.
_MANY: Final = 5000
_COUNT_WITH_PREFIX: Final = (
    "SELECT count(*) FROM (SELECT 1 FROM runs WHERE run_id >= ? AND run_id < ? LIMIT ?)"
)
_NEWEST_OF_MANY: Final = """SELECT run_id FROM runs INDEXED BY runs_by_start WHERE execution > 0 AND substr(run_id, 1, ?) = ?
    AND run_id != ? ORDER BY started_ms DESC, run DESC LIMIT ?"""
_LAST_CHARACTERS: Final = "\U0010ffff" * 16


class SqliteRows:
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        #: Fences under which attempts were recorded in this transaction, by identity.
        self._fences: dict[int, Fence] = {}

    def attempt_counts(self) -> list[tuple[Fence, int]]:
        """Return the fences under which attempts were recorded, and how many attempts their runs have now."""
        return [
            (fence, attempts)
            for fence in self._fences.values()
            for (attempts,) in self.db.execute(_ATTEMPT_COUNT, (fence.run,)).fetchall()
        ]

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        row = self.db.execute(f"{_RUN} WHERE run_id = ?", (run_id,)).fetchone()
        run = None if row is None else _run_row(row)
        return require_undamaged(run) if lock else run

    def begin(self, run: RunRow | None, opening: Opening) -> Fence:
        key = self._new_run(opening.run_id) if run is None else run.run
        execution = 1 if run is None else run.execution + 1
        # Earlier executions stay in the history; their commits are not read any more.
        self.db.execute(_RESTART, (execution, opening.pipeline, _now_ms(), key))
        self.db.execute(_NEW_INPUT, (key, execution, opening.contract, opening.input, opening.sha256))
        if run is not None:
            self.db.execute(_UNTAG, (key,))
        return self._claim(key, execution, opening)

    def take_over(self, run: RunRow, opening: Opening) -> Fence:
        if opening.discard_from is not None:
            place = (run.run, run.execution, max(opening.discard_from, 0))
            self.db.execute(_DISCARDED, (self.db.execute(_DISCARD, place).rowcount, run.run))
        return self._claim(run.run, run.execution, opening)

    def _new_run(self, run_id: str) -> int:
        now = _now_ms()
        run = self.db.execute(_NEW_RUN, (run_id, now, now)).lastrowid
        assert run is not None
        return run

    def _claim(self, run: int, execution: int, opening: Opening) -> Fence:
        until = _lease_end(opening.lease_seconds)
        if opening.tags:
            self.db.executemany(_TAG, [(tag, run) for tag in opening.tags])
        claim = (_now_ms(), opening.owner, until, run)
        ((epoch, attempts),) = self.db.execute(_CLAIM, claim).fetchall()
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds, attempts)

    def input(self, run: int, execution: int) -> tuple[str, bytes, bytes] | None:
        row: tuple[str, bytes, bytes] | None = self.db.execute(_INPUT, (run, execution)).fetchone()
        return row

    def steps(self, run: int, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        # All at once: an unfinished statement would hold its snapshot beyond the transaction.
        sql, values = _STEPS, list[Any]([run, execution])
        for position, prefix in lazily_loaded:
            sql += _NOT_LAZILY_LOADED
            values += [position, len(prefix), prefix]
        return [_step_row(row) for row in self.db.execute(sql, values).fetchall()]

    def steps_at(self, run: int, execution: int, position: int, branches: Sequence[str]) -> list[StepRow]:
        steps: list[StepRow] = []
        for first in range(0, len(branches), _MAX_VALUES):
            part = branches[first : first + _MAX_VALUES]
            sql = f"{_STEPS} AND position = ? AND branch IN ({', '.join('?' * len(part))})"
            steps += map(_step_row, self.db.execute(sql, (run, execution, position, *part)).fetchall())
        return steps

    def is_complete(self, run: RunRow) -> bool:
        values = {"run": run.run, "execution": run.execution}
        ((has_input, *counts),) = self.db.execute(_ROW_COUNTS, values).fetchall()
        return bool(has_input) and counts == [run.attempt_count, run.commit_count]

    def was_deleted(self, run: int) -> bool:
        return bool(self.db.execute("SELECT 1 FROM deleted WHERE run = ?", (run,)).fetchall())

    def identities(self, run: int, execution: int) -> list[tuple[str, int]]:
        return self.db.execute(_IDENTITIES, (run, execution)).fetchall()

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        values = (fence.run, fence.execution, fence.epoch, *attempt)
        # Otherwise an earlier call recorded it, with its output and usage, and its acknowledgement was lost.
        is_new = self.db.execute(_ATTEMPT, values).rowcount == 1
        if is_new:
            if self.db.execute(_COUNT, self._count_values(_now_ms(), fence, attempt, step)).rowcount != 1:
                return False
            if step is not None:
                self.db.execute(_STEP, _step_values(fence, attempt, step))
        self._fences[id(fence)] = fence
        return True

    def commit_all(self, commits: Sequence[Commit]) -> bool:
        """Record many commits with three statements. Returns False if one needs commit(); then the caller rolls back."""
        db, now, count = self.db, _now_ms(), len(commits)
        steps = [_step_values(f, attempt, step) for _, f, attempt, step in commits if step is not None]
        if len({values[:4] for values in steps}) != len(steps):
            return False  # Two outputs for one place count as one commit.
        attempts = [(f.run, f.execution, f.epoch, *attempt) for _, f, attempt, _ in commits]
        if db.executemany(_ATTEMPT, attempts).rowcount != count:
            return False
        counts = [self._count_values(now, f, attempt, step) for _, f, attempt, step in commits]
        if db.executemany(_COUNT, counts).rowcount != count:
            return False
        db.executemany(_STEP, steps)
        self._fences.update((id(f), f) for _, f, _, _ in commits)
        return True

    def _count_values(
        self, now_ms: int, fence: Fence, attempt: Attempt, step: Step | None
    ) -> tuple[Any, ...]:
        place = (fence.run, fence.execution, attempt.position, attempt.branch)
        is_new = step is not None and not self.db.execute(_IS_COMMITTED, place).fetchall()
        return (now_ms, _lease_end(fence.lease_seconds), *_usage(attempt), is_new, *_fence_values(fence))

    def finish(
        self,
        fence: Fence,
        status: str,
        error: str | None,
        updated_ms: int | None = None,
        wake_ms: int | None = None,
    ) -> bool:
        at = _now_ms() if updated_ms is None else updated_ms
        values = (status, error, at, status in UNFINISHED, wake_ms, wake_ms, *_fence_values(fence))
        return self.db.execute(_END, values).rowcount == 1

    def wake(self, run: RunRow, wake_ms: int | None = 0) -> None:
        self.db.execute(_WAKE, (wake_ms, run.run))

    def due(self, pipeline: str, now_ms: int, limit: int) -> list[str]:
        run_ids = [run_id for (run_id,) in self.db.execute(_DUE, (pipeline, now_ms, limit)).fetchall()]
        for run_id, owner, until_ms in self.db.execute(_RUNNING, (pipeline,)).fetchall():
            if len(run_ids) < limit and is_free(owner, _seconds_left(owner, until_ms)):
                run_ids.append(run_id)
        return run_ids

    def renew(self, fences: list[Fence]) -> None:
        self.db.executemany(_RENEW, [(_lease_end(f.lease_seconds), *_fence_values(f)) for f in fences])

    # ------------------------------------------------------------------ annotations

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        run = self.find(run_id)
        key = self._new_run(run_id) if run is None else run.run
        self.db.execute(_STEP, (key, 0, position, branch, node_id, 0, 0, 0, *step))

    def annotations(self, run: int, position: int, branch: str | None = None) -> list[StepRow]:
        return [_step_row(row) for row in self.db.execute(_ANNOTATIONS, (run, position, branch)).fetchall()]

    def delete_annotations(self, run: int, position: int, branch: str | None = None) -> None:
        self.db.execute(_DELETE_ANNOTATIONS, (run, position, branch))

    def with_requests(self, runs: list[int]) -> list[int]:
        rows = self.db.execute("SELECT run FROM steps WHERE position = -3").fetchall()
        requested = {run for (run,) in rows}
        return [run for run in runs if run in requested]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        row = self.db.execute(_NEWEST, (run_id, node_id)).fetchone()
        return None if row is None else _step_row(row)

    def delete(self, run_id: str) -> None:
        self.db.execute(_DELETED, (_now_ms(), run_id))
        self.db.execute(_FORGET_DELETED, (_now_ms() - _DAY_MS,))
        for statement in _DELETE:
            self.db.execute(statement, (run_id,))

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
        rows = self.db.execute(_EXPIRED, (before_ms, unfinished, limit)).fetchall()
        return [run_id for (run_id,) in rows]

    def blobs(self) -> Iterator[bytes]:
        for (payload,) in self.db.execute(_BLOBS, {"blob": BLOB, "length": len(BLOB)}):
            yield payload

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        return find_runs(
            self._fetch_all, _DIALECT, query, limit=limit, after=after, max_filtered=max_filtered
        )

    def _fetch_all(self, sql: str, values: list[Any]) -> list[Any]:
        return self.db.execute(sql, values).fetchall()

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        return [self._extras_of(run, failed) for run in runs]

    def _extras_of(self, run: RunRow, failed: int) -> RunExtras:
        parent = self.db.execute(_PARENTS, (run.run,)).fetchone()
        tags = self.db.execute("SELECT tag FROM tags WHERE run = ?", (run.run,)).fetchall()
        rows = self.db.execute(_FAILED, (run.run, run.execution, failed)).fetchall() if failed else []
        return RunExtras(parent and parent[0], tuple(tag for (tag,) in tags), list(map(parse_attempt, rows)))

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        first, last, size = prefix, prefix + _LAST_CHARACTERS, len(prefix)
        ((count,),) = self.db.execute(_COUNT_WITH_PREFIX, (first, last, _MANY)).fetchall()
        if count < _MANY:
            rows = self.db.execute(_BY_PREFIX, (first, last, size, prefix, prefix, limit)).fetchall()
            return [run_id for (run_id,) in rows]
        exact_match = self.find(prefix)
        rows = self.db.execute(_NEWEST_OF_MANY, (size, prefix, prefix, limit)).fetchall()
        run_ids = [prefix] if exact_match is not None and exact_match.execution else []
        return [*run_ids, *(run_id for (run_id,) in rows)][:limit]

    def attempts(self, run: int, execution: int) -> Iterator[tuple[Attempt, Step | None]]:
        for row in self.db.execute(_ATTEMPTS, (run, execution)).fetchall():
            step = row[len(Attempt._fields) :]
            yield parse_attempt(row[: len(Attempt._fields)]), None if step[2] is None else Step(*step)

    def attempt_page(
        self, run: int, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptSummary], str | None]:
        mark = AttemptMark(-1, 0, 0, 0, "") if after is None else parse_attempt_mark(after)
        start = (mark.epoch, mark.position, mark.started_ns, mark.branch, mark.attempt)
        rows = self.db.execute(_ATTEMPT_PAGE, (run, execution, *start, limit + 1)).fetchall()
        return attempt_page(rows, limit)

    def attempts_at(self, run: int, execution: int, position: int, branch: str) -> list[AttemptSummary]:
        rows = self.db.execute(_ATTEMPTS_AT, (run, execution, position, branch)).fetchall()
        return attempt_page(rows, len(rows))[0]

    def failed_since(self, run: int, execution: int, epoch: int) -> list[Attempt]:
        rows = self.db.execute(_FAILED_SINCE, (run, execution, epoch)).fetchall()
        return [Attempt._make(row) for row in reversed(rows)]

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        return tally(self._fetch_all, "?", since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        (version,) = self.db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchone()
        return StoreFacts(f"SQLite {sqlite3.sqlite_version}", int(version), SCHEMA_VERSION)

    def step_at(self, run: int, execution: int, position: int, branch: str) -> StepRow | None:
        row = self.db.execute(_STEP_AT, (run, execution, position, branch)).fetchone()
        return None if row is None else _step_row(row)


def _usage(attempt: Attempt) -> tuple[int, int, int]:
    """Return the tokens, cost and time that an attempt adds to its run; a group's time includes its children's."""
    return attempt.tokens, attempt.cost_pico, 0 if attempt.branch else attempt.function_ns


def _fence_values(fence: Fence) -> tuple[Any, ...]:
    return fence.run, fence.epoch, fence.owner, fence.acknowledged


def _step_values(fence: Fence, attempt: Attempt, step: Step) -> tuple[Any, ...]:
    position, started_ns, branch, number, node_id = attempt[:5]
    return (fence.run, fence.execution, position, branch, node_id, fence.epoch, number, started_ns, *step)


def _run_row(row: Any) -> RunRow:
    return parse_run((*row[:13], _seconds_left(row[11], row[13]), *row[14:]))


def _step_row(row: Any) -> StepRow:
    position, branch, node_id, *step = row
    return StepRow(position, branch, node_id, Step._make(step))


# CROSS JOIN: the tags first, in the order of their index.
_DIALECT: Final = Dialect(
    _COLUMNS, _run_row, "?", "instr(lower({}), ?) > 0", "tags t CROSS JOIN runs r ON r.run = t.run"
)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# ---------------------------------------------------------------------- leases
#
# All processes that use the file are on one machine. If the system has a clock that counts from its start and cannot be
# set, leases use that; leases from before the last start have expired.

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
