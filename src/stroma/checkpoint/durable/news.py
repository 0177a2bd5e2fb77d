"""Notifications that runs of a store may be due, which save workers a wait for their next poll."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from stroma._utils.logs import get_logger

logger = get_logger()

_RETRY_SECONDS = 5.0


class Listener:
    """Calls a function whenever a store reports that a run may be due, from a daemon thread.

    Args:
        receive: yields, for as long as its connection lives, True for news and False at least once a few
            seconds.
        on_news: called in the thread; must not raise.
    """

    def __init__(self, receive: Callable[[], Iterator[bool]], on_news: Callable[[], None]) -> None:
        self._receive = receive
        self._on_news = on_news
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="stroma-news", daemon=True).start()

    def close(self) -> None:
        """End the thread within a few seconds. Does not wait."""
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                for is_news in self._receive():
                    if self._closed.is_set():
                        return
                    if is_news:
                        self._on_news()
            except Exception as error:  # Polling goes on without it.
                logger.debug("notifications of the store are not received now: %s", type(error).__name__)
            self._closed.wait(_RETRY_SECONDS)
