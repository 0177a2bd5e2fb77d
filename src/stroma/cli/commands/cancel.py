"""`stroma cancel`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from stroma._utils.text import clean
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import TemporalCluster, reject_local_options, temporal_options

__all__ = ["cancel"]


@click.command()
@click.argument("run_", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.cancel/1".')
@db_option
@temporal_options
def cancel(run_: str, as_json: bool, db: str | None, **options: Any) -> None:
    """Cancel a run.

    The process that runs it, wherever it is, ends it as CANCELLED within about a second; a run without an owner is
    CANCELLED at once. Finished nodes are stored, and the run can be resumed. RUN is a run id, a prefix of one, or
    "last". With --temporal, workers cancel it within a heartbeat.
    """
    cluster = TemporalCluster.from_options(options)
    if cluster is not None:
        reject_local_options("the run is on the cluster, not in a store", "db")
        _cancel_on_temporal(cluster, run_, as_json)
        return
    database = Database.from_option(db)
    record = database.find(run_)
    with database.explain_errors():
        is_requested = asyncio.run(_cancel(database, record.run_id))
        after = database.reader.get_run(record.run_id) or record
    name = clean(record.run_id)
    if not is_requested:
        outcome, message = "ended", f"run {name} has ended already: it is {after.status}; nothing was changed"
    elif after.holder is not None or after.status != "CANCELLED":
        holder = after.holder or record.holder or "its owner"
        outcome = "asked"
        message = f"{holder} will cancel run {name} within about a second, unless a node blocks it"
    else:
        outcome, message = "cancelled", f"run {name} is CANCELLED; it had no owner"
    if as_json:
        emit(
            {
                "schema": "stroma.cancel/1",
                "run_id": record.run_id,
                "outcome": outcome,
                "holder": after.holder or record.holder if outcome == "asked" else None,
                "status": after.status,
            }
        )
    else:
        err.line(message)


def _cancel_on_temporal(cluster: TemporalCluster, run: str, as_json: bool) -> None:
    async def request_cancel() -> tuple[str, bool]:
        client = await cluster.connect()
        run_id = (await cluster.find(client, run)).id
        return run_id, await cluster.runner(client).cancel(run_id)

    run_id, is_requested = cluster.run(request_cancel())
    if as_json:
        outcome = "asked" if is_requested else "ended"
        emit(
            {
                "schema": "stroma.cancel/1",
                "run_id": run_id,
                "outcome": outcome,
                "holder": None,
                "status": None,
            }
        )
    elif is_requested:
        err.line(f"the workers of {cluster.name} will cancel run {clean(run_id)}")
    else:
        err.line(f"run {clean(run_id)} has ended already; nothing was changed")


async def _cancel(database: Database, run_id: str) -> bool:
    try:
        return await database.reader.cancel(run_id)
    finally:
        await database.close()
