"""Forks of a process with open SQLite connections.

SQLite's locks belong to the process, and its table of locks is in memory: a child that inherits it waits for
locks that no process holds, or relies on locks that it does not have. So no connection is open, and none is
in use, while a process forks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakSet

__all__ = ["FORKS"]


class _Forks:
    """Lets a process fork only while no thread uses SQLite."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Depth of use by thread.
        self._users: dict[int, int] = {}
        #: Connections that are open while nobody uses them.
        self.idle: WeakSet[Any] = WeakSet()

    @contextmanager
    def prevent(self) -> Iterator[None]:
        """Delay forks of this process until the end of the block."""
        thread = threading.get_ident()
        with self._changed:
            self._users[thread] = self._users.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                depth = self._users.pop(thread, 1) - 1  # A child that was forked inside has no users.
                if depth:
                    self._users[thread] = depth
                else:
                    self._changed.notify_all()

    def before(self) -> None:
        thread = threading.get_ident()
        self._changed.acquire()
        while self._users.keys() - {thread}:
            self._changed.wait()
        for connection in list(self.idle):
            connection.close()  # The next operation opens the file again.

    def after_in_parent(self) -> None:
        self._changed.release()

    def after_in_child(self) -> None:
        self.__init__()  # type: ignore[misc]


FORKS: Final = _Forks()
if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(
        before=FORKS.before, after_in_parent=FORKS.after_in_parent, after_in_child=FORKS.after_in_child
    )
