"""Google ADK: the models and tools of agents as steps.

::

    attach(agent, guard, {"weather": (City, Weather)})
    runner = each_run(InMemoryRunner(agent), guard)  # each run_async() and run_live() is a run
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("google-adk"):
    from google.adk.agents import LlmAgent
    from google.adk.models import LLMRegistry
    from google.adk.tools.agent_tool import AgentTool
    from google.adk.tools.base_toolset import BaseToolset
    from google.adk.tools.function_tool import FunctionTool

from stroma.adapters._delegation import guard_methods, wrap_method
from stroma.adapters._state_views import arguments_of, newest_of
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, usage_from

__all__ = ["attach", "each_run"]

T = TypeVar("T")
#: The calls by which ADK asks a person begin so.
_ASKS: Final = "adk_request_"
_REQUEST: Final = "generate_content_async"
#: Where an agent has its guard.
_ATTACHED: Final = "_stroma_attached"


def attach(agent: T, guard: Guard, contracts: Contracts | None = None) -> T:
    """Make steps of the models and function tools of an agent and those inside it; changes and returns it.

    ``contracts``: by the names of tools; input is the arguments, output the result. Raises UnknownNode for a
    contract of no tool.
    """
    agents = _inside(agent)
    check = guard_tools(agents, guard, contracts)
    for each in agents:
        if isinstance(each.model, str) and each.model:
            each.model = LLMRegistry.new_llm(each.model)
        elif not each.model and not _has_model_above(each):
            # The class's default, which other agents share.
            each.model = copy.copy(each.canonical_model)
        if each.model:
            guard_model(each.model, guard, check)
    object.__setattr__(agent, _ATTACHED, guard)
    return agent


def each_run(runner: T, guard: Guard) -> T:
    """Make each ``run_async()``, ``run()`` and ``run_live()`` of a runner a run; changes it and returns it.

    It guards what was added to its agent since :func:`attach`, too. In the live mode tools are steps; the
    model's tokens count in the run and in no step, and a spent budget ends the stream of events.
    """
    target: Any = runner
    parts, live_parts = target.run_async, target.run_live
    if not guard.has(parts):

        def renew() -> None:
            agent = getattr(target, "agent", None)
            if agent is not None and vars(agent).get(_ATTACHED) is guard:
                attach(agent, guard)

        def run_async(**kwargs: Any) -> Any:
            message = kwargs.get("new_message")
            renew()
            return guard.aover(
                lambda: _events(parts, guard, kwargs),
                {"message": message},
                is_continuation=_is_continuation(message),
            )

        def run_live(**kwargs: Any) -> Any:
            renew()
            return guard.aover(lambda: _live_events(live_parts, guard, kwargs))

        target.run_async, target.run_live = guard.mark(run_async), run_live
    return runner


def _has_model_above(agent: Any) -> bool:
    above = agent.parent_agent
    while above is not None and not isinstance(above, LlmAgent):
        above = above.parent_agent
    return above is not None


def _inside(agent: Any) -> list[Any]:
    """Return the agents with a model that an agent can reach, each once."""
    pending: list[Any] = [agent]
    reached: list[Any] = []
    for each in pending:
        if isinstance(each, LlmAgent) and not any(each is known for known in reached):
            reached.append(each)
            pending += [tool.agent for tool in each.tools if isinstance(tool, AgentTool)]
        pending += getattr(each, "sub_agents", ())
    return reached


def guard_model(model: Any, guard: Guard, check: Callable[[], None]) -> None:
    """Make steps of a model's requests, and of its copies'; changes it. ``check`` is called before each."""

    def held(step: Any) -> Any:
        async def generate(*args: Any, **kwargs: Any) -> Any:
            # ADK calls tools, and may stop reading, at the last response of a stream: hold it until the step
            # has ended.
            check()
            last = None
            async with contextlib.aclosing(step(*args, **kwargs)) as responses:
                async for response in responses:
                    if last is not None:
                        yield last
                    last = None if response.partial else response
                    if response.partial:
                        yield response
            if last is not None:
                yield last

        return functools.wraps(step)(generate)

    guard_methods(
        model,
        (_REQUEST,),
        guard,
        "model",
        kind="astream",
        input_view=lambda args, kwargs: newest_of(_messages_of(args, kwargs)),
        messages=_messages_of,
        output_view=lambda response: {"content": getattr(response, "content", None)},
        usage=lambda response: _usage_of(response, model.model),
        collect=_last_response,
        delta=_delta,
    )
    wrap_method(model, _REQUEST, guard, held)


def _messages_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0] if args else kwargs["llm_request"]).contents


def _delta(response: Any) -> str | None:
    """Return the text of a part of a stream; the last response repeats the texts of all."""
    parts = getattr(response.content, "parts", None) if response.partial else None
    return "".join(part.text for part in parts or () if part.text and not part.thought)


def _last_response(responses: list[Any]) -> Any:
    """Return the last response of a stream, which has the usage."""
    with_usage = [response for response in responses if response.usage_metadata is not None]
    return (with_usage or responses or [None])[-1]


def guard_tools(agents: list[Any], guard: Guard, contracts: Contracts | None) -> Callable[[], None]:
    """Make steps of the tools of agents. Raises UnknownNode for a contract of no tool.

    A toolset lists its tools before the first model request; the returned function raises UnknownNode then,
    as ADK ignores a toolset that raises.
    """
    names = {name for each in agents for tool in each.tools if (name := _name_of(tool))}
    sets = [tool for each in agents for tool in each.tools if isinstance(tool, BaseToolset)]
    late = {name for name in contracts or {} if name not in names} if sets else set()
    by_name = guard.contracts(contracts, names | late, "tool")
    listed: dict[int, set[str]] = {}

    def check() -> None:
        if len(listed) == len({id(tools) for tools in sets}):
            guard.contracts(contracts, names.union(*listed.values()), "tool")

    for tools in sets:
        _guard_set(tools, guard, by_name, listed)
    for each in agents:
        each.tools = [_guard_tool(tool, guard, by_name.get(_name_of(tool) or "")) for tool in each.tools]
    return check


def _guard_set(
    tools: Any, guard: Guard, by_name: dict[str, NodeContract[Any, Any]], listed: dict[int, set[str]]
) -> None:
    """Make steps of the tools of a toolset, each time it lists them."""
    list_tools = tools.get_tools
    if guard.has(list_tools):
        return

    async def get_tools(*args: Any, **kwargs: Any) -> list[Any]:
        offered = await list_tools(*args, **kwargs)
        listed[id(tools)] = {tool.name for tool in offered}
        return [_guard_tool(tool, guard, by_name.get(tool.name)) for tool in offered]

    tools.get_tools = guard.mark(get_tools)


def _guard_tool(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> Any:
    """Return a tool as a step. Agents and toolsets are returned as they are: their contents are guarded."""
    if isinstance(tool, AgentTool | BaseToolset):
        return tool
    if hasattr(tool, "run_async") and not isinstance(tool, FunctionTool):
        if not guard.has(tool.run_async):
            about: Any = {"contract": contract, "input_view": lambda _, kwargs: kwargs.get("args")}
            tool.run_async = guard.wrap(tool.name, tool.run_async, kind="acall", role="tool", **about)
        return tool
    func = tool.func if isinstance(tool, FunctionTool) else tool
    if not callable(func) or guard.has(func):
        return tool
    arguments = arguments_of(func)

    def input_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return {name: value for name, value in arguments(args, kwargs).items() if name != "tool_context"}

    step = guard.wrap(_name_of(tool) or "tool", func, contract=contract, input_view=input_view, role="tool")
    if func is tool:
        return step
    tool.func = step
    return tool


def _name_of(tool: Any) -> str | None:
    return getattr(tool, "name", None) or getattr(tool, "__name__", None)


# ---------------------------------------------------------------------- events of runs


async def _events(parts: Callable[..., Any], guard: Guard, kwargs: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield the events of ``run_async()``, and suspend the run with what ADK has asked."""
    requests: list[Any] = []
    async with contextlib.aclosing(parts(**kwargs)) as source:
        async for event in source:
            requests += [call for call in event.get_function_calls() if (call.name or "").startswith(_ASKS)]
            yield event
    for call in requests:
        original = (call.args or {}).get("originalFunctionCall") or {}
        is_confirmation = call.name == f"{_ASKS}confirmation" and original.get("name")
        reason = f"approval of {original['name']}" if is_confirmation else call.name
        guard.current.ctx.account.note_suspended(reason)


def _is_continuation(message: Any) -> bool:
    """Return True if a message responds to what ADK has asked, or if there is none."""
    return message is None or any(
        part.function_response is not None and (part.function_response.name or "").startswith(_ASKS)
        for part in message.parts or ()
    )


async def _live_events(parts: Callable[..., Any], guard: Guard, kwargs: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield the events of ``run_live()``, and count the tokens of each against the budget of the run."""
    run = guard.current
    async with contextlib.aclosing(parts(**kwargs)) as source:
        async for event in source:
            used = None if event.partial else _usage_of(event, getattr(event, "model_version", None))
            if used is not None:
                run.report_usage(used)
            run.check_budget()
            yield event


def _usage_of(response: Any, model: str | None) -> Usage | None:
    used = getattr(response, "usage_metadata", None)
    if used is None or used.prompt_token_count is used.total_token_count is None:
        return None
    return usage_from(response, model=model)
