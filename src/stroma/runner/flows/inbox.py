"""Messages to a run, as its flows take them: of each topic the first one that no call has taken."""

from __future__ import annotations

from collections.abc import Awaitable
from heapq import heappop, heappush

from stroma.checkpoint import Session
from stroma.checkpoint.entries import SentMessage

__all__ = ["Inbox"]


class Inbox:
    """The messages to one run that were read, and those that its flows have taken."""

    def __init__(self) -> None:
        self._free: dict[str, list[SentMessage]] = {}
        #: Numbers of the messages that are free here, or that a call has taken.
        self._known: set[int] = set()
        self._last_read = 0

    def note_taken(self, number: int) -> None:
        """Note that the records of the run have a call that took a message."""
        self._known.add(number)

    def has(self, topic: str) -> bool:
        return bool(self._free.get(topic))

    def take(self, topic: str) -> SentMessage:
        """Return the first free message of a topic that has one; no other call gets it."""
        return heappop(self._free[topic])

    def put_back(self, message: SentMessage) -> None:
        """Free a message that a call has taken."""
        heappush(self._free.setdefault(message.topic, []), message)

    async def read(self, session: Session) -> None:
        """Read the messages that have come since the last call. Raises StoreError."""
        while self._last_read + 1 in self._known:  # They need not be read again.
            self._last_read += 1
        messages = session.messages(self._last_read)
        for message in await messages if isinstance(messages, Awaitable) else messages:
            self._last_read = message.number
            if message.number not in self._known:
                self._known.add(message.number)
                self.put_back(message)
