"""Server-sent events: a word to the pages that are open when what they show has changed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stroma.checkpoint.errors import StoreError

if TYPE_CHECKING:
    from stroma.ui.settings import Settings

__all__ = ["Events"]

#: Pages that are told at once. Each of them looks at the store.
_MOST: Final = 50
#: Looks without news after which a word shows that the connection lives.
_STILL: Final = 15
_LONGEST_ID: Final = 10_000  # characters


class _Watched:
    """What pages watch: one run, or the list of all. One look serves all pages that are open."""

    def __init__(self) -> None:
        self.pages = 0
        #: What was seen last, and when.
        self.when, self.state = -math.inf, ""
        self.looking = asyncio.Lock()


class _Stream(StreamingResponse):
    """Events for one page, which is counted from before the first one until the connection ends."""

    def __init__(self, events: Events, request: Request, run_id: str | None) -> None:
        self._events, self._run_id = events, run_id
        watched = events.open(run_id)
        super().__init__(
            events.changes(request, run_id, watched),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.close(self._run_id)


class Events:
    """Tells that something changed, never what: the page asks for that, as it did the first time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = 0
        self._watched: dict[str | None, _Watched] = {}

    async def stream(self, request: Request) -> Response:
        run_id = request.query_params.get("id")
        if run_id is not None and len(run_id) > _LONGEST_ID:
            raise HTTPException(414, "this is longer than any run id")
        if self._open >= _MOST:
            raise HTTPException(503, "too many pages are open; close some")
        return _Stream(self, request, run_id)

    def open(self, run_id: str | None) -> _Watched:
        """Count one more page."""
        self._open += 1
        watched = self._watched.setdefault(run_id, _Watched())
        watched.pages += 1
        return watched

    def close(self, run_id: str | None) -> None:
        """Count one page less, and forget what no page watches any more."""
        self._open -= 1
        watched = self._watched[run_id]
        watched.pages -= 1
        if not watched.pages:
            del self._watched[run_id]

    async def changes(self, request: Request, run_id: str | None, watched: _Watched) -> AsyncIterator[str]:
        """Yield an event for each change, until the page is closed."""
        seen, still = await self._look(run_id, watched), 0
        yield "retry: 2000\n\n"
        while not await request.is_disconnected():
            await asyncio.sleep(self._settings.poll_seconds)
            state = await self._look(run_id, watched)
            if state != seen:
                seen, still = state, 0
                yield "event: changed\ndata: {}\n\n"
            else:
                still += 1
                if still % _STILL == 0:
                    yield ": still here\n\n"

    async def _look(self, run_id: str | None, watched: _Watched) -> str:
        async with watched.looking:
            if time.monotonic() - watched.when >= self._settings.poll_seconds / 2:
                watched.state = await to_thread.run_sync(self._state, run_id)
                watched.when = time.monotonic()
            return watched.state

    def _state(self, run_id: str | None) -> str:
        """A fingerprint of what the page shows."""
        store = self._settings.store
        try:
            if not store.exists():
                return ""
            if run_id is not None:
                record = store.get_run(run_id)
                records = [] if record is None else [record]
            else:
                records = store.list_runs(limit=100)
        except (StoreError, ValueError) as error:
            return type(error).__name__
        told = [(r.run_id, r.execution, r.status, r.updated_ms, r.tokens, r.holder) for r in records]
        return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()
