"""The one execution loop: validate, call, retry, commit, announce."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.engine.config import NodeTimeout, RunConfig
    from stroma.engine.context import ReliabilityContext
    from stroma.engine.execution import NodeExecution, current_node, current_node_or_none, current_run

__all__ = [
    "NodeExecution",
    "NodeTimeout",
    "ReliabilityContext",
    "RunConfig",
    "current_node",
    "current_node_or_none",
    "current_run",
]

_HOMES = {
    "engine.config": ("NodeTimeout", "RunConfig"),
    "engine.context": ("ReliabilityContext",),
    "engine.execution": ("current_node", "current_node_or_none", "current_run", "NodeExecution"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
