"""Agents of the OpenAI Agents SDK that an agent can hand off to or call as tools."""

from __future__ import annotations

from typing import Any

from agents import AgentBase

__all__ = ["agent_of_tool", "reached_agents"]


def reached_agents(agent: Any) -> tuple[list[Any], bool]:
    """Return an agent and those it can hand off to or call as tools, each once, and if these are all: a handoff may be a function."""
    reached, is_complete = [agent], True
    for each in reached:
        targets = [target if isinstance(target, AgentBase) else _agent_of(target) for target in each.handoffs]
        is_complete = is_complete and None not in targets
        for other in [*targets, *map(agent_of_tool, each.tools)]:
            if isinstance(other, AgentBase) and not any(other is known for known in reached):
                reached.append(other)
    return reached, is_complete


def agent_of_tool(tool: Any) -> Any:
    """Return the agent that a tool calls; None for any other tool."""
    return getattr(tool, "_agent_instance", None)


def _agent_of(handoff: Any) -> Any:
    reference = getattr(handoff, "_agent_ref", None)  # It is a weak one.
    return None if reference is None else reference()
