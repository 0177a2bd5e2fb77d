"""Terminal output: data on stdout, messages on stderr, colour only on a terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

import click

from stroma._utils.text import break_command, visible

#: Text, or text with a style: a colour, "bold", "dim", or several of them ("bold red").
Part = str | tuple[str, str]

#: Of lines for people, on a wider terminal and elsewhere.
_MAX_COLUMNS: Final = 100

_MIN_LAST: Final = 30  # of the last column of a table, if it has that much


class OutputError(Exception):
    """Writing to stdout failed."""


class Stream:
    """stdout or stderr, looked up for each write."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._silent: IO[str] | None = None

    @property
    def _file(self) -> IO[str] | None:
        file: IO[str] | None = getattr(sys, self._name)
        return file

    @property
    def is_terminal(self) -> bool:
        file = self._file
        try:
            return file is not None and file.isatty()
        except ValueError:
            return False

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None if this is not a terminal."""
        return self.size[0] if self.is_terminal else None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal; COLUMNS and LINES precede what it says itself."""
        file: Any = self._file
        try:
            size = os.get_terminal_size(file.fileno())
        except (OSError, ValueError, AttributeError):
            size = os.terminal_size((0, 0))
        # Not of stdout, as shutil has it, which may be a pipe.
        fallback = shutil.get_terminal_size()
        columns, rows = (os.environ.get(name, "") for name in ("COLUMNS", "LINES"))
        return (
            fallback.columns if columns.isdecimal() else size.columns or fallback.columns,
            fallback.lines if rows.isdecimal() else size.lines or fallback.lines,
        )

    def line(self, *parts: Part) -> None:
        """Write one line. Never raises if the reader has closed the pipe."""
        self.write(self.render(*parts))

    def fitted(self, *parts: Part, indent: int = 4) -> None:
        """Write one line; on a terminal, in lines of at most 100 columns, broken at spaces only."""
        if not self.is_terminal:
            self.line(*parts)
            return
        for line in wrap(parts, max(self.columns, 2 * indent), indent):
            self.line(*line)

    def hint(self, text: str) -> None:
        """Write a line; a command at its end can still be pasted where a terminal breaks it."""
        words, colon, command = text.partition(": ")
        if not colon:
            self.fitted(text)
            return
        if self.is_terminal and len(text) > self.columns:
            text = f"{words}:\n    {break_command(command, self.columns - 4)}"
        self.write(text + "\n")

    @property
    def columns(self) -> int:
        """Columns of a line for people."""
        return min(_MAX_COLUMNS, (self.width or _MAX_COLUMNS + 1) - 1)

    def render(self, *parts: Part) -> str:
        """Return one line with its line end, coloured on a terminal that is not dumb."""
        if not self.is_live or os.environ.get("NO_COLOR"):
            return "".join(part if isinstance(part, str) else part[0] for part in parts).rstrip(" ") + "\n"
        return "".join(part if isinstance(part, str) else _styled(*part) for part in parts) + "\n"

    @property
    def is_live(self) -> bool:
        """Return True if a line can be coloured, and overwritten."""
        return self.is_terminal and os.environ.get("TERM") != "dumb"

    def write(self, text: str) -> None:
        """Write text unchanged. Raises OutputError if stdout fails (a full disk, for example)."""
        file = self._file
        if file is None or file is self._silent:
            return
        try:
            file.write(text)
            file.flush()
        except BrokenPipeError:
            self.silence()
        except (OSError, ValueError) as error:
            self.silence()
            if self._name == "stdout":
                raise OutputError(str(error)) from error

    def silence(self) -> None:
        """Discard all further output, also what the interpreter flushes at exit."""
        file: Any = self._file
        self._silent = file
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Send what code of the user writes to stderr, also in subprocesses: stdout has data only."""
    with contextlib.ExitStack() as stack:
        if sys.__stdout__ is not None and sys.__stderr__ is not None:  # Else it is closed, or another file.
            stdout = os.dup(1)
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, 1)
            os.dup2(2, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _styled(text: str, style: str) -> str:
    words = style.split()
    colour = next((word for word in words if word not in ("bold", "dim")), None)
    return click.style(text, fg=colour, bold="bold" in words or None, dim="dim" in words or None)


def write_private(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by one that only its owner can read. Never follows a link. Raises OSError.

    Lone surrogates, which UTF-8 cannot encode, are escaped as JSON and Python escape them.
    """
    path, data = os.fspath(path), text.encode("utf-8", "backslashreplace")
    with contextlib.suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if stat.S_ISLNK(kind):
            raise FileExistsError(errno.ELOOP, "it is a link, and links are not followed", path)
        if not stat.S_ISREG(kind):  # A pipe, a terminal.
            with open(os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)), "wb") as file:
                file.write(data)
            return
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".stroma-")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


