"""Google ADK: the models and tools of agents as steps.

::

    attach(agent, guard, {"weather": (City, Weather)})
    runner = each_run(InMemoryRunner(agent), guard)  # what run_async() gives is a run
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

try:
    from google.adk.agents import LlmAgent
    from google.adk.models import LLMRegistry
    from google.adk.tools.agent_tool import AgentTool
    from google.adk.tools.base_toolset import BaseToolset
    from google.adk.tools.function_tool import FunctionTool
except ImportError as error:
    raise ImportError(
        "google-adk is required for its adapter; install it with: pip install 'stroma[google-adk]'"
    ) from error

from stroma.adapters._state_views import arguments_of, newest_of
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage

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


def guard_model(model: Any, guard: Guard, check: Callable[[], None]) -> None:
    """Make steps of a model's requests; changes it. ``check`` is called before each of them."""
    step = guard.wrap(
        "model",
        model.generate_content_async,
        kind="astream",
        input_view=lambda args, kwargs: newest_of((args[0] if args else kwargs["llm_request"]).contents),
        output_view=lambda response: {"content": getattr(response, "content", None)},
        usage=lambda response: _used(response, model.model),
        collect=_whole,
    )

    async def held(*args: Any, **kwargs: Any) -> Any:
        # ADK calls tools, and may go away, while it has the response that ends a stream: that ends the step before.
        check()
        whole = None
        async with contextlib.aclosing(step(*args, **kwargs)) as responses:
            async for response in responses:
                if whole is not None:
                    yield whole
                whole = None if response.partial else response
                if response.partial:
                    yield response
        if whole is not None:
            yield whole

    object.__setattr__(model, "generate_content_async", guard.mark(held))  # It is a pydantic model.


def _whole(responses: list[Any]) -> Any:
    """The response that ends a stream; it has the usage."""
    told = [response for response in responses if response.usage_metadata is not None]
    return (told or responses or [None])[-1]


def _used(response: Any, model: str) -> Usage | None:
    used = getattr(response, "usage_metadata", None)
    if used is None:
        return None
    given = (used.prompt_token_count or 0) + (getattr(used, "tool_use_prompt_token_count", None) or 0)
    made = (used.candidates_token_count or 0) + (getattr(used, "thoughts_token_count", None) or 0)
    return Usage(given, made, min(used.cached_content_token_count or 0, given), model=model)


def guard_tools(agents: list[Any], guard: Guard, contracts: Contracts | None) -> Callable[[], None]:
    """Make steps of the tools of agents. Raises UnknownNode for a contract of no tool.

    What a toolset has it tells when it is asked, before the first model request: what is returned raises it then, for
    ADK goes on without a toolset that raises.
    """
    names = {name for each in agents for tool in each.tools if (name := _name_of(tool))}
    sets = [tool for each in agents for tool in each.tools if isinstance(tool, BaseToolset)]
    late = {name for name in contracts or {} if name not in names} if sets else set()
    found = guard.contracts(contracts, names | late, "tool")
    told: dict[int, set[str]] = {}

    def check() -> None:
        if len(told) == len({id(tools) for tools in sets}):
            guard.contracts(contracts, names.union(*told.values()), "tool")

    for tools in sets:
        _guard_set(tools, guard, found, told)
    for each in agents:
        each.tools = [_guarded(tool, guard, found.get(_name_of(tool) or "")) for tool in each.tools]
    return check


def _guard_set(
    tools: Any,
    guard: Guard,
    found: dict[str, NodeContract[Any, Any]],
    told: dict[int, set[str]],
) -> None:
    """Make steps of the tools that a toolset gives, each time it is asked for them."""
    ask = tools.get_tools
    if guard.has(ask):
        return

    async def get_tools(*args: Any, **kwargs: Any) -> list[Any]:
        given = await ask(*args, **kwargs)
        told[id(tools)] = {tool.name for tool in given}
        return [_guarded(tool, guard, found.get(tool.name)) for tool in given]

    tools.get_tools = guard.mark(get_tools)


def _guarded(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> Any:
    """A tool as a step: a function, what holds one, or any other that is run; agents and toolsets are guarded inside."""
    if isinstance(tool, AgentTool | BaseToolset):
        return tool
    if hasattr(tool, "run_async") and not isinstance(tool, FunctionTool):
        if not guard.has(tool.run_async):
            about: Any = {"contract": contract, "input_view": lambda _, kwargs: kwargs.get("args")}
            tool.run_async = guard.wrap(tool.name, tool.run_async, kind="acall", **about)
        return tool
    func = tool.func if isinstance(tool, FunctionTool) else tool
    if not callable(func) or guard.has(func):
        return tool
    seen = arguments_of(func)

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return {name: value for name, value in seen(args, kwargs).items() if name != "tool_context"}

    step = guard.wrap(_name_of(tool) or "tool", func, contract=contract, input_view=given)
    if func is tool:
        return step
    tool.func = step
    return tool


def _name_of(tool: Any) -> str | None:
    return getattr(tool, "name", None) or getattr(tool, "__name__", None)
