"""Server-sent events: a word to the pages that are open when what they show has changed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stroma.checkpoint.errors import StoreError

if TYPE_CHECKING:
    from stroma.ui.app import Settings

__all__ = ["Events"]

#: Pages that are told at once. Each of them looks at the store.
_MOST: Final = 50
#: Looks without news after which a word shows that the connection lives.
_STILL: Final = 15


class Events:
    """Tells that something changed, never what: the page asks for that, as it did the first time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = 0
        #: What was seen last, and when, for each thing that is watched: one look serves all pages.
        self._seen: dict[str | None, tuple[float, str]] = {}
        self._looking: dict[str | None, asyncio.Lock] = {}

    async def stream(self, request: Request) -> Response:
        if self._open >= _MOST:
            raise HTTPException(503, "too many pages are open; close some")
        run_id = request.query_params.get("id")
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(
            self._changes(request, run_id), media_type="text/event-stream", headers=headers
        )

    async def _changes(self, request: Request, run_id: str | None) -> AsyncIterator[str]:
        self._open += 1
        try:
            seen, still = await self._look(run_id), 0
            yield "retry: 2000\n\n"
            while not await request.is_disconnected():
                await asyncio.sleep(self._settings.poll_seconds)
                state = await self._look(run_id)
                if state != seen:
                    seen, still = state, 0
                    yield "event: changed\ndata: {}\n\n"
                else:
                    still += 1
                    if still % _STILL == 0:
                        yield ": still here\n\n"
        finally:
            self._open -= 1
            if not self._open:
                self._seen.clear()
                self._looking.clear()

    async def _look(self, run_id: str | None) -> str:
        async with self._looking.setdefault(run_id, asyncio.Lock()):
            when, state = self._seen.get(run_id, (-math.inf, ""))
            if time.monotonic() - when >= self._settings.poll_seconds / 2:
                state = await to_thread.run_sync(self._state, run_id)
                self._seen[run_id] = time.monotonic(), state
            return state

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
