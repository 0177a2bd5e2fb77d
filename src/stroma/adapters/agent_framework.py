"""Microsoft Agent Framework: middleware that makes steps of an agent, its model requests and its tools.

::

    agent = Agent(client, tools=[weather], middleware=stroma_middleware(guard, {"weather": (City, Weather)}))
    await agent.run("...")  # a run
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any, Final

from stroma.adapters._patches import patch
from stroma.adapters._releases import imports_of

with imports_of("agent-framework"):
    from agent_framework import (
        AgentMiddleware,
        AgentMiddlewareLayer,
        ChatMiddleware,
        FunctionMiddleware,
        MiddlewareTermination,
        ResponseStream,
    )

from stroma.adapters._state_views import newest_of, parse_text
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, contract_for, what_stopped
from stroma.cost.usage import Usage
from stroma.engine.execution import CURRENT, current_node

__all__ = ["stroma_middleware"]


def stroma_middleware(guard: Guard, tools: Contracts | None = None) -> list[Any]:
    """Return the middleware that guards an agent: ``Agent(..., middleware=...)``.

    ``tools``: contracts by the names of tools; input is the arguments, output the result (of text that is
    JSON, what it says). A contract of no tool raises UnknownNode at the first model request. Agents that run
    inside the agent are guarded with it, as tools (``as_tool``) or called in one.
    """
    patch(guard, AgentMiddlewareLayer, "run", _with_inner_agents)
    return _Shared(guard, tools).middleware


class _Shared:
    """State that the three middlewares share."""

    def __init__(self, guard: Guard, tools: Contracts | None) -> None:
        self.guard = guard
        self.tools = {name: contract_for(name, contract) for name, contract in (tools or {}).items()}
        self.checked = not self.tools

    @property
    def middleware(self) -> list[Any]:
        return [_OfAgent(self), _OfChat(self), _OfFunction(self)]

    @property
    def inner(self) -> _Shared:
        """The state of agents inside: contracts may name tools of any of them, and none needs all."""
        inner = _Shared(self.guard, self.tools)
        inner.checked = True
        return inner

    def check(self, offered: Any) -> None:
        if not self.checked:
            self.guard.contracts(self.tools, _names_of(offered), "tool")
            self.checked = True
        self.raise_fatal()

    def raise_fatal(self) -> None:
        self.guard.current.raise_fatal()


def _shared_above() -> _Shared | None:
    """Return the state of the guarded agent that the code here runs inside of."""
    node = CURRENT.get()
    while node is not None:
        shared: _Shared | None = node.notes.get(_Shared)
        if shared is not None:
            return shared
        node = node.parent
    return None


def _with_inner_agents(bare: Any) -> Any:
    """Return the method by which every agent that runs inside a guarded one gets its middleware."""

    def run(self: Any, *args: Any, middleware: Any = None, **kwargs: Any) -> Any:
        shared = _shared_above()
        own = getattr(self, "middleware", None)
        if shared is not None and not any(
            isinstance(one, _OfAgent) for several in (own, middleware) for one in _listed(several)
        ):
            middleware = [*_listed(middleware), *shared.inner.middleware]
        return bare(self, *args, middleware=middleware, **kwargs)

    return run


def _listed(middleware: Any) -> list[Any]:
    return (
        list(middleware) if isinstance(middleware, Sequence) else [] if middleware is None else [middleware]
    )


class _OfAgent(AgentMiddleware):
    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: Any, call_next: Any) -> None:
        guard, request = self._shared.guard, _asked_of(context.messages)
        call = _AgentCall(context, call_next, self._shared)
        # With a request for approval, or the response to one, it continues where it waited.
        answered = _is_continuation(context.messages or [])
        # Its models and tools had their retries: it is called once.
        about: Any = {
            "input_view": lambda *_: request,
            "output_view": _answer_of,
            "control": _control_of,
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
        guard, request = self._shared.guard, _asked_of(context.messages)
        call = _Rest(context, call_next)
        about: Any = {
            "input_view": lambda *_: request,
            "messages": lambda *_: context.messages,
            "output_view": _answer_of,
            "usage": _used_by,
            "control": _control_of,
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
            _result_of,
            control=_control_of,
            role="tool",
        )
        try:
            context.result = await shared.guard.acall(step, _Rest(context, call_next).whole)
        except Exception as error:
            if what_stopped(error) is None:
                raise
            shared.guard.current.fatal = error
            raise MiddlewareTermination(str(error)) from error


class _Rest:
    """The rest of a middleware pipeline, as a coroutine function that can be called again, or as a stream."""

    def __init__(self, context: Any, call_next: Any, judge: Callable[[], None] = lambda: None) -> None:
        self._context, self._next, self._judge = context, call_next, judge
        #: The whole response, once it is there.
        self.response: Any = None

    async def whole(self) -> Any:
        try:
            await self._next()
        except Exception:
            self._judge()  # Raises the cause of the framework's error in its place.
            raise
        self._judge()
        return self._context.result

    async def parts(self) -> AsyncGenerator[Any, None]:
        stream = await _Rest.whole(self)
        try:
            async for part in stream:
                yield part
            # This also stores the history of a session.
            self.response = await stream.get_final_response()
        except Exception:
            self._judge()
            raise
        finally:
            # The request of a stream that is not read to its end goes on otherwise. Cleanup of the framework
            # may fail in the context of another task, and 1.0 has no close().
            with contextlib.suppress(Exception):
                await stream.close()
        self._judge()

    def final(self, _: Any) -> Any:
        return self.response


class _AgentCall(_Rest):
    """The call of an agent."""

    def __init__(self, context: Any, call_next: Any, shared: _Shared) -> None:
        super().__init__(context, call_next, shared.raise_fatal)
        self._shared = shared

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the agent on its step, and the requests that its response ends with."""
        is_outermost = _shared_above() is None
        current_node().notes[_Shared] = self._shared
        yield
        # Those of an agent inside are not passed on to anybody.
        for request in (getattr(self.response, "user_input_requests", None) or ()) if is_outermost else ():
            name = getattr(getattr(request, "function_call", None), "name", None) or request.type
            self._shared.guard.current.ctx.account.note_suspended(f"approval of {name}")

    async def whole(self) -> Any:
        with self._noted():
            self.response = await super().whole()
        return self.response

    async def parts(self) -> AsyncGenerator[Any, None]:
        with self._noted():
            async with contextlib.aclosing(super().parts()) as parts:
                async for part in parts:
                    yield part


