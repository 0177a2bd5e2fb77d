"""`stroma completion`, and what the shell may complete: commands and options, which click knows, and ids of runs."""

from __future__ import annotations

import os
import re
from typing import Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from stroma.cli.output import err, out

__all__ = ["complete_run", "completion"]

_SHELLS: Final = ("bash", "zsh", "fish")
_WHERE: Final = {
    "bash": "stroma completion bash > ~/.local/share/bash-completion/completions/stroma",
    "zsh": "stroma completion zsh > ~/.zfunc/_stroma  (a directory of fpath)",
    "fish": "stroma completion fish > ~/.config/fish/completions/stroma.fish",
}
_MOST: Final = 50
_PLAIN: Final = re.compile(r"[\w.:@%+,/=-]+")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script by which a shell completes commands, options and ids of runs.

    \b
    bash: stroma completion bash > ~/.local/share/bash-completion/completions/stroma
    zsh:  stroma completion zsh > ~/.zfunc/_stroma     (a directory of fpath)
    fish: stroma completion fish > ~/.config/fish/completions/stroma.fish
    """
    root = click.get_current_context().find_root()
    made = get_completion_class(shell)
    assert made is not None  # They are click's own.
    out.write(made(root.command, {}, "stroma", "_STROMA_COMPLETE").source() + "\n")
    if out.is_terminal:
        err.line("keep it where the shell looks: ", _WHERE[shell])


def complete_run(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of runs that begin so, the newest first; none where the store cannot be read."""
    from stroma._utils.text import clean
    from stroma.cli.formatting import ago
    from stroma.cli.stores import Database

    try:
        # While a line is completed, click reads no option that stands behind the cursor, and no variable.
        database = Database.choose(ctx.params.get("db") or os.environ.get("STROMA_DB"), quiet=True)
        if database.is_empty:
            return []
        store: Any = database.reader
        ids = (
            store.find_run(incomplete, limit=_MOST)
            if incomplete
            else [run.run_id for run in store.list_runs(limit=_MOST)]
        )
        # What the shell would take apart, or run, is not offered.
        records = [store.get_run(run_id) for run_id in ids if _PLAIN.fullmatch(run_id)]
        return [
            CompletionItem(run.run_id, help=f"{clean(run.pipeline, 30)} {run.status} {ago(run.started_ms)}")
            for run in records
            if run is not None
        ]
    except Exception:  # A Tab never prints an error in the midst of a command line.
        return []
