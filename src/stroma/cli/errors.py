"""How a command fails: one message that says what happened, why, and the command that mends it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import IntEnum
from typing import IO, Any

import click

from stroma._utils.text import one_line
from stroma.cli.output import err

__all__ = ["Code", "Problem", "command", "debugging"]


class Code(IntEnum):
    """The exit codes of every command."""

    OK = 0
    FAILED = 1  # the run failed, or gave up for now
    USAGE = 2
    ENVIRONMENT = 3  # the store, the disk, a package that is missing
    NOT_FOUND = 4
    BUDGET = 5  # the budget stopped the run
    DIFFERENT = 6  # `diff` or `replay` found differences
    SUSPENDED = 7  # a node waits for a person
    INTERRUPTED = 130  # everything committed is kept


class Problem(click.ClickException):
    """Ends a command. The first line says what happened and why, the last one what to do.

    Where: on stderr, with the exit code that ``docs/cli.md`` lists.
    Cause: the command's arguments, the files it names, the store, or the run itself.
    Mend: the last line says it; ``STROMA_DEBUG=1`` shows the traceback.
    """

    def __init__(self, message: str, *more: str, code: Code) -> None:
        super().__init__(message)
        self.more = more
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        # Arguments, names of files and words of stores stand in these.
        err.line(("stroma: ", "bold red"), one_line(self.message))
        for line in self.more:
            err.line("  ", one_line(line))


def command(name: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """A command line of ours, to be copied into a shell."""
    context = click.get_current_context(silent=True)
    program = context.find_root().info_name if context is not None else None
    words = [name, *arguments, *options]
    if any(word.startswith("-") and word != "-" for word in arguments):
        words = [name, *options, "--", *arguments]
    return " ".join([program or "stroma", *map(_quote, words)])


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    plain = word.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + "".join(ch if ch.isprintable() else f"\\U{ord(ch):08x}" for ch in plain) + "'"


def debugging() -> bool:
    """Whether errors are shown with their tracebacks."""
    return os.environ.get("STROMA_DEBUG", "") not in ("", "0")
