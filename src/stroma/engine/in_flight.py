"""Calls of effects in flight, in tasks that are given up.

A task is given up if code inside the run no longer waits for its outcome: a sibling has failed, or a race is
lost. A call of an effect that it is making runs to its end first, so that its outcome is recorded. A
cancellation from outside of the run does not wait.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

__all__ = ["begin_flight", "end_flight", "give_up", "is_given_up", "is_in_flight"]

#: Message of the cancellation of a task that is given up. It reaches the tasks that the task awaits.
_GIVEN_UP: Final = "given up"
#: Tasks that call an effect, and if they were given up meanwhile.
_in_flight: Final[dict[asyncio.Task[Any], bool]] = {}


def give_up(task: asyncio.Task[Any]) -> None:
    """Cancel a task, or have it cancelled once the attempt of an effect that it makes has its end."""
    if task in _in_flight:
        _in_flight[task] = True
    else:
        task.cancel(_GIVEN_UP)


def is_given_up(cancelled: asyncio.CancelledError) -> bool:
    """Return True if a task was given up, so that it gives up those that it has started."""
    return cancelled.args == (_GIVEN_UP,)


def is_in_flight(task: asyncio.Task[Any]) -> bool:
    """Return True while a task calls an effect."""
    return task in _in_flight


def begin_flight() -> asyncio.Task[Any] | None:
    """Note that the running task calls an effect. Return the task for :func:`end_flight`; None if it calls one already."""
    task = asyncio.current_task()
    if task is None or task in _in_flight:
        return None
    _in_flight[task] = False
    return task


def end_flight(task: asyncio.Task[Any] | None) -> None:
    """Note that the attempt has its end. If the task was given up, its next await raises the cancellation."""
    if task is not None and _in_flight.pop(task):
        task.cancel(_GIVEN_UP)
