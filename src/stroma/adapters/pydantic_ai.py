"""Pydantic AI: in a flow, agents whose model requests and tools are its steps; elsewhere, guarded agents.

::

    agent = Agent("openai:gpt-4o", name="a", capabilities=[StromaDurability()])
    await agent.run("...")  # in the body of a flow

    agent = Agent("openai:gpt-4o", capabilities=[StromaCapability(guard, tools={"search": (Query, Hits)})])
    await agent.run("...")  # a run: the agent's step, with its model requests and tools inside
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from stroma._utils.lazy import lazy
from stroma.adapters._patches import patch
from stroma.adapters._releases import imports_of

with imports_of("pydantic-ai"):
    from pydantic_ai import Agent, ModelRetry, exceptions
    from pydantic_ai.capabilities import AbstractCapability
    from pydantic_ai.models.wrapper import WrapperModel
    from pydantic_ai.tools import DeferredToolRequests

    from stroma.adapters._pydantic_ai_responses import emitting, usage_of

from pydantic import BaseModel

from stroma.adapters._guarded_run import active_run
from stroma.adapters._state_views import newest_of, violation
from stroma.adapters._step import Control, GuardedStep, InnerCalls, find_halt
from stroma.adapters.guard import Contracts, Guard, contract_for
from stroma.engine.execution import CURRENT, current_node

if TYPE_CHECKING:
    from stroma.adapters._durable_steps import ToolApproval, ToolOptions
    from stroma.adapters._pydantic_ai_durability import StromaDurability, ToolAnswer

__all__ = ["StromaCapability", "StromaDurability", "ToolAnswer", "ToolApproval", "ToolOptions"]

#: They need a newer release than guarded agents.
_OF_FLOWS = {
    "_durable_steps": ("ToolApproval", "ToolOptions"),
    "_pydantic_ai_durability": ("StromaDurability", "ToolAnswer"),
}
__getattr__, __dir__ = lazy(__name__, _OF_FLOWS, "stroma.adapters")


class StromaCapability(AbstractCapability[Any]):
    """Guards an agent: ``Agent(..., capabilities=[StromaCapability(guard)])``.

    ``tools``: contracts by the names of tools; input is the arguments, output the result. ``output``: what
    the agent's answer must satisfy: one that does not is sent back to the model, as often as the agent's
    output retries allow, and then fails the agent. A contract of no tool raises UnknownNode at the first
    model request. In a run of a guard, agents without the capability are guarded, too: those that tools ask,
    say.
    """

    def __init__(
        self, guard: Guard, *, tools: Contracts | None = None, output: type[BaseModel] | None = None
    ) -> None:
        patch(guard, Agent, "iter", _with_capability)
        self.guard = guard
        self._tools = {name: contract_for(name, contract) for name, contract in (tools or {}).items()}
        self._output = None if output is None else contract_for("output", (None, output))
        self._checked = not self._tools

    async def wrap_run(self, ctx: Any, *, handler: Any) -> Any:
        """Run the agent as the step of its name, in a run of its own unless one of the guard is active."""
        around = CURRENT.get()
        if around is not None and around.notes.get(_RUN) == ctx.run_id:
            return await handler()  # The agent has the capability twice.
        name = getattr(ctx.agent, "name", None) or "agent"
        # Its models and tools had their retries.
        step = GuardedStep(
            name,
            self._output,
            output_view=lambda result: result.output,
            control=control,
            judge=_judge,
            can_retry=False,
            role="agent",
        )

        async def run(_: Any) -> Any:
            current_node().notes[_RUN] = ctx.run_id
            try:
                return await handler()
            except asyncio.CancelledError as error:
                if find_halt(error, InnerCalls.of(current_node()._own).halts) is None:
                    await _cancel_here()
                raise

        if self.guard.inside:
            with self.guard.current.here():
                return await self.guard.acall(step, run, {"prompt": ctx.prompt})
        async with self.guard.begin({"prompt": ctx.prompt}, is_continuation=ctx.prompt is None):
            return await self.guard.acall(step, run, {"prompt": ctx.prompt})

    async def before_model_request(self, ctx: Any, request_context: Any) -> Any:
        """Let the model's request be the step ``model``. Raises UnknownNode for a contract of no tool."""
        if not self._checked:
            self._check(ctx.agent, request_context.model_request_parameters)
        if not isinstance(request_context.model, StepModel):
            request_context.model = StepModel(request_context.model, self.guard)
        return request_context

    async def wrap_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any, handler: Any) -> Any:
        """Call a tool as the step of its name, under its contract."""
        around = CURRENT.get()
        if around is not None and around.notes.get(_CALL) is call:
            return await handler(args)

        async def execute(args: Any) -> Any:
            current_node().notes[_CALL] = call
            return await handler(args)

        step = GuardedStep(
            call.tool_name,
            self._tools.get(call.tool_name),
            control=lambda error: control(error, call.tool_name),
            role="tool",
        )
        return await self.guard.acall(step, execute, args)

    async def after_output_process(self, ctx: Any, *, output_context: Any, output: Any) -> Any:
        """Return the agent's answer. Raises ModelRetry, which asks again, if it breaks ``output``."""
        if self._output is not None and not ctx.partial_output:
            broken = violation("output", self._output, "output", output)
            if broken is not None:
                raise ModelRetry(broken.as_prompt())
        return output

    def _check(self, agent: Any, parameters: Any) -> None:
        """Refuse a contract of no tool, of those that are offered and those that are only defined."""
        names = {tool.name for tool in (*parameters.function_tools, *parameters.output_tools)}
        for toolset in agent.toolsets if isinstance(agent, Agent) else ():
            names |= set(getattr(toolset, "tools", ()))
        self.guard.contracts(self._tools, names, "tool")
        self._checked = True


