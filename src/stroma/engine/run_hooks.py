"""Hooks of the start and the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stroma.engine.current import CURRENT, RUN, leave
from stroma.hooks.dispatch import Calls, Firing, Hooks

__all__ = ["call_run_hooks", "call_run_hooks_now"]


async def call_run_hooks(
    run: Any,
    hooks: Hooks,
    event: str,
    calls: Calls,
    make: Callable[[], tuple[Any, ...]],
    unread: Callable[[], tuple[Any, ...]],
) -> None:
    """Call the hooks of one event of a run, with fresh arguments ``make()``. Raises HookNotAsync.

    ``unread()``: the arguments for sets that read no state.

    ``run``: the context that ``current_run()`` returns in them; no node is the current one.
    """
    firing = Firing(hooks, event, calls, None, make, (), unread)
    with _as_current(run):
        try:
            if not firing.advance():
                await firing.finish()
        except GeneratorExit:
            with _as_current(run):  # The code that closes it has a context of its own.
                firing.finish_now()
            raise


def call_run_hooks_now(
    run: Any,
    hooks: Hooks,
    event: str,
    calls: Calls,
    make: Callable[[], tuple[Any, ...]],
    unread: Callable[[], tuple[Any, ...]],
) -> None:
    """Call them where nothing can be awaited: the coroutine of the run is being closed."""
    with _as_current(run):
        Firing(hooks, event, calls, None, make, (), unread).finish_now()


@contextmanager
def _as_current(run: Any) -> Iterator[None]:
    """Make this the current run, and no node the current one."""
    before, node = RUN.set(run), CURRENT.set(None)
    try:
        yield
    finally:
        leave(node)
        try:
            RUN.reset(before)
        except ValueError:
            pass  # As in leave().
