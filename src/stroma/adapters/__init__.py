"""Agent frameworks: one guard, and a file per framework.

Nothing here is imported before it is asked for; a framework that is missing gives an ImportError with the
line that installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.adapters._guarded_run import GuardedRun as GuardedRun
    from stroma.adapters._step import Control as Control
    from stroma.adapters.base import FrameworkAdapter as FrameworkAdapter
    from stroma.adapters.base import LoopAdapter as LoopAdapter
    from stroma.adapters.base import StepInterceptor as StepInterceptor
    from stroma.adapters.base import TurnAdapter as TurnAdapter
    from stroma.adapters.base import extract_state_dict as extract_state_dict
    from stroma.adapters.crewai import CrewAIAdapter as CrewAIAdapter
    from stroma.adapters.crewai import stroma_crewai_step as stroma_crewai_step
    from stroma.adapters.deepagents import DeepAgentsAdapter as DeepAgentsAdapter
    from stroma.adapters.deepagents import stroma_deepagents_node as stroma_deepagents_node
    from stroma.adapters.guard import Guard as Guard
    from stroma.adapters.guard import UnknownNode as UnknownNode
    from stroma.adapters.guard import what_stopped as what_stopped
    from stroma.adapters.langgraph import LangGraphAdapter as LangGraphAdapter
    from stroma.adapters.langgraph import stroma_langgraph_node as stroma_langgraph_node
    from stroma.failures.errors import RunCancelled as RunCancelled

_HOMES = {
    "base": ("extract_state_dict", "FrameworkAdapter", "LoopAdapter", "StepInterceptor", "TurnAdapter"),
    "crewai": ("CrewAIAdapter", "stroma_crewai_step"),
    "deepagents": ("DeepAgentsAdapter", "stroma_deepagents_node"),
    "guard": ("Control", "Guard", "GuardedRun", "RunCancelled", "UnknownNode", "what_stopped"),
    "langgraph": ("LangGraphAdapter", "stroma_langgraph_node"),
}


__getattr__, __dir__ = lazy(__name__, _HOMES)
