"""litellm: its requests as steps, streamed or not, of your code and of each framework that uses it.

::

    attach(litellm, guard)
    with guard.run():
        litellm.completion(model="gpt-4o", messages=[...])
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("litellm"):
    import litellm

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import aclose_stream, note_counted
from stroma.adapters.guard import Guard
from stroma.cost.prices import find_pricer
from stroma.cost.usage import Usage, UsageError, usage_from

__all__ = ["attach"]

T = TypeVar("T")
_FUNCTIONS: Final = (
    "completion",
    "acompletion",
    "text_completion",
    "atext_completion",
    "embedding",
    "aembedding",
    "responses",
    "aresponses",
)


def attach(target: T, guard: Guard) -> T:
    """Make a step ``model`` of each request of the module ``litellm``, or a ``Router``; returns it changed.

    What took a function from the module before (``from litellm import completion``) has the one without a
    guard.
    """
    for name in _FUNCTIONS:
        bare = getattr(target, name, None)
        if bare is not None and not guard.has(bare):
            setattr(target, name, _guarded(bare, guard))
    return target


def _guarded(bare: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    about: Any = {"output_view": _answer, "usage": _used, "delta": _delta}
    sent = lambda args, kwargs: _requested(args, kwargs)[1]  # noqa: E731

    def request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        model, messages = _requested(args, kwargs)
        return {"model": model, **newest_of(messages)}

    whole: Any = guard.wrap("model", bare, input_view=request, messages=sent, **about)

    def stream_of(parts: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        _, messages = _requested(args, kwargs)
        collect = functools.partial(_collected, messages)
        views: Any = {"input_view": lambda *_: request(args, kwargs), "messages": lambda *_: messages}
        step: Any = guard.wrap("model", parts, collect=collect, **views, **about)
        return step()

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("stream"):
            return whole(*args, **kwargs)
        responses: list[Any] = []

        def parts() -> Any:
            responses.append(bare(*args, **kwargs))
            yield from responses[-1]

        return _OpenedStream(stream_of(parts, args, kwargs), responses)

    async def acall(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("stream"):
            return await whole(*args, **kwargs)
        responses: list[Any] = []

        async def parts() -> Any:
            responses.append(await bare(*args, **kwargs))
            try:
                async for part in responses[-1]:
                    yield part
            finally:  # So that the provider writes nothing that nobody reads.
                await aclose_stream(responses[-1])

        return await _OpenedAsyncStream(stream_of(parts, args, kwargs), responses).opened()

    is_async = inspect.iscoroutinefunction(inspect.unwrap(bare))
    return guard.mark(functools.wraps(bare)(acall if is_async else call))  # type: ignore[no-any-return]


class _OpenedStream:
    """A streamed answer, whose first part has arrived; it has the attributes of litellm's."""

    def __init__(self, parts: Any, responses: list[Any]) -> None:
        self._parts, self._responses = parts, responses
        self._first = [part for _, part in zip(range(1), parts, strict=False)]

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._first.pop() if self._first else next(self._parts)

    def close(self) -> None:
        """End the step; what was read is counted."""
        self._parts.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._responses[-1], name)


class _OpenedAsyncStream:
    """The same for an async one."""

    def __init__(self, parts: Any, responses: list[Any]) -> None:
        self._parts, self._responses = parts, responses
        self._first: list[Any] = []

    async def opened(self) -> _OpenedAsyncStream:
        """Return the stream once its first part has arrived."""
        with contextlib.suppress(StopAsyncIteration):
            self._first.append(await anext(self._parts))
        return self

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return self._first.pop() if self._first else await anext(self._parts)

    async def aclose(self) -> None:
        """End the step; what was read is counted."""
        await self._parts.aclose()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._responses[-1], name)


def _requested(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model and the messages, prompt or input of a request."""
    values = [*args, None, None]
    messages = next((kwargs[name] for name in ("messages", "prompt", "input") if name in kwargs), values[1])
    return kwargs.get("model", values[0]), messages


def _collected(messages: Any, parts: list[Any]) -> Any:
    """Return the whole response of a stream, with its provider's usage, or else litellm's estimate."""
    ended = [part.response for part in parts if getattr(part, "response", None) is not None]
    return ended[-1] if ended else litellm.stream_chunk_builder(parts, messages=messages)


def _answer(response: Any) -> Any:
    choices = getattr(response, "choices", None)
    if not choices:
        return {"model": getattr(response, "model", None)}
    message = getattr(choices[0], "message", None)
    return {"answer": getattr(message, "content", None) or getattr(choices[0], "text", None)}


def _delta(part: Any) -> str | None:
    if getattr(part, "type", None) == "response.output_text.delta":
        return str(part.delta)
    choices = getattr(part, "choices", None)
    if not choices:
        return None
    text: str | None = getattr(getattr(choices[0], "delta", None), "content", None)
    return text or getattr(choices[0], "text", None)


def _used(response: Any) -> Usage | None:
    """Return the usage of a response, and its cost as litellm has it; None for one from litellm's cache."""
    hidden = getattr(response, "_hidden_params", None) or {}
    if hidden.get("cache_hit"):
        with contextlib.suppress(UsageError):
            note_counted(usage_from(response))
        return None
    used, cost = usage_from(response), hidden.get("response_cost")
    note_counted(used)
    if cost is None:
        with contextlib.suppress(Exception):  # It knows no price of the model.
            cost = litellm.completion_cost(completion_response=response)
    if not cost and used.model is not None and find_pricer(used.model) is not None:
        cost = None  # Its 0 may also mean that it lists the model without a price.
    return used if cost is None else dataclasses.replace(used, cost_usd=cost)
