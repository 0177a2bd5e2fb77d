"""The one execution loop: validate, call, retry, commit, announce."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.engine.config import NodeTimeout as NodeTimeout
    from stroma.engine.config import RunConfig as RunConfig
    from stroma.engine.context import ReliabilityContext as ReliabilityContext
    from stroma.engine.execution import NodeExecution as NodeExecution
    from stroma.engine.execution import current_node as current_node
    from stroma.engine.execution import current_node_or_none as current_node_or_none
    from stroma.engine.execution import current_run as current_run

_HOMES = {
    "engine.config": ("NodeTimeout", "RunConfig"),
    "engine.context": ("ReliabilityContext",),
    "engine.execution": ("current_node", "current_node_or_none", "current_run", "NodeExecution"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
