"""Pages that many viewers have open: each is rendered once for a state of the store, and no more often than it costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from stroma.ui.formatting import accepts_gzip

__all__ = ["SharedPages"]

#: The state that an event named, as an open page sends it back when it asks for itself again.
_STATE_HEADER: Final = "x-stroma-state"
_MAX_PAGES: Final = 50
_MAX_STATE_LENGTH: Final = 100  # characters
#: CPU seconds of a request for a page that is rendered already.
_REQUEST_SECONDS: Final = 0.002
#: Open pages are notified of changes so seldom that their requests take at most one part in so many of a
#: core.
_SHARE: Final = 25


class SharedPages:
    """Rendered pages by address and state; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[tuple[str, bool, str], Response] = {}
        self._seconds: dict[str | None, float] = {}

    def get(self, request: Request, run_id: str | None, render: Callable[[], Response]) -> Response:
        """Return the page of a request; with the state of an event, the one that was rendered for another viewer.

        ``run_id``: the run on the page; None for the list of runs.
        """
        state = request.headers.get(_STATE_HEADER, "")[:_MAX_STATE_LENGTH]
        if not state:
            return self._render(run_id, render)
        key = str(request.url), accepts_gzip(request), state
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                if len(self._pages) >= _MAX_PAGES:
                    self._pages.clear()
                page = self._pages[key] = self._render(run_id, render)
            return page

    def _render(self, run_id: str | None, render: Callable[[], Response]) -> Response:
        began = time.thread_time()
        page = render()
        if len(self._seconds) >= _MAX_PAGES:
            self._seconds.clear()
        self._seconds[run_id] = time.thread_time() - began
        return page

    def interval(self, run_id: str | None, viewers: int) -> float:
        """Return the shortest time in seconds between two notifications of so many viewers of a run, or of the list."""
        return _SHARE * (self._seconds.get(run_id, 0.0) + viewers * _REQUEST_SECONDS)
