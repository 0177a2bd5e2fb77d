"""`stroma budget` and `stroma limit`: show what calls share in a store, and change the budget of a run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.checkpoint.history.facts import status_of
from stroma.cli.commands.completion import complete_run
from stroma.cli.formatting import format_local_time, id_word, to_iso
from stroma.cli.options import FiniteRange
from stroma.cli.output import emit, emit_fields, err, out, table
from stroma.cli.stores import Database, db_option
from stroma.limits.rate_limit import read_limit
from stroma.limits.shared_budget import BudgetState, read_budget
from stroma.runner.stored_runs import limits_of, request


@click.command()
@click.argument("name", metavar="NAME_OR_RUN", shell_complete=complete_run)
@click.option("--cost-usd", type=FiniteRange(min=0), metavar="USD", help="New cost limit of a run.")
@click.option("--tokens", type=click.IntRange(min=0), metavar="N", help="New token limit of a run.")
@click.option("--latency-ms", type=click.IntRange(min=0), metavar="MS", help="New time limit of a run.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.budget/1".')
@db_option
def budget(
    name: str,
    cost_usd: float | None,
    tokens: int | None,
    latency_ms: int | None,
    as_json: bool,
    db: str | None,
) -> None:
    """Show a shared budget, or change the budget of a run.

    With NAME, print a SharedBudget: its limit, the usage of each node, and the reservations of calls in
    flight. The limit is that of the process that used it last.

    With --cost-usd, --tokens or --latency-ms the argument is a run: its id, or "last". The
    new limit applies from its next attempt on, in whatever process it is; other limits stay. A run that waits
    for its budget is continued by a worker, or by `stroma resume`.
    """
    database = Database.from_option(db)
    if (cost_usd, tokens, latency_ms) != (None, None, None):
        _set_of_run(database, name, limits_of(tokens, cost_usd, latency_ms), as_json)
        return
    state = database.read_named(read_budget, name, "no run has spent from a shared budget")
    if as_json:
        emit(_data(state))
        return
    per = "in all" if state.per is None else f"per {state.per}"
    out.line((clean(state.name, 80), "bold"), f": {per}, {pluralize(state.calls, 'call')} in flight")
    kinds: list[tuple[Any, float | None, float, float]] = [
        (format_usd, state.max_cost_usd, state.spent_usd, state.reserved_usd),
        (format_tokens, state.max_tokens, state.spent_tokens, state.reserved_tokens),
    ]
    rows = []
    for form, limit, spent, reserved in kinds:
        rest = ("", "no limit") if limit is None else (form(max(0, limit - spent - reserved)), form(limit))
        rows.append([form(spent), form(reserved), *rest])
    table(out, ("SPENT", "RESERVED", "LEFT", "LIMIT"), rows, right=frozenset({0, 1, 2, 3}))
    if state.by_node:
        nodes = [
            [clean(node, 60), format_usd(usd), format_tokens(tokens)]
            for node, (usd, tokens) in state.by_node.items()
        ]
        table(out, ("NODE", "COST", "TOKENS"), nodes, right=frozenset({1, 2}))
    if state.window_end is not None:
        out.line(f"it resets at {format_local_time(int(state.window_end.timestamp() * 1000))}")


def _set_of_run(database: Database, run: str, limits: Mapping[str, float], as_json: bool) -> None:
    record = database.find(run, to_change=True)
    is_set = database.run(request(database.reader, record.run_id, "set_budget", limits))
    after = database.get_run(record.run_id) or record
    if as_json:
        emit_fields(
            "stroma.budget/1",
            run_id=record.run_id,
            outcome="set" if is_set else "ended",
            limits=dict(limits),
            holder=after.holder,
            status=status_of(after),
        )
        return
    name = clean(record.run_id)
    if not is_set:
        err.line(f"run {name} has ended already: it is {after.status}; nothing was changed")
        return
    shown = ", ".join(f"{field} {limit:,}" for field, limit in limits.items())
    err.line(f"run {name} has a new budget: {shown}")
    if after.holder is None:
        target = database.target_of(record)
        err.line(f"continue it: {database.hint('resume', id_word(record.run_id), target)}")


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
    return None if at is None else to_iso(int(at.timestamp() * 1000))


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.limit/1".')
@db_option
def limit(name: str, as_json: bool, db: str | None) -> None:
    """Show a Limit in a store: the calls and tokens of the last minute, calls in flight, and its cooldown."""
    database = Database.from_option(db)
    state = database.read_named(read_limit, name, "no call was made under a limit")
    if as_json:
        emit_fields("stroma.limit/1", name=name, **state._asdict())
        return
    minute = f"{pluralize(state.requests, 'call')} and {format_tokens(state.tokens)} in the last minute"
    out.line((clean(name, 80), "bold"), f": {minute}, {pluralize(state.calls, 'call')} in flight")
    if state.cooldown_ms is not None:
        seconds = state.cooldown_ms / 1000
        rest = f"for another {format_duration(seconds)}" if seconds else "until a call succeeds"
        out.line(f"it is closed {rest}: the provider asked to wait")
