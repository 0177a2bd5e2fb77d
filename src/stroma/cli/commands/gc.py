"""`stroma gc`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from stroma._utils.text import pluralize
from stroma.checkpoint.payloads import blob_store
from stroma.cli.commands.runs import print_runs
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import SPAN
from stroma.cli.output import emit_fields, err
from stroma.cli.stores import Database, db_option


@click.command()
@click.option(
    "--older-than",
    "keep_for",
    required=True,
    type=SPAN,
    metavar="SPAN",
    help="Minimum age: a number and s, m, h, d or w (30d).",
)
@click.option("--unfinished", is_flag=True, help="Also delete suspended and other resumable runs.")
@click.option(
    "--blobs", metavar="PATH_OR_URL", help="Payload storage (blobs=) whose unused blobs are deleted too."
)
@click.option("--dry-run", is_flag=True, help="List the runs that would be deleted; delete nothing.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.gc/1".')
@db_option
def gc(
    keep_for: timedelta, unfinished: bool, blobs: str | None, dry_run: bool, as_json: bool, db: str | None
) -> None:
    """Delete old runs and their data from the store.

    Deletes runs that are COMPLETED, RESUMED, FAILED or CANCELLED; the others can be resumed. A run that has
    an owner is never deleted. With --dry-run, --json prints the schema of `stroma runs`.
    """
    if dry_run and blobs is not None:
        raise click.UsageError("--dry-run lists runs only; leave out --blobs")
    database = Database.from_option(db)
    store = database.reader
    if dry_run:
        run_ids = [] if database.is_empty else store.expired(keep_for, unfinished=unfinished)
        records = [one for run_id in run_ids if (one := store.get_run(run_id)) and one.holder is None]
        if records or as_json:
            print_runs(database, records, len(records), as_json=as_json)
        if not as_json:
            err.line(f"{pluralize(len(records), 'run')} would be deleted from {database.name}")
        return
    options: dict[str, Any] = {"keep_for": keep_for, "unfinished": unfinished}
    if blobs is not None:
        try:
            options["blobs"] = blob_store(blobs)
        except (ImportError, ValueError) as error:
            raise Problem(f"--blobs {blobs}: {error}", code=Code.ENVIRONMENT) from error
    gone = (0, 0)
    if not database.is_empty:
        gone = database.run(store.gc(**options))
    if as_json:
        emit_fields("stroma.gc/1", runs=gone[0], blobs=gone[1])
        return
    what = pluralize(gone[0], "run") + (f" and {pluralize(gone[1], 'blob')}" if blobs is not None else "")
    err.line(f"{what} deleted from {database.name}")