async def _cancel_here() -> None:
    """Cancel the running task as the agent's was: Pydantic AI calls ``wrap_run`` in a task of its own."""
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        task.cancel()
        await asyncio.sleep(0)


#: Keys of an execution's notes: the run of an agent, and the call of a tool.
_RUN, _CALL = "pydantic_ai run", "pydantic_ai call"


def _judge(result: Any) -> Control | None:
    """Return the meaning of a result that asks for approvals, or for results of tools that others run."""
    requests: Any = getattr(result, "output", None)
    if not isinstance(requests, DeferredToolRequests):
        return None
    reasons = [f"approval of {call.tool_name}" for call in requests.approvals]
    return Control(
        "suspended", "; ".join(reasons + [f"result of {call.tool_name}" for call in requests.calls])
    )


class StepModel(WrapperModel):
    """A model whose requests are steps: they may be repeated, unlike the handlers around a request."""

    def __init__(self, wrapped: Any, guard: Guard) -> None:
        super().__init__(wrapped)
        about: dict[str, Any] = {
            "input_view": lambda args, kwargs: newest_of(_messages_of(args, kwargs)),
            "messages": _messages_of,
            "output_view": _answer,
            "usage": usage_of,
            "control": control,
        }
        self._request = guard.wrap("model", wrapped.request, **about)
        last: Any = {"collect": lambda opened: opened[-1].get(), **about}
        self._stream = guard.wrap("model", self._open, **last)

    async def _open(self, *args: Any, **kwargs: Any) -> Any:
        async with self.wrapped.request_stream(*args, **kwargs) as response:
            response._event_iterator = emitting(aiter(response), current_node()._own)
            yield response

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        return await self._request(*args, **kwargs)

    def request_stream(self, *args: Any, **kwargs: Any) -> Any:
        stream: Any = self._stream
        return contextlib.asynccontextmanager(stream)(*args, **kwargs)


def control(error: BaseException, tool: str = "a tool") -> Control | None:
    """Return the meaning of an exception that Pydantic AI uses for control flow."""
    if isinstance(error, (exceptions.CallDeferred, exceptions.ApprovalRequired)):
        kind = "result" if isinstance(error, exceptions.CallDeferred) else "approval"
        return Control("suspended", f"{kind} of {tool}")
    if isinstance(error, (exceptions.SkipToolExecution, exceptions.SkipModelRequest)):
        return Control("returned", getattr(error, "result", None) or getattr(error, "response", None))
    return Control("passed") if isinstance(error, _TOLD_TO_THE_MODEL) else None


_TOLD_TO_THE_MODEL = tuple(
    getattr(exceptions, name)
    for name in ("ModelRetry", "ToolRetryError", "ToolFailed", "ToolFailedError")
    if hasattr(exceptions, name)
)


def _messages_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("messages")


def _answer(response: Any) -> dict[str, Any]:
    return {"model": response.model_name, "parts": response.parts}


def _with_capability(bare: Any) -> Any:
    """Return the method by which agents in a run of a guard get the capability: those that tools ask, say."""

    def iter(self: Any, *args: Any, **kwargs: Any) -> Any:
        run: Any = active_run()
        own = kwargs.get("capabilities") or ()
        if run is not None and not any(
            isinstance(each, StromaCapability) for each in (*self.root_capability.capabilities, *own)
        ):
            kwargs["capabilities"] = [*own, StromaCapability(run.guard)]
        return bare(self, *args, **kwargs)

    return iter
