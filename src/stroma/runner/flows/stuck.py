"""Detection of a replay that can go no further: each task of the flow waits for the flow itself, or for another one."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
from typing import Any, Final

from stroma.engine.tasks import TaskPool

__all__ = ["CURRENT_DRIVER", "waits_for_itself"]

#: The driver of the flow in whose body, or in a task of which, the code runs.
CURRENT_DRIVER: contextvars.ContextVar[object] = contextvars.ContextVar("stroma_flow_driver", default=None)

_FLOWS: Final = os.path.dirname(__file__)
#: Where asyncio waits for nothing but other tasks.
_BETWEEN_TASKS: Final = frozenset(
    os.path.join(os.path.dirname(asyncio.__file__), f"{name}.py")
    for name in ("locks", "queues", "taskgroups", "tasks")
)


def waits_for_itself(driver: object, loop: asyncio.AbstractEventLoop) -> bool:
    """Return True if no task of a flow can go on: none of them runs, or waits for a time, for I/O or for a thread."""
    timers = _timers_of(loop)
    if timers is None:
        return False  # What wakes a task cannot be seen.
    for handle in timers:
        if not handle.cancelled() and handle._context.get(CURRENT_DRIVER) is driver:
            return False
    tasks = [task for task in asyncio.all_tasks(loop) if _context_of(task).get(CURRENT_DRIVER) is driver]
    return all(_is_blocked(task, tasks) for task in tasks)


def _timers_of(loop: Any) -> list[Any] | None:
    """Return the timers of asyncio's event loop, of asyncio.timeout() and the like; None for others, such as uvloop."""
    return list(loop._scheduled) if hasattr(loop, "_scheduled") else None


def _context_of(task: asyncio.Task[Any]) -> contextvars.Context:
    # Task.get_context() is of Python 3.12.
    contexts = [one for one in gc.get_referents(task) if isinstance(one, contextvars.Context)]
    return contexts[0] if contexts else contextvars.Context()


def _is_blocked(task: asyncio.Task[Any], tasks: list[asyncio.Task[Any]]) -> bool:
    future = getattr(task, "_fut_waiter", None)
    if future is None:
        return False  # It runs in the next turn.
    if isinstance(future, asyncio.Task):
        return future in tasks
    children = getattr(future, "_children", None)  # Of asyncio.gather().
    if children is not None:
        return all(child in tasks or child.done() for child in children)
    coroutine: Any = task.get_coro()
    while asyncio.iscoroutine(inner := getattr(coroutine, "cr_await", None)):
        coroutine = inner
    code = getattr(coroutine, "cr_code", None)
    if code is None:
        return False
    if code.co_filename in _BETWEEN_TASKS:
        return bool(code.co_name != "sleep")
    if code is TaskPool.join.__code__:  # Of a map.
        return True
    return bool(code.co_filename.startswith(_FLOWS))
