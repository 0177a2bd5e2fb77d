"""`stroma check`."""

from __future__ import annotations

from dataclasses import asdict

import click

from stroma._utils.text import clean, pluralize
from stroma.cli.errors import Code
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit_fields, err, out
from stroma.contracts.checks.check import check_nodes
from stroma.contracts.checks.types import Finding
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import FlowNode, find_node
from stroma.runner.pipeline import leaves_in, steps_of


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.check/1".')
def check(target: str, as_json: bool) -> int:
    """Check that each node's output fits the next node's input. No node is called.

    Findings go to stdout. An error always fails at run time, and the exit code is 1; a warning may fail. For
    changes that prevent the resume of a recorded run, see `stroma resume --dry-run`.
    """
    pipeline = load_pipeline(target)
    nodes = [find_node(node) for node in pipeline.nodes]
    registry, steps = ContractRegistry(), steps_of(nodes)
    retried = () if pipeline.config is None else pipeline.config.retried_ids
    findings = check_nodes(nodes, registry, retried=retried, steps=steps)
    errors = sum(finding.severity == "error" for finding in findings)
    code = Code.FAILED if errors else Code.OK
    if as_json:
        emit_fields(
            "stroma.check/1",
            pipeline=pipeline.name,
            exit_code=int(code),
            errors=errors,
            warnings=len(findings) - errors,
            findings=[asdict(finding) for finding in findings],
        )
        return code
    for finding in findings:
        _print_finding(finding)
    if pipeline.config is None or not pipeline.config.context:
        wanting = next((one for one in leaves_in(nodes) if one.wants_context), None)
        if wanting is not None:
            text = f"node {clean(wanting.node_id, 100)!r} takes a context, and the pipeline has none"
            err.line(("note: ", "yellow"), f"{text}; set RunConfig(context=...) on the pipeline")
    count = f"{pluralize(errors, 'error')}, {pluralize(len(findings) - errors, 'warning')}"
    size = pluralize(len(nodes), "node")
    if nodes and isinstance(nodes[0], FlowNode):
        size = f"flow with {pluralize(sum(not isinstance(one, FlowNode) for one in steps), 'node')}"
    err.line(f"{clean(pipeline.name, 100)}: {size}, {count}")
    return code


def _print_finding(finding: Finding) -> None:
    style = "bold red" if finding.severity == "error" else "yellow"
    where = f"{clean(finding.source, 60)} -> {clean(finding.target, 60)}"
    path = f"  {clean(finding.path, 100)}" if finding.path else ""
    out.line((f"{finding.severity:<8}", style), f" {where}{path}  ({finding.kind})")
    out.line(f"         {clean(finding.message, 1000)}")
    out.line(f"         fix: {clean(finding.fix, 1000)}")
