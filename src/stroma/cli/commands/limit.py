"""`stroma limit`."""

from __future__ import annotations

import click

from stroma._utils.text import clean, format_duration, format_tokens, pluralize
from stroma.cli.output import emit, out
from stroma.cli.stores import Database, db_option
from stroma.limits.rate_limit import read_limit

__all__ = ["limit"]


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.limit/1".')
@click.option("--store", metavar="PATH_OR_URL", help="Same as --db.")
@db_option
def limit(name: str, as_json: bool, store: str | None, db: str | None) -> None:
    """Show a Limit in a store: the calls and tokens of the last minute, calls in flight, and its cooldown."""
    database = Database.from_option(store or db)
    state = database.read_named(read_limit, name, "no call was made under a limit")
    if as_json:
        emit({"schema": "stroma.limit/1", "name": name, **state._asdict()})
        return
    minute = f"{pluralize(state.requests, 'call')} and {format_tokens(state.tokens)} in the last minute"
    out.line((clean(name, 80), "bold"), f": {minute}, {pluralize(state.calls, 'call')} in flight")
    if state.cooldown_ms is not None:
        seconds = state.cooldown_ms / 1000
        rest = f"for another {format_duration(seconds)}" if seconds else "until a call succeeds"
        out.line(f"it is closed {rest}: the provider asked to wait")
