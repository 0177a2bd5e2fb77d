"""`stroma cancel`."""

from __future__ import annotations

import asyncio

import click

from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.cli.words import clean

__all__ = ["cancel"]


@click.command()
@click.argument("run_", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.cancel/1".')
@db_option
def cancel(run_: str, as_json: bool, db: str | None) -> None:
    """Ask for the end of a run.

    Whoever is at work on it, in any process, ends it as CANCELLED within about a second; a run that nobody is at work
    on is CANCELLED at once. What is finished is kept, and the run can be resumed. RUN is a run id, its beginning, or
    "last".
    """
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


async def _cancel(database: Database, run_id: str) -> bool:
    try:
        return await database.reader.cancel(run_id)
    finally:
        await database.close()
