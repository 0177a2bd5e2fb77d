"""`stroma cancel`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from stroma._utils.text import clean
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import Cluster, cluster_options, only_here

__all__ = ["cancel"]


@click.command()
@click.argument("run_", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.cancel/1".')
@db_option
@cluster_options
def cancel(run_: str, as_json: bool, db: str | None, **options: Any) -> None:
    """Ask for the end of a run.

    Whoever is at work on it, in any process, ends it as CANCELLED within about a second; a run that nobody is at work
    on is CANCELLED at once. What is finished is kept, and the run can be resumed. RUN is a run id, its beginning, or
    "last". With --temporal, workers hear of it within a heartbeat.
    """
    cluster = Cluster.take(options)
    if cluster is not None:
        only_here("the run is on the cluster, not in a store", "db")
        _cancel_there(cluster, run_, as_json)
        return
    database = Database.choose(db)
    record = database.find(run_)
    with database.explained():
        wanted = asyncio.run(_cancel(database, record.run_id))
        after = database.reader.get_run(record.run_id) or record
    name = clean(record.run_id)
    if not wanted:
        outcome, told = "ended", f"run {name} had ended already: it is {after.status}; nothing was changed"
    elif after.holder is not None or after.status != "CANCELLED":
        holder = after.holder or record.holder or "its holder"
        outcome = "asked"
        told = (
            f"{holder} was asked to end run {name}; it does so within about a second, unless a node keeps it"
        )
    else:
        outcome, told = "cancelled", f"run {name} is CANCELLED; nobody was at work on it"
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
        err.line(told)


def _cancel_there(cluster: Cluster, run: str, as_json: bool) -> None:
    async def ask() -> tuple[str, bool]:
        client = await cluster.connect()
        run_id = (await cluster.find(client, run)).id
        return run_id, await cluster.runner(client).cancel(run_id)

    run_id, wanted = cluster.run(ask())
    if as_json:
        outcome = "asked" if wanted else "ended"
        emit(
            {
                "schema": "stroma.cancel/1",
                "run_id": run_id,
                "outcome": outcome,
                "holder": None,
                "status": None,
            }
        )
    elif wanted:
        err.line(f"the workers of {cluster.name} were asked to end run {clean(run_id)}")
    else:
        err.line(f"run {clean(run_id)} had ended already; nothing was changed")


async def _cancel(database: Database, run_id: str) -> bool:
    try:
        return await database.reader.cancel(run_id)
    finally:
        await database.close()
