"""`stroma cancel`."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import click

from stroma._utils.text import clean
from stroma.cli.commands.completion import complete_run
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import TemporalCluster, reject_local_options, temporal_options

__all__ = ["cancel"]


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
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
        done = _cancel_on_temporal(cluster, run_)
    else:
        done = _cancel_in_store(Database.from_option(db), run_)
    if as_json:
        data = done._asdict()
        del data["message"]
        emit({"schema": "stroma.cancel/1", **data})
    else:
        err.line(done.message)


class _Cancellation(NamedTuple):
    """Result of a cancellation. ``outcome``: "asked", "cancelled" or "ended"; ``holder``: owner of the run, if known."""

    run_id: str
    outcome: str
    holder: str | None
    status: str | None
    message: str


def _cancel_in_store(database: Database, run: str) -> _Cancellation:
    record = database.find(run)
    with database.explain_errors():
        is_requested = asyncio.run(_cancel(database, record.run_id))
        after = database.reader.get_run(record.run_id) or record
    name = clean(record.run_id)
    if not is_requested:
        message = f"run {name} has ended already: it is {after.status}; nothing was changed"
        return _Cancellation(record.run_id, "ended", None, after.status, message)
    if after.holder is None and after.status == "CANCELLED":
        message = f"run {name} is CANCELLED; it had no owner"
        return _Cancellation(record.run_id, "cancelled", None, after.status, message)
    owner = after.holder or record.holder
    message = (
        f"{owner or 'its owner'} will cancel run {name} within about a second, unless a node blocks it or its code reads "
        "no requests"
    )
    return _Cancellation(record.run_id, "asked", owner, after.status, message)


def _cancel_on_temporal(cluster: TemporalCluster, run: str) -> _Cancellation:
    async def request_cancel() -> tuple[str, bool]:
        client = await cluster.connect()
        run_id = (await cluster.find(client, run)).id
        return run_id, await cluster.runner(client).cancel(run_id)

    run_id, is_requested = cluster.run(request_cancel())
    if is_requested:
        message = f"the workers of {cluster.name} will cancel run {clean(run_id)}"
    else:
        message = f"run {clean(run_id)} has ended already; nothing was changed"
    return _Cancellation(run_id, "asked" if is_requested else "ended", None, None, message)


async def _cancel(database: Database, run_id: str) -> bool:
    try:
        return await database.reader.cancel(run_id)
    finally:
        await database.close()
