"""Lines at the bottom of a terminal that are redrawn in place, with all other output above them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any, Final

from stroma._utils.text import clean
from stroma.cli.output import Part, Stream, cell_width

__all__ = ["Screen"]

_TICK_SECONDS: Final = 0.2
#: Begin and end of an update that terminals show at once; others ignore it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"


class Screen:
    """Live lines of a terminal. What the process prints meanwhile is written above them.

    The cursor stays visible and below the lines: a process that is killed leaves a clean terminal. Output of
    child processes, which write to the terminal themselves, is not known here and may be overwritten.
    """

    def __init__(self, stream: Stream, draw: Callable[[int, int], Sequence[Sequence[Part]]]) -> None:
        """Prepare the lines of ``draw(columns, rows)``: at most ``rows`` lines of at most ``columns`` cells."""
        self._stream = stream
        self._draw = draw
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._messages: deque[str] = deque()
        self._is_open = self._is_drawing = False
        self._text = ""  # of the lines, as it was written last
        self._cells: list[int] = []  # of each line
        self._partial = ""  # printed without a line end so far
        self._has_moved = False  # The cursor is no longer below the lines.
        self._old_handler: Any = None  # of SIGCONT; None unless it was replaced
        self._delayed: list[str] = []  # printed while the lines are drawn
        self._patched: list[IO[str]] = []
        self._raw: Callable[[str], Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Draw the lines from now on. Safe to call twice."""
        with self._lock:
            file = sys.stderr if self._stream.is_live else None
            if self._is_open or self._ended.is_set() or file is None:
                return
            self._raw, self._is_open = file.write, True
            self._capture()
            self.refresh()
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCONT"):
            self._old_handler = signal.signal(signal.SIGCONT, self._on_continue)
        self._thread = threading.Thread(target=self._tick, name="stroma-screen", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the lines; everything that was printed stays. Safe to call twice."""
        self._ended.set()
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            for file in self._patched:
                with contextlib.suppress(AttributeError):
                    del file.write
            text = "".join(self._delayed) + self._partial
            text += "\n" if text and not text.endswith("\n") else ""
            self._write(self._erase() + text + self._take_messages())
        if self._old_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCONT, self._old_handler)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1)

    def say(self, text: str) -> bool:
        """Print lines soon, and return True; False if there are no live lines. Safe in a signal handler."""
        if not self._is_open:
            return False
        self._messages.append(text.lstrip("\n"))
        return True

    def refresh(self) -> None:
        """Draw the lines again if they changed. Nothing is drawn while the process is in the background of its terminal."""
        with self._lock:
            if self._is_open and not self._is_drawing and not _is_in_background():
                self._redraw()

    def _on_continue(self, number: int, frame: Any) -> None:
        """Leave what the shell has written since the process was stopped: the lines are drawn below it."""
        self._has_moved = True
        if callable(self._old_handler):
            self._old_handler(number, frame)

    # ------------------------------------------------------------------ drawing

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self.refresh()

    def _redraw(self) -> None:
        columns, rows = self._stream.size
        self._is_drawing = True
        try:
            lines = [list(line) for line in self._draw(columns - 1, max(0, rows - 1 - bool(self._partial)))]
            if self._partial:
                lines.insert(0, [clean(self._partial.rpartition("\r")[2], columns - 1)])
            text = "".join(self._stream.render(*line) for line in lines)
            cells = [sum(map(cell_width, line)) for line in lines]
        finally:
            self._is_drawing = False
        above = self._take_messages() + "".join(self._delayed)
        self._delayed.clear()
        if above or text != self._text or self._has_moved:
            self._show(above, text, cells)

    def _show(self, above: str, text: str, cells: list[int]) -> None:
        erased = self._erase()
        self._text, self._cells = text, cells
        self._write(f"{_BEGIN}{erased}{above}{text}{_END}")

    def _erase(self) -> str:
        """Return the sequence that moves the cursor to the first of the lines and clears them; the terminal may be narrower by now."""
        if self._has_moved:
            self._has_moved, self._cells = False, []
        columns = max(1, self._stream.size[0])
        rows = sum(max(1, -(-cells // columns)) for cells in self._cells)
        return f"\r\x1b[{rows}A\x1b[J" if rows else ""

    def _take_messages(self) -> str:
        """Return the messages of :meth:`say`."""
        text = ""
        while self._messages:
            text += self._messages.popleft()
        return text

    def _write(self, text: str) -> None:
        if not text or self._raw is None:
            return
        try:
            self._raw(text)
            sys.stderr.flush()
        except (OSError, ValueError):  # The terminal is gone.
            self._stream.silence()

    # ------------------------------------------------------------------ output of others

    def _capture(self) -> None:
        """Take over ``write`` of stderr, and of stdout on a terminal: loggers have references to those objects."""
        files = dict.fromkeys([sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__])
        for file in files:
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                if file is not None and file.isatty():
                    file.write = self._replacement(file.write)  # type: ignore[method-assign]
                    self._patched.append(file)

    def _replacement(self, raw: Callable[[str], int]) -> Callable[[str], int]:
        def write(text: str) -> int:
            if not isinstance(text, str) or not self._is_open or os.getpid() != self._pid:
                return raw(text)  # Of a forked child, for example.
            with self._lock:
                if self._is_drawing:
                    self._delayed.append(text)
                    return len(text)
                whole, end, self._partial = (self._partial + text).rpartition("\n")
                if end:
                    self._show(self._take_messages() + whole + end, self._text, self._cells)
            return len(text)

        return write


def _is_in_background() -> bool:
    """Return True if another process of the terminal has its input, after Ctrl-Z and `bg`."""
    try:
        return os.tcgetpgrp(2) != os.getpgrp()
    except (
        OSError,
        AttributeError,
    ):  # Standard error is no terminal, or not the one that controls this process.
        return False
