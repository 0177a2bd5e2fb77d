"""Errors of commands: one message with the problem, its cause and the command that fixes it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import IntEnum
from typing import IO, Any

import click

from stroma._utils.text import clean, format_host, one_line
from stroma.cli.output import err, write_private


class Code(IntEnum):
    """Exit codes of all commands."""

    OK = 0
    FAILED = 1  # the run failed, or gave up for now
    USAGE = 2
    ENVIRONMENT = 3  # the store, the disk, a package that is missing
    NOT_FOUND = 4
    BUDGET = 5  # the budget stopped the run
    DIFFERENT = 6  # `diff` or `replay` found differences
    SUSPENDED = 7  # a node waits for an answer
    INTERRUPTED = 130  # committed outputs are stored


class Problem(click.ClickException):
    """Failure of a command. The first line states the problem and its cause, the last one the fix.

    Where: on stderr, with the exit code that ``docs/cli.md`` lists.
    Cause: the command's arguments, the files it names, the store, or the run itself.
    Fix: the last line says it; ``STROMA_DEBUG=1`` shows the traceback.
    """

    def __init__(self, message: str, *more: str, code: Code = Code.USAGE) -> None:
        super().__init__(message)
        self.more = more
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        # These quote arguments, file names and messages of stores.
        err.fitted(("stroma: ", "bold red"), one_line(self.message))
        for line in self.more:
            err.hint(f"  {one_line(line)}")


def write_file(path: str, text: str) -> None:
    """Write the file of ``-o``, which only its owner can read. Raises Problem."""
    try:
        write_private(path, text)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise Problem(message, "pass another file: -o FILE", code=Code.ENVIRONMENT) from error


def command(name: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """Return a stroma command line that can be pasted into a shell."""
    parts = [name, *arguments, *options]
    if any(word.startswith("-") and word != "-" for word in arguments):
        parts = [name, *options, "--", *arguments]
    context = click.get_current_context(silent=True)
    program = context.find_root().info_name if context is not None else None
    return " ".join([program or "stroma", *map(_quote, parts)])


def _quote(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    plain = word.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + "".join(ch if ch.isprintable() else f"\\U{ord(ch):08x}" for ch in plain) + "'"


def cannot_listen(what: str, address: tuple[str, int], error: OSError, fix: str) -> Problem:
    """Return the problem of a server whose address cannot be used. ``what``: the option, or ""."""
    host, port = address
    return Problem(
        f"{what}cannot listen on {format_host(host)}:{port}: {error.strerror or error}",
        fix,
        code=Code.ENVIRONMENT,
    )


def is_debugging() -> bool:
    """Return True if errors are shown with their tracebacks."""
    return os.environ.get("STROMA_DEBUG", "") not in ("", "0")


def describe_error(error: BaseException) -> str:
    """Return type and message of an exception; never raises, whatever its ``str()`` does."""
    from stroma._utils.access import error_text  # Few commands fail in user code.

    return clean(error_text(error), 600)


def frame_lines(file: str, line: int, name: str, source: str) -> list[str]:
    """Return the place of a frame in the form of Python, and its line of source if that is known."""
    place = f'File "{clean(file)}", line {line}, in {clean(name)}'
    return [place, *([f"  {clean(source)}"] if source else [])]


def last_frame(error: BaseException, *, of_any: bool = True) -> list[str]:
    """Return the last frame of user code in a traceback, in the form of Python.

    Without such a frame, the last one outside of stroma; none if ``of_any`` is false.
    """
    if isinstance(error, SyntaxError) and error.filename:
        lines = [f'File "{error.filename}", line {error.lineno}']
        return [*lines, *([f"  {clean(error.text)}"] if error.text else [])]
    from stroma.failures.tracebacks import frames_of

    own, others = frames_of(error)
    for frame in (own or (others if of_any else []))[-1:]:
        return frame_lines(frame.filename, frame.lineno or 0, frame.name, frame.line or "")
    return []
