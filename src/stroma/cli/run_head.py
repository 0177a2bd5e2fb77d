"""The facts of a run above its attempts, and the next commands below them."""

from __future__ import annotations

from typing import Final

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history import status_of
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.records import RunRecord
from stroma.cli.formatting import format_age, format_local_time, id_word, style_status
from stroma.cli.output import Part, err, out
from stroma.cli.stores import Database
from stroma.cli.suspended import (
    answer_type,
    place_text,
    question_text,
    waiting_hints,
)

__all__ = ["FINISHED_WELL", "print_head", "print_next_steps"]

FINISHED_WELL: Final = ("COMPLETED", "RESUMED")


def print_head(
    record: RunRecord, waiting: list[Waiting], attempts: int, wasted_tokens: int, wasted_cost: float
) -> None:
    """Print what is known of a run, a line for each fact."""
    seconds = (record.updated_ms - record.started_ms) / 1000
    again = f" (execution {record.execution} of this id)" if record.execution > 1 else ""
    lines: list[tuple[str, list[Part]]] = [
        ("run", [(clean(record.run_id, 4000), "bold"), again]),
        ("pipeline", [clean(record.pipeline)]),
        ("status", [style_status(status_of(record)), f", {record.wait_text}" if record.waits_for else ""]),
        ("started", [f"{format_local_time(record.started_ms)}, {format_age(record.started_ms)}"]),
        ("duration", [format_duration(seconds)]),
        (
            "nodes",
            [f"{record.nodes:,} finished, {pluralize(attempts, 'attempt')}"],
        ),
        ("spent", [f"{format_tokens(record.tokens)}, {format_usd(record.cost_usd)}"]),
    ]
    wasted = f"{format_tokens(wasted_tokens)}, {format_usd(wasted_cost)} on attempts without output"
    lines.append(("wasted", [wasted]))
    if record.parent is not None:
        lines.insert(1, ("parent", [f"{clean(record.parent, 4000)}, source of this fork"]))
    if record.status == "RUNNING":
        who = clean(record.holder) if record.holder else ("lost", "yellow")
        lines.append(("owner", [who, f"; last record {format_age(record.updated_ms)}"]))
    if record.version is not None:
        lines.insert(2, ("version", [clean(record.version)]))
    if record.blocked is not None:
        since = format_age(record.blocked.since_ms)
        lines.append(("blocked", [(f"since {since}: ", "yellow"), clean(record.blocked.message, 1000)]))
    if record.status == QUEUED and record.due_ms is not None:
        lines.append(("due", [format_local_time(record.due_ms)]))
    for one in waiting if record.status not in FINISHED_WELL else ():
        answered = ", answered" if one.payload is not None else ""
        lines.append(
            ("waits", [f"{place_text(one)}: {question_text(one)}  (asks for {answer_type(one)}{answered})"])
        )
    if record.wait_text is not None:
        if not waiting and record.waits_for is None:
            lines.append(("waits", [clean(record.wait_text, 1000)]))
    elif record.error:
        lines.append(("error", [(clean(record.error, 1000), "red")]))
    for name, parts in lines:
        out.fitted((f"{name:<9} ", "dim"), *parts, indent=10)


def print_next_steps(database: Database, record: RunRecord, waiting: list[Waiting]) -> None:
    """Print the commands that a run needs next."""
    name, target = id_word(record.run_id), "FILE.py:NAME"
    place = f"  (where the pipeline {clean(record.pipeline, 60)!r} is)"
    if record.holder is not None:
        _print_hint(
            f"wait for its result: {database.hint('resume', name, target, options=('--attach',))}", place
        )
        err.line(f"or pause it: {database.hint('pause', name)}")
        err.line(f"or cancel it: {database.hint('cancel', name)}")
        return
    if record.status == QUEUED:
        _print_hint(f"a worker starts it: {database.hint('worker', target)}", place)
        _print_hint(f"or start it here: {database.hint('drive', name, target)}", place)
        err.line(f"or cancel it: {database.hint('cancel', name)}")
        return
    reason = record.error or "" if record.status == "SUSPENDED" else ""
    for line in waiting_hints(database, record.run_id, target, record.waits_for, waiting, reason):
        err.line(line)
    verb = "or continue it here" if record.waits_for is not None else "then " if waiting else ""
    verb = verb if record.waits_for is not None else f"{verb}resume with"
    _print_hint(f"{verb}: {database.hint('resume', name, target)}", place)


def _print_hint(command: str, place: str) -> None:
    """Print a command and where to run it, on a terminal in lines that fit."""
    if not err.is_terminal or len(command + place) <= err.columns:
        err.line(command + place)
        return
    err.hint(command)
    err.wrapped(f"    {place.strip()}")
