"""OpenAI Agents SDK: agents, their models and their tools as steps.

::

    attach(agent, guard, {"search": (Query, Hits)})
    result = await GuardedRunner(guard).run(agent, "...")  # a run; inside `with guard.run()`, part of that
"""

from __future__ import annotations

import dataclasses
from typing import Any

try:
    from agents import Agent, FunctionTool, Model, RunConfig, Runner

    from stroma.adapters._openai_agents_model import GuardedModel, GuardedProvider, control
    from stroma.adapters._openai_agents_tools import guarded
except ImportError as error:
    raise ImportError(
        "openai-agents is required for its adapter; install it with: pip install 'stroma[openai-agents]'"
    ) from error

from stroma.adapters._step import Step
from stroma.adapters.guard import Contracts, Guard

__all__ = ["GuardedModel", "GuardedProvider", "GuardedRunner", "attach"]


def attach(agent: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make steps of the tools of an agent and of those it hands off to, and of the requests of their models.

    ``contracts``: by the names of tools; input is the arguments, output the result. The agents are changed in place; a
    model that is only named is guarded by :class:`GuardedRunner`. Raises UnknownNode for a contract of no tool.
    """
    agents = _reached(agent)
    names = {tool.name for each in agents for tool in each.tools if isinstance(tool, FunctionTool)}
    found = guard.contracts(contracts, names, "tool")
    for each in agents:
        if isinstance(each.model, Model) and not isinstance(each.model, GuardedModel):
            each.model = GuardedModel(each.model, guard)
        each.tools = [
            guarded(tool, guard, found.get(tool.name)) if isinstance(tool, FunctionTool) else tool
            for tool in each.tools
        ]
    return agent


def _reached(agent: Any) -> list[Any]:
    """An agent and those it can hand off to, each once."""
    found = [agent]
    for each in found:
        for target in each.handoffs:
            # A Handoff knows its agent by a weak reference.
            other = (
                target
                if isinstance(target, Agent)
                else (getattr(target, "_agent_ref", None) or (lambda: None))()
            )
            if isinstance(other, Agent) and not any(other is known for known in found):
                found.append(other)
    return found


class GuardedRunner:
    """``Runner`` whose calls are runs of a guard, each with the agent as a step around its models and tools."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._run = guard.each_call(self._arun_step, _asked)
        self._run_sync = guard.each_call(self._run_step, _asked)

    async def run(self, agent: Any, input: Any, **options: Any) -> Any:
        """``Runner.run``, under this guard."""
        return await self._run(agent, input, **options)

    def run_sync(self, agent: Any, input: Any, **options: Any) -> Any:
        """``Runner.run_sync``, under this guard."""
        return self._run_sync(agent, input, **options)

    async def _arun_step(self, agent: Any, input: Any, **options: Any) -> Any:
        step = Step(agent.name, given=_asked, made=_final, control=control, again=False)
        return self._noted(await self.guard.acall(step, Runner.run, agent, input, **self._options(options)))

    def _run_step(self, agent: Any, input: Any, **options: Any) -> Any:
        # Its models and tools had their retries: it is called once.
        step = Step(agent.name, given=_asked, made=_final, control=control, again=False)
        return self._noted(self.guard.call(step, Runner.run_sync, agent, input, **self._options(options)))

    def _noted(self, result: Any) -> Any:
        asked = [f"approval of {item.name}" for item in getattr(result, "interruptions", ())]
        self.guard.current.ctx.suspended.extend(asked)
        return result

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        config = options.get("run_config") or RunConfig()
        provider = config.model_provider
        if not isinstance(provider, GuardedProvider):
            config = dataclasses.replace(config, model_provider=GuardedProvider(self.guard, provider))
        return {**options, "run_config": config}


def _asked(args: tuple[Any, ...], _: dict[str, Any]) -> dict[str, Any]:
    return {"input": args[1] if isinstance(args[1], (str, list)) else type(args[1]).__name__}


def _final(result: Any) -> Any:
    return {"final_output": result.final_output}
