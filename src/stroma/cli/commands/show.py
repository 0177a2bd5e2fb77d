"""`stroma show`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history import (
    History,
    Inputs,
    Payload,
    bar_of,
    in_order,
    place_of,
    status_of,
    sum_waste,
)
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data, style_status
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import format_age, format_local_time, id_word, to_iso
from stroma.cli.output import Part, emit, err, out, table
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.stores import Database, RunSource, db_option
from stroma.cli.suspended import (
    answer_type,
    approve_hint,
    held_hints,
    held_text,
    place_text,
    question_text,
    unanswered,
    waiting_data,
)
from stroma.cli.temporal import TemporalCluster, reject_local_options, temporal_options
from stroma.trace.gantt import duration
from stroma.trace.outline import OutlineEntry, fold, outline
from stroma.trace.rejected import MISSING, RejectedOutput
from stroma.trace.story import Bar
from stroma.trace.story import waits as find_waits

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
_SHOWN_REJECTED: Final = 3  # rejected outputs below the attempts
_SHOWN_COMPLAINTS: Final = 10  # of each
_COMPLETE: Final = ("COMPLETED", "RESUMED")


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--node", metavar="NODE", help="Only the attempts of this node.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only the Nth attempts.")
@click.option("--input", "wants_input", is_flag=True, help="Print the inputs of the attempts as JSON.")
@click.option("--output", "wants_output", is_flag=True, help="Print the committed outputs as JSON.")
@click.option(
    "--rejected", "wants_rejected", is_flag=True, help="Print outputs that broke their contract as JSON."
)
@click.option("--tree", "as_tree", is_flag=True, help="Draw groups, flows and attempts as a tree.")
@click.option("--unfold", is_flag=True, help="With --tree: show each of the repeated calls of a node.")
@click.option("--timing", is_flag=True, help="Show start and waiting time of each attempt.")
@redact_option
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.show/1".')
@db_option
@temporal_options
def show(run_: str, redact: str | None, as_json: bool, db: str | None, **options: Any) -> int:
    """Show one run, attempt by attempt.

    RUN is a run id, a prefix of one, or "last". AT is the position in the run; children of groups are indented below
    their group, with their branch. With --tree, repeated calls of one node in a flow are one line, such as "judge x3",
    and the sleeps and questions of the flow are shown.

    With --input, --output or --rejected, stdout has one JSON value per attempt; if there are several, a line names the
    attempt of each.

    With --temporal: a run on Temporal, so far.
    """
    cluster = TemporalCluster.from_options(options)
    view = _View(**options)
    if cluster is not None:
        from stroma.cli.temporal_show import read_run

        why = "let the workers write to a store (stroma worker --db) and read that"
        reject_local_options(why, "db", "wants_input", "wants_output", "wants_rejected", "redact")
        record, attempts, waiting = read_run(cluster, run_)
        selected = _select(attempts, record, view)
        states: list[list[_State]] = [[] for _ in selected]
        if as_json:
            emit(_data(record, attempts, waiting, selected, states))
            return Code.OK
        return _print_run(cluster, record, attempts, waiting, selected, view)
    database = Database.from_option(db)
    stored = database.find(run_)
    history = History(database.reader, load_redact(redact))
    with database.explain_errors():
        record = history.redact_run(stored)
        attempts = in_order(history.redact_attempts(record.run_id, database.reader.attempts(record.run_id)))
        waiting = history.waiting(record.run_id)
    selected = _select(attempts, record, view)
    with database.explain_errors():
        states = _states(history, record, selected, view)
    code = Code.ENVIRONMENT if any(one.damaged for one in attempts) else Code.OK
    if as_json:
        emit(_data(record, attempts, waiting, selected, states))
        return code
    if view.wants_input or view.wants_output or view.wants_rejected:
        return _print_states(selected, states, code)
    with database.explain_errors():
        waits = history.flow_waits(record, attempts, waiting) if view.as_tree else []
        rejected = _last_rejected(history, record, selected)
    _print_run(database, record, attempts, waiting, selected, view, waits, rejected)
    return code


@dataclass(frozen=True, slots=True)
class _View:
    """The options that select what is shown of a run."""

    node: str | None
    attempt: int | None
    wants_input: bool
    wants_output: bool
    wants_rejected: bool
    as_tree: bool
    unfold: bool
    timing: bool


def _select(attempts: list[AttemptRecord], record: RunRecord, view: _View) -> list[AttemptRecord]:
    """Return the matching attempts. Raises Problem if there is none."""
    node, attempt = view.node, view.attempt
    selected = [one for one in attempts if node in (None, one.node_id) and attempt in (None, one.attempt)]
    if not selected and (node is not None or attempt is not None):
        raise _no_such_attempt(attempts, record, node, attempt)
    return selected


def _data(
    record: RunRecord,
    attempts: list[AttemptRecord],
    waiting: list[Waiting],
    selected: list[AttemptRecord],
    states: list[list[_State]],
) -> dict[str, Any]:
    """Return the object of ``--json``."""
    tokens, cost = sum_waste(attempts)
    return {
        "schema": "stroma.show/1",
        "run": run_data(record),
        "suspended": [waiting_data(one) for one in waiting],
        "wasted_tokens": tokens,
        "wasted_cost_usd": cost,
        "attempts": [
            attempt_data(record, one) | {what: payload.value for what, payload in payloads}
            for one, payloads in zip(selected, states, strict=True)
        ],
    }


def _print_run(
    database: RunSource,
    record: RunRecord,
    attempts: list[AttemptRecord],
    waiting: list[Waiting],
    selected: list[AttemptRecord],
    view: _View,
    waits: Sequence[Bar] = (),
    rejected: Sequence[tuple[AttemptRecord, RejectedOutput]] = (),
) -> int:
    _print_head(record, waiting, len(attempts), *sum_waste(attempts))
    if selected or waits:
        out.line()
        rows = list(_rows(attempts, waits, selected, view))
        header: list[str] = list(_HEADER)
        right = {2, 6, 7, 8}
        if view.timing:
            header[6:7] = ["BEGAN", "WAITED", "TIME"]
            right = {2, 6, 7, 8, 9, 10}
            _add_timing(rows, selected)
        table(out, header, [row for _, row in rows], right=frozenset(right))
    for attempt, one_rejected in rejected:
        _print_rejected(attempt, one_rejected)
    for one in attempts:
        if one.damaged:
            output = f"the output of node {clean(one.node_id, 100)!r} at {place_of(one)}"
            err.line(("stroma: ", "bold red"), f"{output} is damaged; resume from there to recompute it")
    if record.status not in _COMPLETE:
        _print_next_steps(database, record, unanswered(waiting))
    return Code.OK


def _no_such_attempt(
    attempts: list[AttemptRecord], record: RunRecord, node: str | None, attempt: int | None
) -> Problem:
    of_node = f" of node {node!r}" if node is not None else ""
    which = f"no attempt {attempt}" if attempt is not None else "no attempt"
    nodes = ", ".join(dict.fromkeys(clean(one.node_id, 60) for one in attempts[:1000])) or "none"
    return Problem(
        f"run {clean(record.run_id)} has {which}{of_node}", f"its nodes are: {nodes}", code=Code.NOT_FOUND
    )


def _last_rejected(
    history: History, record: RunRecord, selected: list[AttemptRecord]
) -> list[tuple[AttemptRecord, RejectedOutput]]:
    """Return the last outputs of these attempts that broke their contract."""
    failed = [one for one in selected if one.reason == "contract" or one.outcome == "suspended"]
    failed.sort(key=lambda one: one.started_ns)
    outputs = ((one, history.rejected_of(record.run_id, one)) for one in failed[-_SHOWN_REJECTED:])
    return [(one, rejected) for one, rejected in outputs if rejected is not None]


def _print_rejected(attempt: AttemptRecord, rejected: RejectedOutput) -> None:
    """Print what came beside each complaint of the contract."""
    out.line()
    out.line(
        (
            f"rejected output of {clean(attempt.node_id, 100)} at {place_of(attempt)}, attempt {attempt.attempt}",
            "bold",
        )
    )
    for one in rejected.complaints[:_SHOWN_COMPLAINTS]:
        value = rejected.at(one.path)
        came = "" if value is MISSING else f"; got {clean(json.dumps(value, ensure_ascii=False), 160)}"
        out.line(f"  {clean(one.field, 100)}: ", (clean(one.message, 300), "red"), came)
    more = rejected.more + max(0, len(rejected.complaints) - _SHOWN_COMPLAINTS)
    if more:
        out.line((f"  ... and {pluralize(more, 'complaint')} more", "dim"))


_State = tuple[str, Payload]


def _states(
    history: History, record: RunRecord, selected: list[AttemptRecord], view: _View
) -> list[list[_State]]:
    """Return the requested states of each attempt."""
    inputs = Inputs(history, record.run_id, selected)
    rows: list[list[_State]] = []
    for one in selected:
        states: list[_State] = []
        if view.wants_input:
            states.append(("input", inputs.of(one)))
        if view.wants_output:
            states.append(("output", history.output_of(one)))
        if view.wants_rejected:
            rejected = history.rejected_of(record.run_id, one)
            if rejected is not None or len(selected) == 1:
                problem = "no rejected output is stored" if rejected is None else None
                states.append(("rejected", Payload(rejected and rejected.to_json(), problem)))
        rows.append(states)
    return rows


def _print_states(selected: list[AttemptRecord], states: list[list[_State]], code: int) -> int:
    several = sum(map(len, states)) > 1
    for one, payloads in zip(selected, states, strict=True):
        for what, payload in payloads:
            if several:
                out.line(f"# {place_of(one)} {clean(one.node_id, 100)}, attempt {one.attempt}: {what}")
            if payload.problem is None:
                emit(payload.value)
                continue
            err.line(
                ("stroma: ", "bold red"),
                f"{what} of {clean(one.node_id, 100)!r}, attempt {one.attempt}: {clean(payload.problem)}",
            )
            if not several:
                return code or Code.NOT_FOUND
    return code


def _print_next_steps(database: RunSource, record: RunRecord, waiting: list[Waiting]) -> None:
    name, target = id_word(record.run_id), "FILE.py:NAME"
    place = f"  (where the pipeline {clean(record.pipeline, 60)!r} is)"
    if record.holder is not None:
        err.line(
            f"wait for its result: {database.hint('resume', name, target, options=('--attach',))}{place}"
        )
        err.line(f"or pause it: {database.hint('pause', name)}")
        err.line(f"or cancel it: {database.hint('cancel', name)}")
        return
    if record.waits_for is not None:
        for line in held_hints(database, record.run_id, record.waits_for):
            err.line(line)
        err.line(f"or continue it here: {database.hint('resume', name, target)}{place}")
        return
    for line in approve_hint(database, record.run_id, target, waiting):
        err.line(f"answer: {line}")
    err.line(f"{'then ' if waiting else ''}resume with: {database.hint('resume', name, target)}{place}")


def _print_head(
    record: RunRecord, waiting: list[Waiting], attempts: int, wasted_tokens: int, wasted_cost: float
) -> None:
    seconds = (record.updated_ms - record.started_ms) / 1000
    again = f" (execution {record.execution} of this id)" if record.execution > 1 else ""
    lines: list[tuple[str, list[Part]]] = [
        ("run", [(clean(record.run_id, 4000), "bold"), again]),
        ("pipeline", [clean(record.pipeline)]),
        ("status", [style_status(status_of(record)), *held_text(record)]),
        ("started", [f"{format_local_time(record.started_ms)}, {format_age(record.started_ms)}"]),
        ("duration", [format_duration(seconds)]),
        (
            "nodes",
            [f"{record.nodes:,} finished, {pluralize(attempts, 'attempt')}"],
        ),
        ("spent", [f"{format_tokens(record.tokens)}, {format_usd(record.cost_usd)}"]),
    ]
    if attempts is not None:
        lines.append(
            (
                "wasted",
                [f"{format_tokens(wasted_tokens)}, {format_usd(wasted_cost)} on attempts without output"],
            )
        )
    if record.parent is not None:
        lines.insert(1, ("parent", [f"{clean(record.parent, 4000)}, source of this fork"]))
    if record.status == "RUNNING":
        who = clean(record.holder) if record.holder else ("lost", "yellow")
        lines.append(("owner", [who, f"; last record {format_age(record.updated_ms)}"]))
    for one in waiting if record.status not in _COMPLETE else ():
        answered = ", answered" if one.payload is not None else ""
        lines.append(
            ("waits", [f"{place_text(one)}: {question_text(one)}  (asks for {answer_type(one)}{answered})"])
        )
    if record.error and record.waits_for is None:
        lines.append(("error", [(clean(record.error, 1000), "red")]))
    for name, parts in lines:
        out.line((f"{name:<9} ", "dim"), *parts)


def _rows(
    attempts: list[AttemptRecord], waits: Sequence[Bar], selected: list[AttemptRecord], view: _View
) -> Iterator[tuple[AttemptRecord | None, list[Part]]]:
    """Yield a row for each selected attempt, and one for each group, map or flow that has no attempt of its own."""
    first = min((a.started_ns for a in attempts), default=0)
    records = {bar_of(a, first).key: a for a in attempts}
    draws_all = view.as_tree and len(selected) == len(attempts)
    entries = outline((bar_of(a, first) for a in attempts), waits if draws_all else ())
    if draws_all and not view.unfold:
        entries = fold(entries)
    chosen = {id(a) for a in selected}
    lines: list[tuple[int, AttemptRecord | None, list[Part]]] = []

    def add(entry: OutlineEntry, depth: int) -> bool:
        """Add the lines of an entry and return True, unless nothing in it is selected."""
        start = len(lines)
        name = clean(entry.label, 60 if entry.kind in ("sleep", "question") else 40)
        bars = [bar for bar in entry.bars if bar.key in records and id(records[bar.key]) in chosen]
        if entry.kind == "fold":
            lines.append((depth, None, [entry.at, name, *_fold_cells(entry)]))
            return True
        if entry.kind in ("sleep", "question"):
            lines.append((depth, None, [entry.at, name, "", entry.bars[0].outcome, *_blank(4)]))
            return True
        lines.extend((depth, records[bar.key], _cells(records[bar.key], name)) for bar in bars)
        if not bars:
            lines.append((depth, None, [entry.at, name, *_blank(2)]))
        inside = [add(child, depth + 1) for child in entry.entries]
        if bars or any(inside):
            return True
        del lines[start:]
        return False

    for entry in entries:
        add(entry, 0)
    for number, (depth, attempt, row) in enumerate(lines):
        label = row[1]
        assert isinstance(label, str)
        row[1] = (_branches(lines, number) if view.as_tree else "  " * depth) + label
        yield attempt, row


def _blank(column: int) -> list[Part]:
    """Return empty cells from a column on."""
    return [""] * (len(_HEADER) - column)


def _cells(a: AttemptRecord, name: str) -> list[Part]:
    is_committed = a.output is not None and a.outcome != "success"
    outcome = f"{a.outcome}, damaged" if a.damaged else f"{a.outcome}, kept" if is_committed else a.outcome
    return [
        place_of(a),
        name,
        str(a.attempt),
        (outcome, _STYLES.get(a.outcome, "yellow")),
        a.failure_class or "",
        clean(a.reason or "", 20),
        duration(a.duration_ms, a.function_ms or None),
        f"{a.tokens:,}" if a.tokens else "",
        format_usd(a.cost_usd) if a.tokens else "",
        clean(a.model or "", 30),
        clean(a.text or "", 120),
    ]


def _fold_cells(entry: OutlineEntry) -> list[Part]:
    """Return the cells of repeated calls: their attempts, how many calls failed, and the sums."""
    ends = [call.bars[-1].outcome for call in entry.entries if call.bars]
    failed = sum(end == "failure" for end in ends)
    outcome: Part = ""
    if failed:
        outcome = (f"{failed:,} failed", "red")
    elif ends:
        outcome = ("success", "green") if set(ends) == {"success"} else (ends[-1], "yellow")
    tokens = sum(bar.tokens for bar in entry.bars)
    cost = sum(bar.cost_usd for bar in entry.bars)
    took = duration(sum(bar.took_ms for bar in entry.bars), None) if entry.bars else ""
    tries = f"{len(entry.bars):,}" if len(entry.bars) > len(entry.entries) else ""
    figures: list[Part] = [took, f"{tokens:,}" if tokens else "", format_usd(cost) if tokens else ""]
    return [tries, outcome, "", "", *figures, *_blank(9)]


def _branches(lines: list[tuple[int, AttemptRecord | None, list[Part]]], number: int) -> str:
    """Return the tree lines in front of a name."""
    depth = lines[number][0]
    branches = []
    for level in range(1, depth + 1):
        following = next((d for d, *_ in lines[number + 1 :] if d <= level), 0)
        more = following == level
        branches.append(("├─ " if more else "└─ ") if level == depth else ("│  " if more else "   "))
    return "".join(branches)


def _add_timing(rows: list[tuple[AttemptRecord | None, list[Part]]], attempts: list[AttemptRecord]) -> None:
    first = min(a.started_ns for a in attempts)
    bars = {id(a): bar_of(a, first) for a in attempts}
    waited = {bar.key: took for bar, _, took in find_waits(bars.values())}
    for attempt, row in rows:
        if attempt is None:
            row[6:7] = ["", "", ""]
            continue
        wait = waited.get(bars[id(attempt)].key)
        row[6:7] = [
            f"+{bars[id(attempt)].began_ms / 1000:.3f} s",
            "" if wait is None else format_duration(wait / 1000),
            row[6],
        ]


def attempt_data(record: RunRecord, a: AttemptRecord) -> dict[str, Any]:
    """Return an attempt in the form of the JSON schemas."""
    return {
        "position": a.position,
        "branch": a.branch,
        "node_id": a.node_id,
        "attempt": a.attempt,
        "started": to_iso(a.started_ms),
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
