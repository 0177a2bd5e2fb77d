"""LangChain 1.x agents and Deep Agents: one middleware that makes steps of model calls and tools.

::

    guarded = StromaMiddleware(Guard(runner), tools={"search": (Query, Hits)})
    agent = guarded.attach(create_agent(model, tools, middleware=[guarded]))
    agent.invoke({"messages": [...]})  # each call is a run, its sub-agents included
"""

from __future__ import annotations

from typing import Any, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("langchain"):
    from langchain.agents.middleware import AgentMiddleware
    from langchain_core.messages import ToolMessage

    from stroma.adapters._langchain import answer_of, asked_of, counting, result_of
    from stroma.adapters.langgraph import attach_steps, control

from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, contract_for

__all__ = ["StromaMiddleware"]

A = TypeVar("A")


class StromaMiddleware(AgentMiddleware[Any, Any]):
    """Guards an agent: ``create_agent(..., middleware=[StromaMiddleware(guard)])``, or ``create_deep_agent``.

    ``tools``: contracts by the names of tools; input is the arguments, output the result (of text that is
    JSON, what it says). A contract of no tool raises UnknownNode at the first model call.
    """

    def __init__(self, guard: Guard, *, tools: Contracts | None = None) -> None:
        super().__init__()
        self.guard = guard
        self._contracts = {name: contract_for(name, contract) for name, contract in (tools or {}).items()}
        self._checked = not self._contracts
        self._model = GuardedStep("model", input_view=asked_of, output_view=answer_of, control=control)

    def attach(self, agent: A) -> A:
        """Make each call of the agent a run, and steps of other middleware around its model; returns it."""
        inside = ("model", "tools")  # What is made steps of in here.
        target: Any = agent
        others = [name for name in target.nodes if not name.startswith("__") and name not in inside]
        attach_steps(target, self.guard, {name: (name, None) for name in others})
        return agent

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        """Call the model as the step ``model``. Raises UnknownNode for a contract of no tool."""
        self._check(request.tools)
        return self.guard.call(self._model, _counted(handler), request)

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        """Do the same as :meth:`wrap_model_call` for an async agent."""
        self._check(request.tools)
        return await self.guard.acall(self._model, _acounted(handler), request)

    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Call a tool as the step of its name. An error message is returned unchanged, without a retry."""
        return self.guard.call(self._tool(request), _counted(handler), request)

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Do the same as :meth:`wrap_tool_call` for an async agent."""
        return await self.guard.acall(self._tool(request), _acounted(handler), request)

    def _tool(self, request: Any) -> GuardedStep:
        name = request.tool_call["name"]
        input_view = lambda args, _: args[0].tool_call["args"]  # noqa: E731
        return GuardedStep(
            name,
            self._contracts.get(name),
            input_view=input_view,
            output_view=result_of,
            control=control,
            judge=_judge,
            role="tool",
        )

    def _check(self, tools: Any) -> None:
        if not self._checked:
            named = [
                getattr(tool, "name", None) or (tool.get("name") if isinstance(tool, dict) else None)
                for tool in tools
            ]
            self.guard.contracts(self._contracts, [name for name in named if name], "tool")
            self._checked = True


def _judge(answer: Any) -> Control | None:
    is_error = isinstance(answer, ToolMessage) and answer.status == "error"
    return Control("passed", answer.content) if is_error else None


def _counted(handler: Any) -> Any:
    def call(request: Any) -> Any:
        with counting():
            return handler(request)

    return call


def _acounted(handler: Any) -> Any:
    async def acall(request: Any) -> Any:
        with counting():
            return await handler(request)

    return acall
