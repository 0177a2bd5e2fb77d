"""Server-sent events: notify open pages of changes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stroma._utils.logs import get_logger
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.manager import CheckpointManager
from stroma.contracts.contract import ContractRegistry
from stroma.runner.events import StreamEvent
from stroma.runner.follow import follow
from stroma.runner.stored_runs import StoredRuns
from stroma.trace.redaction import Redact, hide_state

if TYPE_CHECKING:
    from stroma.ui.rendering import SharedPages
    from stroma.ui.settings import Settings

logger = get_logger()

#: The end of a text that is shown, in characters.
_SHOWN_CHARACTERS: Final = 20_000
_ENDS_OF_RUN: Final = ("run_end", "run_suspended")

#: Maximum number of open pages with events; each polls the store.
_MAX_PAGES: Final = 50
#: Between two looks of a page at a text that grows.
_TEXT_SECONDS: Final = 0.2
#: Polls without changes after which a comment keeps the connection open.
_KEEPALIVE_POLLS: Final = 15


class LiveText:
    """Texts by the place of their attempt, while it is under way: its end, or another attempt, discards them.

    ``changed`` is set when there is something new to show.
    """

    def __init__(self, redact: Redact | None) -> None:
        self.changed = asyncio.Event()
        self._redact = redact
        self._texts: dict[tuple[int | None, str], tuple[StreamEvent, str]] = {}

    async def follow(self, stored: StoredRuns, run_id: str) -> None:
        """Take the stored events of a run until its end. A run without stored events has no text."""
        try:
            async for event in follow(stored, run_id, EventPlace(0, 0), None):
                self.take(event)
        except StoreError as error:
            logger.debug("the text of run %r is not shown: %s", run_id, error)

    def take(self, event: StreamEvent) -> None:
        """Take an event."""
        place = event.position, event.branch
        if event.kind == "node_event":
            text = hide_state(self._redact, {event.name: event.data}).get(event.name)
            if event.name != "delta" or not isinstance(text, str):
                return
            first, before = self._texts.get(place, (event, ""))
            before = before if first.attempt_id == event.attempt_id else ""
            self._texts[place] = event, (before + text)[-_SHOWN_CHARACTERS:]
            self.changed.set()
        elif event.kind in _ENDS_OF_RUN:
            if self._texts:
                self.changed.set()
            self._texts.clear()
        elif event.node_id is not None and self._texts.pop(place, None) is not None:
            self.changed.set()

    def shown(self) -> list[dict[str, Any]]:
        """Return the texts as JSON data, and note that they were shown."""
        self.changed.clear()
        return [{"node": event.node_id, "text": text} for event, text in self._texts.values()]

    async def wait(self, seconds: float) -> bool:
        """Wait for something new to show, for a time. Return True if there is."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)
        return self.changed.is_set()


class _WatchedState:
    """State of one run, or of the list of runs, shared by all pages that show it."""

    def __init__(self) -> None:
        self.pages = 0
        self.read_at, self.state = -math.inf, ""
        self.lock = asyncio.Lock()


class _Stream(StreamingResponse):
    """Events for one page, which counts as open until its connection ends."""

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
    """Change notifications that name the new state: the page reloads itself."""

    def __init__(self, settings: Settings, shared: SharedPages) -> None:
        self._settings, self._shared = settings, shared
        self._stored = StoredRuns(ContractRegistry(), CheckpointManager(settings.store))
        self._open = 0
        self._watched: dict[str | None, _WatchedState] = {}

    async def stream(self, request: Request) -> Response:
        run_id = request.query_params.get("id")
        if self._open >= _MAX_PAGES:
            raise HTTPException(503, "too many pages are open; close some")
        return _Stream(self, request, run_id)

    def open(self, run_id: str | None) -> _WatchedState:
        """Count an open page."""
        self._open += 1
        watched = self._watched.setdefault(run_id, _WatchedState())
        watched.pages += 1
        return watched

    def close(self, run_id: str | None) -> None:
        """Count a closed page, and drop state that no page shows."""
        self._open -= 1
        watched = self._watched[run_id]
        watched.pages -= 1
        if not watched.pages:
            del self._watched[run_id]

    async def changes(
        self, request: Request, run_id: str | None, watched: _WatchedState
    ) -> AsyncIterator[str]:
        """Yield an event for each change, until the page is closed or the server ends.

        The id of an event is the state that it names. A browser that connects again sends the last one, so
        that it learns of a change in between.
        """
        state, unchanged = await self._read_state(run_id, watched), 0
        previous = request.headers.get("last-event-id", state)
        live, server = LiveText(self._settings.redact), getattr(request.state, "server", None)
        following = None if run_id is None else asyncio.ensure_future(live.follow(self._stored, run_id))
        yield f"retry: 2000\nid: {previous}\n\n"
        try:
            while not (getattr(server, "should_exit", False) or await request.is_disconnected()):
                if await live.wait(self._settings.poll_seconds):
                    yield f"event: text\ndata: {json.dumps(live.shown())}\n\n"
                    await asyncio.sleep(_TEXT_SECONDS)
                state = await self._read_state(run_id, watched)
                if state != previous:
                    previous, unchanged = state, 0
                    yield f"event: changed\nid: {state}\ndata: {json.dumps({'state': state})}\n\n"
                else:
                    unchanged += 1
                    if unchanged % _KEEPALIVE_POLLS == 0:
                        yield ": keepalive\n\n"
        finally:
            if following is not None:
                following.cancel()

    async def _read_state(self, run_id: str | None, watched: _WatchedState) -> str:
        async with watched.lock:
            pause = max(self._settings.poll_seconds / 2, self._shared.interval(run_id, watched.pages))
            if time.monotonic() - watched.read_at >= pause:
                watched.state = await to_thread.run_sync(self._state, run_id)
                watched.read_at = time.monotonic()
            return watched.state

    def _state(self, run_id: str | None) -> str:
        """Return a fingerprint of the data on the page."""
        store = self._settings.store
        try:
            if not store.exists():
                return "missing"
            if run_id is not None:
                record = store.get_run(run_id)
                records = [] if record is None else [record]
            else:
                records = store.list_runs(limit=100)
        except (StoreError, ValueError) as error:
            return type(error).__name__
        summary = [(r.run_id, r.execution, r.status, r.updated_ms, r.tokens, r.holder) for r in records]
        return hashlib.sha256(repr(summary).encode("utf-8", "surrogatepass")).hexdigest()
