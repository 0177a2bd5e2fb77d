"""Crews of CrewAI: their LLMs and tools as steps, and their kickoffs, and those of flows, as runs."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, Final

from crewai import BaseLLM
from crewai.flow.async_feedback import HumanFeedbackPending
from crewai.tools import BaseTool
from crewai.tools.agent_tools.base_agent_tools import BaseAgentTool
from crewai.utilities.llm_utils import create_llm
from crewai.utilities.planning_handler import CrewPlanner

from stroma.adapters._crewai_llms import comparing, guard_llm, guard_tool, raise_fatal
from stroma.adapters._delegation import before, wrap_method
from stroma.adapters.guard import Guard
from stroma.contracts.contract import NodeContract

__all__ = ["attach_crew", "make_run", "tools_of"]

#: Where agents and crews have LLMs.
_LLMS: Final = ("llm", "function_calling_llm", "manager_llm", "planning_llm", "chat_llm")


def attach_crew(crew: Any, guard: Guard, contracts: dict[str, NodeContract[Any, Any]]) -> None:
    """Make steps of the LLMs and tools of a crew and its copies, and a run of each kickoff."""
    _guard_parts(crew, guard, contracts)

    def renewed(kickoff: Callable[..., Any]) -> Callable[..., Any]:
        return before(kickoff, lambda self, *_, **__: _guard_parts(self, guard, contracts))

    def copied(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def make_copy(self: Any) -> Any:
            other = bare(self)
            attach_crew(other, guard, contracts)
            return other

        return make_copy

    def managed(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def create(self: Any) -> None:
            if self.manager_agent is None:
                self.manager_llm = _guarded_llm(self.manager_llm, guard)
            bare(self)
            _guard_parts(self, guard, contracts)

        return create

    def planned(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def plan(self: Any) -> None:
            own = self.planning_llm
            # What CrewAI takes where none is named.
            self.planning_llm = _guarded_llm(
                CrewPlanner(tasks=[], planning_agent_llm=own).planning_agent_llm, guard
            )
            try:
                bare(self)
            finally:
                self.planning_llm = own

        return plan

    for name in ("kickoff", "akickoff", "kickoff_async"):
        make_run(crew, name, guard, renewed)
    for name, wrapper in (
        ("copy", copied),
        ("_create_manager_agent", managed),
        ("_handle_crew_planning", planned),
    ):
        wrap_method(crew, name, guard, wrapper)


def _guard_parts(crew: Any, guard: Guard, contracts: dict[str, NodeContract[Any, Any]]) -> None:
    """Guard the LLMs and tools that a crew has now."""
    # By its values: newer releases deprecate the attribute, and will not have it.
    llms = [vars(part).get(name) for part in (crew, *_agents_of(crew)) for name in _LLMS]
    for llm in llms:
        if isinstance(llm, BaseLLM):
            guard_llm(llm, guard)
    for tool in tools_of(crew):
        guard_tool(tool, guard, contracts.get(tool.name))


def _agents_of(crew: Any) -> list[Any]:
    agents = [*crew.agents, *(task.agent for task in crew.tasks), crew.manager_agent]
    return list({id(agent): agent for agent in agents if agent is not None}.values())


def tools_of(crew: Any) -> list[Any]:
    """Return the tools of the agents and tasks of a crew."""
    holders = (*_agents_of(crew), *crew.tasks)
    tools = [tool for holder in holders for tool in holder.tools or () if isinstance(tool, BaseTool)]
    # Those with which a manager delegates call agents of the crew.
    return list({id(tool): tool for tool in tools if not isinstance(tool, BaseAgentTool)}.values())


def _guarded_llm(llm: Any, guard: Guard) -> Any:
    resolved = llm if llm is None else create_llm(llm)
    return guard_llm(resolved, guard) if isinstance(resolved, BaseLLM) else llm


def make_run(
    target: Any,
    name: str,
    guard: Guard,
    renewed: Callable[[Any], Any] = lambda call: call,
    *,
    is_continuation: bool = False,
) -> None:
    """Make each call of a method of a flow or crew a run. One that streams returns at once, and calls it again inside."""

    def wrapper(entered: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with comparing(guard):
                result = entered(self, *args, **kwargs)
                raise_fatal(guard)
                return result

        async def arun(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_continuation and not any((*args, *kwargs.values())):
                args, kwargs = _stored_feedback(self, guard), {}
            with comparing(guard):
                result = await entered(self, *args, **kwargs)
                raise_fatal(guard)
                if isinstance(result, HumanFeedbackPending):
                    context = result.context
                    await guard.current.questions.ask(
                        context.method_name, _question_of(context), context.message
                    )
                return result

        bare = inspect.unwrap(entered, stop=lambda func: func is not entered)
        each = guard.each_call(
            renewed(functools.wraps(entered)(arun if inspect.iscoroutinefunction(entered) else run)),
            _inputs,
            lambda _: is_continuation,
        )

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (bare if self.stream else each)(self, *args, **kwargs)

        async def acall(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await (bare if self.stream else each)(self, *args, **kwargs)

        return functools.wraps(entered)(acall if inspect.iscoroutinefunction(entered) else call)

    wrap_method(target, name, guard, wrapper)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": kwargs.get("inputs", args[1] if len(args) > 1 else None)}


def _question_of(context: Any) -> str:
    """Return the key of the question that a flow waits with."""
    return f"{context.flow_id} {context.method_name}"


def _stored_feedback(flow: Any, guard: Guard) -> tuple[str, ...]:
    """Return the arguments for ``resume()`` of a flow that is passed no feedback: the stored answer, if there is one."""
    context = flow.pending_feedback
    run = guard.current
    answers = {} if context is None else run.questions.answers_to([_question_of(context)])
    run.questions.taken.update(answers)
    return tuple(answer if isinstance(answer, str) else json.dumps(answer) for answer in answers.values())
