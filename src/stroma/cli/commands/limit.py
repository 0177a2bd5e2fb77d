"""`stroma limit`."""

from __future__ import annotations

import click

from stroma._utils.text import clean, format_duration, format_tokens, pluralize
from stroma.cli.errors import Code, Problem
from stroma.cli.output import emit, out
from stroma.cli.stores import Database, db_option
from stroma.limits.rate_limit import read_limit
from stroma.limits.rate_state import LimitState

__all__ = ["limit"]


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.limit/1".')
@click.option("--store", metavar="PATH_OR_URL", help="Same as --db.")
@db_option
def limit(name: str, as_json: bool, store: str | None, db: str | None) -> None:
    """Show a Limit in a store: the calls and tokens of the last minute, calls in flight, and its cooldown."""
    database = Database.from_option(store or db)
    reader = database.reader
    state: LimitState | None = None
    with database.explain_errors():
        try:
            state = None if database.is_empty else read_limit(reader, name)
        except ValueError as error:  # Not a valid name.
            raise Problem(str(error), code=Code.USAGE) from None
    if state is None:
        raise Problem(
            f"no call was made under a limit {clean(name, 100)!r} in {database.name}",
            "check its name, and pass the store that it uses: --db",
            code=Code.NOT_FOUND,
        )
    if as_json:
        emit({"schema": "stroma.limit/1", "name": name, **state._asdict()})
        return
    minute = f"{pluralize(state.requests, 'call')} and {format_tokens(state.tokens)} in the last minute"
    out.line((clean(name, 80), "bold"), f": {minute}, {pluralize(state.calls, 'call')} in flight")
    if state.cooldown_ms is not None:
        seconds = state.cooldown_ms / 1000
        rest = f"for another {format_duration(seconds)}" if seconds else "until a call succeeds"
        out.line(f"it is closed {rest}: the provider asked to wait")
