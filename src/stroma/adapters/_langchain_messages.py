"""Views of the messages of LangChain: requests, answers and usage."""

from __future__ import annotations

import json
from typing import Any

from langchain_core.messages import ToolMessage
from langgraph.types import Command

from stroma.adapters._state_views import newest_of
from stroma.cost.usage import Usage

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
    input_tokens, details = metadata.get("input_tokens", 0), metadata.get("input_token_details") or {}
    cached = min(details.get("cache_read") or 0, input_tokens)
    response = getattr(message, "response_metadata", None) or {}
    return Usage(
        input_tokens,
        metadata.get("output_tokens", 0),
        cached_input_tokens=cached,
        cache_write_tokens=min(details.get("cache_creation") or 0, input_tokens - cached),
        model=response.get("model_name") or response.get("model"),
    )


def _sum(parts: list[Usage]) -> Usage:
    return Usage(
        sum(part.input_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        sum(part.cached_input_tokens for part in parts),
        sum(part.cache_write_tokens for part in parts),
        parts[0].model,
    )
