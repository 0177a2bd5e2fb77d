"""`stroma budget`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from stroma._utils.text import clean, count, money, plural
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import local
from stroma.cli.output import emit, out, table
from stroma.cli.stores import Database, db_option
from stroma.limits.shared_budget import BudgetState, read_budget

__all__ = ["budget"]


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.budget/1".')
@click.option("--store", metavar="PATH_OR_URL", help="The same as --db.")
@db_option
def budget(name: str, as_json: bool, store: str | None, db: str | None) -> None:
    """Show a SharedBudget: its limit, what was spent of it and by which nodes, and what calls in flight have reserved.

    The limit is the one of the process that used it last.
    """
    database = Database.choose(store or db)
    kept = database.reader
    found: BudgetState | None = None
    with database.explained():
        try:
            found = None if database.is_empty else read_budget(kept, name)
        except ValueError as error:  # No text that a name can be.
            raise Problem(str(error), code=Code.USAGE) from None
    if found is None:
        raise Problem(
            f"no run has spent from a shared budget {clean(name, 100)!r} in {database.name}",
            "check its name, and give the store that it was made with: --db",
            code=Code.NOT_FOUND,
        )
    if as_json:
        emit(_data(found))
        return
    per = "in all" if found.per is None else f"per {found.per}"
    out.line((clean(found.name, 80), "bold"), f": {per}, {plural(found.calls, 'call')} in flight")
    rows = []
    for limit, spent, reserved, shown in (
        (found.max_cost_usd, found.spent_usd, found.reserved_usd, money),
        (found.max_tokens, found.spent_tokens, found.reserved_tokens, count),
    ):
        words: Any = shown
        left = "" if limit is None else words(max(0, limit - spent - reserved))
        rows.append([words(spent), words(reserved), left, "no limit" if limit is None else words(limit)])
    table(out, ("SPENT", "RESERVED", "LEFT", "LIMIT"), rows, right=frozenset({0, 1, 2, 3}))
    if found.by_node:
        nodes = [
            [clean(node, 60), money(usd), count(tokens)] for node, (usd, tokens) in found.by_node.items()
        ]
        table(out, ("NODE", "COST", "TOKENS"), nodes, right=frozenset({1, 2}))
    if found.window_end is not None:
        out.line(f"it begins anew at {local(int(found.window_end.timestamp() * 1000))}")


def _data(found: BudgetState) -> dict[str, Any]:
    return {
        "schema": "stroma.budget/1",
        "name": found.name,
        "per": found.per,
        "window_start": _iso(found.window_start),
        "window_end": _iso(found.window_end),
        "limit": {"cost_usd": found.max_cost_usd, "tokens": found.max_tokens},
        "spent": {"cost_usd": found.spent_usd, "tokens": found.spent_tokens},
        "reserved": {"cost_usd": found.reserved_usd, "tokens": found.reserved_tokens},
        "calls": found.calls,
        "nodes": {node: {"cost_usd": usd, "tokens": tokens} for node, (usd, tokens) in found.by_node.items()},
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
