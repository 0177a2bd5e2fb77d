"""`stroma completion`, and the completion of run ids."""

from __future__ import annotations

import os
import re
from typing import Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from stroma.cli.output import out

_SHELLS: Final = ("bash", "zsh", "fish")
_MOST: Final = 50
_PLAIN: Final = re.compile(r"[\w.:@%+,/=-]+")


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands, options and run ids in a shell.

    \b
    bash: stroma completion bash > ~/.local/share/bash-completion/completions/stroma
    zsh:  stroma completion zsh > ~/.zfunc/_stroma     (a directory of fpath)
    fish: stroma completion fish > ~/.config/fish/completions/stroma.fish
    """  # noqa: D301, click reads the backspace
    root = click.get_current_context().find_root()
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    out.write(completion_class(root.command, {}, "stroma", "_STROMA_COMPLETE").source() + "\n")


def complete_run(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return run ids with this prefix, newest first; none if the store cannot be read."""
    from stroma._utils.text import clean
    from stroma.cli.formatting import format_age
    from stroma.cli.stores import Database

    try:
        from stroma.checkpoint.history.facts import status_of

        # During completion click reads neither options after the cursor nor environment variables.
        database = Database.from_option(ctx.params.get("db") or os.environ.get("STROMA_DB"), quiet=True)
        if database.is_empty:
            return []
        store: Any = database.reader
        records = store.list_runs(limit=_MOST)
        if incomplete:
            records = filter(None, map(store.get_run, store.find_run(incomplete, limit=_MOST)))
        items = []
        for run in records:
            if _PLAIN.fullmatch(run.run_id):  # Ids that the shell would split or run are not offered.
                about = f"{clean(run.pipeline, 30)} {status_of(run)} {format_age(run.started_ms)}"
                items.append(CompletionItem(run.run_id, help=about))
        return items
    except Exception:  # Completion must not print errors into the command line.
        return []
