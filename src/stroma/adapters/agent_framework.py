"""Microsoft Agent Framework: middleware that makes steps of an agent, its model requests and its tools.

::

    agent = Agent(client, tools=[weather], middleware=stroma_middleware(Guard(runner), {"weather": (City, Weather)}))
    await agent.run("...")  # a run
"""

from __future__ import annotations

from typing import Any

try:
    from agent_framework import (
        AgentMiddleware,
        ChatMiddleware,
        FunctionMiddleware,
        MiddlewareTermination,
        ResponseStream,
    )

    from stroma.adapters._agent_framework import Rest, answer_of, asked_of, control_of, result_of, used_by
except ImportError as error:
    raise ImportError(
        "agent-framework-core is required for its adapter; install it with: pip install 'stroma[agent-framework]'"
    ) from error

from stroma.adapters._step import Step
from stroma.adapters.guard import Contracts, Guard, contract_for, what_stopped

__all__ = ["stroma_middleware"]


def stroma_middleware(guard: Guard, tools: Contracts | None = None) -> list[Any]:
    """What ``Agent(..., middleware=...)`` needs to be guarded.

    ``tools``: contracts by the names of tools; input is the arguments, output the result (of text that is JSON, what it
    says). A contract of no tool raises UnknownNode at the first model request.
    """
    shared = _Shared(guard, tools)
    return [_OfAgent(shared), _OfChat(shared), _OfFunction(shared)]


class _Shared:
    """What the three of them know together."""

    def __init__(self, guard: Guard, tools: Contracts | None) -> None:
        self.guard = guard
        self.tools = {name: contract_for(name, given) for name, given in (tools or {}).items()}
        self.checked = not self.tools
        #: What stopped a run inside a tool, by the run: the framework tells the model of it, and would go on.
        self.fatal: dict[str, BaseException] = {}

    def check(self, offered: Any) -> None:
        if not self.checked:
            names = [tool.name for tool in offered or () if hasattr(tool, "name")]
            self.guard.contracts(self.tools, names, "tool")
            self.checked = True
        self.raise_fatal()

    def raise_fatal(self) -> None:
        fatal = self.fatal.pop(self.guard.current.ctx.run_id, None)
        if fatal is not None:
            raise fatal


class _OfAgent(AgentMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        guard, asked = self._shared.guard, asked_of(context.messages)
        call = Rest(context, call_next, self._shared.raise_fatal)
        # Its models and tools had their retries: it is called once.
        about: Any = {"given": lambda *_: asked, "made": answer_of, "control": control_of, "again": False}
        name = getattr(context.agent, "name", None) or "agent"
        if context.stream:
            step = guard.wrap(name, call.parts, collect=call.final, **about)
            context.result = ResponseStream(guard.aover(step, asked), finalizer=call.final)
        else:
            context.result = await guard.each_call(guard.wrap(name, call.whole, **about), lambda *_: asked)()


class _OfChat(ChatMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        self._shared.check((context.options or {}).get("tools"))
        guard, asked = self._shared.guard, asked_of(context.messages)
        call = Rest(context, call_next)
        about: Any = {"given": lambda *_: asked, "made": answer_of, "usage": used_by, "control": control_of}
        if context.stream:
            step = guard.wrap("model", call.parts, collect=call.final, **about)
            context.result = ResponseStream(step(), finalizer=call.final)
        else:
            context.result = await guard.wrap("model", call.whole, **about)()


class _OfFunction(FunctionMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        name, shared = context.function.name, self._shared
        step = Step(name, shared.tools.get(name), lambda *_: context.arguments, result_of, control=control_of)
        try:
            context.result = await shared.guard.acall(step, Rest(context, call_next).whole)
        except Exception as error:
            if what_stopped(error) is None:
                raise
            shared.fatal[shared.guard.current.ctx.run_id] = error
            raise MiddlewareTermination(str(error)) from error
