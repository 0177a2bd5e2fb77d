"""The text that the attempts of a run are emitting, for its page."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.events import EventPlace
from stroma.runner.events import StreamEvent
from stroma.runner.follow import follow
from stroma.runner.stored_runs import StoredRuns
from stroma.trace.redaction import Redact, hide_state

__all__ = ["LiveText"]

logger = get_logger()

#: The end of a text that is shown, in characters.
_SHOWN_CHARACTERS: Final = 20_000
_ENDS_OF_RUN: Final = ("run_end", "run_suspended")


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
