"""Microsoft Agent Framework: middleware that makes steps of an agent, its model requests and its tools.

::

    agent = Agent(client, tools=[weather], middleware=stroma_middleware(Guard(runner), {"weather": (City, Weather)}))
    await agent.run("...")  # a run
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from agent_framework import (
        AgentMiddleware,
        ChatMiddleware,
        FunctionMiddleware,
        MiddlewareTermination,
        ResponseStream,
    )
except ImportError as error:
    raise import_error("agent-framework", error) from error

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, contract_for, what_stopped
from stroma.cost.usage import Usage

warn_if_untested("agent-framework")

__all__ = ["stroma_middleware"]


def stroma_middleware(guard: Guard, tools: Contracts | None = None) -> list[Any]:
    """Return the middleware that guards an agent: ``Agent(..., middleware=...)``.

    ``tools``: contracts by the names of tools; input is the arguments, output the result (of text that is JSON, what it
    says). A contract of no tool raises UnknownNode at the first model request.
    """
    shared = _Shared(guard, tools)
    return [_OfAgent(shared), _OfChat(shared), _OfFunction(shared)]


class _Shared:
    """State that the three middlewares share."""

    def __init__(self, guard: Guard, tools: Contracts | None) -> None:
        self.guard = guard
        self.tools = {name: contract_for(name, contract) for name, contract in (tools or {}).items()}
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
        guard, request = self._shared.guard, asked_of(context.messages)
        call = Rest(context, call_next, self._shared.raise_fatal)
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
            context.result = ResponseStream(guard.aover(step, request), finalizer=call.final)
        else:
            context.result = await guard.each_call(
                guard.wrap(name, call.whole, **about), lambda *_: request
            )()


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
            step = guard.wrap("model", call.parts, collect=call.final, **about)
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


class Rest:
    """The rest of a middleware pipeline, as a coroutine function that can be called again, or as a stream."""

    def __init__(self, context: Any, call_next: Any, judge: Callable[[], None] = lambda: None) -> None:
        self._context, self._next, self._judge = context, call_next, judge
        self._final: Any = None

    async def whole(self) -> Any:
        try:
            await self._next()
        except Exception:
            self._judge()  # Raises the cause of the framework's error in its place.
            raise
        self._judge()
        return self._context.result

    async def parts(self) -> AsyncGenerator[Any, None]:
        stream = await self.whole()
        try:
            async for part in stream:
                yield part
            # This also stores the history of a session.
            self._final = await stream.get_final_response()
        except Exception:
            self._judge()
            raise
        self._judge()

    def final(self, _: Any) -> Any:
        """Return the final response of the stream."""
        return self._final


def control_of(error: BaseException) -> Control | None:
    """Return the meaning of an exception by which middleware ends a call with a result."""
    return (
        Control("returned", getattr(error, "result", None)) if type(error) is MiddlewareTermination else None
    )


def asked_of(messages: Any) -> dict[str, Any]:
    """Return the newest message as text, which is the same in each process, and the number of messages."""
    request = newest_of(messages)
    newest = request["newest"]
    if hasattr(newest, "text"):
        request["newest"] = {"role": str(getattr(newest, "role", "")), "text": newest.text}
    return request


def answer_of(answer: Any) -> dict[str, Any]:
    """Return the view of an answer of a model or an agent."""
    return {"text": getattr(answer, "text", None)}


def result_of(result: Any) -> Any:
    """Return the result of a tool, parsed if its text is JSON."""
    text = result
    if isinstance(result, list) and result and all(hasattr(part, "text") for part in result):
        text = "".join(part.text or "" for part in result)
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def used_by(response: Any) -> Usage | None:
    """Return the usage of a response, or None."""
    used = getattr(response, "usage_details", None)
    if not used:
        return None
    input_tokens, cached = used.get("input_token_count") or 0, used.get("cache_read_input_token_count") or 0
    model = getattr(response, "model", None) or getattr(response, "model_id", None)
    return Usage(input_tokens, used.get("output_token_count") or 0, min(cached, input_tokens), model=model)
