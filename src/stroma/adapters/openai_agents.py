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

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from agents import Agent, FunctionTool, Model, ModelProvider, MultiProvider, RunConfig, Runner
    from agents.exceptions import (
        InputGuardrailTripwireTriggered,
        OutputGuardrailTripwireTriggered,
        ToolInputGuardrailTripwireTriggered,
        ToolOutputGuardrailTripwireTriggered,
    )
    from agents.tool import maybe_invoke_function_tool_failure_error_function
except ImportError as error:
    raise import_error("openai-agents", error) from error

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, what_stopped
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, usage_from

warn_if_untested("openai-agents")

__all__ = ["GuardedModel", "GuardedProvider", "GuardedRunner", "attach"]


def attach(agent: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make steps of the tools of an agent and of those it hands off to, and of the requests of their models.

    ``contracts``: by the names of tools; input is the arguments, output the result. The agents are changed in place; a
    model that is only named is guarded by :class:`GuardedRunner`. Raises UnknownNode for a contract of no tool.
    """
    agents = _reached(agent)
    names = {tool.name for each in agents for tool in each.tools if isinstance(tool, FunctionTool)}
    by_name = guard.contracts(contracts, names, "tool")
    for each in agents:
        if isinstance(each.model, Model) and not isinstance(each.model, GuardedModel):
            each.model = GuardedModel(each.model, guard)
        each.tools = [
            _guard_tool(tool, guard, by_name.get(tool.name)) if isinstance(tool, FunctionTool) else tool
            for tool in each.tools
        ]
    return agent


def _reached(agent: Any) -> list[Any]:
    """Return an agent and those it can hand off to, each once."""
    reached = [agent]
    for each in reached:
        for target in each.handoffs:
            # A Handoff knows its agent by a weak reference.
            other = (
                target
                if isinstance(target, Agent)
                else (getattr(target, "_agent_ref", None) or (lambda: None))()
            )
            if isinstance(other, Agent) and not any(other is known for known in reached):
                reached.append(other)
    return reached


class GuardedRunner:
    """``Runner`` whose calls are runs of a guard, each with the agent as a step around its models and tools."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._run = guard.each_call(self._arun_step, _input_view)
        self._run_sync = guard.each_call(self._run_step, _input_view)

    async def run(self, agent: Any, input: Any, **options: Any) -> Any:
        """Call ``Runner.run`` under this guard."""
        return await self._run(agent, input, **options)

    def run_sync(self, agent: Any, input: Any, **options: Any) -> Any:
        """Call ``Runner.run_sync`` under this guard."""
        return self._run_sync(agent, input, **options)

    async def _arun_step(self, agent: Any, input: Any, **options: Any) -> Any:
        return self._noted(
            await self.guard.acall(_step_of(agent), Runner.run, agent, input, **self._options(options))
        )

    def _run_step(self, agent: Any, input: Any, **options: Any) -> Any:
        return self._noted(
            self.guard.call(_step_of(agent), Runner.run_sync, agent, input, **self._options(options))
        )

    def _noted(self, result: Any) -> Any:
        approvals = [f"approval of {item.name}" for item in getattr(result, "interruptions", ())]
        self.guard.current.ctx.suspended.extend(approvals)
        return result

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        config = options.get("run_config") or RunConfig()
        provider = config.model_provider
        if not isinstance(provider, GuardedProvider):
            config = dataclasses.replace(config, model_provider=GuardedProvider(self.guard, provider))
        return {**options, "run_config": config}


def _input_view(args: tuple[Any, ...], _: dict[str, Any]) -> dict[str, Any]:
    return {"input": args[1] if isinstance(args[1], (str, list)) else type(args[1]).__name__}


def _final(result: Any) -> Any:
    return {"final_output": result.final_output}


class GuardedModel(Model):
    """A model whose requests are steps: ``Agent(model=GuardedModel(model, guard))``."""

    def __init__(self, model: Model, guard: Guard) -> None:
        self._model = model
        about: dict[str, Any] = {
            "input_view": _request_view,
            "output_view": _response_view,
            "usage": self._used,
            "control": control,
        }
        self._get = guard.wrap("model", model.get_response, kind="acall", **about)
        self._stream = guard.wrap(
            "model", model.stream_response, kind="astream", collect=_last_response, **about
        )

    def _used(self, response: Any) -> Usage | None:
        if getattr(response, "usage", None) is None:
            return None
        name = getattr(response, "model", None) or getattr(self._model, "model", None)
        return usage_from(response.usage, model=name if isinstance(name, str) else None)

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        return await self._get(*args, **kwargs)

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        return self._stream(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        # All else is the model's own, what the base class has a default for too.
        if name.startswith("_") or name in ("get_response", "stream_response"):
            return super().__getattribute__(name)
        return getattr(self._model, name)


class GuardedProvider(ModelProvider):
    """Guards the models that a provider finds by their names: ``RunConfig(model_provider=GuardedProvider(guard))``."""

    def __init__(self, guard: Guard, provider: ModelProvider | None = None) -> None:
        self._guard, self._provider = guard, provider or MultiProvider()

    def get_model(self, model_name: str | None) -> Model:
        model = self._provider.get_model(model_name)
        return model if isinstance(model, GuardedModel) else GuardedModel(model, self._guard)

    async def aclose(self) -> None:
        await self._provider.aclose()


def control(error: BaseException) -> Control | None:
    """Return the meaning of a tripped guardrail: it ends the run of an agent without a retry."""
    return Control("passed") if isinstance(error, _TRIPWIRES) else None


_TRIPWIRES = (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)


def _request_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[1] if len(args) > 1 else kwargs.get("input"))


def _response_view(response: Any) -> dict[str, Any]:
    return {"output": getattr(response, "output", None)}


def _last_response(events: list[Any]) -> Any:
    """Return the last response of a stream, which has the usage."""
    return next((event.response for event in reversed(events) if hasattr(event, "response")), None)


def _step_of(agent: Any) -> GuardedStep:
    """Return the step around an agent. Its models and tools had their retries: it is called once."""
    about: Any = {"input_view": _input_view, "output_view": _final, "control": control}
    return GuardedStep(agent.name, can_retry=False, role="agent", **about)


def _guard_tool(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> Any:
    """Return a copy of a tool whose calls are steps."""
    if guard.has(tool.on_invoke_tool):
        return tool
    # A copy that does not turn its errors into messages: what the model sees of them is decided after the step.
    bare = copy.copy(tool)
    bare._failure_error_function, bare._use_default_failure_error_function = None, False
    guarded = copy.copy(tool)
    guarded.on_invoke_tool = _Invoker(tool, bare, guard, contract)
    return guarded


class _Invoker:
    """Calls a tool as a step, and then makes of an error what the tool makes of it; what stopped the run comes out."""

    def __init__(self, tool: Any, bare: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> None:
        self._tool, self._bare, self._guard = tool, bare, guard
        guard.mark(self)
        self._step = GuardedStep(tool.name, contract, input_view=_arguments, control=control, role="tool")

    async def __call__(self, context: Any, arguments: str) -> Any:
        try:
            return await self._guard.acall(self._step, self._bare.on_invoke_tool, context, arguments)
        except Exception as error:
            message = None
            if what_stopped(error) is None and control(error) is None:
                message = await maybe_invoke_function_tool_failure_error_function(
                    function_tool=self._tool, context=context, error=error
                )
            if message is None:
                raise
            return message

    def __getattr__(self, name: str) -> Any:
        if name in ("_tool", "_bare", "__agents_bind_function_tool__"):
            raise AttributeError(name)
        return getattr(self._bare.on_invoke_tool, name)


def _arguments(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    try:
        return json.loads(args[1]) if args[1] else {}
    except ValueError:
        return args[1]
