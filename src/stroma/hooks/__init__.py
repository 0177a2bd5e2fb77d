"""Sets of hooks, and how they are called."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.hooks.sets import HookError, MapProgress, NodeHooks, StepHooks

__all__ = ["HookError", "MapProgress", "NodeHooks", "StepHooks"]

_HOMES = {"hooks.sets": ("HookError", "MapProgress", "NodeHooks", "StepHooks")}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
