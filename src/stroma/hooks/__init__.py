"""Sets of hooks, and how they are called."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.hooks.sets import HookError as HookError
    from stroma.hooks.sets import MapProgress as MapProgress
    from stroma.hooks.sets import NodeHooks as NodeHooks
    from stroma.hooks.sets import StepHooks as StepHooks

_HOMES = {"hooks.sets": ("HookError", "MapProgress", "NodeHooks", "StepHooks")}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
