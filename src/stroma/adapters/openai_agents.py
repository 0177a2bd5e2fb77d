"""OpenAI Agents SDK: agents, their models and their tools as steps.

::

    attach(agent, guard, {"search": (Query, Hits)})
    result = await GuardedRunner(guard).run(agent, "...")  # a run; inside `with guard.run()`, part of that
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

try:
    from agents import Agent, FunctionTool, Model, RunConfig, Runner
    from agents.tool import maybe_invoke_function_tool_failure_error_function

    from stroma.adapters._openai_agents_model import GuardedModel, GuardedProvider, control
except ImportError as error:
    raise ImportError(
        "openai-agents is required for its adapter; pip install 'stroma[openai-agents]'"
    ) from error

from stroma.adapters.guard import Contracts, Guard, Step, what_stopped
from stroma.contracts import NodeContract

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
            _guarded(tool, guard, found.get(tool.name)) if isinstance(tool, FunctionTool) else tool
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


def _guarded(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> Any:
    if isinstance(tool.on_invoke_tool, _Invoker):
        return tool
    # A copy that does not make a message of its errors: what the model is told of them is decided after the step.
    bare = copy.copy(tool)
    bare._failure_error_function, bare._use_default_failure_error_function = None, False
    guarded = copy.copy(tool)
    guarded.on_invoke_tool = _Invoker(tool, bare, guard, contract)
    return guarded


class _Invoker:
    """Calls a tool as a step, and then makes of an error what the tool makes of it; what stopped the run comes out."""

    def __init__(self, tool: Any, bare: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> None:
        self._tool, self._bare, self._guard = tool, bare, guard
        self._step = Step(tool.name, contract, given=_arguments, control=control)

    async def __call__(self, context: Any, arguments: str) -> Any:
        try:
            return await self._guard.acall(self._step, self._bare.on_invoke_tool, context, arguments)
        except Exception as error:
            told = None
            if what_stopped(error) is None and control(error) is None:
                told = await maybe_invoke_function_tool_failure_error_function(
                    function_tool=self._tool, context=context, error=error
                )
            if told is None:
                raise
            return told

    def __getattr__(self, name: str) -> Any:
        if name in ("_tool", "_bare", "__agents_bind_function_tool__"):
            raise AttributeError(name)
        return getattr(self._bare.on_invoke_tool, name)


def _arguments(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    try:
        return json.loads(args[1]) if args[1] else {}
    except ValueError:
        return args[1]


class GuardedRunner:
    """``Runner`` whose calls are runs of a guard, each with the agent as a step around its models and tools."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    async def run(self, agent: Any, input: Any, **options: Any) -> Any:
        """``Runner.run``, under this guard."""
        # Its models and tools had their retries.
        step = Step(
            agent.name, given=lambda args, _: {"input": args[1]}, made=_final, control=control, again=False
        )
        if self.guard.inside:
            return await self.guard.acall(step, Runner.run, agent, input, **self._options(options))
        async with self.guard.run({"input": input}) as run:
            result = await self.guard.acall(step, Runner.run, agent, input, **self._options(options))
            run.ctx.suspended += [f"approval of {item.name}" for item in getattr(result, "interruptions", ())]
            return result

    def run_sync(self, agent: Any, input: Any, **options: Any) -> Any:
        """``Runner.run_sync``, under this guard."""
        step = Step(
            agent.name, given=lambda args, _: {"input": args[1]}, made=_final, control=control, again=False
        )
        if self.guard.inside:
            return self.guard.call(step, Runner.run_sync, agent, input, **self._options(options))
        with self.guard.run({"input": input}) as run:
            result = self.guard.call(step, Runner.run_sync, agent, input, **self._options(options))
            run.ctx.suspended += [f"approval of {item.name}" for item in getattr(result, "interruptions", ())]
            return result

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        config = options.get("run_config") or RunConfig()
        provider = config.model_provider
        if not isinstance(provider, GuardedProvider):
            config = dataclasses.replace(config, model_provider=GuardedProvider(self.guard, provider))
        return {**options, "run_config": config}


def _final(result: Any) -> Any:
    return {"final_output": result.final_output}
