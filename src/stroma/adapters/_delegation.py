"""Guarding of objects whose methods call each other, such as an async method that calls a sync one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from stroma.adapters.guard import Guard
from stroma.engine.execution import current_node

__all__ = ["guard_methods", "own_method"]


def guard_methods(
    owner: Any, names: tuple[str, ...], guard: Guard, step_id: str, around: Callable[[Any], Any], **about: Any
) -> Any:
    """Make steps of methods of an object, one for nested calls of them; change the object and return it.

    ``around(bare)``: returns the function to call in place of a method, sync or async like it.
    """
    for name in names:
        bare = own_method(owner, name)
        if bare is not None and not guard.has(bare):
            step = guard.wrap(step_id, _noted(owner, around(bare)), **about)
            object.__setattr__(owner, name, guard.mark(_guarded(owner, bare, step)))
    return owner


def own_method(owner: Any, name: str) -> Any:
    """Return a method of an object, or None, without getattr(), which DSPy reports as a call."""
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return None


def _noted(owner: Any, call: Any) -> Any:
    """Return a function that marks the current step as one of the object."""

    def note() -> None:
        node = current_node()
        assert node is not None
        node.notes[id(owner)] = owner

    @functools.wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return call(*args, **kwargs)

    @functools.wraps(call)
    async def anoted(*args: Any, **kwargs: Any) -> Any:
        note()
        return await call(*args, **kwargs)

    return anoted if inspect.iscoroutinefunction(call) else noted


def _guarded(owner: Any, bare: Any, step: Any) -> Any:
    def inside() -> bool:
        node = current_node()
        return node is not None and node.notes.get(id(owner)) is owner

    @functools.wraps(bare)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return bare(*args, **kwargs) if inside() else step(*args, **kwargs)

    @functools.wraps(bare)
    async def aguarded(*args: Any, **kwargs: Any) -> Any:
        return await (bare(*args, **kwargs) if inside() else step(*args, **kwargs))

    return aguarded if inspect.iscoroutinefunction(bare) else guarded
