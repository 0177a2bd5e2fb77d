"""A page that shows the texts of a run by its events, and checks the rules that readers rely on."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from stroma.checkpoint.events import EventPlace, parse_cursor
from stroma.runner.events import StreamEvent

_DISCARDS = ("node_failure", "node_cancelled", "node_suspended")


@dataclass
class Page:
    """The texts of a run by place, as its events make them.

    Attributes:
        texts: the text of the attempt in progress at each place, with the id of the attempt.
        truths: the outputs that are known.
        seen: all texts that were shown, in their order.
    """

    cursor: str | None = None
    texts: dict[Any, tuple[str, str]] = field(default_factory=dict)
    truths: dict[Any, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    end: StreamEvent | None = None

    @property
    def status(self) -> str | None:
        """The status with which the run ended; None before."""
        return None if self.end is None else str(self.end.details["status"])

    def take(self, event: StreamEvent) -> None:
        """Apply an event; raise AssertionError if it comes twice, out of order, or after its attempt."""
        assert event.cursor is not None
        assert self.end is None, "an event after the end"
        assert parse_cursor(event.cursor) > (parse_cursor(self.cursor) if self.cursor else EventPlace(0, 0))
        self.cursor = event.cursor
        self.kinds.append(event.kind)
        at = (event.position, event.branch)
        if event.kind == "node_start":
            assert event.attempt_id is not None
            self.texts[at] = (event.attempt_id, "")
        elif event.kind == "node_event":
            attempt_id, text = self.texts[at]
            assert event.attempt_id == attempt_id, "an event of a dead attempt"
            self.texts[at] = (attempt_id, text + event.data)
            self.seen.append(text + event.data)
        elif event.kind in ("node_success", "node_skipped"):
            self.texts.pop(at, None)
            self.truths[at] = event.state
        elif event.kind in _DISCARDS:
            self.texts.pop(at, None)
        elif event.kind == "run_end":
            self.end = event

    async def read(self, events: AsyncIterator[StreamEvent], limit: int | None = None) -> bool:
        """Apply events, at most ``limit``; return False if there are no more."""
        async with aclosing(events) as iterator:
            async for event in iterator:
                self.take(event)
                limit = None if limit is None else limit - 1
                if limit == 0:
                    return True
        return False
