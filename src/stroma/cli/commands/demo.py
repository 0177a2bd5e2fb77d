"""`stroma demo`."""

from __future__ import annotations

import importlib.util
import sys

import click

from stroma.cli.errors import Code, Problem


@click.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def demo(argv: tuple[str, ...]) -> int:
    """Run the demo: documents with an unreliable provider, or `demo agent`, which is killed while it pays."""
    if "agent" not in argv and importlib.util.find_spec("openai") is None:
        raise Problem(
            "the demo calls its provider through the openai client, which is not installed",
            f"install it with: {sys.executable} -m pip install 'stroma-runner[demo]'",
            code=Code.ENVIRONMENT,
        )
    from stroma.demo import show

    return int(show.main(list(argv)))
