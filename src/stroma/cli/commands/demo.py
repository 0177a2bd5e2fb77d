"""`stroma demo`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from stroma.cli.errors import Code, Problem


@click.command()
@click.argument("scene", type=click.Choice(["documents", "agent"]), default="documents")
@click.option(
    "--dir",
    "work",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Directory of the database and the report.  [default: a new temporary one]",
)
def demo(scene: str, work: Path | None) -> int:
    """Run the demo: documents with an unreliable provider, or `demo agent`, which is killed while it pays."""
    if scene != "agent" and importlib.util.find_spec("openai") is None:
        raise Problem(
            "the demo calls its provider through the openai client, which is not installed",
            f"install it with: {sys.executable} -m pip install 'stroma-runner[demo]'",
            code=Code.ENVIRONMENT,
        )
    if work is not None and (work / "runs.db").exists():
        raise Problem(f"{work} contains an earlier demo", "pass another directory: --dir")
    from stroma.demo import show

    return show.main(scene, work)
