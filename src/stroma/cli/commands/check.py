"""`stroma check`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.history import status_of
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code
from stroma.cli.formatting import id_word
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, err, out
from stroma.cli.resume_plan import change_lines, find_changes
from stroma.cli.stores import Database, db_option
from stroma.contracts.checks.check import check_nodes
from stroma.contracts.checks.finding import Finding
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node
from stroma.runner.compatibility import Incompatibility
from stroma.runner.pipeline import Pipeline

__all__ = ["check"]


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.check/1".')
@click.option("--against", metavar="RUN", help="Recorded run; report changes that prevent its resume.")
@db_option
def check(target: str, as_json: bool, against: str | None, db: str | None) -> int:
    """Check that each node's output fits the next node's input. No node is called.

    Findings go to stdout. An error always fails at run time, and the exit code is 1; a warning may fail.
    RUN is a run id, a prefix of one, or "last"; nothing is written to its store.
    """
    pipeline = load_pipeline(target)
    nodes = [find_node(node) for node in pipeline.nodes]
    registry = ContractRegistry()
    retried = () if pipeline.config is None else pipeline.config.retried_ids
    findings = check_nodes(nodes, registry, retried=retried)
    errors = sum(finding.severity == "error" for finding in findings)
    record, changes = None, list[Incompatibility]()
    if against is not None:
        database = Database.from_option(db)
        record = database.find(against)
        changes = find_changes(database, record, pipeline, target)
    code = Code.FAILED if errors or changes else Code.OK
    if as_json:
        emit(
            {
                "schema": "stroma.check/1",
                "pipeline": pipeline.name,
                "exit_code": int(code),
                "errors": errors,
                "warnings": len(findings) - errors,
                "findings": [asdict(finding) for finding in findings],
                "against": None if record is None else _against_data(record, changes),
            }
        )
        return code
    for finding in findings:
        _print_finding(finding)
    count = f"{pluralize(errors, 'error')}, {pluralize(len(findings) - errors, 'warning')}"
    err.line(f"{clean(pipeline.name, 100)}: {pluralize(len(nodes), 'node')}, {count}")
    if record is not None:
        _tell_changes(record, changes, pipeline)
    return code


def _print_finding(finding: Finding) -> None:
    style = "bold red" if finding.severity == "error" else "yellow"
    where = f"{clean(finding.source, 60)} -> {clean(finding.target, 60)}"
    path = f"  {clean(finding.path, 100)}" if finding.path else ""
    out.line((f"{finding.severity:<8}", style), f" {where}{path}  ({finding.kind})")
    out.line(f"         {clean(finding.message, 1000)}")
    out.line(f"         fix: {clean(finding.fix, 1000)}")


# ---------------------------------------------------------------------- against a run


def _against_data(record: RunRecord, changes: list[Incompatibility]) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "pipeline": record.pipeline,
        "status": status_of(record),
        "resumable": not changes,
        "changes": [asdict(change) for change in changes],
    }


def _tell_changes(record: RunRecord, changes: list[Incompatibility], pipeline: Pipeline) -> None:
    name = f"run {clean(id_word(record.run_id), 100)} ({status_of(record)})"
    if not changes:
        out.line(("ok      ", "green"), f" {name} can be resumed: all it has committed fits")
        return
    other = "" if record.pipeline == pipeline.name else f"; it is a run of {clean(record.pipeline, 100)!r}"
    out.line(("changed ", "bold red"), f" {name} cannot be resumed as it is{other}")
    for line in change_lines(changes):
        out.line(f"         {line}")
