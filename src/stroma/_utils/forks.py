"""State of a process that a forked child must not inherit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

ResetT = TypeVar("ResetT", bound=Callable[[], object])


def call_in_child(reset: ResetT) -> ResetT:
    """Call a function in each forked child, on systems that fork. Return the function."""
    if hasattr(os, "register_at_fork"):  # pragma: no branch
        os.register_at_fork(after_in_child=reset)
    return reset


def process_lock() -> threading.RLock:
    """Return a reentrant lock that a forked child finds free: its parent may have held it."""
    lock: Any = threading.RLock()
    call_in_child(lock._at_fork_reinit)  # As the locks of logging.
    return lock  # type: ignore[no-any-return]
