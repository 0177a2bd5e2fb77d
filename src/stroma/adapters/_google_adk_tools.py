"""The tools of Google ADK, those of toolsets too, as steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.adk.tools.agent_tool import AgentTool
from google.adk.tools.base_toolset import BaseToolset
from google.adk.tools.function_tool import FunctionTool

from stroma.adapters._state_views import arguments_of
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract

__all__ = ["guard_tools"]


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
            about: Any = {"contract": contract, "given": lambda _, kwargs: kwargs.get("args")}
            tool.run_async = guard.wrap(tool.name, tool.run_async, kind="acall", **about)
        return tool
    func = tool.func if isinstance(tool, FunctionTool) else tool
    if not callable(func) or guard.has(func):
        return tool
    seen = arguments_of(func)

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return {name: value for name, value in seen(args, kwargs).items() if name != "tool_context"}

    step = guard.wrap(_name_of(tool) or "tool", func, contract=contract, given=given)
    if func is tool:
        return step
    tool.func = step
    return tool


def _name_of(tool: Any) -> str | None:
    return getattr(tool, "name", None) or getattr(tool, "__name__", None)
