"""`stroma graph`."""

from __future__ import annotations

import re

import click

from stroma.checkpoint.history.reader import History
from stroma.checkpoint.history.run_graph import RunGraph
from stroma.cli.errors import Code, Problem, write_file
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, err, out
from stroma.cli.stores import Database, db_option
from stroma.contracts.checks.lineage import Lineage, lineage_of
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import find_node
from stroma.runner.pipeline import Pipeline


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "svg", "json"]),
    help="Format to print on stdout, in place of a file.",
)
@click.option("--from-runs", is_flag=True, help="Draw the steps that the recorded runs took.")
@db_option
def graph(target: str, form: str | None, from_runs: bool, db: str | None) -> None:
    """Draw the nodes with their contracts, and which field of a node feeds which other field.

    The drawing is the file NAME.graph.svg, which a browser opens. With --format it goes to stdout. No node
    is called. Findings of `stroma check` are marked. JSON has the schema "stroma.graph/1".

    With --from-runs, for a flow: how often each step was called and failed in the runs of the store, how
    often which step followed which, and after which steps the runs ended. JSON has the schema
    "stroma.run_graph/1".
    """
    pipeline = load_pipeline(target)
    drawing: RunGraph | Lineage
    if from_runs:
        drawing = _run_graph(pipeline, db)
    else:
        drawing = lineage_of(pipeline.name, [find_node(node) for node in pipeline.nodes], ContractRegistry())
    if form == "json":
        emit({"schema": "stroma.run_graph/1" if from_runs else "stroma.graph/1", **drawing.data()})
    elif form is not None:
        out.write(drawing.svg() if form == "svg" else drawing.mermaid())
    else:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", pipeline.name).strip("-")[:100] or "pipeline"
        # A suffix of its own, so that no image of the user is overwritten.
        write_file(f"{name}.graph.svg", drawing.svg())
        err.line(f"wrote {name}.graph.svg; open it in a browser")


def _run_graph(pipeline: Pipeline, db: str | None) -> RunGraph:
    database = Database.from_option(db)
    drawing = History(database.reader).run_graph(pipeline.name)
    if not drawing.runs:
        raise Problem(
            f"no runs of {pipeline.name!r} in {database.name}",
            f"list the runs: {database.hint('runs')}",
            code=Code.NOT_FOUND,
        )
    return drawing
