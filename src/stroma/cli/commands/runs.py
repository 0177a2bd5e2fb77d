"""`stroma runs`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, Literal

import click

from stroma._utils.text import clean, format_duration, format_usd, pluralize, short_id
from stroma.checkpoint.decisions import MESSAGE_SENT, UNFINISHED
from stroma.checkpoint.history.facts import STATUSES, count_causes, elapsed_seconds, is_interrupted, status_of
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.queue import QUEUED, BlockedMark
from stroma.checkpoint.records import FAILED, AttemptRecord, RunQuery, RunRecord
from stroma.cli.formatting import SPAN, format_age, format_local_time, localize, style_status, to_iso
from stroma.cli.output import Part, emit_fields, err, out, table
from stroma.cli.stores import Database, db_option
from stroma.failures.classes import FailureClass, describe_class

_MAX_COUNTED: Final = 1_000  # 5,000 take a second on Redis
_MAX_CAUSES: Final = 10


def run_data(record: RunRecord) -> dict[str, Any]:
    """Return a run in the form of the JSON schemas."""
    return {
        "run_id": record.run_id,
        "pipeline": record.pipeline,
        "status": status_of(record),
        "execution": record.execution,
        "started": to_iso(record.started_ms),
        "updated": to_iso(record.updated_ms),
        "due": None if (due_ms := _due_ms(record)) is None else to_iso(due_ms),
        "seconds": record.seconds,
        "nodes": record.nodes,
        "commits": record.commits,
        "tokens": record.tokens,
        "cost_usd": record.cost_usd,
        "error": record.error,
        "holder": record.holder,
        "parent": record.parent,
        "tags": list(record.tags),
        "version": record.version,
        "blocked": None if record.blocked is None else _blocked_data(record.blocked, record.version),
        "cause": None if record.cause is None else cause_data(record.cause),
    }


def done_text(record: RunRecord) -> str:
    """Return the number of finished positions of a run in words, and of the calls inside them so far."""
    inside = max(0, record.commits - record.nodes)
    if not inside:
        return f"{record.nodes:,} finished"
    calls = pluralize(inside, "call")
    return f"{record.nodes:,} finished, {calls} inside" if record.nodes else f"{calls} done"


def _blocked_data(mark: BlockedMark, version: str | None) -> dict[str, Any]:
    """Return the mark of a blocked run in the form of the JSON schemas. ``version``: that of the run."""
    return {
        "message": mark.message,
        "version": version,
        "since": to_iso(mark.since_ms),
        "code": mark.codes[-1] if mark.codes else None,
    }


def _due_ms(record: RunRecord) -> int | None:
    """Return when a run is due, in ms since the epoch; None: never by itself, or it is running."""
    if record.due_ms is None or record.status not in UNFINISHED:
        return None
    # At once since its last record.
    return record.updated_ms if record.due_ms <= MESSAGE_SENT else record.due_ms


def cause_data(cause: AttemptRecord) -> dict[str, Any]:
    """Return the failed attempt that stopped a run, in the form of the JSON schemas."""
    return {
        "node_id": cause.node_id,
        "position": cause.position,
        "branch": cause.branch,
        "attempt": cause.attempt,
        "class": cause.failure_class,
        "reason": cause.reason,
        "error_type": cause.error_type,
        "message": cause.message,
    }


def filter_options(func: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that select runs to a command, which gets them as ``query``."""

    @click.option("--failed", is_flag=True, help="Only runs that are FAILED or PARTIAL.")
    @click.option(
        "--status",
        "statuses",
        type=click.Choice(STATUSES, case_sensitive=False),
        multiple=True,
        help="Only runs with this status; may be repeated.",
    )
    @click.option(
        "--since", type=SPAN, metavar="SPAN", help="Maximum age: a number and s, m, h, d or w (1h)."
    )
    @click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
    @click.option("--tag", metavar="TAG", help="Only runs with this tag.")
    @click.option(
        "--class",
        "failure_class",
        type=click.Choice(list(FailureClass), case_sensitive=False),
        help="Only runs with a failed attempt of this class.",
    )
    @click.option("--node", metavar="NODE", help="Only runs with an attempt of this node that failed.")
    @click.option("--blocked", is_flag=True, help="Only runs that code could not continue.")
    @click.option(
        "--search", "text", metavar="TEXT", help="Only runs with TEXT in their id, pipeline or error."
    )
    @functools.wraps(func)
    def call(*, failed: bool, statuses: tuple[str, ...], since: timedelta | None, **options: Any) -> Any:
        if failed and statuses:
            raise click.UsageError("--failed is short for --status FAILED --status PARTIAL; pass one of them")
        wanted_statuses = FAILED if failed else tuple(dict.fromkeys(status.upper() for status in statuses))
        since_ms = None if since is None else int((time.time() - since.total_seconds()) * 1000)
        fields = {one.name for one in dataclasses.fields(RunQuery)} & options.keys()
        filters = {name: options.pop(name) for name in fields}
        return func(query=RunQuery(statuses=wanted_statuses, since_ms=since_ms, **filters), **options)

    return call


