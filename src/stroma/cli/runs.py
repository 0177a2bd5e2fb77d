"""`stroma runs`."""

from __future__ import annotations

from typing import Any, Final

import click

from stroma.checkpoint.journal import RunRecord
from stroma.cli.output import Part, emit, err, out, table
from stroma.cli.stores import Database, db_option
from stroma.cli.words import ago, clean, iso, local, money, short_id, span
from stroma.trace import RunStatus

__all__ = ["run_data", "runs", "styled"]

_STATUSES: Final = ["RUNNING", *RunStatus]
_STYLES: Final = {
    "COMPLETED": "green",
    "RESUMED": "green",
    "FAILED": "bold red",
    "PARTIAL": "red",
    "RUNNING": "cyan",
}


def styled(status: str) -> tuple[str, str]:
    """A status in its colour."""
    return status, _STYLES.get(status, "yellow")


def run_data(record: RunRecord) -> dict[str, Any]:
    """A run as the JSON schemas show it."""
    return {
        "run_id": record.run_id,
        "pipeline": record.pipeline,
        "status": record.status,
        "execution": record.execution,
        "started": iso(record.started_ms),
        "updated": iso(record.updated_ms),
        "seconds": max(0, record.updated_ms - record.started_ms) / 1000,
        "nodes": record.nodes,
        "tokens": record.tokens,
        "cost_usd": record.cost_usd,
        "error": record.error,
        "holder": record.holder,
        "parent": record.parent,
    }


@click.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="At most N runs."
)
@click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
@click.option(
    "--status", type=click.Choice(_STATUSES, case_sensitive=False), help="Only runs with this status."
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.runs/1".')
@db_option
def runs(limit: int, pipeline: str | None, status: str | None, as_json: bool, db: str | None) -> None:
    """List the runs in the store, the newest first.

    NODES counts finished positions. A run whose process died stays RUNNING until somebody resumes it; the last column
    says whether anybody is at work on it.
    """
    database = Database.choose(db)
    store = database.reader
    records: list[RunRecord] = []
    if not database.is_empty:
        with database.explained():
            records = store.list_runs(limit=limit, pipeline=pipeline, status=status)
    if as_json:
        emit({"schema": "stroma.runs/1", "runs": [run_data(record) for record in records]})
        return
    if not records:
        what = "no run matches" if pipeline or status else "no runs yet"
        err.line(f"{what} in {database.name}; begin one: ", database.hint("run", "FILE.py:NAME"))
        return
    header = ("RUN", "PIPELINE", "STATUS", "NODES", "TOKENS", "COST", "STARTED", "DURATION", "ERROR")
    table(out, header, [_row(record) for record in records], right=frozenset({3, 4, 5, 7}))
    if any(record.status == "RUNNING" and record.holder is None for record in records):
        err.line(
            "go on with a run that nobody is at work on: ", database.hint("resume", "RUN", "FILE.py:NAME")
        )
    if len(records) == limit:
        err.line(("the newest ", "dim"), (f"{limit} runs; more with --limit", "dim"))


def _row(record: RunRecord) -> list[Part]:
    error = clean(record.error or "", 80)
    if record.status == "RUNNING":
        who = f"run by {clean(record.holder, 80)}" if record.holder else "nobody is at work on it any more"
        error = f"{who}; last record {ago(record.updated_ms)}"
    return [
        short_id(record.run_id),
        clean(record.pipeline, 30),
        styled(record.status),
        f"{record.nodes:,}",
        f"{record.tokens:,}",
        money(record.cost_usd),
        local(record.started_ms),
        span((record.updated_ms - record.started_ms) / 1000),
        error,
    ]
