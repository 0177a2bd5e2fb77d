"""Agent frameworks: one guard, and a file per framework.

Nothing here is imported before it is asked for; a framework that is missing gives an ImportError with the
line that installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.adapters._guarded_run import GuardedRun
    from stroma.adapters._step import Control
    from stroma.adapters.base import (
        FrameworkAdapter,
        LoopAdapter,
        StepInterceptor,
        TurnAdapter,
        extract_state_dict,
    )
    from stroma.adapters.crewai import CrewAIAdapter, stroma_crewai_step
    from stroma.adapters.deepagents import DeepAgentsAdapter, stroma_deepagents_node
    from stroma.adapters.guard import Guard, UnknownNode, what_stopped
    from stroma.adapters.langgraph import LangGraphAdapter, stroma_langgraph_node
    from stroma.failures.errors import RunCancelled

_HOMES = {
    "base": ("extract_state_dict", "FrameworkAdapter", "LoopAdapter", "StepInterceptor", "TurnAdapter"),
    "crewai": ("CrewAIAdapter", "stroma_crewai_step"),
    "deepagents": ("DeepAgentsAdapter", "stroma_deepagents_node"),
    "guard": ("Control", "Guard", "GuardedRun", "RunCancelled", "UnknownNode", "what_stopped"),
    "langgraph": ("LangGraphAdapter", "stroma_langgraph_node"),
}

__all__ = [
    "Control",
    "CrewAIAdapter",
    "DeepAgentsAdapter",
    "FrameworkAdapter",
    "Guard",
    "GuardedRun",
    "LangGraphAdapter",
    "LoopAdapter",
    "RunCancelled",
    "StepInterceptor",
    "TurnAdapter",
    "UnknownNode",
    "extract_state_dict",
    "stroma_crewai_step",
    "stroma_deepagents_node",
    "stroma_langgraph_node",
    "what_stopped",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
