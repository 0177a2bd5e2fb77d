"""Changes of a pipeline that prevent the resume of a recorded run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.entries import Committed, is_of_pipeline
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem
from stroma.cli.inputs import stored_input
from stroma.cli.stores import Database
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node
from stroma.runner.compatibility import Incompatibility, changes_since
from stroma.runner.pipeline import Pipeline

__all__ = ["change_lines", "find_changes"]


def find_changes(
    database: Database, record: RunRecord, pipeline: Pipeline, target: str
) -> list[Incompatibility]:
    """Return the changes that prevent a resume. Reads the store only. Raises Problem."""
    nodes = [find_node(node) for node in pipeline.nodes]
    changes = []
    try:
        stored_input(database, record, pipeline, target)
    except Problem as problem:
        if problem.code is not Code.USAGE:
            raise
        changes.append(Incompatibility("input", "input", f"{problem.message}; {problem.more[0]}"))
    commits, damaged = _commits(database, record)
    stored_run = changes_since(record.run_id, commits, nodes, ContractRegistry(), pipeline.config)
    return [*changes, *damaged, *stored_run]


def change_lines(changes: Sequence[Incompatibility]) -> list[str]:
    """Return a line for each node: the outputs of all items of a map have mostly changed alike."""
    by_node: dict[tuple[str, str], list[Incompatibility]] = {}
    for change in changes:
        by_node.setdefault((change.at.partition(".")[0], change.node_id), []).append(change)
    return [
        f"{first.at}  {clean(first.node_id, 60)}: {clean(first.message, 1000)}"
        + (f" (and {pluralize(len(others), 'other output')} of this node)" if others else "")
        for first, *others in by_node.values()
    ]


def _commits(
    database: Database, record: RunRecord
) -> tuple[dict[tuple[int, str], Committed], list[Incompatibility]]:
    """Return the committed outputs of a run, and those that cannot be read."""
    store = database.reader

    def query(rows: Any) -> dict[tuple[int, str], str]:
        stored_run = rows.find(record.run_id)
        steps = [] if stored_run is None else rows.steps(stored_run.run, stored_run.execution)
        # Not of steps of plain code, which no pipeline has.
        return {
            (row.position, row.branch): row.step.contract
            for row in steps
            if is_of_pipeline(row.step.input_key, row.step.number)
        }

    attempts = store.attempts(record.run_id)
    contracts = store.read(query, dict[tuple[int, str], str]())
    commits: dict[tuple[int, str], Committed] = {}
    damaged = []
    for attempt in attempts:
        place = attempt.position, attempt.branch
        at = f"{attempt.position}.{attempt.branch}" if attempt.branch else str(attempt.position)
        if attempt.damaged:
            what = "its output is damaged; resume from there to run it again"
            damaged.append(Incompatibility(at, attempt.node_id, what))
        elif attempt.output is not None and place in contracts:
            commits[place] = Committed(attempt.node_id, attempt.output, contracts[place])
    return commits, damaged
