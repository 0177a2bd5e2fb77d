"""SQL statements for a page of runs, in the syntax that SQLite and PostgreSQL share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from stroma.checkpoint.durable.integrity import parse_attempt
from stroma.checkpoint.durable.rows import RunRow
from stroma.checkpoint.records import AttemptRecord, RunQuery, Tally, end_of_page, parse_run_mark

__all__ = ["Dialect", "attempt_page", "find_runs", "tally"]

#: Executes a statement with its parameters, and returns all rows.
Execute = Callable[[str, list[Any]], list[Any]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Differences of SQL syntax between databases.

    Attributes:
        columns: columns of a RunRow, from ``runs r``.
        parse: converts these columns to a RunRow.
        value: placeholder of a parameter.
        contains: template of a condition: a lower-case text contains a parameter.
        tagged: join of tags and runs, in the order of the index of tags.
    """

    columns: str
    parse: Callable[[Any], RunRow]
    value: str
    contains: str
    tagged: str


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of runs to find. ``limit``: number of runs; otherwise see :meth:`stroma.checkpoint.durable.rows.Rows.runs`."""

    query: RunQuery
    limit: int
    after: str | None
    max_filtered: int | None


def find_runs(
    execute: Execute,
    dialect: Dialect,
    query: RunQuery,
    *,
    limit: int,
    after: str | None,
    max_filtered: int | None,
) -> tuple[list[RunRow], str | None]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.runs`.

    Each status is a query of its own: only then do the rows come from an index in order.
    """
    page = _Page(query, limit + 1, after, max_filtered)
    runs: list[RunRow] = []
    examined_to: tuple[int, int] | None = None
    for status in query.statuses or (None,):
        rows, end = _find_with_status(execute, dialect, page, status)
        runs += rows
        if end is not None and (examined_to is None or end > examined_to):
            examined_to = end
    runs.sort(key=_place, reverse=True)
    if examined_to is not None:  # Older runs have not been examined for each status.
        runs = [run for run in runs if _place(run) >= examined_to]
    if len(runs) > limit:
        return runs[:limit], _mark(*_place(runs[limit - 1]))
    return runs, None if examined_to is None else _mark(*examined_to)


