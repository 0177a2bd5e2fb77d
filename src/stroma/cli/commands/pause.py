"""`stroma pause`."""

from __future__ import annotations

import click

from stroma._utils.text import clean
from stroma.cli.commands.completion import complete_run
from stroma.cli.formatting import id_word
from stroma.cli.output import emit, err
from stroma.cli.requests import request_of
from stroma.cli.stores import Database, db_option

__all__ = ["pause"]


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.pause/1".')
@db_option
def pause(run_: str, as_json: bool, db: str | None) -> None:
    """Pause a run until it is resumed.

    When this command ends, within about a second, no process starts another attempt of the run. Attempts in
    flight finish and are stored; then the run is SUSPENDED. Workers do not continue it until `stroma resume
    RUN` removes the pause. RUN is a run id, a prefix of one, or "last".
    """
    database = Database.from_option(db)
    record = database.find(run_)
    is_paused = request_of(database, record.run_id, "pause")
    after = database.get_run(record.run_id) or record
    with database.explain_errors():
        is_unread = is_paused and database.reader.is_request_pending(record.run_id)
    outcome = "ended" if not is_paused else "paused" if after.holder is None else "asked"
    if as_json:
        emit(
            {
                "schema": "stroma.pause/1",
                "run_id": record.run_id,
                "outcome": outcome,
                "holder": after.holder,
                "status": after.status,
            }
        )
        return
    name = clean(record.run_id)
    if not is_paused:
        err.line(f"run {name} has ended already: it is {after.status}; nothing was changed")
        return
    if after.holder is None:
        err.line(f"run {name} is {after.status}, paused")
    elif is_unread:
        err.line(
            f"run {name} will be paused: {after.holder} has not read the request, and may begin further attempts"
        )
    else:
        err.line(f"run {name} is paused: {after.holder} begins no further attempt; those at work finish")
    err.line(f"continue it: {database.hint('resume', id_word(record.run_id))}")
