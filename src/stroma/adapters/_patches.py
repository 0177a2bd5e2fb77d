"""Replaced functions in classes and modules of frameworks, for as long as guards need them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from weakref import WeakSet

__all__ = ["patch", "restore"]


class _Patch(NamedTuple):
    replacement: Any
    #: The owner's own attribute before, or _INHERITED.
    original: Any
    guards: WeakSet[Any]


_INHERITED: Final = object()
_LOCK: Final = threading.Lock()
#: By the class or module and the name of its function.
_patches: dict[tuple[Any, str], _Patch] = {}


def patch(guard: Any, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a function by ``wrapper(function)``, once for all guards, until the last one is detached."""
    with _LOCK:
        if (owner, name) not in _patches:
            bare = getattr(owner, name)
            replacement = functools.wraps(bare)(wrapper(bare))
            _patches[owner, name] = _Patch(replacement, vars(owner).get(name, _INHERITED), WeakSet())
            setattr(owner, name, replacement)
        _patches[owner, name].guards.add(guard)


def restore(guard: Any) -> None:
    """Restore the functions that were replaced for a guard, unless another guard needs the replacement.

    One that somebody has replaced since stays: theirs calls it.
    """
    with _LOCK:
        for (owner, name), (replacement, original, guards) in list(_patches.items()):
            guards.discard(guard)
            if guards or vars(owner).get(name) is not replacement:
                continue
            del _patches[owner, name]
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
