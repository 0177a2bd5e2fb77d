"""A terminal that commands write to: a system pseudo-terminal and a screen that shows it."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_TOKENS = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|\t|[^\x1b\r\n\t]+")


class Emulator:
    """The lines that a terminal of this size shows, those that have left it at the top among them.

    Attributes:
        wrapped: lines that the terminal has broken because they were too wide.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        #: Each cell with its style.
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = self.wrapped = 0
        self.style = ""

    def write(self, text: str) -> None:
        for match in _TOKENS.finditer(text):
            token, argument, command = match[0], match[1], match[2]
            if command == "A":
                top = max(0, len(self.lines) - self.rows)
                self.row = max(top, self.row - int(argument or 1))
            elif command == "J":
                del self.lines[self.row][self.column :]
                del self.lines[self.row + 1 :]
            elif command == "K":
                del self.lines[self.row][:]
            elif command == "m":
                self.style = "" if argument in ("", "0") else self.style + token
            elif command is not None:
                assert command in "hl", token
            elif token == "\r":
                self.column = 0
            elif token == "\n":
                self._next_row()
            else:
                for ch in token.expandtabs():
                    self._put(ch)

    def _put(self, ch: str) -> None:
        if self.column == self.columns:
            self.wrapped += 1
            self._next_row()
        line = self.lines[self.row]
        line += [(" ", "")] * (self.column + 1 - len(line))
        line[self.column] = (ch, self.style)
        self.column += 1

    def _next_row(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])

    @property
    def text(self) -> str:
        return "\n".join("".join(ch for ch, _ in line).rstrip() for line in self.lines)

    @property
    def styled(self) -> str:
        """The text with its colours, as escape sequences."""
        return "\n".join(
            "".join(f"{style}{ch}\x1b[0m" if style else ch for ch, style in line) for line in self.lines
        )


class TerminalFile(io.StringIO):
    """A file that is a terminal: what is written to it is shown by an emulator."""

    encoding = "utf-8"

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.emulator = emulator

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.emulator.write(text)
        return super().write(text)


def run_on_terminal(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    *,
    columns: int = 80,
    rows: int = 24,
    at: Callable[[subprocess.Popen[bytes], Emulator], None] | None = None,
    seconds: float = 30,
) -> tuple[int, Emulator, str]:
    """Run a command whose stdin, stdout and stderr are a terminal; ``at`` is called whenever it has written
    something.

    Return its exit code, the screen, and what it wrote.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    emulator, written = Emulator(columns, rows), ""
    environment = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 1)[0]:
                continue
            try:
                part = os.read(master, 65536)
            except OSError:  # The other end is closed.
                break
            if not part:
                break
            text = part.decode(errors="replace")
            written += text
            emulator.write(text)
            if at is not None:
                at(process, emulator)
        return process.wait(timeout=10), emulator, written
    finally:
        os.close(master)
        if process.poll() is None:
            process.kill()
            process.wait()
