"""SIGINT ends a run at the next await, SIGTERM after the node in flight; everything committed is kept."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Final

from stroma.cli.errors import Code

__all__ = ["Stop"]

#: Seconds within which a second signal is the echo of the first (a terminal and a parent both send one).
_ECHO: Final = 0.5


class Stop:
    """Asks a task for its end at the first signal, ends the process at the second.

    The handlers stay until the process ends: code of the user's that does not stop may hold up the loop's end, too.

    Attributes:
        signal: the name of the first signal; None as long as there was none.
    """

    def __init__(
        self,
        task: asyncio.Task[object],
        drain: Callable[[], None],
        *,
        patience: str,
        after: str,
        says: Mapping[str, str] | None = None,
    ) -> None:
        """``drain``: called in the task's loop for SIGTERM, in place of cancelling the task.

        ``patience``: how long that may take, in words. ``after``: what to tell who does not want to wait for the
        task's end, as one line. ``says``: what is said of the first signal, by its name, in place of that.
        """
        self.signal: str | None = None
        self._task = task
        self._drain = drain
        self._loop = task.get_loop()
        self._after = after
        self._says = {
            "SIGINT": "stopping; what is finished is being kept. Again to stop at once",
            "SIGTERM": f"stopping after the node in flight, in {patience} at most; what is finished is being kept. "
            "Again to stop at once",
            **(says or {}),
        }
        self._at = 0.0
        if threading.current_thread() is threading.main_thread():
            # Not loop.add_signal_handler: that one waits for a loop which a node may be blocking.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._arrived)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = signal.Signals(number).name, now
            _say(f"\nstroma: {self.signal}: {self._says[self.signal]}\n")
            ask = self._drain if number == signal.SIGTERM else self._cancel
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(ask)
        elif now - self._at > _ECHO:
            _say(f"stroma: stopped at once; {self._after}\n")
            os._exit(Code.INTERRUPTED)

    def _cancel(self) -> None:
        self._task.cancel()


def _say(text: str) -> None:
    # Not through sys.stderr: the handler may have come in the middle of a write to it.
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        pass
