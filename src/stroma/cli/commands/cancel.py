"""`stroma cancel`."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import click

from stroma._utils.text import clean
from stroma.cli.commands.completion import complete_run
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option

__all__ = ["cancel"]


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.cancel/1".')
@db_option
def cancel(run_: str, as_json: bool, db: str | None) -> None:
    """Cancel a run.

    The process that runs it, wherever it is, ends it as CANCELLED within about a second; a run without an
    owner is CANCELLED at once. Finished nodes are stored, and the run can be resumed. RUN is a run id, a
    prefix of one, or "last".
    """
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


async def _cancel(database: Database, run_id: str) -> bool:
    try:
        return await database.reader.cancel(run_id)
    finally:
        await database.close()
