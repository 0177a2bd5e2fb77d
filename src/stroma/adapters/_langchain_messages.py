"""What messages of LangChain say: what was asked and answered, and what it used."""

from __future__ import annotations

import json
from typing import Any

from langchain_core.messages import ToolMessage
from langgraph.types import Command

from stroma.adapters._state_views import newest_of
from stroma.cost.usage import Usage

__all__ = ["answer_of", "asked_of", "result_of", "update", "usage_of"]


def update(result: Any) -> Any:
    """What a node does to the state."""
    if isinstance(result, Command):
        return dict(result._update_as_tuples())
    if isinstance(result, (list, tuple)):
        return {key: value for part in result for key, value in dict(update(part)).items()}
    return {} if result is None else result


def asked_of(args: tuple[Any, ...], _: dict[str, Any]) -> dict[str, Any]:
    """What a model is asked."""
    return newest_of(args[0].messages)


def answer_of(made: Any) -> Any:
    """What it answered."""
    made = getattr(made, "model_response", made)
    return {
        "messages": getattr(made, "result", [made]),
        "structured_response": getattr(made, "structured_response", None),
    }


def result_of(made: Any) -> Any:
    """What a tool returned: of a message that holds JSON, what that says."""
    if not isinstance(made, ToolMessage):
        return update(made)
    try:
        return json.loads(made.content) if isinstance(made.content, str) else made.content
    except ValueError:
        return made.content


def usage_of(result: Any) -> Usage | None:
    """What the messages of an ``LLMResult`` say that they used."""
    used = [
        _of_message(choice.message)
        for prompt in result.generations
        for choice in prompt
        if hasattr(choice, "message")
    ]
    found = [usage for usage in used if usage is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else _sum(found)


def _of_message(message: Any) -> Usage | None:
    said = getattr(message, "usage_metadata", None)
    if not said:
        return None
    given, details = said.get("input_tokens", 0), said.get("input_token_details") or {}
    cached = min(details.get("cache_read") or 0, given)
    about = getattr(message, "response_metadata", None) or {}
    return Usage(
        given,
        said.get("output_tokens", 0),
        cached_input_tokens=cached,
        cache_write_tokens=min(details.get("cache_creation") or 0, given - cached),
        model=about.get("model_name") or about.get("model"),
    )


def _sum(parts: list[Usage]) -> Usage:
    return Usage(
        sum(part.input_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        sum(part.cached_input_tokens for part in parts),
        sum(part.cache_write_tokens for part in parts),
        parts[0].model,
    )
