"""A tool of the OpenAI Agents SDK as a step."""

from __future__ import annotations

import copy
import json
from typing import Any

from agents.tool import maybe_invoke_function_tool_failure_error_function

from stroma.adapters._openai_agents_model import control
from stroma.adapters._step import Step
from stroma.adapters.guard import Guard, what_stopped
from stroma.contracts.contract import NodeContract

__all__ = ["guarded"]


def guarded(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> Any:
    """A tool whose calls are steps."""
    if guard.has(tool.on_invoke_tool):
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
        guard.mark(self)
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