@click.command()
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Maximum number of runs.",
)
@filter_options
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.runs/1".')
@db_option
def runs(query: RunQuery, limit: int, as_json: bool, db: str | None) -> None:
    """List the runs in a store, newest first.

    NODES counts finished positions; while the first one is a flow or group in progress, the calls done in it.
    A run whose process died is INTERRUPTED until it is resumed. A blocked run is as it was before some code
    tried to continue it, and could not: code that fits continues it. The totals below count all runs that
    match, 1,000 at most.
    """
    database = Database.from_option(db)
    store = database.reader
    most = min(max(limit, _MAX_COUNTED), 2**31)  # Stores cannot take every integer.
    records = [] if database.is_empty else History(store).runs(query, most + 1)
    if records or as_json:
        print_runs(database, records[:most], limit, as_json=as_json, has_more=len(records) > most)
        return
    if query != RunQuery():
        err.line(f"no run matches in {database.name}; list all: ", database.hint("runs"))
    else:
        err.line(f"no runs yet in {database.name}; begin one: ", database.hint("run", "FILE.py:NAME"))
    for line in database.other_stores:
        err.line(f"  {line}")


def print_runs(
    database: Database, records: Sequence[RunRecord], limit: int, *, as_json: bool, has_more: bool = False
) -> None:
    """Print the first ``limit`` runs on stdout; with them, or on stderr, the totals of all.

    ``has_more``: further runs match, which are not counted.
    """
    shown, totals = records[:limit], _totals(records)
    if as_json:
        emit_fields("stroma.runs/1", runs=[run_data(record) for record in shown], totals=totals)
        return
    header = ("RUN", "PIPELINE", "STATUS", "NODES", "TOKENS", "COST", "STARTED", "DURATION", "MESSAGE")
    table(
        out, header, [_row(record) for record in shown], right=frozenset({3, 4, 5, 7}), spare=(4, 6, 3, 1, 7)
    )
    reasons: set[Literal["resume", "budget"]] = {one.waits_for for one in shown if one.waits_for is not None}
    for reason in sorted(reasons):
        from stroma.cli.suspended import held_hints  # It needs what runs pipelines.

        for line in held_hints(database, "RUN", reason):
            err.line(line)
    if any(map(is_interrupted, shown)):
        err.line("resume a run without owner: ", database.hint("resume", "RUN", "FILE.py:NAME"))
    if len(records) > 1:
        _print_totals(totals, len(shown), has_more=has_more)


def _totals(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the numbers of runs by status and by cause, in the form of the JSON schemas."""
    counts = Counter(map(status_of, records))
    return {
        "runs": len(records),
        "statuses": {status: counts[status] for status in STATUSES if counts[status]},
        "causes": [
            {"node_id": node_id, "class": failure_class, "reason": reason, "runs": count}
            for (node_id, failure_class, reason), count in count_causes(records)
        ],
    }


def _print_totals(totals: dict[str, Any], shown: int, *, has_more: bool) -> None:
    count, causes = totals["runs"], totals["causes"]
    runs = f"{count:,}{'+' if has_more else ''} runs"
    statuses = ", ".join(f"{number:,} {status}" for status, number in totals["statuses"].items())
    more = f"; the newest {shown:,} are listed, more with --limit" if shown < count else ""
    err.line((f"{runs}: {statuses}{more}", "dim"))
    for cause in causes[:_MAX_CAUSES]:
        why = describe_class(cause["class"], cause["reason"])
        err.line((f"  {cause['runs']:,} stopped by node {clean(cause['node_id'], 60)!r}: {why}", "dim"))
    if len(causes) > _MAX_CAUSES:
        err.line((f"  and {pluralize(len(causes) - _MAX_CAUSES, 'other cause')}", "dim"))


def _row(record: RunRecord) -> list[Part]:
    error = clean(localize(record.stop_text or ""), 160)
    if record.blocked is not None and record.holder is None:
        seconds = max(0.0, time.time() - record.blocked.since_ms / 1000)
        error = f"blocked for {format_duration(seconds)}: {clean(record.blocked.message, 160)}"
    elif record.status == "RUNNING":
        who = f"run by {clean(record.holder, 80)}" if record.holder else "owner lost"
        error = f"{who}; last record {format_age(record.updated_ms)}"
    elif record.status == QUEUED:
        error = f"due at {format_local_time(record.due_ms or 0)}"
    return [
        short_id(record.run_id),
        clean(record.pipeline, 30),
        style_status(status_of(record)),
        f"{record.nodes:,}" if record.nodes or not record.commits else pluralize(record.commits, "call"),
        f"{record.tokens:,}",
        format_usd(record.cost_usd),
        format_local_time(record.started_ms),
        format_duration(elapsed_seconds(record)),
        error,
    ]
