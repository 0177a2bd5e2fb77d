"""Calls of Agent Framework behind a middleware, and what contracts, hooks and the journal see of them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from agent_framework import AgentMiddlewareLayer, MiddlewareTermination

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control
from stroma.cost.usage import Usage

__all__ = ["Rest", "answer_of", "asked_of", "control_of", "names_of", "result_of", "used_by"]


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
        stream = await Rest.whole(self)
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


def names_of(tools: Any, seen: tuple[Any, ...] = ()) -> set[str]:
    """Return the names of tools, and of those of the agents that are tools."""
    names = {tool.name for tool in tools or () if hasattr(tool, "name")}
    for tool in tools or ():
        for cell in getattr(getattr(tool, "func", None), "__closure__", None) or ():
            agent = getattr(cell, "cell_contents", None)
            if isinstance(agent, AgentMiddlewareLayer) and agent not in seen:
                names |= names_of(getattr(agent, "default_options", {}).get("tools"), (*seen, agent))
    return names
