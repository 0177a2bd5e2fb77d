"""`stroma graph`."""

from __future__ import annotations

import click

from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, out
from stroma.contracts.checks.lineage import lineage_of
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node

__all__ = ["graph"]


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "svg", "json"]),
    default="mermaid",
    show_default=True,
    help="Output format.",
)
def graph(target: str, form: str) -> None:
    """Print the nodes with their contracts, and which field of a node feeds which other field.

    No node is called. Findings of `stroma check` are marked. JSON has the schema "stroma.graph/1".
    """
    pipeline = load_pipeline(target)
    lineage = lineage_of(pipeline.name, [find_node(node) for node in pipeline.nodes], ContractRegistry())
    if form == "json":
        emit({"schema": "stroma.graph/1", **lineage.data()})
    elif form == "svg":
        out.write(lineage.svg())
    else:
        out.write(lineage.mermaid())
