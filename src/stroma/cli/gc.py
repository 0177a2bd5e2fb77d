"""`stroma gc`."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from typing import Any, Final

import click

from stroma.checkpoint.payloads import blob_store
from stroma.cli.errors import Code, Problem
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.cli.words import plural

__all__ = ["gc"]

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST: Final = 86_400 * 365 * 1000


def _keep_for(_ctx: click.Context, _parameter: click.Parameter, value: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else _LONGEST + 1
    if seconds > _LONGEST:
        raise click.BadParameter(
            f"{value!r} is no span of time; give a number and one of s, m, h, d and w: 30d, 12h"
        )
    return timedelta(seconds=seconds)


@click.command()
@click.option(
    "--keep-for",
    required=True,
    callback=_keep_for,
    metavar="SPAN",
    help="Delete what ended longer ago: a number and s, m, h, d or w (30d).",
)
@click.option("--unfinished", is_flag=True, help="Also runs that could be resumed, and wait for a person.")
@click.option(
    "--blobs",
    metavar="PATH_OR_URL",
    help="Where the store's programs keep large payloads (their blobs=): also delete those that no run names.",
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.gc/1".')
@db_option
def gc(keep_for: timedelta, unfinished: bool, blobs: str | None, as_json: bool, db: str | None) -> None:
    """Delete old runs from the store, and all that was kept of them.

    Those that are COMPLETED, RESUMED, FAILED or CANCELLED; the others could be resumed. A run that somebody is at work
    on is never touched.
    """
    database = Database.choose(db)
    store = database.reader
    options: dict[str, Any] = {"keep_for": keep_for, "unfinished": unfinished}
    if blobs is not None:
        try:
            options["blobs"] = blob_store(blobs)
        except (ImportError, ValueError) as error:
            raise Problem(f"--blobs {blobs}: {error}", code=Code.ENVIRONMENT) from error
    gone = (0, 0)
    if not database.is_empty:
        with database.explained():
            gone = asyncio.run(_collect(database, store, options))
    if as_json:
        emit({"schema": "stroma.gc/1", "runs": gone[0], "blobs": gone[1]})
        return
    what = plural(gone[0], "run") + (f" and {plural(gone[1], 'blob')}" if blobs is not None else "")
    err.line(f"{what} deleted from {database.name}")


async def _collect(database: Database, store: Any, options: dict[str, Any]) -> tuple[int, int]:
    try:
        runs, blobs = await store.gc(**options)
    finally:
        await database.close()
    return runs, blobs
