"""Data that SDKs drop: they log it at best, and their flush() says nothing of it.

A method of the SDK's object is wrapped in place, once per object: none of the three SDKs has a callback for
this.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

from stroma._utils.logs import get_logger

__all__ = ["LossCounter", "Losses"]

logger = get_logger("stroma.telemetry")
_ATTRIBUTE = "_stroma_losses"


class LossCounter:
    """The number of items that one object of an SDK has dropped."""

    def __init__(self, system: str, what: str) -> None:
        self.total = 0
        self._system, self._what = system, what
        self._lock = threading.Lock()

    def add(self, count: int, why: str) -> None:
        """Count what is lost, and log the first time."""
        with self._lock:
            is_first, self.total = self.total == 0, self.total + count
        if is_first:
            logger.warning(
                "%s: %d %s could not be sent (%s); further ones are only counted, and flush() returns False",
                self._system,
                count,
                self._what,
                why,
            )


class Losses:
    """Losses in the objects that one exporter sends through."""

    def __init__(self, system: str) -> None:
        self._system = system
        #: Each counter, and how much of it was reported.
        self._counters: dict[int, tuple[LossCounter, int]] = {}

    def watch(
        self, owner: Any, method: str, what: str, find: Callable[[LossCounter, Callable[..., Any]], Any]
    ) -> None:
        """Wrap a method of an object by ``find(counter, method)``, unless that was done; nothing if it has no such method."""
        original = getattr(owner, method, None)
        if original is None:
            return
        counter: LossCounter | None = getattr(original, _ATTRIBUTE, None)
        if counter is None:
            counter = LossCounter(self._system, what)
            wrapped = functools.wraps(original)(find(counter, original))
            setattr(wrapped, _ATTRIBUTE, counter)
            with contextlib.suppress(
                Exception
            ):  # An object that takes no attributes: nothing is known of it.
                setattr(owner, method, wrapped)
        self._counters.setdefault(id(counter), (counter, counter.total))

    def take(self) -> int:
        """Return how many items were lost since the last call."""
        lost = 0
        for key, (counter, seen) in list(self._counters.items()):
            total = counter.total
            lost += total - seen
            self._counters[key] = counter, total
        return lost
