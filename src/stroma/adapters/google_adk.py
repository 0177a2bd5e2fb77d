"""Google ADK: the models and tools of agents as steps.

::

    attach(agent, guard, {"weather": (City, Weather)})
    runner = each_run(InMemoryRunner(agent), guard)  # what run_async() gives is a run
"""

from __future__ import annotations

from typing import Any

try:
    from google.adk.agents import LlmAgent
    from google.adk.models import LLMRegistry
    from google.adk.tools.agent_tool import AgentTool

    from stroma.adapters._google_adk_model import guard_model
    from stroma.adapters._google_adk_tools import guard_tools
except ImportError as error:
    raise ImportError(
        "google-adk is required for its adapter; install it with: pip install 'stroma[google-adk]'"
    ) from error

from stroma.adapters.guard import Contracts, Guard

__all__ = ["attach", "each_run"]


def attach(agent: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make steps of the models and function tools of an agent and of all agents inside it; changes them, returns it.

    ``contracts``: by the names of tools; input is the arguments, output the result. Raises UnknownNode for a contract of no
    tool.
    """
    agents = _inside(agent)
    check = guard_tools(agents, guard, contracts)
    for each in agents:
        if isinstance(each.model, str) and each.model:
            each.model = LLMRegistry.new_llm(each.model)
        if each.model and not guard.has(each.model.generate_content_async):
            guard_model(each.model, guard, check)
    return agent


def each_run(runner: Any, guard: Guard) -> Any:
    """Make a run of what each ``run_async()`` (and so each ``run()``) of a runner gives; changes it and returns it."""
    parts = runner.run_async
    if not guard.has(parts):

        def run_async(*args: Any, **kwargs: Any) -> Any:
            return guard.aover(lambda: parts(*args, **kwargs), {"message": kwargs.get("new_message")})

        runner.run_async = guard.mark(run_async)
    return runner


def _inside(agent: Any) -> list[Any]:
    """The agents with a model that are reached from an agent, each once."""
    waiting: list[Any] = [agent]
    found: list[Any] = []
    for each in waiting:
        if isinstance(each, LlmAgent) and not any(each is known for known in found):
            found.append(each)
            waiting += [tool.agent for tool in each.tools if isinstance(tool, AgentTool)]
        waiting += getattr(each, "sub_agents", ())
    return found
