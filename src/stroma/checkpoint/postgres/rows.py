"""The rows of a Postgres store, read and written on one connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, LiteralString

import psycopg

from stroma.checkpoint.blocked import BlockedMark
from stroma.checkpoint.decisions import MESSAGE_SENT
from stroma.checkpoint.durable.integrity import parse_attempt, parse_run, require_undamaged
from stroma.checkpoint.durable.owner import machine_prefix
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
from stroma.checkpoint.postgres import statements as sql
from stroma.checkpoint.postgres.schema import SCHEMA_VERSION, key
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueEntry, QueueFigures
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

__all__ = ["PostgresRows", "commit_query", "commit_reply"]

_DIALECT: Final = Dialect(
    sql.RUN_COLUMNS,
    parse_run,
    "%s",
    'strpos(lower({} COLLATE "C"), %s) > 0',
    "tags t JOIN runs r ON r.run = t.run",
)
#: From so many ids with a prefix on, a search through all runs finds the newest sooner than sorting them.
_MANY: Final = 5000
_INDEXED_CHARACTERS: Final = 64  # of an id
_LAST_CHARACTERS: Final = "\U0010ffff" * (_INDEXED_CHARACTERS + 1)


class PostgresRows:
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self.db = db
        #: Fences under which attempts were recorded in this transaction, and how many attempts their runs
        #: have now.
        self.attempt_counts: list[tuple[Fence, int]] = []
        #: The row that find() created in this transaction to lock it. It has no execution, so find() returns
        #: None.
        self._new_run: RunRow | None = None

    def _execute(
        self, query: LiteralString, values: Sequence[Any] | dict[str, Any] = ()
    ) -> psycopg.Cursor[Any]:
        return self.db.execute(query, values, binary=True)  # Text would double the size of outputs.

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        if not lock:
            row = self._execute(sql.FIND, (key(run_id),)).fetchone()
            return None if row is None else parse_run(row)
        run, is_new = self._lock(run_id)
        if is_new:
            self._new_run = run
        return None if is_new else run

    def _lock(self, run_id: str) -> tuple[RunRow, bool]:
        """Return the locked row of a run, and True if it was created for that."""
        row: Any = self._execute(sql.LOCK, (key(run_id), run_id)).fetchone()
        run = parse_run(row[:-1])
        require_undamaged(run)
        return run, row[-1]

    def begin(self, run: RunRow | None, opening: Opening) -> Fence:
        if run is None:
            new = self._new_run
            run = new if new and new.run_id == opening.run_id else self._lock(opening.run_id)[0]
        number, execution = run.run, run.execution + 1
        # Earlier executions stay in the history; their commits are not read any more.
        self._execute(sql.NEW_INPUT, (number, execution, opening.contract, opening.input, opening.sha256))
        claim = (execution, opening.pipeline, opening.version, opening.owner, opening.lease_seconds, number)
        fence = self._fence(number, execution, opening, self._execute(sql.BEGIN, claim))
        if execution > 1:
            self._execute(sql.UNTAG, (number,))
            self._execute(sql.DISCARD_EVENTS, (number,))
        self._tag(opening, number)
        return fence

    def take_over(self, run: RunRow, opening: Opening) -> Fence:
        if opening.discard_from is not None:
            place = (run.run, run.execution, max(opening.discard_from, 0))
            self._execute(sql.COUNT_DISCARDED, (self._execute(sql.DISCARD, place).rowcount, run.run))
        self._tag(opening, run.run)
        claim = (opening.version, opening.owner, opening.lease_seconds, run.run)
        return self._fence(run.run, run.execution, opening, self._execute(sql.TAKE_OVER, claim))

    def replace_owner(self, run: RunRow, owner: str) -> Fence:
        self._execute(sql.REPLACE_OWNER, (owner, run.run))
        return Fence(run.run, run.execution, run.epoch, owner, 0.0)

    def _tag(self, opening: Opening, run: int) -> None:
        if opening.tags:
            self._execute(sql.TAG, (list(opening.tags), run))

    @staticmethod
    def _fence(run: int, execution: int, opening: Opening, claimed: psycopg.Cursor[Any]) -> Fence:
        epoch, attempts = claimed.fetchone() or (0, 0)
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds, attempts)

    def input(self, run: int, execution: int) -> tuple[str, bytes, bytes] | None:
        row: tuple[str, bytes, bytes] | None = self._execute(sql.INPUT, (run, execution)).fetchone()
        return row

    def steps(self, run: int, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        query, values = sql.STEPS, list[Any]([run, execution])
        for place in lazily_loaded:
            query += sql.NOT_LAZILY_LOADED
            values += place
        return [_step_row(row) for row in self._execute(query, values).fetchall()]

    def steps_at(self, run: int, execution: int, position: int, branches: Sequence[str]) -> list[StepRow]:
        values = (run, execution, position, [key(branch) for branch in branches])
        return [_step_row(row) for row in self._execute(sql.STEPS_AT, values).fetchall()]

    def is_complete(self, run: RunRow) -> bool:
        values = {"run": run.run, "execution": run.execution}
        ((has_input, *counts),) = self._execute(sql.ROW_COUNTS, values).fetchall()
        return bool(has_input) and counts == [run.attempt_count, run.commit_count]

    def identities(self, run: int, execution: int) -> list[tuple[str, int]]:
        return self._execute(sql.IDENTITIES, (run, execution)).fetchall()

    def was_deleted(self, run: int) -> bool:
        return bool(self._execute("SELECT 1 FROM deleted WHERE run = %s", (run,)).fetchall())

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        is_recorded, attempts = commit_reply(self._execute(*commit_query(fence, attempt, step)))
        if is_recorded:
            self.attempt_counts.append((fence, attempts))
        return is_recorded

    def finish(self, fence: Fence, end: RunEnd) -> bool:
        return self._execute(sql.FINISH, {**end._asdict(), **asdict(fence)}).rowcount == 1

    def wake(self, run: RunRow, wake_ms: int | None = 0) -> None:
        self._execute(sql.WAKE, (wake_ms, run.run))
        if wake_ms == 0:
            self._execute(sql.NOTIFY)

    def block(self, run: RunRow, mark: BlockedMark | None) -> None:
        values = (None,) * 4 if mark is None else (*mark[:3], " ".join(mark.codes))
        self._execute(sql.BLOCK, (*values, run.run))

    # ------------------------------------------------------------------ queue

    def enqueue(self, fence: Fence, entry: QueueEntry) -> None:
        self._execute(sql.ENQUEUE, (entry.due_ms, entry.priority, entry.key, entry.expires_ms, fence.run))
        self._execute(sql.NOTIFY)

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        code = request.code_of(pipeline)
        values = {
            "pipeline": pipeline,
            "now": request.now_ms,
            "limit": request.limit,
            "machine": machine_prefix(),
            "versions": list(code.versions),
            "code": code.name,
        }
        candidates = [
            Candidate(*row)
            for statement in (sql.STOPPED, sql.QUEUED, sql.QUEUED_BY_KEY, sql.BLOCKED)
            for row in self._execute(statement, values).fetchall()
        ]
        if not request.with_lost:
            return candidates
        gone = {
            run: (owner, Candidate(run, run_id, name, priority, 0, key))
            for run, run_id, name, priority, key, owner, left_seconds in self._execute(
                sql.RUNNING, values
            ).fetchall()
            if is_free(owner, left_seconds)
        }
        if gone:
            chosen = list(gone)[: request.limit]
            owners = [gone[run][0] for run in chosen]
            locked = self._execute(sql.LOCK_RUNNING, (chosen, owners)).fetchall()
            candidates += [gone[run][1] for (run,) in locked]
        return candidates

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        live: dict[str | None, int] = {}
        for key_, owner, left_seconds, is_claimed in self._execute(sql.LIVE, (pipeline,)).fetchall():
            if is_claimed or not is_free(owner, left_seconds):
                live[key_] = live.get(key_, 0) + 1
        return live

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        self._execute(sql.CLAIM_RUNS, (token, float(seconds), [one.run for one in candidates]))
        return list(candidates)

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        values = {"pipeline": pipeline, "versions": list(versions), "now": now_ms, "news": MESSAGE_SENT}
        row: Any = self._execute(sql.QUEUE_FIGURES, values).fetchone()
        queued, due_ms, blocked, since_ms = row
        return QueueFigures(int(queued), due_ms, int(blocked), since_ms)

    def inputs_of(self, candidates: Sequence[Candidate]) -> dict[Any, tuple[bytes, bytes]]:
        rows = self._execute(sql.INPUTS, ([one.run for one in candidates],)).fetchall()
        return {run: (data, sha256) for run, data, sha256 in rows}

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        return dict(self._execute(sql.STATUSES, ([key(run_id) for run_id in run_ids],)).fetchall())

    def renew(self, fences: list[Fence]) -> list[Fence]:
        if not fences:
            return []
        columns = [(f.run, f.epoch, f.owner, float(f.lease_seconds), f.acknowledged) for f in fences]
        rows = self._execute(sql.RENEW, [list(column) for column in zip(*columns, strict=True)]).fetchall()
        renewed = {(run, epoch) for run, epoch in rows}
        return [fence for fence in fences if (fence.run, fence.epoch) in renewed]

    # ------------------------------------------------------------------ annotations

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        run, _ = self._lock(run_id)
        self._execute(sql.ANNOTATE, (run.run, position, key(branch), branch, node_id, *step))

    def annotations(self, run: int, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        branch_key = None if branch is None else key(branch)
        values = (run, list(map(int, kinds)), branch_key, branch_key)
        return [_step_row(row) for row in self._execute(sql.ANNOTATIONS, values).fetchall()]

    def delete_annotations(self, run: int, *kinds: Annotation, branch: str | None = None) -> None:
        branch_key = None if branch is None else key(branch)
        self._execute(sql.DELETE_ANNOTATIONS, (run, list(map(int, kinds)), branch_key, branch_key))

    def with_requests(self, runs: list[int]) -> list[int]:
        rows = self._execute(sql.WITH_REQUESTS, (runs, Annotation.REQUEST)).fetchall()
        requested = {run for (run,) in rows}
        return [run for run in runs if run in requested]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        row = self._execute(sql.NEWEST_OUTPUT, (Annotation.SAVED, key(run_id), node_id)).fetchone()
        return None if row is None else _step_row(row)

    def delete(self, run_id: str) -> None:
        # Lock first: a commit in progress would leave its rows behind.
        locked = self._execute("SELECT run FROM runs WHERE run_key = %s FOR UPDATE", (key(run_id),))
        run = locked.fetchone()
        self._execute(sql.FORGET_DELETED)
        if run is not None:
            self._execute(sql.RECORD_DELETED, run)
            for statement in sql.DELETE_RUN:
                self._execute(statement, run)

    # ------------------------------------------------------------------ events

    def append_events(self, batches: Sequence[EventRow]) -> None:
        columns = [(one.run, one.execution, *one.last, one.data) for one in batches]
        self._execute(sql.APPEND_EVENTS, [list(column) for column in zip(*columns, strict=True)])
        for one in batches:
            if one.trims:
                self._execute(sql.TRIM_EVENTS, {"run": one.run, "most": MAX_BATCHES})
                self._execute(sql.EXPIRE_EVENTS, (EXPIRY_MS,))

    def events(self, run: int, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        rows = self._execute(sql.EVENTS, (run, *after, execution, limit)).fetchall()
        return [EventRow(run, execution, EventPlace(epoch, last), data) for epoch, last, data in rows]

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        row: Any = self._execute(sql.LOCK_CELL if lock else sql.CELL, (key(name),)).fetchone()
        if row is None:
            row = self._execute(
                sql.NEW_CELL if lock else sql.EMPTY_CELL, (key(name), name) if lock else ()
            ).fetchone()
        # A cell without data was created only to lock it.
        return bytes(row[0]) or None, row[1]

    def write_cell(self, name: str, data: bytes) -> None:
        self._execute(sql.WRITE_CELL, (data, key(name)))

    # ------------------------------------------------------------------ retention

    def now_ms(self) -> int:
        ((now,),) = self._execute(sql.SERVER_CLOCK).fetchall()
        return int(now)

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        return [run_id for (run_id,) in self._execute(sql.EXPIRED, (before_ms, unfinished, limit)).fetchall()]

    def blobs(self) -> list[bytes]:
        values = {"blob": BLOB, "length": len(BLOB)}
        return [payload for (payload,) in self._execute(sql.BLOBS, values).fetchall()]

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        return find_runs(
            self._fetch_all, _DIALECT, query, limit=limit, after=after, max_filtered=max_filtered
        )

    def _fetch_all(self, statement: str, values: list[Any]) -> list[Any]:
        # The statement consists of constants: everything from a caller is a parameter.
        return self.db.execute(statement.encode(), values, binary=True).fetchall()

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        if not runs:
            return []
        numbers = [run.run for run in runs]
        rows = self._execute(sql.EXTRAS, (Annotation.PARENT, numbers)).fetchall()
        extras = {number: (parent, tuple(tags)) for number, parent, tags in rows}
        failures: dict[int, list[AttemptRecord]] = {}
        if failed:
            values = (numbers, [run.execution for run in runs], failed)
            for number, *attempt in self._execute(sql.FAILED_ATTEMPTS, values).fetchall():
                failures.setdefault(number, []).append(parse_attempt(attempt))
        return [RunExtras(*extras[number], failures.get(number, [])) for number in numbers]

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        first = prefix[:_INDEXED_CHARACTERS]
        last = first + _LAST_CHARACTERS
        ((count,),) = self._execute(sql.COUNT_WITH_PREFIX, (first, last, _MANY)).fetchall()
        if count < _MANY:
            rows = self._execute(sql.BY_PREFIX, (first, last, prefix, prefix, limit)).fetchall()
            return [run_id for (run_id,) in rows]
        exact_match = self.find(prefix)
        rows = self._execute(sql.NEWEST_WITH_PREFIX, (prefix, prefix, limit)).fetchall()
        run_ids = [prefix] if exact_match is not None and exact_match.execution else []
        return [*run_ids, *(run_id for (run_id,) in rows)][:limit]

    def attempts(self, run: int, execution: int) -> Iterator[tuple[AttemptRecord, Step | None]]:
        outputs = {
            tuple(row[:5]): Step._make(row[5:])
            for row in self._execute(sql.OUTPUTS, (run, execution)).fetchall()
        }
        for *row, epoch in self._execute(sql.ATTEMPTS, (run, execution)).fetchall():
            attempt = parse_attempt(row)
            yield attempt, outputs.get((epoch, *attempt.key))

    def attempt_page(
        self, run: int, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        mark = AttemptMark(-1, 0, 0, 0, "") if after is None else parse_attempt_mark(after)
        start = (mark.epoch, mark.position, mark.started_ns, key(mark.branch), mark.attempt)
        rows = self._execute(sql.ATTEMPT_PAGE, (run, execution, *start, limit + 1)).fetchall()
        return attempt_page(rows, limit)

    def attempts_at(self, run: int, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        rows = self._execute(sql.ATTEMPTS_AT, (run, execution, position, key(branch))).fetchall()
        return attempt_page(rows, len(rows))[0]

    def failed_since(self, run: int, execution: int, epoch: int) -> list[AttemptRecord]:
        rows = self._execute(sql.FAILED_SINCE, (run, execution, epoch)).fetchall()
        return [parse_attempt(row) for row in reversed(rows)]

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        return tally(self._fetch_all, "%s", since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        row: Any = self._execute(sql.FACTS).fetchone()
        version, schema_version, clock_ms, fsync, pages = row
        off = [name for name, value in (("fsync", fsync), ("full_page_writes", pages)) if value == "off"]
        warnings = tuple(
            f"{name} is off: a crash of its machine may lose committed data; turn it on" for name in off
        )
        return StoreFacts(f"PostgreSQL {version}", int(schema_version), SCHEMA_VERSION, clock_ms, warnings)

    def step_at(self, run: int, execution: int, position: int, branch: str) -> StepRow | None:
        row = self._execute(sql.STEP_AT, (run, execution, position, key(branch))).fetchone()
        return None if row is None else _step_row(row)


def commit_query(
    fence: Fence, attempt: AttemptRecord, step: Step | None
) -> tuple[LiteralString, dict[str, Any]]:
    """Return the statement of a commit, and its values. For its result see :func:`commit_reply`."""
    # The time of a group includes that of its children.
    latency = 0 if attempt.branch else attempt.function_ns
    values = {
        **asdict(fence),
        **dict(zip(ATTEMPT_COLUMNS, stored_values(attempt), strict=True)),
        "branch_key": key(attempt.branch),
        "latency_ns": latency,
        "commits": 0 if step is None else 1,
    }
    if step is None:
        return sql.COMMIT_ATTEMPT, values
    return sql.COMMIT_OUTPUT, {**values, **step._asdict()}


def commit_reply(cursor: psycopg.Cursor[Any]) -> tuple[bool, int]:
    """Return True if an attempt is recorded, and the number of attempts of its execution; 0 if unknown."""
    is_recorded, attempts = cursor.fetchone() or (False, 0)
    return bool(is_recorded), attempts


def _step_row(row: Any) -> StepRow:
    position, branch, node_id, *step = row
    return StepRow(position, branch, node_id, Step._make(step))
