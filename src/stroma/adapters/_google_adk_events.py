"""The events of a run of Google ADK, with the tokens that they report."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from stroma.adapters._google_adk_answers import (
    answers_of,
    ask,
    asking_calls,
    has_no_message,
    pending_calls,
)
from stroma.adapters.guard import Guard
from stroma.cost.usage import Usage

__all__ = ["events", "live_events", "usage_of"]


async def events(
    runner: Any, parts: Callable[..., Any], guard: Guard, kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    """Yield the events of ``run_async()``. At its end, compare the tokens and ask what ADK has asked."""
    counted, waiting = 0, list[Any]()
    if has_no_message(kwargs):
        waiting = await pending_calls(runner, kwargs)
        message = answers_of(guard, waiting)
        if message is None and waiting:  # What is still to be answered is asked again.
            await ask(guard, waiting)
            return
        kwargs, waiting = {**kwargs, "new_message": message}, []
    async with contextlib.aclosing(parts(**kwargs)) as source:
        async for event in source:
            used = None if event.partial else usage_of(event, "")
            counted += 0 if used is None else used.input_tokens + used.output_tokens
            waiting += asking_calls(event)
            yield event
    guard.compare_usage("ADK", counted)
    await ask(guard, waiting)


async def live_events(parts: Callable[..., Any], guard: Guard, kwargs: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield the events of ``run_live()``, and count the tokens of each against the budget of the run."""
    run = guard.current
    async with contextlib.aclosing(parts(**kwargs)) as source:
        async for event in source:
            used = None if event.partial else usage_of(event, getattr(event, "model_version", None))
            if used is not None:
                run.report_usage(used)
            run.usage.check_budget()
            yield event


def usage_of(response: Any, model: str | None) -> Usage | None:
    """Return what a response or an event says about its tokens, or None."""
    used = getattr(response, "usage_metadata", None)
    if used is None:
        return None
    input_tokens = (used.prompt_token_count or 0) + (getattr(used, "tool_use_prompt_token_count", None) or 0)
    output_tokens = (used.candidates_token_count or 0) + (getattr(used, "thoughts_token_count", None) or 0)
    if used.candidates_token_count is None:  # The live mode of older releases: the total alone has them.
        output_tokens = max(output_tokens, (used.total_token_count or 0) - input_tokens)
    cached = used.cached_content_token_count or 0
    written = (
        getattr(used, "cache_creation_input_tokens", None) or 0
    )  # Set by the models of Anthropic and litellm.
    return Usage(max(input_tokens, cached + written), output_tokens, cached, written, model)
