"""`stroma show`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from stroma._utils.text import clean
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history import (
    History,
    Inputs,
    Payload,
    bar_of,
    in_order,
    place_of,
    sum_waste,
)
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import to_iso
from stroma.cli.output import emit, err, out
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.run_head import FINISHED_WELL, print_head, print_next_steps
from stroma.cli.run_table import print_all_rejected, print_attempts
from stroma.cli.stores import Database, db_option
from stroma.cli.suspended import (
    unanswered,
    waiting_data,
)
from stroma.trace.rejected import RejectedOutput
from stroma.trace.story import Bar

__all__ = ["attempt_data", "show"]


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
@click.option("--unfold", is_flag=True, help="Show each item of a map and each repeated call of a node.")
@click.option("--timing", is_flag=True, help="Show start and waiting time of each attempt.")
@redact_option
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.show/1".')
@db_option
def show(run_: str, redact: str | None, as_json: bool, db: str | None, **options: Any) -> int:
    """Show one run, attempt by attempt.

    RUN is a run id, a prefix of one, or "last". AT is the position in the run; children of groups are
    indented below their group, with their branch. Items of a map, and repeated calls of one node in a flow,
    are one line with the first failures below it. With --tree, the sleeps and questions of the flow are
    shown.

    With --input, --output or --rejected, stdout has one JSON value per attempt; if there are several, a line
    names the attempt of each.
    """
    view = _View(**options)
    database = Database.from_option(db)
    stored = database.find(run_)
    history = History(database.reader, load_redact(redact))
    record = history.redact_run(stored)
    attempts = in_order(history.redact_attempts(record.run_id, database.reader.attempts(record.run_id)))
    waiting = history.waiting(record.run_id)
    shown = _Shown.select(record, attempts, waiting, view)
    states = _states(history, record, shown.selected, view)
    code = Code.ENVIRONMENT if any(one.damaged for one in attempts) else Code.OK
    if as_json:
        emit(_data(shown, states))
        return code
    if view.wants_input or view.wants_output or view.wants_rejected:
        return _print_states(shown.selected, states, code)
    waits = history.flow_waits(record, attempts, waiting) if view.as_tree else []
    failed = sorted(shown.selected, key=lambda one: one.started_ns)
    outputs = [
        (one, history.rejected_of(record.run_id, one))
        for one in failed
        if one.reason == "contract" or one.outcome == "suspended"
    ]
    _print_run(database, shown, view, waits, [(one, output) for one, output in outputs if output is not None])
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

    def selects(self, node_id: str, attempt: int) -> bool:
        return self.node in (None, node_id) and self.attempt in (None, attempt)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A run and its attempts. Attributes: ``selected`` are those that the options select."""

    record: RunRecord
    attempts: list[AttemptRecord]
    waiting: list[Waiting]
    selected: list[AttemptRecord]

    @classmethod
    def select(
        cls, record: RunRecord, attempts: list[AttemptRecord], waiting: list[Waiting], view: _View
    ) -> _Shown:
        """Select attempts. Raises Problem if the options select none."""
        node, attempt = view.node, view.attempt
        selected = [one for one in attempts if view.selects(one.node_id, one.attempt)]
        if not selected and (node is not None or attempt is not None):
            raise _no_such_attempt(attempts, record, node, attempt)
        return cls(record, attempts, waiting, selected)


def _data(shown: _Shown, states: list[list[_State]]) -> dict[str, Any]:
    """Return the object of ``--json``."""
    record = shown.record
    tokens, cost = sum_waste(shown.attempts)
    return {
        "schema": "stroma.show/1",
        "run": run_data(record),
        "suspended": [waiting_data(one) for one in shown.waiting],
        "wasted_tokens": tokens,
        "wasted_cost_usd": cost,
        "attempts": [
            attempt_data(record, one) | {what: payload.value for what, payload in payloads}
            for one, payloads in zip(shown.selected, states, strict=True)
        ],
    }


def _print_run(
    database: Database,
    shown: _Shown,
    view: _View,
    waits: Sequence[Bar] = (),
    rejected: Sequence[tuple[AttemptRecord, RejectedOutput]] = (),
) -> int:
    record, attempts = shown.record, shown.attempts
    print_head(record, shown.waiting, len(attempts), *sum_waste(attempts))
    if shown.selected or waits:
        first = min((one.started_ns for one in attempts), default=0)
        selects_all = view.node is None and view.attempt is None
        print_attempts(
            [bar_of(one, first) for one in attempts],
            waits,
            None if selects_all else lambda bar: view.selects(bar.node_id, bar.attempt),
            as_tree=view.as_tree,
            unfold=view.unfold,
            timing=view.timing,
        )
    print_all_rejected(rejected)
    for one in attempts:
        if one.damaged:
            output = f"the output of node {clean(one.node_id, 100)!r} at {place_of(one)}"
            err.line(("stroma: ", "bold red"), f"{output} is damaged; resume from there to recompute it")
    if record.status not in FINISHED_WELL:
        print_next_steps(database, record, unanswered(shown.waiting))
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
