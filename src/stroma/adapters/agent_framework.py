"""Microsoft Agent Framework: middleware that makes steps of an agent, its model requests and its tools.

::

    agent = Agent(client, tools=[weather], middleware=stroma_middleware(Guard(runner), {"weather": (City, Weather)}))
    await agent.run("...")  # a run
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from agent_framework import (
        AgentMiddleware,
        AgentMiddlewareLayer,
        AgentResponseUpdate,
        ChatMiddleware,
        FunctionMiddleware,
        MiddlewareTermination,
        ResponseStream,
    )

    from stroma.adapters._agent_framework_answers import ask, asked_again, is_continuation, take_answers
    from stroma.adapters._agent_framework_views import (
        Rest,
        answer_of,
        asked_of,
        control_of,
        names_of,
        result_of,
        used_by,
    )
except ImportError as error:
    raise import_error("agent-framework", error) from error

from stroma.adapters._step import GuardedStep
from stroma.adapters.guard import Contracts, Guard, contract_for, what_stopped
from stroma.engine.execution import current_node, current_node_or_none

warn_if_untested("agent-framework")

__all__ = ["stroma_middleware"]


def stroma_middleware(guard: Guard, tools: Contracts | None = None) -> list[Any]:
    """Return the middleware that guards an agent: ``Agent(..., middleware=...)``.

    ``tools``: contracts by the names of tools; input is the arguments, output the result (of text that is
    JSON, what it says). A contract of no tool raises UnknownNode at the first model request. Agents that run
    inside the agent are guarded with it, as tools (``as_tool``) or called in one.
    """
    _guard_inner_agents()
    return _Shared(guard, tools).middleware


class _Shared:
    """State that the three middlewares share."""

    def __init__(self, guard: Guard, tools: Contracts | None) -> None:
        self.guard = guard
        self.tools = {name: contract_for(name, contract) for name, contract in (tools or {}).items()}
        self.checked = not self.tools
        #: What stopped a run inside a tool, by the run: the framework tells the model of it, and would
        #: continue.
        self.fatal: dict[str, BaseException] = {}

    @property
    def middleware(self) -> list[Any]:
        return [_OfAgent(self), _OfChat(self), _OfFunction(self)]

    @property
    def inner(self) -> _Shared:
        """The state of agents inside: contracts may name tools of one of them, and none has to have them all."""
        inner = _Shared(self.guard, self.tools)
        inner.checked, inner.fatal = True, self.fatal
        return inner

    def check(self, offered: Any) -> None:
        if not self.checked:
            self.guard.contracts(self.tools, names_of(offered), "tool")
            self.checked = True
        self.raise_fatal()

    def raise_fatal(self) -> None:
        fatal = self.fatal.pop(self.guard.current.ctx.run_id, None)
        if fatal is not None:
            raise fatal


def _shared_above() -> _Shared | None:
    """Return the state of the guarded agent that the code here runs inside of."""
    node = current_node_or_none()
    while node is not None:
        shared: _Shared | None = node.notes.get(_Shared)
        if shared is not None:
            return shared
        node = node.parent
    return None


def _guard_inner_agents() -> None:
    """Let every agent that runs inside a guarded one have its middleware."""
    bare: Any = AgentMiddlewareLayer.run
    if hasattr(bare, "_stroma_inner"):
        return

    @functools.wraps(bare)
    def run(self: Any, *args: Any, middleware: Any = None, **kwargs: Any) -> Any:
        shared = _shared_above()
        own = getattr(self, "middleware", None)
        if shared is not None and not any(
            isinstance(one, _OfAgent) for several in (own, middleware) for one in _listed(several)
        ):
            middleware = [*_listed(middleware), *shared.inner.middleware]
        return bare(self, *args, middleware=middleware, **kwargs)

    run.__dict__["_stroma_inner"] = AgentMiddlewareLayer.run = run


def _listed(middleware: Any) -> list[Any]:
    return (
        list(middleware) if isinstance(middleware, Sequence) else [] if middleware is None else [middleware]
    )


class _OfAgent(AgentMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        guard, request = self._shared.guard, asked_of(context.messages)
        call = _AgentCall(context, call_next, self._shared)
        # With a request for approval, or the response to one, it continues where it waited.
        answered = is_continuation(context.messages or [])
        # Its models and tools had their retries: it is called once.
        about: Any = {
            "input_view": lambda *_: request,
            "output_view": answer_of,
            "control": control_of,
            "can_retry": False,
            "role": "agent",
        }
        name = getattr(context.agent, "name", None) or "agent"
        if context.stream:
            step = guard.wrap(name, call.parts, collect=call.final, **about)
            context.result = ResponseStream(
                guard.aover(step, request, is_continuation=answered), finalizer=call.final
            )
        else:
            whole = guard.wrap(name, call.whole, **about)
            context.result = await guard.each_call(whole, lambda *_: request, lambda _: answered)()


class _OfChat(ChatMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        self._shared.check((context.options or {}).get("tools"))
        guard, request = self._shared.guard, asked_of(context.messages)
        call = Rest(context, call_next)
        about: Any = {
            "input_view": lambda *_: request,
            "output_view": answer_of,
            "usage": used_by,
            "control": control_of,
        }
        if context.stream:
            step = guard.wrap("model", call.parts, collect=call.final, delta=lambda part: part.text, **about)
            context.result = ResponseStream(step(), finalizer=call.final)
        else:
            context.result = await guard.wrap("model", call.whole, **about)()


class _OfFunction(FunctionMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        name, shared = context.function.name, self._shared
        step = GuardedStep(
            name,
            shared.tools.get(name),
            lambda *_: context.arguments,
            result_of,
            control=control_of,
            role="tool",
        )
        try:
            context.result = await shared.guard.acall(step, Rest(context, call_next).whole)
        except Exception as error:
            if what_stopped(error) is None:
                raise
            shared.fatal[shared.guard.current.ctx.run_id] = error
            raise MiddlewareTermination(str(error)) from error


class _AgentCall(Rest):
    """The call of an agent."""

    def __init__(self, context: Any, call_next: Any, shared: _Shared) -> None:
        super().__init__(context, call_next, shared.raise_fatal)
        self._shared = shared

    def _begin(self) -> bool:
        """Note the agent on its step; return True if it is inside no other one."""
        is_outermost = _shared_above() is None
        current_node().notes[_Shared] = self._shared
        return is_outermost

    async def _end(self, response: Any, is_outermost: bool) -> None:
        guard = self._shared.guard
        if (used := used_by(response)) is not None:
            guard.compare_usage("Agent Framework", used.input_tokens + used.output_tokens)
        # Those of an agent inside are not passed on to anybody.
        await ask(guard, (getattr(response, "user_input_requests", None) or ()) if is_outermost else ())

    async def whole(self) -> Any:
        is_outermost = self._begin()
        requests = take_answers(self._shared.guard, self._context.messages or [])
        if requests:  # What is still to be answered is asked again, and nothing is called.
            response = asked_again(requests)
        else:
            response = await super().whole()
        await self._end(response, is_outermost)
        return response

    async def parts(self) -> AsyncGenerator[Any, None]:
        is_outermost = self._begin()
        requests = take_answers(self._shared.guard, self._context.messages or [])
        if requests:
            self._final = asked_again(requests)
            yield AgentResponseUpdate(contents=requests, role="assistant")
        else:
            async with contextlib.aclosing(super().parts()) as parts:
                async for part in parts:
                    yield part
        await self._end(self._final, is_outermost)
