"""The rows of an SQL store, read and written on one connection."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from stroma.checkpoint.durable.rows import (
    Annotation,
    Delay,
    EventRow,
    Fence,
    Opening,
    Rows,
    RunRow,
    Step,
    StepRow,
    is_free,
    pack_tags,
)
from stroma.checkpoint.entries import Discard
from stroma.checkpoint.events import EXPIRY_MS, MAX_BATCHES, EventPlace
from stroma.checkpoint.identity import mark_of, parse_mark
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueFigures
from stroma.checkpoint.records import (
    ATTEMPT_COLUMNS,
    AttemptRecord,
    RunQuery,
    Tally,
    ascii_lower,
    stored_values,
    to_record,
)
from stroma.checkpoint.sql import statements as sql
from stroma.checkpoint.sql.tables import key

_INDEXED_CHARACTERS: Final = 64  # of an id
_LAST_CHARACTERS: Final = "\U0010ffff" * (_INDEXED_CHARACTERS + 1)


class SqlRows(Rows):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller begins and ends the transaction."""

    def __init__(self) -> None:
        #: Fences under which attempts were recorded in this transaction, and the numbers of attempts since.
        self.attempt_counts: list[tuple[Fence, int]] = []

    # ------------------------------------------------------------------ the database

    @abstractmethod
    def _execute(self, statement: str, values: dict[str, Any]) -> Any:
        """Execute a statement of :mod:`stroma.checkpoint.sql.statements`, and return the cursor."""

    @abstractmethod
    def _execute_each(self, statement: str, values: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Execute a statement that returns rows with each of these values, and return the rows of each."""

    @abstractmethod
    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool: ...

    def _is_lost(self, owner: str | None, left_seconds: float) -> bool:
        """Return True if a running run no longer has an owner."""
        return is_free(owner, left_seconds)

    def _run_row(self, values: Sequence[Any]) -> RunRow:
        return RunRow._make(values)

    def _machine(self) -> str:
        """Return the beginning of the owners of runs whose end may be known before their lease ends."""
        return ""

    def _notify(self) -> None:
        """Wake workers that listen. SQLite has nothing to notify."""
        return

    def _all(self, statement: str, **values: Any) -> list[Any]:
        rows: list[Any] = self._execute(statement, values).fetchall()
        return rows

    def _one(self, statement: str, **values: Any) -> Any:
        rows = self._all(statement, **values)
        return rows[0] if rows else None

    def _run(self, statement: str, **values: Any) -> int:
        """Execute a statement, and return the number of changed rows."""
        changed: int = self._execute(statement, values).rowcount
        return changed

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        row = self._one(sql.LOCK if lock else sql.FIND, run_key=key(run_id))
        return None if row is None else self._run_row(row)

    def _new_run(self, run_id: str) -> Any:
        """Create a run without an execution, and return its number."""
        return self._one(sql.NEW_RUN, run_key=key(run_id), run_id=run_id)[0]

    def add_execution(self, run: RunRow | None, opening: Opening, execution: int) -> Any:
        number = self._new_run(opening.run_id) if run is None else run.run
        if execution > 1:  # It stays in the history; its commits are no longer read.
            self._run(sql.DISCARD_EVENTS, run=number)
        return number

    def continue_execution(self, run: RunRow, discard: Discard) -> Any:
        execute = partial(self._run, run=run.run, execution=run.execution)
        discarded = 0 if discard.first is None else execute(sql.DISCARD_FROM, position=max(discard.first, 0))
        for position, branch in discard.places:
            discarded += execute(sql.DISCARD_AT, position=position, branch_key=key(branch))
        if discard.failed_at:
            discarded += execute(sql.DISCARD_FAILED, positions=list(discard.failed_at))
        if discarded:
            self._run(sql.COUNT_DISCARDED, run=run.run, discarded=discarded)
        return run.run

    def update(
        self, run: Any, fields: Mapping[str, Any], *, fence: Fence | None = None, is_news: bool = False
    ) -> bool:
        values = {
            f"new_{name}": value.ms if isinstance(value, Delay) else value for name, value in fields.items()
        }
        kinds = tuple((name, isinstance(value, Delay)) for name, value in fields.items())
        where = {"run": run} if fence is None else _fence_values(fence)
        is_done = self._run(sql.update_run(kinds, is_fenced=fence is not None), **values, **where) == 1
        if is_news:
            self._notify()
        return is_done

    def steps(self, run: Any, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        statement, values = sql.STEPS, dict[str, Any](run=run, execution=execution)
        for number, (position, prefix) in enumerate(lazily_loaded):
            statement += (
                f" AND NOT (position = :position_{number} AND branch <> ''"
                f" AND substr(branch, 1, length(CAST(:prefix_{number} AS text))) = :prefix_{number})"
            )
            values |= {f"position_{number}": position, f"prefix_{number}": prefix}
        return _step_rows(self._all(statement, **values))

    def steps_at(self, run: Any, execution: int, places: Sequence[tuple[int, str]]) -> list[StepRow]:
        keys: dict[int, list[str]] = {}
        for position, branch in places:
            keys.setdefault(position, []).append(key(branch))
        of_run = {"run": run, "execution": execution}
        values = [{**of_run, "position": at, "branch_keys": of_position} for at, of_position in keys.items()]
        return _step_rows(row for rows in self._execute_each(sql.STEPS_AT, values) for row in rows)

    def is_complete(self, run: RunRow) -> bool:
        counts = self._one(sql.ROW_COUNTS, run=run.run, execution=run.execution)
        return tuple(counts) == (run.attempt_count, run.commit_count)

    def identities(self, run: Any, execution: int) -> list[tuple[str, int]]:
        return self._all(sql.IDENTITIES, run=run, execution=execution)

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        return dict(self._all(sql.STATUSES, run_keys=list(map(key, run_ids))))

    def renew(self, fences: list[Fence]) -> list[Fence]:
        # In the order of their runs, to avoid deadlocks.
        in_order = sorted(fences, key=lambda fence: fence.run)
        replies = self._execute_each(sql.RENEW, list(map(_fence_values, in_order)))
        return [fence for fence, reply in zip(in_order, replies, strict=True) if reply]

    def delete(self, run_id: str) -> None:
        run = self.find(run_id, lock=True)  # A commit in progress would leave its rows behind.
        if run is not None:
            for statement in sql.DELETE_RUN:
                self._run(statement, run=run.run)

    # ------------------------------------------------------------------ queue

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        code = request.code_of(pipeline)
        values = {
            "pipeline": pipeline,
            "now": request.now_ms,
            "limit": request.limit,
            "machine": self._machine(),
            "versions": list(code.versions),
            "code": code.name,
        }
        candidates = [
            Candidate(*row) for statement in sql.CANDIDATES for row in self._all(statement, **values)
        ]
        if not request.with_lost:
            return candidates
        lost = {
            run: (owner, Candidate(run, run_id, name, priority, 0, queue_key))
            for run, run_id, name, priority, queue_key, owner, left_seconds in self._all(
                sql.RUNNING, **values
            )
            if self._is_lost(owner, left_seconds)
        }
        if lost:
            taken, chosen = Counter[str | None](), list[Any]()
            for run, (_, one) in lost.items():
                taken[one.key] += 1
                if taken[one.key] <= request.limit:
                    chosen.append(run)
            owners = [lost[run][0] for run in chosen]
            candidates += [lost[run][1] for (run,) in self._all(sql.LOCK_RUNNING, runs=chosen, owners=owners)]
        return candidates

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        live: dict[str | None, int] = {}
        for queue_key, owner, left_seconds, is_claimed in self._all(sql.LIVE, pipeline=pipeline):
            if is_claimed or not self._is_lost(owner, left_seconds):
                live[queue_key] = live.get(queue_key, 0) + 1
        return live

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        runs = [one.run for one in candidates]
        self._run(sql.CLAIM, token=token, claim_ms=int(seconds * 1000), runs=runs)
        return list(candidates)

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        row = self._one(sql.QUEUE_FIGURES, pipeline=pipeline, versions=list(versions), now=now_ms)
        queued, due_ms, blocked, since_ms = row
        return QueueFigures(int(queued), due_ms, int(blocked), since_ms)

    # ------------------------------------------------------------------ annotations

    def key_of(self, run_id: str) -> Any:
        run = self.find(run_id, lock=True)
        return self._new_run(run_id) if run is None else run.run

    def annotate(self, run: Any, position: int, branch: str, node_id: str, step: Step) -> None:
        attempt = {"execution": 0, "epoch": 0, "attempt": 0, "started_ns": 0, "node_id": node_id}
        place = {"run": run, "position": position, "branch": branch, "branch_key": key(branch)}
        self._run(sql.STEP, **place, **attempt, **step._asdict())

    def annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        return _step_rows(self._all(sql.ANNOTATIONS, **_annotation_values(run, kinds, branch)))

    def delete_annotations(self, run: Any, *kinds: Annotation, branch: str | None = None) -> None:
        self._run(sql.DELETE_ANNOTATIONS, **_annotation_values(run, kinds, branch))

    def with_requests(self, runs: list[Any]) -> list[Any]:
        requested = {run for (run,) in self._all(sql.WITH_REQUESTS, runs=runs)}
        return [run for run in runs if run in requested]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        row = self._one(sql.NEWEST_OUTPUT, run_key=key(run_id), node_id=node_id)
        return None if row is None else step_row(row)

    # ------------------------------------------------------------------ events

    def append_events(self, batches: Sequence[EventRow]) -> None:
        for one in batches:
            epoch, last = one.last
            place = {"run": one.run, "execution": one.execution, "epoch": epoch, "last": last}
            self._run(sql.APPEND_EVENTS, **place, data=one.data)
            if one.trims:
                self._run(sql.TRIM_EVENTS, run=one.run, most=MAX_BATCHES)
                self._run(sql.EXPIRE_EVENTS, expiry_ms=EXPIRY_MS)

    def events(self, run: Any, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        epoch, last = after
        rows = self._all(sql.EVENTS, run=run, execution=execution, epoch=epoch, last=last, limit=limit)
        return [EventRow(run, execution, EventPlace(epoch, last), data) for epoch, last, data in rows]

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        row = self._one(sql.LOCK_CELL if lock else sql.CELL, cell_key=key(name))
        if row is None and lock:
            row = self._one(sql.NEW_CELL, cell_key=key(name), name=name, data=b"")
        if row is None:
            return None, self.now_ms()
        data, now_ms = row
        return bytes(data) or None, now_ms  # A cell without data was created only to lock it.

    def write_cell(self, name: str, data: bytes) -> None:
        self._run(sql.WRITE_CELL, cell_key=key(name), name=name, data=data)

    # ------------------------------------------------------------------ retention

    def now_ms(self) -> int:
        return int(self._one(sql.NOW)[0])

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        rows = self._all(sql.EXPIRED, before_ms=before_ms, unfinished=unfinished, limit=limit)
        return [run_id for (run_id,) in rows]

    def blobs(self) -> Iterator[bytes]:
        for (payload,) in self._execute(sql.BLOBS, {"blob": BLOB, "length": len(BLOB)}):
            yield payload

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        # Each status is a query of its own: only then do the rows come from an index in order.
        runs: list[RunRow] = []
        examined_to: tuple[int, int] | None = None
        for status in query.statuses or (None,):
            rows, end = self._runs_with_status(query, status, limit + 1, after, max_filtered)
            runs += rows
            if end is not None and (examined_to is None or end > examined_to):
                examined_to = end
        runs.sort(key=_place, reverse=True)
        if examined_to is not None:  # Older runs have not been examined for each status.
            runs = [run for run in runs if _place(run) >= examined_to]
        if len(runs) > limit:
            examined_to = _place(runs[limit - 1])
        return runs[:limit], None if examined_to is None else mark_of(*examined_to)

    def _runs_with_status(
        self, query: RunQuery, status: str | None, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], tuple[int, int] | None]:
        """Return the runs with a status, and the place of the last examined one; None: all were examined."""
        values = {"pipeline": query.pipeline, "status": status, "since_ms": query.since_ms}
        conditions = {
            "pipeline": "r.pipeline = :pipeline",
            "status": "r.status = :status",
            "since_ms": "r.started_ms >= :since_ms",
        }
        # Execution 0 has only states from save(): it is not a run of a pipeline.
        where = ["r.execution > 0"]
        where += [condition for name, condition in conditions.items() if values[name] is not None]
        if query.blocked:
            where.append("r.blocked_since_ms IS NOT NULL")
        if after is not None:
            where.append("(r.started_ms, r.run) < (:after_ms, :after_run)")
            values["after_ms"], values["after_run"] = parse_mark(after, 2)
        inner = f"FROM runs r WHERE {' AND '.join(where)} ORDER BY r.started_ms DESC, r.run DESC"
        if not query.needs_scan:
            return self._parsed_runs(
                f"SELECT {sql.RUN_COLUMNS} {inner} LIMIT :limit", **values, limit=limit
            ), None
        condition, filter_values = _filter(query)
        bound = "" if max_filtered is None else f" LIMIT {int(max_filtered)}"
        statement = f"""SELECT {sql.RUN_COLUMNS} FROM (SELECT r.* {inner}{bound}) r WHERE {condition}
            ORDER BY r.started_ms DESC, r.run DESC LIMIT :limit"""
        runs = self._parsed_runs(statement, **values, **filter_values, limit=limit)
        if max_filtered is None or len(runs) == limit:
            return runs, None
        last = f"SELECT r.started_ms, r.run {inner} LIMIT 2 OFFSET {int(max_filtered) - 1}"
        ends = self._all(last, **values)
        return runs, (ends[0][0], ends[0][1]) if len(ends) == 2 else None

    def _parsed_runs(self, statement: str, **values: Any) -> list[RunRow]:
        return [self._run_row(row) for row in self._all(statement, **values)]

    def failed(self, runs: Sequence[RunRow], limit: int) -> list[list[AttemptRecord]]:
        places = [{"run": run.run, "execution": run.execution, "limit": limit} for run in runs]
        return [
            [to_record(attempt, epoch) for *attempt, epoch in rows]
            for rows in self._execute_each(sql.FAILED, places)
        ]

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        first = prefix[:_INDEXED_CHARACTERS]
        places = {"first": first, "last": first + _LAST_CHARACTERS}
        rows = self._all(sql.BY_PREFIX, **places, prefix=prefix, limit=limit)
        return [run_id for (run_id,) in rows]

    def attempt_page(
        self, run: Any, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        place = (-1, 0, 0, 0, "") if after is None else parse_mark(after, 4, has_text=True)
        values = dict(zip(("epoch", "position", "started_ns", "attempt"), place, strict=False))
        values |= {"run": run, "execution": execution, "branch_key": key(place[4])}
        page = _parse_attempts(self._all(sql.ATTEMPT_PAGE, **values, limit=limit + 1))
        return page[:limit], page[limit - 1].mark if len(page) > limit else None

    def attempts_at(self, run: Any, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        place = {"run": run, "execution": execution, "position": position, "branch_key": key(branch)}
        return _parse_attempts(self._all(sql.ATTEMPTS_AT, **place))

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        values = {"bucket_ms": bucket_ms, "since_ms": since_ms, "runs": runs, "attempts": attempts}
        rows = self._all(sql.TALLY, **values)
        return [Tally(int(row[0]), *row[1:5], *map(int, row[5:])) for row in rows]


def _fence_values(fence: Fence) -> dict[str, Any]:
    return {
        "run": fence.run,
        "execution": fence.execution,
        "epoch": fence.epoch,
        "owner": fence.owner,
        "acknowledged": fence.acknowledged,
        "lease_ms": int(fence.lease_seconds * 1000),
    }


def commit_values(fence: Fence, attempt: AttemptRecord, step: Step | None) -> dict[str, Any]:
    """Return the values of the statements that record an attempt with its output, and renew the lease."""
    values = {
        **_fence_values(fence),
        **dict(zip(ATTEMPT_COLUMNS, stored_values(attempt), strict=True)),
        "branch_key": key(attempt.branch),
        # The time of a group includes that of its children.
        "latency_ns": 0 if attempt.branch else attempt.function_ns,
        "commits": 0 if step is None else 1,
    }
    return values if step is None else {**values, **step._asdict()}


def _annotation_values(run: Any, kinds: Iterable[Annotation], branch: str | None) -> dict[str, Any]:
    return {"run": run, "kinds": list(map(int, kinds)), "branch_key": None if branch is None else key(branch)}


def step_row(row: Any) -> StepRow:
    """Return a commit or an annotation from its columns."""
    position, branch, node_id, *step = row
    return StepRow(position, branch, node_id, Step._make(step))


def _step_rows(rows: Iterable[Any]) -> list[StepRow]:
    return list(map(step_row, rows))


def _parse_attempts(rows: Iterable[Any]) -> list[AttemptRecord]:
    """Return the attempts of rows of (*ATTEMPT_COLUMNS, epoch, size)."""
    return [to_record(row[:-2], *row[-2:]) for row in rows]


def _place(run: RunRow) -> tuple[int, int]:
    return run.started_ms, run.run


def _filter(query: RunQuery) -> tuple[str, dict[str, Any]]:
    """Return the condition that is checked for each run, with its parameters."""
    parts, values = [], dict[str, Any]()
    if query.failure_class is not None or query.node is not None:
        failed = """SELECT 1 FROM attempts a WHERE a.run = r.run AND a.execution = r.execution
            AND a.failure_class IS NOT NULL"""
        for column, value in (("failure_class", query.failure_class), ("node_id", query.node)):
            if value is not None:
                failed += f" AND a.{column} = :{column}"
                values[column] = value
        parts.append(f"EXISTS ({failed})")
    if query.tag is not None:
        values["tag"] = pack_tags([query.tag])
        parts.append("strpos(r.tags, :tag) > 0")
    if query.text is not None:
        values["text"] = ascii_lower(query.text)
        columns = ("r.run_id", "r.pipeline", "coalesce(r.error, '')")
        parts.append("(" + " OR ".join(f"strpos(lower({column}), :text) > 0" for column in columns) + ")")
    return " AND ".join(parts), values
