"""`stroma show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from stroma._utils.text import clean, count, money, plural, span
from stroma.checkpoint.history import History, Inputs, Payload, bar_of, in_order, place_of, status_of, waste
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data, styled
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import ago, id_word, iso, local
from stroma.cli.output import Part, emit, err, out, table
from stroma.cli.redaction import redact_of, redact_option
from stroma.cli.stores import Database, Keeper, db_option
from stroma.cli.suspended import approve_hint, asked, open_ones, waiting_data, where
from stroma.cli.temporal import Cluster, cluster_options, only_here
from stroma.trace.html import duration, waits

__all__ = ["attempt_data", "show"]

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
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--node", metavar="NODE", help="Only the attempts of this node.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only the Nth attempts.")
@click.option("--input", "wants_input", is_flag=True, help="Print what the attempts were given, as JSON.")
@click.option("--output", "wants_output", is_flag=True, help="Print what they committed, as JSON.")
@click.option("--tree", "as_tree", is_flag=True, help="Draw groups and attempts as a tree.")
@click.option("--timing", is_flag=True, help="Show when each attempt began, and what it waited for.")
@redact_option
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.show/1".')
@db_option
@cluster_options
def show(
    run_: str,
    node: str | None,
    attempt: int | None,
    wants_input: bool,
    wants_output: bool,
    as_tree: bool,
    timing: bool,
    redact: str | None,
    as_json: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Show one run, attempt by attempt.

    RUN is a run id, its beginning, or "last". AT is the position in the run; children of groups stand indented below
    their group, with their place in it.

    With --input or --output, stdout has one JSON value for each attempt; of several, a line above each says whose it is.

    With --temporal: one of a cluster, as far as it is.
    """
    cluster = Cluster.take(options)
    if cluster is not None:
        from stroma.cli.temporal_show import look_at

        why = "have the workers write to a store, stroma worker --db, and ask that"
        only_here(why, "db", "wants_input", "wants_output", "redact")
        there, attempts, waiting = look_at(cluster, run_)
        shown = _chosen(attempts, there, node, attempt)
        states: list[list[_State]] = [[] for _ in shown]
        if as_json:
            emit(_data(there, attempts, waiting, shown, states))
            return Code.OK
        return _tell(cluster, there, attempts, waiting, shown, as_tree, timing)
    database = Database.choose(db)
    found = database.find(run_)
    history = History(database.reader, redact_of(redact))
    with database.explained():
        record = history.shown_run(found)
        attempts = in_order(history.shown_attempts(record.run_id, database.reader.attempts(record.run_id)))
        waiting = history.waiting(record.run_id)
    shown = _chosen(attempts, record, node, attempt)
    with database.explained():
        states = _states(history, record, shown, wants_input, wants_output)
    code = Code.ENVIRONMENT if any(one.damaged for one in attempts) else Code.OK
    if as_json:
        emit(_data(record, attempts, waiting, shown, states))
        return code
    if wants_input or wants_output:
        return _print_states(shown, states, code)
    _tell(database, record, attempts, waiting, shown, as_tree, timing)
    return code


def _chosen(
    attempts: list[AttemptRecord], record: RunRecord, node: str | None, attempt: int | None
) -> list[AttemptRecord]:
    """The attempts that were asked for. Raises Problem if there is none."""
    shown = [one for one in attempts if node in (None, one.node_id) and attempt in (None, one.attempt)]
    if not shown and (node is not None or attempt is not None):
        raise _no_such(attempts, record, node, attempt)
    return shown


def _data(
    record: RunRecord,
    attempts: list[AttemptRecord],
    waiting: list[Waiting],
    shown: list[AttemptRecord],
    states: list[list[_State]],
) -> dict[str, Any]:
    """The object of ``--json``."""
    tokens, cost = waste(attempts)
    return {
        "schema": "stroma.show/1",
        "run": run_data(record),
        "suspended": [waiting_data(one) for one in waiting],
        "wasted_tokens": tokens,
        "wasted_cost_usd": cost,
        "attempts": [
            attempt_data(record, one) | {what: held.value for what, held in found}
            for one, found in zip(shown, states, strict=True)
        ],
    }


def _tell(
    database: Keeper,
    record: RunRecord,
    attempts: list[AttemptRecord],
    waiting: list[Waiting],
    shown: list[AttemptRecord],
    as_tree: bool,
    timing: bool,
) -> int:
    _head(record, waiting, len(attempts), *waste(attempts))
    if shown:
        out.line()
        rows = list(_rows(shown, as_tree))
        header: list[str] = list(_HEADER)
        right = {2, 6, 7, 8}
        if timing:
            header[6:7] = ["BEGAN", "WAITED", "TIME"]
            right = {2, 6, 7, 8, 9, 10}
            _add_timing(rows, shown)
        table(out, header, [row for _, row in rows], right=frozenset(right))
    for one in attempts:
        if one.damaged:
            where = f"the output of node {clean(one.node_id, 100)!r} at {place_of(one)}"
            err.line(("stroma: ", "bold red"), f"{where} is damaged; resume from there to make it anew")
    if record.status not in _COMPLETE:
        _tell_way_on(database, record, open_ones(waiting))
    return Code.OK


def _no_such(
    attempts: list[AttemptRecord], record: RunRecord, node: str | None, attempt: int | None
) -> Problem:
    of_node = f" of node {node!r}" if node is not None else ""
    which = f"no attempt {attempt}" if attempt is not None else "no attempt"
    nodes = ", ".join(dict.fromkeys(clean(one.node_id, 60) for one in attempts[:1000])) or "none"
    return Problem(
        f"run {clean(record.run_id)} has {which}{of_node}", f"its nodes are: {nodes}", code=Code.NOT_FOUND
    )


