"""A model of Google ADK whose requests are steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from stroma.adapters._state_views import newest_of
from stroma.adapters.guard import Guard
from stroma.cost.usage import Usage

__all__ = ["guard_model"]


def guard_model(model: Any, guard: Guard, check: Callable[[], None]) -> None:
    """Make steps of a model's requests; changes it. ``check`` is called before each of them."""
    step = guard.wrap(
        "model",
        model.generate_content_async,
        kind="astream",
        given=lambda args, kwargs: newest_of((args[0] if args else kwargs["llm_request"]).contents),
        made=lambda response: {"content": getattr(response, "content", None)},
        usage=lambda response: _used(response, model.model),
        collect=_whole,
    )

    async def held(*args: Any, **kwargs: Any) -> Any:
        # ADK calls tools, and may go away, while it has the response that ends a stream: that ends the step before.
        check()
        whole = None
        async with contextlib.aclosing(step(*args, **kwargs)) as responses:
            async for response in responses:
                if whole is not None:
                    yield whole
                whole = None if response.partial else response
                if response.partial:
                    yield response
        if whole is not None:
            yield whole

    object.__setattr__(model, "generate_content_async", guard.mark(held))  # It is a pydantic model.


def _whole(responses: list[Any]) -> Any:
    """The response that ends a stream; it has the usage."""
    told = [response for response in responses if response.usage_metadata is not None]
    return (told or responses or [None])[-1]


def _used(response: Any, model: str) -> Usage | None:
    used = getattr(response, "usage_metadata", None)
    if used is None:
        return None
    given = (used.prompt_token_count or 0) + (getattr(used, "tool_use_prompt_token_count", None) or 0)
    made = (used.candidates_token_count or 0) + (getattr(used, "thoughts_token_count", None) or 0)
    return Usage(given, made, min(used.cached_content_token_count or 0, given), model=model)
