"""Where words go: data to stdout, talk to stderr, colours only where somebody looks."""

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
from collections.abc import Sequence
from typing import IO, Any, Final

__all__ = ["OutputError", "Part", "Stream", "emit", "err", "out", "table", "write_private"]

#: Text, or text with a style of rich's ("bold red").
Part = str | tuple[str, str]


class OutputError(Exception):
    """stdout cannot be written to."""


class Stream:
    """stdout or stderr, whichever it is at the moment of writing."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console: Any = None
        self._silent: IO[str] | None = None
        self._has_status = False

    @property
    def _file(self) -> IO[str] | None:
        # None if the process was started without it.
        file: IO[str] | None = getattr(sys, self._name)
        return file

    @property
    def is_terminal(self) -> bool:
        file = self._file
        try:
            return file is not None and file.isatty()
        except ValueError:  # It was closed.
            return False

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where there is none."""
        return shutil.get_terminal_size().columns if self.is_terminal else None

    def line(self, *parts: Part) -> None:
        """Write one line; it never raises for a reader that has gone away."""
        if (
            any(isinstance(part, tuple) for part in parts)
            and self.is_terminal
            and not os.environ.get("NO_COLOR")
        ):
            self.write(self._coloured(parts))
        else:
            self.write(_plain(parts))

    @property
    def is_live(self) -> bool:
        """Whether a line can be written over."""
        return self.is_terminal and os.environ.get("TERM") != "dumb"

    def status(self, *parts: Part) -> None:
        """Show a line until the next one is written. Only where a line can be written over."""
        text = _plain(parts).rstrip("\n")
        room = (self.width or 80) - 1
        self.write(f"{_OVER}{text if len(text) <= room else text[: room - 1] + '…'}")
        self._has_status = True

    def write(self, text: str) -> None:
        """Write text as it is. Raises OutputError if stdout cannot take it (a full disk, say)."""
        file = self._file
        if file is None or file is self._silent:
            return
        if self._has_status:
            self._has_status = False
            text = text if text.startswith(_OVER) else _OVER + text
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
        """Write no more: the interpreter, too, would complain when it flushes the stream at its end."""
        self._silent = self._file
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._silent.fileno())  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
            os.close(null)

    def _coloured(self, parts: Sequence[Part]) -> str:
        try:
            from rich.console import Console
            from rich.text import Text
        except ModuleNotFoundError:
            return _plain(parts)
        if self._console is None:
            self._console = Console(file=self._file, highlight=False, markup=False, emoji=False)
        # Not printed by rich: it ends the process where the reader has gone away.
        with self._console.capture() as capture:
            self._console.print(Text.assemble(*parts), soft_wrap=True)
        text: str = capture.get()
        return text


def write_private(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that only its owner can read, in place of what is there; never through a link. Raises OSError."""
    path = os.fspath(path)
    with contextlib.suppress(FileNotFoundError):
        kind = os.lstat(path).st_mode
        if stat.S_ISLNK(kind):
            raise FileExistsError(errno.ELOOP, "it is a link, which is not followed", path)
        if not stat.S_ISREG(kind):  # A pipe, a terminal.
            with open(
                os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)), "w", encoding="utf-8"
            ) as file:
                file.write(text)
            return
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".stroma-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


#: To the beginning of the line, and nothing of what stands there stays.
_OVER: Final = "\r\x1b[K"

out = Stream("stdout")
err = Stream("stderr")


# JSON escapes what is below a space. These move the cursor of a terminal, too, or hide what stands beside them.
_UNSEEN: Final = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def emit(data: Any) -> None:
    """Print one JSON value on stdout."""
    file = sys.stdout
    encoding = file.encoding if isinstance(file, io.TextIOWrapper) else "utf-8"
    text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False)
    text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # JSON has escapes of its own for what the stream cannot say.
        text = json.dumps(data, indent=2, allow_nan=False)
    out.write(text + "\n")


def table(
    stream: Stream, header: Sequence[str], rows: Sequence[Sequence[Part]], *, right: frozenset[int]
) -> None:
    """Write columns, those in ``right`` aligned to the right. The last one is cut to the width of a terminal."""
    lines = [[(cell, "bold") for cell in header], *rows]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(header))]
    room = (stream.width or 0) - sum(widths[:-1]) - 2 * (len(header) - 1)
    for line in lines:
        parts: list[Part] = []
        for i, cell in enumerate(line):
            text, style = cell if isinstance(cell, tuple) else (cell, "")
            gap = " " * (widths[i] - _width(cell))
            if i == len(header) - 1:
                # Too little room to read anything: let the terminal wrap it.
                text = text[: room - 1] + "…" if 20 <= room < _width(cell) else text
            elif i in right:
                text = gap + text
            else:
                text += gap
            parts += ["  ", (text, style) if style else text]
        stream.line(*parts[1:])


def _plain(parts: Sequence[Part]) -> str:
    return "".join(part if isinstance(part, str) else part[0] for part in parts).rstrip(" ") + "\n"


def _width(part: Part) -> int:
    text = part if isinstance(part, str) else part[0]
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(ch) in "WF" for ch in text)
    return len(text) + wide - sum(unicodedata.combining(ch) > 0 for ch in text)