_State = tuple[str, Payload]


def _states(
    history: History, record: RunRecord, shown: list[AttemptRecord], wants_input: bool, wants_output: bool
) -> list[list[_State]]:
    """For each attempt what is asked for of it."""
    inputs = Inputs(history, record.run_id, shown)
    found: list[list[_State]] = []
    for one in shown:
        states: list[_State] = []
        if wants_input:
            states.append(("input", inputs.of(one)))
        if wants_output:
            states.append(("output", history.made(one)))
        found.append(states)
    return found


def _print_states(shown: list[AttemptRecord], states: list[list[_State]], code: int) -> int:
    several = sum(map(len, states)) > 1
    for one, found in zip(shown, states, strict=True):
        for what, held in found:
            if several:
                out.line(f"# {place_of(one)} {clean(one.node_id, 100)}, attempt {one.attempt}: {what}")
            if held.problem is None:
                emit(held.value)
                continue
            err.line(
                ("stroma: ", "bold red"),
                f"{what} of {clean(one.node_id, 100)!r}, attempt {one.attempt}: {clean(held.problem)}",
            )
            if not several:
                return code or Code.NOT_FOUND
    return code


def _tell_way_on(database: Keeper, record: RunRecord, waiting: list[Waiting]) -> None:
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


def _head(
    record: RunRecord, waiting: list[Waiting], attempts: int, wasted_tokens: int, wasted_cost: float
) -> None:
    seconds = (record.updated_ms - record.started_ms) / 1000
    again = f" (execution {record.execution} of this id)" if record.execution > 1 else ""
    lines: list[tuple[str, list[Part]]] = [
        ("run", [(clean(record.run_id, 4000), "bold"), again]),
        ("pipeline", [clean(record.pipeline)]),
        ("status", [styled(status_of(record))]),
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


def _rows(attempts: list[AttemptRecord], as_tree: bool) -> Iterator[tuple[AttemptRecord | None, list[Part]]]:
    """A line for each attempt; and for a group that has not ended, which has none."""
    groups = {(a.position, a.branch) for a in attempts}
    lines: list[tuple[int, AttemptRecord | None, list[Part]]] = []
    for a in attempts:
        depth = a.branch.count(".") + 1 if a.branch else 0
        parent = (a.position, a.branch.rpartition(".")[0])
        if depth and parent not in groups:
            # Its process died, or it runs: a group is recorded when it ends.
            groups.add(parent)
            name = "(a group that has not ended)"
            lines.append((depth - 1, None, [_at(*parent), name, *[""] * (len(_HEADER) - 2)]))
        style = _STYLES.get(a.outcome, "yellow")
        kept = a.output is not None and a.outcome != "success"
        row: list[Part] = [
            place_of(a),
            clean(a.node_id, 40),
            str(a.attempt),
            (f"{a.outcome}, damaged" if a.damaged else f"{a.outcome}, kept" if kept else a.outcome, style),
            a.failure_class or "",
            clean(a.reason or "", 20),
            duration(a.duration_ms, a.function_ms or None),
            f"{a.tokens:,}" if a.tokens else "",
            money(a.cost_usd) if a.tokens else "",
            clean(a.model or "", 30),
            clean(a.text or "", 120),
        ]
        lines.append((depth, a, row))
    for number, (depth, attempt, row) in enumerate(lines):
        said = row[1]
        assert isinstance(said, str)
        row[1] = (_branches(lines, number) if as_tree else "  " * depth) + said
        yield attempt, row


def _branches(lines: list[tuple[int, AttemptRecord | None, list[Part]]], number: int) -> str:
    """The lines of a tree in front of a name: which of its parents have more below."""
    depth = lines[number][0]
    drawn = []
    for level in range(1, depth + 1):
        following = next((d for d, *_ in lines[number + 1 :] if d <= level), 0)
        more = following == level
        drawn.append(("├─ " if more else "└─ ") if level == depth else ("│  " if more else "   "))
    return "".join(drawn)


def _add_timing(rows: list[tuple[AttemptRecord | None, list[Part]]], attempts: list[AttemptRecord]) -> None:
    first = min(a.started_ns for a in attempts)
    bars = {id(a): bar_of(a, first) for a in attempts}
    waited = {bar.key: took for bar, _, took in waits(bars.values())}
    for attempt, row in rows:
        if attempt is None:
            row[6:7] = ["", "", ""]
            continue
        wait = waited.get(bars[id(attempt)].key)
        row[6:7] = [
            f"+{bars[id(attempt)].began_ms / 1000:.3f} s",
            "" if wait is None else span(wait / 1000),
            row[6],
        ]


def _at(position: int, branch: str) -> str:
    return f"{position}.{branch}" if branch else str(position)


def attempt_data(record: RunRecord, a: AttemptRecord) -> dict[str, Any]:
    """An attempt as the JSON schemas show it."""
    return {
        "position": a.position,
        "branch": a.branch,
        "node_id": a.node_id,
        "attempt": a.attempt,
        "started": iso(a.started_ms),
        "seconds": a.duration_ms / 1000,
        "function_seconds": a.function_ms / 1000,
        "outcome": a.outcome,
        "damaged": a.damaged,
        "committed": a.output_bytes is not None and not a.damaged,
        "class": a.failure_class,
        "reason": a.reason,
        "error_type": a.error_type,
        "message": a.message,
        "tokens": a.tokens,
        "output_tokens": a.output_tokens,
        "cost_usd": a.cost_usd,
        "model": a.model,
        "idempotency_key": a.idempotency_key(record.run_id, record.execution),
    }
