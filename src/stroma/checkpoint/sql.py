"""SQL statements for a page of runs, in the syntax that SQLite and PostgreSQL share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from stroma.checkpoint.durable.integrity import parse_attempt
from stroma.checkpoint.durable.rows import AttemptSummary, RunRow
from stroma.checkpoint.records import RunQuery, Tally, marked

__all__ = ["Dialect", "attempt_page", "find_runs", "tally"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Differences of SQL syntax.

    Attributes:
        columns: of a RunRow, from ``runs r``.
        value: what stands for a parameter.
        has: whether the first text has the second in it.
        tagged: what joins a tag to its run in the order of the tags' index.
    """

    columns: str
    value: str
    has: str
    tagged: str


def find_runs(
    execute: Callable[[str, list[Any]], list[Any]],
    row: Callable[[Any], RunRow],
    dialect: Dialect,
    query: RunQuery,
    *,
    limit: int,
    after: str | None,
    look_at: int | None,
) -> tuple[list[RunRow], str | None]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.runs`.

    Of several statuses each is asked for by itself: only so does an index give them in order.
    """
    found: list[RunRow] = []
    seen_to: tuple[int, int] | None = None
    for status in query.statuses or (None,):
        rows, end = _find(execute, row, dialect, query, status, limit + 1, after, look_at)
        found += rows
        if end is not None and (seen_to is None or end > seen_to):
            seen_to = end
    found.sort(key=_place, reverse=True)
    if seen_to is not None:  # What is older has not been looked at for each status.
        found = [one for one in found if _place(one) >= seen_to]
    if len(found) > limit:
        return found[:limit], _mark(*_place(found[limit - 1]))
    return found, None if seen_to is None else _mark(*seen_to)


def tally(
    execute: Callable[[str, list[Any]], list[Any]],
    value: str,
    since_ms: int,
    bucket_ms: int,
    runs: int,
    attempts: int,
) -> list[Tally]:
    """See :meth:`stroma.checkpoint.durable.rows.Rows.tally`. SQLite gives up where a sum of integers overflows, so these are none."""
    statement = f"""SELECT bucket, pipeline, node_id, model, failure_class, count(*), sum(tokens * 1.0), sum(cost_pico * 1.0),
        sum(wasted * 1.0), sum(duration_ns * 1.0), max(duration_ns * 1.0) FROM (
        SELECT r.started_ms / {value} AS bucket, r.pipeline, a.node_id, a.model, a.failure_class, a.tokens, a.cost_pico, a.duration_ns,
        CASE WHEN a.outcome = 'success' OR EXISTS (SELECT 1 FROM steps s WHERE s.run = a.run AND s.execution = a.execution
        AND s.position = a.position AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt
        AND s.started_ns = a.started_ns) THEN 0 ELSE a.cost_pico END AS wasted
        FROM (SELECT run, execution, pipeline, started_ms FROM runs WHERE execution > 0 AND started_ms >= {value}
        ORDER BY started_ms DESC, run DESC LIMIT {value}) r JOIN attempts a ON a.run = r.run AND a.execution = r.execution
        LIMIT {value}) t GROUP BY bucket, pipeline, node_id, model, failure_class"""
    found = execute(statement, [bucket_ms, since_ms, runs, attempts])
    return [
        Tally(int(row[0]), *row[1:5], *map(int, row[5:]))
        for row in found
        # Of a damaged row, a number that is none counts as 0, and what belongs to no text is left out.
        if isinstance(row[1], str)
        and isinstance(row[2], str)
        and all(isinstance(t, str | None) for t in row[3:5])
    ]


def attempt_page(found: list[Any], limit: int) -> tuple[list[AttemptSummary], str | None]:
    """A page of what was found, one more than the page has if there is another one. Rows: Attempt, epoch, size."""
    told = [AttemptSummary(parse_attempt(row[:-2]), row[-1], row[-2]) for row in found[:limit]]
    if len(found) <= limit:
        return told, None
    last = told[-1].attempt
    return told, f"{told[-1].epoch}:{last.position}:{last.started_ns}:{last.attempt}:{last.branch}"


def _place(found: RunRow) -> tuple[int, int]:
    return found.started_ms, found.run


def _mark(started_ms: int, run: int) -> str:
    return f"{started_ms}.{run}"


_FAILED: Final = """EXISTS (SELECT 1 FROM attempts a WHERE a.run = r.run AND a.execution = r.execution
    AND a.failure_class IS NOT NULL"""


def _find(
    execute: Callable[[str, list[Any]], list[Any]],
    row: Callable[[Any], RunRow],
    dialect: Dialect,
    query: RunQuery,
    status: str | None,
    limit: int,
    after: str | None,
    look_at: int | None,
) -> tuple[list[RunRow], tuple[int, int] | None]:
    """The runs of one status; and if not all were looked at, the last one that was."""
    value = dialect.value
    order = "r" if query.tag is None else "t"
    source = "runs r" if query.tag is None else dialect.tagged
    # Execution 0 has only what save() kept: no run of a pipeline.
    # A start below 0, which only damage makes, would have no mark.
    where, given = ["r.execution > 0", f"{order}.started_ms >= 0"], list[Any]()
    for condition, wanted in (
        (f"t.tag = {value}", query.tag),
        (f"r.pipeline = {value}", query.pipeline),
        (f"r.status = {value}", status),
        (f"{order}.started_ms >= {value}", query.since_ms),
    ):
        if wanted is not None:
            where.append(condition)
            given.append(wanted)
    if after is not None:
        where.append(f"({order}.started_ms, {order}.run) < ({value}, {value})")
        given += marked(after)
    inner = f"FROM {source} WHERE {' AND '.join(where)} ORDER BY {order}.started_ms DESC, {order}.run DESC"
    if not query.looks_closer:
        found = execute(f"SELECT {dialect.columns} {inner} LIMIT {value}", [*given, limit])
        return [row(one) for one in found], None
    closer, wanted_closer = _closer(dialect, query)
    bound = "" if look_at is None else f" LIMIT {int(look_at)}"
    statement = f"""SELECT {dialect.columns} FROM (SELECT r.* {inner}{bound}) r WHERE {closer}
        ORDER BY r.started_ms DESC, r.run DESC LIMIT {value}"""
    found = [row(one) for one in execute(statement, [*given, *wanted_closer, limit])]
    if look_at is None or len(found) == limit:
        return found, None
    last = f"SELECT r.started_ms, r.run {inner} LIMIT 2 OFFSET {int(look_at) - 1}"
    ends = execute(last, given)
    return found, (ends[0][0], ends[0][1]) if len(ends) == 2 else None


def _closer(dialect: Dialect, query: RunQuery) -> tuple[str, list[Any]]:
    """Return the conditions that are checked for each run, with their parameters."""
    parts, given = [], list[Any]()
    if query.failure_class is not None or query.node is not None:
        failed = _FAILED
        for column, wanted in (("failure_class", query.failure_class), ("node_id", query.node)):
            if wanted is not None:
                failed += f" AND a.{column} = {dialect.value}"
                given.append(wanted)
        parts.append(failed + ")")
    if query.text is not None:
        part = "".join(ch.lower() if ch.isascii() else ch for ch in query.text)
        columns = ("r.run_id", "r.pipeline", "coalesce(r.error, '')")
        parts.append("(" + " OR ".join(dialect.has.format(column) for column in columns) + ")")
        given += [part] * len(columns)
    return " AND ".join(parts), given
