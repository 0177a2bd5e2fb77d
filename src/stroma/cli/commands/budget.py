"""`stroma budget`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from stroma._utils.text import clean, format_tokens, format_usd, pluralize
from stroma.cli.formatting import format_local_time
from stroma.cli.output import emit, out, table
from stroma.cli.stores import Database, db_option
from stroma.limits.shared_budget import BudgetState, read_budget

__all__ = ["budget"]


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.budget/1".')
@click.option("--store", metavar="PATH_OR_URL", help="Same as --db.")
@db_option
def budget(name: str, as_json: bool, store: str | None, db: str | None) -> None:
    """Show a SharedBudget: its limit, the usage of each node, and the reservations of calls in flight.

    The limit is that of the process that used it last.
    """
    database = Database.from_option(store or db)
    state = database.read_named(read_budget, name, "no run has spent from a shared budget")
    if as_json:
        emit(_data(state))
        return
    per = "in all" if state.per is None else f"per {state.per}"
    out.line((clean(state.name, 80), "bold"), f": {per}, {pluralize(state.calls, 'call')} in flight")
    rows = []
    for limit, spent, reserved, format_value in (
        (state.max_cost_usd, state.spent_usd, state.reserved_usd, format_usd),
        (state.max_tokens, state.spent_tokens, state.reserved_tokens, format_tokens),
    ):
        format_amount: Any = format_value
        remaining = "" if limit is None else format_amount(max(0, limit - spent - reserved))
        rows.append(
            [
                format_amount(spent),
                format_amount(reserved),
                remaining,
                "no limit" if limit is None else format_amount(limit),
            ]
        )
    table(out, ("SPENT", "RESERVED", "LEFT", "LIMIT"), rows, right=frozenset({0, 1, 2, 3}))
    if state.by_node:
        nodes = [
            [clean(node, 60), format_usd(usd), format_tokens(tokens)]
            for node, (usd, tokens) in state.by_node.items()
        ]
        table(out, ("NODE", "COST", "TOKENS"), nodes, right=frozenset({1, 2}))
    if state.window_end is not None:
        out.line(f"it resets at {format_local_time(int(state.window_end.timestamp() * 1000))}")


def _data(state: BudgetState) -> dict[str, Any]:
    return {
        "schema": "stroma.budget/1",
        "name": state.name,
        "per": state.per,
        "window_start": _iso(state.window_start),
        "window_end": _iso(state.window_end),
        "limit": {"cost_usd": state.max_cost_usd, "tokens": state.max_tokens},
        "spent": {"cost_usd": state.spent_usd, "tokens": state.spent_tokens},
        "reserved": {"cost_usd": state.reserved_usd, "tokens": state.reserved_tokens},
        "calls": state.calls,
        "nodes": {node: {"cost_usd": usd, "tokens": tokens} for node, (usd, tokens) in state.by_node.items()},
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
