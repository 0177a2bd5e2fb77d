"""Deep Agents, by the published names: the marked functions of an agent, its tools and nodes, as steps.

New code takes ``stroma.adapters.langchain.StromaMiddleware``, which guards every model call and tool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stroma.adapters._releases import imports_of

with imports_of("deepagents"):
    from langgraph.prebuilt import ToolNode

    from stroma.adapters.langgraph import attach_steps

from stroma.adapters.base import marked, marks_of
from stroma.adapters.guard import Guard
from stroma.checkpoint import AsyncCheckpointStore, CheckpointManager, CheckpointStore
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import framework_node as stroma_deepagents_node
from stroma.cost.budget import CostTracker
from stroma.runner.runner import StromaRunner

__all__ = ["DeepAgentsAdapter", "stroma_deepagents_node"]


class DeepAgentsAdapter:
    """Guards the marked functions of a deep agent, and counts all that its models and sub-agents use."""

    def __init__(
        self,
        registry: ContractRegistry,
        checkpoint_store: CheckpointStore | AsyncCheckpointStore | None = None,
        runner: StromaRunner[Any] | None = None,
    ) -> None:
        self.registry = registry
        runner = StromaRunner.quick() if runner is None else runner
        if checkpoint_store is not None:
            runner = StromaRunner(runner.registry, CheckpointManager(checkpoint_store), runner.config)
        self.guard = Guard(runner)

    @property
    def cost_tracker(self) -> CostTracker:
        """The usage of the current run, else of the last one."""
        return (self.guard.last or self.guard.current).ctx.cost_tracker

    def wrap(self, agent: Any) -> Any:
        """Make steps of the marked tools and nodes, and of the agent's nodes around them; returns the agent.

        Raises ValueError if nothing is marked.
        """
        steps = {}
        has_tools = False
        for name, node in agent.nodes.items():
            bound: Any = getattr(node, "bound", None) or getattr(node, "runnable", None)
            func = marked(bound, getattr(bound, "func", None), getattr(bound, "afunc", None))
            if isinstance(bound, ToolNode):
                for tool in bound.tools_by_name.values():
                    has_tools |= self._guard_tool(tool)
            if not name.startswith("__"):
                steps[name] = (name, None) if func is None else marks_of(func, self.registry)
            has_tools |= func is not None
        if not has_tools:
            raise ValueError(
                "nothing in the agent is marked; decorate functions of its tools with @stroma_deepagents_node"
            )
        return attach_steps(agent, self.guard, steps)

    def _guard_tool(self, tool: Any) -> bool:
        """Make a step of a tool's function, if it is marked."""
        hit = False
        for name in ("func", "coroutine"):
            func: Any = getattr(tool, name, None)
            mark = marked(func)
            if mark is None:
                continue
            hit = True
            if not self.guard.has(func):
                step_id, contract = marks_of(mark, self.registry)
                setattr(tool, name, self.guard.wrap(step_id, func, contract=contract, role="tool"))
        return hit

    def node_decorator(self, node_id: str, contract: NodeContract[Any, Any]) -> Callable[..., Any]:
        """Return :func:`stroma_deepagents_node` for a node id and contract."""
        return stroma_deepagents_node(node_id, contract)
