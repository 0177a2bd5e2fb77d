"""Changes of a pipeline since a run was recorded that stand in the way of a resume."""

from __future__ import annotations

from typing import Any

from stroma.checkpoint.protocols import Committed, is_of_pipeline
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem
from stroma.cli.inputs import stored_input
from stroma.cli.stores import Database
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node
from stroma.runner.compatibility import Change, changes_since
from stroma.runner.runner import Pipeline

__all__ = ["changes_of"]


def changes_of(database: Database, record: RunRecord, pipeline: Pipeline, target: str) -> list[Change]:
    """What stands in the way of a resume of a run. Reads the store only. Raises Problem."""
    nodes = [find_node(node) for node in pipeline.nodes]
    changes = []
    try:
        stored_input(database, record, pipeline, target)
    except Problem as problem:
        if problem.code is not Code.USAGE:
            raise
        changes.append(Change("input", "input", f"{problem.message}; {problem.more[0]}"))
    commits, damaged = _commits(database, record)
    found = changes_since(record.run_id, commits, nodes, ContractRegistry(), pipeline.config)
    return [*changes, *damaged, *found]


def _commits(database: Database, record: RunRecord) -> tuple[dict[tuple[int, str], Committed], list[Change]]:
    """The outputs that a run committed, and those of them that cannot be read."""
    store = database.reader

    def query(rows: Any) -> dict[tuple[int, str], str]:
        found = rows.find(record.run_id)
        steps = [] if found is None else rows.steps(found.run, found.execution)
        # Not of steps of plain code, which no pipeline has.
        return {
            (row.position, row.branch): row.step.contract
            for row in steps
            if is_of_pipeline(row.step.given, row.step.number)
        }

    with database.explained():
        attempts = store.attempts(record.run_id)
        contracts = store.read(query, dict[tuple[int, str], str]())
    commits: dict[tuple[int, str], Committed] = {}
    damaged = []
    for attempt in attempts:
        place = attempt.position, attempt.branch
        at = f"{attempt.position}.{attempt.branch}" if attempt.branch else str(attempt.position)
        if attempt.damaged:
            what = "its output is damaged; resume from there to make it anew"
            damaged.append(Change(at, attempt.node_id, what))
        elif attempt.output is not None and place in contracts:
            commits[place] = Committed(attempt.node_id, attempt.output, contracts[place])
    return commits, damaged