out = Stream("stdout")
err = Stream("stderr")


def emit(data: Any) -> None:
    """Print one JSON value on stdout."""
    file = sys.stdout
    encoding = file.encoding if isinstance(file, io.TextIOWrapper) else "utf-8"
    text = visible(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # JSON can escape what the encoding lacks.
        text = json.dumps(data, indent=2, allow_nan=False)
    out.write(text + "\n")


def emit_fields(schema: str, **fields: Any) -> None:
    """Print one JSON object with the name of its schema on stdout."""
    emit({"schema": schema, **fields})


def table(
    stream: Stream,
    header: Sequence[str],
    rows: Sequence[Sequence[Part]],
    *,
    right: frozenset[int],
    spare: Sequence[int] = (),
) -> None:
    """Write columns, those in ``right`` right-aligned; no line is wider than the terminal.

    On a terminal, columns of ``spare`` are left out in this order until the last column has room, and columns
    without a value too.
    """
    lines: list[list[Part]] = [[(cell, "bold") for cell in header], *map(list, rows)]
    widths = [max(cell_width(line[i]) for line in lines) for i in range(len(header))]
    columns = stream.width
    shown = list(range(len(header)))
    last = shown[-1]
    for i in spare if columns is not None else ():
        room = (columns or 0) - sum(widths[k] + 2 for k in shown[:-1])
        if room >= min(widths[last], _MIN_LAST):
            break
        shown.remove(i)
    for line in lines:
        parts: list[Part] = []
        used = 0
        for i in shown:
            cell = line[i]
            gap = " " * (widths[i] - cell_width(cell)) if i != last else ""
            if columns is not None:
                cell = fit(cell, max(0, columns - used - (len(gap) if i in right else 0)))
            text, style = cell if isinstance(cell, tuple) else (cell, "")
            text = gap + text if i in right else text + gap
            parts += [(text, style) if style else text, "  "]
            used += cell_width(text) + 2
        stream.line(*parts[:-1])


def cell_width(part: Part) -> int:
    """Return the cells of a terminal that a text takes."""
    text = part if isinstance(part, str) else part[0]
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(ch) in "WF" for ch in text)
    return len(text) + wide - sum(unicodedata.combining(ch) > 0 for ch in text)


def fit(part: Part, cells: int) -> Part:
    """Return a text cut to as many cells."""
    if cell_width(part) <= cells:
        return part
    text, style = (part, "") if isinstance(part, str) else part
    text = text[: max(0, cells - 1)]
    while text and cell_width(text) >= cells:
        text = text[:-1]
    text = f"{text}…" if cells else ""
    return (text, style) if style else text


def wrap(parts: Sequence[Part], cells: int, indent: int) -> list[list[Part]]:
    """Return the lines of a text, broken at spaces or in wide words; all but the first are indented."""
    lines: list[list[Part]] = [[]]
    used = 0
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        for piece in re.findall(r" +|[^ ]+", text):
            while piece:
                width, room = cell_width(piece), cells - used
                if width <= room:
                    lines[-1].append((piece, style) if style else piece)
                    used += width
                    break
                if used > indent:
                    lines.append([" " * indent])
                    used = indent
                    if piece[0] == " ":
                        break
                    continue
                head = piece[: max(1, room)]
                while len(head) > 1 and cell_width(head) > room:
                    head = head[:-1]
                lines[-1].append((head, style) if style else head)
                used, piece = cells, piece[len(head) :]
    return lines
