"""Microsoft Agent Framework: middleware that makes steps of an agent, its model requests and its tools.

::

    agent = Agent(client, tools=[weather], middleware=stroma_middleware(Guard(runner), {"weather": (City, Weather)}))
    await agent.run("...")  # a run
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

try:
    from agent_framework import (
        AgentMiddleware,
        ChatMiddleware,
        FunctionMiddleware,
        MiddlewareTermination,
        ResponseStream,
    )
except ImportError as error:
    raise ImportError(
        "agent-framework-core is required for its adapter; install it with: pip install 'stroma[agent-framework]'"
    ) from error

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control, Step
from stroma.adapters.guard import Contracts, Guard, contract_for, what_stopped
from stroma.cost.usage import Usage

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
        about: Any = {
            "input_view": lambda *_: asked,
            "output_view": answer_of,
            "control": control_of,
            "can_retry": False,
        }
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
        about: Any = {
            "input_view": lambda *_: asked,
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
        step = Step(name, shared.tools.get(name), lambda *_: context.arguments, result_of, control=control_of)
        try:
            context.result = await shared.guard.acall(step, Rest(context, call_next).whole)
        except Exception as error:
            if what_stopped(error) is None:
                raise
            shared.fatal[shared.guard.current.ctx.run_id] = error
            raise MiddlewareTermination(str(error)) from error


class Rest:
    """The rest of a pipeline of middleware, as a function that can be called again, and as one that gives parts."""

    def __init__(self, context: Any, call_next: Any, judge: Callable[[], None] = lambda: None) -> None:
        self._context, self._next, self._judge = context, call_next, judge
        self._final: Any = None

    async def whole(self) -> Any:
        try:
            await self._next()
        except Exception:
            self._judge()  # What is behind the error of the framework comes out in its place.
            raise
        self._judge()
        return self._context.result

    async def parts(self) -> AsyncGenerator[Any, None]:
        stream = await self.whole()
        try:
            async for part in stream:
                yield part
            # That is what keeps the history of a session, too.
            self._final = await stream.get_final_response()
        except Exception:
            self._judge()
            raise
        self._judge()

    def final(self, _: Any) -> Any:
        """The response that the parts came to."""
        return self._final


def control_of(error: BaseException) -> Control | None:
    """Middleware that ends what is under way has made its result."""
    return (
        Control("returned", getattr(error, "result", None)) if type(error) is MiddlewareTermination else None
    )


def asked_of(messages: Any) -> dict[str, Any]:
    """What an agent or a model is asked: the newest message in words, which are the same in each process, and how many there are."""
    asked = newest_of(messages)
    newest = asked["newest"]
    if hasattr(newest, "text"):
        asked["newest"] = {"role": str(getattr(newest, "role", "")), "text": newest.text}
    return asked


def answer_of(made: Any) -> dict[str, Any]:
    """What a model or an agent answered."""
    return {"text": getattr(made, "text", None)}


def result_of(made: Any) -> Any:
    """What a tool returned: of contents whose text is JSON, what that says."""
    text = made
    if isinstance(made, list) and made and all(hasattr(part, "text") for part in made):
        text = "".join(part.text or "" for part in made)
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def used_by(response: Any) -> Usage | None:
    """What a response says that it used."""
    used = getattr(response, "usage_details", None)
    if not used:
        return None
    given, cached = used.get("input_token_count") or 0, used.get("cache_read_input_token_count") or 0
    model = getattr(response, "model", None) or getattr(response, "model_id", None)
    return Usage(given, used.get("output_token_count") or 0, min(cached, given), model=model)