def tally(
    execute: Execute, value: str, since_ms: int, bucket_ms: int, runs: int, attempts: int
) -> list[Tally]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.tally`. ``value``: see Dialect.

    The sums are floats, since SQLite fails if a sum of integers overflows.
    """
    statement = f"""SELECT bucket, pipeline, node_id, model, failure_class, count(*), sum(tokens * 1.0), sum(cost_pico * 1.0),
        sum(wasted * 1.0), sum(duration_ns * 1.0), max(duration_ns * 1.0), digits FROM (
        SELECT r.started_ms / {value} AS bucket, r.pipeline, a.node_id, a.model, a.failure_class, a.tokens, a.cost_pico, a.duration_ns,
        length(CAST(a.duration_ns AS text)) * 100 + CAST(substr(CAST(a.duration_ns AS text), 1, 2) AS integer) AS digits,
        CASE WHEN a.outcome = 'success' OR EXISTS (SELECT 1 FROM steps s WHERE s.run = a.run AND s.execution = a.execution
        AND s.position = a.position AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt
        AND s.started_ns = a.started_ns) THEN 0 ELSE a.cost_pico END AS wasted
        FROM (SELECT run, execution, pipeline, started_ms FROM runs WHERE execution > 0 AND started_ms >= {value}
        ORDER BY started_ms DESC, run DESC LIMIT {value}) r JOIN attempts a ON a.run = r.run AND a.execution = r.execution
        LIMIT {value}) t GROUP BY bucket, pipeline, node_id, model, failure_class, digits"""
    return [
        Tally(int(row[0]), *row[1:5], *map(int, row[5:]))
        for row in execute(statement, [bucket_ms, since_ms, runs, attempts])
        # In damaged rows, an invalid number counts as 0; rows with an invalid text are skipped.
        if isinstance(row[1], str)
        and isinstance(row[2], str)
        and all(isinstance(t, str | None) for t in row[3:5])
    ]


def attempt_page(rows: list[Any], limit: int) -> tuple[list[AttemptRecord], str | None]:
    """Return a page of attempts and the ``after`` of the next one.

    ``rows``: (*ATTEMPT_COLUMNS, epoch, size); one more than ``limit`` if there is a next page.
    """
    page = [parse_attempt(row[:-2], *row[-2:]) for row in rows[:limit]]
    return page, str(end_of_page(page[-1])) if len(rows) > limit else None


def _place(run: RunRow) -> tuple[int, int]:
    return run.started_ms, run.run


def _mark(started_ms: int, run: int) -> str:
    return f"{started_ms}.{run}"


_FAILED: Final = """EXISTS (SELECT 1 FROM attempts a WHERE a.run = r.run AND a.execution = r.execution
    AND a.failure_class IS NOT NULL"""


def _find_with_status(
    execute: Execute, dialect: Dialect, page: _Page, status: str | None
) -> tuple[list[RunRow], tuple[int, int] | None]:
    """Return the runs with a status, and the place of the last examined run; None if all were examined."""
    query, value = page.query, dialect.value
    order = "r" if query.tag is None else "t"
    source = "runs r" if query.tag is None else dialect.tagged
    # Execution 0 has only states from save(): it is no run of a pipeline.
    # A start below 0, which only damage causes, would have no mark.
    where, parameters = ["r.execution > 0", f"{order}.started_ms >= 0"], list[Any]()
    for condition, parameter in (
        (f"t.tag = {value}", query.tag),
        (f"r.pipeline = {value}", query.pipeline),
        (f"r.status = {value}", status),
        (f"{order}.started_ms >= {value}", query.since_ms),
    ):
        if parameter is not None:
            where.append(condition)
            parameters.append(parameter)
    if query.blocked:
        where.append("r.blocked_since_ms IS NOT NULL")
    if page.after is not None:
        where.append(f"({order}.started_ms, {order}.run) < ({value}, {value})")
        parameters += parse_run_mark(page.after)
    inner = f"FROM {source} WHERE {' AND '.join(where)} ORDER BY {order}.started_ms DESC, {order}.run DESC"
    if not query.needs_scan:
        rows = execute(f"SELECT {dialect.columns} {inner} LIMIT {value}", [*parameters, page.limit])
        return list(map(dialect.parse, rows)), None
    conditions, filter_parameters = _filter(dialect, query)
    bound = "" if page.max_filtered is None else f" LIMIT {int(page.max_filtered)}"
    statement = f"""SELECT {dialect.columns} FROM (SELECT r.* {inner}{bound}) r WHERE {conditions}
        ORDER BY r.started_ms DESC, r.run DESC LIMIT {value}"""
    rows = execute(statement, [*parameters, *filter_parameters, page.limit])
    runs = list(map(dialect.parse, rows))
    if page.max_filtered is None or len(runs) == page.limit:
        return runs, None
    last = f"SELECT r.started_ms, r.run {inner} LIMIT 2 OFFSET {int(page.max_filtered) - 1}"
    ends = execute(last, parameters)
    return runs, (ends[0][0], ends[0][1]) if len(ends) == 2 else None


def _filter(dialect: Dialect, query: RunQuery) -> tuple[str, list[Any]]:
    """Return the conditions that are checked for each run, with their parameters."""
    parts, parameters = [], list[Any]()
    if query.failure_class is not None or query.node is not None:
        failed = _FAILED
        for column, parameter in (("failure_class", query.failure_class), ("node_id", query.node)):
            if parameter is not None:
                failed += f" AND a.{column} = {dialect.value}"
                parameters.append(parameter)
        parts.append(failed + ")")
    if query.text is not None:
        part = "".join(ch.lower() if ch.isascii() else ch for ch in query.text)
        columns = ("r.run_id", "r.pipeline", "coalesce(r.error, '')")
        parts.append("(" + " OR ".join(dialect.contains.format(column) for column in columns) + ")")
        parameters += [part] * len(columns)
    return " AND ".join(parts), parameters
