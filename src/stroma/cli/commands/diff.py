"""`stroma diff`."""

from __future__ import annotations

from typing import Any

import click

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize, short_id
from stroma.checkpoint.history.bars import place_of
from stroma.checkpoint.history.comparison import Change, NodeDiff
from stroma.checkpoint.history.facts import status_of
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import style_status
from stroma.cli.output import Part, emit_fields, err, out, table
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.stores import Database, db_option
from stroma.trace.outline import shown_place

_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}


@click.command()
@click.argument("a", shell_complete=complete_run)
@click.argument("b", shell_complete=complete_run)
@click.option("--node", metavar="NODE", help="Node to compare.")
@click.option("--only-changed", is_flag=True, help="Print only differences.")
@redact_option
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.diff/1".')
@db_option
def diff(
    a: str, b: str, node: str | None, only_changed: bool, redact: str | None, as_json: bool, db: str | None
) -> int:
    """Compare two runs, node by node and field by field.

    Exit code 6 if they differ in the input, an output, an outcome, a class, a number of attempts or a model.
    Times and costs are shown, but do not count as differences.
    """
    database = Database.from_option(db)
    first, second = database.find(a), database.find(b)
    history = History(database.reader, load_redact(redact))
    started, nodes = history.compare(first, second)
    if node is not None:
        started, nodes = [], [one for one in nodes if _attempts(one)[0].node_id == node]
        if not nodes:
            raise Problem(
                f"neither run has a node {node!r}",
                f"list its nodes: {database.hint('show', short_id(first.run_id))}",
                code=Code.NOT_FOUND,
            )
    same = not started and all(one.same for one in nodes)
    if as_json:
        emit_fields("stroma.diff/1", **diff_data(first, second, started, nodes, only_changed))
    else:
        _print_diff(first, second, started, nodes, only_changed)
        if same:
            err.line("the same, but for what they took and cost")
    return Code.OK if same else Code.DIFFERENT


def diff_data(
    a: RunRecord, b: RunRecord, started: list[Change], nodes: list[NodeDiff], only_changed: bool
) -> dict[str, Any]:
    """Return what differs between two runs, in the form of the JSON schemas."""
    return {
        "a": run_data(a),
        "b": run_data(b),
        "same": not started and all(one.same for one in nodes),
        "input": [_change_data(change) for change in started],
        "nodes": [_node_data(one) for one in nodes if not (only_changed and one.same)],
    }


def _attempts(one: NodeDiff) -> list[AttemptRecord]:
    records = one.a if one.a is not None else one.b
    assert records is not None
    return records


def _print_diff(
    a: RunRecord, b: RunRecord, started: list[Change], nodes: list[NodeDiff], only_changed: bool
) -> None:
    out.fitted(*_summary(a, b, started, nodes))
    out.line()
    rows: list[list[Part]] = []
    for name, record in (("A", a), ("B", b)):
        about: list[Part] = [name, clean(record.run_id, 60), clean(record.pipeline, 30)]
        used = [format_tokens(record.tokens), format_usd(record.cost_usd)]
        took = format_duration(record.latency_ms / 1000)
        rows.append([*about, style_status(status_of(record)), f"{record.nodes:,}", *used, took])
    header = ("", "RUN", "PIPELINE", "STATUS", "NODES", "TOKENS", "COST", "ATTEMPTS TOOK")
    table(out, header, rows, right=frozenset({4, 5, 6}), spare=(2, 5, 4, 7))
    if started:
        out.line()
        out.line(("input", "bold"))
        _print_changes(started)
    for one in nodes:
        if one.same and only_changed:
            continue
        attempts = _attempts(one)
        name = f"{shown_place(place_of(attempts[0]))}  {clean(attempts[0].node_id, 100)}"
        out.line()
        if one.a is None or one.b is None:
            out.fitted((name, "bold"), f"  only in {'A' if one.b is None else 'B'}")
            continue
        same = "  the same" if one.same else ""
        out.fitted((name, "bold"), same, (f"  {_figures(one.a)} -> {_figures(one.b)}", "dim"))
        _print_changes(one.facts)
        _print_changes(one.output, "output")


def _summary(a: RunRecord, b: RunRecord, started: list[Change], nodes: list[NodeDiff]) -> list[Part]:
    both = [one for one in nodes if one.a is not None and one.b is not None]
    outputs, facts = sum(bool(one.output) for one in both), sum(bool(one.facts) for one in both)
    texts = ["another input"] if started else []
    if outputs:
        texts.append(f"{pluralize(outputs, 'node')} with another output")
    if facts:
        texts.append(f"{pluralize(facts, 'node')} with other attempts, outcomes or models")
    missing = {"A": sum(one.b is None for one in nodes), "B": sum(one.a is None for one in nodes)}
    texts += [f"{pluralize(number, 'node')} only in {side}" for side, number in missing.items() if number]
    same = sum(one.same for one in nodes)
    head: Part = ("different", "yellow") if texts else ("the same", "green")
    costs = [format_usd(one.cost_usd) for one in (a, b)]
    change = ""
    if a.cost_usd and costs[0] != costs[1]:
        change = f" ({(b.cost_usd - a.cost_usd) / a.cost_usd:+.0%})"
    cost = f"cost {' -> '.join(dict.fromkeys(costs))}{change}"
    what = "".join(f"; {text}" for text in [*texts, f"{pluralize(same, 'node')} the same", cost])
    return [head, f": {what[2:]}"]


def _figures(attempts: list[AttemptRecord]) -> str:
    tokens, cost = sum(x.tokens for x in attempts), sum(x.cost_usd for x in attempts)
    return (
        f"{format_duration(sum(x.duration_ms for x in attempts) / 1000)}, {format_tokens(tokens)}, "
        f"{format_usd(cost)}"
    )


def _print_changes(differences: list[Change], under: str = "") -> None:
    for change in differences:
        path = ".".join(part for part in (under, change.path) if part)
        a, b = change.texts()
        text = {"added": b, "removed": a, "changed": f"{a} -> {b}"}[change.kind]
        out.fitted("  ", (_SIGNS[change.kind], _STYLES[change.kind]), f" {clean(path, 200)}: {text}")


def _change_data(change: Change) -> dict[str, Any]:
    return {"path": change.path, "kind": change.kind, "a": change.a, "b": change.b}


def _node_data(one: NodeDiff) -> dict[str, Any]:
    attempt = _attempts(one)[0]
    return {
        "position": attempt.position,
        "branch": attempt.branch,
        "node_id": attempt.node_id,
        "in": "both" if one.a is not None and one.b is not None else "a" if one.b is None else "b",
        "same": one.same,
        "output": [_change_data(change) for change in one.output],
        "facts": [_change_data(change) for change in one.facts],
        "a": _side_data(one.a),
        "b": _side_data(one.b),
    }


def _side_data(records: list[AttemptRecord] | None) -> dict[str, Any] | None:
    if records is None:
        return None
    return {
        "attempts": len(records),
        "seconds": sum(x.duration_ms for x in records) / 1000,
        "tokens": sum(x.tokens for x in records),
        "cost_usd": sum(x.cost_usd for x in records),
    }