# ---------------------------------------------------------------------- views


def _is_continuation(messages: list[Any]) -> bool:
    kinds = {content.type for message in messages for content in message.contents}
    return not kinds.isdisjoint(("function_approval_request", "function_approval_response"))


def _control_of(error: BaseException) -> Control | None:
    """Return the meaning of an exception by which middleware ends a call with a result."""
    return (
        Control("returned", getattr(error, "result", None)) if type(error) is MiddlewareTermination else None
    )


def _asked_of(messages: Any) -> dict[str, Any]:
    """Return the newest message as text, which is the same in each process, and the number of messages."""
    request = newest_of(messages)
    newest = request["newest"]
    if hasattr(newest, "text"):
        request["newest"] = {"role": str(getattr(newest, "role", "")), "text": newest.text}
    return request


def _answer_of(answer: Any) -> dict[str, Any]:
    return {"text": getattr(answer, "text", None)}


def _result_of(result: Any) -> Any:
    """Return the result of a tool, parsed if its text is JSON."""
    text = result
    if isinstance(result, list) and result and all(hasattr(part, "text") for part in result):
        text = "".join(part.text or "" for part in result)
    return parse_text(text)


def _used_by(response: Any) -> Usage | None:
    used = getattr(response, "usage_details", None)
    if not used:
        return None
    input_tokens = used.get("input_token_count") or 0
    cached, written = _first_count(used, _CACHE_READS), _first_count(used, _CACHE_WRITES)
    # Anthropic counts what was cached beside the input.
    if cached + written > input_tokens or any(name.startswith("anthropic.") for name in used):
        input_tokens += cached + written
    model = getattr(response, "model", None) or getattr(response, "model_id", None)
    return Usage(input_tokens, used.get("output_token_count") or 0, cached, written, model)


#: The names that clients have for tokens from a cache, and for tokens to it.
_CACHE_READS: Final = (
    "cache_read_input_token_count",
    "anthropic.cache_read_input_tokens",
    "openai.cached_input_tokens",
    "prompt/cached_tokens",
)
_CACHE_WRITES: Final = (
    "cache_creation_input_token_count",
    "anthropic.cache_creation_input_tokens",
    "openai.cache_write_tokens",
    "prompt/cache_write_tokens",
)


def _first_count(used: Any, names: tuple[str, ...]) -> int:
    return next((count for name in names if (count := used.get(name))), 0)


def _names_of(tools: Any, seen: tuple[Any, ...] = ()) -> set[str]:
    """Return the names of tools, and of those of the agents that are tools."""
    names = {tool.name for tool in tools or () if hasattr(tool, "name")}
    for tool in tools or ():
        for cell in getattr(getattr(tool, "func", None), "__closure__", None) or ():
            agent = getattr(cell, "cell_contents", None)
            if isinstance(agent, AgentMiddlewareLayer) and agent not in seen:
                names |= _names_of(getattr(agent, "default_options", {}).get("tools"), (*seen, agent))
    return names
