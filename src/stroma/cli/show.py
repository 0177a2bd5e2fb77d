"""`stroma show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from stroma.checkpoint.journal import AttemptRecord, RunRecord, Waiting
from stroma.cli.errors import Code
from stroma.cli.output import Part, emit, err, out, table
from stroma.cli.runs import run_data, styled
from stroma.cli.stores import Database, db_option
from stroma.cli.waiting import approve_hint, asked, open_ones, waiting_data, where
from stroma.cli.words import ago, clean, count, id_word, iso, local, money, plural, span

__all__ = ["show"]

_HEADER: Final = (
    "AT",
    "NODE",
    "TRY",
    "OUTCOME",
    "CLASS",
    "REASON",
    "TIME",
    "TOKENS",
    "COST",
    "MODEL",
    "MESSAGE",
)
_STYLES: Final = {"success": "green", "failure": "red"}
_COMPLETE: Final = ("COMPLETED", "RESUMED")


@click.command()
@click.argument("run_", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.show/1".')
@db_option
def show(run_: str, as_json: bool, db: str | None) -> int:
    """Show one run, attempt by attempt.

    RUN is a run id, its beginning, or "last". AT is the position in the run; children of groups stand indented below
    their group, with their place in it.
    """
    database = Database.choose(db)
    record = database.find(run_)
    with database.explained():
        attempts = sorted(database.reader.attempts(record.run_id), key=_place)
    damaged = [attempt for attempt in attempts if attempt.damaged]
    waiting = database.waiting(record.run_id)
    wasted = [attempt for attempt in attempts if attempt.output is None and not attempt.damaged]
    tokens, cost = sum(a.tokens for a in wasted), sum(a.cost_usd for a in wasted)
    code = Code.ENVIRONMENT if damaged else Code.OK
    if as_json:
        emit(
            {
                "schema": "stroma.show/1",
                "run": run_data(record),
                "suspended": [waiting_data(one) for one in waiting],
                "wasted_tokens": tokens,
                "wasted_cost_usd": cost,
                "attempts": [_attempt_data(attempt) for attempt in attempts],
            }
        )
        return code
    _head(record, waiting, len(attempts), tokens, cost)
    if attempts:
        out.line()
        table(out, _HEADER, list(_rows(attempts)), right=frozenset({2, 6, 7, 8}))
    for attempt in damaged:
        where = (
            f"the output of node {clean(attempt.node_id, 100)!r} at {_at(attempt.position, attempt.branch)}"
        )
        err.line(("stroma: ", "bold red"), f"{where} is damaged; resume from there to make it anew")
    if record.status not in _COMPLETE:
        _tell_way_on(database, record, open_ones(waiting))
    return code


def _tell_way_on(database: Database, record: RunRecord, waiting: list[Waiting]) -> None:
    name, target = id_word(record.run_id), "FILE.py:NAME"
    place = f"  (where the pipeline {clean(record.pipeline, 60)!r} is)"
    if record.holder is not None:
        err.line(
            f"wait for its result: {database.hint('resume', name, target, options=('--attach',))}{place}"
        )
        err.line(f"or have it stop: {database.hint('cancel', name)}")
        return
    for line in approve_hint(database, record.run_id, target, waiting):
        err.line(f"answer: {line}")
    err.line(f"{'then ' if waiting else ''}go on with: {database.hint('resume', name, target)}{place}")


def _place(attempt: AttemptRecord) -> tuple[int, tuple[int, ...], int, int]:
    """Sorts a group before its children, and these by their place in it, not as text: item 10 after item 9."""
    branch = tuple(int(part) if part.isdecimal() else -1 for part in attempt.branch.split(".") if part)
    return attempt.position, branch, attempt.started_ms, attempt.attempt


def _head(
    record: RunRecord, waiting: list[Waiting], attempts: int, wasted_tokens: int, wasted_cost: float
) -> None:
    seconds = (record.updated_ms - record.started_ms) / 1000
    again = f" (execution {record.execution} of this id)" if record.execution > 1 else ""
    lines: list[tuple[str, list[Part]]] = [
        ("run", [(clean(record.run_id, 4000), "bold"), again]),
        ("pipeline", [clean(record.pipeline)]),
        ("status", [styled(record.status)]),
        ("started", [f"{local(record.started_ms)}, {ago(record.started_ms)}"]),
        ("duration", [span(seconds)]),
        (
            "nodes",
            [f"{record.nodes:,} finished, {plural(attempts, 'attempt')}"],
        ),
        ("spent", [f"{count(record.tokens)}, {money(record.cost_usd)}"]),
    ]
    if attempts is not None:
        lines.append(
            ("wasted", [f"{count(wasted_tokens)}, {money(wasted_cost)} on attempts that came to nothing"])
        )
    if record.parent is not None:
        lines.insert(1, ("parent", [f"{clean(record.parent, 4000)}, which it was forked from"]))
    if record.status == "RUNNING":
        who = clean(record.holder) if record.holder else ("nobody is at work on it any more", "yellow")
        lines.append(("holder", [who, f"; last record {ago(record.updated_ms)}"]))
    for one in waiting if record.status not in _COMPLETE else ():
        answered = ", has its answer" if one.payload is not None else ""
        lines.append(("waits", [f"{where(one)}: {clean(one.reason)}  (asks for {asked(one)}{answered})"]))
    if record.error:
        lines.append(("error", [(clean(record.error, 1000), "red")]))
    for name, parts in lines:
        out.line((f"{name:<9} ", "dim"), *parts)


def _rows(attempts: list[AttemptRecord]) -> Iterator[list[Part]]:
    groups = {(a.position, a.branch) for a in attempts}
    for a in attempts:
        depth = a.branch.count(".") + 1 if a.branch else 0
        parent = (a.position, a.branch.rpartition(".")[0])
        if depth and parent not in groups:
            # Its process died, or it runs: a group is recorded when it ends.
            groups.add(parent)
            yield [
                _at(*parent),
                "  " * (depth - 1) + "(a group that has not ended)",
                *[""] * (len(_HEADER) - 2),
            ]
        style = _STYLES.get(a.outcome, "yellow")
        kept = a.output is not None and a.outcome != "success"
        yield [
            _at(a.position, a.branch),
            "  " * depth + clean(a.node_id, 40),
            str(a.attempt),
            (f"{a.outcome}, damaged" if a.damaged else f"{a.outcome}, kept" if kept else a.outcome, style),
            a.failure_class or "",
            clean(a.reason or "", 20),
            span(a.duration_ms / 1000),
            f"{a.tokens:,}" if a.tokens else "",
            money(a.cost_usd) if a.tokens else "",
            clean(a.model or "", 30),
            clean(a.message or "", 120),
        ]


def _at(position: int, branch: str) -> str:
    return f"{position}.{branch}" if branch else str(position)


def _attempt_data(a: AttemptRecord) -> dict[str, Any]:
    return {
        "position": a.position,
        "branch": a.branch,
        "node_id": a.node_id,
        "attempt": a.attempt,
        "started": iso(a.started_ms),
        "seconds": a.duration_ms / 1000,
        "outcome": a.outcome,
        "damaged": a.damaged,
        "committed": a.output is not None,
        "class": a.failure_class,
        "reason": a.reason,
        "message": a.message,
        "tokens": a.tokens,
        "output_tokens": a.output_tokens,
        "cost_usd": a.cost_usd,
        "model": a.model,
    }
