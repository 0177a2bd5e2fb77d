"""Statements for a page of runs, and sums over attempts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from stroma.checkpoint.durable.integrity import parse_attempt
from stroma.checkpoint.durable.rows import RunRow
from stroma.checkpoint.records import AttemptRecord, RunQuery, Tally, end_of_page, parse_run_mark
from stroma.checkpoint.sql.statements import RUN_COLUMNS

__all__ = ["attempt_page", "find_runs", "tally"]

#: Executes a statement with its parameters, and returns all rows.
Execute = Callable[..., list[Any]]
#: Likewise for the columns of a RunRow.
ReadRuns = Callable[..., list[RunRow]]


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of runs to find; see :meth:`stroma.checkpoint.durable.rows.Rows.runs`."""

    read_runs: ReadRuns
    execute: Execute
    query: RunQuery
    limit: int
    after: str | None
    max_filtered: int | None


def find_runs(
    read_runs: ReadRuns,
    execute: Execute,
    query: RunQuery,
    *,
    limit: int,
    after: str | None,
    max_filtered: int | None,
) -> tuple[list[RunRow], str | None]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.runs`.

    Each status is a query of its own: only then do the rows come from an index in order.
    """
    page = _Page(read_runs, execute, query, limit + 1, after, max_filtered)
    runs: list[RunRow] = []
    examined_to: tuple[int, int] | None = None
    for status in query.statuses or (None,):
        rows, end = _find_with_status(page, status)
        runs += rows
        if end is not None and (examined_to is None or end > examined_to):
            examined_to = end
    runs.sort(key=_place, reverse=True)
    if examined_to is not None:  # Older runs have not been examined for each status.
        runs = [run for run in runs if _place(run) >= examined_to]
    if len(runs) > limit:
        return runs[:limit], _mark(*_place(runs[limit - 1]))
    return runs, None if examined_to is None else _mark(*examined_to)


def _place(run: RunRow) -> tuple[int, int]:
    return run.started_ms, run.run


def _mark(started_ms: int, run: int) -> str:
    return f"{started_ms}.{run}"


def _find_with_status(page: _Page, status: str | None) -> tuple[list[RunRow], tuple[int, int] | None]:
    """Return the runs with a status, and the place of the last examined run; None if all were examined."""
    query = page.query
    order = "r" if query.tag is None else "t"
    # Execution 0 has only states from save(): it is not a run of a pipeline.
    # A start below 0, which only damage causes, would have no mark.
    where = ["r.execution > 0", f"{order}.started_ms >= 0"]
    values: dict[str, Any] = {
        "pipeline": query.pipeline,
        "status": status,
        "since_ms": query.since_ms,
        "tag": query.tag,
    }
    conditions = {
        "pipeline": "r.pipeline = :pipeline",
        "status": "r.status = :status",
        "since_ms": f"{order}.started_ms >= :since_ms",
        "tag": "r.run = t.run AND t.tag = :tag",
    }
    where += [condition for name, condition in conditions.items() if values[name] is not None]
    if query.blocked:
        where.append("r.blocked_since_ms IS NOT NULL")
    if page.after is not None:
        where.append(f"({order}.started_ms, {order}.run) < (:after_ms, :after_run)")
        values["after_ms"], values["after_run"] = parse_run_mark(page.after)
    # CROSS JOIN: in SQLite, the tags first, in the order of their index.
    source = "runs r" if query.tag is None else "tags t CROSS JOIN runs r"
    inner = f"FROM {source} WHERE {' AND '.join(where)} ORDER BY {order}.started_ms DESC, {order}.run DESC"
    if not query.needs_scan:
        return page.read_runs(f"SELECT {RUN_COLUMNS} {inner} LIMIT :limit", **values, limit=page.limit), None
    condition, filter_values = _filter(query)
    bound = "" if page.max_filtered is None else f" LIMIT {int(page.max_filtered)}"
    statement = f"""SELECT {RUN_COLUMNS} FROM (SELECT r.* {inner}{bound}) r WHERE {condition}
        ORDER BY r.started_ms DESC, r.run DESC LIMIT :limit"""
    runs = page.read_runs(statement, **values, **filter_values, limit=page.limit)
    if page.max_filtered is None or len(runs) == page.limit:
        return runs, None
    last = f"SELECT r.started_ms, r.run {inner} LIMIT 2 OFFSET {int(page.max_filtered) - 1}"
    ends = page.execute(last, **values)
    return runs, (ends[0][0], ends[0][1]) if len(ends) == 2 else None


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
    if query.text is not None:
        values["text"] = "".join(ch.lower() if ch.isascii() else ch for ch in query.text)
        columns = ("r.run_id", "r.pipeline", "coalesce(r.error, '')")
        parts.append("(" + " OR ".join(f"strpos(lower({column}), :text) > 0" for column in columns) + ")")
    return " AND ".join(parts), values


_TALLY: Final = """SELECT bucket, pipeline, node_id, model, failure_class, count(*), sum(tokens *
    1.0), sum(cost_pico * 1.0), sum(wasted * 1.0), sum(duration_ns * 1.0), max(duration_ns * 1.0),
    digits FROM ( SELECT r.started_ms / :bucket_ms AS bucket, r.pipeline, a.node_id, a.model,
    a.failure_class, a.tokens, a.cost_pico, a.duration_ns, length(CAST(a.duration_ns AS text)) * 100 +
    CAST(substr(CAST(a.duration_ns AS text), 1, 2) AS integer) AS digits, CASE WHEN a.outcome =
    'success' OR EXISTS (SELECT 1 FROM steps s WHERE (s.run, s.execution, s.position, s.branch_key) =
    (a.run, a.execution, a.position, a.branch_key) AND (s.epoch, s.attempt, s.started_ns) = (a.epoch,
    a.attempt, a.started_ns)) THEN 0 ELSE a.cost_pico END AS wasted FROM (SELECT run, execution,
    pipeline, started_ms FROM runs WHERE execution > 0 AND started_ms >= :since_ms ORDER BY started_ms
    DESC, run DESC LIMIT :runs) r JOIN attempts a ON a.run = r.run AND a.execution = r.execution LIMIT
    :attempts) t GROUP BY bucket, pipeline, node_id, model, failure_class, digits"""


def tally(execute: Execute, since_ms: int, bucket_ms: int, runs: int, attempts: int) -> list[Tally]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.tally`.

    The sums are floats, since SQLite fails if a sum of integers overflows.
    """
    rows = execute(_TALLY, bucket_ms=bucket_ms, since_ms=since_ms, runs=runs, attempts=attempts)
    return [
        Tally(int(row[0]), *row[1:5], *map(int, row[5:]))
        for row in rows
        # In damaged rows, an invalid number counts as 0; rows with an invalid text are skipped.
        if isinstance(row[1], str)
        and isinstance(row[2], str)
        and all(isinstance(text, str | None) for text in row[3:5])
    ]


def attempt_page(rows: list[Any], limit: int) -> tuple[list[AttemptRecord], str | None]:
    """Return a page of attempts and the ``after`` of the next one.

    ``rows``: (*ATTEMPT_COLUMNS, epoch, size); one more than ``limit`` if there is a next page.
    """
    page = [parse_attempt(row[:-2], *row[-2:]) for row in rows[:limit]]
    return page, str(end_of_page(page[-1])) if len(rows) > limit else None
