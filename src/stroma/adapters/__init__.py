"""Agent frameworks: the guard, and one thin module for each framework, present when its framework is.

Nothing here is imported before it is asked for; a framework that is missing gives an ImportError with the line that
installs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stroma.adapters.base import (
        FrameworkAdapter,
        LoopAdapter,
        StepInterceptor,
        TurnAdapter,
        extract_state_dict,
    )
    from stroma.adapters.guard import Control, Guard, GuardedRun, UnknownNode, what_stopped

_HOMES = {
    "Control": "guard",
    "FrameworkAdapter": "base",
    "Guard": "guard",
    "GuardedRun": "guard",
    "LoopAdapter": "base",
    "StepInterceptor": "base",
    "TurnAdapter": "base",
    "UnknownNode": "guard",
    "extract_state_dict": "base",
    "what_stopped": "guard",
}

__all__ = [
    "Control",
    "FrameworkAdapter",
    "Guard",
    "GuardedRun",
    "LoopAdapter",
    "StepInterceptor",
    "TurnAdapter",
    "UnknownNode",
    "extract_state_dict",
    "what_stopped",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
