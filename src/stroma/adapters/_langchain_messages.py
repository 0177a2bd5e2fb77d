"""Views of the messages of LangChain: requests, answers and usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from langchain_core.messages import ToolMessage
from langgraph.types import Command

from stroma.adapters._state_views import newest_of
from stroma.cost.usage import Usage, tier_of

__all__ = ["answer_of", "asked_of", "result_of", "update", "usage_of"]


def update(result: Any) -> Any:
    """Return the update of the state by a node; of a state that is no dict, what the node returned."""
    if isinstance(result, Command):
        return dict(result._update_as_tuples())
    if isinstance(result, (list, tuple)) and any(isinstance(part, Command) for part in result):
        parts = [update(part) for part in result]
        return {
            key: value
            for part in parts
            for key, value in (part.items() if isinstance(part, dict) else [("__root__", part)])
        }
    return {} if result is None else result


def asked_of(args: tuple[Any, ...], _: dict[str, Any]) -> dict[str, Any]:
    """Return the view of a model request."""
    return newest_of(args[0].messages)


def answer_of(answer: Any) -> Any:
    """Return the view of a model response."""
    answer = getattr(answer, "model_response", answer)
    return {
        "messages": getattr(answer, "result", [answer]),
        "structured_response": getattr(answer, "structured_response", None),
    }


def result_of(answer: Any) -> Any:
    """Return the result of a tool, parsed if its message holds JSON."""
    if not isinstance(answer, ToolMessage):
        return update(answer)
    try:
        return json.loads(answer.content) if isinstance(answer.content, str) else answer.content
    except ValueError:
        return answer.content


def usage_of(result: Any) -> Usage | None:
    """Return the usage in the messages of an ``LLMResult``."""
    used = [
        _of_message(choice.message)
        for prompt in result.generations
        for choice in prompt
        if hasattr(choice, "message")
    ]
    usages = [usage for usage in used if usage is not None]
    if not usages:
        return None
    return usages[0] if len(usages) == 1 else _sum(usages)


def _of_message(message: Any) -> Usage | None:
    metadata = getattr(message, "usage_metadata", None)
    if not metadata:
        return None
    if metadata.get("total_cost") == 0:  # So LangChain marks an answer from its own cache.
        return Usage()
    details = metadata.get("input_token_details") or {}
    # OpenAI's tiers have names of their own: "flex_cache_read".
    cached = _sum_counts(details, lambda name: name.endswith("cache_read"))
    # Anthropic's integration has the kinds of writes, and a sum of 0 beside them.
    hour = details.get("ephemeral_1h_input_tokens") or 0
    kinds = (details.get("ephemeral_5m_input_tokens") or 0) + hour
    written = max(kinds, _sum_counts(details, lambda name: name.endswith("cache_creation")))
    response = getattr(message, "response_metadata", None) or {}
    return Usage(
        max(metadata.get("input_tokens", 0), cached + written),
        metadata.get("output_tokens", 0),
        cached,
        written,
        response.get("model_name") or response.get("model"),
        tier_of(response.get("usage"), response),
        hour,
    )


def _sum_counts(details: dict[str, Any], is_counted: Callable[[str], bool]) -> int:
    return sum(count or 0 for name, count in details.items() if is_counted(name))


def _sum(parts: list[Usage]) -> Usage:
    return Usage(
        sum(part.input_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        sum(part.cached_input_tokens for part in parts),
        sum(part.cache_write_tokens for part in parts),
        next((part.model for part in parts if part.model is not None), None),
        next((part.tier for part in parts if part.tier is not None), None),
        sum(part.cache_write_1h_tokens for part in parts),
    )
