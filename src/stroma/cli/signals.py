"""Signal handling: SIGINT ends a run at the next await, SIGTERM after the node in flight."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, Final

from stroma._utils.text import format_duration
from stroma.cli.errors import Code

#: Seconds within which a second signal counts as the first: a terminal and a parent both send one.
_ECHO: Final = 0.5


class StopSignals:
    """Handlers that end a task at the first signal and the process at the second.

    They stay until the process ends: user code that does not stop may also block the end of the loop.

    Attributes:
        signal: name of the first signal; None before it.
    """

    def __init__(
        self,
        task: asyncio.Task[object],
        drain: Callable[[], None],
        *,
        patience: str,
        after: str,
        message: str | None = None,
        say: Callable[[str], bool] = lambda _text: False,
        quiet: bool = False,
    ) -> None:
        """Install the handlers, if called in the main thread.

        ``drain``: called in the task's loop for SIGTERM, instead of cancelling the task. ``patience``: its
        time limit as text. ``after``: printed when the second signal ends the process. ``message``: printed
        for the first signal, of either name.
        ``say``: prints this text and returns True, if something else writes to the terminal; must be safe in
            a handler. ``quiet``: the first signal prints nothing.
        """
        self.signal: str | None = None
        self._task = task
        self._drain = drain
        self._loop = task.get_loop()
        self._after = after
        self._say = (lambda _text: True) if quiet else say
        self._messages = {
            "SIGINT": "stopping; finished nodes are stored. Repeat the signal to stop at once",
            "SIGTERM": f"stopping after the node in flight, in {patience} at most; finished nodes are "
            "stored. Repeat the signal to stop at once",
        }
        if message is not None:
            self._messages = dict.fromkeys(self._messages, message)
        self._signalled_at = 0.0
        if threading.current_thread() is threading.main_thread():
            # Not loop.add_signal_handler: its callback would wait for a loop that a node may block.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_at = signal.Signals(number).name, now
            text = f"\nstroma: {self.signal}: {self._messages[self.signal]}\n"
            if not self._say(text):
                _write_stderr(text)
            handler = self._drain if number == signal.SIGTERM else self._cancel
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(handler)
        elif now - self._signalled_at > _ECHO:
            _write_stderr(f"stroma: stopped at once; {self._after}\n")
            os._exit(Code.INTERRUPTED)

    def _cancel(self) -> None:
        self._task.cancel()


def reset_signals() -> None:
    """Take back the handlers of a task that has ended: another one follows in this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_stderr(text: str) -> None:
    # Not sys.stderr: the handler may interrupt a write to it.
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        pass


async def serve_until_signal(
    serving: asyncio.Future[Any],
    shut_down: Callable[[], Awaitable[object]],
    seconds: float,
    *,
    message: str = "draining: runs in progress end after their current step, within {}; another worker "
    "continues them. Repeat the signal to stop at once",
    after: str = "another worker continues the runs that were in progress",
    quiet: bool = False,
) -> str | None:
    """Await work that the first signal shuts down within ``seconds``. Return the name of the signal.

    ``message``: printed for that signal; "{}" is the time limit. ``after``, ``quiet``: see StopSignals.
    """
    is_asked = asyncio.Event()
    waiting = asyncio.ensure_future(is_asked.wait())
    patience = format_duration(seconds)
    stop = StopSignals(
        waiting, is_asked.set, patience=patience, after=after, message=message.format(patience), quiet=quiet
    )
    try:
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await shut_down()
        await serving
    finally:
        waiting.cancel()
    return stop.signal
